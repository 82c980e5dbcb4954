"""A control arm: the model hooked as for any method, and nothing edited.

Its answers have to be the plain model's. What differs between the two is the harness's own doing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from vlmfix.base.attention import AttentionMethod, Keys, Plan
from vlmfix.families import ModelInfo

__all__ = ["NoOp"]


@dataclass(frozen=True)
class NoOp(AttentionMethod):
    """Hooks in all decoder layers that edit nothing."""

    name: ClassVar[str] = "noop"

    def layers(self, info: ModelInfo) -> Sequence[int]:
        """All of them."""
        return range(info.num_layers)

    def plan(self, keys: Keys) -> Plan | None:
        """No edit."""
        return None
