"""POPE questions and answers from files, in the spellings that published copies use.

Questions come as JSON Lines or a JSON list (RUCAIBox/POPE, OPERA, LLaVA, VCD, RITUAL; COCO, A-OKVQA
and GQA alike), as one row per image whose six questions are turns of one conversation (PAI), and as
tables with a category column (lmms-eval's hub set, VLMEvalKit's .tsv; `pope_tables.py`).

What a question asks about is its object: "Is there an orange in the imange?", as the template bug
of POPE's generator writes it, and "... in the image?" are one question, with any suffix.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from sys import intern
from typing import Any

from vlmfix.errors import BadInput
from vlmfix.evals.inputs.pairing import answer_text, located, pair
from vlmfix.evals.inputs.rows import Row, read_rows, refuse_repeats, short
from vlmfix.evals.pope.builder import Question

__all__ = [
    "QuestionFile",
    "answer_splits",
    "asked_object",
    "image_name",
    "load_questions",
    "load_splits",
    "pair_answers",
    "pair_rows",
    "question_splits",
]

_LABELS = {"yes": "yes", "no": "no", "1": "yes", "0": "no", "true": "yes", "false": "no"}
_VARIANTS = {
    3000: "full split, 500 images x 6",
    2910: "OPERA/LLaVA random split: the full one without 90 of its 'no' rows",
    9000: "three full splits in one",
    8910: "OPERA/LLaVA: three splits in one, the random one without 90 of its 'no' rows",
}
#: Under which keys an answer repeats its question.
_ASKED = ("query", "question", "prompt")
_OBJECT = re.compile(r"\bis there (?:an? )?(.{1,80}?) in the (?:image|imange|picture|photo)\b")
_PLAIN = re.compile(r"(\w+)\.\w+")
_COCO_NAME = re.compile(r"COCO_(?:train|val)2014_\d{12}")


@dataclass(frozen=True)
class QuestionFile:
    """The POPE questions of one split.

    Args:
        questions: its rows.
        variant: which of the published variants its size suggests.
        follows: question_id -> question_id of the turn before, in conversations.
    """

    questions: list[Question]
    variant: str
    follows: Mapping[int, int] = field(default_factory=dict)


def asked_object(text: str) -> str:
    """What a POPE question asks about, in lower case; the text itself if it is no such question."""
    return _known_object(text) if len(text) <= _USUAL else _object(text)


def _object(text: str) -> str:
    found = _OBJECT.search(text.lower())
    return found[1] if found else " ".join(text.lower().split())


#: Few different questions are asked, of many images.
_known_object = lru_cache(maxsize=1 << 14)(_object)
#: Longest question that is remembered, in characters.
_USUAL = 200


def load_questions(path: str | Path) -> QuestionFile:
    """The questions of a file that holds one split.

    Keys: `image`; `text` or `question`; `label` or `answer` (yes/no, Yes/No, 0/1, true/false);
    `question_id` or `index` (counted from 1 where absent). In a conversation `text` and `label` are
    lists of equal length.

    Raises:
        BadInput: no such file, a broken row (named by its line), a repeated question_id, or several
            splits.
    """
    splits = load_splits(path)
    if len(splits) > 1:
        raise BadInput(
            f"{path} holds the splits {', '.join(splits)}: choose one (random={path}) or take all "
            f"of them (all={path})"
        )
    (file,) = splits.values()
    return file


def load_splits(path: str | Path) -> dict[str, QuestionFile]:
    """Split -> questions, as the file's own `category` column says; one split "" without it.

    A category such as "random,popular" puts its row into both splits (VLMEvalKit).

    Raises:
        BadInput: as `load_questions`.
    """
    return question_splits(read_rows(path, "POPE questions"), str(path))


def question_splits(rows: Sequence[Row], source: str) -> dict[str, QuestionFile]:
    """Split -> questions of rows that were read already, as `load_splits` says.

    Args:
        rows: with the keys of `load_questions`, and `category`.
        source: where they come from, for messages.

    Raises:
        BadInput: as `load_questions`.
    """
    found: dict[str, list[tuple[Question, int | None]]] = {}
    for number, row in enumerate(rows, start=1):
        names = str(row.values.get("category") or "").split(",")
        for question, turn_before in _questions(row, number):
            for split in names:
                found.setdefault(split.strip(), []).append((question, turn_before))
    if len(found) > 1 and "" in found:
        raise BadInput(f"{source}: some rows have a `category` and some have none")
    return {split: _file(turns, source, split) for split, turns in found.items()}


def _questions(row: Row, number: int) -> list[tuple[Question, int | None]]:
    """The question of a row, or the turns of a conversation, each with the turn before it."""
    text, label = row.first("text", "question"), row.first("label", "answer")
    name = image_name(row.first("image_source", "image_path", "image"))
    if name is None or not isinstance(text, (str, list)):
        raise BadInput(
            f"{row.where}: needs `image` and `text` (or `question`): {short(row.values)}"
        )
    if isinstance(text, str):
        keys = [key for key in ("question_id", "index") if key in row.values]
        question_id = row.number(keys[0]) if keys else number
        # Many rows ask the same of one image after the other, and each has strings of its own.
        return [(Question(question_id, intern(name), intern(text), _label(label, row)), None)]
    if not isinstance(label, list) or len(label) != len(text) or not text:
        raise BadInput(f"{row.where}: `text` and `label` must be lists of the same length")
    first = (number - 1) * len(text) + 1
    turns = []
    for turn, (one, truth) in enumerate(zip(text, label, strict=True)):
        if not isinstance(one, str):
            raise BadInput(f"{row.where}: turn {turn + 1} asks {short(one)}, which is no text")
        question = Question(first + turn, name, one, _label(truth, row))
        turns.append((question, first + turn - 1 if turn else None))
    return turns


def image_name(value: object) -> str | None:
    """File name of a picture; hub sets name COCO's without their ending. None: it is no name."""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        return None
    return f"{value}.jpg" if _COCO_NAME.fullmatch(str(value)) else str(value)


