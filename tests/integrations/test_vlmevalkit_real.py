"""The launcher in a real VLMEvalKit: answers are those of generate()."""

from __future__ import annotations

import base64
import csv
import json
import os
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import pandas
import pytest
from PIL import Image

import vlmfix
from vlmfix import emoji

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "Please describe this image in detail."
PAI = "pai:alpha=0.9"

pytestmark = [
    pytest.mark.skipif(
        find_spec("vlmeval") is None,
        reason="needs VLMEvalKit (a checkout, or ms-vlmeval); test_vlmevalkit.py has a fake of it",
    ),
    pytest.mark.timeout(1800),
]


def launch(folder: Path, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "vlmfix.integrations.vlmevalkit", "run"]
        + [*arguments, "--mode", "infer", "--work-dir", str(folder / "out")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "LMUData": str(folder), "PRED_FORMAT": "tsv"},
        capture_output=True,
        text=True,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def answers(folder: Path, name: str) -> list[str]:
    (path,) = (folder / "out").rglob(f"{name}_EmojiTiny.tsv")
    return list(pandas.read_csv(path, sep="\t")["prediction"])


def test_answers_are_those_of_generate(tmp_path: Path) -> None:
    with zipfile.ZipFile(emoji.evaluation_split()) as archive:
        names = sorted(name for name in archive.namelist() if name.startswith("images/"))
        pictures = [archive.read(name) for name in names[:3]]
    with (tmp_path / "EmojiTiny.tsv").open("w", newline="") as file:
        rows = csv.writer(file, delimiter="\t")
        rows.writerow(["index", "image", "question", "answer"])
        for index, picture in enumerate(pictures):
            rows.writerow([index, base64.b64encode(picture).decode(), PROMPT, "-"])
    launch(
        tmp_path,
        *("--pretrained", "emoji", "--method", PAI, "--max-new-tokens", "40"),
        *("--data", "EmojiTiny"),
    )
    base = {"class": "VLMFix", "pretrained": "emoji", "max_new_tokens": 40}
    data = {"EmojiTiny": {"class": "CustomVQADataset", "dataset": "EmojiTiny"}}
    (tmp_path / "config.json").write_text(json.dumps({"model": {"base": base}, "data": data}))
    launch(tmp_path, "--config", "config.json")

    model, processor = vlmfix.load("emoji", device="cpu")

    def expected() -> list[str]:
        contents = [
            [
                {"type": "image", "image": Image.open(BytesIO(picture))},
                {"type": "text", "text": PROMPT},
            ]
            for picture in pictures
        ]
        return [
            vlmfix.generate(
                model,
                processor,
                [{"role": "user", "content": content}],
                max_new_tokens=40,
                do_sample=False,
                num_beams=1,
            )
            for content in contents
        ]

    plain = expected()
    with vlmfix.wrapped(model, PAI):
        edited = expected()
    assert plain != edited
    assert answers(tmp_path, "base") == plain
    assert answers(tmp_path, "vlmfix-emoji-pai_alpha=0.9") == edited
