"""`vlmfix score` and `vlmfix report` as commands."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from test_evals_score import answers, questions, write

from vlmfix.cli.main import main


def command(*arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    out, err, code = StringIO(), StringIO(), 0
    with (
        mock.patch.object(sys, "argv", ["vlmfix", *map(str, arguments)]),
        mock.patch.dict(os.environ, COLUMNS="120", NO_COLOR="1"),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, out.getvalue(), " ".join(err.getvalue().split())


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    asked = questions(60)
    return {
        "questions": write(tmp_path / "q.json", asked),
        "base": write(tmp_path / "base.jsonl", answers(asked, lambda i: i % 4 > 0)),
        "method": write(tmp_path / "method.jsonl", answers(asked, lambda i: i % 6 > 0)),
    }


def test_score_then_report(files: dict[str, Path], tmp_path: Path) -> None:
    arguments = ("score", "pope", "--answers", f"random={files['method']}")
    pair = ("--baseline", f"random={files['base']}", "--questions", f"random={files['questions']}")
    code, out, _ = command(*arguments, *pair, "--output", tmp_path / "scored")
    assert code == 0
    assert "75.0" in out and "83.3" in out and "written to" in out
    code, out, _ = command("report", tmp_path / "scored", "--no-plots")
    assert code == 0 and "card.md" in out
    card = (tmp_path / "scored" / "card.md").read_text()
    assert "| base | 75.0 [" in card and "| method | 83.3 [" in card

    code, _, err = command(*arguments, *pair, "--output", tmp_path / "scored")
    assert code == 2 and "is not empty" in err
    code, out, _ = command(*arguments, *pair, "--json")
    assert json.loads(out)["tasks"]["pope"]["n_samples"] == 60


def test_all_parsers(files: dict[str, Path]) -> None:
    code, out, _ = command(
        "score", "pope", "--answers", files["base"], "--questions", files["questions"],
        "--parser", "all",
    )  # fmt: skip
    assert code == 0
    for name in ("official", "opera", "lmms_eval", "vlmevalkit", "vcd", "strict"):
        assert f" {name} " in out
    assert "unparsed" in out and "empty" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("score", "pope", "--answers", "nowhere.jsonl"), "cannot read nowhere.jsonl"),
        (("score", "pope", "--answers", "a", "--answers", "b"), "several files for one split"),
        (("report", "nowhere"), "nowhere is no folder"),
        (("eval", "--suite", "huge"), "no suite 'huge'"),
        (("eval", "pope", "--suite", "quick"), "--suite quick settles TASK"),
        (("eval", "--suite", "quick", "--images", "3"), "--suite quick settles --images"),
    ],
)
def test_refusals(arguments: tuple[Any, ...], says: str) -> None:
    code, out, err = command(*arguments)
    assert code == 2 and out == ""
    assert says in err


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_encoding_of_stdout(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    """Tables have a delta sign, and file names may have any character, half ones too."""
    named = tmp_path / "\u4f60\xe9.jsonl"
    named.write_bytes(files["method"].read_bytes())
    both = ["--answers", named, "--baseline", files["base"], "--questions", files["questions"]]
    for more in ([], ["--json"]):
        stdout = TextIOWrapper(BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stdout)
        monkeypatch.setattr(sys, "argv", ["vlmfix", "score", "pope", *map(str, [*both, *more])])
        monkeypatch.setenv("COLUMNS", "120")
        main_ends()
        stdout.flush()
        text = stdout.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
        if more:
            assert json.loads(text)["config"]["answers"]["method"] == named.name
        else:
            assert (named.name if encoding == "utf-8" else "\\u4f60") in text


def main_ends() -> None:
    try:
        main()
    except SystemExit as stop:
        assert not stop.code
