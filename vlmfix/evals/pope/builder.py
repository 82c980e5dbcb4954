"""POPE questions from any COCO-format data: "Is there a dog in the image?", half of them false.

For each selected image, its first objects are asked about ("yes"), and after each of them one
object that is not in it ("no"), chosen by strategy: any (random), the most frequent of the selected
images (popular), or the one seen most often with the object just asked about (adversarial).

Paper: Li et al. 2023, "Evaluating Object Hallucination in Large Vision-Language Models"
(arXiv 2305.10355). Reference: RUCAIBox/POPE utils.py. Where we differ from it: the generator is
seeded; an image that has no absent object left is skipped instead of looping for ever; "an" does
not turn "image" into "imange" (`official_typo=True` does).
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from vlmfix.errors import BadInput

__all__ = [
    "STRATEGIES",
    "Question",
    "build_questions",
    "co_occurrence",
    "frequency",
    "select_images",
]

STRATEGIES = ("random", "popular", "adversarial")
OBJECTS_PER_IMAGE = 3


@dataclass(frozen=True, slots=True)
class Question:
    """One POPE row.

    Args:
        question_id: counts from 1 within its split.
        image: file name.
        text: the bare question.
        label: "yes" or "no".
    """

    question_id: int
    image: str
    text: str
    label: str


def select_images(
    objects: Mapping[int, Sequence[str]], number: int | None, seed: int, per_image: int
) -> list[int]:
    """Draw the images to ask about among those with enough objects.

    Args:
        objects: image id -> its objects, without repeats.
        number: how many to draw; None takes all eligible images, in order of id.
        seed: of the draw.
        per_image: how many objects an image must have.

    Raises:
        BadInput: fewer images are eligible than asked for.
    """
    eligible = sorted(image for image, names in objects.items() if len(names) >= per_image)
    if number is None:
        if not eligible:
            raise BadInput(f"POPE: no image has {per_image} or more objects: nothing to ask")
        return eligible
    if len(eligible) < number:
        raise BadInput(
            f"POPE: {number} images wanted, but only {len(eligible)} have {per_image} or more "
            "objects: ask for fewer (n_images=) or for all of them (n_images=None)"
        )
    return random.Random(seed).sample(eligible, number)


def frequency(images: Sequence[Sequence[str]]) -> dict[str, int]:
    """In how many images each object occurs, in order of first sight."""
    counts: dict[str, int] = {}
    for objects in images:
        for name in objects:
            counts[name] = counts.get(name, 0) + 1
    return counts


def co_occurrence(images: Sequence[Sequence[str]]) -> dict[str, list[str]]:
    """For each object, the others by how many images hold both; ties in order of first sight."""
    counts: dict[str, dict[str, int]] = {}
    for objects in images:
        for name in objects:
            beside = counts.setdefault(name, {})
            for other in objects:
                if other != name:
                    beside[other] = beside.get(other, 0) + 1
    return {name: _descending(beside) for name, beside in counts.items()}


def _descending(counts: Mapping[str, int]) -> list[str]:
    # sorted() is stable, so equal counts keep the order in which they were first seen.
    return sorted(counts, key=counts.__getitem__, reverse=True)


def build_questions(
    images: Sequence[tuple[str, Sequence[str]]],
    strategy: str,
    seed: int,
    per_image: int = OBJECTS_PER_IMAGE,
    official_typo: bool = False,
    asked: Mapping[str, Sequence[str]] | None = None,
) -> list[Question]:
    """The questions of one split.

    Args:
        images: (file name, objects without repeats) of the selected images, in order.
        strategy: "random", "popular" or "adversarial".
        seed: of the random draws; the other two draw only when their list is exhausted.
        per_image: true objects asked about per image; as many absent ones follow.
        official_typo: "in the imange" after "an", as in the published files.
        asked: file name -> true objects to ask about instead of the first `per_image`. What is
            frequent, and seen with what, is counted over all objects of all images all the same.

    Raises:
        BadInput: unknown strategy, or an image with too few objects.
    """
    if strategy not in STRATEGIES:
        raise BadInput(f"POPE: no strategy {strategy!r}: choose from {', '.join(STRATEGIES)}")
    generator = random.Random(seed)
    counts = frequency([objects for _, objects in images])
    vocabulary = list(counts)
    by_frequency = _descending(counts)
    beside = co_occurrence([objects for _, objects in images])
    questions: list[Question] = []
    skipped = []
    for image, objects in images:
        if asked is None and len(objects) < per_image:
            raise BadInput(f"POPE: {image} has {len(objects)} objects, {per_image} are needed")
        used: set[str] = set()
        for present in objects[:per_image] if asked is None else asked.get(image, ()):
            closed = used | {present} | set(objects)
            ranked = {"popular": by_frequency, "adversarial": beside[present]}.get(strategy, [])
            absent = next(_candidates(ranked, vocabulary, closed, generator), None)
            if absent is None:
                skipped.append(image)
                break
            used |= {present, absent}
            for name, label in ((present, "yes"), (absent, "no")):
                text = _question(name, official_typo)
                questions.append(Question(len(questions) + 1, image, text, label))
    if skipped:
        warnings.warn(
            f"POPE {strategy}: {len(skipped)} images hold every object there is, so nothing absent "
            f"is left to ask about; their remaining questions are skipped: {skipped[:3]}",
            stacklevel=2,
        )
    return questions


def _candidates(
    ranked: Sequence[str], vocabulary: Sequence[str], closed: set[str], generator: random.Random
) -> Iterator[str]:
    """Absent objects, best first: by rank, then by uniform draws with redraw."""
    yield from (name for name in ranked if name not in closed)
    if closed.issuperset(vocabulary):
        return
    while True:
        name = generator.choice(vocabulary)
        if name not in closed:
            yield name


def _question(name: str, official_typo: bool) -> str:
    if name[:1].lower() not in "aeiou":
        return f"Is there a {name} in the image?"
    return f"Is there an {name} in the {'imange' if official_typo else 'image'}?"
