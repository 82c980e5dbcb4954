"""What a task is, and the table of tasks.

A task turns data into samples and scores their answers; it never sees a model. docs/add-a-task.md
says how to add one, here or in another package.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from vlmfix.errors import BadInput, UnknownTask
from vlmfix.evals.inputs.pairing import pair
from vlmfix.evals.inputs.rows import Row, read_rows
from vlmfix.evals.options import Options
from vlmfix.plugins import PlugIns, find_plug_ins

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "TASKS",
    "Answer",
    "Column",
    "DataSource",
    "Options",
    "Sample",
    "Task",
    "get_task",
    "list_tasks",
]

TASKS: dict[str, str] = {
    "amber": "vlmfix.evals.amber.task:Amber",
    "amber_d": "vlmfix.evals.amber.discriminative:AmberDiscriminative",
    "amber_g": "vlmfix.evals.amber.generative:AmberGenerative",
    "chair": "vlmfix.evals.chair.task:Chair",
    "hallusionbench": "vlmfix.evals.hallusionbench.task:HallusionBench",
    "mme": "vlmfix.evals.mme.task:Mme",
    "pope": "vlmfix.evals.pope.task:Pope",
    "rope": "vlmfix.evals.rope.task:Rope",
    "rope_single": "vlmfix.evals.rope.task:RopeSingle",
    "rope_student": "vlmfix.evals.rope.task:RopeStudent",
    "rope_teacher": "vlmfix.evals.rope.task:RopeTeacher",
}


@runtime_checkable
class DataSource(Protocol):
    """Where a task's pictures and annotations come from."""

    @property
    def name(self) -> str:
        """How the results call it."""

    @property
    def sha256(self) -> str:
        """Fingerprint of what decides the questions and their truth."""

    def require_images(self, names: Sequence[str]) -> None:
        """Check that these pictures are there; raises BadInput that names the first missing."""

    def image(self, name: str) -> Image:
        """The picture that samples call so, in RGB; raises BadInput if it cannot be read."""


