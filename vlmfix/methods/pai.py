"""PAI: pay more attention to the image, by lifting its scores before the softmax."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch

from vlmfix.base.attention import AttentionMethod, FusedEdit, Keys, Plan, lift_scores
from vlmfix.base.method import Preset, check_range, find_preset, layer_range
from vlmfix.families import ModelInfo

__all__ = ["PayAttentionToImage"]


@dataclass(frozen=True)
class PayAttentionToImage(AttentionMethod):
    """Raise the scores of visual tokens in the row that predicts the next token.

    Liu, Zheng, Chen: "Paying More Attention to Image: A Training-Free Method for Alleviating
    Hallucination in LVLMs", ECCV 2024, arXiv 2407.21771. This is the attention part; the
    contrast with a text-only run (gamma) is `pai_guidance`, and "pai+pai_guidance" is both.

    In every layer of [start_layer, end_layer), all heads, s' = s + alpha |s| for visual keys.

    Paper and code: the authors' code edits after the mask is added, which at alpha = 1 unmasks
    padded image keys; here the edit comes before the mask. The paper stops at layers where
    hidden states settle, the code starts at layer 2 of 32; the code's rule, scaled to the
    depth, is the default. The code takes one contiguous image span; here every visual token
    counts. With its contrast on, the code leaves the last prompt row unedited by accident.
    Expect lower recall along with fewer hallucinations: read CHAIR beside recall.
    """

    alpha: float | None = field(
        default=None,
        metadata={"help": "strength; default: the model's preset, else 0.2 (the authors' script)"},
    )
    start_layer: int | None = field(
        default=None, metadata={"help": "first edited layer; default ceil(layers * 2 / 32)"}
    )
    end_layer: int | None = field(
        default=None, metadata={"help": "one past the last edited layer; default: all"}
    )

    name: ClassVar[str] = "pai"
    rows: ClassVar[Literal["predicting", "text"]] = "predicting"
    has_fused_form: ClassVar[bool] = True
    PRESETS: ClassVar[tuple[Preset, ...]] = (
        Preset("LLaVA-1.5-7B", "llava", "llama", 4096, 32, {"alpha": 0.5}, "notes on the paper"),
    )

    def __post_init__(self) -> None:
        check_range(self, "alpha", 0.0, 10.0)

    def prepared(self, info: ModelInfo, model: torch.nn.Module) -> PayAttentionToImage:
        preset = find_preset(self.PRESETS, info)
        alpha = self.alpha
        if alpha is None:
            alpha = preset.values["alpha"] if preset else 0.2
        default = (math.ceil(info.num_layers * 2 / 32), info.num_layers)
        start, end = layer_range(self, info, self.start_layer, self.end_layer, default)
        return replace(self, alpha=alpha, start_layer=start, end_layer=end)

    def layers(self, info: ModelInfo) -> Sequence[int]:
        return range(self.start_layer or 0, self.end_layer or info.num_layers)

    def plan(self, keys: Keys) -> Plan | None:
        if not self.alpha:
            return None
        visual = keys.visual
        gain = [[1.0, 1.0], [1 + self.alpha, 1 - self.alpha], [1.0, 1.0], [1.0, 1.0]]
        fused = FusedEdit(
            groups=visual.to(torch.uint8), gain=torch.tensor(gain, device=visual.device)
        )
        return Plan((visual.float() * self.alpha,), visual.any(1).tolist(), fused=fused)

    def edit_scores(self, scores: torch.Tensor, *plan: torch.Tensor) -> torch.Tensor:
        return lift_scores(scores, plan[0])
