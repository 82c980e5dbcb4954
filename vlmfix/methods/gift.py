"""GIFT: where the gaze jumped while the question was read, attention to the image is multiplied."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch

from vlmfix.analysis.calibrate import load_calibration
from vlmfix.base.attention import AttentionMethod, Keys, Plan, ProbePass
from vlmfix.base.method import Preset, check_range, find_preset
from vlmfix.base.observer import Observer, Rows, SeenRows
from vlmfix.errors import BadInput, StateError
from vlmfix.families import ModelInfo

__all__ = ["GazeObserver", "GazeShiftFusion", "fuse", "gaze_map", "top_heads"]


def top_heads(amounts: torch.Tensor, share: float) -> torch.Tensor:
    """Mark the floor(share * H) heads (at least one) with the most: (B, H, ...) -> same, 0 or 1."""
    count = max(1, int(share * amounts.shape[1]))
    return torch.zeros_like(amounts).scatter(1, amounts.topk(count, dim=1).indices, 1.0)


def gaze_map(rises: torch.Tensor, visual: torch.Tensor, share: float = 0.5) -> torch.Tensor:
    """How strongly each visual token drew the gaze, in [0, 1].

    Args:
        rises: (B, H, K), positive jumps of attention, summed over the rows of the question.
        visual: (B, K) bool.
        share: of the heads, those that jump most are averaged.

    Returns:
        (B, K): their mean, clipped to mean +- 3 standard deviations over the sample's visual
        tokens, then spread from 0 to 1. 0 elsewhere, and where all visual tokens are equal.
    """
    chosen = top_heads(rises.sum(-1), share)
    gaze = (rises * chosen[..., None]).sum(1) / chosen.sum(1, keepdim=True)
    count = visual.sum(1, keepdim=True)
    mean = (gaze * visual).sum(1, keepdim=True) / count.clamp_min(1)
    spread = ((gaze - mean) ** 2 * visual).sum(1, keepdim=True) / (count - 1).clamp_min(1)
    reach = 3 * spread.sqrt()
    gaze = gaze.clamp(mean - reach, mean + reach)
    low = gaze.masked_fill(~visual, math.inf).amin(1, keepdim=True)
    height = gaze.masked_fill(~visual, -math.inf).amax(1, keepdim=True) - low
    return torch.where(visual & (height > 0), (gaze - low) / height, 0.0)


def fuse(
    weights: torch.Tensor,
    visual: torch.Tensor,
    lift: torch.Tensor,
    question: torch.Tensor,
    beta: float = 1.0,
    share: float = 0.5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Raise gazed-at visual tokens, and the question by the same factor, in the heads for each.

    Args:
        weights: softmax rows (B, H, R, K).
        visual: (B, K), 1 at visual tokens.
        lift: (B, K), m - 1, where m is the factor of a visual token; 0 elsewhere.
        question: (B, K), 1 at the tokens of the question.
        beta: weight of the question's factor.
        share: of the heads, those with the most mass on either are edited.

    Returns:
        The edited rows, renormalised, and (B, H, R) bool: which were edited. Others keep their
        bits.
    """
    batch, heads, rows, keys = weights.shape
    groups = torch.stack((visual, lift, question), dim=-1).to(weights.dtype)
    masses = torch.bmm(weights.reshape(batch, heads * rows, keys), groups)
    seen, lifted, asked = masses.view(batch, heads, rows, 3).unbind(-1)
    looks, asks = top_heads(seen, share), top_heads(asked, share)
    # r = (sum of a m) / (sum of a) over the heads that look; 1 where they see nothing.
    gained = (looks * lifted).sum(1, keepdim=True)
    ratio = 1 + gained / (looks * seen).sum(1, keepdim=True).clamp_min(1e-30)
    raised = asks * (beta * ratio - 1)
    edited = (looks * lifted > 0) | (raised * asked != 0)
    factors = torch.stack((looks, raised), dim=-1).view(batch, heads * rows, 2)
    change = torch.bmm(factors, groups[..., 1:].mT).view_as(weights)
    moved = torch.addcmul(weights, weights, change)
    return torch.where(edited[..., None], moved / moved.sum(-1, keepdim=True), weights), edited


