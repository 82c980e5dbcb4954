"""SPIN: damp the heads that look least at the image, anew for every token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch

from vlmfix.base.attention import AttentionMethod, Keys, Plan
from vlmfix.base.method import Preset, check_range, find_preset, layer_range
from vlmfix.families import ModelInfo

__all__ = ["ImageGuidedHeadSuppression", "suppress"]


def suppress(strength: torch.Tensor, rho: float, epsilon: float) -> torch.Tensor:
    """Factors like `strength` (B, H, R): 1 for the strongest floor(rho H) heads, else epsilon."""
    heads = strength.shape[1]
    # 0.29 * 100 is 28.999999999999996: rounding must not cost a head.
    strongest = strength.topk(math.floor(rho * heads + 1e-9), dim=1).indices
    return torch.full_like(strength, epsilon).scatter(1, strongest, 1.0)


@dataclass(frozen=True)
class ImageGuidedHeadSuppression(AttentionMethod):
    """Multiply the outputs of the heads that look least at the image by a small factor.

    "Mitigating Hallucinations in Vision-Language Models through Image-Guided Head Suppression"
    (SPIN), EMNLP 2025, arXiv 2505.16411. In the row that predicts the next token, in every layer
    of [start_layer, end_layer), a head's strength is the sum of its scores over the visual tokens.
    The strongest floor(rho x heads) heads stay as they are, the others are multiplied by `epsilon`
    before the output projection. Nothing is stored: each step and layer decides for itself.

    Paper and code: the authors' code sums raw scores before the softmax, not probabilities, and
    so does the default; `score="mass"` takes the share of attention on the image instead. The
    two differ, as a raw sum also counts how negative the scores of ignored tokens are. The code's
    row mask is wrong for batches; here every sample decides for itself. In the code `epsilon` is 0
    when it is not given, and so it is here for models without a preset.
    """

    rho: float = field(default=0.95, metadata={"help": "share of the heads that stay; 1: all"})
    epsilon: float | None = field(
        default=None,
        metadata={"help": "factor on the other heads; default: the model's preset, else 0"},
    )
    score: Literal["raw", "mass"] = field(
        default="raw",
        metadata={"help": "strength of a head: sum of its raw scores, or its attention mass"},
    )
    start_layer: int = field(default=0, metadata={"help": "first edited layer"})
    end_layer: int | None = field(
        default=None, metadata={"help": "one past the last edited layer; default: all"}
    )

    name: ClassVar[str] = "spin"
    rows: ClassVar[Literal["predicting", "text"]] = "predicting"
    PRESETS: ClassVar[tuple[Preset, ...]] = (
        Preset(
            "LLaVA-1.5-7B", "llava", "llama", 4096, 32, {"epsilon": 0.08},
            "authors' code, CHAIR", (32000, 32064),
        ),
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_range(self, "rho", 0.0, 1.0)
        check_range(self, "epsilon", 0.0, 1.0)

    def prepared(self, info: ModelInfo, model: torch.nn.Module) -> ImageGuidedHeadSuppression:
        epsilon = self.epsilon
        if epsilon is None:
            preset = find_preset(self.PRESETS, info)
            epsilon = preset.values["epsilon"] if preset else 0.0
        default = (0, info.num_layers)
        _, end = layer_range(self, info, self.start_layer, self.end_layer, default)
        return replace(self, epsilon=epsilon, end_layer=end)

    def layers(self, info: ModelInfo) -> Sequence[int]:
        return range(self.start_layer, self.end_layer or info.num_layers)

    def plan(self, keys: Keys) -> Plan | None:
        if self.rho == 1 or self.epsilon == 1:
            return None
        return Plan((keys.visual.float(),), keys.visual.any(1).tolist())

    def overrides(self, function: str) -> bool:
        # Raw scores decide before the softmax, attention mass is known after it only.
        unused = "edit_weights" if self.score == "raw" else "score_scale"
        return function != unused and super().overrides(function)

    def score_scale(self, scores: torch.Tensor, *plan: torch.Tensor) -> torch.Tensor:
        return self._factors(scores, plan[0])

    def edit_weights(
        self, weights: torch.Tensor, *plan: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # A row times a factor is a head output times that factor; the row then sums to it.
        factors = self._factors(weights, plan[0])
        return weights * factors[..., None], factors != 1

    def _factors(self, rows: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
        """Factors (B, H, R) by the sum of each row (B, H, R, K) over visual keys (B, K)."""
        assert self.epsilon is not None  # set by prepared()
        strength = torch.matmul(rows, visual.to(rows.dtype)[:, None, :, None]).squeeze(-1)
        factors = suppress(strength, self.rho, self.epsilon)
        # All heads are at 0 where there is no image, or none left in a sliding window.
        return torch.where((strength != 0).any(1, keepdim=True), factors, 1.0)
