"""Calibration: found where it is, stored by the model's fingerprint, refused elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_folders
import torch
from matrix import family, logits, prompt
from tiny import build

import vlmfix
from vlmfix.analysis.calibrate import (
    FOLDER_FILE,
    cache_folder,
    calibrate,
    fingerprint,
    load_calibration,
    store,
)
from vlmfix.analysis.divergence import measure_divergence
from vlmfix.analysis.doctor import examine
from vlmfix.analysis.massive import magnitude
from vlmfix.chat import chat_inputs
from vlmfix.emoji.dataset import split_scenes
from vlmfix.emoji.draw import paint
from vlmfix.errors import BadInput, CalibrationNeeded, StateError

QUESTION = "Please describe this image in detail."


def _with_sink(channels: tuple[int, ...] = (5, 40)) -> Any:
    """A tiny llava whose first token is massive in some channels, as in trained models."""
    model = build("llava").model
    with torch.no_grad():
        row = model.get_input_embeddings().weight[1]
        row.zero_()
        row[list(channels)] = 8.0
        for name, parameter in model.model.language_model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_(0.02)
    return model


def test_magnitude_is_bounded_by_the_square_root_of_the_width() -> None:
    spike = torch.zeros(64)
    spike[3] = 100.0
    assert magnitude(spike).max() == pytest.approx(8.0, abs=1e-4)
    assert magnitude(torch.ones(2, 3, 64)).shape == (2, 3, 64)
    assert torch.allclose(magnitude(torch.full((64,), -2.0)), torch.ones(64), atol=1e-5)


def test_finds_the_channels_and_wrap_loads_them(own_cache: Path) -> None:
    model = _with_sink()
    with pytest.raises(CalibrationNeeded, match="vlmfix calibrate"):
        vlmfix.wrap(model, "var")
    result = calibrate(model)
    assert sorted(result.sink_channels) == [5, 40]
    assert result.tau == pytest.approx(0.3125 * 8)
    assert result.path is not None and Path(result.path).parent == own_cache / "calibration"
    assert load_calibration(model) == result
    with vlmfix.wrapped(model, "var"):
        method = model.__dict__["_vlmfix_session"].default.methods[0]
        assert method.sink_channels == result.sink_channels and method.tau == result.tau
    assert list(own_cache.rglob("*.tmp")) == []


def test_at_most_four_channels_strongest_first() -> None:
    model = _with_sink((1, 2, 3))
    with torch.no_grad():
        model.get_input_embeddings().weight[1, 2] = 11.0
    assert calibrate(model, save=False).sink_channels[0] == 2


def test_a_model_without_sinks_fails_loudly_and_writes_nothing(own_cache: Path) -> None:
    with pytest.raises(CalibrationNeeded, match="no sink channels"):
        calibrate(family("qwen3_vl").model)
    assert not own_cache.exists()


def test_the_finding_that_there_are_no_sinks_can_be_kept() -> None:
    tiny = family("qwen3_vl")
    result = calibrate(tiny.model, allow_none=True)
    assert result.sink_channels == () and result.largest > 0
    assert load_calibration(tiny.model) == result
    inputs = prompt(tiny)
    plain = logits(tiny.model, inputs)
    with pytest.warns(UserWarning, match="var will change nothing: its calibration found no sink"):
        vlmfix.wrap(tiny.model, "var:last_layer=official")
    try:
        assert torch.equal(logits(tiny.model, inputs), plain)
        assert vlmfix.last_call(tiny.model).edited_rows == 0
    finally:
        vlmfix.unwrap(tiny.model)
    fit = {row["name"]: row for row in examine(tiny.model)["methods"]}["var"]
    assert not fit["fits"] and "would change nothing" in fit["why"]


def test_another_model_never_gets_the_calibration() -> None:
    model = _with_sink()
    calibrate(model)
    other = _with_sink()
    with torch.no_grad():  # a fine-tune that moved one matrix
        other.model.language_model.layers[1].mlp.up_proj.weight.add_(1e-3)
    assert fingerprint(other) != fingerprint(model)
    assert load_calibration(other) is None
    assert fingerprint(_with_sink()) == fingerprint(model)


def test_fingerprint_survives_saving_and_a_folder_may_carry_its_file(tmp_path: Path) -> None:
    model = _with_sink()
    with pytest.raises(BadInput, match="not loaded from a folder"):
        calibrate(model, beside=True)
    model.save_pretrained(tmp_path / "m")
    again = type(model).from_pretrained(tmp_path / "m").eval()
    result = calibrate(again, beside=True)
    assert result.path == str(tmp_path / "m" / FOLDER_FILE)
    assert fingerprint(again) == fingerprint(model) == result.fingerprint
    assert load_calibration(again) == result and load_calibration(model) is None
    # A file that came from another model is not believed.
    content = json.loads((tmp_path / "m" / FOLDER_FILE).read_text())
    (tmp_path / "m" / FOLDER_FILE).write_text(json.dumps({**content, "fingerprint": "0" * 32}))
    assert load_calibration(again) is None


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"format": 99}', '{"format": 1, "odd": 2}', "\x00"]
)
def test_damaged_file_is_reported(content: str) -> None:
    model = _with_sink()
    path = cache_folder() / "calibration" / f"{fingerprint(model)}.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(BadInput, match="Delete it"):
        load_calibration(model)


def test_a_file_of_before_the_other_parts_still_loads() -> None:
    model = _with_sink()
    path = cache_folder() / "calibration" / f"{fingerprint(model)}.json"
    path.parent.mkdir(parents=True)
    old = {
        "format": 1, "fingerprint": fingerprint(model), "model_type": "llava",
        "sink_channels": [5, 40], "tau": 2.5, "largest": 5.6, "layers": [0, 1, 2],
        "magnitudes": {"5": 5.5, "40": 5.4},
    }  # fmt: skip
    path.write_text(json.dumps(old))
    loaded = load_calibration(model)
    assert loaded is not None and loaded.sink_channels == (5, 40)
    assert loaded.magnitudes == {5: 5.5, 40: 5.4}
    assert loaded.vision_heads is None and loaded.hallucination_heads is None
    assert loaded.gift_saliency_layer is None and loaded.gift_layers is None


def test_parts_are_measured_one_by_one_and_kept_together(own_cache: Path) -> None:
    model, processor = _with_sink(), tiny_folders.processor()
    heads = calibrate(model, processor, only=("heads",))
    assert heads.sink_channels is None and heads.gift_layers is None
    assert heads.vision_heads is not None
    assert [len(row) for row in heads.vision_heads] == [4, 4, 4]
    assert min(map(min, heads.vision_heads)) > 0
    with pytest.raises(CalibrationNeeded, match="var does not know the sink channels"):
        vlmfix.wrap(model, "var")
    gift = calibrate(model, processor, only=("gift",))
    assert gift.vision_heads == heads.vision_heads
    assert gift.gift_changes is not None and gift.gift_correlations is not None
    assert gift.gift_changes[gift.gift_saliency_layer or 0] == max(gift.gift_changes)
    positive = tuple(layer for layer, c in enumerate(gift.gift_correlations) if c > 0)
    assert gift.gift_layers == positive
    store(model, hallucination_heads=((2, 1), (0, 3)))
    sinks = calibrate(model)
    assert sorted(sinks.sink_channels or ()) == [5, 40]
    assert sinks.hallucination_heads == ((2, 1), (0, 3))
    assert (sinks.vision_heads, sinks.gift_layers) == (heads.vision_heads, gift.gift_layers)
    assert load_calibration(model) == sinks
    assert calibrate(model, save=False, only=["sinks"]).gift_changes == gift.gift_changes
    assert len(list(own_cache.rglob("*"))) == 2  # one folder, one file


def test_with_a_processor_of_images_everything_is_measured() -> None:
    found = calibrate(_with_sink(), tiny_folders.processor(), save=False)
    assert found.sink_channels and found.vision_heads and found.gift_changes
    assert found.gift_saliency_layer is not None and found.gift_layers is not None
    tokenizer_only = calibrate(_with_sink(), tiny_folders.tokenizer(), save=False)
    assert tokenizer_only.sink_channels and tokenizer_only.vision_heads is None


def test_vision_heads_are_the_mean_divergence_over_the_tuning_pictures() -> None:
    model, processor = _with_sink(), tiny_folders.processor()
    found = calibrate(model, processor, only=("heads",), save=False).vision_heads
    total = torch.zeros(3, 4)
    for _, scene in split_scenes("tuning", 8):
        parts = [{"type": "image", "image": paint(scene)}, {"type": "text", "text": QUESTION}]
        inputs = chat_inputs(model, processor, [[{"role": "user", "content": parts}]])
        total += measure_divergence(model, inputs)[:, 0] / 8
    assert torch.allclose(torch.tensor(found), total, atol=1e-4)


@pytest.mark.parametrize("only", [(), ("sink",), ("sinks", "vision")])
def test_unknown_parts_are_refused(only: tuple[str, ...]) -> None:
    with pytest.raises(BadInput, match="one or more of sinks, heads, gift"):
        calibrate(_with_sink(), tiny_folders.processor(), only=only)


def test_parts_that_need_pictures_need_a_processor(own_cache: Path) -> None:
    for processor in (None, tiny_folders.tokenizer()):
        with pytest.raises(BadInput, match="needs its processor"):
            calibrate(_with_sink(), processor, only=("sinks", "gift"))
    assert not own_cache.exists()


def test_no_sinks_do_not_keep_the_rest_from_being_measured(own_cache: Path) -> None:
    model, processor = build("llava").model, tiny_folders.processor()
    with pytest.raises(CalibrationNeeded, match="--only heads,gift"):
        calibrate(model, processor)
    assert not own_cache.exists()
    assert calibrate(model, processor, only=("heads", "gift")).gift_layers is not None


def test_the_cache_and_the_model_folder_complete_each_other(tmp_path: Path) -> None:
    _with_sink().save_pretrained(tmp_path)
    model = type(_with_sink()).from_pretrained(tmp_path).eval()
    calibrate(model, beside=True)
    store(model, hallucination_heads=((0, 1),))
    both = load_calibration(model)
    assert both is not None and both.sink_channels and both.hallucination_heads == ((0, 1),)
    # What is measured here wins over what came with the weights.
    store(model, sink_channels=(7,))
    again = load_calibration(model)
    assert again is not None and again.sink_channels == (7,)
    # Written beside the weights, all of it moves there.
    moved = store(model, beside=True, sink_channels=(8,))
    assert moved.hallucination_heads == ((0, 1),)
    assert load_calibration(model) == moved and moved.path == str(tmp_path / FOLDER_FILE)
    assert not list((cache_folder() / "calibration").iterdir())


def test_wrapped_model_is_refused() -> None:
    model = _with_sink()
    with vlmfix.wrapped(model, None), pytest.raises(StateError, match="unwrap"):
        calibrate(model)
    model.train()
    with pytest.raises(StateError, match="training mode"):
        calibrate(model, tiny_folders.processor(), only=("heads",))


def test_the_bundled_model_carries_its_calibration() -> None:
    model, processor = vlmfix.load("emoji")
    stored = load_calibration(model)
    assert stored is not None and stored.hallucination_heads
    found = calibrate(model, processor, save=False, allow_none=True)
    assert found.sink_channels == stored.sink_channels == ()
    assert (found.gift_saliency_layer, found.gift_layers) == (
        stored.gift_saliency_layer,
        stored.gift_layers,
    )
    assert found.gift_correlations == pytest.approx(stored.gift_correlations, abs=1e-2)
    assert torch.allclose(
        torch.tensor(found.vision_heads), torch.tensor(stored.vision_heads), rtol=1e-2, atol=1e-2
    )
