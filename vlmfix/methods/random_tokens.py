"""Random visual tokens: the baseline that a pruning method has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vlmfix.base.contrast import noise_generator
from vlmfix.base.method import option
from vlmfix.base.pruning import Kept, TokenMethod, VisualTokens

__all__ = ["RandomTokens"]


@dataclass(frozen=True)
class RandomTokens(TokenMethod):
    """Keep a random sample of the visual tokens, without replacement, all equally likely.

    Omri, Shroff, Tambe: "Token Sequence Compression for Efficient Multimodal Computing", arXiv
    2504.17892, find it hard to beat. Every image has a random generator of its own, so that a
    prompt keeps the same tokens in any batch; images of the same size keep the same ones.
    """

    seed: int = option(0, "random seed of the choice of tokens", 0, 2**63, high_open=True)

    name: ClassVar[str] = "random"

    def keep(self, visual: VisualTokens, budget: int) -> Kept:
        generator = noise_generator(self.seed + visual.number)
        return Kept(torch.randperm(len(visual), generator=generator)[:budget].sort().values)
