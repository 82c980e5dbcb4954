"""Sink channels: found where they are, stored by the model's fingerprint, refused elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from matrix import family, logits, prompt
from tiny import build

import vlmfix
from vlmfix.calibrate import (
    FOLDER_FILE,
    cache_folder,
    calibrate,
    fingerprint,
    load_calibration,
)
from vlmfix.doctor import examine
from vlmfix.errors import BadInput, CalibrationNeeded, StateError
from vlmfix.massive import magnitude


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


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 99}', "\x00"])
def test_damaged_file_is_reported(content: str) -> None:
    model = _with_sink()
    path = cache_folder() / "calibration" / f"{fingerprint(model)}.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(BadInput, match="Delete it"):
        load_calibration(model)


def test_wrapped_model_is_refused() -> None:
    model = _with_sink()
    with vlmfix.wrapped(model, None), pytest.raises(StateError, match="unwrap"):
        calibrate(model)
