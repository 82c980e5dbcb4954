"""ROPE: name the five boxed objects of an image, all at once or one after the other.

Paper: Chen et al. 2024 (arXiv 2407.06192). Reference: sled-group/moh. Four settings, a task each:
`rope` asks for all five in one answer, "obj1: a, obj2: b, ..."; `rope_student` gives the line as
far as the model has written it, and it goes on with the next object; `rope_teacher` gives the line
with the true classes; `rope_single` asks about one object. Where we differ from the reference: the
given line begins the assistant's answer instead of ending the prompt; every object counts once, and
one that cannot be read in the answer is wrong; the prompts are our own words, unless the data
brings others (`rope_data.RopeData`). What the reference computes stands next to
it (`rope/official.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol

from vlmfix.evals.inputs.pairing import answer_text, pair
from vlmfix.evals.inputs.rows import Row
from vlmfix.evals.rope.data import RopeData, RopeEntry
from vlmfix.evals.rope.emoji import EmojiRope
from vlmfix.evals.rope.scoring import (
    POSITIONS,
    SETTINGS,
    Slot,
    read_classes,
    score_slots,
    slot_id,
    slots_of,
)
from vlmfix.evals.tasks import Answer, Column, DataSource, Options, Sample, Task

__all__ = [
    "SETTINGS",
    "Rope",
    "RopeSingle",
    "RopeSource",
    "RopeStudent",
    "RopeTeacher",
    "read_classes",
    "score_answers",
]

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


class RopeSource(DataSource, Protocol):
    """Data that the tasks can ask about.

    Attributes:
        entries: the images; `RopeEntry.image` is what its `image(name)` gives, boxes included.
        prompts: as `PROMPTS`, to replace them; None for ours.
    """

    entries: list[RopeEntry]
    prompts: dict[str, str] | None


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
    slots = slots_of(questions.entries, setting)
    wanted = [slot_id(*slot) for slot in slots]
    rows = pair(wanted, answers, Rope.answer_key, "ROPE answers")
    entry: dict[str, Any] = score_slots(
        {"": [answer_text(row) for row in rows]}, slots, setting, seed
    )[""]
    return entry


def open_boxed(path: str | Path | None) -> RopeSource:
    """The benchmark's folder; None: five boxed objects in bundled images.

    Raises:
        BadInput: no folder, or files that are missing or broken.
    """
    return EmojiRope() if path is None else RopeData.open(path)


class Rope(Task):
    """The ROPE task: all five objects in one answer."""

    name = "rope"
    setting: ClassVar[str] = "default"
    max_new_tokens = 64
    columns = (
        Column("accuracy", "accuracy", tested=True),
        Column("macro_f1", "macro F1"),
        *(Column(f"obj{k}", f"obj{k}", delta=False) for k in POSITIONS),
    )
    open = staticmethod(open_boxed)

    def __init__(self, data: RopeSource, options: Options) -> None:
        super().__init__(data, options)
        self._prompts = data.prompts or PROMPTS
        self._own_prompts = data.prompts is None
        by_split: dict[str, list[RopeEntry]] = {}
        for entry in data.entries:
            by_split.setdefault(entry.split, []).append(entry)
        # Limited to a few images, there should still be some of every split.
        self.images = max(by_split.values(), key=len, default=[])
        limit = options.limit
        self._entries = [entry for entries in by_split.values() for entry in entries[:limit]]

    @cached_property
    def _slot_of(self) -> dict[str, Slot]:
        return {slot_id(*slot): slot for slot in slots_of(self._entries, self.setting)}

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
                follows, grow, prefix = slot_id(entry, position - 1), True, ", " + prefix
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
        """Accuracy, averages over classes, and the figures of the authors' code next to them."""
        return score_slots(
            {arm: [answer.text for answer in answers] for arm, answers in arms.items()},
            [self._slot_of[sample.sample_id] for sample in samples],
            self.setting,
            self.options.seed,
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
