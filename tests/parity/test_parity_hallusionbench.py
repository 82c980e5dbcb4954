"""HallusionBench's published rows: how they group, and constant answers counted by hand."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from vlmfix.evals.hallusionbench.task import HallusionData, score_answers


@pytest.fixture(scope="module")
def rows(golden: Path) -> list[dict[str, Any]]:
    path = golden / "hallusionbench" / "HallusionBench_subset.json"
    found: list[dict[str, Any]] = json.loads(path.read_text())
    assert len(found) == 196
    return found


def by_reference(rows: list[dict[str, Any]], answer: str) -> dict[str, float]:
    """The keys of utils.py, as text joined by underscores."""
    questions, figures = defaultdict(list), defaultdict(list)
    right = [row["gt_answer"] == ("1" if answer == "Yes" else "0") for row in rows]
    for row, correct in zip(rows, right, strict=True):
        stem = f"{row['category']}_{row['subcategory']}_{row['set_id']}"
        questions[f"{stem}_{row['question_id']}"].append(correct)
        if not (row["category"] == "VS" and str(row["figure_id"]) == "0"):
            figures[f"{stem}_{row['figure_id']}"].append(correct)
    return {
        "aacc": sum(right) / len(right),
        "qacc": sum(map(all, questions.values())) / len(questions),
        "facc": sum(map(all, figures.values())) / len(figures),
    }


@pytest.mark.parametrize("answer", ["Yes", "No"])
def test_constant_answers(golden: Path, rows: list[dict[str, Any]], answer: str) -> None:
    questions = HallusionData.open(golden / "hallusionbench" / "HallusionBench_subset.json")
    answers = [{**row, "model_prediction": f"{answer}."} for row in reversed(rows)]
    scored = score_answers(questions, answers)
    values = {name: score["value"] for name, score in scored["scores"]["all"].items()}
    expected = by_reference(rows, answer)
    assert {name: values[name] for name in expected} == pytest.approx(expected, abs=1e-12)
    if answer == "Yes":
        assert values["aacc"] == 81 / 196
        counts = scored["counts"]
        assert (counts["all"]["questions"], counts["all"]["right_questions"]) == (82, 9)
        assert (counts["all"]["figures"], counts["all"]["right_figures"]) == (53, 5)
        assert counts["visual"]["n"] == 196 - 45
        assert counts["VD"]["n"] + counts["VS"]["n"] == 196


def test_figures_and_questions_pull_apart(golden: Path, rows: list[dict[str, Any]]) -> None:
    """Everything right but one answer: one question and one figure are lost, no more."""
    questions = HallusionData.open(golden / "hallusionbench" / "HallusionBench_subset.json")
    answers = [{**row, "answer": "yes" if row["gt_answer"] == "1" else "no"} for row in rows]
    wrong = next(row for row in answers if row["filename"] is not None)
    wrong["answer"] = "no" if wrong["gt_answer"] == "1" else "yes"
    counts = score_answers(questions, answers)["counts"]["all"]
    assert (counts["correct"], counts["right_questions"], counts["right_figures"]) == (195, 81, 52)
