"""VisionZip: keep what the vision encoder attends to, merge the rest into a few tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from vlmfix.base.method import option
from vlmfix.base.pruning import (
    Kept,
    TokenMethod,
    VisualTokens,
    encoder_layer,
    largest,
    share_budget,
)
from vlmfix.families import ModelInfo
from vlmfix.families.tower import Tower, describe_tower

__all__ = ["VisionZip", "merge_tokens"]


def merge_tokens(
    attention: torch.Tensor, keys: torch.Tensor, dominant: int, contextual: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose dominant tokens of an image or tile, and merge all others into contextual ones.

    Of what is not dominant, every step-th token is a target (step = max(1, rest // contextual)),
    the first `contextual` of them; each other token goes to the target whose key is closest by
    cosine. A contextual token is its target plus the mean of what went there.

    Args:
        attention: (n,), what each token receives: the largest are dominant; of equal ones the
            first.
        keys: (n, D), the key vector of each token.
        dominant: number of dominant tokens.
        contextual: number of contextual tokens; with the dominant ones at most n.

    Returns:
        index: (k,) int64, ascending: the dominant tokens and the targets.
        weights: (k, n) float32: row i times the tokens is kept token i.
    """
    count = len(attention)
    chosen = largest(attention, dominant)
    rest = torch.ones(count, dtype=torch.bool)
    rest[chosen] = False
    others = rest.nonzero().flatten()
    targets = others[:: max(1, len(others) // max(1, contextual))][:contextual]
    merged = torch.zeros(contextual, count)
    if contextual:
        rest[targets] = False
        others = rest.nonzero().flatten()
        direction = torch.nn.functional.normalize(keys, dim=-1)
        merged[(direction[others] @ direction[targets].T).argmax(1), others] = 1.0
        merged /= merged.sum(1, keepdim=True).clamp(min=1.0)  # a target may stay alone
        merged[torch.arange(contextual), targets] = 1.0
    index, order = torch.cat([chosen, targets]).sort()
    return index, torch.cat([torch.eye(count)[chosen], merged])[order]


@dataclass(frozen=True)
class VisionZip(TokenMethod):
    """Keep the visual tokens that the encoder's class token attends to most; merge all others.

    Yang et al.: "VisionZip: Longer is Better but Not Necessary in Vision Language Models", CVPR
    2025, arXiv 2412.04467. Attention and keys are those of the layer whose output becomes the
    features. Ours: encoders without a class token count the attention received from all patches.

    Deviations from the authors' code: they merge the encoder's features, before the projector; here
    the projector's output is merged, for every family alike. Their "54 dominant tokens" are the
    class token itself and 53 patches; the model of transformers has no such visual token, so all 54
    are patches. They put contextual tokens behind the dominant ones; here each stands where its
    target was. Tiles of one image share its budget by size, in their code equally. As in their
    code, a contextual token is the sum of its target and a mean, not one mean over both.
    """

    contextual_share: float = option(
        10 / 64, "share of the budget for merged tokens; the authors' 64 are 54 + 10", 0.0, 1.0
    )
    layer: int | None = option(
        None,
        "encoder layer, counted from 0, whose attention and keys are read; default: the one that "
        "makes the features",
    )

    name: ClassVar[str] = "visionzip"
    needs_tiles: ClassVar[bool] = True

    def prepared(self, info: ModelInfo, model: torch.nn.Module) -> VisionZip:
        super().prepared(info, model)
        tower = describe_tower(model, info)
        return replace(self, layer=encoder_layer(self, "layer", tower, tower.feature_layer))

    def encoder_layers(self, tower: Tower) -> tuple[int, ...]:
        assert self.layer is not None  # set by prepared()
        return (self.layer,)

    def keep(self, visual: VisualTokens, budget: int) -> Kept:
        assert self.layer is not None  # set by prepared()
        attention = visual.received(self.layer, "cls").cpu()
        keys = visual.keys(self.layer).cpu()
        groups = visual.by_tile()
        shares = share_budget([len(group) for group in groups], budget)
        indices, weights = [], torch.zeros(budget, len(visual))
        start = 0
        for group, share in zip(groups, shares, strict=True):
            contextual = round(share * self.contextual_share)
            own, made_of = merge_tokens(
                attention[group], keys[group], share - contextual, contextual
            )
            indices.append(group[own])
            weights[start : start + share, group] = made_of
            start += share
        index, order = torch.cat(indices).sort()
        return Kept(index, weights[order] if self.contextual_share else None)
