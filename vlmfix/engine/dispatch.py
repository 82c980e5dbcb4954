"""How transformers reaches an attention function, and what is kept out of compiled graphs."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vlmfix.families.source import asks_for_implementation

__all__ = ["AttentionOutput", "base_attention", "in_python", "own_name"]

AttentionOutput = tuple[torch.Tensor, "torch.Tensor | None"]
Function = TypeVar("Function", bound=Callable[..., Any])

_EAGER = "eager_attention_forward"


class _StandIn(str):
    """The name of an attention function that stands in for another: it equals both names."""

    stands_for: str

    def __new__(cls, name: str, stands_for: str) -> _StandIn:
        own = super().__new__(cls, name)
        own.stands_for = stands_for
        return own

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) or other == self.stands_for

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__  # transformers finds the function by it


def own_name(name: str, module: Any) -> str:
    """The name under which a module's configuration will lead to an attention function of ours.

    Modules with sparse attention ask for it, `config._attn_implementation in ("eager", "sdpa")`,
    before they hide the keys that were not chosen. What they are told must stay what it was.
    torch.compile follows plain strings only, so others get one.
    """
    asks = asks_for_implementation(module)
    return _StandIn(name, module.config._attn_implementation) if asks else name


def base_attention(module: Any) -> Callable[..., AttentionOutput]:
    """The attention function that a module's own configuration names."""
    # Llama 4's file has two eager functions: that of a module is the one its forward names.
    names = inspect.unwrap(type(module).forward).__code__.co_names
    eager_name = next((one for one in names if one.endswith(_EAGER)), _EAGER)
    eager = getattr(sys.modules[type(module).__module__], eager_name, None)
    function: Callable[..., AttentionOutput] = ALL_ATTENTION_FUNCTIONS.get_interface(
        module.config._attn_implementation, eager
    )
    return function


def in_python(function: Function) -> Function:
    """Keep a function out of torch.compile's graphs: frames, plans and counts are Python state."""
    kept: Function = torch.compiler.disable(function)  # type: ignore[no-untyped-call]  # torch
    return kept
