"""ROPE's question about the bundled images: the five largest objects of each, in random order.

As in ROPE (Chen et al. 2024, arXiv 2407.06192), boxes that overlap a larger one are left out, the
five largest of the others are boxed and labelled, and their order is shuffled, so that position
does not tell size. Two of its three distributions of classes are there: five different classes
(heterogenous), and fewer than five (mixed); no image shows five of a kind. The prompt lists all
classes of EmojiCOCO. The bundled model was not taught to answer so: the task shows the harness at
work, and serves models that were.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from random import Random
from typing import TYPE_CHECKING

from vlmfix.emoji import evaluation_split
from vlmfix.errors import BadInput
from vlmfix.evals.inputs.coco import Box, CocoData
from vlmfix.evals.rope.data import OBJECTS, RopeEntry, RopeObject, draw_boxes

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["EmojiRope"]

SEED = 2407
#: Largest intersection over union with a larger box.
OVERLAP = 0.1
#: The pictures are 112 pixels wide; labels that can be read would hide what they name.
SCALE = 4


class EmojiRope:
    """ROPE's entries about the bundled evaluation images; a `tasks.DataSource`.

    Args:
        data: COCO-format data; None: the bundled images.

    Attributes:
        entries: the images; boxes are those of the picture that `image` gives.
        prompts: None: those of `rope.PROMPTS`.

    Raises:
        BadInput: no image has five objects that stand apart.
    """

    name = "emoji (five boxed objects)"
    prompts: dict[str, str] | None = None

    def __init__(self, data: CocoData | None = None) -> None:
        self._data = CocoData(evaluation_split()) if data is None else data
        classes = tuple(self._data.categories.values())
        self.entries: list[RopeEntry] = []
        for image, picture in self._data.files.items():
            chosen = _five_largest(self._data.boxes[image])
            if len(chosen) < OBJECTS:
                continue
            Random(f"{SEED}/{image}").shuffle(chosen)
            kinds = len({box.name for box in chosen})
            split = "emoji_heterogenous" if kinds == OBJECTS else "emoji_mixed"
            objects = tuple(RopeObject(box.name, _corners(box)) for box in chosen)
            self.entries.append(RopeEntry(split, f"boxed/{picture}", picture, objects, classes))
        if not self.entries:
            raise BadInput(f"rope: no image of {self._data.source} has {OBJECTS} objects apart")
        # Split by split, as the results list them.
        self.entries.sort(key=lambda entry: entry.split)

    @property
    def sha256(self) -> str:
        """Fingerprint of the annotated images, which decide questions and truth."""
        return self._data.sha256

    @cached_property
    def _of_image(self) -> dict[str, RopeEntry]:
        return {entry.image: entry for entry in self.entries}

    def require_images(self, names: Sequence[str]) -> None:
        """Check that the pictures are there; raises BadInput that names the first missing."""
        self._data.require_images([self._of_image[name].picture for name in names])

    def image(self, name: str) -> Image:
        """The picture of an entry, four times as wide, with its boxes.

        Raises:
            BadInput: it cannot be read.
        """
        entry = self._of_image[name]
        picture = self._data.image(entry.picture)
        larger = picture.resize((picture.width * SCALE, picture.height * SCALE))
        return draw_boxes(larger, [thing.box for thing in entry.objects])


def _five_largest(boxes: Sequence[Box]) -> list[Box]:
    kept: list[Box] = []
    for box in sorted(boxes, key=lambda box: -box.area):
        if all(_intersection_over_union(box, other) <= OVERLAP for other in kept):
            kept.append(box)
    return kept[:OBJECTS]


def _corners(box: Box) -> tuple[float, float, float, float]:
    right, bottom = box.left + box.width, box.top + box.height
    return box.left * SCALE, box.top * SCALE, right * SCALE, bottom * SCALE


def _intersection_over_union(a: Box, b: Box) -> float:
    width = min(a.left + a.width, b.left + b.width) - max(a.left, b.left)
    height = min(a.top + a.height, b.top + b.height) - max(a.top, b.top)
    common = max(0.0, width) * max(0.0, height)
    return common / (a.area + b.area - common)
