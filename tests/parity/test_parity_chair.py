"""CHAIR's builtin engine against NLTK runs of OPERA's chair.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vlmfix.evals.chair import score_captions
from vlmfix.evals.chair_objects import category_of, ground_truth, mentions
from vlmfix.evals.coco import CocoData


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_synthetic_captions_give_the_reference_numbers(golden: Path) -> None:
    folder = golden / "chair" / "synth"
    reference = json.loads((folder / "builtin_reference.json").read_text())
    expected = lines(folder / "expected.jsonl")
    captions = [(row["image_id"], row["caption"]) for row in lines(folder / "captions.jsonl")]
    assert len(captions) == 60

    scored = score_captions(captions, ground_truth(CocoData(folder)))
    scores = {name: score["value"] for name, score in scored["scores"]["caption"].items()}
    assert scores["chair_s"] == pytest.approx(reference["CHAIRs"], abs=1e-12)
    assert scores["chair_i"] == pytest.approx(reference["CHAIRi"], abs=1e-12)
    assert scores["recall"] == pytest.approx(reference["Recall"], abs=1e-12)

    differences = [
        {
            "image_id": row["image_id"],
            "caption": row["caption"],
            "nltk": row["objects"],
            "builtin": list(mentions(row["caption"]).objects),
        }
        for row in expected
        if row["objects"] != list(mentions(row["caption"]).objects)
    ]
    assert differences == reference["differences"]


def test_synthetic_ground_truth_equals_nltk(golden: Path) -> None:
    folder = golden / "chair" / "synth"
    truth = ground_truth(CocoData(folder))
    for row in lines(folder / "expected.jsonl"):
        assert sorted(truth[row["image_id"]]) == row["gt"], row["image_id"]


def test_opera_captions_give_the_recorded_counts(golden: Path) -> None:
    folder = golden / "chair" / "opera"
    truth = {
        int(image): frozenset(names)
        for image, names in json.loads((folder / "gt_objects.json").read_text()).items()
    }
    captions = [
        (row["image_id"], row["caption"]) for row in lines(folder / "minigpt4_greedy.jsonl")
    ]
    scored = score_captions(captions, truth)
    counts = scored["counts"]["caption"]
    assert counts["n"] == 500
    assert counts["hallucinated"] == 158
    assert (counts["hallucinated_mentions"], counts["mentions"]) == (252, 2568)
    assert (counts["recalled"], counts["truth"]) == (962, 1533)
    same = sum(
        list(mentions(caption).objects) == row["objects"]
        for (_, caption), row in zip(
            captions, lines(folder / "minigpt4_greedy.expected.jsonl"), strict=True
        )
    )
    assert same == 499


def test_real_ground_truth_is_the_published_one(golden: Path) -> None:
    folder = golden / "chair" / "real80"
    expected = json.loads((folder / "expected_gt_objects.json").read_text())
    truth = ground_truth(CocoData(folder))
    equal = sum(sorted(truth[int(image)]) == names for image, names in expected.items())
    assert (equal, len(expected)) == (80, 80)


def test_word_list_is_the_published_one(golden: Path) -> None:
    table = category_of()
    dead = set()
    for line in (golden / "chair" / "synonyms.txt").read_text().splitlines():
        name, *words = line.strip().split(", ")
        for word in (name, *words):
            if table.get(word) != name:
                dead.add(word)
    # Entries that the original matching cannot reach either.
    assert dead == {" motor bike", " cheesecake", "iPhone", "stove top oven"}
