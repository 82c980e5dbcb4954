"""The launcher of VLMEvalKit, against a fake checkout with the interface that it documents."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import vlmfix
from vlmfix.errors import BadInput, MissingDependency
from vlmfix.integrations import vlmevalkit

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "Please describe this image in detail."

FILES = {
    "vlmeval/__init__.py": "",
    "vlmeval/config.py": "supported_VLM = {}\n",
    "vlmeval/vlm/__init__.py": "from .base import BaseModel\n",
    "vlmeval/vlm/base.py": """
class BaseModel:
    INTERLEAVE = False
    allowed_types = ["text", "image", "video"]

    def generate(self, message, dataset=None):
        assert all(part["type"] in self.allowed_types for part in message), message
        return self.generate_inner(message, dataset)
""",
}
RUN = """
import argparse, json, os, sys
os.environ["CHOSEN_FIRST"] = str("torch" not in sys.modules)
import vlmeval.vlm
from vlmeval.config import supported_VLM

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", nargs="+")
    parser.add_argument("--data", nargs="+")
    parser.add_argument("--config")
    args = parser.parse_args()
    models = {name: supported_VLM[name] for name in args.model or []}
    if args.config:
        for name, made in json.load(open(args.config))["model"].items():
            kind = getattr(vlmeval.vlm, made.pop("class"))
            models[name] = lambda kind=kind, made=made: kind(**made)
    message = [{"type": "image", "value": args.data[0]}, {"type": "text", "value": args.data[1]}]
    turns = [{"role": "user", "content": message}]
    for name, make in models.items():
        model = make()
        print(json.dumps({
            "name": name, "first": os.environ["CHOSEN_FIRST"], "argv": sys.argv[1:],
            "answer": model.generate(message, "Tiny"), "chat": model.chat_inner(turns),
            "types": model.allowed_types, "interleave": model.INTERLEAVE,
        }))

if __name__ == "__main__":
    main()
"""


def checkout(folder: Path, script: str | None = "run.py") -> Path:
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    if script is not None:
        (folder / script).write_text(RUN)
    return folder


def launch(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(folder), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-m", "vlmfix.integrations.vlmevalkit", *arguments],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )


def results(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def expected() -> dict[str, str]:
    model, processor = vlmfix.load("emoji", device="cpu")
    content = [{"type": "image", "image": "emoji:1"}, {"type": "text", "text": PROMPT}]
    chat = [{"role": "user", "content": content}]
    settings = {"max_new_tokens": 40, "do_sample": False, "num_beams": 1}
    answers = {"base": vlmfix.generate(model, processor, chat, **settings)}
    with vlmfix.wrapped(model, "pai:alpha=0.9"):
        answers["pai"] = vlmfix.generate(model, processor, chat, **settings)
    assert answers["pai"] != answers["base"]
    return answers


@pytest.mark.parametrize(
    "script", ["run.py", pytest.param("vlmeval/run.py", marks=pytest.mark.slow)]
)
def test_a_model_with_a_method_answers_in_their_run(
    tmp_path: Path, script: str, expected: dict[str, str]
) -> None:
    ours = ("--pretrained", "emoji", "--method", "pai:alpha=0.9", "--max-new-tokens", "40")
    done = launch(checkout(tmp_path, script), "run", *ours, "--data", "emoji:1", PROMPT)
    (row,) = results(done)
    assert row["answer"] == row["chat"] == expected["pai"]
    assert row["name"] == "vlmfix-emoji-pai_alpha=0.9"
    assert row["argv"] == ["--data", "emoji:1", PROMPT, "--model", row["name"]]
    assert row["first"] == "True", "run.py must choose a GPU before torch is there"
    assert (row["types"], row["interleave"]) == (["text", "image"], True)


@pytest.mark.slow
def test_their_config_files_may_name_our_class(tmp_path: Path, expected: dict[str, str]) -> None:
    shared = {"class": "VLMFix", "pretrained": "emoji", "max_new_tokens": 40}
    models = {"base": shared, "pai": {**shared, "method": "pai", "alpha": 0.9}}
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model": models}))
    arguments = ("--config", str(config), "--data", "emoji:1", PROMPT)
    rows = results(launch(checkout(tmp_path), "run", *arguments))
    assert {row["name"]: row["answer"] for row in rows} == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "var"], "belong to --pretrained"),
        (["--pretrained", "emoji", "--model", "x"], "leave out --model"),
    ],
)
def test_arguments_that_exclude_each_other(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vlmevalkit, "_script", lambda: pytest.fail("their code was looked up"))
    with pytest.raises(BadInput, match=message):
        vlmevalkit.main(["run", *arguments])


def test_a_vlmevalkit_without_its_script_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(checkout(tmp_path, None)))
    monkeypatch.delitem(sys.modules, "vlmeval", raising=False)
    with pytest.raises(MissingDependency, match=r"has no run\.py"):
        vlmevalkit.main(["run", "--pretrained", "emoji"])


def test_without_vlmevalkit_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vlmevalkit.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingDependency, match="git clone"):
        vlmevalkit.main(["run", "--pretrained", "emoji"])


def test_a_wrong_option_is_one_line_before_any_model(tmp_path: Path) -> None:
    arguments = ("--pretrained", "no/model", "--method", "var:kept=1")
    done = launch(checkout(tmp_path), "run", *arguments)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: method 'var' has no option 'kept'")
