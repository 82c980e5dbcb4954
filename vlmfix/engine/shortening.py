"""Prompts with fewer visual tokens: images encoded, a method asked, ids and features cut together.

Whatever depends on the length of a prompt (masks, positions, the KV cache, the number of tokens
that may follow) transformers derives from what generate() is given. So a prompt is cut before
generate() starts, and afterwards only the ids that it returns are put right.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from vlmfix.base.attention import Watcher
from vlmfix.base.pruning import Kept, TokenMethod, VisualTokens
from vlmfix.engine.call import Call
from vlmfix.engine.frame import Stack
from vlmfix.engine.ledger import Ledger
from vlmfix.errors import BadInput, UnsupportedModel
from vlmfix.families import last_logits, vision_arguments
from vlmfix.families.kinds import PAD
from vlmfix.families.prompt import prompt_kinds
from vlmfix.families.surgeon import TOKEN_TYPES, compact, module_state, real_tokens
from vlmfix.families.tower import EncodedImage, Tower

if TYPE_CHECKING:
    from vlmfix.engine.session import Session

__all__ = ["Asked", "Reduction", "Shortened", "ask", "encode_reduced", "put_back", "shorten"]


@dataclass(frozen=True)
class Reduction:
    """What becomes of the placeholders of one image.

    Attributes:
        positions: (k,) int64, ascending: the placeholders that stay, newlines included.
        count: placeholders that there were.
        weights: (k, count) float32, what each of them is made of; None: itself.
        image: what the tap saw of it; None where there was none.
        size: visual tokens that stay, and that there were; newlines do not count.
    """

    positions: torch.Tensor
    count: int
    weights: torch.Tensor | None
    image: EncodedImage | None
    size: tuple[int, int]

    def apply(self, features: torch.Tensor) -> torch.Tensor:
        """(count, D) features -> (k, D)."""
        if self.weights is None:
            return features[self.positions.to(features.device)]
        weights = self.weights.to(features.device)
        return (weights @ features.float()).to(features.dtype)


@dataclass(frozen=True)
class Asked:
    """What a method keeps of the images of whole prompts.

    Attributes:
        reductions: per image, in the order of the prompts.
        owners: the prompt of each.
        placeholders: (B, L) bool, their places in the prompts.
        features: (n, D) of each image.
        output: of the encoder.
    """

    reductions: list[Reduction]
    owners: list[int]
    placeholders: torch.Tensor
    features: list[torch.Tensor]
    output: Any


@dataclass(frozen=True)
class Shortened:
    """Prompts that were cut.

    Attributes:
        kwargs: of generate() or of a forward, for the shorter prompts.
        reductions: per image, in the order of the prompts.
        placeholders: how many each prompt had.
        removed: how many columns the batch lost.
    """

    kwargs: dict[str, Any]
    reductions: list[Reduction]
    placeholders: list[int]
    removed: int


def shorten(
    session: Session,
    method: TokenMethod,
    kwargs: Mapping[str, Any],
    question: tuple[torch.Tensor, torch.Tensor] | None = None,
    prompt_length: int | None = None,
) -> Shortened | None:
    """Cut whole prompts; None if nothing goes: no image, features given, or every token kept.

    Args:
        session: of the wrapped model; its tap is in the vision tower if the method wants one.
        method: prepared.
        kwargs: of generate() or of a forward over whole prompts; `input_ids` (B, L).
        question: as `find_question` gives it, where the processor is known.
        prompt_length: where an answer begins behind the prompts; None: nothing is behind them.

    Raises:
        BadInput: videos, or placeholders that the images do not fill.
        UnsupportedModel: a model that takes no features in place of pixels.
    """
    asked = ask(session, method, kwargs, question, prompt_length)
    if asked is None:
        return None
    kept = torch.zeros(sum(one.count for one in asked.reductions), dtype=torch.bool)
    start = 0
    for reduction in asked.reductions:
        kept[start + reduction.positions.cpu()] = True
        start += reduction.count
    if bool(kept.all()):
        return None
    cut, vision = dict(kwargs), vision_arguments(session.model, kwargs)
    for name in vision:
        cut.pop(name)
    reduced = _with_features(asked.output, asked.features, asked.reductions)
    cut["mm_encoder_outputs"] = {"image": reduced}
    kept = kept.to(asked.placeholders.device)
    removed = _cut_tokens(session.model, cut, vision, asked.placeholders, kept, method)
    return Shortened(cut, asked.reductions, asked.placeholders.sum(1).tolist(), removed)


def ask(
    session: Session,
    method: TokenMethod,
    kwargs: Mapping[str, Any],
    question: tuple[torch.Tensor, torch.Tensor] | None = None,
    prompt_length: int | None = None,
) -> Asked | None:
    """Encode the images of whole prompts and ask a method what it keeps; None without pixels.

    Arguments and errors are those of `shorten`.
    """
    model: Any = session.model
    vision = vision_arguments(model, kwargs)
    if "pixel_values" not in vision and "pixel_values_videos" not in vision:
        return None
    _check(method, model, kwargs)
    ledger = _ledger(session, kwargs, question, prompt_length)
    ids = kwargs["input_ids"]
    output, features, images = _encode(session, vision)
    placeholders = torch.isin(ids, ids.new_tensor(session.info.image_token_ids))
    counts = [len(part) for part in features]
    if sum(counts) != int(placeholders.sum()):
        raise BadInput(
            f"the prompts hold {int(placeholders.sum())} image placeholders and their images make "
            f"{sum(counts)} visual tokens. Pass images and prompts as one call of the model's "
            "processor returns them."
        )
    if method.whole_pictures:
        features, images = _pictures(session, placeholders, features, images)
        counts = [len(part) for part in features]
    owners = _owners(placeholders, counts)
    questions = _questions(model, ids, ledger) if method.reads_question else None
    relevance = _relevance(session, method, kwargs, output, ledger, placeholders, counts)
    reductions = []
    numbers: dict[int, int] = {}
    for at, (owner, part) in enumerate(zip(owners, features, strict=True)):
        number = numbers[owner] = numbers.get(owner, -1) + 1
        reductions.append(
            _reduce(
                method,
                part,
                None if images is None else images[at],
                session.tower,
                None if relevance is None else relevance[at],
                part.new_empty(0, part.shape[1]).float() if questions is None else questions[owner],
                number,
            )
        )
    return Asked(reductions, owners, placeholders, features, output)


def encode_reduced(
    session: Session, vision: Mapping[str, Any], reductions: Sequence[Reduction]
) -> dict[str, Any]:
    """Encode other pixels of the same images, and cut them as the first were."""
    output, features, _ = _encode(session, vision)
    return {"mm_encoder_outputs": {"image": _with_features(output, features, reductions)}}


def _check(method: TokenMethod, model: Any, kwargs: Mapping[str, Any]) -> None:
    if kwargs.get("pixel_values_videos") is not None:
        raise BadInput(
            f"{method.name} prunes images, and this prompt holds a video. Ask about images, or run "
            "the plain model with vlmfix.using(model, None)."
        )
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        raise UnsupportedModel(
            f"{type(model).__name__} takes no encoded features in this version of transformers, so "
            f"{method.name} cannot hand over fewer of them. Use transformers 5.21 or later."
        )
    if kwargs.get("labels") is not None:
        raise BadInput(f"{method.name} cuts the prompt, so labels would no longer fit it.")


def _encode(
    session: Session, vision: Mapping[str, Any]
) -> tuple[Any, list[torch.Tensor], list[EncodedImage] | None]:
    """The encoder's output, the features (n, D) of each image, and what the tap saw of each."""
    model: Any = session.model
    with torch.no_grad():
        output = model.base_model.get_image_features(**vision, return_dict=True)
    features, images = list(output.pooler_output), session.take_images()
    if images is not None:  # SmolVLM and Idefics3 give those of all images of a prompt as one
        features = list(torch.split(torch.cat(features), [len(one.index) for one in images]))
    return output, features, images


