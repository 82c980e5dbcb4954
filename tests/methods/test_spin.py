"""SPIN: the worked numbers of its specification, and what a last-row method must keep."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from made_keys import make_keys
from matrix import family, logits, prompt
from tiny import FAMILIES, generate_kwargs

import vlmfix
from vlmfix.errors import BadInput, CompositionError
from vlmfix.families import describe_model
from vlmfix.families.kinds import GENERATED, IMAGE, PAD, TEXT, VIDEO
from vlmfix.kernels.reference import row_scores
from vlmfix.methods.spin import HeadSuppressionByMass, ImageGuidedHeadSuppression, suppress
from vlmfix.registry import build

HALF = ImageGuidedHeadSuppression(rho=0.5, epsilon=0.08)
MASS = HeadSuppressionByMass(rho=0.5, epsilon=0.08, score="mass")


def _strength(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).view(1, -1, 1)


def test_worked_heads() -> None:
    factors = suppress(_strength(3, -1, 2, 0.5), 0.5, 0.08)
    assert factors.flatten().tolist() == [1, 0.08, 1, 0.08]
    # The same numbers as sums of scores over two visual keys; the other keys do not count.
    scores = torch.tensor([[1, 2], [-3, 2], [4, -2], [0.25, 0.25]], dtype=torch.float64)
    scores = torch.nn.functional.pad(scores, (1, 1), value=50.0)[None, :, None]
    visual = torch.tensor([[0, 1, 1, 0]], dtype=torch.float32)
    assert torch.equal(HALF.score_scale(scores, visual=visual), factors)
    weights, changed = MASS.edit_weights(scores, visual=visual)
    assert torch.equal(weights, scores * factors[..., None])
    assert changed.flatten().tolist() == [False, True, False, True]


@pytest.mark.parametrize(
    ("rho", "heads", "kept"),
    [(0.95, 32, 30), (0.8, 32, 25), (0.9, 40, 36), (0.7, 10, 7), (0.29, 100, 29), (0.0, 4, 0)],
)
def test_floor_of_rho_heads_stays(rho: float, heads: int, kept: int) -> None:
    generator = torch.Generator().manual_seed(heads)
    strength = torch.randn(3, heads, 2, generator=generator)
    factors = suppress(strength, rho, 0.25)
    assert ((factors == 1).sum(1) == kept).all() and (
        (factors == 0.25).sum(1) == heads - kept
    ).all()
    weakest = torch.where(factors == 1, strength, torch.inf).amin(1)
    assert (torch.where(factors == 1, -torch.inf, strength).amax(1) <= weakest).all()


def test_every_head_stays_at_one() -> None:
    strength = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(0))
    assert (suppress(strength, 1.0, 0.0) == 1).all()


def test_raw_strength_is_a_product_with_the_sum_of_the_visual_keys() -> None:
    generator = torch.Generator().manual_seed(5)
    query = torch.randn(2, 8, 3, 16, generator=generator, dtype=torch.float64)
    key = torch.randn(2, 2, 20, 16, generator=generator, dtype=torch.float64)
    visual = torch.rand(2, 20, generator=generator) > 0.5
    total = (key * visual[:, None, :, None]).sum(2).repeat_interleave(4, 1)  # (B, H, D)
    strength = torch.einsum("bhrd,bhd->bhr", query, total) / 4
    scores = row_scores(query, key, 0.25)
    factors = HALF.score_scale(scores, visual=visual.float())
    assert torch.equal(factors, suppress(strength, 0.5, 0.08))
    # Probabilities rank the heads in another way, which is why there is an option.
    _, changed = MASS.edit_weights(scores.softmax(-1), visual=visual.float())
    assert not torch.equal(changed, factors != 1)


def test_each_row_and_sample_decides_for_itself() -> None:
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(3, 6, 4, 9, generator=generator)
    visual = torch.rand(3, 9, generator=generator) > 0.4
    together = HALF.score_scale(scores, visual=visual.float())
    for sample in range(3):
        for row in range(4):
            own = scores[sample : sample + 1, :, row : row + 1]
            alone = HALF.score_scale(own, visual=visual[sample : sample + 1].float())
            assert torch.equal(alone[0, :, 0], together[sample, :, row])
    assert not torch.equal(together[:, :, 0], together[:, :, 1])


def test_plan_marks_visual_keys_and_leaves_other_samples_alone() -> None:
    kinds = torch.tensor(
        [[PAD, TEXT, IMAGE, TEXT, IMAGE, GENERATED], [TEXT, VIDEO] + [TEXT] * 4, [TEXT] * 6]
    ).to(torch.uint8)
    plan = HALF.plan(make_keys(kinds))
    assert plan is not None and plan.samples == [True, True, False]
    visual = plan.tensors["visual"][:, :6]
    assert visual.tolist() == [
        [0, 0, 1, 0, 1, 0],
        [0, 1, 0, 0, 0, 0],
        [0] * 6,
    ]
    scores = torch.randn(3, 4, 2, plan.tensors["visual"].shape[1])
    assert (HALF.score_scale(scores, **plan.tensors)[2] == 1).all()
    weights, changed = MASS.edit_weights(scores, **plan.tensors)
    assert torch.equal(weights[2], scores[2]) and not changed[2].any() and changed[:2].any()
    for same in ({"rho": 1.0}, {"epsilon": 1.0}):
        assert replace(HALF, **same).plan(make_keys(kinds)) is None


def test_a_row_that_sees_no_image_is_left_alone() -> None:
    """As behind a sliding window: all heads are at zero there, and none of them is weak."""
    weights = torch.rand(1, 4, 2, 6, generator=torch.Generator().manual_seed(2))
    visual = torch.tensor([[1.0, 1, 0, 0, 0, 0]])
    weights[:, :, 0, :2] = 0
    edited, changed = MASS.edit_weights(weights, visual=visual)
    assert not changed[:, :, 0].any() and torch.equal(edited[:, :, 0], weights[:, :, 0])
    assert changed[:, :, 1].sum() == 2


# -- inside a model --------------------------------------------------------------------------------


def _projected(model: Any, layer: int, run: Any) -> list[torch.Tensor]:
    """Inputs (B, Q, H, D) of a layer's output projection, one per forward."""
    info = describe_model(model)
    module: Any = info.attention[layer]
    seen: list[torch.Tensor] = []
    handle = module.o_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    run()
    handle.remove()
    return [outputs.unflatten(-1, (info.num_heads, -1)) for outputs in seen]


