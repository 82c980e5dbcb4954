"""Lists of attention heads as options: ("16.29", "26.9") is head 29 of layer 16 and 9 of 26."""

from __future__ import annotations

import re
from collections.abc import Iterable

from vlmfix.errors import BadInput
from vlmfix.families import ModelInfo

__all__ = ["head_list", "head_names", "heads_by_layer"]

_PAIR = re.compile(r"(\d+)\.(\d+)", re.ASCII)


def head_list(names: Iterable[str], info: ModelInfo, method: str) -> tuple[tuple[int, int], ...]:
    """Read "layer.head" names, 0-based, heads being query heads.

    Args:
        names: e.g. ("16.29", "26.9"); as an option on the command line, "16.29/26.9".
        info: the model that the heads must be in.
        method: name of the method whose option this is, for the error.

    Returns:
        (layer, head) pairs, sorted, each once.

    Raises:
        BadInput: a name that is no "layer.head", or a head that the model does not have.
    """
    pairs = set()
    for name in names:
        match = _PAIR.fullmatch(name)
        if match is None:
            raise BadInput(
                f"{method}: head {name!r} is not of the form layer.head; write 16.29 for head 29 "
                "of layer 16, and 16.29/26.9 for two heads."
            )
        layer, head = int(match[1]), int(match[2])
        count = info.heads_of(layer)
        if layer not in info.attention or head >= count:
            raise BadInput(
                f"{method}: this {info.model_type} model has no attention head {name}. It has "
                f"{info.num_layers} layers, 0 to {info.num_layers - 1}, with heads 0 to "
                f"{count - 1}."
            )
        pairs.add((layer, head))
    return tuple(sorted(pairs))


def head_names(pairs: Iterable[tuple[int, int]]) -> tuple[str, ...]:
    """(layer, head) pairs as options take them: ((16, 29), (26, 9)) -> ("16.29", "26.9")."""
    return tuple(f"{layer}.{head}" for layer, head in pairs)


def heads_by_layer(names: Iterable[str] | None) -> dict[int, list[int]]:
    """Checked names by layer: ("16.29", "26.9") -> {16: [29], 26: [9]}."""
    listing: dict[int, list[int]] = {}
    for layer, head in (map(int, name.split(".")) for name in names or ()):
        listing.setdefault(layer, []).append(head)
    return listing
