"""MME, hallucination subset: existence, count, position and colour, two questions per image.

Paper: Fu et al. 2023 (arXiv 2306.13394). Reference: the benchmark's own eval_tool, as RITUAL and
VCD run it on four subsets: 30 images with a "yes" and a "no" question each. The score of a subset
is 100 (accuracy + accuracy+), from 0 to 200, where accuracy+ counts images with both answers right;
the four add up to at most 800. Where we differ: questions are grouped by image, not by the order of
lines, and an image without exactly two questions is an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from vlmfix.evals.inputs.pairing import answer_text, pair
from vlmfix.evals.inputs.parsers import Parser, Verdict, get_parser
from vlmfix.evals.inputs.rows import Row
from vlmfix.evals.mme.data import (
    SUBSETS,
    WHAT,
    MmeData,
    MmeQuestion,
    Questions,
    answer_key,
    load_answers,
    refuse_odd,
)
from vlmfix.evals.mme.emoji import EmojiMme
from vlmfix.evals.scoring.metrics import Arm, Ratio, counts_table, summarise
from vlmfix.evals.tasks import Column, Options, Sample
from vlmfix.evals.yesno import YesNoTask, complete, count_groups, read_answers, strict_beside

__all__ = [
    "MME",
    "SUBSETS",
    "Mme",
    "MmeData",
    "MmeQuestion",
    "answer_key",
    "load_answers",
    "score_answers",
]

COUNTS = ("n", "correct", "images", "both", "yes", "unparsed", "empty")
RATIOS = (
    # Both accuracies share a denominator, because an image has two questions.
    Ratio("score", {"correct": 100, "both": 200}, {"n": 1}),
    Ratio("accuracy", {"correct": 1}, {"n": 1}, proportion=True),
    Ratio("accuracy_plus", {"both": 1}, {"images": 1}, proportion=True),
    Ratio("yes_ratio", {"yes": 1}, {"n": 1}, proportion=True),
)


def _mme(answer: str, label: str) -> Verdict:
    word = answer.lower().strip()
    if word in ("yes", "no"):
        return "yes" if word == "yes" else "no"
    # So "not", "nope", "none" and "know" say no, and "i think no" says nothing.
    return "yes" if "yes" in word[:4] else "no" if "no" in word[:4] else None


MME = Parser("mme", _mme)
"""The benchmark's reading of an answer."""


def score_answers(
    questions: Questions,
    answers: Sequence[Row | Mapping[str, Any]],
    parser: str = "mme",
    seed: int = 0,
) -> dict[str, Any]:
    """Score answers without a model.

    Args:
        questions: the questions.
        answers: rows with `image` (subset/name), `question` or `prompt` with any ending, and the
            answer.
        parser: "mme", or a key of `parsers.PARSERS`.
        seed: of the bootstrap.

    Returns:
        {"scores", "counts", "flags"} as `metrics.summarise` gives them for one arm, with the place
        "total" for the sum of the four scores; "n_unparsed"; "strict": the same by the strict
        parser.

    Raises:
        BadInput: answers that are missing, repeated, or to no question; an image without exactly
            two questions; no such parser.
    """
    asked = list(questions.questions)
    refuse_odd(asked)
    rule = MME if parser == "mme" else get_parser(parser)
    rows = pair([(q.image, q.asked) for q in asked], answers, answer_key, WHAT)
    entry: dict[str, Any] = _score({"": [answer_text(row) for row in rows]}, asked, rule, seed)[""]
    return {**entry, "parser": parser}


def _arm(
    answers: Sequence[str],
    questions: Sequence[MmeQuestion],
    parser: Parser,
    draws: Sequence[int] | None,
) -> Arm:
    rows, right = read_answers(answers, [question.label for question in questions], parser)
    count_groups(rows, draws, lambda i: questions[i].image, "images", "both")
    return Arm(counts_table(rows, COUNTS), right)