@pytest.mark.parametrize("score", ["raw", "mass"])
@pytest.mark.parametrize("name", FAMILIES)
def test_weak_heads_of_the_predicting_row_are_scaled(score: Any, name: str) -> None:
    tiny = family(name)
    inputs = prompt(tiny)
    (plain,) = _projected(tiny.model, 0, lambda: logits(tiny.model, inputs))
    method = ImageGuidedHeadSuppression(rho=0.8, epsilon=0.25, score=score, end_layer=1)
    with vlmfix.wrapped(tiny.model, method):
        (edited,) = _projected(tiny.model, 0, lambda: logits(tiny.model, inputs))
        assert vlmfix.last_call(tiny.model).rows_by_layer == {0: len(plain)}
    real = inputs["attention_mask"][:, :-1].bool()
    assert torch.equal(plain[:, :-1][real], edited[:, :-1][real])
    ratio = edited[:, -1].norm(dim=-1) / plain[:, -1].norm(dim=-1)
    weak = ratio.argmin(1)
    expected = torch.ones_like(ratio).scatter(1, weak[:, None], 0.25)
    assert torch.allclose(ratio, expected, atol=1e-4)
    assert torch.allclose(edited[:, -1], expected[..., None] * plain[:, -1], atol=1e-4)
    if score == "mass":
        assert torch.equal(weak, _mass(tiny.model, inputs).argmin(1))


