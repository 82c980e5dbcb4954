"""SPIN: suppress the heads that attend least to the image, chosen at every token."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from vlmfix.base.attention import AttentionMethod, Keys, Plan
from vlmfix.base.method import LayerRange, Preset, option
from vlmfix.families import ModelInfo
from vlmfix.methods.structures import LLAVA_7B

__all__ = ["HeadSuppressionByMass", "ImageGuidedHeadSuppression", "suppress"]


def suppress(strength: torch.Tensor, rho: float, epsilon: float) -> torch.Tensor:
    """Factors like `strength` (B, H, R): 1 for the strongest floor(rho H) heads, else epsilon."""
    heads = strength.shape[1]
    # 0.29 * 100 is 28.999999999999996: rounding must not cost a head.
    strongest = strength.topk(math.floor(rho * heads + 1e-9), dim=1).indices
    return torch.full_like(strength, epsilon).scatter(1, strongest, 1.0)


@dataclass(frozen=True)
class ImageGuidedHeadSuppression(LayerRange, AttentionMethod):
    """Multiply the outputs of the heads that attend least to the image by a small factor.

    "Mitigating Hallucinations in Vision-Language Models through Image-Guided Head Suppression"
    (SPIN), EMNLP 2025, arXiv 2505.16411. In the row that predicts the next token, in every layer
    of [start_layer, end_layer), a head's strength is the sum of its scores over the visual tokens.
    The strongest floor(rho x heads) heads stay as they are, the others are multiplied by `epsilon`
    before the output projection. Heads are chosen in each step and layer, and nothing is stored.

    Paper and code: the authors' code sums raw scores before the softmax, not probabilities, and
    so does the default; `score="mass"` takes the share of attention on the image instead. The
    two differ, as a raw sum also counts how negative the scores of ignored tokens are. The code's
    row mask is wrong for batches; here every sample has its own heads. In the code `epsilon` is 0
    when it is not given, and so it is here for models without a preset.
    """

    rho: float = option(0.95, "share of the heads that stay as they are; 1: all", 0.0, 1.0)
    epsilon: float | None = option(
        None, "factor on the outputs of the other heads; default: preset, else 0", 0.0, 1.0
    )
    score: Literal["raw", "mass"] = option(
        "raw", "strength of a head: raw (sum of its scores) or mass (of its attention)"
    )
    start_layer: int = option(0, "first edited layer")
    end_layer: int | None = option(None, "layer after the last edited one; default: all are edited")

    name: ClassVar[str] = "spin"
    rows: ClassVar[Literal["predicting", "text"]] = "predicting"
    PRESETS: ClassVar[tuple[Preset, ...]] = (
        Preset(LLAVA_7B, {"epsilon": 0.08}, "authors' code, CHAIR"),
    )

    def prepared(self, info: ModelInfo, model: torch.nn.Module) -> ImageGuidedHeadSuppression:
        ready = self.with_defaults(info, epsilon=0.0)
        return HeadSuppressionByMass(**vars(ready)) if self.score == "mass" else ready

    def plan(self, keys: Keys) -> Plan | None:
        if self.rho == 1 or self.epsilon == 1:
            return None
        return Plan({"visual": keys.visual.float()}, keys.visual.any(1).tolist())

    def score_scale(self, scores: torch.Tensor, *, visual: torch.Tensor) -> torch.Tensor:
        return self._factors(scores, visual)

    def _factors(self, rows: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
        """Factors (B, H, R) by the sum of each row (B, H, R, K) over visual keys (B, K)."""
        assert self.epsilon is not None  # set by prepared()
        strength = torch.matmul(rows, visual.to(rows.dtype)[:, None, :, None]).squeeze(-1)
        factors = suppress(strength, self.rho, self.epsilon)
        # All heads are at 0 where a row sees no image, as behind a sliding window.
        return torch.where((strength != 0).any(1, keepdim=True), factors, 1.0)


class HeadSuppressionByMass(ImageGuidedHeadSuppression):
    """SPIN with `score="mass"`: attention mass is known only after the softmax."""

    score_scale = AttentionMethod.score_scale  # not this method's: raw scores play no part

    def edit_weights(
        self, weights: torch.Tensor, *, visual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # A row times a factor is a head output times that factor; the row then sums to it.
        factors = self._factors(weights, visual)
        return weights * factors[..., None], factors != 1
