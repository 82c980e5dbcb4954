"""A KV cache that holds the rows of branches behind its own: how they are joined and reordered.

What a layer keeps per token (keys, values) is joined with shorter rows padded on the left, as a
batch of prompts is. What it keeps per row (the states of linear attention and of convolutions) has
no length, and is put side by side.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import (
    Cache,
    DummyLayer,
    DynamicCache,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from vlmfix.errors import StateError

__all__ = ["JOINABLE", "join_rows", "repeat_rows", "unjoinable"]

#: Layers of a KV cache that rows can be joined to. Quantised ones cannot be cut, and layers of a
#: modeling file keep what only their model knows: MiniMax M3 chooses keys by blocks of positions,
#: which padding would move, Unlimited-OCR keeps prompts apart from answers.
JOINABLE = frozenset(
    {
        DummyLayer,
        DynamicIndexedLayer,
        DynamicLayer,
        DynamicSlidingWindowLayer,
        LinearAttentionAndFullAttentionLayer,
        LinearAttentionAndSlidingWindowAttentionLayer,
        LinearAttentionLayer,
        StaticLayer,
        StaticSlidingWindowLayer,
    }
)

#: What layers keep per token: the axes of rows and of tokens.
_PER_TOKEN = {
    "keys": (0, 2),
    "values": (0, 2),
    "indexer_keys": (0, 1),
    "indexer_position_ids": (1, 2),
}

#: What they keep per row: {number of the state: a tensor, rows first, or None}.
_PER_ROW = ("conv_states", "recurrent_states")


def unjoinable(cache: Cache) -> str:
    """The kinds of layers of a cache that rows cannot be joined to; empty if there are none."""
    kinds = {type(layer) for layer in cache.layers} - JOINABLE
    return ", ".join(sorted(kind.__name__ for kind in kinds))


def repeat_rows(cache: Cache, rows: int, copies: int) -> None:
    """Put `copies` of each of the rows of a cache side by side."""
    cache.reorder_cache(torch.arange(rows).repeat_interleave(copies))


def join_rows(cache: Cache, branches: Sequence[DynamicCache], rows: int) -> None:
    """Put the rows of branches behind the base rows of a cache, shorter ones padded on the left.

    Args:
        cache: of the base rows.
        branches: of as many rows each; they are empty afterwards.
        rows: R, the base rows.
    """
    for index, layer in enumerate(cache.layers):
        others: list[Any] = [branch.layers[index] for branch in branches]
        if isinstance(layer, StaticLayer):
            _join_static(layer, others, rows)
        else:
            _join_tokens(layer, others)
        _join_states(layer, others)
        for branch in branches:  # or all would be held twice
            branch.layers[index] = None
    kind: Any = type(cache)
    joined: Any = cache
    joined.__class__ = _with_branches(kind)
    joined.row_groups = (1 + len(branches), rows)


def _join_tokens(layer: Any, others: Sequence[Any]) -> None:
    for name, (rows_axis, tokens_axis) in _PER_TOKEN.items():
        base = getattr(layer, name, None)
        if base is not None and base.ndim > 1:  # empty ones have one axis
            parts = [_padded(getattr(other, name), base, tokens_axis) for other in others]
            setattr(layer, name, torch.cat([base, *parts], dim=rows_axis))


def _join_states(layer: Any, others: Sequence[Any]) -> None:
    for name in _PER_ROW:
        for number, base in getattr(layer, name, {}).items():
            if base is None:
                continue
            # Of unequal length while a convolution's past is recorded, for drafts to be undone.
            parts = [_padded(getattr(other, name)[number], base, -1) for other in others]
            getattr(layer, name)[number] = joined = torch.cat([base, *parts])
            torch._dynamo.mark_static_address(joined)


def _join_static(layer: Any, others: Sequence[Any], rows: int) -> None:
    length = min(int(layer.get_seq_length()), layer.max_cache_len)
    groups = 1 + len(others)
    for name in ("keys", "values"):
        base = getattr(layer, name)
        joined = base.new_zeros(groups * rows, *base.shape[1:])
        joined[:rows] = base
        for group, other in enumerate(others, 1):
            own = _padded(getattr(other, name), base[:, :, :length], 2)
            joined[group * rows : (group + 1) * rows, :, :length] = own
        torch._dynamo.mark_static_address(joined)
        setattr(layer, name, joined)
    layer.batch_size = groups * rows


def _padded(own: torch.Tensor | None, base: torch.Tensor, axis: int) -> torch.Tensor:
    """What a branch has, padded on the left of an axis to the length of the base."""
    if own is None or own.ndim < base.ndim:  # cross-attention, of a branch without the image
        return torch.zeros_like(base)
    missing = base.shape[axis] - own.shape[axis]
    if not missing:
        return own
    shape = list(own.shape)
    shape[axis] = missing
    return torch.cat([own.new_zeros(shape), own], dim=axis)


@functools.cache
def _with_branches(kind: Any) -> Any:
    """A class of cache that reorders the rows of branches as it is told for those of the base.

    Its objects are those of `kind`, which a copy of them stays, too, until they are reset. Nothing
    else that generate() does to a cache names rows.
    """

    class WithBranches(kind):  # type: ignore[misc]  # a class made at run time
        row_groups: tuple[int, int]

        def update(self, key_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return super().update(self._whole(key_states), *args, **kwargs)

        def update_conv_state(self, conv_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return super().update_conv_state(self._whole(conv_states), *args, **kwargs)

        def _whole(self, new: torch.Tensor) -> torch.Tensor:
            groups, rows = self.row_groups
            if len(new) != groups * rows:
                raise StateError(
                    f"this KV cache holds {groups * rows} rows, {rows} of prompts and the others "
                    "of a contrastive method's branches, and a forward without them has come. Go "
                    "on with the same method, or start from the prompt without this cache."
                )
            return new

        def reset(self) -> None:
            super().reset()
            for layer in self.layers:  # what comes next has other rows
                layer.is_initialized = False
                for name in ("is_conv_states_initialized", "is_recurrent_states_initialized"):
                    setattr(layer, name, dict.fromkeys(getattr(layer, name, ()), False))
            self.__class__ = kind

        def reorder_cache(self, beam_idx: torch.Tensor) -> None:
            groups, rows = self.row_groups
            starts = torch.arange(groups, device=beam_idx.device) * rows
            super().reorder_cache((starts[:, None] + beam_idx).flatten())

    WithBranches.__name__ = WithBranches.__qualname__ = f"{kind.__name__}WithBranches"
    return WithBranches