def _mass(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """(B, H) attention of the last row of layer 0 on the image, as transformers computes it."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(**inputs, output_attentions=True).attentions[0][:, :, -1]
    model.set_attn_implementation(before)
    visual = inputs["input_ids"] == 90
    return (weights * visual[:, None]).sum(-1)


def test_heads_are_chosen_anew_in_every_step() -> None:
    tiny = family("llava")
    chosen: list[torch.Tensor] = []

    class Spy(ImageGuidedHeadSuppression):
        def score_scale(self, scores: torch.Tensor, **plan: torch.Tensor) -> torch.Tensor:
            factors = super().score_scale(scores, **plan)
            chosen.append(factors[..., -1])
            return factors

    with vlmfix.wrapped(tiny.model, Spy(rho=0.5, epsilon=0.1, end_layer=1)):
        tiny.model.generate(**tiny.inputs(2), **generate_kwargs())
        report = vlmfix.last_call(tiny.model)
    assert len(chosen) == 6
    assert any(not torch.equal(chosen[0], later) for later in chosen[1:])
    assert report.edited_rows == 6 * 2 * 2  # steps, samples, half of four heads


def test_two_images_count_together() -> None:
    tiny = family("llava")
    inputs = tiny.inputs(1)
    ids, image = inputs["input_ids"], torch.full((1, 16), 90)
    both = torch.cat([ids[:, :-3], image, ids[:, -3:]], dim=1)
    pixels = torch.cat([inputs["pixel_values"], inputs["pixel_values"].flip(-1)])
    prompts = {
        "input_ids": both, "attention_mask": torch.ones_like(both), "pixel_values": pixels,
    }  # fmt: skip
    (plain,) = _projected(tiny.model, 0, lambda: logits(tiny.model, prompts))
    method = ImageGuidedHeadSuppression(rho=0.8, epsilon=0.0, score="mass", end_layer=1)
    with vlmfix.wrapped(tiny.model, method):
        (edited,) = _projected(tiny.model, 0, lambda: logits(tiny.model, prompts))
    silent = edited[:, -1].norm(dim=-1) == 0
    assert silent.sum() == 1 and (plain[:, -1].norm(dim=-1) > 0).all()
    assert silent.int().argmax(1).equal(_mass(tiny.model, prompts).argmin(1))


@pytest.mark.parametrize("score", ["raw", "mass"])
def test_a_prompt_without_an_image_is_left_alone(score: Any) -> None:
    tiny = family("llava")
    text = {"input_ids": torch.tensor([[1, 7, 8, 9, 10]])}
    plain = logits(tiny.model, text)
    with vlmfix.wrapped(tiny.model, replace(HALF, score=score)):
        assert torch.equal(logits(tiny.model, text), plain)
        assert vlmfix.last_call(tiny.model).edited_rows == 0


def test_heads_are_ranked_by_unedited_scores_whatever_the_order_of_the_stack() -> None:
    tiny = family("llava")
    inputs = prompt(tiny)
    outputs = []
    lift = "pai:alpha=2;start_layer=0"
    for stack in ([HALF, lift], [lift, HALF], HALF, lift):
        with vlmfix.wrapped(tiny.model, stack):
            outputs.append(logits(tiny.model, inputs))
    one, other, *single = outputs
    assert torch.equal(one, other)
    assert all((one - alone).abs().max() > 1e-3 for alone in single)


def test_neutral_settings_reproduce_64_greedy_tokens() -> None:
    tiny = family("llava")
    inputs = prompt(tiny)
    kwargs = generate_kwargs(max_new_tokens=64, min_new_tokens=64)
    plain = tiny.model.generate(**inputs, **kwargs)
    for same in ({"rho": 1.0}, {"epsilon": 1.0}):
        with vlmfix.wrapped(tiny.model, replace(HALF, **same)):
            assert torch.equal(tiny.model.generate(**inputs, **kwargs), plain)


def test_mass_decodes_alike_with_and_without_a_cache() -> None:
    tiny = family("gemma3")
    inputs = prompt(tiny)
    with vlmfix.wrapped(tiny.model, replace(HALF, score="mass")):
        cached = tiny.model.generate(**inputs, **generate_kwargs())
        assert torch.equal(
            tiny.model.generate(**inputs, **generate_kwargs(use_cache=False)), cached
        )


def test_defaults_layers_and_preset() -> None:
    tiny = family("llava")
    info = describe_model(tiny.model)
    method = ImageGuidedHeadSuppression().prepared(info, tiny.model)
    assert (method.rho, method.epsilon, list(method.layers(info))) == (0.95, 0.0, [0, 1, 2])
    large = replace(info, text_type="llama", hidden_size=4096, num_layers=32, vocab_size=32064)
    method = ImageGuidedHeadSuppression().prepared(large, tiny.model)
    assert (method.rho, method.epsilon, method.end_layer) == (0.95, 0.08, 32)
    assert (
        build("spin:epsilon=0.1").prepared(large, tiny.model).spec().startswith("spin:epsilon=0.1")
    )
    llama3 = replace(large, vocab_size=128320)
    assert ImageGuidedHeadSuppression().prepared(llama3, tiny.model).epsilon == 0


def test_options_that_do_not_fit() -> None:
    tiny = family("llava")
    for options in ({"rho": 1.1}, {"rho": -0.1}, {"epsilon": 2.0}):
        with pytest.raises(BadInput, match="out of range"):
            ImageGuidedHeadSuppression(**options)
    for spec in ("spin:start_layer=3", "spin:end_layer=4", "spin:start_layer=2;end_layer=2"):
        with pytest.raises(BadInput, match="do not lie in a model of 3 layers"):
            vlmfix.wrap(tiny.model, spec)
    with pytest.raises((CompositionError, BadInput)):
        vlmfix.wrap(tiny.model, "spin", impl="triton")
    assert "_vlmfix_session" not in tiny.model.__dict__
