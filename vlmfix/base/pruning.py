"""The base class of methods that drop or merge visual tokens before the language model sees them.

A method gets the visual tokens of one image at a time and says which of them stay, and of which
tokens each of these is made. engine/pruning.py encodes the images, asks, and cuts the prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from vlmfix.base.method import Method, StageName, option
from vlmfix.errors import BadInput, UnsupportedModel
from vlmfix.families import ModelInfo
from vlmfix.families.surgeon import require_cuttable
from vlmfix.families.tower import Received, Tile, Tower, describe_tower

__all__ = [
    "Kept",
    "LayerTokenMethod",
    "PruningMethod",
    "TokenMethod",
    "VisualTokens",
    "encoder_layer",
    "largest",
    "share_budget",
]


@dataclass(frozen=True)
class VisualTokens:
    """The n visual tokens of one image, in the order of the prompt.

    LLaVA-NeXT's newlines are not among them, unless the method counts them (`counts_newlines`).

    Attributes:
        features: (n, D) what the language model would get, in the model's dtype.
        tiles: what the vision tower saw as one image, one after the other; () for a
            family whose tokens cannot be traced to places.
        place: (n,) int64, where each token stands among the tokens of all tiles, put one after the
            other and each row by row, -1 for a newline; None without tiles.
        relevance: (n,) float32, for methods with a `relevance_layer`: see there.
        question: (T, D) float32 embeddings of the tokens of the user's question; empty if the
            method does not read it.
        number: of the image within its prompt, from 0.
        whole: which of several tiles is the picture as a whole at low resolution.
    """

    features: torch.Tensor
    tiles: tuple[Tile, ...]
    place: torch.Tensor | None
    relevance: torch.Tensor | None
    question: torch.Tensor
    number: int
    whole: int | None = None

    def __len__(self) -> int:
        return len(self.features)

    def grid(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tile, row and column of each token: three (n,) int64."""
        assert self.place is not None
        sizes = torch.tensor([tile.rows * tile.columns for tile in self.tiles])
        starts = sizes.cumsum(0) - sizes
        place = self.place.cpu()
        tile = torch.searchsorted(starts, place, right=True) - 1
        columns = torch.tensor([tile.columns for tile in self.tiles])[tile]
        inside = place - starts[tile]
        return tile, inside // columns, inside % columns

    def by_tile(self) -> list[torch.Tensor]:
        """The indices of the tokens of each tile, int64 on the CPU."""
        tile, _, _ = self.grid()
        return [(tile == at).nonzero().flatten() for at in range(len(self.tiles))]

    def received(self, layer: int, what: Literal["column", "cls"] = "column") -> torch.Tensor:
        """(n,) float32: attention that each token receives within its tile (see tower.Received).

        Args:
            layer: of the vision tower, one of `encoder_layers`.
            what: from all patches, or from the class token where there is one.
        """
        assert self.place is not None
        found: list[Received] = [tile.received[layer] for tile in self.tiles]
        values = [one.cls if what == "cls" and one.cls is not None else one.column for one in found]
        return torch.cat(values).to(self.place.device)[self.place]

    def keys(self, layer: int) -> torch.Tensor:
        """(n, D) float32: key of each token in a layer of the vision tower (see tower.Received).

        Args:
            layer: one of `encoder_layers`.
        """
        assert self.place is not None
        keys = torch.cat([tile.received[layer].key for tile in self.tiles])
        return keys.to(self.place.device)[self.place]


@dataclass(frozen=True)
class Kept:
    """What stays of one image.

    Attributes:
        index: (k,) int64, ascending: the tokens whose places, and positions, are kept.
        weights: (k, n) float32: each kept token becomes this mean or sum of all n. None: each
            stays what it is.
    """

    index: torch.Tensor
    weights: torch.Tensor | None = None


@dataclass(frozen=True)
class PruningMethod(Method):
    """A method that keeps some visual tokens: a budget of `tokens`, or of a `ratio` of them."""

    tokens: int | None = option(None, "number of visual tokens that are kept", 1, 10**6)
    ratio: float | None = option(
        None, "share of the visual tokens that is kept; default: see the method's page", 0.0, 1.0
    )

    stage: ClassVar[StageName] = "tokens"
    #: What is kept if neither is given: 192 of the 576 visual tokens of LLaVA-1.5, the largest
    #: budget of most papers.
    default_ratio: ClassVar[float] = 1 / 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens is not None and self.ratio is not None:
            raise BadInput(
                f"{self.name}: tokens={self.tokens} and ratio={self.ratio} are two budgets. Give "
                "one of them."
            )
        if self.ratio == 0:
            raise BadInput(f"{self.name}: ratio=0 keeps nothing; for no image use no image.")

    def budget(self, count: int) -> int:
        """How many of `count` visual tokens stay: at least one, at most all."""
        if self.tokens is not None:
            return min(self.tokens, count)
        return max(1, round(count * (self.default_ratio if self.ratio is None else self.ratio)))

    def neutral(self) -> bool:
        """Whether these settings keep every token."""
        return self.ratio == 1


