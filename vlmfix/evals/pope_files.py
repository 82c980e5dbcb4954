"""POPE questions and answers from files, in the spellings that published copies use."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmfix.errors import BadInput
from vlmfix.evals.pope_builder import Question

__all__ = ["QuestionFile", "load_questions", "pair_answers"]

_LABELS = {"yes": "yes", "no": "no", "1": "yes", "0": "no", "true": "yes", "false": "no"}
_VARIANTS = {
    3000: "full split, 500 images x 6",
    2910: "OPERA/LLaVA random split: the full one without 90 of its 'no' rows",
}


@dataclass(frozen=True)
class QuestionFile:
    """A POPE question file.

    Args:
        questions: its rows.
        variant: which of the published variants its size suggests.
    """

    questions: list[Question]
    variant: str


def load_questions(path: str | Path) -> QuestionFile:
    """Read POPE questions: JSON lines or a JSON list, with the keys of any published copy.

    Keys: `image`; `text` or `question`; `label` or `answer` (yes/no, Yes/No, 0/1); `question_id`
    (counted from 1 where absent).

    Raises:
        BadInput: no such file, a broken row (named by its number), or a repeated question_id.
    """
    path = Path(path)
    questions = []
    for number, row in enumerate(_rows(path), start=1):
        where = f"{path}, row {number}"
        text, label = row.get("text", row.get("question")), row.get("label", row.get("answer"))
        if not isinstance(text, str) or "image" not in row:
            raise BadInput(f"{where}: needs `image` and `text` (or `question`): {row}")
        normal = _LABELS.get(str(label).strip().lower())
        if normal is None:
            raise BadInput(f"{where}: the label {label!r} is neither yes nor no (nor 1 nor 0)")
        try:
            question_id = int(row.get("question_id", number))
        except (TypeError, ValueError):
            raise BadInput(f"{where}: question_id {row['question_id']!r} is no number") from None
        questions.append(Question(question_id, str(row["image"]), text, normal))
    _refuse_repeats([q.question_id for q in questions], f"{path}: question_id")
    typos = sum("imange" in q.text for q in questions)
    variant = _VARIANTS.get(len(questions), f"{len(questions)} rows, no published size")
    return QuestionFile(questions, variant + (f"; {typos} rows read 'imange'" if typos else ""))


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise BadInput(f"POPE questions: cannot read {path} ({error.strerror})") from None
    try:
        # The published files are JSON lines in spite of their name.
        whole = text.lstrip().startswith("[")
        rows = json.loads(text) if whole else [json.loads(x) for x in text.splitlines() if x]
    except json.JSONDecodeError as error:
        raise BadInput(f"{path} is neither JSON lines nor a JSON list ({error})") from None
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise BadInput(f"{path} holds no question rows: expected one JSON object per question")
    return list(rows)


def _refuse_repeats(keys: Iterable[object], what: str) -> None:
    seen: set[object] = set()
    repeated = {key: None for key in keys if key in seen or seen.add(key)}  # type: ignore[func-returns-value]
    if repeated:
        raise BadInput(f"{what}: {len(repeated)} repeated: {_few(repeated)}: remove the copies")


def _few(keys: Iterable[object]) -> str:
    names = [str(key) for key in keys]
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")


def pair_answers(
    questions: Sequence[Question], answers: Sequence[Mapping[str, Any]]
) -> list[str | None]:
    """Answers in the order of the questions, whatever order they came in.

    Args:
        questions: of one split.
        answers: rows with `question_id`, or with `image` and `question` (or `prompt`) where ids are
            absent; the answer under `answer`, `response` or `text`.

    Raises:
        BadInput: answers that are missing, repeated, or to no question; the message lists them.
    """
    by_id = all("question_id" in row for row in answers)
    found: dict[object, str | None] = {}
    keys: list[object] = []
    for number, row in enumerate(answers, start=1):
        prompt = row.get("question", row.get("prompt"))
        keys.append(int(row["question_id"]) if by_id else (row.get("image"), prompt))
        texts = [row[key] for key in ("answer", "response", "text") if key in row]
        if not texts:
            raise BadInput(f"answer row {number} has no `answer`, `response` or `text`: {row}")
        found[keys[-1]] = texts[0]
    _refuse_repeats(keys, "answers")
    wanted = [q.question_id if by_id else (q.image, q.text) for q in questions]
    if missing := [key for key in wanted if key not in found]:
        raise BadInput(
            f"{len(missing)} of {len(wanted)} questions have no answer: {_few(missing)}: answer all"
        )
    if extra := set(found) - set(wanted):
        raise BadInput(
            f"{len(extra)} answers belong to no question: {_few(sorted(extra, key=str))}: score "
            "them with the question file that they were made for"
        )
    return [found[key] for key in wanted]
