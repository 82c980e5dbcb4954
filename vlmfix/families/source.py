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
from collections.abc import Iterator
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
    found = set()
    for call in _calls_of_attention(_function(module.forward)):
        for keyword in call.keywords:
            value = keyword.value
            own = isinstance(value, ast.Attribute) and ast.unparse(value.value) == "self"
            absent = own and getattr(module, value.attr, None) is None  # type: ignore[attr-defined]
            if keyword.arg is not None and not absent:
                found.add(keyword.arg)
    return frozenset(found)


def asks_for_implementation(module: torch.nn.Module) -> bool:
    """Whether the class of a module compares the name of its attention implementation."""
    kind: Any = type(module)
    tree = _parsed(kind)
    return tree is not None and any(
        isinstance(part, ast.Attribute) and part.attr == "_attn_implementation"
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare)
        for part in ast.walk(node)
    )


def drops_positions(model: Any) -> bool:
    """Whether generate() of a model gives its forward no positions, not even those it was given."""
    tree = _function(model.prepare_inputs_for_generation)
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
    tree = _function(module.forward)
    last = max((call.end_lineno or 0 for call in _calls_of_attention(tree)), default=None)
    if tree is None or last is None:
        return []
    behind = sorted(
        (node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.lineno > last),
        key=lambda node: (node.end_lineno or 0, node.end_col_offset or 0),
    )
    names = []
    for call in behind:
        name = call.func.attr if isinstance(call.func, ast.Attribute) else ""
        if name in ("reshape", "view", "flatten"):
            break  # heads are one axis from here on
        child = getattr(module, name, None)
        if isinstance(child, torch.nn.Module) and "Norm" in type(child).__name__:
            names.append(name)
    return names


def _calls_of_attention(tree: ast.AST | None) -> Iterator[ast.Call]:
    """Calls of what was taken from the interface."""
    if tree is None:
        return
    taken: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(x, ast.Name) and x.id == _INTERFACE for x in ast.walk(node.value)):
                taken.update(target.id for target in targets if isinstance(target, ast.Name))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in taken:
            yield node


def _function(method: Any) -> ast.AST | None:
    function = inspect.unwrap(method)
    return _parsed(getattr(function, "__func__", function))


@functools.cache
def _parsed(code: Any) -> ast.AST | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, TypeError, SyntaxError):
        return None
