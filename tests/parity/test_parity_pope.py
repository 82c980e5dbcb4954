"""POPE against the official code: answer parsing, scores, and the question builder."""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from vlmfix.evals.inputs.parsers import PARSERS
from vlmfix.evals.pope.builder import (
    STRATEGIES,
    Question,
    build_questions,
    co_occurrence,
    frequency,
)
from vlmfix.evals.pope.files import load_questions
from vlmfix.evals.pope.task import score_answers


def edge_rows(golden: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((golden / "pope" / "edge_parsing.json").read_text())
    assert len(rows) == 48
    return rows


@pytest.mark.parametrize("name", ["official", "opera", "vlmevalkit"])
def test_edge_answers_read_as_the_reference_reads_them(golden: Path, name: str) -> None:
    for row in edge_rows(golden):
        verdict = PARSERS[name](row["answer"], row["label"]) or "unknown"
        assert verdict == row[name], row["answer"]


def test_edge_answers_under_lmms_eval(golden: Path) -> None:
    for row in edge_rows(golden):
        verdict = PARSERS["lmms_eval"](row["answer"], row["label"])
        exact = row["lmms_eval_pred"] if row["lmms_eval_pred"] in ("yes", "no") else None
        assert verdict == exact, row["answer"]
        assert float(verdict == row["label"]) == row["lmms_eval_score"], row["answer"]


def test_edge_answers_under_vcd(golden: Path) -> None:
    for row in edge_rows(golden):
        counted_right = row["vcd_counts_as"] == row["label"]
        assert (PARSERS["vcd"](row["answer"], row["label"]) == row["label"]) == counted_right, row


def test_official_scores_of_the_edge_answers(golden: Path) -> None:
    rows = edge_rows(golden)
    questions = [Question(i, f"{i}.jpg", "?", row["label"]) for i, row in enumerate(rows)]
    answers = [{"question_id": i, "answer": row["answer"]} for i, row in enumerate(rows)]
    scored = score_answers({"edge": questions}, {"edge": answers})
    counts = scored["counts"]["edge"]
    assert [counts[k] for k in ("tp", "fp", "tn", "fn")] == [13, 25, 9, 1]
    scores = {name: score["value"] for name, score in scored["scores"]["edge"].items()}
    assert scores == pytest.approx(
        {
            "accuracy": 0.4583333333333333,
            "precision": 0.34210526315789475,
            "recall": 0.9285714285714286,
            "f1": 0.5,
            "yes_ratio": 0.7916666666666666,
        },
        abs=1e-12,
    )


@pytest.fixture(scope="module")
def selected(golden: Path) -> list[tuple[str, list[str]]]:
    lines = (golden / "pope" / "build" / "segmentation.jsonl").read_text().splitlines()
    eligible = [row for row in map(json.loads, lines) if len(row["objects"]) >= 3]
    assert len(eligible) == 32
    chosen = random.Random(0).sample(eligible, 20)
    names = json.loads((golden / "pope" / "build" / "selected_images.json").read_text())
    assert [row["image"] for row in chosen] == names
    return [(row["image"], row["objects"]) for row in chosen]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_builder_replays_the_official_questions(
    golden: Path, selected: list[tuple[str, list[str]]], strategy: str
) -> None:
    built = build_questions(selected, strategy, seed=1, official_typo=True)
    text = (golden / "pope" / "build" / f"mini_pope_{strategy}.json").read_text()
    assert [asdict(question) for question in built] == list(map(json.loads, text.splitlines()))
    mended = build_questions(selected, strategy, seed=1)
    assert [q.text for q in mended] == [q.text.replace("imange", "image") for q in built]


def test_frequency_and_co_occurrence_tables(
    golden: Path, selected: list[tuple[str, list[str]]]
) -> None:
    build = golden / "pope" / "build"
    objects = [names for _, names in selected]
    counts = json.loads((build / "mini_ground_truth_objects.json").read_text())
    assert list(frequency(objects).items()) == list(counts.items())
    assert co_occurrence(objects) == json.loads((build / "mini_co_occur.json").read_text())


@pytest.mark.parametrize("split", STRATEGIES)
def test_published_files_load(golden: Path, split: str) -> None:
    file = load_questions(golden / "pope" / f"coco_pope_{split}.json")
    assert file.variant == "full split, 500 images x 6"
    assert [q.label for q in file.questions[:4]] == ["yes", "no", "yes", "no"]
    assert sum(q.label == "yes" for q in file.questions) == 1500
    assert len({q.image for q in file.questions}) == 500
