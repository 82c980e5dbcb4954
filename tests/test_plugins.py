"""Methods and tasks of other packages: one that works, and those that do not."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vlmfix import registry
from vlmfix.errors import UnknownMethod, UnknownTask
from vlmfix.evals import tasks

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "vlmfix"

PYPROJECT = """\
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "vlmfix-outside"
version = "0.1"

[tool.setuptools]
packages = ["vlmfix_outside", "vlmfix_outside.persons"]

[project.entry-points."vlmfix.methods"]
scaleimage = "vlmfix_outside.scale:ScaleImage"

[project.entry-points."vlmfix.tasks"]
persons = "vlmfix_outside.persons.task:Persons"
"""


def shown(page: str) -> str:
    """The first Python example of a page of the docs."""
    return (ROOT / "docs" / page).read_text().split("```python\n")[1].split("```")[0]


@pytest.mark.slow
def test_a_package_from_outside_adds_a_method_and_a_task(tmp_path: Path) -> None:
    """The two examples of the docs, as somebody else's package, installed by pip."""
    source = tmp_path / "source"
    files = {
        "pyproject.toml": PYPROJECT,
        "vlmfix_outside/__init__.py": "",
        "vlmfix_outside/scale.py": shown("add-a-method.md"),
        "vlmfix_outside/persons/__init__.py": "",
        "vlmfix_outside/persons/task.py": shown("add-a-task.md"),
    }
    for name, text in files.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(text)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}

    def run(*command: object) -> str:
        done = subprocess.run(
            list(map(str, command)), cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    # torch and pip are those of this interpreter; what is installed goes to the new one.
    (site / "shared.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    offline = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    run(python, "-m", "pip", "install", *offline, source)
    assert (site / "vlmfix_outside" / "scale.py").exists()

    vlmfix = (python, "-m", "vlmfix")
    rows = {row["name"]: row for row in json.loads(run(*vlmfix, "methods", "--json"))}
    assert rows["scaleimage"]["stage"] == "attention"
    assert "vlmfix-outside 0.1" in rows["scaleimage"]["title"]
    assert rows["scaleimage"]["summary"].startswith("Multiply the attention on visual tokens")
    assert "pai" in rows
    assert "persons" in run(*vlmfix, "eval", "--list")

    stack = "scaleimage:factor=9+pai"
    run(
        *vlmfix, "eval", "persons", "--method", stack, "--limit", 2, "--threads", 1,
        "--output", tmp_path / "out",
    )  # fmt: skip
    records = [
        json.loads(line)
        for path in sorted((tmp_path / "out").glob("samples_persons_*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    assert [(r["task"], r["method"]) for r in records] == [("persons", "base")] * 2 + [
        ("persons", stack)
    ] * 2
    assert {r["target"] for r in records} <= {"yes", "no"}
    assert records[-1]["method_cfg"][0] == {"method": "scaleimage", "factor": 9.0}
    assert records[0]["p_yes"] != records[-2]["p_yes"]  # the method did something
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert "accuracy" in results["tasks"]["persons"]["arms"][stack]["delta"]["all"]


#: What a task of ours touches beside its folder. The page for authors lists the same places.
PLACES = ("vlmfix/evals/tasks.py", "docs/evaluation.md", "CHANGELOG.md")


def test_a_task_touches_its_folder_and_three_places() -> None:
    table = (ROOT / "docs" / "add-a-task.md").read_text()
    numbered = re.findall(r"^\| \d\. .*$", table, re.MULTILINE)
    assert [re.findall(r"`([^`]+)`", row)[-1] for row in numbered] == list(PLACES)
    # The code knows a task by the table alone, and by a suite that holds it. (Others build on the
    # files of POPE and CHAIR.)
    for folder in ("amber", "hallusionbench", "mme", "rope"):
        names = "|".join(name for name, target in tasks.TASKS.items() if f".{folder}." in target)
        known = re.compile(rf"""["'](?:{names})["']|evals\.{folder}\b""")
        files = {
            path.relative_to(PACKAGE).as_posix()
            for path in PACKAGE.rglob("*.py")
            if f"/{folder}/" not in path.as_posix() and known.search(path.read_text())
        }
        assert "evals/tasks.py" in files, folder
        assert files <= {"evals/tasks.py", "evals/suites.py"}, folder


# -- packages that cannot be used ------------------------------------------------------------------

METHOD = """
from dataclasses import dataclass
from typing import ClassVar
from vlmfix.base.attention import AttentionMethod

@dataclass(frozen=True)
class Mine(AttentionMethod):
    '''One line.

    More.
    '''
    strength: float = 1.0
    name: ClassVar[str] = "{name}"
    aliases: ClassVar[tuple[str, ...]] = {aliases}
    paper: ClassVar[str] = "Somebody, arXiv 2601.00001"
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path whose packages are installed as far as entry points can tell."""
    monkeypatch.syspath_prepend(tmp_path)
    for cached in (registry._plug_ins, tasks._plug_ins):
        cached.cache_clear()
    yield tmp_path
    for cached in (registry._plug_ins, tasks._plug_ins):
        cached.cache_clear()
    for name in [name for name in sys.modules if name.startswith("outside_")]:
        del sys.modules[name]


def install(site: Path, package: str, group: str, points: dict[str, str], code: str) -> None:
    folder = site / f"{package}-1.5.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.5\n")
    lines = [f"{name} = {target}" for name, target in points.items()]
    (folder / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines, ""]))
    (site / f"{package}.py").write_text(code)


def method(site: Path, package: str, name: str, code: str = METHOD, **facts: Any) -> None:
    facts = {"name": name, "aliases": (), **facts}
    for key, value in facts.items():
        code = code.replace("{" + key + "}", str(value))
    install(site, package, "vlmfix.methods", {name: f"{package}:Mine"}, code)


def test_the_row_comes_from_the_class(site: Path) -> None:
    method(site, "outside_good", "mine", aliases=("yours",))
    row = registry.find("yours")
    assert row in registry.list_methods()
    assert (row.name, row.stage, row.summary) == ("mine", "attention", "One line.")
    assert row.paper == "Somebody, arXiv 2601.00001"
    built = registry.build("mine:strength=2")
    assert built.spec() == "mine:strength=2.0"
    assert type(built) is registry.load_class(row)
    assert [option["name"] for option in registry.describe("mine")["options"]] == ["strength"]


@pytest.mark.parametrize(
    ("name", "facts", "says"),
    [
        ("mine", {"code": "import nothing_of_that_name"}, "fails with ModuleNotFoundError: No"),
        ("mine", {"code": "raise ValueError('torch is too old')"}, "ValueError: torch is too old"),
        ("mine", {"code": "Mine = 3"}, "3 is no class that derives from vlmfix.base.method.Method"),
        ("mine", {"code": "class Mine: pass"}, "no class that derives"),
        ("mine", {"code": METHOD.replace("{name}", "other")}, "outside_bad:Mine.name differ"),
        ("mine", {"aliases": ("clearsight",)}, "a method called clearsight: rename that alias"),
        ("pai", {}, "vlmfix has one of that name: rename it"),
        ("paint", {}, "vlmfix has one of that name: rename it"),
        ("my-method", {}, "a name is lower-case letters, digits and _"),
    ],
)
def test_a_method_that_cannot_be_used_is_told_and_stops_nothing(
    site: Path, name: str, facts: dict[str, Any], says: str
) -> None:
    method(site, "outside_bad", name, **facts)
    method(site, "outside_good", "fine")
    with pytest.warns(UserWarning, match=re.escape(says)) as warned:
        names = [row.name for row in registry.list_methods()]
    assert "outside_bad" in str(warned[0].message)
    assert "pip uninstall outside_bad" in str(warned[0].message)
    assert len(warned) == 1
    assert "fine" in names and names.count("pai") == 1 and "mine" not in names
    assert registry.find("pai").target.startswith("vlmfix.methods")
    if name not in ("pai", "paint"):
        with pytest.raises(UnknownMethod, match=re.escape(says)):
            registry.build(f"{name}:strength=2")


def test_two_packages_with_one_name(site: Path) -> None:
    method(site, "outside_a", "mine")
    method(site, "outside_b", "mine")
    with pytest.warns(UserWarning, match="outside_. 1.5 has one of that name: uninstall one of"):
        assert [row.name for row in registry.list_methods()].count("mine") == 1
    registry.build("mine")


TASK = shown("add-a-task.md").replace('"persons"', '"{name}"')


@pytest.mark.parametrize(
    ("name", "code", "says"),
    [
        ("persons", "import nothing_of_that_name", "fails with ModuleNotFoundError"),
        ("pope", TASK.replace("{name}", "pope"), "vlmfix has one of that name"),
        ("persons", TASK.replace("{name}", "people"), "outside_bad:Persons.name differ"),
        ("persons", "class Persons: pass", "no class that derives from vlmfix.evals.tasks.Task"),
        (
            "persons",
            "from vlmfix.evals.tasks import Task\nclass Persons(Task): name = 'persons'",
            "Persons lacks max_new_tokens, columns, facts, open, parse, samples, score",
        ),
    ],
)
def test_a_task_that_cannot_be_used_is_told_and_stops_nothing(
    site: Path, name: str, code: str, says: str
) -> None:
    install(site, "outside_bad", "vlmfix.tasks", {name: "outside_bad:Persons"}, code)
    good = TASK.replace("{name}", "fine")
    install(site, "outside_good", "vlmfix.tasks", {"fine": "outside_good:Persons"}, good)
    with pytest.warns(UserWarning, match=re.escape(says)) as warned:
        assert set(tasks.list_tasks()) == {*tasks.TASKS, "fine"}
    assert len(warned) == 1 and "pip uninstall outside_bad" in str(warned[0].message)
    assert tasks.get_task("fine").name == "fine"
    assert tasks.get_task("pope").__module__ == "vlmfix.evals.pope.task"
    if name != "pope":
        with pytest.raises(UnknownTask, match=re.escape(says)):
            tasks.get_task(name)
