"""MME's hallucination subset against the official calculation and RITUAL's questions."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from vlmfix.evals.mme.task import MME, Mme, MmeData, load_answers, score_answers
from vlmfix.evals.tasks import Options


def test_the_four_scores(golden: Path) -> None:
    questions, answers = MmeData.open(golden / "mme"), load_answers(golden / "mme")
    random.Random(0).shuffle(answers)
    scored = score_answers(questions, answers)
    places = ("existence", "count", "position", "color")
    found = [scored["scores"][place]["score"]["value"] for place in places]
    assert [f"{value:.2f}" for value in found] == ["185.00", "88.33", "63.33", "75.00"]
    assert f"{scored['scores']['total']['score']['value']:.2f}" == "411.67"
    assert [scored["counts"][place]["images"] for place in places] == [30] * 4


def test_prompts_are_those_of_ritual(golden: Path) -> None:
    rows = [
        json.loads(x) for x in (golden / "mme/mme_hallucination.jsonl").read_text().splitlines()
    ]
    task = Mme(MmeData.open(golden / "mme"), Options(prompt_style="lmms"))
    asked = sorted((sample.image, sample.prompt) for sample in task.samples)
    assert asked == sorted((row["image"], row["text"]) for row in rows)
    assert len({sample.sample_id for sample in task.samples}) == 240


def test_edge_answers_read_as_the_reference_reads_them(golden: Path) -> None:
    rows = json.loads((golden / "pope/edge_parsing.json").read_text())
    differ = [
        row["answer"]
        for row in rows
        if (MME(row["answer"], row["label"]) or "other") != row["mme_lmms_eval"]
    ]
    # lmms-eval alone takes a single letter.
    assert differ == ["y", "n"]
    assert len(rows) == 48


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("Yes", "yes"),
        (" no ", "no"),
        ("Yes, there is a dog", "yes"),
        ("not at all", "no"),
        ("Nope", "no"),
        ("none", "no"),
        ("know", "no"),
        ("i think no", None),
        ("", None),
        ("eyes", "yes"),
        ("maybe yes", None),
    ],
)
def test_only_the_first_four_characters_count(answer: str, verdict: str | None) -> None:
    assert MME(answer, "yes") == verdict
