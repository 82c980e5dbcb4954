"""POPE: yes/no questions about objects that are, and are not, in an image.

Paper: Li et al. 2023 (arXiv 2305.10355). Reference: RUCAIBox/POPE evaluate.py. Where we differ from
it: answers are paired with questions by id, not by order; a zero denominator gives 0.0 and a flag
instead of an exception; unparsed answers are wrong and counted.

The split "small" is ours, for methods that claim to see details, on data with boxes. It asks about
every object of the selected images whose largest box covers at most 2 % of the image (`SMALL`), and
after each about an absent object, drawn as the adversarial split draws it: the one seen most often
beside the small one. Saying "yes" more often then costs what it wins; with random objects, to which
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
from vlmfix.evals.inputs.parsers import Parser, get_parser
from vlmfix.evals.inputs.prompts import suffix
from vlmfix.evals.inputs.rows import Row
from vlmfix.evals.pope.builder import (
    OBJECTS_PER_IMAGE,
    STRATEGIES,
    Question,
    build_questions,
    select_images,
)
from vlmfix.evals.pope.files import QuestionFile, pair_answers
from vlmfix.evals.pope.tables import QuestionTable, open_images, question_source
from vlmfix.evals.scoring.metrics import Arm, Ratio, counts_table, summarise
from vlmfix.evals.tasks import Answer, Column, Options, Sample

__all__ = ["SMALL", "SPLITS", "Pope", "score_answers"]

#: The splits of the paper, which are built if none are chosen, and ours.
SPLITS = (*STRATEGIES, "small")

#: Largest share of the image that any box of a small object covers. In EmojiCOCO: a square of 16
#: pixels, little more than a patch of its vision tower; 466 objects in 312 of 500 images.
SMALL = 0.02

GROUND_TRUTHS = ("instances", "instances+captions")

COUNTS = ("n", "correct", "tp", "fp", "tn", "fn", "yes", "unparsed", "empty")
RATIOS = (
    Ratio("accuracy", {"correct": 1}, {"n": 1}, proportion=True),
    Ratio("precision", {"tp": 1}, {"tp": 1, "fp": 1}, proportion=True),
    Ratio("recall", {"tp": 1}, {"tp": 1, "fn": 1}, proportion=True),
    # 2PR/(P+R) without its detour; undefined where P + R is 0, that is, without a true positive.
    Ratio("f1", {"tp": 2}, {"tp": 2, "fp": 1, "fn": 1}, defined_if=("tp",)),
    Ratio("yes_ratio", {"yes": 1}, {"n": 1}, proportion=True),
)


def _count(answer: str | None, label: str, parser: Parser) -> dict[str, float]:
    verdict = parser(answer, label)
    yes = verdict == "yes"
    miss = verdict == "no" or (verdict is None and parser.unparsed_is_miss)
    return {
        "n": 1,
        "correct": verdict == label,
        "tp": yes and label == "yes",
        "fp": yes and label == "no",
        "tn": verdict == "no" and label == "no",
        "fn": miss and label == "yes",
        "yes": yes,
        "unparsed": verdict is None,
        "empty": not (answer or "").strip(),
    }


def _arm(answers: Sequence[str | None], labels: Sequence[str], parser: Parser) -> Arm:
    rows = [_count(answer, label, parser) for answer, label in zip(answers, labels, strict=True)]
    return Arm(counts_table(rows, COUNTS), [bool(row["correct"]) for row in rows])


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
    arm = _arm(texts, [q.label for _, q in rows], rule)
    scored = summarise(
        {parser: arm}, COUNTS, RATIOS, [s for s, _ in rows], [q.image for _, q in rows], seed=seed
    )
    entry: dict[str, Any] = scored[parser]
    return entry


class Pope:
    """The POPE task: its splits over the same images, built from the data or read from files."""

    name = "pope"
    max_new_tokens = 16
    columns = (
        Column("accuracy", "accuracy", tested=True),
        Column("f1", "F1"),
        Column("yes_ratio", "yes"),
    )

    wants_p_yes = True
    open = staticmethod(open_images)

    def __init__(self, data: CocoData | QuestionTable, options: Options) -> None:
        self._suffix = suffix(options.prompt_style)
        self.parser = get_parser(options.parser)
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
        self._options = options
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
        self._images = list(
            dict.fromkeys(q.image for file in self._files.values() for q in file.questions)
        )

    @property
    def partial(self) -> bool:
        """Whether the limit left out images."""
        limit = self._options.limit
        return limit is not None and limit < len(self._images)

    @cached_property
    def samples(self) -> list[Sample]:
        """Questions of the selected images, split by split."""
        asked = set(self._images[: self._options.limit])
        return [
            Sample(
                task=self.name,
                split=split,
                sample_id=f"{split}:{q.question_id}",
                image=q.image,
                image_id=self._ids.get(q.image, q.image),
                prompt=q.text + self._suffix,
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
        return {
            "prompt_style": self._options.prompt_style,
            "parser": self.parser.name,
            "questions": {split: file.variant for split, file in self._files.items()},
        }

    def parse(self, sample: Sample, answer: Answer) -> tuple[str | None, bool]:
        """The parser's verdict and whether it is the label."""
        verdict = self.parser(answer.text, sample.target)
        return verdict, verdict == sample.target

    def score(
        self,
        samples: Sequence[Sample],
        arms: Mapping[str, Sequence[Answer]],
        draws: Sequence[int] | None = None,
    ) -> dict[str, Any]:
        """Scores by the chosen parser, with those of the strict one beside them."""
        result = self._score(samples, arms, draws, self.parser)
        strict = self._score(samples, arms, draws, get_parser("strict"))
        for arm, entry in result.items():
            entry["n_unparsed"] = _total(entry, "unparsed")
            entry["strict"] = {**strict[arm], "n_unparsed": _total(strict[arm], "unparsed")}
        return result

    def _score(
        self,
        samples: Sequence[Sample],
        arms: Mapping[str, Sequence[Answer]],
        draws: Sequence[int] | None,
        parser: Parser,
    ) -> dict[str, Any]:
        labels = [sample.target for sample in samples]
        scored = {
            arm: _arm([answer.text for answer in answers], labels, parser)
            for arm, answers in arms.items()
        }
        return summarise(
            scored,
            COUNTS,
            RATIOS,
            splits=[sample.split for sample in samples],
            clusters=[sample.image for sample in samples],
            seed=self._options.seed,
            requests=[(sample.image, sample.prompt) for sample in samples],
            draws=draws,
        )


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


def _read(sources: Mapping[str, Path]) -> dict[str, QuestionFile]:
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


def _total(entry: Mapping[str, Any], count: str) -> int:
    counts = entry["counts"]
    return int(sum(place[count] for name, place in counts.items() if name != "pooled"))
