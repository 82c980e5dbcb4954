"""PAI: raise the model's attention to the image by lifting its scores before the softmax."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from vlmfix.base.attention import AttentionMethod, FusedEdit, Keys, Plan, lift_scores
from vlmfix.base.method import LayerRange, Preset, option
from vlmfix.families import ModelInfo
from vlmfix.methods.structures import LLAVA_7B

__all__ = ["PayAttentionToImage"]


@dataclass(frozen=True)
class PayAttentionToImage(LayerRange, AttentionMethod):
    """Raise the scores of visual tokens in the row that predicts the next token.

    Liu, Zheng, Chen: "Paying More Attention to Image: A Training-Free Method for Alleviating
    Hallucination in LVLMs", ECCV 2024, arXiv 2407.21771. This is the attention part; the
    contrast with a branch of text alone (gamma) is `pai_guidance`; "pai+pai_guidance" is both.

    In every layer of [start_layer, end_layer), all heads, s' = s + alpha |s| for visual keys.

    Paper and code: the authors' code edits after the mask is added, which at alpha = 1 unmasks
    padded image keys; here the edit comes before the mask. The paper stops at layers where
    hidden states settle, the code starts at layer 2 of 32; the code's rule, scaled to the
    depth, is the default. The code takes one contiguous image span; here every visual token
    counts. With its contrast on, the code leaves the last prompt row unedited by accident.
    Expect lower recall along with fewer hallucinations: read CHAIR next to recall.
    """

    alpha: float | None = option(
        None, "strength of the lift; default: preset, else 0.2 (the authors' script)", 0.0, 10.0
    )
    start_layer: int | None = option(None, "first edited layer; default: ceil(layers / 16)")
    end_layer: int | None = option(None, "layer after the last edited one; default: all are edited")

    name: ClassVar[str] = "pai"
    rows: ClassVar[Literal["predicting", "text"]] = "predicting"
    has_fused_form: ClassVar[bool] = True
    PRESETS: ClassVar[tuple[Preset, ...]] = (
        Preset(LLAVA_7B, {"alpha": 0.5}, "notes on the paper"),
    )

    def prepared(self, info: ModelInfo, model: torch.nn.Module) -> PayAttentionToImage:
        return self.with_defaults(info, alpha=0.2, start_layer=math.ceil(info.num_layers / 16))

    def plan(self, keys: Keys) -> Plan | None:
        if not self.alpha:
            return None
        visual = keys.visual
        gain = [[1.0, 1.0], [1 + self.alpha, 1 - self.alpha], [1.0, 1.0], [1.0, 1.0]]
        fused = FusedEdit(
            groups=visual.to(torch.uint8), gain=torch.tensor(gain, device=visual.device)
        )
        return Plan({"lift": visual.float() * self.alpha}, visual.any(1).tolist(), fused=fused)

    def edit_scores(self, scores: torch.Tensor, *, lift: torch.Tensor) -> torch.Tensor:
        return lift_scores(scores, lift)