def _ledger(
    session: Session,
    kwargs: Mapping[str, Any],
    question: tuple[torch.Tensor, torch.Tensor] | None,
    prompt_length: int | None,
) -> Ledger:
    """What every token of the whole prompts is."""
    ids = kwargs["input_ids"]
    ledger = Ledger(len(ids), ids.shape[1], ids.device)
    mask = real_tokens(ids, kwargs.get("attention_mask")).long()
    kinds = prompt_kinds(session.info, ids, 0, {**kwargs, "attention_mask": mask})
    ledger.write(0, kinds, prompt_length or ids.shape[1])
    if question is not None:
        ledger.say_question(*question)
    return ledger


def _questions(model: Any, ids: torch.Tensor, ledger: Ledger) -> list[torch.Tensor]:
    """(T, D) float32 embeddings of the question of each prompt."""
    embed = model.get_input_embeddings()
    asked = ledger.question[:, : ids.shape[1]]
    with torch.no_grad():
        return [embed(row[own]).float() for row, own in zip(ids, asked, strict=True)]


class _Enough(Exception):
    """Ends a look at a prompt once the layer that it is about has run."""


@dataclass(frozen=True, eq=False)
class _QuestionRows(Watcher):
    """Keeps, of one layer, the largest attention of question rows to each key, mean over heads."""

    question: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    rows_end: int = 0
    stop: bool = True

    name: ClassVar[str] = "question rows"
    rows: ClassVar[Literal["predicting", "text"]] = "text"

    def observe_weights(
        self, layer: int, weights: torch.Tensor, position: int, *plan: torch.Tensor
    ) -> None:
        rows = slice(position, position + weights.shape[2])
        asked = self.question[:, rows].to(weights.device)
        mean = weights.float().mean(1).masked_fill(~asked[..., None], 0.0)
        largest = mean.amax(1)
        before = self.seen.get(layer)
        self.seen[layer] = largest if before is None else torch.maximum(before, largest)
        if self.stop and rows.stop >= self.rows_end:
            raise _Enough


