"""What a method keeps of the images of whole prompts: they are encoded, and the method is asked."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from vlmfix.base.observer import Observer, Rows, SeenRows
from vlmfix.base.pruning import Kept, TokenMethod, VisualTokens
from vlmfix.engine.call import Call
from vlmfix.engine.encoded import Reduction
from vlmfix.engine.hooks import Host
from vlmfix.engine.ledger import Ledger
from vlmfix.engine.observe import internal_pass
from vlmfix.errors import BadInput
from vlmfix.families import last_logits, pixel_names, vision_arguments
from vlmfix.families.kinds import PAD
from vlmfix.families.prompt import prompt_kinds
from vlmfix.families.surgeon import TOKEN_TYPES, real_tokens
from vlmfix.families.tower import EncodedImage, Tower

__all__ = ["Asked", "ask", "encode_reduced", "with_features"]


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


def ask(
    host: Host,
    method: TokenMethod,
    kwargs: Mapping[str, Any],
    question: tuple[torch.Tensor, torch.Tensor] | None = None,
    prompt_length: int | None = None,
) -> Asked | None:
    """Encode the images of whole prompts and ask a method what it keeps; None without pixels.

    Arguments and errors are those of `pruning.shorten`.
    """
    model: Any = host.model
    vision = vision_arguments(model, kwargs)
    if not pixel_names(vision):
        return None
    _check(method, kwargs)
    ledger = _ledger(host, kwargs, question, prompt_length)
    ids = kwargs["input_ids"]
    output, features, images = _encode(host, vision)
    placeholders = torch.isin(ids, ids.new_tensor(host.info.image_token_ids))
    counts = [len(part) for part in features]
    bad = [at for at, part in enumerate(features) if bool(part.isnan().any())]
    if bad:
        raise BadInput(
            f"{method.name}: features of image {bad[0]} (counted from 0) are NaN, so nothing says "
            "which tokens matter. Look for NaN in pixel_values, or overflow in half precision."
        )
    if sum(counts) != int(placeholders.sum()):
        raise BadInput(
            f"the prompts hold {int(placeholders.sum())} image placeholders and their images make "
            f"{sum(counts)} visual tokens. Pass images and prompts as one call of the model's "
            "processor returns them."
        )
    if method.whole_pictures:
        features, images = _pictures(host, placeholders, features, images)
    if images is None and set(counts) == {1}:  # Inkling hands over every token by itself
        features = list(torch.split(torch.cat(features), _runs(placeholders)))
    counts = [len(part) for part in features]
    owners = _owners(placeholders, counts)
    questions = _questions(model, ids, ledger) if method.reads_question else None
    relevance = _relevance(host, method, kwargs, output, ledger, placeholders, counts)
    reductions = []
    numbers: dict[int, int] = {}
    for at, (owner, part) in enumerate(zip(owners, features, strict=True)):
        number = numbers[owner] = numbers.get(owner, -1) + 1
        reductions.append(
            _reduce(
                method,
                part,
                None if images is None else images[at],
                host.tower,
                None if relevance is None else relevance[at],
                part.new_empty(0, part.shape[1]).float() if questions is None else questions[owner],
                number,
            )
        )
    return Asked(reductions, owners, placeholders, features, output)


def encode_reduced(
    host: Host, vision: Mapping[str, Any], reductions: Sequence[Reduction]
) -> dict[str, Any]:
    """Encode other pixels of the same images, and cut them as the first were."""
    output, features, _ = _encode(host, vision)
    return {"mm_encoder_outputs": {"image": with_features(output, features, reductions)}}


def _check(method: TokenMethod, kwargs: Mapping[str, Any]) -> None:
    if kwargs.get("pixel_values_videos") is not None:
        raise BadInput(
            f"{method.name} prunes images, and this prompt holds a video. Ask about images, or run "
            "the plain model with vlmfix.using(model, None)."
        )
    if kwargs.get("labels") is not None:
        raise BadInput(f"{method.name} cuts the prompt, so labels would no longer fit it.")


def _encode(
    host: Host, vision: Mapping[str, Any]
) -> tuple[Any, list[torch.Tensor], list[EncodedImage] | None]:
    """The encoder's output, the features (n, D) of each image, and what was recorded of it."""
    model: Any = host.model
    with torch.no_grad():
        output = model.base_model.get_image_features(**vision, return_dict=True)
    features, images = _features(model, output), host.take_images()
    if images is not None:  # SmolVLM and Idefics3 give those of all images of a prompt as one
        features = list(torch.split(torch.cat(features), [len(one.index) for one in images]))
    return output, features, images


def _features(model: Any, output: Any) -> list[torch.Tensor]:
    """(n, D) of each image, as the language model will get them."""
    if output.get("pooler_output") is not None:
        return list(output.pooler_output)
    # Llama 4 projects them behind its encoder, each by itself; Fuyu has projected them already.
    project = getattr(model.base_model, "multi_modal_projector", None)
    hidden = output.last_hidden_state
    with torch.no_grad():
        return list(hidden if project is None else project(hidden))


