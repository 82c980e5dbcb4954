"""What looks at a forward and changes nothing: the base class, and what it is shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

__all__ = ["Observer", "Rows", "SeenRows"]

#: Which rows of a forward: "generated" = those of generated tokens; "predicting" = those that
#: predict a generated token (the last prompt row, then every generated one); "text" = every text
#: row that has a visual token before it, and every generated row; "all" = every row but padding.
Rows = Literal["generated", "predicting", "text", "all"]


@dataclass(frozen=True)
class SeenRows:
    """Some softmax rows of one layer, as the methods at work leave them.

    Attributes:
        layer: index of the decoder layer.
        weights: (B, H, R, K).
        position: of the first of the R rows.
        first_key: position of the first of the K keys; not 0 in sliding layers alone.
        visual: (B, K) bool, which keys are visual tokens.
        question, content: (B, P) bool over all P positions, see `Keys`.
    """

    layer: int
    weights: torch.Tensor
    position: int
    first_key: int
    visual: torch.Tensor
    question: torch.Tensor
    content: torch.Tensor


@dataclass(frozen=True, eq=False)
class Observer:
    """Sees some layers of one forward and keeps something of each in `seen`.

    An observer overrides `see_weights`, `see_heads` or both; only these are computed.

    Attributes:
        watched: indices of the decoder layers.
        seen: {layer: what was kept}.
    """

    watched: Sequence[int]
    seen: dict[int, torch.Tensor] = field(default_factory=dict)

    rows: ClassVar[Rows] = "predicting"

    def see_weights(self, rows: SeenRows) -> None:
        """See the rows of `rows`, each with the row before it.

        Long prompts come in pieces that overlap by one row, so that every row is seen once with
        the one before it.
        """
        raise NotImplementedError

    def see_heads(self, layer: int, outputs: torch.Tensor) -> None:
        """See the head outputs (B, H, R, D), before o_proj, of a prompt's rows that predict."""
        raise NotImplementedError

    def overrides(self, function: str) -> bool:
        """Whether this observer has a function of its own of that name."""
        return getattr(type(self), function) is not getattr(Observer, function)
