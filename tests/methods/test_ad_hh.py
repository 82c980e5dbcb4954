"""AD-HH: the property tests and worked numbers of its specification."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fused_rows import both_forms
from made_keys import make_keys
from matrix import family, logits, prompt

import vlmfix
from vlmfix.analysis.calibrate import Calibration, fingerprint, write
from vlmfix.errors import BadInput, CalibrationNeeded
from vlmfix.families import ModelInfo, describe_model
from vlmfix.families.kinds import GENERATED, IMAGE, PAD, TEXT
from vlmfix.kernels.reference import attend
from vlmfix.methods.ad_hh import AdaptiveHeadDeactivation, drop_text
from vlmfix.registry import build

ROW = torch.tensor([0.2, 0.2, 0.1, 0.5], dtype=torch.float64).view(1, 1, 1, 4)
AFTER = torch.tensor([[0, 0, 0, 1]])
ONE_HEAD = torch.ones(1, dtype=torch.bool)
KINDS = torch.tensor(
    [
        [PAD, TEXT, IMAGE, IMAGE, TEXT, IMAGE, TEXT, GENERATED],
        [PAD, PAD, TEXT, TEXT, TEXT, TEXT, TEXT, GENERATED],
    ]
).to(torch.uint8)


def prepared(method: AdaptiveHeadDeactivation, num_heads: int = 8) -> AdaptiveHeadDeactivation:
    """The method as on a llava model with this many heads."""
    info = replace(describe_model(family("llava").model), num_heads=num_heads)
    return method.prepared(info, torch.nn.Module())


def test_worked_row() -> None:
    values = torch.tensor([[1, 0], [0, 1], [2, 2], [-1, 1]], dtype=torch.float64)[None, None]
    plain = attend(ROW, values).flatten()
    assert torch.allclose(plain, torch.tensor([-0.1, 0.9]).double(), atol=1e-6)
    edited, changed = drop_text(ROW, AFTER, ONE_HEAD, 0.4)
    assert changed.all() and edited.sum() == pytest.approx(0.5, abs=1e-6)
    output = attend(edited, values).flatten()
    assert torch.allclose(output, torch.tensor([0.4, 0.4]).double(), atol=1e-6)
    assert torch.equal(edited[..., :3], ROW[..., :3])


@pytest.mark.parametrize(("tau", "acts"), [(0.5, True), (0.51, False), (0.0, True)])
def test_threshold_is_reached_at_equality(tau: float, acts: bool) -> None:
    edited, changed = drop_text(ROW, AFTER, ONE_HEAD, tau)
    assert changed.item() == acts
    assert torch.equal(edited, ROW) == (not acts)


def test_a_row_without_text_after_the_image_is_never_edited() -> None:
    edited, changed = drop_text(ROW, torch.zeros(1, 4), ONE_HEAD, 0.0)
    assert torch.equal(edited, ROW) and not changed.any()


def test_samples_heads_and_rows_decide_for_themselves() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(3, 4, 2, 9, generator=generator, dtype=torch.float64).mul(2).softmax(-1)
    text = (torch.arange(9) >= torch.tensor([[4], [6], [9]])).double()
    listed = torch.tensor([True, False, True, True])
    edited, changed = drop_text(weights, text, listed, 0.4)
    mass = (weights * text[:, None, None]).sum(-1)
    assert torch.equal(changed, (mass >= 0.4) & listed[:, None])
    assert changed[0].any() and not changed.all() and not changed[2].any()
    assert torch.equal(edited[~changed], weights[~changed])
    assert torch.allclose(edited.sum(-1), torch.where(changed, 1 - mass, 1.0))
    kept = (text == 0)[:, None, None].expand_as(weights)
    assert torch.equal(edited[kept], weights[kept])


def test_plan_counts_generated_tokens_and_text_after_the_first_image() -> None:
    plan = prepared(AdaptiveHeadDeactivation(("2.1", "2.7", "1.0"))).plan(
        make_keys(KINDS, num_heads=8)
    )
    assert plan is not None and plan.samples == [True, False]
    text, listed = plan.tensors["text"], plan.constants["listed"]
    assert text.tolist() == [[0, 0, 0, 0, 1, 0, 1, 1], [0] * 8]
    assert listed.nonzero().flatten().tolist() == [1, 7] and len(listed) == 8
    assert plan.fused is not None and plan.fused.groups is not None
    assert plan.fused.groups.tolist() == [[0, 0, 1, 1, 2, 1, 2, 2], [0] * 8]
    assert (
        prepared(AdaptiveHeadDeactivation(("2.1",), tau=1.1)).plan(make_keys(KINDS, num_heads=8))
        is None
    )
    assert (
        prepared(AdaptiveHeadDeactivation(("2.1",), tau=1.0)).plan(make_keys(KINDS, num_heads=8))
        is not None
    )


def test_without_an_image_the_plan_edits_nothing() -> None:
    method = prepared(AdaptiveHeadDeactivation(("2.1",), tau=0.0))
    plan = method.plan(make_keys(KINDS[1:], num_heads=8))
    assert plan is not None and plan.samples == [False]
    weights = torch.rand(1, 8, 2, 8)
    edited, changed = method.edit_weights(weights, **plan.tensors, **plan.constants)
    assert torch.equal(edited, weights) and not changed.any()


@pytest.mark.parametrize("seed", [0, 1])
def test_fused_form_equals_the_torch_path(seed: int) -> None:
    method = prepared(AdaptiveHeadDeactivation(("2.0", "2.3", "2.5", "2.6")))
    plan = method.plan(make_keys(KINDS, num_heads=8))
    assert plan is not None
    torch_path, fused, plain = both_forms(method, plan, seed=seed)
    assert torch.allclose(torch_path, fused, atol=1e-12)
    changed = ((torch_path - plain).abs() > 1e-3).any(-1)
    assert changed.any() and not changed[1].any()
    assert not changed[:, [1, 2, 4, 7]].any() and not changed[0, [0, 3, 5, 6]].all()


def test_only_listed_heads_of_listed_layers_are_counted() -> None:
    tiny = family("llava")
    inputs = prompt(tiny)
    with vlmfix.wrapped(tiny.model, "ad_hh:heads=1.2/2.0/2.3;tau=0"):
        logits(tiny.model, inputs)
        report = vlmfix.last_call(tiny.model)
    assert report.rows_by_layer == {1: 3, 2: 6}


def _structure(info: ModelInfo, **fields: object) -> ModelInfo:
    known = range(int(str(fields["num_layers"])))
    attention = dict.fromkeys(known, torch.nn.Module())
    return replace(info, text_type="llama", attention=attention, **fields)


@pytest.mark.parametrize(
    ("structure", "count", "first", "last"),
    [
        ({"hidden_size": 4096, "num_layers": 32, "num_heads": 32}, 20, "16.29", "17.28"),
        ({"hidden_size": 5120, "num_layers": 40, "num_heads": 40}, 35, "0.8", "39.32"),
        (
            {"hidden_size": 7168, "num_layers": 60, "num_heads": 56, "model_type": "llava_next"},
            10, "45.34", "41.34",
        ),
    ],
)  # fmt: skip
def test_presets(structure: dict[str, object], count: int, first: str, last: str) -> None:
    info = describe_model(family("llava").model)
    known = _structure(info, **{"vocab_size": 32064, **structure})
    method = AdaptiveHeadDeactivation().prepared(known, torch.nn.Module())
    assert method.heads is not None and len(method.heads) == len(set(method.heads)) == count
    assert first in method.heads and last in method.heads
    assert set(method.layers(known)) == {int(name.split(".")[0]) for name in method.heads}
    if structure["hidden_size"] != 7168:
        with pytest.raises(CalibrationNeeded, match="vlmfix attribute MODEL"):
            AdaptiveHeadDeactivation().prepared(
                replace(known, vocab_size=128320), family("llava").model
            )


def test_heads_of_an_unknown_model_come_from_its_calibration() -> None:
    from vlmfix.analysis.calibrate import cache_folder

    tiny = family("llava")
    with pytest.raises(CalibrationNeeded, match="vlmfix attribute MODEL"):
        vlmfix.wrap(tiny.model, "ad_hh")
    mark = fingerprint(tiny.model)
    measured = Calibration(mark, "llava", hallucination_heads=((2, 3), (1, 0)))
    path = cache_folder() / "calibration" / f"{mark}.json"
    info = describe_model(tiny.model)
    write(measured, path)
    assert AdaptiveHeadDeactivation().prepared(info, tiny.model).heads == ("1.0", "2.3")
    assert AdaptiveHeadDeactivation(("0.1",)).prepared(info, tiny.model).heads == ("0.1",)
    write(replace(measured, hallucination_heads=()), path)
    nothing = AdaptiveHeadDeactivation().prepared(info, tiny.model)
    assert nothing.idle() == "its list of hallucination heads is empty"
    assert list(nothing.layers(info)) == []
    write(replace(measured, hallucination_heads=None), path)
    with pytest.raises(CalibrationNeeded):
        AdaptiveHeadDeactivation().prepared(info, tiny.model)


def test_options() -> None:
    tiny = family("llava")
    assert build("ad_hh:heads=16.29/26.9;tau=0.3") == AdaptiveHeadDeactivation(
        ("16.29", "26.9"), 0.3
    )
    for heads in ("1.4", "3.0", "first"):
        with pytest.raises(BadInput, match="ad_hh"):
            vlmfix.wrap(tiny.model, f"ad_hh:heads={heads}")
    for tau in (-0.1, 2.1):
        with pytest.raises(BadInput, match="out of range"):
            AdaptiveHeadDeactivation(tau=tau)