def _relevance(
    session: Session,
    method: TokenMethod,
    kwargs: Mapping[str, Any],
    output: Any,
    ledger: Ledger,
    placeholders: torch.Tensor,
    counts: Sequence[int],
) -> list[torch.Tensor] | None:
    """Per image, attention of the question to its tokens in the layer that the method wants."""
    layer = method.relevance_layer(session.info)
    if layer is None:
        return None
    model: Any = session.model
    length = placeholders.shape[1]
    asked = ledger.question[:, :length]
    if not bool(asked.any(1)[placeholders.any(1)].all()):
        raise BadInput(
            f"{method.name} weighs visual tokens by the question, and a prompt has no text behind "
            "its image. Put the question behind the image."
        )
    # Hooks of accelerate move weights back after each layer; an interrupted forward would not.
    stop = not any(hasattr(module, "_hf_hook") for module in model.modules())
    watcher = _QuestionRows((layer,), question=asked, rows_end=length, stop=stop)
    known = ("input_ids", "position_ids", "image_grid_thw", *TOKEN_TYPES)
    inputs = {name: kwargs[name] for name in known if kwargs.get(name) is not None}
    inputs["attention_mask"] = (ledger.kinds[:, :length] != PAD).long()
    inputs |= {"mm_encoder_outputs": {"image": output}, "use_cache": False}
    inputs |= last_logits(model, 1)
    call = Call(methods=(), prompt_length=length, rows=len(placeholders))
    looking = session.apart(Stack((watcher,), session.info), call)
    with looking, module_state(model), torch.no_grad(), suppress(_Enough):
        model(**inputs)
    return list(torch.split(watcher.seen[layer][:, :length][placeholders], list(counts)))


def _pictures(
    session: Session,
    placeholders: torch.Tensor,
    features: list[torch.Tensor],
    images: list[EncodedImage] | None,
) -> tuple[list[torch.Tensor], list[EncodedImage] | None]:
    """Features and images with the tiles of a picture joined, where they came one by one."""
    tower = session.tower
    if images is None or tower is None or tower.whole is None or tower.layout != "tiles":
        return features, images
    edges = torch.nn.functional.pad(placeholders.long(), (1, 1)).diff(dim=1)
    runs = (edges == -1).nonzero()[:, 1] - (edges == 1).nonzero()[:, 1]
    joined, pictures, at = [], [], 0
    for run in runs.tolist():
        count, held = 0, 0
        while held < run and at + count < len(features):
            held += len(features[at + count])
            count += 1
        if held != run:
            raise BadInput(
                f"{run} image placeholders in a row, but the next {count} tiles make {held} visual "
                "tokens. Pass images and prompts as one call of the processor returns them."
            )
        own = images[at : at + count]
        tiles = tuple(tile for image in own for tile in image.tiles)
        # Each of these images is one tile that fills its placeholders: run == all of its tokens.
        index = torch.arange(run, device=own[0].index.device)
        joined.append(torch.cat(features[at : at + count]))
        pictures.append(EncodedImage(tiles, index))
        at += count
    return joined, pictures


