"""How transformers reaches an attention function, and what is kept out of compiled graphs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

__all__ = ["AttentionOutput", "base_attention", "in_python"]

AttentionOutput = tuple[torch.Tensor, "torch.Tensor | None"]
Function = TypeVar("Function", bound=Callable[..., Any])


def base_attention(module: Any) -> Callable[..., AttentionOutput]:
    """The attention function that a module's own configuration names."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    function: Callable[..., AttentionOutput] = ALL_ATTENTION_FUNCTIONS.get_interface(
        module.config._attn_implementation, eager
    )
    return function


def in_python(function: Function) -> Function:
    """Keep a function out of torch.compile's graphs: frames, plans and counts are Python state."""
    kept: Function = torch.compiler.disable(function)  # type: ignore[no-untyped-call]  # torch
    return kept
