"""PTP: keep visual tokens by their region, their saliency and their relevance to the question."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

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
from vlmfix.errors import BadInput, UnsupportedModel
from vlmfix.families import ModelInfo
from vlmfix.families.tower import Tower, describe_tower

__all__ = ["PyramidTokenPruning", "fuse", "region_saliency", "stretched", "tile_budgets"]

Thumbnail = Literal["uniform", "keep", "pool"]


def region_saliency(tiles: torch.Tensor, whole: torch.Tensor, temperature: float) -> torch.Tensor:
    """The share of the picture that each tile stands for.

    Args:
        tiles: (T, d), the class token of each tile at the vision encoder's output.
        whole: (d,), that of the thumbnail.
        temperature: of the softmax over tiles; near 0 the most similar tile takes all.

    Returns:
        (T,), positive, summing to 1.
    """
    similarity = torch.cosine_similarity(tiles, whole[None], dim=1)
    return torch.softmax(similarity / temperature, dim=0)


def tile_budgets(
    counts: list[int], budget: int, saliency: list[float], whole: int | None, thumbnail: Thumbnail
) -> list[int]:
    """Split a picture's budget over its tiles.

    Args:
        counts: tokens of each tile, the thumbnail's among them.
        budget: at most their sum.
        saliency: of each tile, the thumbnail not among them.
        whole: index of the thumbnail; None: there is none.
        thumbnail: its budget. "uniform": the share of its tokens that is kept of the picture's;
            "keep": all its tokens, as long as one is left for each tile; "pool": that of a tile as
            salient as the most salient one.

    Returns:
        A number per tile, at most its count, in proportion to the saliency, summing to the budget.
    """
    if whole is None:
        return share_budget(counts, budget, saliency)
    if thumbnail == "pool":
        weights = [*saliency[:whole], max(saliency), *saliency[whole:]]
        return share_budget(counts, budget, weights)
    tiles = [*counts[:whole], *counts[whole + 1 :]]
    if thumbnail == "keep":
        own = min(counts[whole], max(1, budget - len(tiles)))
    else:
        own = round(budget * counts[whole] / sum(counts))
    own = max(own, budget - sum(tiles))  # tiles have no room for more
    shares = share_budget(tiles, budget - own, saliency)
    return [*shares[:whole], own, *shares[whole:]]


def stretched(values: torch.Tensor) -> torch.Tensor:
    """(n,) values scaled to [0, 1]; all 0 if they are equal."""
    low, high = values.aminmax()
    return (values - low) / torch.where(high > low, high - low, 1.0)


def fuse(saliency: torch.Tensor, relevance: torch.Tensor, alpha: float) -> torch.Tensor:
    """(n,) (1 - alpha) saliency + alpha relevance, both on one scale."""
    return (1 - alpha) * saliency + alpha * relevance


@dataclass(frozen=True)
class PyramidTokenPruning(TokenMethod):
    """Keep visual tokens by region, token and instruction: a reconstruction in the style of PTP.

    Liang, Li, Chen, Zheng, Chen, Li, Xue: "Training-Free Pyramid Token Pruning for Efficient Large
    Vision-Language Models via Region, Token, and Instruction-Guided Importance", arXiv 2509.15704.
    Tiles get budgets by how similar their class token is to the thumbnail's (region). Within a tile
    the tokens are ranked by the class token's attention (token) and by the attention that the
    question pays to them in an early decoder layer (instruction).

    Reconstruction: only the paper's abstract and introduction were available, and no code of the
    authors. The stages and their inputs are the paper's. The token and instruction scores, their
    fusion with `alpha` = 0.5 and decoder layer 2 follow descriptions of it by others. The form of
    the region score, `temperature`, the thumbnail's budget, the method of largest remainders and
    the scopes of the scales (saliency per tile, relevance per picture) are choices made here. At
    `temperature` = 1 cosines are so close that tiles get nearly equal budgets; 0.25 separates them.

    Placement: descriptions by others drop tokens within the language model, at that layer. Here a
    probe pass runs the prompt up to `instruction_layer` to read the attention, and the prompt then
    runs without the dropped tokens, so that all layers and their KV cache are short. Dropping
    tokens between layers is not offered. `alpha=0` needs no probe pass.

    The budget is one per picture: InternVL's tiles, whose placeholders stand in one run with the
    thumbnail last, are joined; in LLaVA-NeXT the thumbnail comes first. The region stage needs
    tiles, a thumbnail and class tokens; models that see one tile do not use it. SmolVLM and
    Idefics3 separate their tiles by text and have no class token: there each tile has a budget of
    its own. Encoders without a class token count the attention received from all patches.
    """

    alpha: float = option(
        0.5, "weight of a token's relevance to the question against its saliency", 0.0, 1.0
    )
    temperature: float = option(
        1.0, "temperature of the softmax over tiles; lower is sharper, such as 0.25", 1e-3, 1e3
    )
    region: Literal["cls_cosine", "uniform"] = option(
        "cls_cosine", "budgets of tiles: cls_cosine (by their class tokens) or uniform (all alike)"
    )
    thumbnail: Thumbnail = option(
        "uniform",
        "budget of the thumbnail: uniform (its share), keep (all tokens), pool (the best tile's)",
    )
    instruction_layer: int | None = option(
        None, "decoder layer, counted from 0, whose attention gives the relevance; default: 2"
    )
    saliency_layer: int | None = option(
        None, "encoder layer whose attention gives the saliency; default: the last"
    )

    name: ClassVar[str] = "ptp"
    needs_tiles: ClassVar[bool] = True
    reads_question: ClassVar[bool] = True
    whole_pictures: ClassVar[bool] = True

    def prepared(self, info: ModelInfo, model: torch.nn.Module) -> PyramidTokenPruning:
        super().prepared(info, model)
        tower = describe_tower(model, info)
        if self.region == "cls_cosine" and tower.whole is not None and not tower.has_cls:
            raise UnsupportedModel(
                "ptp: region=cls_cosine compares the class tokens of tiles, and the vision tower "
                f"of this {info.model_type!r} model has none. Use region=uniform."
            )
        layer = self.instruction_layer
        layer = min(2, info.num_layers - 1) if layer is None else layer
        if layer not in info.attention:
            raise BadInput(
                f"ptp: decoder layer instruction_layer={layer} has no attention to read in a model "
                f"of {info.num_layers} layers. Give one of {sorted(info.attention)}."
            )
        last = tower.full_attention[-1]
        return replace(
            self,
            instruction_layer=layer,
            saliency_layer=encoder_layer(self, "saliency_layer", tower, last),
        )

    def encoder_layers(self, tower: Tower) -> tuple[int, ...]:
        assert self.saliency_layer is not None  # set by prepared()
        return (self.saliency_layer,)

    def relevance_layer(self, info: ModelInfo) -> int | None:
        return self.instruction_layer if self.alpha else None

    def keep(self, visual: VisualTokens, budget: int) -> Kept:
        assert self.saliency_layer is not None  # set by prepared()
        saliency = visual.received(self.saliency_layer, "cls").cpu()
        relevance = torch.zeros_like(saliency)
        if visual.relevance is not None:
            relevance = stretched(visual.relevance.cpu())
        groups = visual.by_tile()
        counts = [len(group) for group in groups]
        budgets = tile_budgets(
            counts, budget, self._regions(visual).tolist(), visual.whole, self.thumbnail
        )
        chosen = []
        for group, share in zip(groups, budgets, strict=True):
            if share:
                scores = fuse(stretched(saliency[group]), relevance[group], self.alpha)
                chosen.append(group[largest(scores, share)])
        return Kept(torch.cat(chosen).sort().values)

    def _regions(self, visual: VisualTokens) -> torch.Tensor:
        """Saliency of every tile but the thumbnail."""
        count = len(visual.tiles) - (visual.whole is not None)
        if visual.whole is None or self.region == "uniform":
            return torch.full((count,), 1 / count)
        outputs = [tile.cls_output for tile in visual.tiles]
        classes = torch.stack([each for each in outputs if each is not None])
        others = [at for at in range(len(classes)) if at != visual.whole]
        return region_saliency(classes[others], classes[visual.whole], self.temperature)
