"""Every method on every family is right or refused, as docs/models.md says."""

from __future__ import annotations

import json
import runpy
import warnings
from pathlib import Path

import pytest
import reach

ROOT = Path(__file__).resolve().parents[1]
CELLS = json.loads((ROOT / "docs" / "models" / "cells.json").read_text())
UPDATE = "if it should be so, run: python docs/generate.py --models"

#: Of every change; the other families are left to `make test-full`.
TEN = (
    "llava",
    "llava_next",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_5",
    "internvl",
    "gemma3",
    "gemma4",
    "smolvlm",
    "instructblip",
)
_SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in TEN else _SLOW) for n in reach.NAMES]
)
def test_every_method_is_right_or_refused_as_the_table_says(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own, which differ by family
        found = reach.reach(name)
    told = CELLS[name]
    assert found.model_type == told["model_type"]
    assert list(found.plain) == told["plain"], UPDATE
    for method, cell in found.cells.items():
        assert cell.state in ("right", "refused"), f"{method}: {cell.why}"
        assert [cell.state, *([cell.why] if cell.why else [])] == told["cells"][method], (
            f"{method}: {UPDATE}"
        )
    assert set(told["cells"]) == set(found.cells)


def test_the_table_has_every_family() -> None:
    assert set(CELLS) == set(reach.NAMES), UPDATE


def test_drift_prints_what_changed() -> None:
    old = {"one": {"plain": [], "cells": {"pai": ["right"], "var": ["refused", "no sinks"]}}}
    new = {
        "one": {"plain": ["batch"], "cells": {"pai": ["wrong", "far"], "var": ["refused", "none"]}},
        "two": {"plain": [], "cells": {}},
    }
    differences = runpy.run_path(str(ROOT / "docs" / "model_table.py"))["differences"]
    assert differences(old, new) == [
        "one, plain model: [] -> ['batch']",
        "one, pai: right -> wrong far",
        "two: new",
    ]
    assert differences(old, old) == []
