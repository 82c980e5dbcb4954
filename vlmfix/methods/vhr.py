"""VHR: reinforce the heads whose outputs depend on the image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from vlmfix.analysis.divergence import LastHeads, head_divergence, prune_outliers, select_heads
from vlmfix.base.attention import AttentionMethod, Keys, Plan, ProbePass
from vlmfix.base.method import Preset, option
from vlmfix.errors import BadInput, StateError
from vlmfix.families import ModelInfo
from vlmfix.methods.structures import LLAVA_7B, LLAVA_NEXT_7B

__all__ = ["VisionAwareHeadReinforcement", "reinforce"]


def reinforce(
    with_image: torch.Tensor, without_image: torch.Tensor, alpha: float, prune: bool
) -> torch.Tensor:
    """Factors (B, H) on the heads of a layer: alpha above the median divergence, else 1.

    Args:
        with_image: (B, H, D) head outputs at the row that predicts the first token.
        without_image: the same without the image.
        alpha: factor of the selected heads.
        prune: leave out heads whose outputs are outliers without the image.
    """
    divergence = head_divergence(with_image, without_image)
    if prune:
        divergence = prune_outliers(divergence, without_image)
    return torch.where(select_heads(divergence), alpha, torch.ones_like(divergence))


_LAST_SHARE = 0.44  # of the layers: 14 of 32
_SECOND_AND_LAST_14 = {"reinforced_layers": (1, *range(18, 32))}


@dataclass(frozen=True)
class VisionAwareHeadReinforcement(AttentionMethod):
    """Multiply the outputs of the heads that change most when the image is taken away.

    He et al.: "Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence",
    ACL 2025, arXiv 2412.13949. Before the prompt's own forward, a probe pass runs on the prompt
    without its visual tokens. In each reinforced layer, at the last prompt row, the heads whose
    output differs from that pass by more than the layer's median are multiplied by `alpha`, in all
    rows of the prompt and all later ones. Heads are chosen layer by layer, so that deeper layers
    see what was reinforced in earlier ones, and once: they hold until the end of the answer.

    Open in the paper: which standard deviation bounds an outlier (here the unbiased one), whether
    ties with the median are selected (here not), and whether the probe pass is reinforced as well
    (here it is plain). Several images are taken away together. The paper gives layers for models
    of 32; on others the rule is scaled: the second layer and the last round(0.44 x layers), which
    is untuned. alpha = 4 breaks the paper's answers. `vhd_source="knockout"` is not the paper's: it
    needs no probe pass, hides the image in each layer alone, and selects other heads.
    """

    alpha: float = option(
        2.0, "factor on the outputs of the selected heads; the paper uses 2 (3 works)", 0.0, 10.0
    )
    reinforced_layers: tuple[int, ...] | None = option(
        None, "layers whose heads are reinforced, e.g. 1/18/19; default: preset, else by depth"
    )
    include_second_layer: bool = option(
        True, "whether layer 1, which can be unstable, is among the default layers"
    )
    prune_outliers: bool = option(
        True, "whether heads whose outputs are outliers without the image are left out"
    )
    vhd_source: Literal["text", "knockout"] = option(
        "text", "outputs without the image: text (a text-only pass) or knockout (hide visual keys)"
    )

    name: ClassVar[str] = "vhr"
    head_scale_from: ClassVar[Literal["prompt", "step"]] = "prompt"
    PRESETS: ClassVar[tuple[Preset, ...]] = tuple(
        Preset(structure, _SECOND_AND_LAST_14, "the paper")
        for structure in (LLAVA_7B, LLAVA_NEXT_7B)
    )

    def prepared(self, info: ModelInfo, model: torch.nn.Module) -> VisionAwareHeadReinforcement:
        count, chosen = info.num_layers, self.reinforced_layers
        if chosen is None:
            last = range(count - round(_LAST_SHARE * count), count)
            chosen = self.published(info).get("reinforced_layers", (1, *last))
            skipped = () if self.include_second_layer else (1,)
            chosen = tuple(sorted({layer for layer in chosen if layer < count} - {*skipped}))
        if not all(0 <= layer < count for layer in chosen):
            raise BadInput(
                f"vhr: reinforced_layers={chosen} must be layers of this model, 0 to {count - 1}."
            )
        return replace(self, reinforced_layers=tuple(chosen))

    def layers(self, info: ModelInfo) -> Sequence[int]:
        return self.reinforced_layers or ()

    def probe_pass(self, info: ModelInfo) -> ProbePass | None:
        if self.alpha == 1 or not self.reinforced_layers or self.knocks_out():
            return None
        return ProbePass("text", LastHeads(self.reinforced_layers))

    def knocks_out(self) -> bool:
        return self.vhd_source == "knockout"

    def plan(self, keys: Keys) -> Plan | None:
        visual = keys.visual.any(1)
        # Without an image there was no probe pass to compare with.
        if self.alpha == 1 or not visual.any():
            return None
        if self.knocks_out():
            return Plan({}, visual.tolist(), constants={"visual": visual})
        if keys.layer not in keys.seen:
            raise StateError(
                "vhr chooses its heads in the first forward of a prompt, and this KV cache was "
                "filled before vhr was on or before there was an image. Start without this cache."
            )
        known = {"visual": visual, "without_image": keys.seen[keys.layer]}
        return Plan({}, visual.tolist(), constants=known)

    def head_scale(
        self,
        outputs: torch.Tensor,
        blind: torch.Tensor | None = None,
        *,
        visual: torch.Tensor,
        without_image: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if without_image is None:
            assert blind is not None  # knocks_out()
            without_image = blind[:, :, 0].float()
        factors = reinforce(
            outputs[:, :, 0].float(), without_image, self.alpha, self.prune_outliers
        )
        return torch.where(visual[:, None], factors, 1.0)[:, :, None]
