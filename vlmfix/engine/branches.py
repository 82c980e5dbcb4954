"""The rows of branches in a KV cache, and what a forward on all of them needs.

In row order, branch g of row b is row g R + b, with R base rows (beams and returned sequences
included) and g = 0 the base. joined.py puts them there.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vlmfix.engine.frame import Frame
from vlmfix.engine.ledger import Memory
from vlmfix.errors import StateError
from vlmfix.families.surgeon import TOKEN_TYPES

__all__ = ["Branches"]

#: Kinds of layers whose mask says which of the tokens of this forward are padding, and nothing of
#: keys; behind the prompt none is.
_WITHOUT_KEYS = ("linear_attention", "conv")


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
        blind: per branch, whether it has no image.
    """

    count: int
    visible: torch.Tensor
    following: torch.Tensor
    shift: torch.Tensor
    as_base: bool
    first: tuple[int, ...]
    blind: tuple[bool, ...]

    def require(self, stages: Collection[str]) -> None:
        if "contrast" not in stages:
            raise StateError(
                "this KV cache also holds the rows of a contrastive method's branches. Go on with "
                "the same method, or start from the prompt without this cache."
            )

    def rows_are_alike(self) -> bool:
        return False

    def cut(self, length: int) -> None:
        raise StateError(
            "this KV cache was cut inside a prompt whose branches it holds, too, which other "
            "columns belong to. Start from the prompt without this cache."
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
        cross = kwargs.get("cross_attention_mask")
        if cross is not None:  # (R, Q, images, tiles), of models whose images are not in the prompt
            own = [torch.zeros_like(cross) if blind else cross for blind in self.blind]
            wide["cross_attention_mask"] = torch.cat([cross, *own])
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
                kind: None
                if kind in _WITHOUT_KEYS
                else self._wide_mask(m, past, queries, offset if kind != "full_attention" else 0)
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
