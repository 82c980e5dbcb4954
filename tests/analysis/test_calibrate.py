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
    # Three layers: without the last one VAR would have none to edit.
    with vlmfix.wrapped(model, "var:last_layer=official"):
        method = model.__dict__["_vlmfix_session"].default.methods[0]
        assert method.sink_channels == result.sink_channels and method.tau == result.tau
    assert list(own_cache.rglob("*.tmp")) == []


def test_at_most_four_channels_strongest_first() -> None:
    model = _with_sink((1, 2, 3))
    with torch.no_grad():
        model.get_input_embeddings().weight[1, 2] = 11.0
    assert calibrate(model, save=False).sink_channels[0] == 2


def test_a_model_without_sinks_fails_loudly_and_writes_nothing(own_cache: Path) -> None:
    half = "exceed .* = 2.5 in at least half of the layers 0 to 2; the best does so in 1 of 3"
    with pytest.raises(CalibrationNeeded, match=f"no sink channels.*{half}"):
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
    last = _with_sink()
    with torch.no_grad():  # and one that moved its last rows
        last.model.language_model.layers[1].mlp.up_proj.weight[-2:].neg_()
    assert fingerprint(last) != fingerprint(model)


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
    # A file that came from another model is not believed, and named.
    content = json.loads((tmp_path / "m" / FOLDER_FILE).read_text())
    (tmp_path / "m" / FOLDER_FILE).write_text(json.dumps({**content, "fingerprint": "0" * 32}))
    with pytest.warns(UserWarning, match=f"{FOLDER_FILE} is not used: it was measured on another"):
        assert load_calibration(again) is None


def _stored(model: Any, content: str | bytes) -> Path:
    """A calibration file of the user's, with this in it."""
    path = cache_folder() / "calibration" / f"{fingerprint(model)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"format": 99}',
        '{"format": 1, "odd": 2}',
        "\x00",
        b"\xff\xfe",
        "[" * 200_000,
        '{"format": 1, "tau": ' + "9" * 5_000 + "}",
    ],
    ids=range(9),
)
def test_damaged_file_is_reported(content: str | bytes) -> None:
    model = _with_sink()
    _stored(model, content)
    with pytest.raises(BadInput, match="Delete it"):
        load_calibration(model)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("fingerprint", 5),
        ("model_type", None),
        ("sink_channels", "abc"),
        ("sink_channels", [1.5]),
        ("sink_channels", [-1]),
        ("sink_channels", {"a": 1}),
        ("tau", "x"),
        ("tau", -1),
        ("tau", float("nan")),
        ("layers", [True]),
        ("magnitudes", [1]),
        ("magnitudes", {"1": "a"}),
        ("vision_heads", [1, 2]),
        ("gift_saliency_layer", 1.5),
        ("gift_layers", 5),
        ("gift_changes", [None]),
        ("hallucination_heads", [[0, 1, 2]]),
        ("hallucination_heads", ["ab"]),
        ("path", "/etc/passwd"),
    ],
)
def test_a_field_of_the_wrong_kind_is_reported(field: str, value: Any) -> None:
    model = _with_sink()
    good = {"format": 1, "fingerprint": fingerprint(model), "model_type": "llava"}
    _stored(model, json.dumps(good))
    assert load_calibration(model) is not None
    _stored(model, json.dumps({**good, field: value}))
    with pytest.raises(BadInput, match=f"cannot be read .*{field}.*Delete it"):
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


def test_the_fingerprint_does_not_depend_on_the_dtype() -> None:
    model, _ = vlmfix.load("emoji")
    before = fingerprint(model)
    for dtype in (torch.bfloat16, torch.float16):
        loaded, _ = vlmfix.load("emoji", dtype=dtype)
        assert fingerprint(loaded) == before
        stored = load_calibration(loaded)
        assert stored is not None and stored.hallucination_heads
    assert fingerprint(model.to(torch.bfloat16)) == before


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_offloaded_models_keep_their_calibration_and_answer(where: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    chat = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": "emoji:1"},
                {"type": "text", "text": "Describe the image."},
            ],
        }
    ]
    greedy = {"max_new_tokens": 6, "do_sample": False}
    model, processor = vlmfix.load("emoji")
    before, known = fingerprint(model), load_calibration(model)
    methods = ("gift", "ad_hh", "pai", "vhr", "vcd", "divprune")
    said = {None: vlmfix.generate(model, processor, chat, **greedy)}
    for method in methods:
        torch.manual_seed(0)
        with vlmfix.wrapped(model, method):
            said[method] = vlmfix.generate(model, processor, chat, **greedy)
    if where == "memory":
        accelerate.cpu_offload(model, torch.device("cpu"))
    else:
        accelerate.disk_offload(model, tmp_path, torch.device("cpu"))
    assert model.device.type == "meta"
    assert fingerprint(model) == before and load_calibration(model) == known
    assert vlmfix.generate(model, processor, chat, **greedy) == said[None]
    for method in methods:
        torch.manual_seed(0)
        with vlmfix.wrapped(model, method):
            assert model.__dict__["_vlmfix_session"].host.device(0).type == "cpu"
            assert vlmfix.generate(model, processor, chat, **greedy) == said[method], method
    found = calibrate(model, processor, only=("sinks",), save=False, allow_none=True)
    assert known is not None and found.largest == known.largest