def _owners(placeholders: torch.Tensor, counts: Sequence[int]) -> list[int]:
    """The prompt of each image, by their placeholders."""
    left = placeholders.sum(1).tolist()
    owners, row = [], 0
    for count in counts:
        while row < len(left) and left[row] == 0:
            row += 1
        if row == len(left) or left[row] < count:
            raise BadInput(
                f"an image makes {count} visual tokens, which do not fit the placeholders of one "
                "prompt. Pass images and prompts as one call of the processor returns them."
            )
        left[row] -= count
        owners.append(row)
    return owners


def _reduce(
    method: TokenMethod,
    features: torch.Tensor,
    image: EncodedImage | None,
    tower: Tower | None,
    relevance: torch.Tensor | None,
    question: torch.Tensor,
    number: int,
) -> Reduction:
    """Ask a method about one image, and put the newlines back that its rows still need."""
    count = len(features)
    place = None if image is None else image.index.to(features.device)
    real = torch.arange(count, device=features.device)
    if place is not None:
        real, place = real[place >= 0], place[place >= 0]
    visual = VisualTokens(
        features=features[real],
        tiles=() if image is None else image.tiles,
        place=place,
        relevance=None if relevance is None else relevance[real],
        question=question,
        number=number,
        whole=_whole(tower, image),
    )
    budget = method.budget(len(real))
    if budget >= len(real):
        every = torch.arange(count, device=features.device)
        return Reduction(every, count, None, image, (len(real), len(real)))
    kept = _checked(method, method.keep(visual, budget), len(real), budget)
    chosen = real[kept.index.to(real.device)]
    newlines = _newlines(image, chosen, count)
    positions, order = torch.cat([chosen, newlines]).sort()
    weights = None
    if kept.weights is not None:
        full = torch.zeros(len(positions), count, device=features.device)
        full[: len(chosen), real] = kept.weights.to(full)
        full[torch.arange(len(chosen), len(positions)), newlines] = 1.0
        weights = full[order]
    return Reduction(positions, count, weights, image, (len(chosen), len(real)))


def _whole(tower: Tower | None, image: EncodedImage | None) -> int | None:
    """Which tile of an image with several is the whole picture."""
    if tower is None or image is None or len(image.tiles) == 1:
        return None
    return 0 if tower.whole == "first" else len(image.tiles) - 1


def _checked(method: TokenMethod, kept: Kept, count: int, budget: int) -> Kept:
    index = kept.index
    good = 1 <= len(index) <= budget and bool((index[1:] > index[:-1]).all())
    if not good or int(index[0]) < 0 or int(index[-1]) >= count:
        raise BadInput(
            f"{method.name} returned {len(index)} of {count} visual tokens for a budget of "
            f"{budget}: indices must ascend, without repeats, within the image."
        )
    return kept


def _newlines(image: EncodedImage | None, chosen: torch.Tensor, count: int) -> torch.Tensor:
    """The newlines (LLaVA-NeXT) of rows of which something is kept."""
    if image is None:
        return chosen.new_empty(0)
    ends = (image.index.to(chosen.device) < 0).nonzero().flatten()
    if not len(ends):
        return ends
    # A newline ends its row: the tokens between it and the one before.
    kept = torch.zeros(count, dtype=torch.bool, device=chosen.device)
    kept[chosen] = True
    so_far = kept.cumsum(0)[ends]
    tiles = image.tiles[0].rows * image.tiles[0].columns  # the view of the whole has no newlines
    before = torch.cat([kept[:tiles].sum()[None], so_far[:-1]])
    return ends[so_far > before]


