"""VAR: the property tests and worked numbers of its specification."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from made_keys import make_keys
from matrix import ROWS, family, logits, prompt
from tiny import generate_kwargs

import vlmfix
from vlmfix.errors import BadInput, CalibrationNeeded
from vlmfix.families import describe_model
from vlmfix.families.kinds import GENERATED, IMAGE, PAD, TEXT, VIDEO
from vlmfix.methods.var import VisualAttentionRedistribution, redistribute, rules

STRONG = next(row.strong for row in ROWS if row.name == "var")


def _groups(text: list[int], sinks: list[int], rest: list[int], keys: int) -> torch.Tensor:
    groups = torch.zeros(1, keys, 3, dtype=torch.float64)
    for column, members in enumerate((text, sinks, rest)):
        groups[0, members, column] = 1
    return groups


WORKED = _groups([0], [1], [2, 3], 5)
VALUES = torch.tensor([[1, 0], [0, 1], [2, 2], [-1, 1], [0, 3]], dtype=torch.float64)


def _row(*weights: float) -> torch.Tensor:
    return torch.tensor(weights, dtype=torch.float64).view(1, 1, 1, -1)


@pytest.mark.parametrize(
    ("keep", "expected"),
    [(0.6, [0.18, 0.06, 0.46 / 1.5, 0.23 / 1.5, 0.30]), (0.4, [0.12, 0.04, 0.36, 0.18, 0.30])],
)
def test_worked_row(keep: float, expected: list[float]) -> None:
    edited, changed = redistribute(
        _row(0.30, 0.10, 0.20, 0.10, 0.30), *rules(WORKED, keep, 0.5, 0.2)
    )
    assert changed.all()
    assert torch.allclose(edited.flatten(), torch.tensor(expected, dtype=torch.float64), atol=1e-6)


def test_worked_output() -> None:
    row = _row(0.30, 0.10, 0.20, 0.10, 0.30)
    edited, _ = redistribute(row, *rules(WORKED, 0.6, 0.5, 0.2))
    assert torch.allclose(row.view(1, 5) @ VALUES, torch.tensor([[0.6, 1.5]]).double())
    expected = torch.tensor([[0.64, 1.726667]], dtype=torch.float64)
    assert torch.allclose(edited.view(1, 5) @ VALUES, expected, atol=1e-6)


@pytest.mark.parametrize("mass", [0.2, 0.4])
def test_head_that_looks_at_sinks_or_elsewhere_is_left_alone(mass: float) -> None:
    # 0.714 of its visual mass is on the sink; with a minimum of 0.4, V = 0.35 is too little too.
    row = _row(0.40, 0.25, 0.05, 0.05, 0.25)
    edited, changed = redistribute(row, *rules(WORKED, 0.6, 0.5, mass))
    assert not changed.any() and torch.equal(edited, row)
    # The same row passes a rule that asks for less, so it is the rule that held it back.
    assert redistribute(row, *rules(WORKED, 0.6, 0.2, 0.2))[1].all()
    assert not redistribute(row, *rules(WORKED, 0.6, 0.2, 0.4))[1].any()


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.6, 1.0])
def test_rows_keep_their_sum_and_others_their_weight(keep: float) -> None:
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(2, 8, 37, 50, generator=generator).mul(2).softmax(-1)
    kind = torch.randint(0, 4, (2, 50), generator=generator)
    groups = torch.stack([kind == group for group in (1, 2, 3)], dim=-1).float()
    edited, changed = redistribute(weights, *rules(groups, keep, 0.4, 0.1))
    assert changed.any()
    assert torch.allclose(edited.sum(-1), torch.ones(2, 8, 37), atol=1e-6)
    other = (kind == 0)[:, None, None, :].expand_as(weights)
    assert torch.equal(edited[other], weights[other])
    rest = (kind == 3)[:, None, None, :]
    ratio = torch.where(rest, edited / weights, torch.nan)
    low, high = ratio.nan_to_num(torch.inf).amin(-1), ratio.nan_to_num(0).amax(-1)
    assert torch.allclose(low, high, rtol=1e-5)
    assert torch.equal(edited, weights) == (keep == 1.0)


def test_row_without_other_visual_mass_is_skipped() -> None:
    row = _row(0.3, 0.4, 0.0, 0.0, 0.3)
    edited, changed = redistribute(row, *rules(WORKED, 0.6, 0.0, 0.0))
    assert torch.equal(edited, row) and not changed.any() and edited.isfinite().all()


def test_log_bias_softmax_gives_the_same_row() -> None:
    scores = torch.randn(1, 8, 5, 30, generator=torch.Generator().manual_seed(1)).double()
    kind = torch.arange(30) % 4
    groups = torch.stack([kind == g for g in (1, 2, 3)], dim=-1)[None].double()
    weights = scores.softmax(-1)
    edited, changed = redistribute(weights, *rules(groups, 0.6, 0.5, 0.2))
    masses = weights @ groups[:, None]
    gain = 1 + 0.4 * (masses[..., 0] + masses[..., 1]) / masses[..., 2]
    factors = torch.stack([torch.full_like(gain, 0.6), torch.full_like(gain, 0.6), gain], -1)
    bias = (factors.log() @ groups[:, None].mT) * changed[..., None]
    assert changed.any() and not changed.all()
    assert torch.allclose((scores + bias).softmax(-1), edited, atol=1e-12)


def test_plan_leaves_out_padding_generated_tokens_and_samples_without_visual_sinks() -> None:
    method = VisualAttentionRedistribution(keep=0.6)
    kinds = torch.tensor(
        [[TEXT, IMAGE, IMAGE, TEXT, GENERATED], [PAD, TEXT, IMAGE, TEXT, GENERATED]]
    ).to(torch.uint8)
    flags = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 0, 0, 0]]).bool()
    plan = method.plan(make_keys(kinds, flags))
    assert plan is not None and plan.samples == [True, False]
    moves = plan.tensors["moves"]
    expected = torch.tensor([[-0.4, 0], [-0.4, 0], [0, 1], [0, 0], [0, 0]])
    assert torch.allclose(moves[0, :5], expected)
    assert moves[1].abs().sum() == 0
    assert plan.notes == {"visual_sinks": [1, 0], "text_sinks": [1, 1]}
    nothing = method.plan(make_keys(kinds, flags & (kinds != IMAGE)))
    assert nothing is not None and nothing.samples == [False, False]
    assert nothing.fused is not None and nothing.fused.groups is not None
    assert not nothing.tensors["moves"].any() and not nothing.fused.groups.any()


def test_video_counts_as_visual_unless_told_otherwise() -> None:
    kinds = torch.tensor([[TEXT, VIDEO, VIDEO, TEXT]]).to(torch.uint8)
    flags = torch.tensor([[1, 1, 0, 0]]).bool()
    for video in (True, False):
        plan = VisualAttentionRedistribution(keep=0.6, video=video).plan(make_keys(kinds, flags))
        assert plan is not None and plan.samples == [video]


@pytest.mark.parametrize("options", [{"keep": 1.0}, {"rho": 1.5}, {"tau": 7.9}])
def test_nothing_to_do_is_bit_identical(options: dict[str, Any]) -> None:
    tiny = family("llava")
    inputs = prompt(tiny)
    plain = logits(tiny.model, inputs)
    with vlmfix.wrapped(tiny.model, replace(STRONG, **options)):
        assert torch.equal(logits(tiny.model, inputs), plain)
    with vlmfix.wrapped(tiny.model, STRONG):
        assert not torch.equal(logits(tiny.model, inputs), plain)


def test_position_in_the_batch_and_padding_do_not_matter() -> None:
    tiny = family("llava")
    inputs = prompt(tiny)
    swapped = {name: value.flip(0) for name, value in inputs.items()}
    with vlmfix.wrapped(tiny.model, STRONG):
        one, other = logits(tiny.model, inputs), logits(tiny.model, swapped)
    assert torch.allclose(one, other.flip(0), atol=1e-5)


def test_samples_in_sequence_do_not_share_state() -> None:
    tiny = family("llava")
    first, second = tiny.inputs(1, seed=1), tiny.inputs(1, seed=2)
    with vlmfix.wrapped(tiny.model, STRONG):
        alone = tiny.model.generate(**second, **generate_kwargs())
    with vlmfix.wrapped(tiny.model, STRONG):
        tiny.model.generate(**first, **generate_kwargs())
        after = tiny.model.generate(**second, **generate_kwargs())
    assert torch.equal(alone, after)


def test_layers_and_variants() -> None:
    tiny = family("llava")
    info = describe_model(tiny.model)
    code = VisualAttentionRedistribution(sink_channels=(1,)).prepared(info, tiny.model)
    paper = VisualAttentionRedistribution(sink_channels=(1,), variant="paper")
    assert (code.keep, paper.prepared(info, tiny.model).keep) == (0.6, 0.4)
    assert code.tau == pytest.approx(0.3125 * 8)  # sqrt(64) = 8
    assert list(code.layers(info)) == list(range(2, info.num_layers - 1))
    official = VisualAttentionRedistribution(last_layer="official")
    assert list(official.layers(info)) == list(range(2, info.num_layers))


def test_presets_are_recognised_by_structure_and_never_guessed() -> None:
    info = describe_model(family("llava").model)
    llava_7b = replace(
        info, model_type="llava", text_type="llama", hidden_size=4096, num_layers=32,
        vocab_size=32064,
    )  # fmt: skip
    model = torch.nn.Module()
    prepared = VisualAttentionRedistribution().prepared(llava_7b, model)
    assert (prepared.sink_channels, prepared.tau) == ((1415, 2533), 20.0)
    llama3 = replace(llava_7b, vocab_size=128320)
    with pytest.raises(CalibrationNeeded, match="vlmfix calibrate"):
        VisualAttentionRedistribution().prepared(llama3, family("llava").model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sink_channels": (64,)}, r"channels in \[0, 64\)"),
        ({"sink_channels": (-1,)}, r"channels in \[0, 64\)"),
        ({"sink_channels": ()}, r"channels in \[0, 64\)"),
        ({"sink_channels": (1,), "tau": 8.0}, "can never be reached"),
    ],
)
def test_options_that_this_model_cannot_take(options: dict[str, Any], message: str) -> None:
    tiny = family("llava")
    with pytest.raises(BadInput, match=message):
        vlmfix.wrap(tiny.model, VisualAttentionRedistribution(**options))
    assert "_vlmfix_session" not in tiny.model.__dict__


@pytest.mark.parametrize("options", [{"keep": -0.1}, {"keep": 1.1}, {"rho": 3}, {"tau": -1}])
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="out of range"):
        VisualAttentionRedistribution(**options)


def test_generated_tokens_are_never_sinks_without_a_cache_either() -> None:
    """Every position is recomputed there, so only the call knows where the prompt ended."""
    tiny = family("llava")
    inputs = prompt(tiny)
    with vlmfix.wrapped(tiny.model, STRONG):
        tiny.model.generate(**inputs, **generate_kwargs())
        cached = vlmfix.last_call(tiny.model).notes
        tiny.model.generate(**inputs, **generate_kwargs(use_cache=False))
        assert vlmfix.last_call(tiny.model).notes == cached
    assert any(any(counts) for counts in cached["var"]["visual_sinks"].values())
