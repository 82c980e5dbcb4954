"""The rows of branches in a KV cache: joined behind the base rows, and what a forward needs then.

In row order, branch g of row b is row g R + b, with R base rows (beams and returned sequences
included) and g = 0 the base.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from vlmfix.engine.frame import Frame
from vlmfix.engine.ledger import Memory
from vlmfix.errors import StateError
from vlmfix.families.surgeon import TOKEN_TYPES

__all__ = ["JOINABLE", "Branches", "join_rows"]


#: Layers of a KV cache that rows can be joined to. Quantised ones cannot be cut, linear attention
#: keeps no keys.
JOINABLE = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)


@dataclass(frozen=True, eq=False)
class Branches(Memory):
    """The rows of one cache, once the branches have been joined to it.

    Attributes:
        count: the number of branches, G.
        visible: ((1 + G) R, P) bool, which of the P keys of the prompt a row sees.
        following: (R, 1) int64, the position of the first token behind the prompt, in the base.
        shift: (G R, 1) int64, what to add to a position of the base for the same token in a branch.
        as_base: whether every branch sees the keys that its base row sees.
        first: per branch, the first key that any of its rows sees.
    """

    count: int
    visible: torch.Tensor
    following: torch.Tensor
    shift: torch.Tensor
    as_base: bool
    first: tuple[int, ...]

    def require(self, stages: Collection[str]) -> None:
        if "contrast" not in stages:
            raise StateError(
                "this KV cache also holds the rows of a contrastive method's branches. Go on with "
                "the same method, or start from the prompt without this cache."
            )

    @property
    def rows(self) -> int:
        """R, the base rows."""
        return len(self.visible) // (1 + self.count)

    def widen(self, kwargs: Mapping[str, Any], frame: Frame) -> dict[str, Any]:
        """The arguments of a forward on R rows, for all (1 + G) R of them.

        Args:
            kwargs: of a forward on tokens behind the prompt; input_ids is (R, Q).
            frame: of that forward.
        """
        past = frame.past
        offset = max(frame.offsets.values(), default=0)
        ids = kwargs["input_ids"]
        rows, queries = ids.shape
        wide = dict(kwargs)
        for name in ("input_ids", *TOKEN_TYPES):
            if kwargs.get(name) is not None:
                wide[name] = kwargs[name].repeat(1 + self.count, 1)
        mask = kwargs.get("attention_mask")
        positions = kwargs.get("position_ids")
        if positions is None:  # outside of generate() the model would make them
            steps = past - self.visible.shape[1] + torch.arange(queries, device=ids.device)
            positions = self.following.to(ids.device) + steps
        positions = positions.expand(*positions.shape[:-2], rows, queries)
        repeats = [1] * positions.ndim
        repeats[-2] = self.count
        wide["position_ids"] = torch.cat(
            [positions, positions.repeat(repeats) + self.shift.to(positions.device)], dim=-2
        )
        if isinstance(mask, Mapping):
            wide["attention_mask"] = {
                kind: self._wide_mask(m, past, queries, offset if kind != "full_attention" else 0)
                for kind, m in mask.items()
            }
        else:
            wide["attention_mask"] = self._wide_mask(mask, past, queries, 0)
        return wide

    def _wide_mask(
        self, mask: torch.Tensor | None, past: int, queries: int, offset: int
    ) -> torch.Tensor | None:
        groups, prompt = 1 + self.count, self.visible.shape[1]
        if mask is None:
            if self.as_base:
                return None
            rest = self.visible.new_ones(len(self.visible), past + queries - prompt)
            return torch.cat([self.visible, rest], dim=1).long()
        wide = mask.repeat(groups, *[1] * (mask.ndim - 1))
        if self.as_base:
            return wide
        visible = self.visible.to(mask.device)
        if mask.ndim == 2:
            wide[:, :prompt] *= visible.to(mask.dtype)
            return wide
        # (R, 1, Q, K), as a static cache has it: K keys from `offset` on, bool or additive.
        keys = mask.shape[-1]
        visible = visible[:, offset : offset + keys]
        hidden = torch.nn.functional.pad(~visible, (0, keys - visible.shape[1]))[:, None, None]
        filler = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        return wide.masked_fill(hidden, filler)


def join_rows(cache: Cache, branches: Sequence[DynamicCache], rows: int) -> None:
    """Put the rows of branches behind the base rows of a cache, shorter ones padded on the left."""
    groups = 1 + len(branches)
    for layer, *others in zip(cache.layers, *(b.layers for b in branches), strict=True):
        if layer.is_compileable:
            length = min(int(layer.get_seq_length()), layer.max_cache_len)
            for name in ("keys", "values"):
                base = getattr(layer, name)
                joined = base.new_zeros(groups * rows, *base.shape[1:])
                joined[:rows] = base
                for group, other in enumerate(others, 1):
                    own = getattr(other, name)
                    start = length - own.shape[2]
                    joined[group * rows : (group + 1) * rows, :, start:length] = own
                torch._dynamo.mark_static_address(joined)
                setattr(layer, name, joined)
            layer.batch_size = groups * rows
        else:
            for name in ("keys", "values"):
                base = getattr(layer, name)
                own = (getattr(other, name) for other in others)
                pad = torch.nn.functional.pad
                left = [pad(x, (0, 0, base.shape[2] - x.shape[2], 0)) for x in own]
                setattr(layer, name, torch.cat([base, *left]))
        for other in others:  # or all branches would be held twice
            del other.keys, other.values
    kind: Any = type(cache)
    joined_cache: Any = cache
    joined_cache.__class__ = _with_branches(kind)
    joined_cache.row_groups = (groups, rows)


@functools.cache
def _with_branches(kind: Any) -> Any:
    """A class of cache that reorders the rows of branches as it is told for those of the base.

    Its objects are those of `kind`, which a copy of them stays, too, until they are reset. Nothing
    else that generate() does to a cache names rows.
    """

    class WithBranches(kind):  # type: ignore[misc]  # a class made at run time
        row_groups: tuple[int, int]

        def update(self, key_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            groups, rows = self.row_groups
            if len(key_states) != groups * rows:
                raise StateError(
                    f"this KV cache holds {groups * rows} rows, {rows} of prompts and the others "
                    "of a contrastive method's branches, and a forward without them has come. Go "
                    "on with the same method, or start from the prompt without this cache."
                )
            return super().update(key_states, *args, **kwargs)

        def reset(self) -> None:
            super().reset()
            for layer in self.layers:  # what comes next has other rows
                layer.is_initialized = False
            self.__class__ = kind

        def reorder_cache(self, beam_idx: torch.Tensor) -> None:
            groups, rows = self.row_groups
            starts = torch.arange(groups, device=beam_idx.device) * rows
            super().reorder_cache((starts[:, None] + beam_idx).flatten())

    WithBranches.__name__ = WithBranches.__qualname__ = f"{kind.__name__}WithBranches"
    return WithBranches
