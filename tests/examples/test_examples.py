"""The scripts in examples/: each runs as its head says, and what it prints or writes is right."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import vlmfix
from vlmfix import emoji
from vlmfix.chat import chat_inputs

FOLDER = Path(__file__).resolve().parents[2] / "examples"
SCRIPTS = sorted(FOLDER.glob("*.py"))
IMAGE = "emoji:4"

Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a script with arguments, as `python examples/NAME ...` does; what it printed."""

    def started(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capsys.readouterr()
        runpy.run_path(str(FOLDER / name), run_name="__main__")
        return capsys.readouterr().out

    return started


@pytest.fixture(scope="module")
def bundled() -> tuple[Any, Any]:
    return vlmfix.load("emoji")


def chat_about(image: Any) -> list[dict[str, Any]]:
    text = {"type": "text", "text": "Describe the image."}
    return [{"role": "user", "content": [{"type": "image", "image": image}, text]}]


def answers_to(bundled: tuple[Any, Any], image: Any, method: str | None) -> str:
    """The answer to one image alone, not by vlmfix.generate."""
    model, processor = bundled
    inputs = chat_inputs(model, processor, [chat_about(image)])
    with vlmfix.wrapped(model, method):
        output = model.generate(**inputs, max_new_tokens=100, do_sample=False)
    text = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return str(text).strip()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_short_and_names_a_real_checkpoint(script: Path) -> None:
    text = script.read_text()
    head = text.split('"""')[1]
    assert len(text.splitlines()) < 60
    assert f"python examples/{script.name}" in head
    assert re.search(r"\b(llava-hf|Qwen)/[\w.-]+", head)
    assert f"[{script.name}]({script.name})" in (FOLDER / "README.md").read_text()


@pytest.mark.slow
def test_quickstart_in_a_process_of_its_own(bundled: tuple[Any, Any]) -> None:
    done = subprocess.run(
        [sys.executable, FOLDER / "quickstart.py"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    first, edited, report, last = done.stdout.splitlines()
    plain = answers_to(bundled, IMAGE, None)
    assert first == last == f"plain: {plain}"
    assert edited == f"vhr:   {answers_to(bundled, IMAGE, 'vhr')}"
    assert "stop sign" in first and "stop sign" not in edited
    assert int(re.findall(r"edited_rows=(\d+)", report)[0]) > 0


def test_a_folder_is_described_and_resumed(
    run: Run, bundled: tuple[Any, Any], tmp_path: Path
) -> None:
    images, output = tmp_path / "images", tmp_path / "answers.jsonl"
    (images / "more").mkdir(parents=True)
    pictures = dict(emoji.example_images(3))
    names = [*list(pictures)[:2], f"more/{list(pictures)[2]}"]
    for name, picture in zip(names, pictures.values(), strict=True):
        picture.save(images / name)
    (images / "notes.txt").write_text("no image")

    printed = run("batch_folder.py", images, output, "--batch-size", 2, "--method", "pai:alpha=1")
    assert printed.startswith("3 images described, 0 were there already")
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["image"] for row in rows] == names
    for row, picture in zip(rows, pictures.values(), strict=True):
        assert row["answer"] == answers_to(bundled, picture, "pai:alpha=1")
    assert any(row["answer"] != answers_to(bundled, images / row["image"], None) for row in rows)

    first, _, last = output.read_text().splitlines(keepends=True)
    output.write_text(first + last)
    printed = run("batch_folder.py", images, output, "--method", "pai:alpha=1")
    assert printed.startswith("1 images described, 2 were there already")
    again = [json.loads(line) for line in output.read_text().splitlines()]
    assert again == [rows[0], rows[2], rows[1]]


def own_coco(folder: Path, count: int) -> Path:
    """COCO-format data of the user's own: the first bundled images, in a folder."""
    with zipfile.ZipFile(emoji.evaluation_split()) as split:
        content = json.loads(split.read("annotations/instances.json"))
        content["images"] = content["images"][:count]
        kept = {image["id"] for image in content["images"]}
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] in kept]
        (folder / "annotations").mkdir(parents=True)
        (folder / "annotations" / "instances.json").write_text(json.dumps(content))
        for image in content["images"]:
            split.extract(f"images/{image['file_name']}", folder)
    return folder