def _ledger(
    host: Host,
    kwargs: Mapping[str, Any],
    question: tuple[torch.Tensor, torch.Tensor] | None,
    prompt_length: int | None,
) -> Ledger:
    """What every token of the whole prompts is."""
    ids = kwargs["input_ids"]
    ledger = Ledger(len(ids), ids.shape[1], ids.device)
    mask = real_tokens(ids, kwargs.get("attention_mask")).long()
    kinds = prompt_kinds(host.info, ids, 0, {**kwargs, "attention_mask": mask})
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
class _QuestionRows(Observer):
    """Keeps, of one layer, the largest attention of question rows to each key, mean over heads."""

    question: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    rows_end: int = 0
    stop: bool = True

    rows: ClassVar[Rows] = "text"

    def see_weights(self, rows: SeenRows) -> None:
        weights, layer = rows.weights, rows.layer
        here = slice(rows.position, rows.position + weights.shape[2])
        asked = self.question[:, here].to(weights.device)
        mean = weights.float().mean(1).masked_fill(~asked[..., None], 0.0)
        largest = mean.amax(1)
        before = self.seen.get(layer)
        self.seen[layer] = largest if before is None else torch.maximum(before, largest)
        if self.stop and here.stop >= self.rows_end:
            raise _Enough


def _relevance(
    host: Host,
    method: TokenMethod,
    kwargs: Mapping[str, Any],
    output: Any,
    ledger: Ledger,
    placeholders: torch.Tensor,
    counts: Sequence[int],
) -> list[torch.Tensor] | None:
    """Per image, attention of the question to its tokens in the layer that the method wants."""
    layer = method.relevance_layer(host.info)
    if layer is None:
        return None
    model: Any = host.model
    length = placeholders.shape[1]
    # A question before the image sees none of it.
    behind = placeholders.flip(1).cumsum(1).flip(1) == 0
    asked = ledger.question[:, :length] & behind
    if not bool(asked.any(1)[placeholders.any(1)].all()):
        raise BadInput(
            f"{method.name} weighs visual tokens by the question, and that of a prompt has no "
            "text behind its image. Put the question behind the image."
        )
    # Hooks of accelerate move weights back after each layer; an interrupted forward would not.
    stop = not any(hasattr(module, "_hf_hook") for module in model.modules())
    observer = _QuestionRows((layer,), question=asked, rows_end=length, stop=stop)
    known = ("input_ids", "position_ids", "image_grid_thw", *TOKEN_TYPES)
    inputs = {name: kwargs[name] for name in known if kwargs.get(name) is not None}
    inputs["attention_mask"] = (ledger.kinds[:, :length] != PAD).long()
    inputs |= {"mm_encoder_outputs": {"image": output}, "use_cache": False}
    inputs |= last_logits(model, 1)
    call = Call(prompt_length=length, rows=len(placeholders))
    with suppress(_Enough):
        internal_pass(host, inputs, call=call, observers=[observer])
    return list(torch.split(observer.seen[layer][:, :length][placeholders], list(counts)))


def _pictures(
    host: Host,
    placeholders: torch.Tensor,
    features: list[torch.Tensor],
    images: list[EncodedImage] | None,
) -> tuple[list[torch.Tensor], list[EncodedImage] | None]:
    """Features and images with the tiles of a picture joined, where they came one by one."""
    tower = host.tower
    if images is None or tower is None or tower.whole is None or tower.layout != "tiles":
        return features, images
    joined, pictures, at = [], [], 0
    for run in _runs(placeholders):
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


def _runs(placeholders: torch.Tensor) -> list[int]:
    """How long the runs of placeholders in (B, L) bool are."""
    edges = torch.nn.functional.pad(placeholders.long(), (1, 1)).diff(dim=1)
    runs = (edges == -1).nonzero()[:, 1] - (edges == 1).nonzero()[:, 1]
    found: list[int] = runs.tolist()
    return found


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
    if place is not None and not method.counts_newlines():
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
    beside = None if method.counts_newlines() else image
    newlines = _newlines(beside, chosen, count)
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
    tiles = image.tiles[0].rows * image.tiles[0].columns
    first = tiles if int(ends[0]) >= tiles else 0  # the view of the whole has no newlines
    before = torch.cat([kept[:first].sum()[None], so_far[:-1]])
    # A mark in front of an image or behind it (HunYuan) ends no row and stays.
    marks = ends.diff(prepend=ends.new_tensor([first - 1])) == 1
    return ends[(so_far > before) | marks]


def with_features(
    output: Any, features: Sequence[torch.Tensor], reductions: Sequence[Reduction]
) -> Any:
    """The encoder's output with reduced features, in the form that the model expects."""
    counts = [one.count for one in reductions]  # pictures, of which the encoder saw the tiles

    def reduce(parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        images = torch.split(torch.cat(list(parts)), counts)
        return [one.apply(part) for one, part in zip(reductions, images, strict=True)]

    name = "last_hidden_state" if output.get("pooler_output") is None else "pooler_output"
    whole = output[name]
    reduced = reduce(features if name == "pooler_output" else list(whole))
    changed = copy.copy(output)
    setattr(changed, name, reduced)
    if isinstance(whole, torch.Tensor):
        alike = len({len(part) for part in reduced}) == 1
        # generate() copies features for beams by counting rows against placeholders; rows of one
        # token each fit the prompts of a batch that keep different numbers.
        setattr(changed, name, torch.stack(reduced) if alike else torch.cat(reduced)[:, None])
    deep = output.get("deepstack_features") if hasattr(output, "get") else None
    if deep is not None:
        changed.deepstack_features = [reduce(level) for level in deep]
    return changed
