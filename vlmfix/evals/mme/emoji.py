"""Questions after the manner of MME about the bundled images: existence, count, position, colour.

As in MME's hallucination subset (Fu et al. 2023, arXiv 2306.13394), each of four subsets has 30
images with a question whose answer is yes and one whose answer is no. What is true comes from the
annotations of EmojiCOCO, and colours from its sprites (`emoji.colours`). The scores compare arms
with each other, and with no published figure.

The bundled model was taught to answer one question, "Is there a dog in the image?". Count, position
and colour show what it does with questions that it does not know.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from random import Random
from typing import TYPE_CHECKING

from vlmfix.emoji import evaluation_split
from vlmfix.emoji.catalogue import NAMES
from vlmfix.emoji.colours import absent_colours, colours_of_sprites
from vlmfix.errors import BadInput
from vlmfix.evals.inputs.coco import Box, CocoData
from vlmfix.evals.mme.data import SUBSETS, MmeQuestion

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["IMAGES_PER_SUBSET", "EmojiMme"]

IMAGES_PER_SUBSET = 30
SEED = 2306
_ENDING = " Please answer yes or no."
_PLURALS = {"person": "people", "knife": "knives", "sheep": "sheep", "mouse": "mice"}
_UNCOUNTED = ("skis", "scissors", "broccoli")

#: The question whose answer is yes, then the one whose answer is no; None: nothing to ask here.
_Pair = tuple[str, str] | None


class EmojiMme:
    """MME-like questions about the bundled evaluation images; a `tasks.DataSource`.

    Args:
        data: EmojiCOCO; None: the bundled images.

    Raises:
        BadInput: too few images for one of the subsets.
    """

    name = "emoji (questions after the manner of MME)"

    def __init__(self, data: CocoData | None = None) -> None:
        self._data = CocoData(evaluation_split()) if data is None else data

    @property
    def sha256(self) -> str:
        """Fingerprint of the annotated images, which decide questions and truth."""
        return self._data.sha256

    @cached_property
    def questions(self) -> list[MmeQuestion]:
        """A true and a false one per image, 30 images per subset, no image in two subsets."""
        free = sorted(self._data.files)
        asked = []
        for subset, ask in zip(SUBSETS, (_existence, _count, _position, _colour), strict=True):
            random = Random(f"{SEED}/{subset}")
            pairs = dict(_drawn(self._data, free, random, ask))
            if len(pairs) < IMAGES_PER_SUBSET:
                raise BadInput(
                    f"mme: {self._data.source} has {len(pairs)} images to ask about {subset}, and "
                    f"{IMAGES_PER_SUBSET} are needed"
                )
            free = [image for image in free if image not in pairs]
            for image, texts in pairs.items():
                name = f"{subset}/{self._data.files[image]}"
                for text, label in zip(texts, ("yes", "no"), strict=True):
                    asked.append(MmeQuestion(subset, name, text + _ENDING, label))
        return asked

    def require_images(self, names: Sequence[str]) -> None:
        """Check that the pictures are there; raises BadInput that names the first missing."""
        self._data.require_images([_picture(name) for name in names])

    def image(self, name: str) -> Image:
        """The picture of that name, in RGB; raises BadInput if it cannot be read."""
        return self._data.image(_picture(name))


def _picture(name: str) -> str:
    return name.rpartition("/")[2]


def _drawn(
    data: CocoData,
    images: Sequence[int],
    random: Random,
    ask: Callable[[Random, list[Box], bool], _Pair],
) -> Iterator[tuple[int, tuple[str, str]]]:
    """Images in random order with their questions, until there are enough.

    Every second time the wordings change places, so that none is true more often than false.
    """
    found = 0
    for image in random.sample(images, len(images)):
        pair = ask(random, data.boxes[image], found % 2 == 1)
        if pair is not None:
            yield image, pair
            found += 1
        if found == IMAGES_PER_SUBSET:
            return


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _existence(random: Random, boxes: list[Box], other: bool) -> _Pair:
    present = [box.name for box in boxes]
    there, absent = random.choice(present), random.choice([n for n in NAMES if n not in present])
    return (
        f"Is there {_article(there)} in this image?",
        f"Is there {_article(absent)} in this image?",
    )


def _count(random: Random, boxes: list[Box], other: bool) -> _Pair:
    """One of a kind, or two of it."""
    counts = Counter(box.name for box in boxes if box.name not in _UNCOUNTED)
    wanted = 2 if other else 1
    names = [name for name, number in counts.items() if number == wanted]
    if not names:
        return None
    name = random.choice(names)
    one = f"Is there only one {name} in this image?"
    two = f"Are there two {_plural(name)} in this image?"
    return (two, one) if other else (one, two)


def _plural(name: str) -> str:
    if name in _PLURALS:
        return _PLURALS[name]
    return name + ("es" if name.endswith(("s", "x", "ch", "sh")) else "s")


def _position(random: Random, boxes: list[Box], other: bool) -> _Pair:
    """Two things of which each is there once, side by side without any overlap."""
    counts = Counter(box.name for box in boxes)
    single = [box for box in boxes if counts[box.name] == 1]
    beside = [(a, b) for a in single for b in single if a.left + a.width <= b.left]
    if not beside:
        return None
    left, right = random.choice(beside)
    texts = [
        f"Is the {a.name} on the {side} side of the {b.name}?"
        for a, b in ((left, right), (right, left))
        for side in ("left", "right")
    ]
    return (texts[3], texts[2]) if other else (texts[0], texts[1])


def _colour(random: Random, boxes: list[Box], other: bool) -> _Pair:
    """The colour of a thing that is there once and not half transparent."""
    counts = Counter(box.name for box in boxes)
    colours = colours_of_sprites()
    # "Is there an orange orange" has its answer in the question.
    clear = [
        box.name
        for box in boxes
        if counts[box.name] == 1
        and not box.row["faint"]
        and colours.get(box.name, box.name) != box.name
    ]
    if not clear:
        return None
    name = random.choice(clear)
    true, false = colours[name], random.choice(absent_colours(name))
    return (
        f"Is there {_article(true)} {name} in this image?",
        f"Is there {_article(false)} {name} in this image?",
    )
