"""One folder and one loaded model per twin and session."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import twin_folders
from twin_folders import Twin
from twin_recipes import RECIPES

FAST = ("llava-1.5-7b-hf", "Qwen2.5-VL-7B-Instruct")
"""The twins of `make test`; `make test-full` takes all."""


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function from the name of a twin to its folder; do not change what is in there."""
    root = tmp_path_factory.mktemp("twins")
    return cache(lambda name: twin_folders.write(name, root / name))


def _cases() -> list[Any]:
    return [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in RECIPES]


@pytest.fixture(scope="session", params=_cases())
def twin(request: pytest.FixtureRequest, folders: Any) -> Twin:
    """Every twin in turn."""
    name: str = request.param
    recipe = RECIPES[name]
    model, processor = twin_folders.load(folders(name), recipe, dtype="float32")
    return Twin(name, recipe, folders(name), model, processor)
