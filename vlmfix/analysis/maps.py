"""Attention of rows of a prompt, or of an answer, to each visual token, as maps.

An internal pass runs prompt and answer once more under an observer, with the methods of a wrapped
model: the maps show the rows after their edits. It needs neither eager attention nor full attention
matrices. Where a visual token stands in its image follows from the inputs
and the family's layout (families/tower.py), so the vision tower is not read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from vlmfix.base.attention import AttentionMethod
from vlmfix.base.observer import Observer, Rows, SeenRows
from vlmfix.chat import end_tokens
from vlmfix.engine.call import Call
from vlmfix.engine.ledger import Ledger
from vlmfix.engine.observe import internal_pass
from vlmfix.engine.stages import make_stack
from vlmfix.errors import BadInput, UnsupportedModel
from vlmfix.families import ModelInfo, last_logits, pixel_names
from vlmfix.families.kinds import PAD, TEXT, VIDEO
from vlmfix.families.prompt import prompt_kinds
from vlmfix.families.question import find_question
from vlmfix.families.surgeon import real_tokens
from vlmfix.families.tower import (
    Tower,
    describe_tower,
    grid_index,
    grid_shapes,
    packed_index,
    tile_shape,
)
from vlmfix.wrapper import session_of

__all__ = [
    "AttentionMap",
    "Placed",
    "RowKeeper",
    "attention_map",
    "maps_of",
    "placed_images",
    "traceable_tower",
]

#: (tokens, views) of one image, see `AttentionMap.views`.
Placed = tuple[int, tuple[torch.Tensor, ...]]


@dataclass(frozen=True, eq=False)
class AttentionMap:
    """The attention of some rows to one image.

    Attributes:
        weights: (L, H, R, n) float32 on the CPU, softmax weights from R rows to the n placeholders
            of the image, in L layers and H heads (H = 1 for the mean over heads). Over all keys of
            a row, and not over these alone, weights sum to 1.
        layers: the L layers.
        heads: the H heads; None for the mean over all of them.
        rows: the R rows, as positions in the (padded) prompt and answer.
        views: each (rows, columns) int64, the placeholder at each place. Families have one view
            per image, LLaVA-NeXT two: the whole image in one tile, and the image in joined tiles.
            A view covers the whole image that the tower was given. Newlines are in no view.
    """

    weights: torch.Tensor
    layers: tuple[int, ...]
    heads: tuple[int, ...] | None
    rows: tuple[int, ...]
    views: tuple[torch.Tensor, ...]

    def grids(self) -> tuple[torch.Tensor, ...]:
        """The maps: (L, H, R, rows, columns) for each view; average over axes you do not need."""
        return tuple(self.weights[..., view] for view in self.views)


def attention_map(
    model: Any,
    inputs: Mapping[str, Any],
    *,
    rows: Literal["last", "question", "answer"] | Sequence[int] = "last",
    layers: Sequence[int] | None = None,
    heads: Literal["mean", "all"] | int = "mean",
    generated: torch.Tensor | None = None,
    processor: Any = None,
) -> list[list[AttentionMap]]:
    """Read the attention of rows to the visual tokens, for each image of each prompt.

    Runs one forward, an internal pass: it changes neither outputs of the model nor `last_call`. On
    a wrapped model the stack of this thread runs (`vlmfix.using`), and rows are read after its
    edits. Methods that scale heads change no row.

    Args:
        model: a supported VLM in eval mode, plain or wrapped.
        inputs: arguments of its generate() for whole prompts, padded on either side.
        rows: "last": the last prompt token, which predicts the first token of the answer.
            "question": the tokens of the user's question (`question.find_question`), or without a
            processor all text after the last image. "answer": the rows that predicted the tokens
            of the answer, in their order, the first being the last prompt token. Or positions in
            the padded prompt and answer, negative from the end, the same for each prompt: text
            after an image, or generated.
        layers: indices of decoder layers with attention; None: all of them.
        heads: "mean" over heads, "all" of them, or the index of one.
        generated: (B, L + T) ids that generate() returned for these inputs: one sequence per
            prompt, prompt included. An answer ends with the first end token of the generation
            configuration.
        processor: the model's processor or tokenizer, which tells the question from the template.

    Returns:
        A list per prompt of one map per image, in order; prompts without an image have none. An
        image is a unit of the vision tower: crops that a processor returns as separate images
        (InternVL, SmolVLM, Idefics3, Gemma 3 with pan and scan) have a map each.

    Raises:
        BadInput: rows, layers, heads or inputs that cannot be used; videos.
        UnsupportedModel: a family whose visual tokens cannot be traced to places.
        StateError: the model is in training mode.
    """
    ids = inputs.get("input_ids")
    if not isinstance(ids, torch.Tensor) or inputs.get("past_key_values") is not None:
        raise BadInput(
            "attention_map reads whole prompts: pass input_ids (B, L), and no past_key_values."
        )
    with session_of(model) as session:
        info = session.host.info
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        chosen_layers = _layers(info, layers)
        chosen_heads = _heads(info, chosen_layers, heads)
        ledger = _ledger(info, inputs, ids)
        question = None
        if processor is not None:
            question = find_question(processor, info, ids)
            ledger.say_question(*question)
        full, lengths = _with_answers(model, info, inputs, generated)
        chosen_rows = _rows(ledger, rows, lengths, full["input_ids"].shape[1])
        visual = ledger.visual()[:, : full["input_ids"].shape[1]]
        images = placed_images(traceable_tower(model, info), inputs, visual.sum(1).tolist())
        keeper = RowKeeper(
            chosen_layers, wanted=tuple(chosen_rows), visual=visual.cpu(), heads=chosen_heads
        )
        call = Call(prompt_length=ids.shape[1], rows=len(ids), question=question)
        editing = [x for x in session.stack.methods if isinstance(x, AttentionMethod)]
        inputs = {**full, "use_cache": False, **last_logits(model, 1)}
        stack = make_stack(editing, info)
        internal_pass(session.host, inputs, stack=stack, call=call, observers=[keeper])
    return [
        list(maps_of(keeper, sample, own, chosen_layers, chosen_heads))
        for sample, own in enumerate(images)
    ]


@dataclass(frozen=True, eq=False)
class RowKeeper(Observer):
    """Keeps the weights of wanted rows on visual keys.

    Attributes:
        wanted: per sample, positions of its rows.
        visual: (B, K) bool.
        heads: the heads to keep; None: their mean.
        kept: {(layer, sample): (H, rows, n) per piece of the prompt}, rows ascending.
    """

    wanted: tuple[tuple[int, ...], ...] = ()
    visual: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.bool))
    heads: tuple[int, ...] | None = None
    kept: dict[tuple[int, int], list[torch.Tensor]] = field(default_factory=dict)

    rows: ClassVar[Rows] = "text"

    def see_weights(self, rows: SeenRows) -> None:
        layer, weights, position = rows.layer, rows.weights, rows.position
        # Pieces overlap by their first row, which the text rule never selects by itself.
        seen = range(position + 1, position + weights.shape[2])
        for sample, wanted in enumerate(self.wanted):
            here = [row - position for row in sorted(set(wanted)) if row in seen]
            if here:
                keys = self.visual[sample].nonzero().flatten().to(weights.device)
                part = weights[sample][:, here][..., keys]
                part = part.mean(0, keepdim=True) if self.heads is None else part[list(self.heads)]
                self.kept.setdefault((layer, sample), []).append(part.float().cpu())


def maps_of(
    keeper: RowKeeper,
    sample: int,
    images: Sequence[Placed],
    layers: tuple[int, ...],
    heads: tuple[int, ...] | None,
) -> Iterator[AttentionMap]:
    """The maps of one prompt."""
    if not images:
        return
    asked = keeper.wanted[sample]
    ascending = sorted(set(asked))
    order = [ascending.index(row) for row in asked]
    kept = [torch.cat(keeper.kept[layer, sample], dim=1)[:, order] for layer in layers]
    sizes = [tokens for tokens, _ in images]
    for weights, (_, views) in zip(
        torch.split(torch.stack(kept), sizes, dim=-1), images, strict=True
    ):
        yield AttentionMap(weights.contiguous(), layers, heads, asked, views)


# -- what is asked for -----------------------------------------------------------------------------


def _layers(info: ModelInfo, layers: Sequence[int] | None) -> tuple[int, ...]:
    known = tuple(sorted(info.attention))
    if layers is None:
        return known
    if not layers or not set(layers) <= set(known):
        raise BadInput(
            f"layers={list(layers)}: give layers with attention of this model, from 0: "
            f"{list(known)}."
        )
    return tuple(layers)


def _heads(
    info: ModelInfo, layers: Sequence[int], heads: Literal["mean", "all"] | int
) -> tuple[int, ...] | None:
    if heads == "mean":
        return None
    counts = {info.heads_of(layer) for layer in layers}
    if heads == "all" and len(counts) == 1:
        return tuple(range(*counts))
    if isinstance(heads, str) or not 0 <= heads < min(counts):
        differ = f" ('all': of layers alike; these have {sorted(counts)} heads)"
        raise BadInput(
            f"heads={heads!r}: give 'mean', 'all' or the index of one, from 0 to "
            f"{min(counts) - 1}{differ if len(counts) > 1 else ''}."
        )
    return (heads,)


def _ledger(info: ModelInfo, inputs: Mapping[str, Any], ids: torch.Tensor) -> Ledger:
    """The kind of each position of the prompts."""
    kinds = prompt_kinds(info, ids, 0, dict(inputs))
    if bool((kinds == VIDEO).any()):
        raise BadInput(
            "the prompt holds a video, whose tokens are no map over one image. Pass its frames as "
            "images."
        )
    ledger = Ledger(len(ids), ids.shape[1], ids.device)
    ledger.write(0, kinds, ids.shape[1])
    if not bool(ledger.visual().any()):
        raise BadInput(
            "no prompt has an image: pass pixel values, and input_ids with the placeholders that "
            "the model's processor writes."
        )
    return ledger


def _with_answers(
    model: Any, info: ModelInfo, inputs: Mapping[str, Any], generated: torch.Tensor | None
) -> tuple[dict[str, Any], list[int] | None]:
    """Arguments of a forward over prompts and answers, and the length of each answer."""
    ids = inputs["input_ids"]
    batch, length = ids.shape
    if generated is None:
        return dict(inputs), None
    new = generated.shape[-1] - length
    prompts = generated[..., :length]
    if new < 1 or prompts.shape != ids.shape or not bool((prompts == ids).all()):
        raise BadInput(
            f"generated has shape {tuple(generated.shape)}: give one sequence per prompt of "
            f"input_ids {tuple(ids.shape)}, the prompt first, as generate() returns it without "
            "num_return_sequences."
        )
    ends = torch.tensor(sorted(end_tokens(model, {})), device=ids.device, dtype=ids.dtype)
    ended = torch.isin(generated[:, length:], ends).cumsum(1)
    # Up to the first end token, with it.
    real = torch.nn.functional.pad(ended[:, :-1], (1, 0)) == 0
    prompt = real_tokens(ids, inputs.get("attention_mask"))
    full = {**inputs, "input_ids": generated}
    full["attention_mask"] = torch.cat((prompt, real), dim=1).long()
    # PaliGemma's types: 0 is the prefix, which attends in both directions, 1 the causal rest.
    causal = int(info.sees_whole_prompt)
    for name, value in (("token_type_ids", causal), ("mm_token_type_ids", 0)):
        if inputs.get(name) is not None:
            full[name] = torch.nn.functional.pad(inputs[name], (0, new), value=value)
    return full, real.sum(1).tolist()


def _rows(
    ledger: Ledger,
    rows: Literal["last", "question", "answer"] | Sequence[int],
    lengths: list[int] | None,
    width: int,
) -> list[tuple[int, ...]]:
    """Per prompt, the positions of its rows; none for a prompt without an image."""
    length = ledger.prompt_length
    visual = ledger.visual()[:, :length]
    behind = (ledger.kinds[:, :length] == TEXT) & (visual.cumsum(1) > 0)
    with_image = visual.any(1).tolist()
    last = ledger.last_prompt.tolist()
    found: list[tuple[int, ...]] = []
    for sample, has_image in enumerate(with_image):
        answer = lengths[sample] if lengths else 0
        allowed = {*behind[sample].nonzero().flatten().tolist(), *range(length, length + answer)}
        if not has_image:
            found.append(())
            continue
        if rows == "last":
            asked = [last[sample]]
        elif rows == "question":
            asked = ledger.question[sample].nonzero().flatten().tolist()
        elif rows == "answer":
            if not answer:
                raise BadInput("rows='answer' needs generated=, the ids that generate() returned.")
            asked = [last[sample], *range(length, length + answer - 1)]
        elif isinstance(rows, (str, int)):
            raise BadInput(
                f"rows={rows!r}: give 'last', 'question', 'answer' or a list of positions."
            )
        else:
            asked = [row + width if row < 0 else row for row in rows]
        wrong = [row for row in asked if row not in allowed]
        if wrong or not asked:
            raise BadInput(_no_row(ledger, rows, sample, wrong, width))
        found.append(tuple(asked))
    return found


def _no_row(ledger: Ledger, rows: Any, sample: int, wrong: list[int], width: int) -> str:
    """Why the rows of a prompt cannot be read."""
    way_out = "Give rows of text after an image, or of an answer with generated=."
    if not wrong:
        return f"rows={rows!r} names no row of prompt {sample}: no such text follows its image."
    row = wrong[0]
    if not 0 <= row < width:
        return f"row {row} is outside of prompt {sample}, which is {width} wide. {way_out}"
    kind = int(ledger.kinds[sample, row]) if row < ledger.prompt_length else PAD
    what = {PAD: "padding", TEXT: "text before any image"}.get(kind, "a visual token")
    return f"row {row} of prompt {sample} is {what}. {way_out}"


# -- where the tokens are --------------------------------------------------------------------------


def traceable_tower(model: Any, info: ModelInfo) -> Tower:
    try:
        return describe_tower(model, info)
    except UnsupportedModel as error:
        raise UnsupportedModel(f"no map can be drawn over its images: {error}") from error


def placed_images(tower: Tower, inputs: Mapping[str, Any], counts: list[int]) -> list[list[Placed]]:
    """The places of the visual tokens of whole prompts in their images.

    Args:
        tower: the vision tower of the model.
        inputs: arguments of its generate().
        counts: image placeholders of each prompt.

    Returns:
        A list per prompt of the placeholders and the views of each image.

    Raises:
        BadInput: inputs without sizes of images, or placeholders that the images do not fill.
    """
    names = {"packed": "image_sizes", "patches": tower.grid, "sized": "image_sizes"}
    missing = [] if pixel_names(inputs) else ["pixel_values"]
    if tower.layout in names and inputs.get(names[tower.layout]) is None:
        missing.append(names[tower.layout])
    if missing:
        raise BadInput(
            f"the inputs lack {', '.join(missing)}, which tells the place of a visual token. Pass "
            "what the model's processor returns."
        )
    images = iter(_shapes(tower, inputs, sum(counts)))
    found: list[list[Placed]] = []
    for sample, count in enumerate(counts):
        own: list[Placed] = []
        while (left := count - sum(tokens for tokens, _ in own)) > 0:
            image = next(images, None)
            if image is None or image[0] > left:
                raise BadInput(
                    f"prompt {sample} has {count} placeholders, which its images do not fill. Pass "
                    "images and prompts as one call of the model's processor returns them."
                )
            own.append(image)
        found.append(own)
    return found


def _shapes(tower: Tower, inputs: Mapping[str, Any], total: int) -> Iterator[Placed]:
    """The images of a batch, in order."""
    if tower.layout in ("patches", "sized", "placed"):
        for rows, columns in grid_shapes(tower, inputs):
            index = grid_index(tower, rows, columns)
            places = (index >= 0).nonzero().view(rows, columns)
            yield len(index), (places,)
        return
    height, width = inputs[pixel_names(inputs)[0]].shape[-2:]
    rows, columns = tile_shape(tower, height, width)
    tokens = rows * columns
    if tower.layout == "tiles":
        # Some families pad with empty images, so the number comes from the placeholders.
        for _ in range(total // tokens):
            yield _whole(rows, columns)
        return
    for size in inputs["image_sizes"]:
        tiles, index = packed_index(tower, size, tokens)
        views = [torch.arange(tokens).view(rows, columns)]
        if tiles > 1:  # then lines of the joined tiles, each with a newline at its end
            line = int((index[tokens:] == -1).nonzero()[0]) + 1
            places = torch.arange(tokens, len(index)).view(-1, line)
            views.append(places[:, :-1])
        yield len(index), tuple(views)


def _whole(rows: int, columns: int) -> Placed:
    return rows * columns, (torch.arange(rows * columns).view(rows, columns),)
