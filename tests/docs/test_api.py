"""docs/api.md names what there is: all of it, and nothing else."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import typer.main

import vlmfix
import vlmfix.evals
from vlmfix.cli.main import app

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "api.md").read_text()


def rows(heading: str) -> list[tuple[str, str]]:
    """The table under a heading: the name in each row's first cell, and the second cell."""
    section = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    assert section is not None, heading
    found = re.findall(r"^\| (`.*?`) \| (.*) \|$", section[1], re.M)
    assert found, heading
    return [(name.strip("`"), what) for name, what in found]


def test_the_page_names_exactly_the_public_names() -> None:
    for heading, module in (("`vlmfix`", vlmfix), ("`vlmfix.evals`", vlmfix.evals)):
        assert sorted(name for name, _ in rows(heading)) == sorted(module.__all__)


def test_modules_and_the_names_said_to_be_in_them_exist() -> None:
    for heading in ("What authors of methods and tasks import", "Helpers for scripts"):
        for name, what in rows(heading):
            module = importlib.import_module(name)
            for attribute in re.findall(r"`(\w+)`", what):
                assert attribute in module.__all__, f"{name}: {attribute}"


def test_what_authors_import_is_all_of_base() -> None:
    listed = {name for name, _ in rows("What authors of methods and tasks import")}
    files = (ROOT / "vlmfix" / "base").glob("[!_]*.py")
    assert {f"vlmfix.base.{file.stem}" for file in files} <= listed


def test_the_page_names_exactly_the_commands() -> None:
    commands = {name.split()[1] for name, _ in rows("The command line")}
    assert commands == set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]  # a group


def test_the_keys_of_results_are_those_of_a_run() -> None:
    results = json.loads((ROOT / "docs" / "results" / "emoji" / "results.json").read_text())
    section = PAGE.split("## The results format")[1].split("\n## ")[0]
    top = section.split("`results.json` is one object:")[1].split(" A task has")[0]
    assert set(re.findall(r"`(\w+)`", top)) == set(results)
    arms = results["tasks"]["pope"]["arms"]
    named = {key for name, _ in rows("The results format") for key in re.findall(r"\w+", name)}
    assert named <= set(arms["vhr"])
    assert set(arms["vhr"]) - set(arms["base"]) == {"delta"} <= named
