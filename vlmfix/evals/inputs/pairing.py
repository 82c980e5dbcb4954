"""Answers in the order of the questions that they belong to."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from vlmfix.errors import BadInput
from vlmfix.evals.inputs.rows import Row, few, refuse_repeats

__all__ = ["answer_text", "located", "pair"]

#: Under which keys an answer stands: in our records, in POPE's and LLaVA's files, OPERA's captions,
#: HallusionBench's, PAI's.
ANSWER_KEYS = ("response", "answer", "text", "caption", "model_prediction", "ans")


def answer_text(row: Row) -> str:
    """The answer in a row; null reads as an empty one.

    Raises:
        BadInput: there is none, it is no text, or the row records a failure.
    """
    if row.values.get("error"):
        raise BadInput(f"{row.where} records a failure ({row.values['error']}): answer it first")
    return row.answer(*ANSWER_KEYS) or ""


def located(answers: Sequence[Row | Mapping[str, Any]], what: str) -> list[Row]:
    """Answers with the place where each stands; those from a file have one already."""
    return [
        answer if isinstance(answer, Row) else Row(f"{what}, row {n}", answer)
        for n, answer in enumerate(answers, start=1)
    ]


def pair(
    wanted: Sequence[Hashable],
    answers: Sequence[Row | Mapping[str, Any]],
    key: Callable[[Row], Hashable],
    what: str,
) -> list[Row]:
    """The answer rows in the order of the questions, given in any order.

    Args:
        wanted: what is asked.
        answers: the rows, of a file (`rows.read_rows`) or plain.
        key: what a row answers.
        what: what the rows hold, for messages.

    Raises:
        BadInput: answers that are missing, repeated, or to no question; the message lists them.
    """
    rows = located(answers, what)
    keys = [key(row) for row in rows]
    refuse_repeats(keys, what)
    found = dict(zip(keys, rows, strict=True))
    if missing := [one for one in wanted if one not in found]:
        raise BadInput(
            f"{what}: {len(missing)} of {len(wanted)} questions have no answer: {few(missing)}: "
            "answer all"
        )
    if extra := set(found) - set(wanted):
        raise BadInput(
            f"{what}: {len(extra)} answers belong to no question: {few(sorted(extra, key=str))}: "
            "score them with the questions that they were made for"
        )
    return [found[one] for one in wanted]
