"""What two models, bad pixels, labels and threads at a cold start would break."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from matrix import ROWS, family
from tiny import build, generate_kwargs

import vlmfix
from vlmfix.engine.recorder import VisionRecorder
from vlmfix.errors import BadInput, StateError
from vlmfix.families import describe_model
from vlmfix.families.tower import describe_tower

STRONG = {row.name: row.strong for row in ROWS}


def test_two_models_that_share_a_language_model_are_not_wrapped_both() -> None:
    one, other = build("llava").model, build("llava").model
    other.model.language_model = one.model.language_model
    inputs = family("llava").inputs(1)
    with torch.no_grad():
        plain = other(**inputs).logits
    with vlmfix.wrapped(one, STRONG["pai"]):
        with pytest.raises(StateError, match="part of another wrapped model"):
            vlmfix.wrap(other, STRONG["pai"])
        one(**inputs)
        assert vlmfix.last_call(one).edited_rows
    with vlmfix.wrapped(other, STRONG["pai"]):
        other(**inputs)
    with torch.no_grad():
        assert torch.equal(other(**inputs).logits, plain)


@pytest.mark.parametrize("method", ["cluster", "divprune", "hiprune"])
def test_pixels_that_are_not_numbers_are_refused_by_pruning(method: str) -> None:
    tiny = family("llava")
    inputs = tiny.inputs(2)
    inputs["pixel_values"] = inputs["pixel_values"].clone()
    inputs["pixel_values"][1, 0, 0, 0] = float("nan")
    with vlmfix.wrapped(tiny.model, STRONG[method]):
        for run in (tiny.model, lambda **x: tiny.model.generate(**x, **generate_kwargs())):
            with pytest.raises(BadInput, match=r"image 1 .*are NaN"):
                run(**inputs)


@pytest.mark.parametrize("method", ["vcd", "m3id", "vcd:alpha=0"])
def test_a_loss_beside_combined_logits_is_refused(method: str) -> None:
    tiny = family("llava")
    inputs = tiny.inputs(1)
    with (
        vlmfix.wrapped(tiny.model, STRONG.get(method, method)),
        pytest.raises(BadInput, match="take the loss from the logits"),
    ):
        tiny.model(**inputs, labels=inputs["input_ids"])


def test_the_loss_of_edited_attention_is_that_of_its_logits() -> None:
    tiny = family("llava")
    inputs = tiny.inputs(1)
    for method in ("pai", "gift", "vhr", "steer"):
        with vlmfix.wrapped(tiny.model, STRONG[method]), torch.no_grad():
            output = tiny.model(**inputs, labels=inputs["input_ids"])
        wanted = torch.nn.functional.cross_entropy(
            output.logits[0, :-1].float(), inputs["input_ids"][0, 1:]
        )
        assert torch.allclose(output.loss, wanted, rtol=0, atol=1e-5)


def test_a_count_that_scales_the_loss_is_no_part_of_attention() -> None:
    """Trainer.predict() hands it to the model."""
    tiny = family("llava")
    inputs = tiny.inputs(1)
    given = {"labels": inputs["input_ids"], "num_items_in_batch": torch.tensor(2.0)}
    with vlmfix.wrapped(tiny.model, STRONG["pai"]), torch.no_grad():
        wanted = tiny.model(**inputs).logits
        output = tiny.model(**inputs, **given)
    assert torch.equal(output.logits, wanted)
    losses = torch.nn.functional.cross_entropy(
        wanted[0, :-1].float(), inputs["input_ids"][0, 1:], reduction="sum"
    )
    assert torch.allclose(output.loss, losses / 2, rtol=0, atol=1e-4)


def test_layers_of_a_tower_are_added_while_another_thread_encodes() -> None:
    tiny = build("llava")
    tower = describe_tower(tiny.model, describe_model(tiny.model))
    inputs = tiny.inputs(1)
    entered, added, found = threading.Event(), threading.Event(), []

    def wait(*_: Any) -> None:
        entered.set()
        assert added.wait(20)

    with VisionRecorder(tower, (0,)) as recorder, torch.no_grad():

        def encode() -> None:
            with torch.no_grad():
                tiny.model.get_image_features(inputs["pixel_values"])
            found.extend(recorder.take())

        handle = tower.layers[0].register_forward_pre_hook(wait)
        thread = threading.Thread(target=encode)
        thread.start()
        assert entered.wait(20)
        recorder.add((0, 1))
        added.set()
        thread.join()
        handle.remove()
        assert [set(tile.received) for image in found for tile in image.tiles] == [{0}]
        tiny.model.get_image_features(inputs["pixel_values"])
        assert [set(tile.received) for image in recorder.take() for tile in image.tiles] == [{0, 1}]
        with pytest.raises(BadInput, match="at least one index"):
            recorder.add((99,))
    assert not any("_vlmfix" in name for module in tiny.model.modules() for name in vars(module))


def test_methods_that_read_the_tower_follow_each_other_on_one_model() -> None:
    """What a method asks of a tower it finds, too, where another one reads it already."""
    tiny = build("llava")
    inputs = tiny.inputs(1)
    with vlmfix.wrapped(tiny.model, STRONG["imba"]):
        for name in ("hiprune", "visionzip", "ptp"):
            with vlmfix.using(tiny.model, STRONG[name]):
                tiny.model.generate(**inputs, **generate_kwargs())
                assert vlmfix.last_call(tiny.model).visual_tokens
