"""PAI's attention part: the property tests and worked numbers of its specification."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from made_keys import make_keys
from matrix import family, logits, prompt
from transformers import DynamicCache

import vlmfix
from vlmfix.base.attention import lift_scores
from vlmfix.errors import BadInput
from vlmfix.families import describe_model
from vlmfix.families.kinds import IMAGE, PAD, TEXT
from vlmfix.kernels.reference import attend, mask_scores
from vlmfix.methods.pai import PayAttentionToImage

SCORES = torch.tensor([1.0, 0.5, -2.0, 0.0], dtype=torch.float64).view(1, 1, 1, 4)
VISUAL = torch.tensor([[0.0, 1.0, 1.0, 0.0]], dtype=torch.float64)


def test_worked_row() -> None:
    values = torch.tensor([[1, 0], [0, 1], [2, 2], [-1, 1]], dtype=torch.float64)
    lifted = lift_scores(SCORES, 0.5 * VISUAL)
    assert torch.allclose(lifted.flatten(), torch.tensor([1.0, 0.75, -1.0, 0.0]).double())
    plain, edited = SCORES.softmax(-1), lifted.softmax(-1)
    for row, weights, output in (
        (plain, [0.494023, 0.299640, 0.024596, 0.181741], [0.361474, 0.530573]),
        (edited, [0.438209, 0.341278, 0.059305, 0.161208], [0.395611, 0.621096]),
    ):
        assert torch.allclose(row.flatten(), torch.tensor(weights).double(), atol=1e-6)
        got = attend(row, values[None, None]).flatten()
        assert torch.allclose(got, torch.tensor(output).double(), atol=1e-6)


def test_visual_mass_rises_with_alpha_and_text_ratios_stay() -> None:
    scores = torch.randn(2, 4, 3, 12, generator=torch.Generator().manual_seed(0)).double()
    visual = (torch.arange(12) < 5).double().expand(2, 12)
    last = torch.zeros(2, 4, 3, dtype=torch.float64)
    ratios = scores[..., 5:].softmax(-1)
    for alpha in (0.0, 0.2, 0.5, 1.0, 2.0):
        weights = lift_scores(scores, alpha * visual).softmax(-1)
        mass = weights[..., :5].sum(-1)
        assert (mass >= last).all() and (alpha == 0 or (mass > last).any())
        text = weights[..., 5:]
        assert torch.allclose(text / text.sum(-1, keepdim=True), ratios)
        last = mass


def test_not_invariant_to_shifts() -> None:
    shifted = lift_scores(SCORES + 3, 0.5 * VISUAL).softmax(-1)
    assert (shifted - lift_scores(SCORES, 0.5 * VISUAL).softmax(-1)).abs().max() > 0.05


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_masked_image_key_stays_masked(alpha: float) -> None:
    mask = torch.tensor([True, False, True, True]).view(1, 1, 1, 4)
    additive = torch.zeros(1, 1, 1, 4, dtype=torch.float64)
    for kind in (mask, additive.masked_fill(~mask, torch.finfo(torch.float64).min)):
        weights = mask_scores(lift_scores(SCORES, alpha * VISUAL), kind).softmax(-1)
        assert weights[..., 1] == 0 and weights[..., 2] > 0


def test_plan_marks_visual_keys_only() -> None:
    kinds = torch.tensor([[PAD, TEXT, IMAGE, IMAGE, TEXT], [PAD, PAD, TEXT, TEXT, TEXT]])
    plan = PayAttentionToImage(alpha=0.5).plan(make_keys(kinds.to(torch.uint8), None))
    assert plan is not None and plan.samples == [True, False]
    assert plan.tensors["lift"].tolist() == [[0, 0, 0.5, 0.5, 0], [0] * 5]
    text_only = make_keys(kinds[1:].to(torch.uint8), None)
    nothing = PayAttentionToImage(alpha=0.5).plan(text_only)
    assert nothing is not None and nothing.samples == [False] and not nothing.tensors["lift"].any()
    assert PayAttentionToImage(alpha=0.0).plan(make_keys(kinds.to(torch.uint8), None)) is None


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_only_the_predicting_row_and_no_earlier_cache_entry_changes(name: str) -> None:
    tiny = family(name)
    inputs = prompt(tiny)
    states: dict[str, list[torch.Tensor]] = {}
    layer: Any = describe_model(tiny.model).layers[0]
    for arm in ("plain", "pai"):
        seen: list[torch.Tensor] = []
        handle = layer.register_forward_hook(
            lambda m, a, out, seen=seen: seen.append(out[0] if isinstance(out, tuple) else out)
        )
        cache = DynamicCache(config=tiny.model.config.get_text_config())
        vlmfix.wrap(tiny.model, PayAttentionToImage(alpha=0.5, start_layer=0))
        with vlmfix.using(tiny.model, None if arm == "plain" else "pai:alpha=0.5;start_layer=0"):
            logits(tiny.model, inputs, past_key_values=cache)
        vlmfix.unwrap(tiny.model)
        handle.remove()
        states[arm] = [seen[0]] + [entry for c in cache.layers for entry in (c.keys, c.values)]
    plain, edited = states["plain"], states["pai"]
    keep = inputs["attention_mask"][:, :-1].bool()
    assert torch.equal(plain[0][:, :-1][keep], edited[0][:, :-1][keep])
    assert (plain[0][:, -1] - edited[0][:, -1]).abs().max() > 1e-3
    for one, other in zip(plain[1:], edited[1:], strict=True):
        assert torch.equal(one[:, :, :-1], other[:, :, :-1])
    assert not torch.equal(plain[-1][:, :, -1], edited[-1][:, :, -1])


def test_right_padding_edits_the_last_valid_row() -> None:
    tiny = family("llava")
    alone = tiny.inputs(1, seed=5)
    padded = {
        **alone,
        "input_ids": torch.nn.functional.pad(alone["input_ids"], (0, 4)),
        "attention_mask": torch.nn.functional.pad(alone["attention_mask"], (0, 4)),
    }
    length = alone["input_ids"].shape[1]
    with vlmfix.wrapped(tiny.model, PayAttentionToImage(alpha=0.5, start_layer=0)), torch.no_grad():
        expected = tiny.model(**alone).logits[:, -1]
        got = tiny.model(**padded).logits[:, length - 1]
    assert torch.allclose(got, expected, atol=1e-4)
    assert (expected - logits(tiny.model, alone)).abs().max() > 1e-3


def test_teacher_forcing_with_prompt_length_equals_decoding() -> None:
    """A bare forward that says where the prompt ends edits what generate() edits."""
    tiny = family("llava")
    inputs = tiny.inputs(1)
    length = inputs["input_ids"].shape[1]
    with vlmfix.wrapped(tiny.model, PayAttentionToImage(alpha=0.5, start_layer=0)), torch.no_grad():
        out = tiny.model.generate(
            **inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        full = {
            **inputs,
            "input_ids": out.sequences,
            "attention_mask": torch.ones_like(out.sequences),
        }
        told = tiny.model(**full, prompt_length=length).logits[:, length - 1 : -1]
        untold = tiny.model(**full).logits[:, length - 1 : -1]
    expected = torch.stack(out.logits, dim=1)
    assert torch.allclose(told, expected, atol=1e-4)
    assert not torch.allclose(untold, expected, atol=1e-2)


def test_layers_scale_with_depth_and_preset() -> None:
    from dataclasses import replace

    tiny = family("llava")
    info = describe_model(tiny.model)
    method = PayAttentionToImage().prepared(info, tiny.model)
    assert (method.alpha, list(method.layers(info))) == (0.2, [1, 2])
    large = replace(info, text_type="llama", hidden_size=4096, num_layers=32, vocab_size=32064)
    method = PayAttentionToImage().prepared(large, tiny.model)
    assert (method.alpha, method.start_layer, method.end_layer) == (0.5, 2, 32)
    llama3 = replace(large, vocab_size=128320)
    assert PayAttentionToImage().prepared(llama3, tiny.model).alpha == 0.2
    with pytest.raises(BadInput, match="do not lie in a model of 3 layers"):
        vlmfix.wrap(tiny.model, "pai:start_layer=3")
    with pytest.raises(BadInput, match="out of range"):
        PayAttentionToImage(alpha=-1)
