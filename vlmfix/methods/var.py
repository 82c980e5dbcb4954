"""VAR: visual attention redistribution, from visual sinks to the rest of the image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from vlmfix.analysis.calibrate import load_calibration
from vlmfix.analysis.massive import DEFAULT_FRACTION, magnitude
from vlmfix.base.attention import AttentionMethod, FusedEdit, Keys, Plan
from vlmfix.base.method import Preset, option
from vlmfix.errors import BadInput, CalibrationNeeded
from vlmfix.families import ModelInfo
from vlmfix.families.kinds import IMAGE, TEXT
from vlmfix.methods.structures import (
    LLAVA_7B,
    LLAVA_13B,
    LLAVA_NEXT_7B,
    LLAVA_NEXT_13B,
    QWEN2_VL_7B,
)

__all__ = ["VisualAttentionRedistribution", "redistribute", "rules"]


def rules(
    groups: torch.Tensor, keep: float, rho: float, minimum_visual_mass: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prepare `redistribute` for every key, once per prompt and layer.

    Args:
        groups: (B, K, 3) indicator of text sinks, visual sinks, and visual tokens that are not
            sinks. Keys in none of them keep their exact weight.
        keep: share of its attention that a sink keeps.
        rho: a head is edited where at least this share of its visual mass is off the sinks.
        minimum_visual_mass: and where it puts at least this mass on the image.

    Returns:
        sums (B, K, 4): a row times these gives the mass that its sinks give up, its margins over
        the two rules (as softmax rows sum to one), and its mass off the sinks;
        moves (B, K, 2): relative change of a key, as a sink and as one that gains.
    """
    text_sinks, visual_sinks, rest = groups.unbind(-1)
    given = (1 - keep) * (text_sinks + visual_sinks)
    visual = visual_sinks + rest
    margins = (visual - minimum_visual_mass, (1 - rho) * visual - visual_sinks)
    return torch.stack((given, *margins, rest), dim=-1), torch.stack((-given, rest), dim=-1)


