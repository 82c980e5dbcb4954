"""What a task is, and the table of tasks.

A task turns data into samples and scores their answers; it never sees a model. To add one, write a
class with the methods of `Task` in its own file and add its row to `TASKS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from vlmfix.errors import UnknownTask

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


@dataclass(frozen=True)
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
            and this prefix, with whatever it begins with to join them, are given here.
        until: where the answer is handed on to later samples, it ends before this text.
    """

    task: str
    split: str
    sample_id: str
    image: str | None
    image_id: int | str
    prompt: str
    target: Any
    meta: Mapping[str, Any] = field(default_factory=dict)
    follows: str | None = None
    prefix: str = ""
    grow: bool = False
    until: str = ""


@dataclass(frozen=True)
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
class Options:
    """What the caller chose; tasks read what concerns them.

    Args:
        seed: of every selection and of the bootstrap.
        limit: ask about the first so many selected images only; None asks about all.
        n_images: how many images a task selects; None takes all that are eligible.
        prompt_style: wording of yes/no questions, a key of `prompts.PROMPT_STYLES`.
        parser: rule for yes/no answers, a key of `parsers.PARSERS`.
        max_new_tokens: overrides the task's own limit.
        truncate: "none", or "sentence" to drop the sentence that the token limit cut.
        questions: ready-made question files by split, instead of building them.
        splits: which splits of POPE are built, of `pope.SPLITS`; None: those of the paper.
        ground_truth: objects that POPE asks about: "instances" or "instances+captions"; None takes
            the captions where there are some and all categories are COCO's.
        image_ids: the images that CHAIR describes, or a file of them, instead of drawing them.
        chair_engine: finds objects in captions, of `chair_objects.ENGINES`.
        chair_mode: "compat", or "fixed" for repaired rules, of `chair_objects.MODES`.
        amber_similarity: when AMBER takes two nouns for the same: "exact", "spacy", "spacy:MODEL".
        official_typo: POPE writes "in the imange" after "an", as the published files do.
    """

    seed: int = 0
    limit: int | None = None
    n_images: int | None = 500
    prompt_style: str = "lmms"
    parser: str = "official"
    max_new_tokens: int | None = None
    truncate: str = "none"
    questions: Mapping[str, Path] | None = None
    splits: Sequence[str] | None = None
    ground_truth: str | None = None
    image_ids: Path | Sequence[int] | None = None
    chair_engine: str = "builtin"
    chair_mode: str = "compat"
    amber_similarity: str = "exact"
    official_typo: bool = False


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


class Task(Protocol):
    """One evaluation.

    Attributes:
        name: its key in `TASKS`.
        max_new_tokens: of an answer, unless the options say otherwise.
        columns: what the table shows.
        wants_p_yes: its answers are yes or no, and `Answer.p_yes` is recorded.
    """

    name: str
    max_new_tokens: int
    columns: tuple[Column, ...]
    wants_p_yes: ClassVar[bool]

    @classmethod
    def open(cls, path: str | Path | None) -> DataSource:
        """The data at `path`; None: the bundled images.

        Tasks on the same data share this method (`open = CocoData.open`); it is then opened once.

        Raises:
            BadInput: not there or not readable; or None, for a task that has no bundled data: the
                message names the files that it needs and where they come from.
        """

    def __init__(self, data: Any, options: Options) -> None:
        """Take what `open` gave; check the options and the data.

        Raises:
            BadInput: something cannot be used. No model has been asked then.
        """

    @property
    def samples(self) -> Sequence[Sample]:
        """The items, in a fixed order, already limited."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """What a reader must know to repeat the run; goes into the results."""

    @property
    def partial(self) -> bool:
        """Whether the limit left out images of the full protocol."""

    def parse(self, sample: Sample, answer: Answer) -> tuple[Any, bool | None]:
        """How one answer reads (JSON-able), and whether it is right (None: no such notion)."""

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


def get_task(name: str) -> type[Task]:
    """The class of a task.

    Raises:
        UnknownTask: no task has that name; the message lists them.
    """
    if name not in TASKS:
        raise UnknownTask(f"no evaluation task {name!r}: choose from {', '.join(sorted(TASKS))}")
    module, _, attribute = TASKS[name].partition(":")
    task: type[Task] = getattr(import_module(module), attribute)
    return task