_NO_FACTS: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)  # a file may hold a million
class Sample:
    """One item to answer.

    A sample that follows another one is asked in the same chat, after the prompts and the model's
    own answers of all turns before it; a picture stands in the chat once, where it first comes up.
    The prefix is the beginning of the assistant's answer, which the model goes on from.

    Args:
        task: name of the task.
        split: name of its split.
        sample_id: unique within the task.
        image: name of the picture in the task's data; None: a question without one.
        image_id: its id; items of one image form one cluster.
        prompt: what the model is asked, suffix included.
        target: what the answer is scored against, as the task understands it.
        meta: further facts for the record.
        follows: sample_id of the turn before this one.
        prefix: beginning of the assistant's answer, given; whole words.
        grow: this is no new turn: the answer to `follows` goes on. Its prefix, a space, its answer
            and this prefix, with what it begins with to join them, are given here.
        until: where the answer is handed on to later samples, it ends before this text.
    """

    task: str
    split: str
    sample_id: str
    image: str | None
    image_id: int | str
    prompt: str
    target: Any
    meta: Mapping[str, Any] = field(default_factory=lambda: _NO_FACTS)
    follows: str | None = None
    prefix: str = ""
    grow: bool = False
    until: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said to one sample.

    Args:
        text: the answer, without the prefix that was given.
        prompt_tokens: length of the prompt.
        new_tokens: length of the answer.
        finish: "eos", or "length" when it was cut by max_new_tokens, or "error".
        passes: forward passes of the language model that this answer took part in; a second stream
            in the same batch counts as a second pass.
        error: what went wrong; the text then means nothing.
        p_yes: probability of "yes", from 0 to 1, among the first tokens that say yes or no in any
            usual spelling; None where the task does not want it, or neither can be said.
    """

    text: str
    prompt_tokens: int = 0
    new_tokens: int = 0
    finish: str = "eos"
    passes: float = 0.0
    error: str | None = None
    p_yes: float | None = None


@dataclass(frozen=True)
class Column:
    """One metric as the table shows it.

    Args:
        metric: name of the ratio.
        title: heading.
        percent: shown times 100.
        delta: followed by its difference to the base.
        tested: followed by McNemar's p value.
    """

    metric: str
    title: str
    percent: bool = True
    delta: bool = True
    tested: bool = False


class Task(ABC):
    """One evaluation: a class that derives from this one.

    Attributes:
        name: what users call it, in lower case.
        max_new_tokens: of an answer, unless the options say otherwise.
        columns: what the table shows.
        wants_p_yes: its answers are yes or no, and `Answer.p_yes` is recorded.
        several_parsers: its answers can be read by any rule of `parsers.PARSERS`, and
            `vlmfix score --parser` chooses one.
        images: what `Options.limit` counts, in their order: images, or sets of questions.
    """

    name: ClassVar[str]
    max_new_tokens: ClassVar[int]
    columns: ClassVar[tuple[Column, ...]]
    wants_p_yes: ClassVar[bool] = False
    several_parsers: ClassVar[bool] = False
    images: Sequence[Any]

    @staticmethod
    @abstractmethod
    def open(path: str | Path | None) -> DataSource:
        """The data at `path`; None: the bundled images.

        Tasks on the same data share this function (`open = CocoData.open`); it is then opened once.

        Raises:
            BadInput: not there or not readable; or None, for a task that has no bundled data: the
                message names the files that it needs and where they come from.
        """

    def __init__(self, data: Any, options: Options) -> None:
        """Take what `open` gave; a task checks both here, before a model is asked.

        Raises:
            BadInput: something cannot be used.
        """
        self.data, self.options = data, options

    @property
    @abstractmethod
    def samples(self) -> Sequence[Sample]:
        """The items, in a fixed order, already limited."""

    @property
    @abstractmethod
    def facts(self) -> Mapping[str, Any]:
        """What a reader must know to repeat the run; goes into the results."""

    @property
    def partial(self) -> bool:
        """Whether the limit left out images of the full protocol."""
        return self.options.limit is not None and self.options.limit < len(self.images)

    @abstractmethod
    def parse(self, sample: Sample, answer: Answer) -> tuple[Any, bool | None]:
        """How one answer reads (JSON-able), and whether it is right (None: no such notion)."""

    @abstractmethod
    def score(
        self,
        samples: Sequence[Sample],
        arms: Mapping[str, Sequence[Answer]],
        draws: Sequence[int] | None = None,
    ) -> dict[str, Any]:
        """Arm -> results.

        Args:
            samples: the items, each once per seed that sampled an answer to it.
            arms: arm -> answers, aligned with `samples` and free of errors.
            draws: the seed of every answer, as `metrics.summarise` takes it; None: greedy.
        """

    # Files of answers, for `vlmfix score`: a task overrides what its files have of their own.

    @classmethod
    def load_answers(cls, path: str | Path) -> list[Row]:
        """The rows of a file of answers.

        Raises:
            BadInput: a file that cannot be read; the message names the line.
        """
        return read_rows(path, f"{cls.name} answers")

    @staticmethod
    def answer_key(row: Row) -> Hashable:
        """What a row answers; rows that our runs recorded have `sample_id`."""
        return row.text("sample_id")

    @classmethod
    def open_answered(
        cls, rows: Sequence[Row], source: str, annotations: str | Path | None, options: Options
    ) -> tuple[Any, Options]:
        """The data, and the options, with which these answers can be scored.

        Args:
            rows: the answers of one arm.
            source: names of their files.
            annotations: what the user named as data; None: the bundled images.
            options: what the user chose.

        Raises:
            BadInput: as `open`, or options that this task does not have.
        """
        if options.questions:
            raise BadInput(
                f"--questions are POPE's; the truth of {cls.name} comes with --annotations PATH"
            )
        return cls.open(annotations), options

    def pair_answers(self, rows: Sequence[Row]) -> list[Row]:
        """The row of every sample, in their order.

        Raises:
            BadInput: answers that are missing, repeated or to no question, with a list of them.
        """
        names = ("sample_id", "image_id", "image", "prompt")
        records = (
            Row(sample.sample_id, {name: getattr(sample, name) for name in names})
            for sample in self.samples
        )
        wanted = [self.answer_key(record) for record in records]
        return pair(wanted, rows, self.answer_key, f"{self.name} answers")


def list_tasks() -> list[str]:
    """Names of all tasks, sorted. Warns of tasks of other packages that cannot be used."""
    plug_ins = _plug_ins()
    plug_ins.warn()
    return sorted([*TASKS, *plug_ins.found])


def get_task(name: str) -> type[Task]:
    """The class of a task.

    Raises:
        UnknownTask: no task has that name, and the message lists them; or it is a task of another
            package that cannot be used, and the message says why.
    """
    if name in TASKS:
        module, _, attribute = TASKS[name].partition(":")
        task: type[Task] = getattr(import_module(module), attribute)
        return task
    plug_ins = _plug_ins()
    if name in plug_ins.found:
        task = plug_ins.found[name].kind
        return task
    if name in plug_ins.broken:
        raise UnknownTask(plug_ins.broken[name])
    raise UnknownTask(f"no evaluation task {name!r}: choose from {', '.join(list_tasks())}")


@cache
def _plug_ins() -> PlugIns:
    """Tasks of other packages."""

    def fault(kind: Any) -> str | None:
        if not (isinstance(kind, type) and issubclass(kind, Task)):
            return f"{kind!r} is no class that derives from vlmfix.evals.tasks.Task"
        declared = [part for part in ("max_new_tokens", "columns") if not hasattr(kind, part)]
        if missing := [*declared, *sorted(kind.__abstractmethods__)]:
            return f"{kind.__name__} lacks {', '.join(missing)}: define them in the class"
        return None

    return find_plug_ins("vlmfix.tasks", TASKS, fault)