def redistribute(
    weights: torch.Tensor, sums: torch.Tensor, moves: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Move attention within softmax rows (B, H, R, K); every row keeps its sum.

    `sums` and `moves` come from `rules`. Returns the edited rows, and (B, H, R) bool: which rows
    were edited. Few operations on purpose: a decode step does this in every layer.
    """
    batch, heads, rows, keys = weights.shape
    sums, moves = sums.to(weights.dtype), moves.to(weights.dtype)
    totals = torch.bmm(weights.reshape(batch, heads * rows, keys), sums)
    rest = totals[..., 3]
    edited = (totals[..., 1:].amin(-1) >= 0) & (rest > 0)
    gained = edited * (totals[..., 0] / rest.clamp_min(1e-30))
    change = torch.bmm(torch.stack((edited.to(weights.dtype), gained), dim=-1), moves.mT)
    moved = torch.addcmul(weights, weights, change.view(weights.shape))
    return moved, edited.view(batch, heads, rows)


_7B = {"sink_channels": (1415, 2533), "tau": 20.0}
_13B = {"sink_channels": (2100, 4743), "tau": 20.0}
_QWEN = {"sink_channels": (458, 2570), "tau": 20.0}


@dataclass(frozen=True)
class VisualAttentionRedistribution(AttentionMethod):
    """Move attention from visual sinks to the rest of the image, in heads that attend to it.

    Kang, Kim, Kim, Hwang: "See What You Are Told: Visual Attention Sink in Large Multimodal
    Models", ICLR 2025, arXiv 2503.03321. Some visual tokens draw attention although masking them
    changes nothing; they share the massive channels of the language model's own sinks (the first
    token, line breaks). A token is a sink of a layer if max over `sink_channels` of |x_d| / rms(x)
    at the layer's input reaches `tau`. Sinks are found once, in the prompt; heads are chosen in
    every row.

    Paper and code: the paper's text moves 0.6 of the sinks' attention, the authors' code keeps
    0.6; `variant="code"` (default: what their numbers came from) keeps 0.6, "paper" keeps 0.4.
    `rho` is in the paper's direction; the code bounds the complement, which agrees at 0.5. The
    paper spares the last layer, the code means to and does not: `last_layer="official"` edits
    it. The code adds 1e-6 per key to a denominator and keeps the sinks of the first sample of a
    process for all later ones; neither is reproduced.
    Independent reruns show little gain in CHAIR: measure it on your model.
    """

    keep: float | None = option(
        None, "share of its attention that a sink keeps; default: see variant", 0.0, 1.0
    )
    rho: float = option(
        0.5, "edit heads with at least this share of their visual mass off the sinks", 0.0, 2.0
    )
    minimum_visual_mass: float = option(
        0.2, "edit heads with at least this mass on the image", 0.0, 1.0
    )
    tau: float | None = option(
        None, "sink threshold on |x_d| / rms(x); default: preset or calibration",
        0.0, math.inf, high_open=True,
    )  # fmt: skip
    sink_channels: tuple[int, ...] | None = option(
        None, "massive channels that mark sinks, e.g. 1415/2533; default: preset or calibration"
    )
    variant: Literal["code", "paper"] = option(
        "code", "whose default of keep: code (the authors' code, 0.6) or paper (0.4)"
    )
    last_layer: Literal["excluded", "official"] = option(
        "excluded", "last layer: excluded, or official (edited, as in the authors' code)"
    )
    video: bool = option(True, "whether video tokens count as visual")

    name: ClassVar[str] = "var"
    rows: ClassVar[Literal["predicting", "text"]] = "text"
    has_fused_form: ClassVar[bool] = True
    PRESETS: ClassVar[tuple[Preset, ...]] = (
        Preset(LLAVA_7B, _7B, "authors' code"),
        Preset(LLAVA_13B, _13B, "authors' code"),
        Preset(LLAVA_NEXT_7B, _7B, "same base model as LLaVA-1.5-7B"),
        Preset(LLAVA_NEXT_13B, _13B, "authors' code"),
        Preset(QWEN2_VL_7B, _QWEN, "notes on the paper"),
    )

    def prepared(self, info: ModelInfo, model: torch.nn.Module) -> VisualAttentionRedistribution:
        channels, known_tau = self._constants(info, model)
        bound = math.sqrt(info.hidden_size)
        tau = next(t for t in (self.tau, known_tau, DEFAULT_FRACTION * bound) if t is not None)
        if tau >= bound:
            raise BadInput(
                f"var: tau={tau:g} can never be reached: |x_d| / rms(x) is at most sqrt(width) = "
                f"{bound:g} here. The default is {DEFAULT_FRACTION * bound:g}."
            )
        inside = all(0 <= channel < info.hidden_size for channel in channels)
        if not inside or self.sink_channels == ():
            raise BadInput(
                f"var: sink_channels={channels} must name channels in [0, {info.hidden_size})."
            )
        keep = self.keep if self.keep is not None else {"code": 0.6, "paper": 0.4}[self.variant]
        return replace(self, keep=keep, tau=tau, sink_channels=tuple(channels))

    def _constants(
        self, info: ModelInfo, model: torch.nn.Module
    ) -> tuple[tuple[int, ...], float | None]:
        """Sink channels, and the threshold that goes with them if it is known."""
        if self.sink_channels is not None:
            return self.sink_channels, None
        if known := self.published(info):
            return known["sink_channels"], known["tau"]
        calibration = load_calibration(model)
        if calibration is not None and calibration.sink_channels is not None:
            return calibration.sink_channels, calibration.tau
        raise CalibrationNeeded(
            f"var does not know the sink channels of this {info.model_type} model "
            f"({info.num_layers} layers of width {info.hidden_size}). Measure them with "
            "`vlmfix calibrate MODEL --only sinks` "
            "(or vlmfix.analysis.calibrate.calibrate(model)), or pass sink_channels=(...)."
        )

    def idle(self) -> str | None:
        found = "its calibration found no sink channels in this model"
        return None if self.sink_channels else found

    def neutral(self) -> bool:
        return self.keep == 1 or self.rho > 1

    def layers(self, info: ModelInfo) -> Sequence[int]:
        # The first two layers never have sinks (the authors' code skips them too).
        return range(2, info.num_layers - (self.last_layer == "excluded"))

    def flag_tokens(self, hidden: torch.Tensor) -> torch.Tensor:
        assert self.sink_channels is not None and self.tau is not None  # set by prepared()
        if not self.sink_channels:
            return torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        return magnitude(hidden)[..., list(self.sink_channels)].amax(-1) >= self.tau

    def plan(self, keys: Keys) -> Plan | None:
        assert keys.flags is not None and self.keep is not None
        if self.sink_channels == ():
            return None
        visual = keys.visual if self.video else keys.kinds == IMAGE
        visual_sinks = keys.flags & visual
        text_sinks = keys.flags & (keys.kinds == TEXT)
        counts = visual_sinks.sum(1).tolist()
        groups = torch.stack((text_sinks, visual_sinks, visual & ~visual_sinks), dim=-1)
        # A sample without a visual sink in this layer is left alone, text sinks or not.
        groups &= visual_sinks.any(1)[:, None, None]
        notes = {"visual_sinks": counts, "text_sinks": text_sinks.sum(1).tolist()}
        sums, moves = rules(groups.float(), self.keep, self.rho, self.minimum_visual_mass)
        numbers = (groups.to(torch.uint8) * groups.new_tensor([1, 2, 3], dtype=torch.uint8)).sum(-1)
        fused = FusedEdit(
            groups=numbers.to(torch.uint8),
            epilogue="var",
            keep=self.keep,
            rho=self.rho,
            minimum_visual_mass=self.minimum_visual_mass,
        )
        tensors = {"sums": sums, "moves": moves}
        return Plan(tensors, [count > 0 for count in counts], notes, fused=fused)

    def edit_weights(
        self, weights: torch.Tensor, *, sums: torch.Tensor, moves: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return redistribute(weights, sums, moves)
