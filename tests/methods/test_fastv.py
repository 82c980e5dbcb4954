"""FastV: the tokens a row attends to most, and options; tests/engine/test_layer_pruning.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from matrix import family
from pruned import check_a_row_without_image, check_text_only_is_untouched
from tiny import build as build_tiny
from tiny_configs import IMAGE

import vlmfix
from vlmfix import visual_tokens
from vlmfix.errors import BadInput
from vlmfix.families import describe_model
from vlmfix.methods.fastv import FastV
from vlmfix.registry import build


@pytest.mark.parametrize(
    ("attention", "budget", "kept"),
    [
        ([0.02, 0.10, 0.05, 0.20, 0.01, 0.15], 3, [1, 3, 5]),
        ([0.1, 0.4, 0.2, 0.3], 2, [1, 3]),
        ([0.1, 0.4, 0.2, 0.3], 1, [1]),
        ([0.1, 0.4, 0.2, 0.3], 3, [1, 2, 3]),
        ([0.2, 0.1, 0.2, 0.2], 2, [0, 2]),  # of equal ones the first
        ([0.0, 0.0, 0.0], 2, [0, 1]),
    ],
)
def test_the_largest_stay_in_their_order(
    attention: list[float], budget: int, kept: list[int]
) -> None:
    assert FastV().keep(torch.tensor(attention), budget).tolist() == kept


def test_options() -> None:
    assert build("fastv") == FastV()
    assert build("fastv:layer=3;tokens=64") == FastV(layer=3, tokens=64)
    assert (FastV().budget(576), FastV(ratio=0.25).budget(576), FastV(tokens=9).budget(4)) == (
        288,
        144,
        4,
    )
    with pytest.raises(BadInput, match="two budgets"):
        FastV(tokens=4, ratio=0.5)
    with pytest.raises(BadInput, match="layer=0 leaves no layer to choose by"):
        FastV(layer=0)


def test_its_layer_is_the_first_without_the_dropped() -> None:
    tiny = family("llava")
    for layer in (1, 2):
        assert FastV(layer=layer).first_layer(describe_model(tiny.model)) == layer
        with vlmfix.wrapped(tiny.model, FastV(layer=layer, tokens=3)):
            cache = tiny.model.generate(
                **tiny.inputs(), max_new_tokens=1, return_dict_in_generate=True
            ).past_key_values
        held = [layer.get_seq_length() for layer in cache.layers]
        assert held == [24] * layer + [24 - 13] * (3 - layer)


@pytest.mark.parametrize(("name", "layer"), [("llava", 2), ("qwen2_5_vl", 2), ("qwen3_vl", 2)])
def test_the_default_layer_is_one_that_the_model_can_take(name: str, layer: int) -> None:
    model = family(name).model
    info = describe_model(model)
    info = replace(info, num_layers=8, attention=dict.fromkeys(range(8), info.attention[1]))
    assert FastV().prepared(info, model).layer == layer
    assert FastV(layer=4).prepared(info, model).layer == 4
    # Qwen3-VL of full size adds image features in layers 0 to 2.
    indexes = getattr(model.config.vision_config, "deepstack_visual_indexes", None)
    if indexes is not None:
        model.config.vision_config.deepstack_visual_indexes = [0, 0, 0]
        try:
            assert FastV().prepared(info, model).layer == 3
            with pytest.raises(BadInput, match="at least 3: image features enter"):
                FastV(layer=2).prepared(info, model)
        finally:
            model.config.vision_config.deepstack_visual_indexes = indexes
    # Where only some layers have attention, the one before it has to be one of them.
    hybrid = replace(info, attention={3: info.attention[1], 7: info.attention[1]})
    assert FastV().prepared(hybrid, model).layer == 4


def test_the_layer_before_decides() -> None:
    tiny = family("llava")
    inputs = tiny.inputs(batch=2)
    early, late = (
        [own[0].index.tolist() for own in visual_tokens(tiny.model, inputs, FastV(layer=layer))]
        for layer in (1, 2)
    )
    assert early != late and early[0] != early[1]


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_it_is_shown_the_last_rows_mean_over_heads(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = build_tiny(name)
    inputs = tiny.inputs(batch=2)
    shown: list[torch.Tensor] = []
    keep = FastV.keep

    def record(method: FastV, attention: torch.Tensor, budget: int) -> torch.Tensor:
        shown.append(attention)
        return keep(method, attention, budget)

    monkeypatch.setattr(FastV, "keep", record)
    with vlmfix.wrapped(tiny.model, FastV(layer=2)), torch.no_grad():
        tiny.model(**inputs)
    tiny.model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = tiny.model(**inputs, output_attentions=True).attentions[1]
    for row, attention in enumerate(shown):
        visual = inputs["input_ids"][row] == IMAGE
        assert torch.allclose(attention, weights[row, :, -1, visual].mean(0), atol=1e-6)
        assert 0 < float(attention.sum()) < 1
    assert len(shown) == 2


def test_text_only_and_rows_without_image() -> None:
    check_text_only_is_untouched(family("llava"), "fastv")
    check_a_row_without_image(family("llava"), "fastv")
