"""Tasks of yes/no questions: how an answer reads and counts, scores, the strict rule next to them.

`YesNoTask` alone scores as POPE does. A benchmark with figures of its own overrides
`YesNoTask.scores`, and builds its counts on `count_answer`, `count_groups` and `complete`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, ClassVar

from vlmfix.evals.inputs.parsers import Parser, get_parser
from vlmfix.evals.inputs.prompts import suffix
from vlmfix.evals.options import Options
from vlmfix.evals.scoring.groups import by_draw
from vlmfix.evals.scoring.metrics import Arm, Ratio, counts_table, summarise
from vlmfix.evals.tasks import Answer, Column, Sample, Task

__all__ = [
    "COUNTS",
    "RATIOS",
    "YesNoTask",
    "complete",
    "count_answer",
    "count_groups",
    "read_answers",
    "strict_beside",
]

COUNTS = ("n", "correct", "tp", "fp", "tn", "fn", "yes", "unparsed", "empty")
RATIOS = (
    Ratio("accuracy", {"correct": 1}, {"n": 1}, proportion=True),
    Ratio("precision", {"tp": 1}, {"tp": 1, "fp": 1}, proportion=True),
    Ratio("recall", {"tp": 1}, {"tp": 1, "fn": 1}, proportion=True),
    # 2PR/(P+R) without its detour; undefined where P + R is 0, that is, without a true positive.
    Ratio("f1", {"tp": 2}, {"tp": 2, "fp": 1, "fn": 1}, defined_if=("tp",)),
    Ratio("yes_ratio", {"yes": 1}, {"n": 1}, proportion=True),
)


def count_answer(answer: str, label: str, parser: Parser) -> dict[str, float]:
    """What one answer counts as in every yes/no task, and in the cells of POPE's table."""
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
        "empty": not answer.strip(),
    }


def read_answers(
    answers: Sequence[str], labels: Sequence[str], parser: Parser
) -> tuple[list[dict[str, float]], list[bool]]:
    """The counts of every answer, which equal ones share, and whether it is right."""
    # Most answers are the same few words. So the rows are shared, and not to be changed.
    known: dict[tuple[str, str], dict[str, float]] = {}
    rows = []
    for pair in zip(answers, labels, strict=True):
        if pair not in known:
            known[pair] = count_answer(*pair, parser)
        rows.append(known[pair])
    return rows, [bool(row["correct"]) for row in rows]


def count_groups(
    rows: list[dict[str, float]],
    draws: Sequence[int] | None,
    group_of: Callable[[int], Hashable | None],
    total: str,
    right: str,
) -> None:
    """Count groups of answers, such as the two about one image, in the rows of `read_answers`.

    Args:
        rows: counts; the row of a group's first answer gets those of the group.
        draws: the seed of every answer; None: one answer to each question.
        group_of: index of an answer -> its group; None: it is in none.
        total: count of groups.
        right: count of groups whose answers are all right.
    """
    for at in by_draw(draws, len(rows)):
        groups: dict[Hashable, list[int]] = {}
        for i in at:
            if (group := group_of(i)) is not None:
                groups.setdefault(group, []).append(i)
        for members in groups.values():
            counts = {total: 1, right: all(rows[i]["correct"] for i in members)}
            rows[members[0]] = {**rows[members[0]], **counts}


def complete(
    groups: Sequence[Hashable], sizes: Mapping[Any, int], draws: Sequence[int] | None
) -> list[int]:
    """Indices of the answers whose group has all of its answers.

    Args:
        groups: the group of every answer.
        sizes: group -> how many answers it has when none failed.
        draws: the seed of every answer; None: one answer to each question.
    """
    keys = [(draws[i] if draws else 0, group) for i, group in enumerate(groups)]
    answered = Counter(keys)
    return [i for i, key in enumerate(keys) if answered[key] == sizes[key[1]]]


def strict_beside(by: Callable[[Parser], dict[str, Any]], parser: Parser) -> dict[str, Any]:
    """Arm -> scores by this parser, and under "strict" those by the strict one."""
    result, strict = by(parser), by(get_parser("strict"))
    for arm, entry in result.items():
        entry["strict"] = strict[arm]
    return result


class YesNoTask(Task):
    """A task whose targets are "yes" and "no"; to be added: `open`, `samples`.

    Attributes:
        parser: reads the answers.
        suffix: what the prompt style adds to a question.
    """

    max_new_tokens = 16
    columns: ClassVar[tuple[Column, ...]] = (
        Column("accuracy", "accuracy", tested=True),
        Column("f1", "F1"),
        Column("yes_ratio", "yes"),
    )
    wants_p_yes = True
    several_parsers = True

    def __init__(self, data: Any, options: Options) -> None:
        super().__init__(data, options)
        self.parser, self.suffix = get_parser(options.parser), suffix(options.prompt_style)

    @property
    def facts(self) -> dict[str, Any]:
        """Prompt style and parser."""
        return {"prompt_style": self.options.prompt_style, "parser": self.parser.name}

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
        """Scores by the task's parser, with those of the strict one next to them."""
        texts = {arm: [answer.text for answer in answers] for arm, answers in arms.items()}
        return self.scores(samples, texts, draws)

    def scores(
        self,
        samples: Sequence[Sample],
        arms: Mapping[str, Sequence[str]],
        draws: Sequence[int] | None,
    ) -> dict[str, Any]:
        """`score`, of the answers' texts."""
        labels = [sample.target for sample in samples]

        def by(parser: Parser) -> dict[str, Any]:
            scored = {}
            for arm, texts in arms.items():
                rows, right = read_answers(texts, labels, parser)
                scored[arm] = Arm(counts_table(rows, COUNTS), right)
            found = summarise(
                scored,
                COUNTS,
                RATIOS,
                splits=[sample.split for sample in samples],
                clusters=[sample.image for sample in samples],
                seed=self.options.seed,
                # For tests between arms alone.
                requests=[(sample.image, sample.prompt) for sample in samples]
                if len(scored) > 1
                else None,
                draws=draws,
            )
            for entry in found.values():
                counts = entry["counts"]
                entry["n_unparsed"] = int(
                    sum(place["unparsed"] for name, place in counts.items() if name != "pooled")
                )
            return found

        return strict_beside(by, self.parser)