@dataclass(frozen=True)
class TokenMethod(PruningMethod):
    """A method that keeps some visual tokens of every image, before the language model.

    An image is what the vision tower gets as one: crops that a processor hands over as images of
    their own (InternVL, SmolVLM) have a budget each, unless the method wants whole pictures.
    """

    positions: Literal["contiguous", "original"] = option(
        "contiguous",
        "positions of the kept tokens: contiguous or original; M-RoPE families: always original",
    )

    #: Whether `keep` reads the tiles of VisualTokens.
    needs_tiles: ClassVar[bool] = False
    #: Whether `keep` reads the question.
    reads_question: ClassVar[bool] = False
    #: Whether tiles that are handed over as images of their own come as one image with one budget
    #: where the prompt shows that they are one picture: where their placeholders fill one run.
    whole_pictures: ClassVar[bool] = False

    def prepared(self, info: ModelInfo, model: torch.nn.Module) -> TokenMethod:
        require_cuttable(self.name, info, model)
        if self.needs_tiles:
            try:
                describe_tower(model, info)
            except UnsupportedModel as error:
                raise UnsupportedModel(f"{self.name}: {error}") from error
        return self

    def encoder_layers(self, tower: Tower) -> tuple[int, ...]:
        """Layers of the vision tower whose received attention `keep` wants; needs `needs_tiles`."""
        return ()

    def counts_newlines(self) -> bool:
        """Whether newlines (LLaVA-NeXT) are tokens like any other, which the budget counts.

        Otherwise a newline stays, on top of the budget, where something of its row does.
        """
        return False

    def relevance_layer(self, info: ModelInfo) -> int | None:
        """A decoder layer whose attention `keep` wants, from a look at the whole prompt.

        `VisualTokens.relevance` is then the attention that a visual token gets in that layer from
        the tokens of the question: the largest of their means over heads. The look costs a forward
        through the layers up to that one.
        """
        return None

    def keep(self, visual: VisualTokens, budget: int) -> Kept:
        """Choose what stays of one image.

        Args:
            visual: its n tokens.
            budget: how many of them to keep, 1 <= budget < n.

        Returns:
            `budget` tokens, or fewer where there are not so many different ones.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class LayerTokenMethod(PruningMethod):
    """A method that drops visual tokens between two decoder layers, by attention seen on the way.

    The budget is over all visual tokens of a prompt.
    """

    def first_layer(self, info: ModelInfo) -> int:
        """The first decoder layer that sees the kept tokens alone; at least 1."""
        raise NotImplementedError

    def keep(self, attention: torch.Tensor, budget: int) -> torch.Tensor:
        """Choose what stays of the visual tokens of one prompt.

        Args:
            attention: (n,) float32, what the last prompt token pays to each of them in the layer
                before `first_layer`, mean over heads.
            budget: how many to keep, 1 <= budget < n.

        Returns:
            (budget,) int64, ascending.
        """
        raise NotImplementedError


def encoder_layer(method: TokenMethod, name: str, tower: Tower, default: int) -> int:
    """The option `name` of a method, a layer of the vision tower, with its default filled in.

    Raises:
        BadInput: no such layer, or one whose patches attend within windows.
    """
    layer: int | None = getattr(method, name)
    if layer is None:
        return default
    if layer not in tower.full_attention:
        known = ", ".join(map(str, tower.full_attention))
        raise BadInput(
            f"{method.name}: {name}={layer} is no layer of the vision tower of "
            f"{tower.model_type!r} in which all patches attend to each other. Give one of {known}."
        )
    return layer


def largest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """(count,) int64, ascending: where the largest of (n,) scores are; of equal ones the first."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def share_budget(counts: list[int], budget: int, weights: list[float] | None = None) -> list[int]:
    """Split a budget over groups of tokens, in proportion, by the method of largest remainders.

    Args:
        counts: tokens of each group.
        budget: at most their sum.
        weights: what the shares are in proportion to; None: the counts.

    Returns:
        A share per group, at most its count, summing to the budget; at least 1 for each group that
        has a token, if the budget reaches. What a full group cannot take goes to the others; equal
        remainders go to the group that comes first.
    """
    weighed = [float(x) for x in (counts if weights is None else weights)]
    reaches = budget >= sum(count > 0 for count in counts)
    floors = [min(1, count) if reaches else 0 for count in counts]
    rooms = [count - floor for count, floor in zip(counts, floors, strict=True)]
    shares = [0.0] * len(counts)
    left = budget - sum(floors)
    open_ = [at for at, room in enumerate(rooms) if room]
    while left > 0 and open_:
        total = sum(weighed[at] for at in open_)
        each = {at: left * (weighed[at] / total if total else 1 / len(open_)) for at in open_}
        full = [at for at in open_ if each[at] >= rooms[at]]
        for at in full or open_:
            shares[at] = rooms[at] if full else each[at]
        if not full:
            break
        left -= sum(rooms[at] for at in full)
        open_ = [at for at in open_ if at not in full]
    whole = [int(share) for share in shares]
    missing = budget - sum(floors) - sum(whole)
    by_rest = sorted(range(len(counts)), key=lambda at: (whole[at] - shares[at], at))
    for at in by_rest[:missing]:
        whole[at] += 1
    return [floor + share for floor, share in zip(floors, whole, strict=True)]
