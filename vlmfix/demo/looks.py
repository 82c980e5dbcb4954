"""Maps over the parts of the picture: attention behind a word, and tokens that pruning keeps."""

from __future__ import annotations

from dataclasses import dataclass
from string import punctuation

import torch
from PIL import Image

import vlmfix
from vlmfix.analysis.geometry import Box, piece_places
from vlmfix.base.method import Method
from vlmfix.chat import chat_inputs
from vlmfix.demo.asking import Pane, Question
from vlmfix.demo.engine import Engine
from vlmfix.errors import BadInput
from vlmfix.families.tower import describe_tower

__all__ = ["Look", "Part", "kept", "look"]


@dataclass(frozen=True, eq=False)
class Part:
    """A part of the picture that the vision tower got as one image, and the maps over it.

    Attributes:
        box: left, top, right, bottom in pixels of the picture.
        grids: {arm: (L, H, rows, columns)} float32, mean over the rows that wrote the word.
    """

    box: Box
    grids: dict[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Look:
    """Attention to the picture of the rows that wrote one word, plain and under a method.

    Attributes:
        word: the word, without punctuation around it.
        layers: the L layers.
        heads: number of heads, H.
        parts: the parts of the picture; a LLaVA-NeXT image has two.
        note: a caveat about the map; None without one.
    """

    word: str
    layers: tuple[int, ...]
    heads: int
    parts: list[Part]
    note: str | None = None


def look(engine: Engine, asked: Question, pane: Pane, number: int, method: Method | None) -> Look:
    """Map the attention of the rows that wrote a word, in the plain model and under a method.

    Both arms read the same answer, the pane's, so that every difference comes from the method.

    Args:
        engine: holds the model.
        asked: the question.
        pane: the pane whose answer is read.
        number: index of the word in the answer.
        method: the method whose map stands next to that of the plain model; None: no method.

    Raises:
        BadInput: no such word, or a method whose answer is not about this picture.
        UnsupportedModel: a family whose visual tokens cannot be traced to places.
    """
    words = engine.words(pane)
    if not 0 <= number < len(words):
        raise BadInput("there is no such word in the answer: click one of its words.")
    word = words[number]
    if method is not None and method.stage == "pixels":
        raise BadInput(
            f"{method.name} answers about an image that it has changed, so there is no map of "
            "its answer over this picture. Choose another method."
        )
    arms: dict[str, Method | None] = {"base": None}
    if method is not None:
        arms[method.spec()] = method
    maps = {}
    with engine.turns.turn():
        inputs = chat_inputs(engine.model, engine.processor, [asked.chat])
        ids = inputs["input_ids"]
        written = ids.new_tensor([pane.tokens])
        rows = [ids.shape[1] - 1 + token for token in word.tokens]
        for arm, one in arms.items():
            with vlmfix.using(engine.model, one):
                (maps[arm],) = vlmfix.attention_map(
                    engine.model,
                    inputs,
                    rows=rows,
                    heads="all",
                    generated=torch.cat((ids, written), dim=1),
                    processor=engine.processor,
                )
        boxes = _boxes(engine, asked.picture, len(maps["base"]))
    parts = []
    for image, box in enumerate(boxes):
        for view in range(len(maps["base"][image].views)):
            grids = {arm: own[image].grids()[view].mean(2) for arm, own in maps.items()}
            parts.append(Part(box, grids))
    first = maps["base"][0]
    return Look(
        word.text.strip(punctuation), first.layers, engine.info.num_heads, parts, _note(method)
    )


def _boxes(engine: Engine, picture: Image.Image, images: int) -> list[Box]:
    """The boxes in the picture of what the vision tower gets as one image each."""
    if describe_tower(engine.model, engine.info).layout == "tiles":
        return piece_places(engine.processor, *picture.size)
    return [(0, 0, *picture.size)] * images


def kept(engine: Engine, asked: Question, method: Method) -> list[tuple[Box, torch.Tensor]]:
    """Find the visual tokens that a pruning method keeps.

    Returns:
        Parts of the picture, each with (rows, columns) bool, True where a token is kept.

    Raises:
        BadInput: a method that does not prune.
        UnsupportedModel: a family whose visual tokens cannot be traced to places.
    """
    with engine.turns.turn():
        inputs = chat_inputs(engine.model, engine.processor, [asked.chat])
        (found,) = vlmfix.visual_tokens(engine.model, inputs, method, processor=engine.processor)
        masks = [mask for kept in found for mask in kept.masks()]
        boxes = _boxes(engine, asked.picture, len(masks))
    if len(boxes) != len(masks):  # two views of one image
        boxes = boxes[:1] * len(masks)
    return list(zip(boxes, masks, strict=True))


def _note(method: Method | None) -> str | None:
    """The caveat of a method's map; None without one."""
    if method is not None and method.stage == "tokens":
        return f"The map shows the whole prompt; {method.name} answered about a shorter one."
    if method is not None and method.stage == "logits":
        return f"{method.name} acts on logits and changes no attention: the maps are the same."
    return None
