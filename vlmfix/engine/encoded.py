"""The images of one call: as the vision tower saw them, and what pruning left of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlmfix.families.tower import EncodedImage

__all__ = ["CallImages", "Reduction"]


@dataclass(frozen=True)
class Reduction:
    """What becomes of the placeholders of one image.

    Attributes:
        positions: (k,) int64, ascending: the placeholders that stay, newlines included.
        count: placeholders that there were.
        weights: (k, count) float32, what each of them is made of; None: itself.
        image: what the vision recorder saw of it; None where there was none.
        size: visual tokens that stay, and that there were; newlines do not count.
    """

    positions: torch.Tensor
    count: int
    weights: torch.Tensor | None
    image: EncodedImage | None
    size: tuple[int, int]

    def apply(self, features: torch.Tensor) -> torch.Tensor:
        """(count, D) features -> (k, D)."""
        if self.weights is None:
            return features[self.positions.to(features.device)]
        weights = self.weights.to(features.device)
        return (weights @ features.float()).to(features.dtype)


@dataclass
class CallImages:
    """What is known of the images of one call.

    Attributes:
        recorded: as the vision recorder saw them; None: not asked for yet, or not recorded.
        reductions: what became of the visual tokens of each; None: the prompt was not cut.
        placeholders: visual tokens of each prompt before it was cut.
    """

    recorded: list[EncodedImage] | None = None
    reductions: list[Reduction] | None = None
    placeholders: list[int] | None = None
