"""Head Pursuit's edit: static factors on heads; tests/analysis/test_pursuit.py has the search."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from made_keys import make_keys
from matrix import family, logits, prompt
from tiny import generate_kwargs
from transformers import DynamicCache

import vlmfix
from vlmfix.errors import BadInput, CalibrationNeeded
from vlmfix.families import describe_model
from vlmfix.families.kinds import IMAGE, TEXT
from vlmfix.methods.head_pursuit import HeadPursuit, static_factors
from vlmfix.registry import build

HEADS = ("0.1", "0.3", "2.0")


def test_factors_of_a_layer() -> None:
    assert static_factors([1, 3], 4, -1.0).tolist() == [1, -1, 1, -1]
    assert static_factors([1], 3, 5.0).tolist() == [1, 5, 1]
    assert (static_factors([0, 2], 4, 1.0) == 1).all()


def test_inhibiting_twice_changes_nothing() -> None:
    outputs = torch.randn(2, 4, 3, 8, generator=torch.Generator().manual_seed(0))
    factors = static_factors([1, 2], 4, -1.0)[None, :, None, None]
    assert torch.equal(outputs * factors * factors, outputs)
    assert not torch.equal(outputs * factors, outputs)


def test_plan_scales_the_listed_heads_of_every_sample() -> None:
    tiny = family("llava")
    info = describe_model(tiny.model)
    kinds = torch.tensor([[TEXT, IMAGE, TEXT], [TEXT] * 3]).to(torch.uint8)
    method = HeadPursuit(heads=HEADS, alpha=5.0).prepared(info, tiny.model)
    assert list(method.layers(info)) == [0, 2]
    for layer, expected in ((0, [1, 5, 1, 5]), (2, [5, 1, 1, 1])):
        plan = method.plan(make_keys(kinds, layer=layer))
        assert plan is not None and plan.samples == [True, True]
        assert plan.heads is not None and plan.heads.tolist() == [expected] * 2
    assert HeadPursuit(heads=HEADS, alpha=1.0).plan(make_keys(kinds)) is None


@pytest.mark.parametrize("alpha", [-1.0, 0.0, 5.0])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_the_listed_heads_are_scaled_in_every_row_and_step(name: str, alpha: float) -> None:
    tiny = family(name)
    inputs = prompt(tiny)
    module: Any = describe_model(tiny.model).attention[0]
    seen: list[torch.Tensor] = []
    handle = module.o_proj.register_forward_pre_hook(
        lambda m, args: seen.append(args[0].unflatten(-1, (4, -1)))
    )
    kwargs = generate_kwargs(max_new_tokens=1, min_new_tokens=1)
    tiny.model.generate(**inputs, **kwargs)
    with vlmfix.wrapped(tiny.model, HeadPursuit(heads=("0.1", "0.3"), alpha=alpha)):
        tiny.model.generate(**inputs, **generate_kwargs())
        report = vlmfix.last_call(tiny.model)
    handle.remove()
    plain, edited, *steps = seen
    factors = torch.tensor([1, alpha, 1, alpha])[:, None]
    assert torch.equal(edited, plain * factors)
    assert len(steps) == 5
    if alpha == 0:
        assert all((step[:, :, [1, 3]] == 0).all() and step.any() for step in steps)
    rows = inputs["input_ids"].numel() + 5 * len(plain)
    assert report.rows_by_layer == {0: 2 * rows}


def test_a_prompt_without_an_image_is_edited_too() -> None:
    """The one exception to "no image, no edit": a concept is not written for images only."""
    tiny = family("llava")
    text = {"input_ids": torch.tensor([[1, 7, 8, 9, 10]])}
    plain = logits(tiny.model, text)
    with vlmfix.wrapped(tiny.model, HeadPursuit(heads=HEADS)):
        assert (logits(tiny.model, text) - plain).abs().max() > 1e-3


def test_neutral_alpha_reproduces_64_greedy_tokens() -> None:
    tiny = family("llava")
    inputs = prompt(tiny)
    kwargs = generate_kwargs(max_new_tokens=64, min_new_tokens=64)
    plain = tiny.model.generate(**inputs, **kwargs)
    with vlmfix.wrapped(tiny.model, HeadPursuit(heads=HEADS, alpha=1.0)):
        assert torch.equal(tiny.model.generate(**inputs, **kwargs), plain)


def test_beams_of_a_sample_share_their_factors() -> None:
    tiny = family("llava")
    inputs = prompt(tiny, 2)
    kwargs = generate_kwargs(num_beams=3, num_return_sequences=3)
    with vlmfix.wrapped(tiny.model, HeadPursuit(heads=HEADS, alpha=5.0)):
        together = tiny.model.generate(**inputs, **kwargs)
        for row in range(2):
            alone = tiny.single(inputs, row)
            tokens = tiny.model.generate(**alone, **kwargs)[:, alone["input_ids"].shape[1] :]
            assert torch.equal(
                together[3 * row : 3 * row + 3, inputs["input_ids"].shape[1] :], tokens
            )


def test_a_cache_that_was_filled_without_it_may_be_continued() -> None:
    """Static factors need nothing from the prompt."""
    tiny = family("llava")
    inputs = tiny.inputs(1)
    token = {"input_ids": torch.tensor([[7]])}
    with vlmfix.wrapped(tiny.model, HeadPursuit(heads=HEADS)):
        cache = DynamicCache(config=tiny.model.config.get_text_config())
        with vlmfix.using(tiny.model, "pai"):
            logits(tiny.model, inputs, past_key_values=cache)
        assert logits(tiny.model, token, past_key_values=cache).isfinite().all()


def test_options_through_text() -> None:
    method = build("head_pursuit:heads=0.1/0.3/2.0;alpha=-1")
    assert method == HeadPursuit(heads=HEADS) == build(method.spec())
    assert build("headpursuit:alpha=5") == HeadPursuit(alpha=5.0)


def test_heads_are_needed_and_must_exist() -> None:
    tiny = family("llava")
    with pytest.raises(CalibrationNeeded, match=r"vlmfix\.analysis\.pursuit\.rank_heads"):
        vlmfix.wrap(tiny.model, "head_pursuit")
    for heads, message in ((("3.0",), "has no attention head 3.0"), (("7",), "layer.head")):
        with pytest.raises(BadInput, match=message):
            vlmfix.wrap(tiny.model, HeadPursuit(heads=heads))
    with pytest.raises(BadInput, match="out of range"):
        HeadPursuit(heads=HEADS, alpha=1000.0)
    with pytest.warns(UserWarning, match="its list of heads is empty"):
        vlmfix.wrap(tiny.model, HeadPursuit(heads=()))
    vlmfix.unwrap(tiny.model)
    assert replace(HeadPursuit(heads=HEADS), alpha=2.0).alpha == 2.0
