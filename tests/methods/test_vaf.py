"""VAF: the property tests and worked numbers of its specification."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fused_rows import both_forms
from made_keys import make_keys
from matrix import family, logits, prompt

import vlmfix
from vlmfix.errors import BadInput
from vlmfix.families import describe_model
from vlmfix.families.kinds import GENERATED, IMAGE, PAD, TEXT, VIDEO
from vlmfix.kernels.reference import mask_scores
from vlmfix.methods.vaf import VisualAmplificationFusion, multiply_scores

SCORES = torch.tensor([1.0, 0.5, -2.0, 0.0], dtype=torch.float64).view(1, 1, 1, 4)
GAIN = torch.tensor([[0.95, 1.15, 1.15, 1.0]], dtype=torch.float64)
# Padding, text, image, text, a second image, text, one generated token; and a text-only prompt.
KINDS = torch.tensor(
    [
        [PAD, TEXT, TEXT, IMAGE, IMAGE, TEXT, VIDEO, TEXT, GENERATED],
        [PAD, PAD, TEXT, TEXT, TEXT, TEXT, TEXT, TEXT, GENERATED],
    ]
).to(torch.uint8)


def test_worked_row() -> None:
    edited = multiply_scores(SCORES, GAIN)
    assert torch.allclose(edited.flatten(), torch.tensor([0.95, 0.575, -2.3, 0.0]).double())
    expected = torch.tensor([0.473305, 0.325297, 0.018352, 0.183046]).double()
    assert torch.allclose(edited.softmax(-1).flatten(), expected, atol=1e-6)


def test_negative_score_of_the_image_loses_mass_and_a_positive_one_gains() -> None:
    plain = SCORES.softmax(-1).flatten()
    edited = multiply_scores(SCORES, torch.tensor([[1.0, 1.15, 1.0, 1.0]])).softmax(-1).flatten()
    assert edited[1] > plain[1]
    edited = multiply_scores(SCORES, torch.tensor([[1.0, 1.0, 1.15, 1.0]])).softmax(-1).flatten()
    assert edited[2] < plain[2]


@pytest.mark.parametrize("gain", [0.0, 0.5, 2.0])
def test_masked_key_stays_masked(gain: float) -> None:
    mask = torch.tensor([True, False, True, True]).view(1, 1, 1, 4)
    edited = multiply_scores(SCORES, torch.full((1, 4), gain))
    assert mask_scores(edited, mask).softmax(-1)[..., 1] == 0


def test_plan_tells_image_system_and_the_rest() -> None:
    plan = VisualAmplificationFusion(image_gain=2, system_gain=0.5).plan(make_keys(KINDS))
    assert plan is not None and plan.samples == [True, False]
    # The text between the images is no system prompt; padding and generated tokens are neither.
    assert plan.tensors["factors"][0].tolist() == [1, 0.5, 0.5, 2, 2, 1, 2, 1, 1]
    # Without an image nothing is a system prompt either.
    assert plan.tensors["factors"][1].tolist() == [1] * 9
    assert plan.fused is not None and plan.fused.groups is not None
    assert plan.fused.groups.tolist() == [[0, 2, 2, 1, 1, 0, 1, 0, 0], [0] * 9]


def test_plan_without_effect() -> None:
    keys = make_keys(KINDS)
    assert VisualAmplificationFusion(image_gain=1, system_gain=1).plan(keys) is None
    for one in ({"image_gain": 1.0}, {"system_gain": 1.0}):
        assert VisualAmplificationFusion(**one).plan(keys) is not None
    text_only = VisualAmplificationFusion().plan(make_keys(KINDS[1:]))
    assert text_only is not None and text_only.samples == [False]
    scores = torch.randn(1, 4, 2, 9)
    assert torch.equal(multiply_scores(scores, text_only.tensors["factors"]), scores)


@pytest.mark.parametrize("seed", [0, 1])
def test_fused_form_equals_the_torch_path(seed: int) -> None:
    method = VisualAmplificationFusion(image_gain=1.5, system_gain=0.6)
    plan = method.plan(make_keys(KINDS))
    assert plan is not None
    torch_path, fused, plain = both_forms(method, plan, seed=seed)
    assert torch.allclose(torch_path[0], fused[0], atol=1e-6)
    assert (torch_path[0] - plain[0]).abs().max() > 1e-2
    assert torch.equal(torch_path[1], plain[1]) and torch.allclose(fused[1], plain[1])


def test_layers_by_preset_and_by_depth() -> None:
    tiny = family("llava")
    info = describe_model(tiny.model)

    def layers(method: VisualAmplificationFusion, **structure: object) -> list[int]:
        other = replace(info, **structure)
        return list(method.prepared(other, tiny.model).layers(other))

    llava = {"text_type": "llama", "hidden_size": 4096, "vocab_size": 32064}
    assert layers(VisualAmplificationFusion(), **llava, num_layers=32) == list(range(9, 15))
    assert layers(VisualAmplificationFusion(), num_layers=40) == list(range(11, 19))
    assert layers(VisualAmplificationFusion(), num_layers=28) == list(range(8, 13))
    assert layers(VisualAmplificationFusion(), num_layers=3) == [1]
    assert layers(VisualAmplificationFusion(start_layer=0, end_layer=2)) == [0, 1]
    with pytest.raises(BadInput, match="do not lie in a model of 3 layers"):
        vlmfix.wrap(tiny.model, "vaf:start_layer=3")
    with pytest.raises(BadInput, match="out of range"):
        VisualAmplificationFusion(image_gain=-1)
    with pytest.raises(BadInput, match="out of range"):
        VisualAmplificationFusion(system_gain=11)


def test_prompt_rows_after_the_image_are_edited_and_no_others() -> None:
    tiny = family("llava")
    inputs = prompt(tiny)
    seen: list[torch.Tensor] = []
    layer = describe_model(tiny.model).layers[0]
    method = VisualAmplificationFusion(image_gain=4, system_gain=0.2, start_layer=0, end_layer=1)
    handle = layer.register_forward_hook(
        lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    logits(tiny.model, inputs)
    with vlmfix.wrapped(tiny.model, method):
        logits(tiny.model, inputs)
    handle.remove()
    plain, edited = seen
    visual = inputs["input_ids"] == tiny.image_token_id
    after = (visual.cumsum(1) > 0) & ~visual
    changed = (plain != edited).any(-1)
    assert changed[after].all() and not changed[~after].any()
