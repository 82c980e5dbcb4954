"""AD-HH: take the attention to text from heads that drive hallucination, where it is too large."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from vlmfix.analysis.calibrate import load_calibration
from vlmfix.analysis.head_list import head_list, head_names, heads_by_layer
from vlmfix.base.attention import AttentionMethod, FusedEdit, Keys, Plan
from vlmfix.base.method import Preset, option
from vlmfix.errors import CalibrationNeeded
from vlmfix.families import ModelInfo
from vlmfix.families.kinds import GENERATED, TEXT
from vlmfix.methods.structures import LLAVA_7B, LLAVA_13B, LLAVA_NEXT_34B

__all__ = ["AdaptiveHeadDeactivation", "drop_text"]


def drop_text(
    weights: torch.Tensor, text: torch.Tensor, listed: torch.Tensor, tau: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Take a row's mass off the text after the image; the row is not renormalised.

    Args:
        weights: softmax rows (B, H, R, K).
        text: (B, K), 1 at text after the image.
        listed: (H,) bool, the hallucination heads of this layer.
        tau: rows of these heads with at least this mass on that text lose it.

    Returns:
        The edited rows, and (B, H, R) bool: which were edited.
    """
    text = text[:, None, :].to(weights.dtype)
    mass = (weights.flatten(1, 2) @ text.mT).view(weights.shape[:3])
    edited = listed[:, None] & (mass >= tau) & (mass > 0)
    dropped = weights * (1 - text[:, None])
    return torch.where(edited[..., None], dropped, weights), edited


def _names(listing: str) -> dict[str, tuple[str, ...]]:
    return {"heads": tuple(listing.split())}


# Layer and head, strongest first, as the authors' repository lists them.
_HEADS_7B = _names(
    "16.29 26.9 13.31 15.10 20.12 30.9 19.18 17.0 18.9 26.28 "
    "19.27 18.26 15.25 14.16 31.26 15.24 31.3 22.20 27.29 17.28"
)
_HEADS_13B = _names(
    "0.8 29.27 23.18 20.11 36.26 19.37 22.16 22.34 21.31 20.34 37.11 17.25 "
    "35.10 17.5 15.26 0.22 19.5 19.0 14.1 23.20 21.6 30.24 26.27 21.32 "
    "15.28 15.31 19.30 20.8 19.14 14.9 39.26 25.1 18.32 17.27 39.32"
)
_HEADS_34B = _names("45.34 43.4 43.48 44.29 35.47 40.27 54.34 37.48 43.2 41.34")


@dataclass(frozen=True)
class AdaptiveHeadDeactivation(AttentionMethod):
    """In listed heads, drop the attention to text after the image where it reaches `tau`.

    Yang, Li, Cao, Xu: "Understanding and Mitigating Hallucination in Large Vision-Language Models
    via Modular Attribution and Intervention", ICLR 2025, OpenReview Bjq4W7P2Us. A few attention
    heads follow the text and drive hallucinated words. They are found offline, by switching each
    head off (`vlmfix attribute`). In the row that predicts the next token, a listed head whose mass
    on the text after the image (the question, and what was generated) is at least `tau` gets that
    mass set to zero. The row is not renormalised, so the head's output shrinks with it.

    Paper and code: the code sums the trigger over the batch and so runs one sample at a time;
    here every sample is decided on its own. The code fixes spans, such as 576 image tokens from
    position 35; here the kinds of the keys tell them. With several images, text after the first
    of them counts.
    """

    heads: tuple[str, ...] | None = option(
        None, "hallucination heads as layer.head, e.g. 16.29/26.9; default: preset or calibration"
    )
    tau: float = option(
        0.4, "least mass on the text after the image that is dropped; above 1: never", 0.0, 2.0
    )

    name: ClassVar[str] = "ad_hh"
    rows: ClassVar[Literal["predicting", "text"]] = "predicting"
    has_fused_form: ClassVar[bool] = True
    PRESETS: ClassVar[tuple[Preset, ...]] = (
        Preset(LLAVA_7B, _HEADS_7B, "authors' code"),
        Preset(LLAVA_13B, _HEADS_13B, "authors' code"),
        Preset(LLAVA_NEXT_34B, _HEADS_34B, "authors' code"),
    )

    def prepared(self, info: ModelInfo, model: torch.nn.Module) -> AdaptiveHeadDeactivation:
        ready = self.with_defaults(info)
        names = self._measured(info, model) if ready.heads is None else ready.heads
        return replace(self, heads=head_names(head_list(names, info, self.name)))

    def _measured(self, info: ModelInfo, model: torch.nn.Module) -> tuple[str, ...]:
        calibration = load_calibration(model)
        if calibration is not None and calibration.hallucination_heads is not None:
            return head_names(calibration.hallucination_heads)
        raise CalibrationNeeded(
            f"ad_hh does not know the hallucination heads of this {info.model_type} model "
            f"({info.num_layers} layers of {info.num_heads} heads). Find them with "
            "`vlmfix attribute MODEL --save`, or pass heads=(...), such as ('16.29', '26.9')."
        )

    def idle(self) -> str | None:
        return None if self.heads else "its list of hallucination heads is empty"

    def layers(self, info: ModelInfo) -> Sequence[int]:
        return sorted(heads_by_layer(self.heads))

    def plan(self, keys: Keys) -> Plan | None:
        if self.tau > 1:
            return None
        visual = keys.visual
        after = visual.cumsum(1) > 0
        text = after & ((keys.kinds == TEXT) | (keys.kinds == GENERATED))
        listed = torch.zeros(keys.num_heads, dtype=torch.bool, device=visual.device)
        listed[heads_by_layer(self.heads)[keys.layer]] = True
        groups = visual.to(torch.uint8) + 2 * text.to(torch.uint8)
        fused = FusedEdit(groups=groups, epilogue="drop", threshold=self.tau, heads=listed)
        tensors, constants = {"text": text.float()}, {"listed": listed}
        return Plan(tensors, visual.any(1).tolist(), constants=constants, fused=fused)

    def edit_weights(
        self, weights: torch.Tensor, *, text: torch.Tensor, listed: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return drop_text(weights, text, listed, self.tau)