def test_methods_are_compared_on_own_data(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "runs"
    printed = run("compare_methods.py", own_coco(tmp_path / "coco", 6), output)

    def right(arm: str) -> list[bool]:
        """By question, in order, from the stored answers alone."""
        lines = (output / f"samples_pope_{arm}.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        return [row["response"].strip().lower().startswith(row["target"]) for row in rows]

    base, vhr = right("base"), right("vhr")
    assert len(base) == len(vhr) > 50
    difference = 100 * (sum(vhr) - sum(base)) / len(base)
    assert difference != 0
    assert f"pope accuracy, vhr: {difference:+.1f} [" in printed
    verdicts = re.findall(r"^(pope|chair) \w+, ([\w+]+): .*, (within|beyond) noise$", printed, re.M)
    assert [(task, arm) for task, arm, _ in verdicts] == [
        (task, arm) for task in ("pope", "chair") for arm in ("vhr", "pai", "vhr+pai")
    ]
    for bounds, verdict in re.findall(r"\[(.*?)\], (within|beyond) noise", printed):
        low, high = map(float, bounds.split(","))
        if low * high != 0:  # a bound that rounds to 0 may lie on either side
            assert (low * high < 0) == (verdict == "within")


def test_a_method_from_outside(run: Run, bundled: tuple[Any, Any]) -> None:
    printed = run("own_method.py").splitlines()
    rows = [int(re.findall(r"(\d+) rows edited", line)[0]) for line in printed]
    plain = answers_to(bundled, IMAGE, None)
    assert rows[0] == 0 and min(rows[1:]) > 0
    assert printed[0].endswith(plain) and not printed[2].endswith(plain)

    method = runpy.run_path(str(FOLDER / "own_method.py"))["ImageLift"](lift=2.0)
    visual = torch.tensor([[0.0, 1.0, 1.0, 0.0]])
    before = torch.randn(1, 2, 1, 4, dtype=torch.float64)
    share = method.edit_scores(before, lift=method.lift * visual).softmax(-1)
    by_hand = before.exp() * torch.tensor([1.0, 2.0, 2.0, 1.0]).sub(1).mul(2).exp()
    torch.testing.assert_close(share, by_hand / by_hand.sum(-1, keepdim=True))


def test_the_map_of_a_word_is_that_of_the_row_that_wrote_it(
    run: Run, bundled: tuple[Any, Any], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    printed = run("word_attention.py", "umbrella", tmp_path / "map.png")
    with Image.open(tmp_path / "map.png") as picture:
        assert min(picture.size) > 100 and len(picture.convert("RGB").getcolors(2**24)) > 20

    model, processor = bundled
    eager, _ = emoji.load()
    eager.set_attn_implementation("eager")
    inputs = chat_inputs(model, processor, [chat_about(IMAGE)])
    output = model.generate(**inputs, max_new_tokens=100, do_sample=False)
    (token,) = processor.tokenizer(" umbrella", add_special_tokens=False)["input_ids"]
    place = output[0].tolist().index(token)
    full = {**inputs, "input_ids": output, "attention_mask": torch.ones_like(output)}
    with torch.no_grad():
        layers = eager(**full, output_attentions=True).attentions
    row = torch.stack([layer[0, :, place - 1] for layer in layers]).mean((0, 1))
    seen = row[output[0] == eager.config.image_token_id]
    side = round(len(seen) ** 0.5)
    where = divmod(int(seen.argmax()), side)
    plain = (
        f"plain: {float(seen.sum()):.3f} on the image, most at row {where[0]}, column {where[1]}"
    )
    assert plain in printed.splitlines()
    shares = dict(re.findall(r"^(plain|pai): ([\d.]+) on the image", printed, re.M))
    assert float(shares["pai"]) > float(shares["plain"])