def _with_features(
    output: Any, features: Sequence[torch.Tensor], reductions: Sequence[Reduction]
) -> Any:
    """The encoder's output with reduced features, in the form that the model expects."""
    counts = [one.count for one in reductions]  # pictures, of which the encoder saw the tiles

    def reduce(parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        images = torch.split(torch.cat(list(parts)), counts)
        return [one.apply(part) for one, part in zip(reductions, images, strict=True)]

    reduced = reduce(features)
    changed = copy.copy(output)
    if isinstance(output.pooler_output, torch.Tensor):
        alike = len({len(part) for part in reduced}) == 1
        # generate() copies features for beams by counting rows against placeholders; rows of one
        # token each fit the prompts of a batch whatever they keep.
        changed.pooler_output = torch.stack(reduced) if alike else torch.cat(reduced)[:, None]
    else:
        changed.pooler_output = reduced
    deep = output.get("deepstack_features") if hasattr(output, "get") else None
    if deep is not None:
        changed.deepstack_features = [reduce(level) for level in deep]
    return changed


def _cut_tokens(
    model: Any,
    cut: dict[str, Any],
    vision: Mapping[str, Any],
    placeholders: torch.Tensor,
    kept: torch.Tensor,
    method: TokenMethod,
) -> int:
    """Cut ids, mask, types and positions in place; how many columns went."""
    ids, mask = cut["input_ids"], cut.get("attention_mask")
    real = real_tokens(ids, mask)
    keep = real.clone()
    keep[placeholders] = kept
    tensors: dict[str, tuple[torch.Tensor, int]] = {"input_ids": (ids, 0)}
    for name in TOKEN_TYPES:
        if cut.get(name) is not None:
            tensors[name] = (cut[name], 0)
    positions = _positions(model, cut, vision, real, method)
    if positions is not None:
        tensors["position_ids"] = (positions, 0)
    shorter, new_mask = compact(keep, tensors)
    if positions is not None and positions.ndim == 3:
        places = shorter["position_ids"]
        text = (new_mask.cumsum(1) - 1).clamp(min=0)
        # The first axis counts tokens: with gaps the masks of transformers would see two prompts.
        shorter["position_ids"] = torch.cat([text[None], places])
        # Added to the number of real tokens: models count by the mask, without the padding.
        following = places.amax(dim=(0, 2)) + 1 - new_mask.sum(1)
        for module in model.modules():
            if "rope_deltas" in module.__dict__:
                module.rope_deltas = following[:, None]
    cut |= {**shorter, "attention_mask": new_mask}
    return int(ids.shape[1] - new_mask.shape[1])


def _positions(
    model: Any,
    cut: Mapping[str, Any],
    vision: Mapping[str, Any],
    real: torch.Tensor,
    method: TokenMethod,
) -> torch.Tensor | None:
    """Positions of the whole prompts, (3, B, L) or (B, L), to be cut; None: count what is left."""
    given: torch.Tensor | None = cut.get("position_ids")
    index = getattr(model.base_model, "get_rope_index", None)
    if index is None:
        counted = (real.long().cumsum(1) - 1).clamp(min=0)
        return counted if given is None and method.positions == "original" else given
    if given is not None:
        return given[-3:] if given.ndim == 3 else given.expand(3, *real.shape)
    offered = {**cut, **vision, "attention_mask": real.long()}
    wanted = {
        name: offered[name] for name in inspect.signature(index).parameters if name in offered
    }
    found: torch.Tensor = index(**wanted)[0]
    return found


def put_back(output: Any, ids: torch.Tensor, length: int) -> Any:
    """What generate() returned for cut prompts of `length` columns, with the prompts (B, L) whole.

    Args:
        output: the sequences, or what holds them.
        ids: what the caller gave.
        length: of the cut prompts.
    """
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    prompts = ids.repeat_interleave(len(sequences) // len(ids), 0).to(sequences.device)
    whole = torch.cat([prompts, sequences[:, length:]], dim=1)
    if isinstance(output, torch.Tensor):
        return whole
    output.sequences = whole
    return output
