"""M3ID: weigh the image against no image, with a weight that grows with the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from vlmfix.base.contrast import Branch, ContrastMethod, Prompt, keep_plausible
from vlmfix.base.method import option

__all__ = ["MutualInformationDecoding", "growing_weight"]

# Beyond this weight a float32 sum holds nothing but the difference between prompt and branch, and
# the gap that keep_plausible leaves would be lost in rounding.
_LARGEST = 1e6


def growing_weight(
    token: torch.Tensor, decay: float, max_weight: float | None, dtype: torch.dtype
) -> torch.Tensor:
    """Weights (R,) of the contrast: w_t = (1 - g_t) / g_t = exp(decay t) - 1, g_t = exp(-decay t).

    Args:
        token: (R,) which token of the answer is chosen, counted from 1.
        decay: lambda of the paper, per token.
        max_weight: upper bound of the weight; None: 1e6, which only very long answers reach.
        dtype: of the result.
    """
    weight = torch.expm1(decay * token.to(dtype))
    return weight.clamp(max=_LARGEST if max_weight is None else max_weight)


@dataclass(frozen=True)
class MutualInformationDecoding(ContrastMethod):
    """Add w_t (log p(with image) - log p(without)) to log p(with image), w_t growing with t.

    Favero et al.: "Multi-Modal Hallucination Control by Visual Information Grounding", CVPR 2024,
    arXiv 2403.14003. The longer an answer, the more it follows its own text; so the pull towards
    what the image alone explains grows as exp(decay t) - 1, t = 1 at the first token of each
    answer. The branch sees the prompt without any image, markers included.

    The authors' code was not found. `rule="apc"` is what the re-implementation in AvisC's code
    does: tokens below `beta` of the best are ruled out. `rule="gate"`, the paper's as far as our
    notes go, contrasts only where the best token's probability is below `confidence`, and rules out
    nothing. The bound `max_weight` is ours: at decay 0.02 the weight is 0.02 at the first token and
    1.6 at the 48th, but 28000 at the 512th, where the sum holds nothing but the difference.
    """

    decay: float = option(
        0.02, "lambda: growth of the contrast's weight per token; 0: no contrast", 0.0, 10.0
    )
    max_weight: float | None = option(
        3.0, "upper bound of the contrast's weight (ours); none: unbounded, as published",
        0.0, _LARGEST,
    )  # fmt: skip
    rule: Literal["apc", "gate"] = option(
        "apc", "apc: rule out implausible tokens; gate: contrast only where the model is unsure"
    )
    beta: float = option(
        0.1, "apc: rule out tokens below this share of the best token's probability; 0: none",
        0.0, 1.0,
    )  # fmt: skip
    confidence: float = option(
        0.3, "gate: contrast where the best token's probability is below this", 0.0, 1.0
    )

    name: ClassVar[str] = "m3id"

    def streams(self) -> int:
        gated = self.rule == "gate" and self.confidence == 0
        return 0 if self.decay == 0 or self.max_weight == 0 or gated else 1

    def neutral(self) -> bool:
        return self.streams() == 0 and (self.rule == "gate" or self.beta == 0)

    def branches(self, prompt: Prompt) -> Sequence[Branch]:
        return [Branch(image=False)]

    def contrast(
        self, base: torch.Tensor, branches: Sequence[torch.Tensor], token: torch.Tensor
    ) -> torch.Tensor:
        plain = combined = base.log_softmax(-1)
        if branches:
            weight = growing_weight(token, self.decay, self.max_weight, base.dtype)
            combined = plain + weight[:, None] * (plain - branches[0].log_softmax(-1))
        if self.rule == "apc":
            return keep_plausible(combined, base, self.beta)
        unsure = plain.amax(-1, keepdim=True).exp() < self.confidence
        return torch.where(unsure, keep_plausible(combined, base, 0.0), plain)
