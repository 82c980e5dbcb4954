"""Watchers that several parts of the engine use (method.Watcher)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vlmfix.base.attention import Keys, Plan, Watcher

__all__ = ["LastRow"]


@dataclass(frozen=True, eq=False)
class LastRow(Watcher):
    """Keeps, per watched layer, the mean over heads of one row: (B, row + 1) float32."""

    row: int = 0

    name: ClassVar[str] = "last row"

    def plan(self, keys: Keys) -> Plan | None:
        places = torch.arange(keys.kinds.shape[1], device=keys.kinds.device)
        return Plan((places.expand(keys.kinds.shape),), [True] * len(keys.kinds))

    def observe_weights(
        self, layer: int, weights: torch.Tensor, position: int, *plan: torch.Tensor
    ) -> None:
        if not 0 <= self.row - position < weights.shape[2]:
            return
        places = plan[0][0]  # of the keys, which start late in sliding layers
        inside = places <= self.row
        row = weights[:, :, self.row - position].float().mean(1)
        kept = row.new_zeros(len(row), self.row + 1)
        kept[:, places[inside]] = row[:, inside]
        self.seen[layer] = kept
