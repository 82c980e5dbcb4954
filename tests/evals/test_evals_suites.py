"""Suites: which parts, which methods, one card; small ones, on the bundled model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vlmfix.errors import BadInput
from vlmfix.evals import suites
from vlmfix.evals.suites import SUITES, Part, parts_of, run_suite
from vlmfix.evals.tasks import TASKS

ROWS = [
    {"name": "vhr", "fits": True, "why": "runs as vhr"},
    {"name": "var", "fits": False, "why": "would change nothing"},
]


def names(parts: tuple[Part, ...]) -> list[str]:
    return [task for part in parts for task in part.tasks]


def test_parts() -> None:
    assert {task for parts in SUITES.values() for part in parts for task in part.tasks} <= set(
        TASKS
    )
    assert names(parts_of("quick", None)) == ["pope", "chair"]
    assert names(parts_of("full", None)) == ["pope", "chair", "mme", "rope"]
    # Data of one's own: what it holds, and nothing about the bundled images.
    assert names(parts_of("full", {"*": "coco"})) == ["pope", "chair"]
    assert names(parts_of("full", {"*": "coco", "amber_d": "a"})) == ["pope", "chair", "amber_d"]
    assert names(parts_of("pope", {"amber_d": "a"})) == ["pope"]
    with pytest.raises(BadInput, match="no suite 'huge': choose from quick, pope, full"):
        parts_of("huge", None)


def test_the_quick_suite_is_what_it_says() -> None:
    pope, chair = SUITES["quick"]
    assert pope.options == {"n_images": 100, "splits": ("adversarial",)}
    assert chair.options == {"n_images": 50, "max_new_tokens": 48}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = (
        Part(("pope",), {"n_images": 3, "splits": ("adversarial",)}),
        Part(("chair",), {"n_images": 3, "max_new_tokens": 8}),
    )
    monkeypatch.setitem(suites.SUITES, "quick", parts)
    monkeypatch.setattr("vlmfix.analysis.doctor.examine", lambda model: {"methods": ROWS})


def test_a_suite_runs_what_fits_and_writes_one_card(small: None, tmp_path: Path) -> None:
    folder = tmp_path / "suite"
    done = run_suite("quick", output=folder, quiet=True)
    assert done["left_out"] == {"var": "would change nothing"}
    assert done["errors"] == 0
    stored = json.loads((folder / "suite.json").read_text())
    assert stored == {"suite": "quick", "left_out": done["left_out"]}
    card = json.loads((folder / "card.json").read_text())
    (table,) = card["tables"]
    assert sorted(block["task"] for block in table["blocks"]) == ["chair", "pope"]
    assert [row["method"] for row in table["rows"]] == ["base", "vhr"]
    assert (folder / "chair" / "samples_chair_vhr.jsonl").exists()
    results = json.loads((folder / "chair" / "results.json").read_text())
    assert results["tasks"]["chair"]["gen_kwargs"]["max_new_tokens"] == 8

    with pytest.raises(BadInput, match="not empty"):
        run_suite("quick", output=folder, quiet=True)
    lines = (folder / "chair" / "samples_chair_vhr.jsonl").read_text()
    again = run_suite("quick", output=folder, quiet=True, resume=True)
    assert again["parts"]["chair"]["resumed"] == 6
    assert (folder / "chair" / "samples_chair_vhr.jsonl").read_text() == lines


def test_what_a_suite_settles_is_refused_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr("vlmfix.load", load)
    with pytest.raises(BadInput, match="settles max_new_tokens"):
        run_suite("quick", output=tmp_path / "o", max_new_tokens=8)
    with pytest.raises(BadInput, match="resume: name the suite's folder"):
        run_suite("quick", resume=True)
    assert not (tmp_path / "o").exists()
