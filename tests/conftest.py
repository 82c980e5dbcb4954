"""Environment of every test: no network, no user cache, one torch thread, warnings are errors."""

# The environment must be set before torch, triton or transformers is imported by any test.
# ruff: noqa: E402
from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_cache = tempfile.mkdtemp(prefix="vlmfix-tests-")
atexit.register(shutil.rmtree, _cache, ignore_errors=True)
os.environ["VLMFIX_CACHE"] = _cache
os.environ["XDG_CACHE_HOME"] = _cache
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"

import torch

if not torch.cuda.is_available():
    # Triton kernels then run in its interpreter, which reads this on import.
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)

import pytest
import tiers


def pytest_configure(config: pytest.Config) -> None:
    """Make warnings errors; a test that expects one says so."""
    config.addinivalue_line("filterwarnings", "error")


@pytest.hookimpl(tryfirst=True)  # before pytest looks at markers for `-m`
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Choose what is slow; skip, by name, what needs a GPU or a browser where there is none."""
    tiers.mark_slow(items)
    absent = {}
    if not torch.cuda.is_available():
        absent["gpu"] = "needs CUDA"
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        absent["browser"] = "needs chromium and chromedriver (make browser)"
    for item in items:
        for marker, reason in absent.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Give the next test one torch thread, whatever this one set."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder per test: a calibration that one test stores must not help the next."""
    folder = tmp_path / "vlmfix-cache"
    monkeypatch.setenv("VLMFIX_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of recorded reference data; tests that need it are skipped where it is absent."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "golden"
    folder = Path(os.environ.get("VLMFIX_GOLDEN", beside))
    if not folder.is_dir():
        pytest.skip(f"no golden data at {folder}; set VLMFIX_GOLDEN to the folder")
    return folder