def _score(
    arms: Mapping[str, Sequence[str]],
    questions: Sequence[MmeQuestion],
    parser: Parser,
    seed: int,
    draws: Sequence[int] | None = None,
) -> dict[str, Any]:
    subsets = [question.subset for question in questions]
    # Subsets share pictures of COCO, by the same file name.
    pictures = [question.image.rpartition("/")[2] for question in questions]

    def by(rule: Parser) -> dict[str, Any]:
        scored = {arm: _arm(answers, questions, rule, draws) for arm, answers in arms.items()}
        found = summarise(scored, COUNTS, RATIOS, subsets, pictures, seed=seed, draws=draws)
        for arm, entry in found.items():
            entry["n_unparsed"] = int(scored[arm].counts[:, COUNTS.index("unparsed")].sum())
            if set(subsets) == set(SUBSETS):
                for part in (entry["scores"], entry.get("delta")):
                    if part is not None:
                        part["total"] = {"score": _times_four(part["mean"]["score"])}
        return found

    return strict_beside(by, parser)


def _times_four(mean: Mapping[str, Any]) -> dict[str, Any]:
    """The sum over the subsets, from their mean."""
    total = {"value": 4 * mean["value"], "ci": mean["ci"] and [4 * end for end in mean["ci"]]}
    if "by_seed" in mean:
        total |= {"by_seed": [4 * value for value in mean["by_seed"]], "sd": 4 * mean["sd"]}
    return total


class Mme(YesNoTask):
    """The MME task, on its hallucination subset."""

    name = "mme"
    columns = (
        Column("score", "score", percent=False),
        Column("accuracy", "accuracy", tested=True),
        Column("accuracy_plus", "accuracy+"),
        Column("yes_ratio", "yes"),
    )
    several_parsers = False
    load_answers = staticmethod(load_answers)
    answer_key = staticmethod(answer_key)

    @staticmethod
    def open(path: str | Path | None) -> MmeData | EmojiMme:
        """The folder of the benchmark; None: questions of the same kind about bundled images."""
        return EmojiMme() if path is None else MmeData.open(path)

    def __init__(self, data: Questions, options: Options) -> None:
        super().__init__(data, options)
        self.parser = MME
        self._questions = list(data.questions)
        refuse_odd(self._questions)
        self._of_image: dict[str, list[MmeQuestion]] = {}
        # Limited to a few images, there should still be some of every subset.
        self._by_subset: dict[str, list[str]] = {}
        for question in self._questions:
            if question.image not in self._of_image:
                self._by_subset.setdefault(question.subset, []).append(question.image)
            self._of_image.setdefault(question.image, []).append(question)
        self.images = max(self._by_subset.values(), key=len)

    @cached_property
    def samples(self) -> list[Sample]:
        """The questions about the first images of every subset."""
        limit, style = self.options.limit, self.options.prompt_style
        asked = {image for images in self._by_subset.values() for image in images[:limit]}
        chosen = [question for question in self._questions if question.image in asked]
        return [
            Sample(
                task=self.name,
                split=question.subset,
                sample_id=f"{question.image}:{self._of_image[question.image].index(question)}",
                image=question.image,
                image_id=question.image.rpartition("/")[2],
                prompt=question.text if style == "bare" else question.asked + self.suffix,
                target=question.label,
            )
            for question in chosen
        ]

    def scores(
        self,
        samples: Sequence[Sample],
        arms: Mapping[str, Sequence[str]],
        draws: Sequence[int] | None,
    ) -> dict[str, Any]:
        """An image of which one question failed is left out: accuracy+ is about pairs."""
        pictures = [sample.image for sample in samples]
        whole = complete(pictures, dict.fromkeys(pictures, 2), draws)
        kept = [samples[i] for i in whole]
        questions = [MmeQuestion(s.split, s.image or "", s.prompt, s.target) for s in kept]
        texts = {arm: [answers[i] for i in whole] for arm, answers in arms.items()}
        kept_draws = draws and [draws[i] for i in whole]
        return _score(texts, questions, self.parser, self.options.seed, kept_draws)
