"""A checkpoint's generation_config: undone where it changes answers, recorded, and resumed with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import GenerationConfig, WatermarkingConfig

import vlmfix.evals
from vlmfix.emoji.training.build import build_model, build_processor
from vlmfix.emoji.training.recipe import QUICK
from vlmfix.errors import BadInput
from vlmfix.evals.running.decoding import neutral, split_config

#: All that a checkpoint may bring, and that makes greedy answers other answers.
CHANGES: dict[str, Any] = {
    "do_sample": True,
    "exponential_decay_length_penalty": (1, 0.1),
    "forced_eos_token_id": 2,
    "guidance_scale": 3.0,
    "min_length": 200,
    "min_p": 0.1,
    "no_repeat_ngram_size": 1,
    "num_beams": 3,
    "num_return_sequences": 2,
    "repetition_penalty": 3.0,
    "temperature": 0.1,
    "top_k": 1,
    "top_p": 0.001,
}


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    processor = build_processor()
    torch.manual_seed(0)
    return build_model(QUICK, processor.tokenizer).eval(), processor


@pytest.fixture
def checkpoint(loaded: tuple[Any, Any]) -> Any:
    model, _ = loaded
    before = model.generation_config
    model.generation_config = GenerationConfig(**before.to_diff_dict())
    yield model.generation_config
    model.generation_config = before


def run(loaded: tuple[Any, Any], out: Path, **options: Any) -> tuple[dict[str, Any], list[str]]:
    settings = {"limit": 2, "max_new_tokens": 12, "batch_size": 2, "quiet": True, **options}
    results = vlmfix.evals.evaluate(["chair"], loaded, output=out, **settings)
    assert not results["errors"]
    lines = (out / "samples_chair_base.jsonl").read_text().splitlines()
    return results, [json.loads(line)["response"] for line in lines]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0}])
def test_a_generation_config_changes_no_answer_and_is_recorded(
    loaded: tuple[Any, Any], checkpoint: Any, tmp_path: Path, sampling: dict[str, Any]
) -> None:
    plain, expected = run(loaded, tmp_path / "plain", **sampling)
    assert plain["config"]["generation_config"]["neutralised"] == {}
    assert plain["config"]["generation_config"]["kept"]["eos_token_id"] == 2
    for name, value in CHANGES.items():
        setattr(checkpoint, name, value)
    results, answers = run(loaded, tmp_path / "changed", **sampling)
    assert answers == expected
    changes = json.loads(json.dumps(CHANGES))
    assert results["config"]["generation_config"]["neutralised"] == changes
    written = json.loads((tmp_path / "changed" / "run.json").read_text())
    assert written["config"]["generation_config"] == results["config"]["generation_config"]


def test_a_resumed_run_refuses_another_generation_config(
    loaded: tuple[Any, Any], checkpoint: Any, tmp_path: Path
) -> None:
    run(loaded, tmp_path / "o")
    checkpoint.eos_token_id = [2, 5]
    with pytest.raises(BadInput, match=r"generation_config\.kept\.eos_token_id: 2 then, \[2, 5\]"):
        run(loaded, tmp_path / "o", resume=True)
    checkpoint.eos_token_id = 2
    checkpoint.repetition_penalty = 1.05
    with pytest.raises(BadInput, match=r"neutralised\.repetition_penalty: None then, 1\.05 now"):
        run(loaded, tmp_path / "o", resume=True)


def test_what_a_model_needs_is_kept() -> None:
    class Model:
        generation_config = GenerationConfig(
            eos_token_id=[1, 2],
            bad_words_ids=[[7]],
            suppress_tokens=[8],
            max_length=4096,
            repetition_penalty=1.0,
            watermarking_config=WatermarkingConfig(),
            chat_format="chatml",
        )

    kept, undone = split_config(Model())
    assert kept == {
        "bad_words_ids": [[7]],
        "chat_format": "chatml",
        "eos_token_id": [1, 2],
        "suppress_tokens": [8],
    }
    assert list(undone) == ["watermarking_config"] and neutral(Model()) == {
        "watermarking_config": None
    }
    assert split_config(object()) == ({}, {})


def test_the_configuration_that_instructblip_generates_by_is_the_one_that_is_undone() -> None:
    model = tiny.build("instructblip").model
    model.language_model.generation_config = GenerationConfig(repetition_penalty=1.5)
    model.generation_config = GenerationConfig(top_k=3)
    assert split_config(model)[1] == {"repetition_penalty": 1.5}
    assert neutral(model) == {"repetition_penalty": 1.0}
