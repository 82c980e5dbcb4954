"""ROPE: name the five boxed objects of an image, all at once or one after the other.

Paper: Chen et al. 2024 (arXiv 2407.06192). Reference: sled-group/moh. Four settings, a task each:
`rope` asks for all five in one answer, "obj1: a, obj2: b, ..."; `rope_student` gives the line as
far as the model has written it, and it goes on with the next object; `rope_teacher` gives the line
with the true classes; `rope_single` asks about one object. Where we differ from the reference: the
given line begins the assistant's answer instead of ending the prompt; every object counts once, and
one that cannot be read in the answer is wrong; the prompts are our own words, unless the data
brings others (`rope_data.RopeData`). What the reference computes stands beside (`rope_official`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from vlmfix.evals.inputs.pairing import answer_text, pair
from vlmfix.evals.inputs.rows import Row, read_rows
from vlmfix.evals.rope.data import OBJECTS, RopeData, RopeEntry
from vlmfix.evals.rope.official import official_figures
from vlmfix.evals.scoring.groups import by_draw
from vlmfix.evals.scoring.metrics import Arm, Ratio, counts_table, estimate, summarise
from vlmfix.evals.scoring.stats import Floats, Resamples
from vlmfix.evals.tasks import Answer, Column, DataSource, Options, Sample

__all__ = [
    "SETTINGS",
    "Rope",
    "RopeSingle",
    "RopeSource",
    "RopeStudent",
    "RopeTeacher",
    "load_answers",
    "load_questions",
    "read_classes",
    "score_answers",
]

SETTINGS = ("default", "student", "teacher", "single")

PROMPTS = {
    "multi": (
        "Five objects in this image have red boxes, labelled obj1 to obj5. Name the class of each "
        "of them, chosen from this list: {classes}. Answer with one line of the form 'obj1: class, "
        "obj2: class, obj3: class, obj4: class, obj5: class', with the names of the classes and "
        "nothing else."
    ),
    "single": (
        "Which class does the object in the red box labelled {object} belong to? Choose from this "
        "list: {classes}. Answer with the name of the class and nothing else."
    ),
}

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


class RopeSource(DataSource, Protocol):
    """Data that the tasks can ask about.

    Attributes:
        entries: the images; `RopeEntry.image` is what its `image(name)` gives, boxes included.
        prompts: as `PROMPTS`, to replace them; None for ours.
    """

    entries: list[RopeEntry]
    prompts: dict[str, str] | None


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


def load_questions(path: str | Path) -> RopeData:
    """The entries in ROPE's folder; scoring needs no pictures.

    Raises:
        BadInput: no folder, or files that are missing or broken.
    """
    return RopeData.open(path)


def load_answers(path: str | Path) -> list[Row]:
    """Answers as our runs record them.

    Raises:
        BadInput: a file that cannot be read; the message names the line.
    """
    return read_rows(path, WHAT)


WHAT = "ROPE answers"


def score_answers(
    questions: RopeSource,
    answers: Sequence[Row | Mapping[str, Any]],
    setting: str = "default",
    seed: int = 0,
) -> dict[str, Any]:
    """Score answers without a model.

    Args:
        questions: the entries.
        answers: rows with `sample_id` and the answer. The id is the entry's `image`; where an
            answer is about one object, followed by "#" and its number from 1 to 5.
        setting: one of `SETTINGS`.
        seed: of the bootstrap.

    Returns:
        {"scores", "counts", "flags"} as `metrics.summarise` gives them for one arm, with the
        averages over classes among the scores; "n_unparsed"; "compat": split -> what the authors'
        code computes.

    Raises:
        BadInput: answers that are missing, repeated, or to no question.
    """
    slots = _slots(questions.entries, setting)
    rows = pair([_id(*slot) for slot in slots], answers, lambda row: row.text("sample_id"), WHAT)
    entry: dict[str, Any] = _score({"": [answer_text(row) for row in rows]}, slots, setting, seed)[
        ""
    ]
    return entry


Slot = tuple[RopeEntry, int | None]
"""What one answer is about: an entry, and one of its objects, from 0, or None for all five."""


def _slots(entries: Sequence[RopeEntry], setting: str) -> list[Slot]:
    if setting == "default":
        return [(entry, None) for entry in entries]
    return [(entry, k) for entry in entries for k in range(OBJECTS)]


def _id(entry: RopeEntry, position: int | None) -> str:
    return entry.image if position is None else f"{entry.image}#{position + 1}"


def _score(
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
    """Averages over classes, with intervals, beside the ratios.

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


