"""POPE: yes/no questions about objects that are, and are not, in an image.

Paper: Li et al. 2023 (arXiv 2305.10355). Reference: RUCAIBox/POPE evaluate.py. Where we differ from
it: answers are paired with questions by id, not by order; a zero denominator gives 0.0 and a flag
instead of an exception; unparsed answers are wrong and counted.

The split "small" is ours, for methods that claim to see details, on data with boxes. It asks about
every object of the selected images whose largest box covers at most 2 % of the image (`SMALL`), and
after each about an absent object, drawn as the adversarial split draws it: the one seen most often
with the small one. Saying "yes" more often then costs what it wins; with random objects, to which
hardly any model says "yes", it would look like seeing more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from vlmfix.errors import BadInput
from vlmfix.evals.chair.objects import category_of, ordered_objects
from vlmfix.evals.inputs.coco import CocoData
from vlmfix.evals.inputs.parsers import get_parser
from vlmfix.evals.inputs.rows import Row
from vlmfix.evals.pope.builder import (
    OBJECTS_PER_IMAGE,
    STRATEGIES,
    Question,
    build_questions,
    select_images,
)
from vlmfix.evals.pope.files import QuestionFile, answer_splits, pair_answers, pair_rows
from vlmfix.evals.pope.tables import OwnQuestions, QuestionTable, open_images, question_source
from vlmfix.evals.scoring.metrics import Arm, counts_table, summarise
from vlmfix.evals.tasks import Options, Sample
from vlmfix.evals.yesno import COUNTS, RATIOS, YesNoTask, read_answers

__all__ = ["SMALL", "SPLITS", "Pope", "score_answers"]

#: The splits of the paper, which are built if none are chosen, and ours.
SPLITS = (*STRATEGIES, "small")

#: Largest share of the image that any box of a small object covers. In EmojiCOCO: a square of 16
#: pixels, little more than a patch of its vision tower; 466 objects in 312 of 500 images.
SMALL = 0.02

GROUND_TRUTHS = ("instances", "instances+captions")


def score_answers(
    questions: Mapping[str, Sequence[Question]],
    answers: Mapping[str, Sequence[Row | Mapping[str, Any]]],
    parser: str = "official",
    seed: int = 0,
) -> dict[str, Any]:
    """Score one set of answers without any model.

    Args:
        questions: split -> questions.
        answers: split -> answer rows, as `pair_answers` takes them.
        parser: a key of `parsers.PARSERS`.
        seed: of the bootstrap.

    Returns:
        {"scores", "counts", "flags"} as `metrics.summarise` gives them for one arm.

    Raises:
        BadInput: unknown parser, a split without answers, or answers that do not fit.
    """
    rule = get_parser(parser)
    if absent := sorted(set(questions) - set(answers)):
        raise BadInput(f"POPE: no answers for the splits {', '.join(absent)}: pass all of them")
    rows = [(split, q) for split, split_questions in questions.items() for q in split_questions]
    texts = [text for split in questions for text in pair_answers(questions[split], answers[split])]
    counts, right = read_answers(texts, [q.label for _, q in rows], rule)
    arm = Arm(counts_table(counts, COUNTS), right)
    scored = summarise(
        {parser: arm}, COUNTS, RATIOS, [s for s, _ in rows], [q.image for _, q in rows], seed=seed
    )
    entry: dict[str, Any] = scored[parser]
    return entry


class Pope(YesNoTask):
    """The POPE task: its splits over the same images, built from the data or read from files."""

    name = "pope"
    open = staticmethod(open_images)

    def __init__(self, data: CocoData | QuestionTable, options: Options) -> None:
        super().__init__(data, options)
        chosen = STRATEGIES if options.splits is None else options.splits
        if not chosen or not set(chosen) <= set(SPLITS) or len(set(chosen)) < len(chosen):
            raise BadInput(
                f"POPE: cannot build the splits {', '.join(chosen) or '(none)'}: name one or more "
                f"of {', '.join(SPLITS)}, each once"
            )
        if options.questions and options.splits is not None:
            raise BadInput("POPE: ready-made questions name their splits; leave splits= out")
        if options.ground_truth not in (None, *GROUND_TRUTHS):
            raise BadInput(
                f"ground_truth={options.ground_truth!r}: choose {' or '.join(GROUND_TRUTHS)}"
            )
        self._ids: Mapping[str, int] = {}
        if isinstance(data, CocoData):
            self._ids = {name: image for image, name in data.files.items()}
        if options.questions:
            self._files = _read(options.questions)
        elif isinstance(data, QuestionTable):
            self._files = data.splits
            if options.splits is not None:
                self._files = _choose(data.splits, chosen, data.name)
        else:
            self._files = _build(data, options, chosen)
        self.images = list(
            dict.fromkeys(q.image for file in self._files.values() for q in file.questions)
        )

    @cached_property
    def samples(self) -> list[Sample]:
        """Questions of the selected images, split by split."""
        asked = set(self.images[: self.options.limit])
        return [
            Sample(
                task=self.name,
                split=split,
                sample_id=f"{split}:{q.question_id}",
                image=q.image,
                image_id=self._ids.get(q.image, q.image),
                prompt=q.text + self.suffix,
                target=q.label,
                follows=f"{split}:{file.follows[q.question_id]}"
                if q.question_id in file.follows
                else None,
            )
            for split, file in self._files.items()
            for q in file.questions
            if q.image in asked
        ]

    @property
    def facts(self) -> dict[str, Any]:
        """Prompt style, parser and where the questions come from."""
        variants = {split: file.variant for split, file in self._files.items()}
        return {**super().facts, "questions": variants}

    @classmethod
    def open_answered(
        cls, rows: Sequence[Row], source: str, annotations: str | Path | None, options: Options
    ) -> tuple[Any, Options]:
        """Question files, annotations, or the truth that the answers hold, as our records do."""
        if options.questions and annotations is not None:
            raise BadInput("POPE: --questions and --annotations both say what is true: keep one")
        if options.questions:
            return None, options
        if annotations is not None:
            return cls.open(annotations), options
        first = rows[0].first("sampling_seed")
        return OwnQuestions([r for r in rows if r.first("sampling_seed") == first], source), options

    def pair_answers(self, rows: Sequence[Row]) -> list[Row]:
        """By image and object, id or order (`pope.files.pair_rows`)."""
        answered = answer_splits(rows, list(self._files))
        return [
            row
            for split, file in self._files.items()
            for row in pair_rows(file.questions, answered[split])
        ]


def _build(data: CocoData, options: Options, splits: Sequence[str]) -> dict[str, QuestionFile]:
    """Questions from the annotations, as `pope_builder` makes them."""
    known = set(data.categories.values()) <= set(category_of())
    truth = options.ground_truth
    if truth is None:
        truth = "instances+captions" if data.captions and known else "instances"
    if truth == "instances+captions" and not (data.captions and known):
        raise BadInput(
            f"POPE: ground truth from captions needs captions, and COCO's categories alone; "
            f"{data.source} has {'others' if data.captions else 'no captions'}: take instances"
        )
    objects = ordered_objects(data, with_captions=truth == "instances+captions")
    selected = select_images(objects, options.n_images, options.seed, OBJECTS_PER_IMAGE)
    images = [(data.files[image], objects[image]) for image in selected]
    built = {}
    for split in splits:
        strategy, asked, source = split, None, f"built from {truth}"
        if split == "small":
            strategy, asked = "adversarial", _small_objects(data, selected)
            source += f", objects up to {SMALL:.0%} of the image, adversarial"
        if options.official_typo:
            source += ", with the typo of the official files"
        questions = build_questions(
            images,
            strategy,
            options.seed + 1,  # with the selection's own, both would replay the same draws
            official_typo=options.official_typo,
            asked=asked,
        )
        built[split] = QuestionFile(questions, source)
    return built


def _read(sources: Mapping[str, str | Path]) -> dict[str, QuestionFile]:
    """Question files by split; "all" stands for the splits that a file names itself."""
    read: dict[str, QuestionFile] = {}
    for split, path in sources.items():
        found = question_source(path)
        if split == "all":
            chosen = found
        elif list(found) == [""]:
            chosen = {split: found[""]}
        else:
            chosen = _choose(found, [split], str(path))
        if twice := sorted(set(read) & set(chosen)):
            raise BadInput(f"POPE: several files for the splits {', '.join(twice)}: name each once")
        read |= chosen
    return {split or "pope": file for split, file in read.items()}


def _choose(
    files: Mapping[str, QuestionFile], splits: Sequence[str], source: str
) -> dict[str, QuestionFile]:
    if absent := [split for split in splits if split not in files]:
        raise BadInput(
            f"POPE: {source} has no questions of the split {', '.join(absent)}: choose from "
            f"{', '.join(files)}"
        )
    return {split: files[split] for split in splits}


def _small_objects(data: CocoData, images: Sequence[int]) -> dict[str, list[str]]:
    """File name -> the objects that cover at most `SMALL` of that image.

    Raises:
        BadInput: there are none, or the data has no boxes.
    """
    small = {
        data.files[image]: [name for name, share in data.largest[image].items() if share <= SMALL]
        for image in images
    }
    if not any(small.values()):
        raise BadInput(
            f"POPE small: no object of the {len(images)} selected images covers {SMALL:.0%} of its "
            "image or less: leave out the split 'small'"
        )
    return small
