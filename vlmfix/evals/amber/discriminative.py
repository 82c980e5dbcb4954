"""AMBER, discriminative: yes/no questions about existence, attributes and relations.

Paper: Wang et al. 2023 (arXiv 2311.07397). Reference: junyangwang0410/AMBER, inference.py. The
positive class is "no", the answer that denies what is not there; all questions about existence
have the answer "no", so their precision is 1 by construction.

Where we differ from the official script: it takes the answers "Yes" and "No" and nothing else, so
"no" and "No." are wrong. Here a parser reads the answers, and `official_figures` gives what the
script prints for the same answers, with its rounding, next to ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from vlmfix.errors import BadInput
from vlmfix.evals.amber.data import GENERATIVE, GROUPS, AmberData, answer_key
from vlmfix.evals.inputs.parsers import Parser, Verdict
from vlmfix.evals.inputs.rows import few
from vlmfix.evals.scoring.groups import by_draw, summarise_places
from vlmfix.evals.scoring.metrics import Arm, Ratio, counts_table
from vlmfix.evals.scoring.stats import Floats
from vlmfix.evals.tasks import Column, Options, Sample
from vlmfix.evals.yesno import YesNoTask, read_answers, strict_beside

__all__ = [
    "COUNTS",
    "EXACT",
    "F1",
    "AmberDiscriminative",
    "official_figures",
    "question_counts",
    "score_questions",
]

COUNTS = ("n", "correct", "no_right", "said_no", "truth_no", "yes", "unparsed", "empty")
F1 = Ratio("f1", {"no_right": 2}, {"said_no": 1, "truth_no": 1}, defined_if=("no_right",))
RATIOS = (
    Ratio("accuracy", {"correct": 1}, {"n": 1}, proportion=True),
    Ratio("precision", {"no_right": 1}, {"said_no": 1}, proportion=True),
    Ratio("recall", {"no_right": 1}, {"truth_no": 1}, proportion=True),
    F1,
    Ratio("yes_ratio", {"yes": 1}, {"n": 1}, proportion=True),
)


def _exact(answer: str, label: str) -> Verdict:
    return "yes" if answer == "Yes" else "no" if answer == "No" else None


EXACT = Parser("amber", _exact)
"""The official script's reading of an answer."""


def question_counts(answers: Sequence[str], labels: Sequence[str], parser: Parser) -> Floats:
    """(questions, `COUNTS`): what each answer counts as."""
    rows, _ = read_answers(answers, labels, parser)
    # The positive class is "no": what POPE's table calls a true negative is right here.
    for row, label in zip(rows, labels, strict=True):
        said_no = row["n"] - row["yes"] - row["unparsed"]
        row |= {"no_right": row["tn"], "said_no": said_no, "truth_no": label == "no"}
    return counts_table(rows, COUNTS)


def _arm(answers: Sequence[str], labels: Sequence[str], parser: Parser) -> Arm:
    table = question_counts(answers, labels, parser)
    return Arm(table, table[:, COUNTS.index("correct")].astype(bool).tolist())


def official_figures(
    answers: Sequence[str], labels: Sequence[str], dimensions: Sequence[str]
) -> dict[str, dict[str, float]]:
    """What the official script prints, in percent with one decimal.

    Its counters of trials start at 0.001, and its F1 comes from rounded precision and recall, with
    a small number in the denominator. Places without questions are left out.

    Args:
        answers: one per question.
        labels: their truth.
        dimensions: existence, state, number, action or relation.

    Returns:
        place -> {"accuracy", "precision", "recall", "f1"}.
    """
    table = question_counts(answers, labels, EXACT)
    figures = {}
    for place, members in GROUPS.items():
        chosen = table[[name in members for name in dimensions]]
        if not len(chosen):
            continue
        sums = dict(zip(COUNTS, chosen.sum(axis=0).tolist(), strict=True))
        # One counter over everything; attribute adds up the three of its parts.
        start = 0.001 * (1 if place == "discriminative" else len(members))
        accuracy = round(sums["correct"] / (sums["n"] + start) * 100, 1)
        precision = round(sums["no_right"] / (sums["said_no"] + start) * 100, 1)
        recall = round(sums["no_right"] / (sums["truth_no"] + start) * 100, 1)
        p, r, tiny = precision / 100, recall / 100, 0.001 if place == "existence" else 0.0001
        f1 = round(2 * p * r / (p + r + tiny) * 100, 1)
        figures[place] = {"accuracy": accuracy, "precision": precision, "recall": recall, "f1": f1}
    return figures