def open_boxed(path: str | Path | None) -> RopeSource:
    """The benchmark's folder; None: five boxed objects in bundled images.

    Raises:
        BadInput: no folder, or files that are missing or broken.
    """
    if path is None:
        from vlmfix.evals.rope.emoji import EmojiRope

        return EmojiRope()
    return RopeData.open(path)


class Rope:
    """The ROPE task: all five objects in one answer."""

    name = "rope"
    setting: ClassVar[str] = "default"
    max_new_tokens = 64
    columns = (
        Column("accuracy", "accuracy", tested=True),
        Column("macro_f1", "macro F1"),
        *(Column(f"obj{k}", f"obj{k}", delta=False) for k in POSITIONS),
    )
    wants_p_yes = False
    open = staticmethod(open_boxed)

    def __init__(self, data: RopeSource, options: Options) -> None:
        self._options, self._prompts = options, data.prompts or PROMPTS
        self._own_prompts = data.prompts is None
        by_split: dict[str, list[RopeEntry]] = {}
        for entry in data.entries:
            by_split.setdefault(entry.split, []).append(entry)
        limit = options.limit
        self._entries = [entry for entries in by_split.values() for entry in entries[:limit]]
        self.partial = len(self._entries) < len(data.entries)

    @cached_property
    def _slot_of(self) -> dict[str, Slot]:
        return {_id(*slot): slot for slot in _slots(self._entries, self.setting)}

    @cached_property
    def samples(self) -> list[Sample]:
        """What is asked about the first images of every split."""
        return [self._sample(name, *slot) for name, slot in self._slot_of.items()]

    def _sample(self, sample_id: str, entry: RopeEntry, position: int | None) -> Sample:
        names = [thing.name for thing in entry.objects]
        # Not str.format: a prompt from a file may hold braces of its own.
        kind = "single" if self.setting == "single" else "multi"
        prompt = self._prompts[kind].replace("{classes}", ", ".join(entry.classes))
        follows, prefix, grow, until = None, "", False, ""
        if position is not None and self.setting == "single":
            prompt = prompt.replace("{object}", f"obj{position + 1}")
        elif position is not None and self.setting == "teacher":
            given = [f"obj{k + 1}: {names[k]}, " for k in range(position)]
            prefix = "".join(given) + f"obj{position + 1}:"
        elif position is not None:
            until, prefix = ",", f"obj{position + 1}:"
            if position:
                follows, grow, prefix = _id(entry, position - 1), True, ", " + prefix
        return Sample(
            task=self.name,
            split=entry.split,
            sample_id=sample_id,
            image=entry.image,
            image_id=entry.picture,
            prompt=prompt,
            target=names if position is None else names[position],
            follows=follows,
            prefix=prefix,
            grow=grow,
            until=until,
        )

    @property
    def facts(self) -> dict[str, Any]:
        """The setting, and whose words the prompt is."""
        return {"setting": self.setting, "prompt": "vlmfix" if self._own_prompts else "of the data"}

    def parse(self, sample: Sample, answer: Answer) -> tuple[Any, bool]:
        """The class, or five of them, and whether all are right."""
        classes = read_classes(answer.text, self.setting)
        said: Any = classes if self.setting == "default" else classes[0]
        return said, said == sample.target

    def score(
        self,
        samples: Sequence[Sample],
        arms: Mapping[str, Sequence[Answer]],
        draws: Sequence[int] | None = None,
    ) -> dict[str, Any]:
        """Accuracy, averages over classes, and the figures of the authors' code beside them."""
        return _score(
            {arm: [answer.text for answer in answers] for arm, answers in arms.items()},
            [self._slot_of[sample.sample_id] for sample in samples],
            self.setting,
            self._options.seed,
            draws,
        )


class RopeStudent(Rope):
    """The line grows with the model's own answers."""

    name = "rope_student"
    setting = "student"
    max_new_tokens = 16


class RopeTeacher(Rope):
    """The line grows with the true classes."""

    name = "rope_teacher"
    setting = "teacher"
    max_new_tokens = 16


class RopeSingle(Rope):
    """One object per question."""

    name = "rope_single"
    setting = "single"
    max_new_tokens = 16
