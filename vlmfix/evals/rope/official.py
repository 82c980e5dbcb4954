"""What ROPE's own code computes, with the slips that its figures carry.

Reference: sled-group/moh, evaluation.py and utils.py. Answers are read by splitting at ", " and
taking what follows ": ". The slips: an answer of the default setting that cannot be read adds its
five objects to the denominator twice, and is then compared letter by letter; under student and
teacher forcing, the first answer that cannot be read ends the image, and its remaining objects are
added before all five are added again; macro F1 is the harmonic mean of macro precision and macro
recall, where precision is averaged over the classes that were answered, known or not, and
recall over those that are true.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from vlmfix.evals.rope.data import OBJECTS

__all__ = ["official_figures"]


def official_figures(
    answers: Sequence[Sequence[str]], truths: Sequence[Sequence[str]], setting: str
) -> dict[str, Any]:
    """The figures of one file of entries, in percent.

    Args:
        answers: per image, one answer in the default setting, else one per object, in order.
        truths: per image, the five classes in lower case.
        setting: "default", "student", "teacher" or "single".

    Returns:
        {"accuracy", "precision_macro", ..., "f1_weighted", "acc_list": right answers by position,
        "num_processed_data"}.
    """
    read = {"default": _default, "single": _single}.get(setting, _forced)
    pairs: list[tuple[str, str]] = []
    hits = [0] * OBJECTS
    total = 0
    for given, truth in zip(answers, truths, strict=True):
        classes, counted = read(given)
        total += counted
        for position, (right, answer) in enumerate(zip(truth, classes, strict=False)):
            pairs.append((right, answer.lower()))
            hits[position] += answer.lower() == right
    figures: dict[str, Any] = {"accuracy": 100 * sum(hits) / total if total else 0.0}
    for average in ("macro", "micro", "weighted"):
        precision, recall = _averages(pairs, average)
        f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
        figures |= {
            f"precision_{average}": 100 * precision,
            f"recall_{average}": 100 * recall,
            f"f1_{average}": 100 * f1,
        }
    return {**figures, "acc_list": hits, "num_processed_data": total // OBJECTS}


def _segments(answer: str) -> list[str] | None:
    parts = [segment.split(": ") for segment in answer.split(", ")]
    return None if any(len(part) < 2 for part in parts) else [part[1] for part in parts]


def _default(given: Sequence[str]) -> tuple[Sequence[str], int]:
    classes = _segments(given[0])
    return (given[0], 2 * OBJECTS) if classes is None else (classes, OBJECTS)


def _forced(given: Sequence[str]) -> tuple[Sequence[str], int]:
    found: list[str] = []
    for position, answer in enumerate(given):
        # The authors' models repeat the line from its beginning; ours go on from it.
        classes = _segments(f"obj{position + 1}: {answer}")
        if classes is None:
            return found, 2 * OBJECTS - position
        found.append(classes[0])
    return found, OBJECTS


def _single(given: Sequence[str]) -> tuple[Sequence[str], int]:
    return given, OBJECTS


def _averages(pairs: Sequence[tuple[str, str]], average: str) -> tuple[float, float]:
    """Precision and recall over (truth, answer)."""
    if not pairs:
        return 0.0, 0.0
    right = Counter(truth for truth, answer in pairs if truth == answer)
    true, said = Counter(truth for truth, _ in pairs), Counter(answer for _, answer in pairs)
    if average == "micro":
        share = sum(right.values()) / len(pairs)
        return share, share
    precision = {name: right[name] / number for name, number in said.items()}
    recall = {name: right[name] / number for name, number in true.items()}
    if average == "macro":
        return sum(precision.values()) / len(precision), sum(recall.values()) / len(recall)
    weighted = [
        sum(value * true[name] for name, value in values.items()) / len(pairs)
        for values in (precision, recall)
    ]
    return weighted[0], weighted[1]