def score_questions(
    arms: Mapping[str, Sequence[str]],
    labels: Sequence[str],
    dimensions: Sequence[str],
    clusters: Sequence[object],
    parser: Parser,
    seed: int = 0,
    draws: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Score answers to AMBER's questions.

    Args:
        arms: name -> answers; the first is the base.
        labels: truth of every question.
        dimensions: existence, state, number, action or relation, of every question.
        clusters: its picture.
        parser: reads the answers.
        seed: of the bootstrap.
        draws: the seed under which every question was answered; None: one answer to each.

    Returns:
        arm -> as `metrics.summarise` gives it, with a key of `GROUPS` for place; also "n_unparsed",
        "strict" (the same by the strict parser), and "compat" (`official_figures`), a list over
        seeds if there are several.
    """
    places = {
        place: [i for i, dimension in enumerate(dimensions) if dimension in members]
        for place, members in GROUPS.items()
    }

    def by(rule: Parser) -> dict[str, Any]:
        scored = {arm: _arm(answers, labels, rule) for arm, answers in arms.items()}
        found = summarise_places(scored, COUNTS, RATIOS, places, clusters, seed, draws)
        for entry in found.values():
            # Every question is in that place; without questions there is none.
            total = entry["counts"].get("discriminative", {})
            entry["n_unparsed"] = int(total.get("unparsed", 0))
        return found

    result = strict_beside(by, parser)
    for arm, entry in result.items():
        figures = [
            official_figures(
                *([column[i] for i in at] for column in (arms[arm], labels, dimensions))
            )
            for at in by_draw(draws, len(labels))
        ]
        entry["compat"] = figures if len(figures) > 1 else figures[0]
    return result


class AmberDiscriminative(YesNoTask):
    """The task: every question of AMBER's query files."""

    name = "amber_d"
    columns = (
        Column("accuracy", "accuracy", tested=True),
        Column("precision", "precision"),
        Column("recall", "recall"),
        Column("f1", "F1"),
    )
    open = AmberData.open
    answer_key = staticmethod(answer_key)

    def __init__(self, data: AmberData, options: Options) -> None:
        super().__init__(data, options)
        self._items = [item for item in data.items.values() if item.dimension != GENERATIVE]
        if unasked := [item.number for item in self._items if item.number not in data.queries]:
            raise BadInput(
                f"amber_d: {data.root} has no query for {len(unasked)} of {len(self._items)} "
                f"annotated questions: {few(unasked)}: put AMBER's query_all.json there"
            )
        self.images = list(dict.fromkeys(data.queries[item.number][0] for item in self._items))

    @cached_property
    def samples(self) -> list[Sample]:
        """The questions about the first pictures, in AMBER's order."""
        asked = set(self.images[: self.options.limit])
        return [
            Sample(
                task=self.name,
                split=item.dimension,
                sample_id=str(item.number),
                image=picture,
                image_id=picture,
                prompt=question + self.suffix,
                target=item.label,
            )
            for item in self._items
            for picture, question in [self.data.queries[item.number]]
            if picture in asked
        ]

    def scores(
        self,
        samples: Sequence[Sample],
        arms: Mapping[str, Sequence[str]],
        draws: Sequence[int] | None,
    ) -> dict[str, Any]:
        """The official script's figures stand next to them, too."""
        return score_questions(
            arms,
            [sample.target for sample in samples],
            [sample.split for sample in samples],
            [sample.image for sample in samples],
            self.parser,
            self.options.seed,
            draws,
        )
