"""Answer files as the world sends them: each gives a defined result, or an error that says where.

Every scorer takes the same file of good answers through the same mishaps.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vlmfix.errors import BadInput
from vlmfix.evals.amber import task as amber
from vlmfix.evals.amber.data import AmberData
from vlmfix.evals.chair import task as chair
from vlmfix.evals.chair.files import read_image_ids
from vlmfix.evals.hallusionbench import task as hallusionbench
from vlmfix.evals.inputs.parsers import PARSERS
from vlmfix.evals.inputs.rows import LONGEST_ANSWER, read_rows
from vlmfix.evals.mme import task as mme
from vlmfix.evals.mme.task import MmeQuestion
from vlmfix.evals.pope import task as pope
from vlmfix.evals.pope.builder import Question
from vlmfix.evals.pope.files import load_questions
from vlmfix.evals.rope import task as rope
from vlmfix.evals.rope.emoji import EmojiRope


@dataclass
class Scorer:
    """How one task's answers are read and scored.

    Args:
        load: file -> rows.
        score: rows -> results.
        rows: good answers.
        key: what tells the answers apart.
        complete: whether every question needs an answer.
    """

    load: Callable[[Path], Sequence[Any]]
    score: Callable[[Sequence[Any]], dict[str, Any]]
    rows: list[dict[str, Any]]
    key: str
    complete: bool = True

    def run(self, path: Path) -> dict[str, Any]:
        return self.score(self.load(path))


def pope_scorer(folder: Path) -> Scorer:
    questions = [
        Question(n, f"{n % 3}.jpg", f"Is there a thing{n} in the image?", "no" if n % 2 else "yes")
        for n in range(1, 7)
    ]
    return Scorer(
        pope.Pope.load_answers,
        lambda rows: pope.score_answers({"s": questions}, {"s": rows}),
        [{"question_id": q.question_id, "answer": "Yes"} for q in questions],
        "question_id",
    )


def chair_scorer(folder: Path) -> Scorer:
    truth = {image: frozenset({"dog"}) for image in range(1, 7)}
    return Scorer(
        partial(read_rows, what="CHAIR captions"),
        partial(chair.score_answers, truth),
        [{"image_id": i, "answer": f"A dog{' and a cup' * (i % 2)}."} for i in truth],
        "image_id",
        complete=False,
    )


def mme_scorer(folder: Path) -> Scorer:
    questions = [
        MmeQuestion(s, f"{s}/{n}.jpg", f"Is it {label}? Please answer yes or no.", label)
        for s in mme.SUBSETS
        for n in (1, 2)
        for label in ("yes", "no")
    ]
    rows = [{"image": q.image, "question": q.text, "answer": "Yes"} for q in questions]
    score = partial(mme.score_answers, SimpleNamespace(questions=questions))
    return Scorer(mme.load_answers, score, rows, "image")


def hallusion_scorer(folder: Path) -> Scorer:
    questions = [
        {
            "category": "VD",
            "subcategory": "chart",
            "visual_input": "1",
            "set_id": str(s),
            "figure_id": "1",
            "question_id": str(q),
            "question": "Is it?",
            "gt_answer": str(q % 2),
            "gt_answer_details": "",
            "filename": f"./hallusion_bench/VD/chart/{s}_1.png",
        }
        for s in range(3)
        for q in range(2)
    ]
    path = folder / "HallusionBench.json"
    path.write_text(json.dumps(questions))
    return Scorer(
        hallusionbench.HallusionBench.load_answers,
        partial(hallusionbench.score_answers, hallusionbench.HallusionData.open(path)),
        [{k: v for k, v in q.items() if "gt" not in k} | {"answer": "Yes"} for q in questions],
        "set_id",
    )


def amber_scorer(folder: Path) -> Scorer:
    kinds = ["discriminative-attribute-state", "discriminative-hallucination", "relation"] * 2
    annotations = [
        {"id": 1005 + n, "type": kind, "truth": "no" if n % 2 else "yes"}
        for n, kind in enumerate(kinds)
    ]
    (folder / "annotations.json").write_text(json.dumps(annotations))
    return Scorer(
        amber.Amber.load_answers,
        partial(amber.score_answers, AmberData.open(folder)),
        [{"id": row["id"], "response": "Yes"} for row in annotations],
        "id",
    )


def rope_scorer(folder: Path) -> Scorer:
    emoji = EmojiRope()
    source = SimpleNamespace(entries=emoji.entries[:4], prompts=None)
    return Scorer(
        rope.Rope.load_answers,
        partial(rope.score_answers, source),
        [
            {"sample_id": entry.image, "answer": ", ".join(f"obj{n}: dog" for n in range(1, 6))}
            for entry in source.entries
        ],
        "sample_id",
    )


SCORERS = {
    "pope": pope_scorer,
    "chair": chair_scorer,
    "mme": mme_scorer,
    "hallusionbench": hallusion_scorer,
    "amber": amber_scorer,
    "rope": rope_scorer,
}


@pytest.fixture(params=SCORERS)
def scorer(request: pytest.FixtureRequest, tmp_path: Path) -> Scorer:
    folder = tmp_path / "benchmark"
    folder.mkdir()
    return SCORERS[request.param](folder)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "answers.jsonl"


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def answer_key(scorer: Scorer) -> str:
    return "response" if "response" in scorer.rows[0] else "answer"


def refused(scorer: Scorer, path: Path) -> str:
    with pytest.raises(BadInput) as caught:
        scorer.run(path)
    return str(caught.value)


def test_forms_that_mean_the_same_score_the_same(scorer: Scorer, path: Path) -> None:
    path.write_text(lines(scorer.rows))
    plain = scorer.run(path)
    shuffled = random.Random(3).sample(scorer.rows, len(scorer.rows))
    assert shuffled != scorer.rows
    forms = {
        "order": lines(shuffled),
        "byte order mark": "\ufeff" + lines(scorer.rows),
        "Windows line ends": lines(scorer.rows).replace("\n", "\r\n"),
        "blank lines": "\n \n" + lines(scorer.rows).replace("\n", "\n\n"),
        "no last line end": lines(scorer.rows).rstrip("\n"),
        "list": json.dumps(scorer.rows),
        "list over many lines": "\n" + json.dumps(scorer.rows, indent=2),
        "other fields": lines([{**row, "note": [1, {"a": None}]} for row in scorer.rows]),
    }
    for form, text in forms.items():
        path.write_text(text, newline="")
        scores = scorer.run(path)["scores"]
        # Another order draws other bootstrap samples; the values are the same.
        assert values(scores) == values(plain["scores"]), form


def values(scores: Any) -> Any:
    if isinstance(scores, dict):
        if "value" in scores:
            return pytest.approx(scores["value"], abs=1e-12)
        return {key: values(value) for key, value in scores.items()}
    return scores


@pytest.mark.parametrize("answer", [None, "", "   \n"])
def test_no_answer_is_an_empty_answer(scorer: Scorer, path: Path, answer: str | None) -> None:
    rows = [{**row, answer_key(scorer): answer} for row in scorer.rows]
    path.write_text(lines(rows))
    results = scorer.run(path)
    text = json.dumps(results)
    assert "NaN" not in text and "Infinity" not in text
    assert '"empty"' in text or '"unparsed"' in text


@pytest.mark.parametrize(
    "answer", ["Ye\u2028s\u2029", "\u0000yes", "\U0001f600 no", "\x85no", "yes\ttab\\", "'`\"{}"]
)
def test_strange_characters_are_text(scorer: Scorer, path: Path, answer: str) -> None:
    rows = [{**row, answer_key(scorer): answer} for row in scorer.rows]
    path.write_text(lines(rows), encoding="utf-8")
    first = values(scorer.run(path)["scores"])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert values(scorer.run(path)["scores"]) == first
    path.write_text("".join(json.dumps({**row, "note": "\udcff"}) + "\n" for row in rows))
    assert values(scorer.run(path)["scores"]) == first


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "answers.jsonl is empty"),
        (b" \r\n\t\n", "answers.jsonl is empty"),
        (b"[]", "answers.jsonl holds no rows"),
        ('{"a": 1}'.encode("utf-16"), "answers.jsonl is UTF-16: save it as UTF-8"),
        (b"\xfe\xff\x00{", "answers.jsonl is UTF-16: save it as UTF-8"),
        (b"GOODGOOD\x00", "is not JSON"),
        (b"\x00" * 100, "line 1 is not JSON"),
        (b'{"note": "a\x00b"}', "line 1 is not JSON (Invalid control character"),
        (b"GOOD{", "line {n1} is not JSON"),
        (b"GOOD\xe9", "line {n1} is not UTF-8 (byte 0xe9)"),
        (b"\xc3\x28GOOD", "line 1 is not UTF-8 (byte 0xc3)"),
        (b"GOOD5", "line {n1} is no JSON object but 5"),
        (b'GOOD"text"', "line {n1} is no JSON object but 'text'"),
        (b"GOODnull", "line {n1} is no JSON object but None"),
        (b"GOOD[1]", "line {n1} is no JSON object but [1]"),
        (b"[1, 2]", "item 1 is no JSON object but 1"),
        (b"GOODNaN", "line {n1} is no JSON object but nan"),
        (b'GOOD{"a": 1} {"b": 2}', "line {n1} is not JSON (Extra data"),
        (b"yes\nno\n", "line 1 is not JSON"),
        (b"<html>", "line 1 is not JSON"),
        (b"PK\x03\x04\x14\x00\xff", "line 1 is not UTF-8 (byte 0xff)"),
        (b'GOOD{"a": ' + b"9" * 5000 + b"}", "line {n1} is not usable JSON"),
        (b'GOOD{"a": ' + b"[" * 200_000, "line {n1} is nested too deeply"),
        (b"[" * 200_000, "answers.jsonl is nested too deeply"),
    ],
)
def test_what_is_no_file_of_answers_says_where(
    scorer: Scorer, path: Path, content: bytes, message: str
) -> None:
    good = lines(scorer.rows).encode()
    path.write_bytes(content.replace(b"GOOD", good))
    assert message.replace("{n1}", str(len(scorer.rows) + 1)) in refused(scorer, path)


@pytest.mark.parametrize(
    "answer", [5, 1.5, float("nan"), float("inf"), True, False, ["Yes"], {"text": "Yes"}, []]
)
def test_an_answer_that_is_no_text_says_where(scorer: Scorer, path: Path, answer: Any) -> None:
    rows = [dict(row) for row in scorer.rows]
    rows[2][answer_key(scorer)] = answer
    path.write_text(lines(rows))
    message = refused(scorer, path)
    assert "answers.jsonl, line 3: " in message and "answers are text" in message


def test_a_row_without_an_answer_says_where(scorer: Scorer, path: Path) -> None:
    rows = [dict(row) for row in scorer.rows]
    del rows[1][answer_key(scorer)]
    path.write_text(lines(rows))
    assert "answers.jsonl, line 2 has no " in refused(scorer, path)


def test_a_recorded_failure_is_no_answer(scorer: Scorer, path: Path) -> None:
    rows = [dict(row) for row in scorer.rows]
    rows[1] |= {answer_key(scorer): None, "error": "OutOfMemoryError: 12 GiB"}
    path.write_text(lines(rows))
    assert "answers.jsonl, line 2 records a failure" in refused(scorer, path)


@pytest.mark.parametrize(
    "key", [None, float("nan"), 1e400, [1], {"a": 1}, True, "", "x" * 10_000, -1, 2.5]
)
def test_an_answer_to_something_else_is_refused(scorer: Scorer, path: Path, key: Any) -> None:
    rows = [dict(row) for row in scorer.rows]
    rows[1][scorer.key] = key
    path.write_text(lines(rows))
    message = refused(scorer, path)
    assert len(message) < 2000


def test_an_answer_to_nothing_is_refused(scorer: Scorer, path: Path) -> None:
    rows = [dict(row) for row in scorer.rows]
    del rows[1][scorer.key]
    path.write_text(lines(rows))
    refused(scorer, path)


def test_repeated_answers(scorer: Scorer, path: Path) -> None:
    path.write_text(lines([*scorer.rows, scorer.rows[0]]))
    if scorer.complete:
        assert "1 repeated" in refused(scorer, path)
        return
    # Captions: the last counts, aloud.
    with pytest.warns(UserWarning, match="only the last of each counts"):
        results = scorer.run(path)
    assert results["repeated"] == 1


def test_missing_answers(scorer: Scorer, path: Path) -> None:
    path.write_text(lines(scorer.rows[1:]))
    if scorer.complete:
        assert "have no answer" in refused(scorer, path)
    else:
        assert scorer.run(path)["n_images"] == len(scorer.rows) - 1


def test_answers_beyond_the_questions(scorer: Scorer, path: Path) -> None:
    stranger = {**scorer.rows[0]}
    stranger[scorer.key] = 987654 if isinstance(stranger[scorer.key], int) else "987654"
    path.write_text(lines([*scorer.rows, stranger]))
    assert "987654" in refused(scorer, path)


def test_files_that_cannot_be_read(scorer: Scorer, tmp_path: Path) -> None:
    assert "cannot read" in refused(scorer, tmp_path / "absent.jsonl")
    folder = tmp_path / "folder.jsonl"
    folder.mkdir()
    assert "folder.jsonl" in refused(scorer, folder)


LONG = {
    "letters": "a",
    "words": "dog ",
    "spaces": " ",
    "line ends": "\n",
    "brackets": "<",
    "opened": "<a",
    "quotes": '"',
    "apostrophes": "a'",
    "stops": ".",
    "stops apart": ". ",
    "exclamations": '!")',
    "dashes": "a-",
    "commas": "no, ",
    "pairs": "obj1: a, ",
    "questions": "is there ",
}


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_the_longest_answers_are_read_in_linear_time(scorer: Scorer, path: Path) -> None:
    """Against patterns that try every end for every beginning."""
    rows = [dict(row) for row in scorer.rows]
    started = time.process_time()
    for first in range(0, len(LONG), len(rows)):
        units = list(LONG.values())[first : first + len(rows)]
        for row, unit in zip(rows, units, strict=False):
            row[answer_key(scorer)] = unit * (LONGEST_ANSWER // len(unit))
        path.write_text(lines(rows))
        scorer.run(path)
    # A quadratic pattern takes minutes at this length.
    assert time.process_time() - started < 20
    rows[0][answer_key(scorer)] = "a" * (LONGEST_ANSWER + 1)
    path.write_text(lines(rows))
    assert "answers.jsonl, line 1: " in (message := refused(scorer, path))
    assert f"has {LONGEST_ANSWER + 1:,} characters" in message


@pytest.mark.parametrize("kind", LONG)
def test_parsers_read_the_longest_answers_in_linear_time(kind: str) -> None:
    unit = LONG[kind]
    answer = unit * (LONGEST_ANSWER // len(unit))
    started = time.process_time()
    for parser in PARSERS.values():
        parser(answer, "yes")
        parser(answer + "x", "no")
    chair.whole_sentences(answer + "x")
    chair.first_words(answer + "x", 64)
    assert time.process_time() - started < 10


@pytest.mark.parametrize("kind", ["questions", "spaces", "words", "line ends"])
def test_long_questions_are_read_in_linear_time(path: Path, tmp_path: Path, kind: str) -> None:
    unit = LONG[kind]
    text = "q" + unit * (LONGEST_ANSWER // len(unit) - 1)
    row = {"question_id": 1, "image": "1.jpg", "text": text, "label": "yes"}
    started = time.process_time()
    path.write_text(json.dumps(row))
    questions = load_questions(path).questions
    answers = [{"image": "1.jpg", "question": text, "answer": "yes"}]
    assert pope.score_answers({"s": questions}, {"s": answers})["counts"]["s"]["correct"] == 1
    asked = MmeQuestion("count", "count/1.jpg", text, "yes").asked
    assert asked.startswith("q")
    assert time.process_time() - started < 10


@pytest.mark.timeout(120)
def test_a_line_of_100_megabytes(tmp_path: Path, path: Path) -> None:
    scorer = pope_scorer(tmp_path)
    with path.open("w") as file:
        file.write(lines(scorer.rows[1:]))
        file.write(json.dumps({**scorer.rows[0], answer_key(scorer): "a" * 100_000_000}))
    started = time.process_time()
    message = refused(scorer, path)
    assert f"line {len(scorer.rows)}: " in message and "100,000,000 characters" in message
    assert time.process_time() - started < 20


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", ["pope", "chair"])
def test_a_hundred_thousand_lines(tmp_path: Path, path: Path, name: str) -> None:
    """A million take ten times as long (`test_a_million_lines`)."""
    scorer = SCORERS[name](tmp_path)
    stranger = json.dumps({**scorer.rows[0], "note": "n"}) + "\n"
    path.write_text(lines(scorer.rows) + stranger * 100_000)
    started = time.process_time()
    if scorer.complete:
        assert "repeated" in refused(scorer, path)
    else:
        with pytest.warns(UserWarning, match="100006 captions of 6 images"):
            scorer.run(path)
    assert time.process_time() - started < 20


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_million_lines(path: Path) -> None:
    path.write_text("".join(f'{{"question_id": {n}, "answer": "Yes"}}\n' for n in range(10**6)))
    started = time.process_time()
    assert len(read_rows(path, "answers")) == 10**6
    assert time.process_time() - started < 60


def test_questions_and_lists_of_images_are_read_as_strictly(path: Path) -> None:
    for content, message in [
        (b"", "is empty"),
        ("x".encode("utf-16"), "is UTF-16"),
        (b"\xff", "line 1 is not UTF-8"),
        (b'{"image": "a", "text": "?", "label": NaN}', "line 1: the label nan"),
        (b'{"image": "a", "text": "?", "label": []}', "line 1: the label []"),
        (b'{"image": "a", "text": 5, "label": "yes"}', "line 1: needs `image` and `text`"),
        (b'{"image": null, "text": "?", "label": "yes"}', "line 1: needs `image` and `text`"),
        (b'{"image": "a", "text": "?", "label": "yes", "question_id": NaN}', "line 1: question_id"),
        (
            b'{"image": "a", "text": "?", "label": "yes", "question_id": true}',
            "line 1: question_id",
        ),
        (b'{"image": "a", "text": "?", "label": "yes", "question_id": "1e3"}', "no whole number"),
    ]:
        path.write_bytes(content)
        with pytest.raises(BadInput) as caught:
            load_questions(path)
        assert message in str(caught.value) and "answers.jsonl" in str(caught.value)
    path.write_bytes("1\n2".encode("utf-16"))
    with pytest.raises(BadInput, match="is UTF-16"):
        read_image_ids(path)


def test_the_limit_of_nesting_is_the_same_everywhere(path: Path) -> None:
    """Python's own limit is on the machine's stack; what is no error is at least read."""
    depth = min(500, sys.getrecursionlimit() // 2)
    path.write_text('{"a": ' + "[" * depth + "]" * depth + "}")
    assert len(read_rows(path, "answers")) == 1
