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
from PIL import Image

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


def test_quickstart_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block is not None
    assert len([line for line in block[1].splitlines() if line.strip()]) <= 8
    exec(block[1], {})
    printed = capsys.readouterr().out
    edited = re.search(r"edited_rows=(\d+)", printed)
    assert printed.startswith("The ") and edited is not None and int(edited[1]) > 0


def test_the_commands_of_the_readme_are_targets() -> None:
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    for command in ("make eval", "make test", "make demo"):
        assert command in readme
        assert re.search(rf"^{command.split()[1]}:", makefile, re.MULTILINE)
