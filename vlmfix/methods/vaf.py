"""VAF: multiply the scores of the image up and those of the system prompt down."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from vlmfix.base.attention import AttentionMethod, FusedEdit, Keys, Plan
from vlmfix.base.method import LayerRange, Preset, option
from vlmfix.families import ModelInfo
from vlmfix.families.kinds import TEXT
from vlmfix.methods.structures import LLAVA_7B

__all__ = ["VisualAmplificationFusion", "multiply_scores"]


def multiply_scores(scores: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    """s' = gain * s: scores (B, H, R, K), gain (B, K), 1 where a key is left alone.

    A negative score moves the other way: with a gain above 1 it falls, and its key loses mass.
    """
    return scores * gain[:, None, None, :].to(scores.dtype)


@dataclass(frozen=True)
class VisualAmplificationFusion(LayerRange, AttentionMethod):
    """Multiply pre-softmax scores: of visual tokens up, of the system prompt down.

    Yin, Si, Wang: "ClearSight: Visual Signal Enhancement for Object Hallucination Mitigation in
    Multimodal Large Language Models", CVPR 2025, arXiv 2503.13107. In the middle layers, where
    image and text are fused, all heads and every text row after the image: scores of visual
    tokens times `image_gain`, scores of the text before the first of them times `system_gain`.
    Both come before the mask; the softmax then renormalises.

    Paper and code: the paper speaks of a boost by the attention that visual tokens get; the
    authors' code is a plain product, and so is this. A negative score of a visual token therefore
    gets more negative. The code counts 35 system and 576 image tokens; here the kinds of the
    keys say which is which, padding is neither, and with several images the system prompt ends at
    the first. The code's layers, 9 to 14, are those of 32; a model without a preset takes
    round(0.28 L) up to round(0.47 L), which gives the same at L = 32 and is our rule.
    Independent reruns disagree with the paper's gains: measure it on your model.
    """

    image_gain: float = option(
        1.15, "factor on the scores of visual tokens; 1 changes nothing", 0.0, 10.0
    )
    system_gain: float = option(
        0.95, "factor on the scores of the text before the first visual token", 0.0, 10.0
    )
    start_layer: int | None = option(
        None, "first edited layer; default: preset, else round(0.28 x layers)"
    )
    end_layer: int | None = option(
        None, "layer after the last edited one; default: preset, else round(0.47 x layers)"
    )

    name: ClassVar[str] = "vaf"
    rows: ClassVar[Literal["predicting", "text"]] = "text"
    has_fused_form: ClassVar[bool] = True
    PRESETS: ClassVar[tuple[Preset, ...]] = (
        Preset(LLAVA_7B, {"start_layer": 9, "end_layer": 15}, "authors' code"),
    )

    def prepared(self, info: ModelInfo, model: torch.nn.Module) -> VisualAmplificationFusion:
        start = round(0.28 * info.num_layers)
        end = max(start + 1, round(0.47 * info.num_layers))
        return self.with_defaults(info, start_layer=start, end_layer=end)

    def plan(self, keys: Keys) -> Plan | None:
        if self.image_gain == self.system_gain == 1:
            return None
        visual = keys.visual
        live = visual.any(1)
        # Kinds never change, so what precedes the first visual token is settled with the prompt.
        before = visual.cumsum(1) == 0
        system = (keys.kinds == TEXT) & before & live[:, None]
        groups = visual.to(torch.uint8) + 2 * system.to(torch.uint8)
        factors = torch.tensor([1.0, self.image_gain, self.system_gain, 1.0], device=groups.device)
        fused = FusedEdit(groups=groups, gain=factors[:, None].repeat(1, 2))
        return Plan({"factors": factors[groups.long()]}, live.tolist(), fused=fused)

    def edit_scores(self, scores: torch.Tensor, *, factors: torch.Tensor) -> torch.Tensor:
        return multiply_scores(scores, factors)