def _label(label: Any, row: Row) -> str:
    normal = _LABELS.get(str(label).strip().lower()) if isinstance(label, (str, int)) else None
    if normal is None:
        raise BadInput(f"{row.where}: the label {short(label)} is neither yes nor no (nor 1 nor 0)")
    return normal


def _file(turns: Sequence[tuple[Question, int | None]], source: str, split: str) -> QuestionFile:
    questions = [question for question, _ in turns]
    where = f"{source}, split {split}" if split else source
    refuse_repeats([q.question_id for q in questions], f"{where}: question_id")
    follows = {q.question_id: before for q, before in turns if before is not None}
    variant = _VARIANTS.get(len(questions), f"{len(questions)} rows, no published size")
    typos = sum("imange" in q.text for q in questions)
    notes = [f"{typos} rows read 'imange'"] if typos else []
    if follows:
        notes.append(f"{len(questions) - len(follows)} conversations")
    return QuestionFile(questions, "; ".join([variant, *notes]), follows)


def answer_splits(rows: Sequence[Row], splits: Sequence[str]) -> dict[str, list[Row]]:
    """Split -> its answers, as the rows' own `split` or `category` says.

    Args:
        rows: of one file.
        splits: of the questions; with a single one, rows need not name it.

    Raises:
        BadInput: rows that name no split, or one that is not among the questions.
    """
    found: dict[str, list[Row]] = {split: [] for split in splits}
    for row in rows:
        name = row.first("split", "category")
        if name is None and len(splits) == 1:
            name = splits[0]
        if not isinstance(name, str) or name not in found:
            raise BadInput(
                f"{row.where} is of the split {short(name)}: name one of {', '.join(splits)} under "
                "`split` or `category`, or score one split at a time"
            )
        found[name].append(row)
    return found


def pair_answers(
    questions: Sequence[Question], answers: Sequence[Row | Mapping[str, Any]]
) -> list[str]:
    """The texts of `pair_rows`."""
    return [answer_text(row) for row in pair_rows(questions, answers)]


def pair_rows(
    questions: Sequence[Question], answers: Sequence[Row | Mapping[str, Any]]
) -> list[Row]:
    """Answers in the order of the questions, given in any order.

    Where all answers name their image and question, they are paired by image and object: the ids of
    the 2910 and the 3000 rows of the random split differ. Otherwise by `question_id`; and where
    they have neither, as those of the official code, by order, if every answer repeats the
    question that stands there.

    Args:
        questions: of one split.
        answers: rows; the answer under `answer`, `response`, `text` or `ans`, the question under
            `query`, `question` or `prompt`, with or without a suffix. Next to a `query`, PAI's
            `question` is the whole chat. A `label`, where there is one, has to be the question's.

    Raises:
        BadInput: answers that are missing, repeated, or to other questions; the message lists them.
    """
    what = "POPE answers"
    rows = located(answers, what)
    asked = [row.first(*_ASKED) for row in rows]
    images = [row.first("image") for row in rows]
    by_content = [(_stem(q.image), asked_object(q.text)) for q in questions]
    if _texts(asked) and _texts(images) and len(set(by_content)) == len(questions):
        paired = pair(
            by_content,
            rows,
            lambda row: (_stem(row.first("image")), asked_object(row.text(*_ASKED))),
            what,
        )
    elif all("question_id" in row.values for row in rows):
        ids = [q.question_id for q in questions]
        paired = pair(ids, rows, lambda row: row.number("question_id"), what)
        _refuse_other_questions(questions, paired)
    elif _texts(asked) and len(rows) == len(questions):
        _refuse_other_questions(questions, paired := rows)
    else:
        raise BadInput(
            f"{len(rows)} answers to {len(questions)} questions say neither image and question "
            "nor question_id: write one of these with every answer"
        )
    _refuse_other_truths(questions, paired)
    return paired


def _texts(values: Iterable[object]) -> bool:
    return all(isinstance(value, str) for value in values)


def _stem(image: object) -> str:
    name = str(image)
    # Paths are slow to make, and nearly all names are file names with one ending.
    plain = _PLAIN.fullmatch(name)
    return intern(plain[1] if plain else PurePosixPath(name).stem)


def _refuse_other_questions(questions: Sequence[Question], rows: Sequence[Row]) -> None:
    """Raise BadInput if an answer repeats another question than the one that it stands for."""
    for question, row in zip(questions, rows, strict=True):
        text = row.first(*_ASKED)
        if isinstance(text, str) and asked_object(text) != asked_object(question.text):
            raise BadInput(
                f"{row.where} answers {short(text)}, but the question there is "
                f"{short(question.text)}: these answers were made for another question file"
            )


def _refuse_other_truths(questions: Sequence[Question], rows: Sequence[Row]) -> None:
    """Raise BadInput if an answer repeats another truth than that of its question."""
    for question, row in zip(questions, rows, strict=True):
        if "label" in row.values and (said := _label(row.values["label"], row)) != question.label:
            raise BadInput(
                f"{row.where}: the label is {said}, and that of the question {short(question.text)}"
                f" is {question.label}: these answers were made for another question file"
            )
