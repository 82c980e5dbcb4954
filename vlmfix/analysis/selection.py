"""The visual tokens that a pruning method keeps, and their places in the images.

The module has another name than its function `visual_tokens`, because a module of that name would
replace the function as an attribute of the package.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from vlmfix.analysis.maps import Placed, placed_images
from vlmfix.base.pruning import LayerTokenMethod, PruningMethod, TokenMethod
from vlmfix.engine.call import Call
from vlmfix.engine.kept import ask
from vlmfix.engine.layer_pruning import KeptPlaceholders
from vlmfix.engine.observe import internal_pass
from vlmfix.engine.session import SESSION, Session
from vlmfix.engine.stages import make_stack
from vlmfix.errors import BadInput, UnsupportedModel
from vlmfix.families import last_logits, pixel_names, vision_arguments
from vlmfix.families.question import find_question
from vlmfix.families.tower import describe_tower
from vlmfix.registry import MethodSpec
from vlmfix.wrapper import using, wrapped

__all__ = ["KeptTokens", "visual_tokens"]


@dataclass(frozen=True, eq=False)
class KeptTokens:
    """The visual tokens that a pruning method keeps of one image.

    Visual tokens are counted in the order of the prompt. Newlines (LLaVA-NeXT) do not count: they
    stay with every row that keeps a token.

    Attributes:
        index: (k,) int64, ascending: the kept visual tokens.
        count: n, the number of visual tokens.
        budget: number of tokens to keep; for methods that drop tokens between layers (FastV), of
            all placeholders of the prompt.
        weights: (k, n) float32, row i times the tokens is kept token i, for methods that merge;
            None: every kept token is itself.
        views: each (rows, columns) int64, the visual token at each place. Families have one view
            per image, LLaVA-NeXT two: the whole image in one tile, and the image in joined tiles.
            An image that a method sees as a picture of several tiles has one view per tile. () for
            families whose tokens cannot be traced to places.
    """

    index: torch.Tensor
    count: int
    budget: int
    weights: torch.Tensor | None
    views: tuple[torch.Tensor, ...]

    def masks(self) -> tuple[torch.Tensor, ...]:
        """(rows, columns) bool for each view: whether the token at each place is kept."""
        return tuple(torch.isin(view, self.index) for view in self.views)

    def groups(self) -> tuple[torch.Tensor, ...]:
        """For each kept token, the (j,) int64 tokens that it is made of, ascending."""
        if self.weights is None:
            return tuple(self.index[:, None])
        return tuple(row.nonzero().flatten() for row in self.weights)


def visual_tokens(
    model: Any,
    inputs: Mapping[str, Any],
    method: MethodSpec = None,
    *,
    processor: Any = None,
) -> list[list[KeptTokens]]:
    """Find the tokens that a pruning method keeps of each image of each prompt.

    The images are encoded; the prompts run only if the method reads a decoder layer (`ptp`,
    `fastv`). Neither outputs of the model nor `last_call` change.

    Args:
        model: a supported VLM in eval mode, plain or wrapped.
        inputs: arguments of its generate() for whole prompts.
        method: see `wrap`. None: the stack of this thread on a wrapped model.
        processor: the model's processor or tokenizer, which tells the question from the template,
            for methods that read it.

    Returns:
        A list per prompt of one entry per image, in order; prompts without an image have none. An
        image is a unit of the vision tower: crops that a processor returns as separate images have
        an entry each, unless the method prunes whole pictures (`ptp`).

    Raises:
        BadInput: no image, videos, inputs that cannot be used, or no pruning method.
        UnsupportedModel: a model that the method cannot prune.
        StateError: the model is in training mode.
    """
    ids = inputs.get("input_ids")
    if not isinstance(ids, torch.Tensor) or inputs.get("past_key_values") is not None:
        raise BadInput(
            "visual_tokens reads whole prompts: pass input_ids (B, L), and no past_key_values."
        )
    inputs = {name: value for name, value in inputs.items() if name != "labels"}
    with _session(model, method) as session:
        pruning = _pruning(session)
        placeholders = torch.isin(ids, ids.new_tensor(session.host.info.image_token_ids))
        if not pixel_names(inputs) or not bool(placeholders.any()):
            raise BadInput(
                "no prompt has an image: pass pixel_values, and input_ids with the placeholders "
                "that the model's processor writes."
            )
        question = None if processor is None else find_question(processor, session.host.info, ids)
        images = _images(session, inputs, placeholders.sum(1).tolist())
        if isinstance(pruning, TokenMethod):
            return _reduced(session, pruning, inputs, question, images)
        assert isinstance(pruning, LayerTokenMethod)
        return _dropped(session, pruning, inputs, placeholders, images)


@contextmanager
def _session(model: Any, method: MethodSpec) -> Iterator[Session]:
    """The session of a model on which the method runs, wrapped for as long as this takes."""
    is_wrapped = SESSION in getattr(model, "__dict__", {})
    if is_wrapped and method is None:
        yield model.__dict__[SESSION]
        return
    with using(model, method) if is_wrapped else wrapped(model, method):
        yield model.__dict__[SESSION]


def _pruning(session: Session) -> PruningMethod:
    methods = session.stack.methods
    found = next((method for method in methods if isinstance(method, PruningMethod)), None)
    if found is None:
        raise BadInput(
            f"the stack {list(session.stack.specs())} holds no method that prunes visual tokens. "
            "Name one, as in vlmfix.visual_tokens(model, inputs, 'hiprune'), or wrap the model "
            "with one; `vlmfix methods` has those of stage tokens."
        )
    return found


def _images(
    session: Session, inputs: Mapping[str, Any], counts: list[int]
) -> list[list[Placed]] | None:
    """Per prompt, where the placeholders of its images lie; None where it cannot be told."""
    try:
        tower = describe_tower(session.host.model, session.host.info)
    except UnsupportedModel:
        return None
    return placed_images(tower, inputs, counts)


def _reduced(
    session: Session,
    method: TokenMethod,
    inputs: Mapping[str, Any],
    question: tuple[torch.Tensor, torch.Tensor] | None,
    images: list[list[Placed]] | None,
) -> list[list[KeptTokens]]:
    """The tokens kept before the language model."""
    asked = ask(session.host, method, dict(inputs), question)
    assert asked is not None  # there are pixels
    found: list[list[KeptTokens]] = [[] for _ in asked.placeholders]
    tiles = None if images is None else [iter(own) for own in images]
    for reduction, owner in zip(asked.reductions, asked.owners, strict=True):
        views: list[torch.Tensor] = []
        held = 0
        while tiles is not None and held < reduction.count:  # a picture holds several tiles
            tokens, own = next(tiles[owner])
            views += [held + view for view in own]
            held += tokens
        weights = None if reduction.weights is None else reduction.weights.cpu()
        budget = method.budget(reduction.size[1])
        kept = _kept(reduction.positions.cpu(), reduction.count, budget, weights, views)
        found[owner].append(kept)
    return found


def _dropped(
    session: Session,
    method: LayerTokenMethod,
    inputs: Mapping[str, Any],
    placeholders: torch.Tensor,
    images: list[list[Placed]] | None,
) -> list[list[KeptTokens]]:
    """The tokens kept between layers: the prompts run once."""
    model: Any = session.host.model
    call = Call(prompt_length=placeholders.shape[1], rows=len(placeholders))
    arguments = {**inputs, "use_cache": False, **last_logits(model, 1)}
    stack = make_stack([method], session.host.info)
    internal_pass(session.host, arguments, stack=stack, call=call)
    chosen = call.get(KeptPlaceholders)
    kept = placeholders if chosen is None else chosen.kept
    if images is None:
        images = _unplaced(model, inputs, placeholders.sum(1).tolist())
    found = []
    for own, mine, stays in zip(images, placeholders, kept, strict=True):
        budget = method.budget(int(mine.sum()))
        parts = stays[mine].cpu().split([tokens for tokens, _ in own])
        found.append(
            [
                _kept(part.nonzero().flatten(), tokens, budget, None, list(views))
                for part, (tokens, views) in zip(parts, own, strict=True)
            ]
        )
    return found


def _unplaced(model: Any, inputs: Mapping[str, Any], counts: list[int]) -> list[list[Placed]]:
    """Per prompt, the placeholders of its images, without views: as the encoder returns them."""
    with torch.no_grad():
        vision = vision_arguments(model, inputs)
        output = model.base_model.get_image_features(**vision, return_dict=True)
    features = iter(output.pooler_output)
    found: list[list[Placed]] = []
    for count in counts:
        own: list[Placed] = []
        while sum(tokens for tokens, _ in own) < count:
            own.append((len(next(features)), ()))
        found.append(own)
    return found


def _kept(
    positions: torch.Tensor,
    count: int,
    budget: int,
    weights: torch.Tensor | None,
    views: list[torch.Tensor],
) -> KeptTokens:
    """The tokens kept of an image with `count` placeholders, from the (k,) kept placeholders."""
    # A placeholder in no view is a newline.
    every = torch.arange(count)
    real = torch.cat([view.flatten() for view in views]).sort().values if views else every
    number = torch.full((count,), -1)
    number[real] = every[: len(real)]
    tokens = number[positions]
    own = tokens >= 0
    return KeptTokens(
        index=tokens[own],
        count=len(real),
        budget=budget,
        weights=None if weights is None else weights[own][:, real],
        views=tuple(number[view] for view in views),
    )
