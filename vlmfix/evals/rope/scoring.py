"""From what a model said about boxed objects to figures: classes, accuracy, averages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmfix.evals.rope.data import OBJECTS, RopeEntry
from vlmfix.evals.rope.official import official_figures
from vlmfix.evals.scoring.groups import by_draw
from vlmfix.evals.scoring.metrics import Arm, Ratio, counts_table, estimate, summarise
from vlmfix.evals.scoring.stats import Floats, Resamples

__all__ = [
    "POSITIONS",
    "SETTINGS",
    "Slot",
    "read_classes",
    "score_slots",
    "slot_id",
    "slots_of",
]

SETTINGS = ("default", "student", "teacher", "single")

POSITIONS = range(1, OBJECTS + 1)
COUNTS = (
    "n",
    "correct",
    "unparsed",
    *(f"n_{k}" for k in POSITIONS),
    *(f"correct_{k}" for k in POSITIONS),
)
RATIOS = (
    Ratio("accuracy", {"correct": 1}, {"n": 1}, proportion=True),
    *(Ratio(f"obj{k}", {f"correct_{k}": 1}, {f"n_{k}": 1}, proportion=True) for k in POSITIONS),
)
AVERAGES = ("macro_precision", "macro_recall", "macro_f1", "weighted_precision", "weighted_f1")


def read_classes(answer: str, setting: str) -> list[str]:
    """The classes that an answer names, in lower case; "" where one cannot be read.

    Args:
        answer: of the default setting, to five objects; else to one, which the answer may go on
            from to the next ones.
        setting: one of `SETTINGS`.

    Returns:
        Five classes in the default setting, else one.
    """
    if setting == "single":
        return [_name(answer)]
    # No class has a comma in its name, and some models leave out the space.
    parts = answer.strip().split(",")
    if setting != "default":
        return [_name(parts[0].partition("\n")[0].rpartition(": ")[2])]
    classes = [_name(part.partition(": ")[2]) for part in parts[:OBJECTS]]
    return classes + [""] * (OBJECTS - len(classes))


def _name(text: str) -> str:
    return text.strip().strip(".,'\"*").strip().lower()


Slot = tuple[RopeEntry, int | None]
"""What one answer is about: an entry, and one of its objects, from 0, or None for all five."""


def slots_of(entries: Sequence[RopeEntry], setting: str) -> list[Slot]:
    if setting == "default":
        return [(entry, None) for entry in entries]
    return [(entry, k) for entry in entries for k in range(OBJECTS)]


def slot_id(entry: RopeEntry, position: int | None) -> str:
    return entry.image if position is None else f"{entry.image}#{position + 1}"


def score_slots(
    arms: Mapping[str, Sequence[str]],
    slots: Sequence[Slot],
    setting: str,
    seed: int,
    draws: Sequence[int] | None = None,
) -> dict[str, Any]:
    """One row per object, whichever way it was asked about."""
    objects = [
        (i, entry, k)
        for i, (entry, position) in enumerate(slots)
        for k in (range(OBJECTS) if position is None else [position])
    ]
    truths = [entry.objects[k].name for _, entry, k in objects]
    splits = [entry.split for _, entry, _ in objects]
    pictures = [entry.picture for _, entry, _ in objects]
    drawn = draws and [draws[i] for i, _, _ in objects]
    said = {
        arm: [c for text in texts for c in read_classes(text, setting)]
        for arm, texts in arms.items()
    }
    scored = {
        arm: _arm(classes, truths, [k for _, _, k in objects]) for arm, classes in said.items()
    }
    result = summarise(scored, COUNTS, RATIOS, splits, pictures, seed=seed, draws=drawn)
    _add_averages(result, said, truths, splits, pictures, seed, drawn)
    for arm, entry in result.items():
        entry["n_unparsed"] = sum(not name for name in said[arm])
        figures = [_compat(arms[arm], slots, setting, at) for at in by_draw(draws, len(slots))]
        entry["compat"] = figures if len(figures) > 1 else figures[0]
    return result


def _arm(classes: Sequence[str], truths: Sequence[str], positions: Sequence[int]) -> Arm:
    right = [said == truth for said, truth in zip(classes, truths, strict=True)]
    rows = [
        {
            "n": 1,
            "correct": correct,
            "unparsed": not name,
            f"n_{k + 1}": 1,
            f"correct_{k + 1}": correct,
        }
        for name, correct, k in zip(classes, right, positions, strict=True)
    ]
    return Arm(counts_table(rows, COUNTS), right)


def _compat(
    answers: Sequence[str], slots: Sequence[Slot], setting: str, at: Sequence[int]
) -> dict[str, Any]:
    """Split -> the reference's figures; images without all of their answers are left out."""
    given: dict[str, tuple[RopeEntry, list[str]]] = {}
    for i in at:
        given.setdefault(slots[i][0].image, (slots[i][0], []))[1].append(answers[i])
    whole = 1 if setting == "default" else OBJECTS
    by_split: dict[str, list[tuple[RopeEntry, list[str]]]] = {}
    for entry, texts in given.values():
        if len(texts) == whole:
            by_split.setdefault(entry.split, []).append((entry, texts))
    return {
        split: official_figures(
            [texts for _, texts in found],
            [[thing.name for thing in entry.objects] for entry, _ in found],
            setting,
        )
        for split, found in by_split.items()
    }


