"""Vision-aware head divergence: worked numbers, and the measurement on tiny models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from matrix import family, logits, prompt
from prompts import observed
from tiny import FAMILIES

import vlmfix
from vlmfix.analysis.divergence import (
    LastHeads,
    head_divergence,
    measure_divergence,
    prune_outliers,
    select_heads,
    total_divergence,
)
from vlmfix.errors import BadInput
from vlmfix.families import describe_model

WITH = torch.tensor([[3, 4], [1, 0], [0.5, 0.5], [2, 2]], dtype=torch.float64)
WITHOUT = torch.tensor([[0, 0], [1, 1], [0.5, 0.5], [8, 10]], dtype=torch.float64)


def _vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_worked_layer() -> None:
    divergence = head_divergence(WITH, WITHOUT)
    assert torch.equal(divergence, _vector(5, 1, 0, 10))
    activation = WITHOUT.square().sum(-1)
    assert torch.equal(activation, _vector(0, 2, 0.5, 164))
    for values, bound in ((divergence, 8.546061), (activation, 123.212759)):
        assert float(values.mean() + values.std()) == pytest.approx(bound, abs=1e-6)
    pruned = prune_outliers(divergence, WITHOUT)
    assert torch.equal(pruned, _vector(5, 1, 0, 0))
    assert select_heads(pruned).tolist() == [True, True, False, False]
    assert select_heads(divergence).tolist() == [True, False, False, True]


def test_an_outlier_must_be_large_in_both() -> None:
    divergence = _vector(0, 0, 0, 10)
    quiet = torch.zeros(4, 2, dtype=torch.float64)
    assert torch.equal(prune_outliers(divergence, quiet), divergence)
    quiet[0] = 9  # another head flares up without the image
    assert torch.equal(prune_outliers(divergence, quiet), divergence)
    assert torch.equal(prune_outliers(divergence, quiet.flip(0)), torch.zeros_like(divergence))


def test_sigma_is_unbiased() -> None:
    """A head between mean + biased sigma and mean + unbiased sigma stays."""
    values = _vector(0, 0.6, 1)  # mean .533, sigma .411 biased, .503 unbiased
    assert values.mean() + values.std(correction=0) < 1 < values.mean() + values.std()
    outputs = values.sqrt()[:, None]
    assert torch.equal(prune_outliers(values, outputs), values)


def test_text_only_activation_is_the_squared_norm() -> None:
    """Norms 0, 0.6, 1 have no outlier (see above), their squares have one."""
    outputs, divergence = _vector(0, 0.6, 1)[:, None], _vector(0, 0, 1)
    assert not prune_outliers(divergence, outputs).any()


@pytest.mark.parametrize("heads", [8, 28, 32])
def test_half_of_the_heads_of_each_sample_is_selected(heads: int) -> None:
    generator = torch.Generator().manual_seed(heads)
    divergence = torch.stack(
        [torch.randperm(heads, generator=generator) for _ in range(3)]
    ).double()
    divergence[2] *= 100  # each sample on its own
    selected = select_heads(divergence)
    assert selected.sum(-1).tolist() == [heads // 2] * 3
    assert torch.equal(selected, divergence >= _vector(0.5, 0.5, 50)[:, None] * heads)


def test_ties_with_the_median_are_not_selected() -> None:
    assert not select_heads(torch.zeros(2, 8)).any()
    assert select_heads(_vector(0, 0, 0, 5)).tolist() == [False, False, False, True]


def test_total_divergence() -> None:
    divergence = torch.tensor([[[5.0, 1, 0, 10], [1, 2, 3, 4]], [[0, 0, 2, 0], [1, 1, 1, 1]]])
    assert total_divergence(divergence, top=2).tolist() == [17, 9]
    assert total_divergence(divergence).tolist() == [18, 14]
    for top in (0, 5):
        with pytest.raises(BadInput, match="from 1 to 4"):
            total_divergence(divergence, top)


# -- inside a model --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_measured_heads_are_the_inputs_of_the_output_projection(name: str) -> None:
    tiny = family(name)
    inputs = prompt(tiny)
    info = describe_model(tiny.model)
    seen: dict[int, torch.Tensor] = {}
    handles = []
    for layer, attention in info.attention.items():
        module: Any = attention

        def keep(_: Any, args: Any, layer: int = layer) -> None:
            seen[layer] = args[0][:, -1].unflatten(-1, (info.num_heads, -1))

        handles.append(module.o_proj.register_forward_pre_hook(keep))
    plain = logits(tiny.model, inputs)
    for handle in handles:
        handle.remove()
    heads = LastHeads(tuple(info.attention))
    assert torch.equal(observed(tiny.model, inputs, heads), plain)
    assert heads.seen.keys() == seen.keys()
    for layer, outputs in seen.items():
        assert torch.equal(heads.seen[layer], outputs)
        assert heads.seen[layer].untyped_storage().nbytes() == outputs.numel() * 4

    divergence = measure_divergence(tiny.model, inputs)
    assert divergence.shape == (info.num_layers, len(plain), info.num_heads)
    assert (divergence[1:] > 1e-3).all()
    pruned = measure_divergence(tiny.model, inputs, prune=True)
    assert ((pruned == divergence) | (pruned == 0)).all()
    for row in range(len(plain)):
        alone = measure_divergence(tiny.model, tiny.single(inputs, row))
        assert torch.allclose(divergence[:, row], alone[:, 0], atol=1e-4)


def test_wrapped_and_plain_models_measure_the_same_and_are_left_alone() -> None:
    tiny = family("qwen2_5_vl")
    inputs = prompt(tiny)
    plain = measure_divergence(tiny.model, inputs)
    assert "_vlmfix_session" not in tiny.model.__dict__
    with vlmfix.wrapped(tiny.model, "pai:start_layer=0"):
        edited = logits(tiny.model, inputs)
        assert torch.equal(measure_divergence(tiny.model, inputs), plain)
        assert torch.equal(logits(tiny.model, inputs), edited)


def test_text_has_no_divergence() -> None:
    tiny = family("llava")
    text = torch.tensor([[0, 0, 1, 7, 8], [1, 9, 10, 11, 12]])
    inputs = {"input_ids": text, "attention_mask": (text > 0).long()}
    assert not measure_divergence(tiny.model, inputs).any()


def test_outliers_of_a_measurement_are_pruned(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = family("llava")
    inputs = tiny.inputs(1)
    target = "vlmfix.analysis.divergence.prune_outliers"
    monkeypatch.setattr(target, lambda d, without: d * len(without))
    assert torch.equal(
        measure_divergence(tiny.model, inputs, prune=True), measure_divergence(tiny.model, inputs)
    )


def test_padding_on_the_right_is_refused() -> None:
    tiny = family("llava")
    inputs = tiny.inputs(1)
    for name in ("input_ids", "attention_mask"):
        inputs[name] = torch.nn.functional.pad(inputs[name], (0, 2))
    with pytest.raises(BadInput, match="pad them on the left"):
        measure_divergence(tiny.model, inputs)
