"""What follows prompts that a bare forward has cut: its caller still counts them whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vlmfix.engine.ledger import Memory
from vlmfix.engine.stage import Forward
from vlmfix.errors import BadInput

__all__ = ["CutPrompts", "follow_cut_prompts"]


@dataclass(frozen=True, eq=False)
class CutPrompts(Memory):
    """The prompts of one cache, which were cut.

    Attributes:
        given: columns of the prompts as they were given.
        mask: (B, L) int64, the padding of those that are left.
        removed: (B, 1) int64, how far positions of later tokens moved; None: they stayed.
        following: (B, 1) int64, the position behind each prompt, where positions have gaps.
    """

    given: int
    mask: torch.Tensor
    removed: torch.Tensor | None
    following: torch.Tensor | None

    def rows_are_alike(self) -> bool:
        kept = [x for x in (self.mask, self.removed, self.following) if x is not None]
        return all(bool((x == x[:1]).all()) for x in kept)


def follow_cut_prompts(forward: Forward) -> dict[str, Any]:
    """The arguments of a forward behind cut prompts, with mask and positions for what is left.

    Masks and positions may count the prompts whole, as the caller gave them, or as they are in the
    cache; a mask of as many columns as both would have counts them whole.

    Raises:
        BadInput: a mask that does neither.
    """
    kwargs, cache = forward.kwargs, forward.cache
    ledger = forward.caches.ledger(cache)
    cut = None if ledger is None else ledger.get(CutPrompts)
    if cut is None or cache is None or len(kwargs["input_ids"]) != len(cut.mask):
        return kwargs  # other rows than the prompts', which no frame is made for
    changed = dict(kwargs)
    behind = int(cache.get_seq_length()) - cut.mask.shape[1]
    queries = kwargs["input_ids"].shape[1]
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    whole = True
    if mask is None:
        if not bool(cut.mask.all()):
            rest = cut.mask.new_ones(len(cut.mask), behind + queries)
            changed["attention_mask"] = torch.cat([cut.mask, rest], dim=1)
    elif mask.ndim == 2 and mask.shape[1] == cut.given + behind + queries:
        kept = cut.mask.to(mask)
        changed["attention_mask"] = torch.cat([kept, mask[:, cut.given :]], dim=1)
    elif mask.ndim == 2 and mask.shape[1] == cut.mask.shape[1] + behind + queries:
        whole = False
    else:
        raise BadInput(
            f"an attention_mask of shape {tuple(mask.shape)} fits neither the prompts of "
            f"{cut.given} columns nor the {cut.mask.shape[1]} that pruning left of them, with "
            f"{behind + queries} columns behind. Give a mask (rows, columns), or none."
        )
    if positions is None and cut.following is not None:
        steps = torch.arange(behind, behind + queries, device=cut.following.device)
        changed["position_ids"] = cut.following + steps
    elif positions is not None and positions.ndim == 2 and whole and cut.removed is not None:
        changed["position_ids"] = positions - cut.removed.to(positions.device)
    return changed
