"""HiPrune: keep what the vision encoder attends to in a middle and in its last layer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from vlmfix.base.method import Preset, option
from vlmfix.base.pruning import (
    Kept,
    TokenMethod,
    VisualTokens,
    encoder_layer,
    largest,
    share_budget,
)
from vlmfix.errors import BadInput
from vlmfix.families import ModelInfo
from vlmfix.families.tower import Tower, describe_tower
from vlmfix.methods.structures import EMOJI

__all__ = ["HiPrune", "choose_tokens", "default_object_layer", "neighbor_places"]

Neighbors = Literal["strict", "reference"]


def neighbor_places(
    place: torch.Tensor, shape: tuple[int, int], neighbors: Neighbors
) -> torch.Tensor:
    """The places above, below, left and right of some places in a grid.

    Args:
        place: (a,) int64, counted row by row.
        shape: rows and columns of the grid.
        neighbors: "strict": those inside the grid. "reference": place -1, +1, -columns, +columns,
            clamped to the grid, as the authors' code has it: the right neighbour of a row's end is
            the start of the next row, and what is above the first row is place 0.

    Returns:
        (m,) int64, m <= 4 a, in no order and with repeats.
    """
    rows, columns = shape
    if neighbors == "reference":
        steps = torch.tensor([-1, 1, -columns, columns])
        return (place[:, None] + steps).clamp(0, rows * columns - 1).flatten()
    row = (place // columns)[:, None] + torch.tensor([0, 0, -1, 1])
    column = (place % columns)[:, None] + torch.tensor([-1, 1, 0, 0])
    inside = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
    return (row * columns + column)[inside]


def choose_tokens(
    object_attention: torch.Tensor,
    deep_attention: torch.Tensor,
    place: torch.Tensor,
    shape: tuple[int, int],
    budget: int,
    alpha: float,
    neighbors: Neighbors = "strict",
) -> torch.Tensor:
    """Anchors, their neighbours (buffers), and registers of one image or tile.

    Args:
        object_attention: (n,), attention that each token receives in the object layer: the
            round(alpha budget / 5) largest are anchors.
        deep_attention: (n,), the same in the deep layer: the largest of what is neither anchor nor
            buffer are registers, until the budget is full.
        place: (n,) int64, where the tokens stand in the grid, row by row; places of tokens that
            the model dropped as padding are absent.
        shape: rows and columns of the grid.
        budget: at most n. If not all buffers fit, those of the largest `deep_attention` are kept.
        alpha: in [0, 1], share of the budget for anchors and buffers.
        neighbors: see `neighbor_places`.

    Returns:
        (budget,) int64, ascending. Of equal values the first counts as larger.
    """
    anchors = largest(object_attention, round(alpha * budget / 5))
    turn = torch.isin(place, neighbor_places(place[anchors], shape, neighbors)).long()
    turn[anchors] = 2
    order = deep_attention.argsort(descending=True, stable=True)
    order = order[turn[order].argsort(descending=True, stable=True)]
    return order[:budget].sort().values


def default_object_layer(tower: Tower) -> int:
    """The encoder layer that attends to objects: the 9th of CLIP's 24, the 16th of Qwen's 32.

    Other depths take it in proportion; a tower with windowed layers takes the nearest other layer.
    """
    count = len(tower.layers)
    wanted = count // 2 - 1 if tower.layout == "patches" else round(0.375 * count) - 1
    return min(tower.full_attention, key=lambda layer: abs(layer - wanted))


@dataclass(frozen=True)
class HiPrune(TokenMethod):
    """Keep object patches and their neighbours, and the patches that gather global information.

    Liu, Du, Zhu, Lian, Li, Chen, Guan, Wang: "HiPrune: Hierarchical Attention for Efficient Token
    Pruning in VLMs", ACL 2026, arXiv 2508.00553. Middle layers of a vision encoder attend to
    objects, its last ones to scattered patches ("registers"). Anchors, the tokens that receive most
    attention in a middle layer, stay with their four neighbours; registers of the layer that makes
    the features fill the budget. The prompt plays no part.

    `text_share` above 0 is HiPrune++: that share of the budget goes to the tokens whose features
    are most similar to the question. It is experimental: no code of it was released, and it is
    rebuilt from the paper's text, which contradicts itself on how many tokens there are and whether
    they come on top of the budget (`additive`).

    Paper and code: the paper's pseudo-code reads layers l and -1, the code l - 1 and -2, counted
    from 0; the code's are the default. The code's neighbours wrap around the ends of rows
    (`neighbors="reference"`); here they do not. The code shares one budget among the images of a
    batch; here every image has its own, which its tiles share by size (in the code equally). The
    code drops LLaVA-NeXT's newlines and keeps padding; here rows keep their newline and padding is
    dropped.
    """

    alpha: float | None = option(
        None, "share of the budget for anchors and their neighbours; default: preset, else 0.1",
        0.0, 1.0,
    )  # fmt: skip
    object_layer: int | None = option(
        None, "encoder layer, counted from 0, that finds anchors; default: in proportion to 9 of 24"
    )
    deep_layer: int | None = option(
        None, "encoder layer that finds registers; default: the one that makes the features"
    )
    neighbors: Neighbors = option(
        "strict", "neighbours of anchors: strict, or reference: wrapping around the ends of rows"
    )
    text_share: float = option(
        0.0, "HiPrune++, experimental: share of the budget that the question chooses", 0.0, 1.0
    )
    additive: bool = option(
        False, "HiPrune++: tokens chosen by the question come on top of the budget"
    )

    name: ClassVar[str] = "hiprune"
    needs_tiles: ClassVar[bool] = True
    reads_question: ClassVar[bool] = True
    PRESETS: ClassVar[tuple[Preset, ...]] = (
        Preset(EMOJI, {"alpha": 0.5}, "ours: with 0.1, a third of 64 tokens has no anchor"),
    )

    def prepared(self, info: ModelInfo, model: torch.nn.Module) -> HiPrune:
        super().prepared(info, model)
        tower = describe_tower(model, info)
        return replace(
            self.with_defaults(info, alpha=0.1),
            object_layer=encoder_layer(self, "object_layer", tower, default_object_layer(tower)),
            deep_layer=encoder_layer(self, "deep_layer", tower, tower.feature_layer),
        )

    def budget(self, count: int) -> int:
        own = super().budget(count)
        return min(count, own + round(self.text_share * own)) if self.additive else own

    def encoder_layers(self, tower: Tower) -> tuple[int, ...]:
        assert self.object_layer is not None and self.deep_layer is not None  # set by prepared()
        return self.object_layer, self.deep_layer

    def keep(self, visual: VisualTokens, budget: int) -> Kept:
        assert self.alpha is not None  # set by prepared()
        assert self.object_layer is not None and self.deep_layer is not None
        by_text = round(self.text_share * budget)
        if self.additive:
            by_text = budget - super().budget(len(visual))
        _, row, column = visual.grid()
        objects = visual.received(self.object_layer).cpu()
        deep = visual.received(self.deep_layer).cpu()
        groups = visual.by_tile()
        shares = share_budget([len(group) for group in groups], budget - by_text)
        chosen = [
            group[
                choose_tokens(
                    objects[group],
                    deep[group],
                    row[group] * one.columns + column[group],
                    (one.rows, one.columns),
                    share,
                    self.alpha,
                    self.neighbors,
                )
            ]
            for one, group, share in zip(visual.tiles, groups, shares, strict=True)
        ]
        if by_text:
            chosen.append(_most_similar(visual, torch.cat(chosen), by_text))
        return Kept(torch.cat(chosen).sort().values)


def _most_similar(visual: VisualTokens, taken: torch.Tensor, count: int) -> torch.Tensor:
    """(count,) of the tokens not taken: those whose features are closest to the mean question."""
    if not len(visual.question):
        raise BadInput(
            "hiprune: text_share compares visual tokens with the question, and a prompt has no "
            "text after its image. Put the question after the image, or leave text_share at 0."
        )
    question = visual.question.mean(0, keepdim=True).to(visual.features.device)
    similarity = torch.cosine_similarity(visual.features.float(), question).cpu()
    similarity[taken] = -torch.inf
    return largest(similarity, count)
