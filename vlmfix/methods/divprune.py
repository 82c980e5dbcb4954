"""DivPrune: keep the visual tokens that differ most from each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from vlmfix.base.method import option
from vlmfix.base.pruning import Kept, TokenMethod, VisualTokens

__all__ = ["DivPrune", "most_diverse"]


def most_diverse(features: torch.Tensor, count: int) -> torch.Tensor:
    """Greedy solution of the max-min diversity problem, with 1 - cosine as the distance.

    The first pick is farthest from its nearest other token, each next one from its nearest pick;
    of equal ones the first in the image.

    Args:
        features: (n, D), n > 1.
        count: 1 <= count <= n.

    Returns:
        (count,) int64, in the order of the picks.
    """
    directions = torch.nn.functional.normalize(features.float(), dim=1)
    distances = 1 - directions @ directions.T
    others = distances.clone().fill_diagonal_(torch.inf)
    picks = [others.amin(1).argmax()]
    nearest = distances[picks[0]].clone()
    nearest[picks[0]] = -torch.inf
    while len(picks) < count:
        picks.append(nearest.argmax())
        nearest = torch.minimum(nearest, distances[picks[-1]])
        nearest[picks[-1]] = -torch.inf  # even if only its duplicates are left
    return torch.stack(picks)


@dataclass(frozen=True)
class DivPrune(TokenMethod):
    """Keep the visual tokens whose smallest distance to each other is largest, greedily.

    Alvar, Singh, Akbari, Zhang: "DivPrune: Diversity-based Visual Token Pruning for Large
    Multimodal Models", CVPR 2025, arXiv 2503.02175. Distances are 1 - cosine between tokens as the
    language model would get them. It reads neither attention nor the question and so runs on every
    family.

    The authors' script keeps 9.8 % (`ratio=0.098`); the default here is that of all pruning
    methods. Their code casts nothing; here distances are float32 in every dtype of the model. It
    also takes LLaVA-NeXT's newlines for tokens like any other (`newlines="inside"`); here each
    stays with its row, on top of the budget, as under all pruning methods.
    """

    newlines: Literal["beside", "inside"] = option(
        "beside",
        "newlines of LLaVA-NeXT: beside the budget, with the rows of which something stays, or "
        "inside it, tokens like any other (authors' code)",
    )

    name: ClassVar[str] = "divprune"

    def counts_newlines(self) -> bool:
        return self.newlines == "inside"

    def keep(self, visual: VisualTokens, budget: int) -> Kept:
        return Kept(most_diverse(visual.features, budget).sort().values)