def test_a_quantised_model_shares_the_calibration_of_the_plain_one() -> None:
    model, quantised = _with_sink(), _with_sink()
    quantised.config.quantization_config = {"quant_method": "some", "bits": 8}
    plain, packed = fingerprint(model), fingerprint(quantised)
    assert packed.endswith("-quantised") and packed.split("-")[0] == plain.split("-")[0]
    calibrate(model)
    found = load_calibration(quantised)
    assert found is not None and found.sink_channels
    # What is measured on the quantised model is its own, and completes the plain one's.
    store(quantised, sink_channels=(3,), hallucination_heads=((0, 1),))
    again, back = load_calibration(quantised), load_calibration(model)
    assert again is not None and again.sink_channels == (3,)
    assert back is not None and back.sink_channels == found.sink_channels
    assert back.hallucination_heads == ((0, 1),)
    other = _with_sink()
    with torch.no_grad():
        other.get_input_embeddings().weight.neg_()
    other.config.quantization_config = {"quant_method": "some"}
    assert load_calibration(other) is None


def test_parameters_in_a_quantisers_code_are_not_compared() -> None:
    model = _with_sink()
    layer = model.model.language_model.layers[0].mlp.up_proj
    codes = torch.zeros(layer.weight.shape, dtype=torch.uint8)
    layer.weight = torch.nn.Parameter(codes, requires_grad=False)
    assert fingerprint(model).endswith("-quantised")


def test_several_calibrations_that_fit_a_quantised_model_are_named() -> None:
    model, tuned, quantised = _with_sink(), _with_sink(), _with_sink()
    with torch.no_grad():
        tuned.model.language_model.layers[1].mlp.up_proj.weight.neg_()
    quantised.config.quantization_config = {"quant_method": "some"}
    store(model, sink_channels=(1,))
    store(tuned, sink_channels=(2,))
    with pytest.warns(UserWarning, match=fingerprint(tuned)):
        assert load_calibration(quantised) is None


def test_a_model_without_weights_has_no_calibration() -> None:
    model = build("llava").model.to("meta")
    with pytest.raises(StateError, match="has no weights"):
        fingerprint(model)
    assert load_calibration(model) is None
    assert examine(model)["supported"]
    with pytest.raises(StateError, match="has no weights"):
        chat_inputs(
            model, tiny_folders.processor(), [[{"role": "user", "content": "is there a dog ?"}]]
        )


def test_a_folder_that_cannot_be_written_to_is_refused_before_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*arguments: Any) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr("vlmfix.analysis.calibrate._sinks", measured)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VLMFIX_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(BadInput, match="cannot be written.*VLMFIX_CACHE"):
        calibrate(_with_sink(), only=("sinks",))
    _with_sink().save_pretrained(tmp_path / "m")
    model = type(_with_sink()).from_pretrained(tmp_path / "m").eval()
    (tmp_path / "m" / FOLDER_FILE).mkdir()
    with pytest.raises(BadInput, match="cannot be written.*cache folder"):
        calibrate(model, only=("sinks",), beside=True)


def test_a_file_beside_the_weights_can_be_read_by_whoever_reads_them(tmp_path: Path) -> None:
    _with_sink().save_pretrained(tmp_path)
    model = type(_with_sink()).from_pretrained(tmp_path).eval()
    (tmp_path / "new").write_text("")
    store(model, beside=True, sink_channels=(1,))
    file = tmp_path / FOLDER_FILE
    assert file.stat().st_mode == (tmp_path / "new").stat().st_mode
    file.chmod(0o640)
    store(model, beside=True, sink_channels=(2,))
    assert file.stat().st_mode & 0o777 == 0o640
    assert not list(tmp_path.glob("*.tmp"))


def test_the_file_of_the_bundled_model_belongs_to_the_package() -> None:
    model, _ = vlmfix.load("emoji")
    with pytest.raises(BadInput, match="belongs to the package"):
        store(model, beside=True, gift_saliency_layer=1)
