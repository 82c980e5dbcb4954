"""The command line through its real entry point."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import tiny_folders
from PIL import Image
from rich.console import Console

from vlmfix import show

ROOT = Path(__file__).resolve().parents[1]
FORCED_VAR = "var:sink_channels=0;tau=1"


def vlmfix(*arguments: object, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120", "NO_COLOR": "1"}
    return subprocess.run(
        [sys.executable, "-m", "vlmfix", *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def document(*arguments: object) -> Any:
    """The one JSON document that a command prints, and nothing else."""
    done = vlmfix(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def refused(*arguments: object, says: str) -> None:
    done = vlmfix(*arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert says in " ".join(done.stderr.split())


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folders.save("llava", tmp_path_factory.mktemp("llava"), with_processor=True)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "picture.png"
    Image.effect_noise((40, 30), 90).convert("RGB").save(path)
    return path


def test_help_is_quick_and_needs_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['vlmfix', '--help']\n"
        "from vlmfix.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print('torch' in sys.modules)"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    assert "generate" in done.stdout
    assert done.stdout.splitlines()[-1] == "False"
    assert seconds < 0.5 or min(_help_seconds() for _ in range(3)) < 0.5


def _help_seconds() -> float:
    start = time.perf_counter()
    vlmfix("--help")
    return time.perf_counter() - start


def test_version() -> None:
    import vlmfix as package

    assert vlmfix("--version").stdout.split() == ["vlmfix", package.__version__]


def test_methods() -> None:
    names = {row["name"] for row in document("methods")}
    assert {"var", "pai"} <= names
    assert "2503.03321" in vlmfix("methods").stdout


def test_one_method() -> None:
    info = document("methods", "var")
    assert "keep" in {option["name"] for option in info["options"]}
    shown = vlmfix("methods", "var").stdout
    assert "keep" in shown
    assert info["doc"].splitlines()[0] in shown


def test_doctor(tmp_path: Path) -> None:
    folder = tiny_folders.save("qwen2_5_vl", tmp_path)
    report = document("doctor", folder, "--device", "cpu")
    assert report["model_type"] == "qwen2_5_vl"
    assert report["layers"] == 3
    assert {"var", "pai"} <= {row["name"] for row in report["methods"]}
    shown = vlmfix("doctor", folder)
    assert shown.returncode == 0, shown.stderr
    assert "qwen2_5_vl" in shown.stdout


def test_generate_prints_the_answer_alone(llava: Path, picture: Path) -> None:
    command = ("generate", picture, "is there a dog ?", "--model", llava, "--max-new-tokens", 5)
    answers = document(*command)["answers"]
    assert [arm["method"] for arm in answers] == ["base"]
    plain = vlmfix(*command)
    assert plain.returncode == 0, plain.stderr
    assert plain.stdout.split() == answers[0]["answer"].split()


def test_generate_compares_base_and_methods(llava: Path, picture: Path) -> None:
    command = ("generate", picture, "is there a dog ?", "--model", llava, "--max-new-tokens", 5)
    methods = ("--method", f"pai:alpha=3,{FORCED_VAR}+pai", "--compare")
    answers = document(*command, *methods)["answers"]
    assert [arm["method"] for arm in answers] == ["base", "pai:alpha=3", f"{FORCED_VAR}+pai"]
    assert answers[0]["last_call"] is None
    assert all(arm["last_call"]["edited_rows"] > 0 for arm in answers[1:])
    shown = vlmfix(*command, *methods)
    assert shown.returncode == 0, shown.stderr
    assert "pai:alpha=3" in shown.stdout


def test_changed_words_stand_out() -> None:
    text = show.changed_words("a dog and a cat", "a dog and a red car")
    marked = {text.plain[span.start : span.end] for span in text.spans}
    assert text.plain == "a dog and a red car"
    assert marked == {"red", "car"}


def test_json_has_no_nan() -> None:
    assert json.loads(show.to_json({"a": [float("nan"), 1.5], "b": (None, Path("x"))})) == {
        "a": [None, 1.5],
        "b": [None, "x"],
    }


def test_markup_in_an_answer_is_not_obeyed() -> None:
    console = Console(width=80, record=True, file=StringIO())
    arm = {"method": "base", "answer": "[red]dog[/red]", "last_call": None}
    console.print(show.answers([arm, arm]))
    assert "[red]dog[/red]" in console.export_text()


def test_an_unknown_method(picture: Path) -> None:
    refused("methods", "vra", says="vlmfix methods")
    refused("generate", picture, "what ?", "--method", "vra", says="vlmfix methods")


def test_an_unknown_option(picture: Path) -> None:
    refused("generate", picture, "what ?", "--method", "var:kepe=1", says="no option 'kepe'")


def test_an_option_out_of_range(picture: Path) -> None:
    refused("generate", picture, "what ?", "--method", "var:keep=7", says="keep")


def test_a_text_only_model(tmp_path: Path) -> None:
    folder = tiny_folders.save("llama", tmp_path)
    refused("doctor", folder, says="text-only")


def test_a_missing_image() -> None:
    refused("generate", "absent.png", "what ?", says="no image file absent.png")


def test_a_corrupt_image(picture: Path, tmp_path: Path) -> None:
    half = tmp_path / "half.png"
    half.write_bytes(picture.read_bytes()[:400])
    refused("generate", half, "what ?", says="damaged")


def test_a_folder_without_config(tmp_path: Path) -> None:
    refused("doctor", tmp_path, says="no config.json in the folder")


def test_an_unknown_task() -> None:
    refused("eval", "pop", says="pope")


def test_no_task() -> None:
    refused("eval", says="chair")


def test_the_demo_is_not_there_yet() -> None:
    refused("demo", says="generate")


def test_the_list_of_tasks() -> None:
    names = {row["name"] for row in document("eval", "--list")}
    assert {"chair", "pope"} <= names
    assert document("eval", "--tasks", "list") == document("eval", "--list")
