"""Random visual tokens: the baseline that a pruning method has to beat."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from vlmfix.base.contrast import noise_generator
from vlmfix.base.method import check_range
from vlmfix.base.pruning import Kept, TokenMethod, VisualTokens

__all__ = ["RandomTokens"]


@dataclass(frozen=True)
class RandomTokens(TokenMethod):
    """Keep visual tokens drawn at random, without replacement, each with the same chance.

    Omri, Shroff, Tambe: "Token Sequence Compression for Efficient Multimodal Computing", arXiv
    2504.17892, find it hard to beat. Every image draws from a generator of its own, so that a
    prompt keeps the same tokens in any batch; images of the same size keep the same ones.
    """

    seed: int = field(default=0, metadata={"help": "of the draw"})

    name: ClassVar[str] = "random"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "seed", 0, 2**63, high_open=True)

    def keep(self, visual: VisualTokens, budget: int) -> Kept:
        generator = noise_generator(self.seed + visual.number)
        drawn = torch.randperm(len(visual), generator=generator)[:budget]
        return Kept(drawn.sort().values)