@dataclass(frozen=True, eq=False)
class GazeObserver(Observer):
    """Sums, per head and visual token, the jumps of attention at the question's content words.

    seen[layer] is (B, H, K) float32.
    """

    rows: ClassVar[Rows] = "text"

    def see_weights(self, rows: SeenRows) -> None:
        layer, weights, position = rows.layer, rows.weights, rows.position
        # A question without any content word counts in full.
        content = rows.content | (rows.question & ~rows.content.any(1, keepdim=True))
        read = content[:, position + 1 : position + weights.shape[2]]
        rises = (weights[:, :, 1:] - weights[:, :, :-1]).clamp_min(0) * read[:, None, :, None]
        total = rises.sum(2) * rows.visual[:, None]
        self.seen[layer] = self.seen[layer] + total if layer in self.seen else total


def _layers(saliency_layer: int, first: int, last: int, alpha: float) -> dict[str, Any]:
    edited_layers = tuple(range(first, last + 1))
    return {"saliency_layer": saliency_layer, "edited_layers": edited_layers, "alpha": alpha}


_CODE = "authors' code"
_VICUNA = (32000, 32064)  # the vocabulary tells vicuna from later Llamas of the same shape


@dataclass(frozen=True)
class GazeShiftFusion(AttentionMethod):
    """Multiply attention to the image by a map of gaze shifts, and to the question alike.

    Qi, Shang, Spiliopoulou, Pappas: "Capturing Gaze Shifts for Guidance: Cross-Modal Fusion
    Enhancement for VLM Hallucination Mitigation", ICML 2026, arXiv 2510.22067. While the model
    reads the content words of the question, its attention to some visual tokens jumps up. The map
    S of these jumps in one layer, taken once from an extra, unedited forward over the prompt,
    multiplies the attention to visual token j by exp(alpha S_j) in the row that predicts the next
    token, in the half of the heads that looks most at the image. In the half that looks most at the
    question, the question is raised by the ratio r that the image gained, times `beta`, so that
    vision does not drown it. Rows are renormalised. Heads and r are chosen anew in every row.

    Paper and code: r is the ratio of sums, as the code has it, not a sum of ratios. The code has no
    beta (1 here). It chooses the question's heads by their mass on the whole question, and so does
    this. It takes content words from a part-of-speech tagger; here a list of stop words tells them,
    where `vlmfix.generate` knows the processor, and else all text after the last image counts. It
    yields NaN where no content word is found or the map is flat; here the whole question counts,
    and nothing is raised. It keeps one r for the batch; here every sample has its own.

    Layers are published for three models. For others, a calibration (`vlmfix calibrate`) names
    them; without one the saliency layer is LLaVA-1.5-7B's, scaled to the depth (11 of 32), the
    edited layers are the middle third and alpha is 4: our recommendation, which nobody has tuned.
    """

    alpha: float | None = field(
        default=None, metadata={"help": "strength; default by preset, else 4; 0 raises nothing"}
    )
    beta: float = field(
        default=1.0, metadata={"help": "how much of the image's gain the question gets, as factor"}
    )
    saliency_layer: int | None = field(
        default=None, metadata={"help": "layer of the map; default by preset, calibration or depth"}
    )
    edited_layers: tuple[int, ...] | None = field(
        default=None, metadata={"help": "e.g. 12/13/14; default by preset, calibration or depth"}
    )
    head_share: float = field(
        default=0.5, metadata={"help": "share of the heads that is averaged, and edited"}
    )

    name: ClassVar[str] = "gift"
    rows: ClassVar[Literal["predicting", "text"]] = "predicting"
    reads_question: ClassVar[bool] = True
    PRESETS: ClassVar[tuple[Preset, ...]] = (
        Preset(
            "LLaVA-1.5-7B", "llava", "llama", 4096, 32, _layers(11, 12, 22, 5.0), _CODE, _VICUNA
        ),
        Preset(
            "LLaVA-1.5-13B", "llava", "llama", 5120, 40, _layers(10, 14, 20, 5.0), _CODE, _VICUNA
        ),
        Preset(
            "Qwen2-VL-7B", "qwen2_vl", "qwen2_vl_text", 3584, 28, _layers(14, 5, 18, 4.0), _CODE
        ),
    )

    def __post_init__(self) -> None:
        check_range(self, "alpha", 0.0, 20.0)
        check_range(self, "beta", 0.0, 100.0)
        check_range(self, "head_share", 0.0, 1.0)

    def prepared(self, info: ModelInfo, model: torch.nn.Module) -> GazeShiftFusion:
        known = self._known_layers(info, model)
        own = {name: getattr(self, name) for name in known}
        values = {name: known[name] if own[name] is None else own[name] for name in known}
        layers = (values["saliency_layer"], *values["edited_layers"])
        if not set(layers) <= set(info.attention):
            raise BadInput(
                f"gift: saliency_layer={layers[0]} and edited_layers={layers[1:]} must be layers "
                f"with attention of this model of {info.num_layers} layers, counted from 0."
            )
        return replace(self, **values)

    def _known_layers(self, info: ModelInfo, model: torch.nn.Module) -> dict[str, Any]:
        if preset := find_preset(self.PRESETS, info):
            return preset.values
        count, attention = info.num_layers, sorted(info.attention)
        scaled = round(11 / 32 * count)
        saliency_layer = min(attention, key=lambda layer: abs(layer - scaled))
        middle = range(count // 3, math.ceil(2 * count / 3))
        edited_layers = tuple(layer for layer in attention if layer in middle)
        if calibration := load_calibration(model):
            if calibration.gift_saliency_layer is not None:
                saliency_layer = calibration.gift_saliency_layer
            if calibration.gift_layers is not None:
                edited_layers = calibration.gift_layers
        return {"saliency_layer": saliency_layer, "edited_layers": edited_layers, "alpha": 4.0}

    def idle(self) -> str | None:
        found = "no layer is edited (its calibration found none that moves with the question)"
        return None if self.edited_layers else found

    def layers(self, info: ModelInfo) -> Sequence[int]:
        return self.edited_layers or ()

    def probe_pass(self, info: ModelInfo) -> ProbePass | None:
        assert self.saliency_layer is not None  # set by prepared()
        if not self.alpha or not self.edited_layers:
            return None
        return ProbePass("whole", GazeObserver((self.saliency_layer,)))

    def plan(self, keys: Keys) -> Plan | None:
        assert self.alpha is not None and self.saliency_layer is not None  # set by prepared()
        if not self.alpha and self.beta == 1:
            return None
        visual, question = keys.visual, keys.question
        lift = torch.zeros_like(visual, dtype=torch.float32)
        if self.alpha and visual.any():
            if self.saliency_layer not in keys.seen:
                raise StateError(
                    "gift reads its map in the first forward of a prompt, and this KV cache was "
                    "filled before it was on or before there was an image. Start without this "
                    "cache."
                )
            rises = keys.seen[self.saliency_layer]
            rises = torch.nn.functional.pad(rises, (0, visual.shape[1] - rises.shape[2]))
            lift = torch.expm1(self.alpha * gaze_map(rises, visual, self.head_share))
        live = lift.any(1) | (question.any(1) if self.beta != 1 else False)
        return Plan((visual.float(), lift, question.float()), live.tolist())

    def edit_weights(
        self, weights: torch.Tensor, *plan: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        visual, lift, question = plan
        return fuse(weights, visual, lift, question, self.beta, self.head_share)