def _add_averages(
    result: dict[str, Any],
    said: Mapping[str, Sequence[str]],
    truths: Sequence[str],
    splits: Sequence[str],
    pictures: Sequence[str],
    seed: int,
    draws: Sequence[int] | None,
) -> None:
    """Averages over classes, with intervals, next to the ratios.

    They are means of ratios, so each resample needs the counts of every class. Micro averages and
    the weighted recall would be the accuracy, as every object has one class and one answer.
    """
    names = sorted(set(truths))
    number = {name: i for i, name in enumerate(names)}
    resamples = Resamples(pictures, seed=seed)
    cells = by_draw(draws, len(truths))
    base = next(iter(said), None)
    found: dict[str, dict[str, list[Floats]]] = {}
    for arm, classes in said.items():
        counts = np.zeros((len(truths), len(names), 3))
        for i, (name, truth) in enumerate(zip(classes, truths, strict=True)):
            counts[i, number[truth], 0] = 1
            # A name that is true of nothing here is no class of its own, but costs recall.
            if name in number:
                counts[i, number[name], 1] = 1
            counts[i, number[truth], 2] = name == truth
        found[arm] = {}
        for split in dict.fromkeys(splits):
            # Per seed (1 + R, averages): the items as they are, then the resamples.
            found[arm][split] = [
                _averages(
                    np.concatenate([counts[at].sum(axis=0)[None], resamples.sums(counts[at], at)])
                )
                for at in (_of(split, splits, cell) for cell in cells)
            ]
    for arm, by_split in found.items():
        for split, values in by_split.items():
            ours = np.stack(values, axis=-1)
            _write(result[arm]["scores"][split], ours, resamples, {"ci_method": "bootstrap"})
            if arm != base and base is not None:
                theirs = np.stack(found[base][split], axis=-1)
                _write(result[arm]["delta"][split], ours - theirs, resamples, {})


def _of(split: str, splits: Sequence[str], cell: Sequence[int]) -> NDArray[np.intp]:
    return np.array([i for i in cell if splits[i] == split], dtype=np.intp)


def _write(
    place: dict[str, Any], values: Floats, resamples: Resamples, more: Mapping[str, Any]
) -> None:
    """(1 + R, averages, seeds) into one place of the results."""
    for i, name in enumerate(AVERAGES):
        place[name] = {**estimate(values[0, i], values[1:, i], resamples.n_clusters), **more}


def _averages(sums: Floats) -> Floats:
    """(..., classes, [true, said, right]) -> (..., `AVERAGES`), over the classes that occur."""
    true, said, right = np.moveaxis(sums, -1, 0)
    occurs = true > 0

    def ratio(top: Floats, bottom: Floats) -> Floats:
        return np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 0)

    precision, recall, f1 = ratio(right, said), ratio(right, true), ratio(2 * right, true + said)

    def macro(values: Floats) -> Floats:
        return ratio((values * occurs).sum(axis=-1), occurs.sum(axis=-1).astype(np.float64))

    def weighted(values: Floats) -> Floats:
        return ratio((values * true).sum(axis=-1), true.sum(axis=-1))

    return np.stack(
        [macro(precision), macro(recall), macro(f1), weighted(precision), weighted(f1)], axis=-1
    )
