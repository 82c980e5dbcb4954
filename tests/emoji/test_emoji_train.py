"""Training: batches tokenised as the chat template does, resume after a kill, refusals."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from vlmfix.emoji import draw
from vlmfix.emoji.catalogue import NAMES
from vlmfix.emoji.training.batches import BLANK, Batches, class_grid, name_matrix, to_pixels
from vlmfix.emoji.training.build import VISUAL_TOKENS, build_processor
from vlmfix.emoji.training.recipe import QUICK, RECIPE
from vlmfix.emoji.training.stages import learning_rate_share
from vlmfix.emoji.training.train import main, train
from vlmfix.emoji.world import Item, sample_scene
from vlmfix.errors import BadInput

COMMAND = [
    sys.executable,
    "-m",
    "vlmfix.emoji.training.train",
    "--quick",
    "--threads",
    "1",
    "--output",
]


@pytest.fixture(scope="module")
def processor() -> Any:
    return build_processor()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quick run without interruption."""
    output = tmp_path_factory.mktemp("whole")
    train(QUICK, output)
    return output


def test_training_text_is_what_the_chat_template_gives(processor: Any) -> None:
    batches = Batches(RECIPE, processor.tokenizer)
    rng = Random(0)
    for _ in range(10):
        scene = sample_scene(rng)
        turns = batches.conversation(rng, scene)
        messages = []
        for number, (user, assistant) in enumerate(turns):
            content = [{"type": "text", "text": user}]
            if number == 0:
                content.insert(0, {"type": "image", "image": draw.paint(scene)})
            messages += [
                {"role": "user", "content": content},
                {"role": "assistant", "content": [{"type": "text", "text": assistant}]},
            ]
        expected = processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_tensors="pt"
        )
        ids, labels = batches.tokens(turns)
        assert ids == expected["input_ids"][0].tolist()
        assert ids.count(processor.image_token_id) == VISUAL_TOKENS
        assert torch.equal(to_pixels([draw.paint(scene)]), expected["pixel_values"])
        answers = processor.tokenizer.decode([label for label in labels if label >= 0])
        assert answers == "".join(f" {assistant}</s>" for _, assistant in turns)


def test_tokenizer_covers_the_world_and_everything_else(processor: Any) -> None:
    tokenizer = processor.tokenizer
    for name in NAMES:
        ids = tokenizer(f" {name}", add_special_tokens=False).input_ids
        assert len(ids) == len(name.split()), name
    odd = "Zürich 東京 \U0001f433 \t ~x"
    assert tokenizer.decode(tokenizer(odd).input_ids, skip_special_tokens=True) == odd
    assert tokenizer.padding_side == "left"


def test_class_grid_gives_every_object_a_patch() -> None:
    for size in (3, 13, 36):
        for left in range(0, 112 - size, 5):
            item = Item("dog", (left, left, left + size, left + size), size, False, False)
            grid = class_grid((item,))
            assert (grid == NAMES.index("dog")).any(), (size, left)
            assert (grid == BLANK).any()


def test_class_grid_is_where_the_object_is() -> None:
    grid = class_grid((Item("cat", (84, 0, 112, 28), 28, False, False),)).reshape(8, 8)
    where = (grid == NAMES.index("cat")).nonzero()
    assert set(where[0].tolist()) == {0, 1} and set(where[1].tolist()) == {6, 7}


def test_names_average_their_words(processor: Any) -> None:
    matrix = name_matrix(processor.tokenizer)
    assert torch.allclose(matrix.sum(1), torch.ones(len(NAMES) + 1))
    assert (matrix[NAMES.index("hot dog")] > 0).sum() == 2
    assert matrix[BLANK, processor.tokenizer.bos_token_id] == 1


def test_learning_rate_schedule() -> None:
    shares = [learning_rate_share(step, 100, 10, 0.1) for step in range(100)]
    assert shares[0] == pytest.approx(0.1, abs=0.01)
    assert shares.index(max(shares)) in (8, 9, 10)
    assert shares[-1] == pytest.approx(0.1, abs=0.01)


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights(tmp_path: Path, finished: Path) -> None:
    output = tmp_path / "killed"
    with subprocess.Popen([*COMMAND, str(output)], stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not (output / "checkpoint.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
    assert (output / "checkpoint.pt").exists() and not (output / "model").exists()
    before = torch.load(output / "checkpoint.pt", weights_only=True)
    assert (before["stage"], before["step"]) != ("joint", QUICK.joint.steps)
    train(QUICK, output)
    ours, whole = (
        torch.load(folder / "checkpoint.pt", weights_only=True)["model"]
        for folder in (output, finished)
    )
    assert ours.keys() == whole.keys()
    assert all(torch.equal(ours[name], whole[name]) for name in ours)


def test_output_is_complete(finished: Path) -> None:
    from transformers import LlavaForConditionalGeneration

    record = json.loads((finished / "model" / "training.json").read_text())
    assert record["digest"] == QUICK.digest()
    assert {"random", "adversarial", "recall", "chair_i"} <= record["tuning"].keys()
    model = LlavaForConditionalGeneration.from_pretrained(finished / "model")
    assert model.dtype == torch.bfloat16
    assert model.get_input_embeddings().weight is model.lm_head.weight


def test_a_checkpoint_of_another_recipe_is_refused(finished: Path) -> None:
    other = replace(QUICK, seed=99)
    with pytest.raises(BadInput) as caught:
        train(other, finished)
    assert other.digest() in str(caught.value) and QUICK.digest() in str(caught.value)


def test_a_damaged_checkpoint_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(b"torn")
    assert main(["--quick", "--output", str(tmp_path)]) == 2
    assert "Remove it to start over" in capsys.readouterr().err
