"""GIFT: multiply attention to what the model turned to while it read the question."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch.nn.functional import pad

from vlmfix.analysis.calibrate import load_calibration
from vlmfix.base.attention import AttentionMethod, Keys, Plan, ProbePass
from vlmfix.base.method import Preset, option
from vlmfix.base.observer import Observer, Rows, SeenRows
from vlmfix.errors import BadInput, StateError
from vlmfix.families import ModelInfo
from vlmfix.methods.structures import LLAVA_7B, LLAVA_13B, QWEN2_VL_7B

__all__ = ["GazeObserver", "GazeShiftFusion", "fuse", "gaze_map", "top_heads"]


def top_heads(amounts: torch.Tensor, share: float) -> torch.Tensor:
    """Mark the floor(share * H) heads (at least one) with the most: (B, H, ...) -> same, 0 or 1."""
    count = max(1, int(share * amounts.shape[1]))
    return torch.zeros_like(amounts).scatter(1, amounts.topk(count, dim=1).indices, 1.0)


def gaze_map(rises: torch.Tensor, visual: torch.Tensor, share: float = 0.5) -> torch.Tensor:
    """How strongly attention jumped to each visual token (its gaze), in [0, 1].

    Args:
        rises: (B, H, K), positive jumps of attention, summed over the rows of the question.
        visual: (B, K) bool.
        share: of the heads; those with the largest jumps are averaged.

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
    """Raise visual tokens by their gaze, and the question by the same gain, each in its heads.

    Args:
        weights: softmax rows (B, H, R, K).
        visual: (B, K), 1 at visual tokens.
        lift: (B, K), m - 1, where m is the factor of a visual token; 0 elsewhere.
        question: (B, K), 1 at the tokens of the question.
        beta: weight of the question's factor.
        share: of the heads; those with the most mass on image or question are edited.

    Returns:
        The edited rows, renormalised, and (B, H, R) bool: which were edited. Others keep their
        bits.
    """
    batch, heads, rows, keys = weights.shape
    groups = torch.stack((visual, lift, question), dim=-1).to(weights.dtype)
    masses = torch.bmm(weights.reshape(batch, heads * rows, keys), groups)
    seen, lifted, asked = masses.view(batch, heads, rows, 3).unbind(-1)
    looks, asks = top_heads(seen, share), top_heads(asked, share)
    # r = (sum of a m) / (sum of a) over the heads of the image; 1 where they have no mass on it.
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
    """Sums the jumps of attention at the question's content words, per head and visual token.

    A question before the image sees none of it: there all text behind the image is read instead.
    seen[layer] is (B, H, K) float32.
    """

    rows: ClassVar[Rows] = "text"

    def see_weights(self, rows: SeenRows) -> None:
        layer, weights, position = rows.layer, rows.weights, rows.position
        # A question without a content word counts in full.
        content = rows.content | (rows.question & ~rows.content.any(1, keepdim=True))
        room = content.shape[1] - rows.first_key
        visual = pad(rows.visual, (rows.first_key, room - rows.visual.shape[1]))
        behind = visual.cumsum(1) > 0
        content = content & behind
        content |= behind & ~visual & ~content.any(1, keepdim=True)
        read = content[:, position + 1 : position + weights.shape[2]]
        rises = (weights[:, :, 1:] - weights[:, :, :-1]).clamp_min(0) * read[:, None, :, None]
        total = rises.sum(2) * rows.visual[:, None]
        self.seen[layer] = self.seen[layer] + total if layer in self.seen else total


def _layers(saliency_layer: int, first: int, last: int, alpha: float) -> dict[str, Any]:
    edited_layers = tuple(range(first, last + 1))
    return {"saliency_layer": saliency_layer, "edited_layers": edited_layers, "alpha": alpha}


