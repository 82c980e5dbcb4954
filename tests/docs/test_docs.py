"""The documents: generated parts are fresh, every method has its page, links lead somewhere."""

from __future__ import annotations

import hashlib
import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from PIL import Image

import vlmfix
from vlmfix.registry import list_methods

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "docs" / "results" / "pruning" / "kept.csv"
IN_BOXES = ROOT / "docs" / "results" / "attention" / "in_boxes.csv"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_generated_parts_are_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "generate.py", "--check"],
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_tables_that_are_not_those_of_the_runs_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "README.md", tmp_path)
    generate = runpy.run_path(str(tmp_path / "docs" / "generate.py"))

    def stale() -> set[str]:
        assert generate["main"](check=True) == 1
        return set(capsys.readouterr().out.splitlines())

    table = tmp_path / KEPT.relative_to(ROOT)
    committed = table.read_text()
    table.write_text(committed.replace("hiprune,,7,", "hiprune,,8,"))
    assert stale() == {"out of date: docs/results/pruning/kept.csv"}
    table.write_text(committed)
    run = table.with_name("kept_11.json")
    results = json.loads(run.read_text())
    scored = results["tasks"]["chair"]["arms"]["hiprune:ratio=0.11"]
    scored["scores"]["caption"]["recall"]["value"] += 0.01
    run.write_text(json.dumps(results))
    assert stale() == {
        "out of date: docs/methods/hiprune.md",
        "out of date: docs/results/pruning/README.md",
        "out of date: docs/results/pruning/kept.csv",
    }


@pytest.mark.parametrize("table", [KEPT, IN_BOXES], ids=["kept", "in_boxes"])
def test_a_picture_was_drawn_from_its_table(table: Path) -> None:
    with Image.open(table.with_suffix(".png")) as picture:
        assert picture.info[table.name] == hashlib.sha256(table.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", [row.name for row in list_methods()])
def test_every_method_has_a_page(name: str) -> None:
    text = (ROOT / "docs" / "methods" / f"{name}.md").read_text()
    assert f"<!-- generated: method {name} -->" in text
    for heading in ("## Idea", "## Maths", "## What was checked"):
        assert heading in text


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target


#: The two lines of the quickstart that load a model: a real checkpoint, and the bundled one.
REAL = re.compile(r'^model, processor = vlmfix\.load\("([^"]+)"\)$', re.MULTILINE)
BUNDLED = re.compile(r'^# (model, processor = vlmfix\.load\("emoji"\))', re.MULTILINE)


def test_quickstart_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block is not None
    real = REAL.search(block[1])
    assert real is not None and real[1] == "llava-hf/llava-1.5-7b-hf"
    code = BUNDLED.sub(r"\1", REAL.sub("", block[1]))
    assert len([line for line in code.splitlines() if line.strip()]) <= 8
    exec(code, {})
    printed = capsys.readouterr().out
    edited = re.search(r"edited_rows=(\d+)", printed)
    assert printed.startswith("The ") and edited is not None and int(edited[1]) > 0


def test_the_table_of_models_has_every_method_on_the_families_of_the_matrix() -> None:
    cells = json.loads((ROOT / "docs" / "models" / "cells.json").read_text())
    refused = {
        (name, method)
        for name in tiny.FAMILIES
        for method, cell in cells[name]["cells"].items()
        if cell[0] != "right"
    }
    assert refused == {("gemma3", "fastv")}


def test_the_citation_names_this_version() -> None:
    text = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (.+)$", text, re.MULTILINE)[1] == vlmfix.__version__  # type: ignore[index]  # None fails, too


def described(folder: Path) -> str:
    """The long description that setuptools makes of a project."""
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "--long-description"],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_index_gets_absolute_links_once_there_is_an_address(tmp_path: Path) -> None:
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("vlmfix/_version.py", "vlmfix/__init__.py", "vlmfix/emoji/data/OFL.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('__version__ = "0"\n')
    readme = (ROOT / "README.md").read_text()
    assert described(tmp_path).strip() == readme.strip()
    project = tmp_path / "pyproject.toml"
    urls = (
        '[project.urls]\nIssues = "https://x.example/i"\nRepository = "https://x.example/a/b"\n\n'
    )
    project.write_text(project.read_text().replace("[project.scripts]", urls + "[project.scripts]"))
    page = described(tmp_path)
    targets = re.findall(r"\]\(([^)\s]+)\)", page)
    assert len(targets) == len(re.findall(r"\]\(([^)\s]+)\)", readme)) > 40
    assert all(target.startswith("https://") for target in targets)
    assert "](https://x.example/a/b/raw/main/docs/pictures/compare.png)" in page
    assert "](https://x.example/a/b/blob/main/docs/methods/vhr.md)" in page


def test_the_commands_of_the_readme_are_targets() -> None:
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    for command in ("make eval", "make test", "make demo"):
        assert command in readme
        assert re.search(rf"^{command.split()[1]}:", makefile, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_files_that_are_named_exist(page: Path) -> None:
    text = page.read_text()
    for path in re.findall(r"`((?:vlmfix|tests|docs|examples)/[\w/.-]+)`", text):
        assert (ROOT / path).exists(), path
    for module in re.findall(r"`(?:python -m )?(vlmfix\.[a-z_.]+)(?::\w+)?`", text):
        parts = ROOT.joinpath(*module.split("."))
        named = parts.parent if not (parts.exists() or parts.with_suffix(".py").exists()) else parts
        assert named.is_dir() or named.with_suffix(".py").exists(), module
