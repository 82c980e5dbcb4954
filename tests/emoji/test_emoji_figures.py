"""The figures of quick_eval and measure: right on planted cases, complete on the bundled model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vlmfix.emoji
from vlmfix.emoji.catalogue import NAMES
from vlmfix.emoji.dataset import split_scenes
from vlmfix.emoji.measure import _outliers, main, measure
from vlmfix.emoji.training.quick_eval import evaluate, pope_questions


@pytest.fixture(scope="module")
def bundled() -> tuple[Any, Any]:
    return vlmfix.emoji.load()


def test_pope_negatives() -> None:
    objects = [["cup", "fork", "knife"]] * 5 + [["cup", "fork", "dog"], ["cup", "cat", "bed"]]
    asked = pope_questions(objects)
    for kind, rows in asked.items():
        assert len(rows) == 6 * len(objects), kind
        for number, name, there in rows:
            assert there == (name in objects[number]) and name in NAMES
        for number in range(len(objects)):
            names = [name for n, name, _ in rows if n == number]
            assert len(set(names)) == 6
    # Beside a fork the split shows a knife most often, so that is what is asked for.
    last = [name for number, name, there in asked["adversarial"] if number == 5 and not there]
    assert last[0] == "knife"


def test_random_negatives_are_seeded() -> None:
    objects = [["cup", "fork", "knife"]] * 5
    assert pope_questions(objects, 1) == pope_questions(objects, 1) != pope_questions(objects, 2)


def test_outliers_are_shares_of_the_greatest_possible() -> None:
    spike = torch.zeros(16)
    spike[3] = -7.0
    share, channel = _outliers(torch.stack([spike, torch.ones(16)]))
    assert share.tolist() == pytest.approx([1.0, 0.25]) and channel[0] == 3


def test_evaluate_on_the_bundled_model(bundled: tuple[Any, Any]) -> None:
    model, processor = bundled
    scenes = [scene for _, scene in split_scenes("tuning", 4)]
    figures = evaluate(model, processor.tokenizer, scenes)
    assert figures == evaluate(model, processor.tokenizer, scenes)
    assert figures["random"] == pytest.approx(
        (figures["yes_on_present"] + figures["no_on_random"]) / 2, abs=1e-3
    )
    assert figures["words"] > 10 and not model.training


def test_measure_on_the_bundled_model(bundled: tuple[Any, Any]) -> None:
    _, processor = bundled
    from transformers import LlavaForConditionalGeneration

    eager = LlavaForConditionalGeneration.from_pretrained(
        vlmfix.emoji.model_path(), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    figures = measure(eager, processor.tokenizer, [s for _, s in split_scenes("evaluation", 6)])
    layers = eager.config.text_config.num_hidden_layers
    assert len(figures["sinks"]) == len(figures["attention_on_image"]) == layers
    assert all(0 < share < 1 for share in figures["attention_on_image"])
    logits = figures["yes_minus_no"]
    assert logits["present_image"] > logits["present_no_image"]
    assert logits["present_image"] > logits["absent_image"]


def test_measure_refuses_bad_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--images", "0"]) == 2
    assert "at least 1 image" in capsys.readouterr().err
