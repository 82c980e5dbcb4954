"""The plug-in in the real lmms-eval: found through its entry point, answers those of generate()."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import vlmfix

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PROMPT = "Please describe this image in detail."
PAI = "pai:alpha=0.9"

pytestmark = [
    pytest.mark.skipif(
        find_spec("lmms_eval") is None,
        reason="needs lmms-eval (pip install lmms-eval); test_lmms_eval.py has a fake of it",
    ),
    pytest.mark.timeout(1800),
]

TASK = """
task: emoji_tiny
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: "{{question}}"
doc_to_target: image
generation_kwargs: {max_new_tokens: 40, temperature: 0, until: []}
process_results: !function utils.words
metric_list: [{metric: words, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.0}
"""
UTILS = """
from vlmfix.loading import load_image

def visual(doc):
    return [load_image(doc["image"])]

def words(doc, results):
    return {"words": len(results[0].split())}
"""
IMAGES = [f"emoji:{number}" for number in range(1, 7)]


def run(*command: str, **environment: str) -> str:
    paths = os.pathsep.join([str(ROOT), str(HERE)])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *command],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lmms")
    rows = [json.dumps({"image": image, "question": PROMPT}) for image in IMAGES]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    (folder / "emoji_tiny.yaml").write_text(TASK)
    (folder / "utils.py").write_text(UTILS)
    return folder


@pytest.fixture(scope="module")
def expected() -> dict[str, list[str]]:
    model, processor = vlmfix.load("emoji", device="cpu")
    text = {"type": "text", "text": PROMPT}
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": image}, text]}] for image in IMAGES
    ]

    def answers() -> list[str]:
        settings: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False, "num_beams": 1}
        batches = (chats[:4], chats[4:])
        return [a for b in batches for a in vlmfix.generate(model, processor, b, **settings)]

    plain = answers()
    with vlmfix.wrapped(model, PAI):
        return {"plain": plain, "pai": answers()}


def test_answers_are_those_of_generate(folder: Path, expected: dict[str, list[str]]) -> None:
    if not entry_points(group="lmms_eval.models", name="vlmfix"):
        pytest.skip("this vlmfix is not installed, so it has no entry point: pip install -e .")
    run(
        str(HERE / "lmms_real_run.py"),
        str(folder),
        "vlmfix pretrained=emoji,device=cpu",
        "vlmfix pretrained=emoji,device=cpu,method=pai,alpha=0.9",
        "given",
        f"given {PAI}",
    )
    manifest, plain, pai, given, given_pai = json.loads((folder / "rows.json").read_text())
    assert manifest["manifest"] == "vlmfix.integrations.lmms_model.PretrainedModel"
    assert expected["plain"] != expected["pai"]
    assert plain["answers"] == given["answers"] == expected["plain"]
    assert pai["answers"] == given_pai["answers"] == expected["pai"]
    words = [len(answer.split()) for answer in expected["pai"]]
    assert pai["score"] == pytest.approx(sum(words) / len(words))
    assert all(row["output_tokens"] < row["input_tokens"] for row in plain["tokens"])
    assert plain["backend"].endswith("PretrainedModel (chat)")


def test_the_legacy_plugin_runs_our_tasks_in_two_processes(tmp_path: Path) -> None:
    from vlmfix.integrations.lmms_eval import tasks_folder

    values = []
    for processes in ("1", "2"):
        out = tmp_path / processes
        run(
            *("-m", "accelerate.commands.launch", "--cpu", "--num_processes", processes),
            *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
            *("-m", "lmms_eval", "--model", "vlmfix", "--model_args", "pretrained=emoji"),
            *("--tasks", "pope_official", "--include_path", str(tasks_folder())),
            *("--batch_size", "4", "--limit", "11", "--output_path", str(out)),
            LMMS_EVAL_PLUGINS="vlmfix.integrations.lmms_plugin",
        )
        (path,) = out.rglob("*_results.json")
        values.append(json.loads(path.read_text())["results"]["pope_official"])
    assert values[0] == values[1]
    assert 0 < values[0]["yes_ratio,none"] < values[0]["accuracy,none"] <= 1