@dataclass(frozen=True)
class GazeShiftFusion(AttentionMethod):
    """Multiply attention to the image by a map of gaze shifts, and attention to the question too.

    Qi, Shang, Spiliopoulou, Pappas: "Capturing Gaze Shifts for Guidance: Cross-Modal Fusion
    Enhancement for VLM Hallucination Mitigation", ICML 2026, arXiv 2510.22067. While the model
    reads the content words of the question, its attention to some visual tokens jumps up. The map
    S of these jumps in one layer, taken once from an unedited probe pass over the prompt,
    multiplies the attention to visual token j by exp(alpha S_j) in the row that predicts the next
    token, in the half of the heads with the most mass on the image. In the half with the most mass
    on the question, the question is raised by the ratio r that the image gained, times `beta`, so
    that vision does not drown it. Rows are renormalised. Heads and r are chosen in every row.

    Paper and code: r is the ratio of sums, as the code has it, not a sum of ratios. The code has no
    beta (1 here). It chooses the question's heads by their mass on the whole question, and so does
    this. It takes content words from a part-of-speech tagger; here a list of stop words tells them
    where `vlmfix.generate` knows the processor, and otherwise all text after the last image counts.
    The code yields NaN where no content word is found or the map is flat; here the whole question
    counts, and nothing is raised. It keeps one r for the batch; here every sample has its own.

    Layers are published for three models. For others, a calibration (`vlmfix calibrate`) names
    them; without one the saliency layer is LLaVA-1.5-7B's, scaled to the depth (11 of 32), the
    edited layers are the middle third and alpha is 4: our recommendation, untuned.
    """

    alpha: float | None = option(
        None, "strength on visual tokens; default: preset, else 4; 0: no visual token is raised",
        0.0, 20.0,
    )  # fmt: skip
    beta: float = option(
        1.0, "factor on the gain of the image, which the question gets as well", 0.0, 100.0
    )
    saliency_layer: int | None = option(
        None,
        "decoder layer whose attention jumps are mapped; default: preset, calibration or depth",
    )
    edited_layers: tuple[int, ...] | None = option(
        None, "decoder layers to edit, e.g. 12/13/14; default: preset, calibration or depth"
    )
    head_share: float = option(
        0.5, "share of the heads that the map averages and that an edit reaches", 0.0, 1.0
    )

    name: ClassVar[str] = "gift"
    rows: ClassVar[Literal["predicting", "text"]] = "predicting"
    reads_question: ClassVar[bool] = True
    PRESETS: ClassVar[tuple[Preset, ...]] = (
        Preset(LLAVA_7B, _layers(11, 12, 22, 5.0), "authors' code"),
        Preset(LLAVA_13B, _layers(10, 14, 20, 5.0), "authors' code"),
        Preset(QWEN2_VL_7B, _layers(14, 5, 18, 4.0), "authors' code"),
    )

    def prepared(self, info: ModelInfo, model: torch.nn.Module) -> GazeShiftFusion:
        defaults = self.published(info) or self._by_depth(info, model)
        ready = self.with_defaults(info, **defaults)
        layers = (ready.saliency_layer, *(ready.edited_layers or ()))
        if not set(layers) <= set(info.attention):
            raise BadInput(
                f"gift: saliency_layer={layers[0]} and edited_layers={layers[1:]} must be layers "
                f"with attention of this model of {info.num_layers} layers, counted from 0."
            )
        return ready

    def _by_depth(self, info: ModelInfo, model: torch.nn.Module) -> dict[str, Any]:
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
                    "gift takes its map from the first forward of a prompt, and this KV cache was "
                    "filled before gift was on or before there was an image. Start without this "
                    "cache."
                )
            rises = keys.seen[self.saliency_layer]
            rises = pad(rises, (0, visual.shape[1] - rises.shape[2]))
            lift = torch.expm1(self.alpha * gaze_map(rises, visual, self.head_share))
        live = lift.any(1) | (question.any(1) if self.beta != 1 else False)
        tensors = {"visual": visual.float(), "lift": lift, "question": question.float()}
        return Plan(tensors, live.tolist())

    def edit_weights(
        self,
        weights: torch.Tensor,
        *,
        visual: torch.Tensor,
        lift: torch.Tensor,
        question: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return fuse(weights, visual, lift, question, self.beta, self.head_share)
