"""PTP: keep visual tokens by what region they are in, what they are, and what is asked."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from vlmfix.base.method import check_range
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
from vlmfix.families.tower import describe_tower

if TYPE_CHECKING:
    from vlmfix.families.tower import Tower

__all__ = ["PyramidTokenPruning", "fuse", "region_saliency", "stretched", "tile_budgets"]

Thumbnail = Literal["uniform", "keep", "pool"]


def region_saliency(tiles: torch.Tensor, whole: torch.Tensor, temperature: float) -> torch.Tensor:
    """How much of the picture each tile stands for.

    Args:
        tiles: (T, d), the class token of each tile behind the vision encoder.
        whole: (d,), that of the thumbnail.
        temperature: of the softmax over tiles; low: the most similar tile takes all.

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
            "keep": all of them, but for one token for each tile; "pool": it is a tile as salient
            as the most salient one.

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
    own = max(own, budget - sum(tiles))  # what the tiles have no room for
    shares = share_budget(tiles, budget - own, saliency)
    return [*shares[:whole], own, *shares[whole:]]


def stretched(values: torch.Tensor) -> torch.Tensor:
    """(n,) values, the smallest at 0 and the largest at 1; all 0 if they are equal."""
    low, high = values.aminmax()
    return (values - low) / torch.where(high > low, high - low, 1.0)


def fuse(saliency: torch.Tensor, relevance: torch.Tensor, alpha: float) -> torch.Tensor:
    """(n,) (1 - alpha) saliency + alpha relevance, which are on one scale."""
    return (1 - alpha) * saliency + alpha * relevance


@dataclass(frozen=True)
class PyramidTokenPruning(TokenMethod):
    """Keep visual tokens by region, token and instruction: a reconstruction in the style of PTP.

    Liang, Li, Chen, Zheng, Chen, Li, Xue: "Training-Free Pyramid Token Pruning for Efficient Large
    Vision-Language Models via Region, Token, and Instruction-Guided Importance", arXiv 2509.15704.
    Tiles get budgets by how similar their class token is to the thumbnail's (region). Within a tile
    the tokens are ranked by the class token's attention (token) and by the attention that the
    question pays to them in an early decoder layer (instruction).

    Reconstruction: of the paper only its abstract and introduction were at hand, and no code of the
    authors. The stages and what they see are the paper's. The token and instruction scores, their
    fusion with `alpha` = 0.5 and decoder layer 2 follow descriptions of it by others. The form of
    the region score, `temperature`, the thumbnail's budget, the method of largest remainders and
    the scopes of the scales (saliency per tile, relevance per picture) are choices made here. At
    `temperature` = 1 cosines are so close that tiles get nearly equal budgets; 0.25 tells them
    apart.

    Placement: descriptions by others drop tokens within the language model, at that layer. Here
    the prompt runs up to `instruction_layer` once, to read the attention, and then starts afresh
    without them, so that all layers and their KV cache are short. Dropping them in place is not
    offered. `alpha=0` asks nothing of the language model and costs no such look.

    The budget is one per picture: InternVL's tiles are joined, whose placeholders stand in one run
    with the thumbnail last; in LLaVA-NeXT the thumbnail comes first. The region stage needs tiles,
    a thumbnail and class tokens. Models that see one tile have no use for it. SmolVLM and Idefics3
    part their tiles by text and have no class token: there each tile has a budget of its own.
    Encoders without a class token count the attention received from all patches.
    """

    alpha: float = field(
        default=0.5, metadata={"help": "weight of the question against the image, from 0 to 1"}
    )
    temperature: float = field(
        default=1.0, metadata={"help": "of the softmax over tiles; lower is sharper, such as 0.25"}
    )
    region: Literal["cls_cosine", "uniform"] = field(
        default="cls_cosine",
        metadata={"help": "budgets of tiles: by class token, or uniform: all alike"},
    )
    thumbnail: Thumbnail = field(
        default="uniform",
        metadata={"help": "its budget: uniform, keep: all of it, pool: that of the best tile"},
    )
    instruction_layer: int | None = field(
        default=None, metadata={"help": "decoder layer, from 0, that the question is read in; 2"}
    )
    saliency_layer: int | None = field(
        default=None, metadata={"help": "encoder layer for token saliency; default: the last"}
    )

    name: ClassVar[str] = "ptp"
    needs_tiles: ClassVar[bool] = True
    reads_question: ClassVar[bool] = True
    whole_pictures: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "alpha", 0.0, 1.0)
        check_range(self, "temperature", 1e-3, 1e3)
        if self.region not in ("cls_cosine", "uniform"):
            raise BadInput(f"ptp: region={self.region!r} must be 'cls_cosine' or 'uniform'.")
        if self.thumbnail not in ("uniform", "keep", "pool"):
            raise BadInput(
                f"ptp: thumbnail={self.thumbnail!r} must be 'uniform', 'keep' or 'pool'."
            )

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
        tile, _, _ = visual.grid()
        groups = [(tile == at).nonzero().flatten() for at in range(len(visual.tiles))]
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
