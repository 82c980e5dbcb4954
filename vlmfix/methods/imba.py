"""IMBA (PAINT): lift the scores of visual tokens that the vision encoder finds informative."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from vlmfix.base.attention import AttentionMethod, FusedEdit, Keys, Plan, lift_scores
from vlmfix.base.method import LayerRange, Preset, option
from vlmfix.families import ModelInfo
from vlmfix.families.tower import Received, Tower, describe_tower
from vlmfix.methods.structures import LLAVA_7B

__all__ = ["PayAttentionToInformedTokens", "select_tokens"]

_LOCAL, _SUMMARY = 1, 2


def select_tokens(
    early: torch.Tensor,
    late: torch.Tensor,
    local_ratio: float,
    column: torch.Tensor | None = None,
    spatial_ratio: float = 0.0,
) -> torch.Tensor:
    """Sort the N visual tokens of one image: 0 plain, 1 local, 2 summary.

    Args:
        early: (N,), attention that each receives from the class token in an early layer: the
            floor(local_ratio * N) largest are local.
        late: (N,), the same in a late layer: those above the third quartile by more than 1.5
            interquartile ranges are summary tokens, and not local.
        local_ratio: share of the tokens.
        column: (N,), attention that each receives from all patches in the early layer: the
            floor(spatial_ratio * N) largest are local as well.
        spatial_ratio: share of the tokens.

    Returns:
        (N,) int64.
    """
    local = _top(early, local_ratio)
    if column is not None:
        local |= _top(column, spatial_ratio)
    first, third = late.float().quantile(late.new_tensor([0.25, 0.75], dtype=torch.float32))
    summary = late > third + 1.5 * (third - first)
    return torch.where(summary, _SUMMARY, local.long() * _LOCAL)


def _top(scores: torch.Tensor, share: float) -> torch.Tensor:
    """(N,) bool: the floor(share * N) largest."""
    count = math.floor(share * len(scores) + 1e-9)  # 0.29 * 100 is 28.999999999999996
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen[scores.topk(count).indices] = True
    return chosen


@dataclass(frozen=True)
class PayAttentionToInformedTokens(LayerRange, AttentionMethod):
    """Raise the scores of local and of summary visual tokens in the row that predicts.

    Arif, Dip, Hussain, Zhang, Thomas: "Fixing Imbalanced Attention to Mitigate In-Context
    Hallucination of Large Vision-Language Model", later "PAINT: Paying Attention to INformed
    Tokens to Mitigate Hallucination in Large Vision-Language Model", arXiv 2501.12206. It is PAI
    (arXiv 2407.21771) with a choice of tokens: s' = s + alpha |s| for local tokens, which the class
    token attends to in the first layer of the vision encoder, s' = s + beta |s| for summary tokens,
    outliers of its attention in the layer before the last. Both are found once per image (or tile
    of one). Other visual tokens are left alone.

    Paper and code: the first version also speaks of a modulation of heads. The authors' code has
    none, its formula is not known, and there is none here. The code's spatial tokens are chosen by
    row sums of a softmax, which are all 1, and their share is 0; here `spatial_ratio` above 0
    chooses them by column means, which must have been meant. The code fixes `local_ratio` at 0.25
    and ignores its command line. It edits after the mask was added; here before it, as in PAI.

    Ours, not the authors': encoders without a class token count the attention received from all
    patches; those with windowed layers are read in the first and the last layer without windows;
    where several patches make one token, their mean counts. Strengths other than LLaVA-1.5-7B's
    are our recommendation, untuned.
    """

    alpha: float | None = option(
        None, "strength on local tokens; default: preset, else 0.5", 0.0, 10.0
    )
    beta: float | None = option(
        None, "strength on summary tokens; default: preset, else 0.2", 0.0, 10.0
    )
    local_ratio: float = option(
        0.25, "share of an image's tokens that are local by the class token's attention", 0.0, 1.0
    )
    spatial_ratio: float = option(
        0.0, "share of an image's tokens that are local by attention from all patches", 0.0, 1.0
    )
    start_layer: int | None = option(None, "first edited layer; default: ceil(layers / 16)")
    end_layer: int | None = option(None, "layer after the last edited one; default: all are edited")

    name: ClassVar[str] = "imba"
    rows: ClassVar[Literal["predicting", "text"]] = "predicting"
    has_fused_form: ClassVar[bool] = True
    PRESETS: ClassVar[tuple[Preset, ...]] = (
        Preset(LLAVA_7B, {"alpha": 0.7, "beta": 0.3}, "authors' code"),
    )

    def prepared(self, info: ModelInfo, model: torch.nn.Module) -> PayAttentionToInformedTokens:
        describe_tower(model, info)  # raises where tokens cannot be traced to patches
        start = math.ceil(info.num_layers / 16)
        return self.with_defaults(info, alpha=0.5, beta=0.2, start_layer=start)

    def encoder_layers(self, tower: Tower) -> tuple[int, ...]:
        count, full = len(tower.layers), tower.full_attention
        return (full[0], full[-1]) if len(full) < count else (0, max(0, count - 2))

    def image_values(self, received: Sequence[Received]) -> torch.Tensor:
        early, late = (there.column if there.cls is None else there.cls for there in received)
        groups = select_tokens(
            early, late, self.local_ratio, received[0].column, self.spatial_ratio
        )
        return groups.float()

    def plan(self, keys: Keys) -> Plan | None:
        if not self.alpha and not self.beta:
            return None
        assert keys.image_values is not None  # the engine asks image_values() for them
        assert self.alpha is not None and self.beta is not None  # set by prepared()
        groups = keys.image_values.round().to(torch.uint8)
        local, summary = groups == _LOCAL, groups == _SUMMARY
        lift = self.alpha * local + self.beta * summary
        gain = [[1 + by, 1 - by] for by in (0.0, self.alpha, self.beta, 0.0)]
        fused = FusedEdit(groups=groups, gain=torch.tensor(gain, device=groups.device))
        notes = {"local": local.sum(1).tolist(), "summary": summary.sum(1).tolist()}
        return Plan({"lift": lift.float()}, lift.any(1).tolist(), notes, fused=fused)

    def edit_scores(self, scores: torch.Tensor, *, lift: torch.Tensor) -> torch.Tensor:
        return lift_scores(scores, lift)
