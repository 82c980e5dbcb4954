"""What the source of a model says of it where no configuration does: nothing is run to find out.

Two things of an attention module decide whether an edit is exact: what it hands to its attention
function beside queries, keys and values, and what it does with the result before the output
projection.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
import textwrap
from dataclasses import dataclass
from typing import Any

import torch

__all__ = [
    "arguments_of_attention",
    "asks_for_implementation",
    "drops_positions",
    "norms_of_heads",
    "uses_interface",
]

_INTERFACE = "ALL_ATTENTION_FUNCTIONS"
_JOINING = ("reshape", "view", "flatten")  # behind these the heads are one axis


def uses_interface(module: torch.nn.Module) -> bool:
    """Whether the file of a module uses transformers' attention interface; True if unreadable."""
    file = sys.modules.get(type(module).__module__)
    try:
        return file is None or _INTERFACE in inspect.getsource(file)
    except (OSError, TypeError):
        return True  # then the first forward tells


def arguments_of_attention(module: Any) -> frozenset[str]:
    """Names of what the module hands to its attention function, but for parameters that are None.

    Empty where its source cannot be read.
    """
    return frozenset(
        name
        for name, attribute in _attention(_function(module.forward)).arguments
        if attribute is None or getattr(module, attribute, None) is not None
    )


def asks_for_implementation(module: torch.nn.Module) -> bool:
    """Whether the class of a module compares the name of its attention implementation."""
    kind: Any = type(module)
    return _asks(kind)


def drops_positions(model: Any) -> bool:
    """Whether generate() of a model gives its forward no positions, not even those it was given."""
    tree = _parsed(_function(model.prepare_inputs_for_generation))
    return tree is not None and any(
        isinstance(node, ast.Assign)
        and ast.unparse(node.value) == "None"
        and any(ast.unparse(target).endswith("['position_ids']") for target in node.targets)
        for node in ast.walk(tree)
    )


def norms_of_heads(module: Any) -> list[str]:
    """Names of the norms that the module puts on the head outputs, one head at a time.

    They come between the attention function and the reshape that joins the heads.
    """
    children = (
        (name, getattr(module, name, None)) for name in _attention(_function(module.forward)).behind
    )
    return [
        name
        for name, child in children
        if isinstance(child, torch.nn.Module) and "Norm" in type(child).__name__
    ]


@dataclass(frozen=True)
class _Attention:
    """What a forward does around its attention function.

    Attributes:
        arguments: names of the keyword arguments, each with the attribute of self that it is, if
            it is one.
        behind: names of what is called on the way to the reshape that joins the heads.
    """

    arguments: tuple[tuple[str, str | None], ...] = ()
    behind: tuple[str, ...] = ()


@functools.cache
def _attention(function: Any) -> _Attention:
    tree = _parsed(function)
    calls = [] if tree is None else _calls_of_attention(tree)
    if tree is None or not calls:
        return _Attention()
    arguments = []
    for keyword in (keyword for call in calls for keyword in call.keywords):
        value = keyword.value
        own = isinstance(value, ast.Attribute) and ast.unparse(value.value) == "self"
        if keyword.arg is not None:
            arguments.append((keyword.arg, value.attr if own else None))  # type: ignore[attr-defined]
    last = max(call.end_lineno or 0 for call in calls)
    later = sorted(
        (node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.lineno > last),
        key=lambda node: (node.end_lineno or 0, node.end_col_offset or 0),
    )
    names = [call.func.attr for call in later if isinstance(call.func, ast.Attribute)]
    joined = next((at for at, name in enumerate(names) if name in _JOINING), len(names))
    return _Attention(tuple(arguments), tuple(names[:joined]))


def _calls_of_attention(tree: ast.AST) -> list[ast.Call]:
    """Calls of what was taken from the interface."""
    taken: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(x, ast.Name) and x.id == _INTERFACE for x in ast.walk(node.value)):
                taken.update(target.id for target in targets if isinstance(target, ast.Name))
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in taken
    ]


@functools.cache
def _asks(kind: Any) -> bool:
    tree = _parsed(kind)
    return tree is not None and any(
        isinstance(part, ast.Attribute) and part.attr == "_attn_implementation"
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare)
        for part in ast.walk(node)
    )


def _function(method: Any) -> Any:
    """The function of a method, below what decorators and accelerate put around it."""
    function = inspect.unwrap(method)
    return getattr(function, "__func__", function)


def _parsed(code: Any) -> ast.AST | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, TypeError, SyntaxError):
        return None
