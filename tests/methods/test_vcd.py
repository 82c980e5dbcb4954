"""VCD: the worked numbers and property tests of its specification."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from matrix import family, logits, prompt
from tiny import PER_POSITION, generate_kwargs
from tiny import build as build_tiny
from tiny_configs import IMAGE

import vlmfix
from vlmfix.base.contrast import Prompt
from vlmfix.errors import BadInput
from vlmfix.families import describe_model
from vlmfix.methods.noise import noise_weights, noised
from vlmfix.methods.vcd import VisualContrastiveDecoding
from vlmfix.registry import build

BASE = torch.tensor([2.0, 1.5, 0.0, -1.0], dtype=torch.float64).view(1, 1, 4)
NOISED = torch.tensor([2.2, 0.5, 0.1, -3.0], dtype=torch.float64).view(1, 1, 4)
TOKEN = torch.tensor([1])


def contrast(method: VisualContrastiveDecoding) -> torch.Tensor:
    """(4,), the worked logits combined."""
    return method.contrast(BASE, [NOISED] if method.streams() else [], TOKEN)[0, 0]


def assert_close(got: torch.Tensor, wanted: list[float]) -> None:
    assert torch.allclose(got, torch.tensor(wanted, dtype=got.dtype), rtol=0, atol=1e-6)


# -- the maths -------------------------------------------------------------------------------------


def test_worked_contrast() -> None:
    method = VisualContrastiveDecoding()
    assert float(BASE.max()) + math.log(method.beta) == pytest.approx(-0.302585, abs=1e-6)
    combined = contrast(method)
    assert_close(combined[:3], [1.8, 2.5, -0.1])
    assert_close(combined.softmax(-1), [0.316123, 0.636594, 0.047282, 0.0])
    assert combined.softmax(-1)[3] == 0


def test_equal_streams_are_the_identity_on_plausible_tokens() -> None:
    base = torch.randn(2, 3, 100, generator=torch.Generator().manual_seed(0))
    threshold = base.amax(-1, keepdim=True) + math.log(0.1)
    for alpha in (0.3, 1.0, 2.5, 9.0):
        free = VisualContrastiveDecoding(alpha=alpha, beta=0.0)
        assert torch.equal(free.contrast(base, [base.clone()], torch.arange(3)), base)
        kept = VisualContrastiveDecoding(alpha=alpha).contrast(base, [base], torch.arange(3))
        assert torch.equal(kept == base, base >= threshold)


@pytest.mark.parametrize("alpha", [0.0, 1.0, 9.0])
def test_beta_one_keeps_the_best_token_of_the_base(alpha: float) -> None:
    row = contrast(VisualContrastiveDecoding(alpha=alpha, beta=1.0))
    for temperature in (0.1, 1.0, 5.0):
        assert (row / temperature).softmax(-1).tolist() == [1.0, 0.0, 0.0, 0.0]


def test_beta_zero_rules_nothing_out() -> None:
    assert_close(contrast(VisualContrastiveDecoding(beta=0.0)), [1.8, 2.5, -0.1, 1.0])


def test_the_form_of_the_code() -> None:
    generator = torch.Generator().manual_seed(2)
    base, branch = 3 * torch.randn(2, 1, 5, 60, generator=generator, dtype=torch.float64)
    for alpha, beta in ((1.0, 0.1), (0.5, 0.2), (2.0, 0.01)):
        wanted = (1 + alpha) * base - alpha * branch
        wanted[base < math.log(beta) + base.amax(-1, keepdim=True)] = -math.inf
        method = VisualContrastiveDecoding(alpha=alpha, beta=beta)
        got = method.contrast(base, [branch], torch.arange(5))
        assert torch.allclose(got.softmax(-1), wanted.softmax(-1), rtol=1e-10, atol=0)


def test_what_runs_a_branch() -> None:
    mask = VisualContrastiveDecoding(alpha=0.0)
    assert mask.streams() == 0 and not mask.neutral()
    assert torch.equal(contrast(mask)[:3], BASE[0, 0, :3]) and contrast(mask).softmax(-1)[3] == 0
    nothing = VisualContrastiveDecoding(alpha=0.0, beta=0.0)
    assert nothing.streams() == 0 and nothing.neutral()
    assert torch.equal(contrast(nothing), BASE[0, 0])
    for on in (VisualContrastiveDecoding(), VisualContrastiveDecoding(beta=0.0)):
        assert on.streams() == 1 and not on.neutral()
    assert tuple(mask.watched(describe_model(family("llava").model))) == ()


def test_the_branch_sees_the_noised_image() -> None:
    tiny = family("qwen2_5_vl")
    inputs = tiny.inputs(2)
    ids = inputs["input_ids"]
    vision = {key: value for key, value in inputs.items() if key not in PER_POSITION}
    info = describe_model(tiny.model)
    made = Prompt(info, ids, inputs["attention_mask"].bool(), ids == IMAGE, vision)
    (branch,) = VisualContrastiveDecoding(noise_step=700, seed=3).branches(made)
    assert branch.image and branch.hidden is None and branch.filled is None
    assert branch.vision is not None and branch.vision.keys() == vision.keys()
    assert torch.equal(branch.vision["pixel_values"], noised(made, 700, 3)["pixel_values"])


def test_options() -> None:
    built = build("vcd:alpha=0.5;beta=0.2;noise_step=700;seed=3")
    assert built == VisualContrastiveDecoding(0.5, 0.2, 700, 3)
    assert build(built.spec()) == built and build("vcd:seed=none") == VisualContrastiveDecoding()
    bad: tuple[dict[str, Any], ...] = (
        {"alpha": -0.1},
        {"beta": 1.1},
        {"noise_step": 1000},
        {"noise_step": -1},
        {"seed": -1},
        {"seed": 2**63},
    )
    for options in bad:
        with pytest.raises(BadInput, match="out of range"):
            VisualContrastiveDecoding(**options)
    for edge in ({"noise_step": 0}, {"noise_step": 999}, {"seed": 2**63 - 1}, {"beta": 1.0}):
        VisualContrastiveDecoding(**edge)


# -- under generate() ------------------------------------------------------------------------------


def answers(model: Any, inputs: dict[str, Any], **kwargs: Any) -> torch.Tensor:
    """Ids of a short generate(), sampled from the global generator where it samples."""
    torch.manual_seed(5)
    output: torch.Tensor = model.generate(**inputs, **generate_kwargs(**kwargs))
    return output


SAMPLING = {"do_sample": True, "temperature": 0.9}


@pytest.mark.parametrize("mode", [{}, SAMPLING], ids=["greedy", "sampling"])
def test_the_global_generator_is_left_alone(mode: dict[str, Any]) -> None:
    """It ends where it ends without the method, whatever was contrasted, and alpha 0 is plain."""
    tiny = family("llava")
    inputs = prompt(tiny)
    plain = answers(tiny.model, inputs, **mode)
    state = torch.get_rng_state()
    nothing = VisualContrastiveDecoding(alpha=0.0, beta=0.0)
    for method in (nothing, VisualContrastiveDecoding(alpha=2.0, noise_step=999)):
        with vlmfix.wrapped(tiny.model, method):
            got = answers(tiny.model, inputs, **mode)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(got, plain) == (method is nothing)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_seeds_change_the_branch_alone(name: str) -> None:
    tiny = family(name)
    inputs = prompt(tiny)
    got = []
    for seed in (1, 1, 2):
        with vlmfix.wrapped(tiny.model, VisualContrastiveDecoding(seed=seed, beta=0.0)):
            got.append(logits(tiny.model, inputs))
    assert torch.equal(got[0], got[1]) and (got[0] - got[2]).abs().max() > 1e-2
    # The default follows the global seed, as sampling does.
    for seed, same in ((1, 0), (2, 2)):
        torch.manual_seed(seed)
        torch.rand(3)
        with vlmfix.wrapped(tiny.model, VisualContrastiveDecoding(beta=0.0)):
            assert torch.equal(logits(tiny.model, inputs), got[same])


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "smolvlm"])
def test_beta_one_is_greedy_decoding_of_the_base(name: str) -> None:
    tiny = family(name)
    inputs = prompt(tiny)
    # Nothing may be forbidden that the base would have said.
    free = {"suppress_tokens": None, "min_new_tokens": None, "eos_token_id": None}
    plain = answers(tiny.model, inputs, **free)
    for mode in ({}, SAMPLING):
        with vlmfix.wrapped(tiny.model, VisualContrastiveDecoding(alpha=5.0, beta=1.0)):
            assert torch.equal(answers(tiny.model, inputs, **free, **mode), plain)


def test_the_mask_alone_is_greedy_decoding_and_runs_no_branch() -> None:
    tiny = family("llava")
    inputs = prompt(tiny)
    with vlmfix.wrapped(tiny.model, VisualContrastiveDecoding(alpha=0.0)):
        masked = logits(tiny.model, inputs)
        got = answers(tiny.model, inputs)
        report = vlmfix.last_call(tiny.model)
    plain = logits(tiny.model, inputs)
    kept = masked == plain
    assert torch.equal(kept, plain >= plain.amax(-1, keepdim=True) + math.log(0.1))
    assert torch.equal(got, answers(tiny.model, inputs)) and report.extra_passes == 0


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen3_vl", "internvl", "gemma3"])
def test_streams_equal_two_loops(name: str) -> None:
    """Base and noised prompt, each alone through the plain model, token by token."""
    tiny = family(name)
    inputs = prompt(tiny)
    method = VisualContrastiveDecoding(alpha=1.0, noise_step=700, seed=4)
    with vlmfix.wrapped(tiny.model, method):
        output = tiny.model.generate(
            **inputs, **generate_kwargs(output_logits=True, return_dict_in_generate=True)
        )
    width = inputs["input_ids"].shape[1]
    for row in range(3):
        single = tiny.single(inputs, row)
        ids, info = single["input_ids"], describe_model(tiny.model)
        vision = {key: value for key, value in single.items() if key not in PER_POSITION}
        made = Prompt(info, ids, ids >= 0, ids == tiny.image_token_id, vision)
        blurred = {**single, **noised(made, 700, 4)}
        said = output.sequences[row, width:]
        # Teacher forcing: the plain model continues both prompts with what was said.
        runs = []
        for stream in (single, blurred):
            kwargs = generate_kwargs(
                output_logits=True,
                return_dict_in_generate=True,
                prefix_allowed_tokens_fn=lambda _, so_far, n=ids.shape[1], said=said: [
                    int(said[len(so_far) - n])
                ],
            )
            runs.append(torch.stack(tiny.model.generate(**stream, **kwargs).logits)[:, 0])
        base, branch = runs
        wanted = method.contrast(base[None], [branch[None]], torch.arange(1, 7))[0]
        got = torch.stack(output.logits)[:, row]
        plausible = base >= base.amax(-1, keepdim=True) + math.log(0.1)
        assert torch.allclose(got[plausible], wanted[plausible], atol=1e-4)
        assert (got[~plausible] < -9e3).all()
        assert (base - branch).abs().max() > 0.1


def test_a_prompt_without_an_image_stays_as_it_is() -> None:
    tiny = family("llava")
    inputs = {"input_ids": torch.tensor([[1, 5, 9, 20]]), "attention_mask": torch.ones(1, 4).long()}
    plain = logits(tiny.model, inputs)
    with vlmfix.wrapped(tiny.model, VisualContrastiveDecoding()):
        assert torch.equal(logits(tiny.model, inputs), plain)


def test_half_precision_logits_come_back_finite() -> None:
    tiny = build_tiny("llava")
    tiny.model.to(torch.bfloat16)
    inputs = prompt(tiny)
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    with vlmfix.wrapped(tiny.model, VisualContrastiveDecoding(alpha=2.0)):
        assert logits(tiny.model, inputs).isfinite().all()


def test_features_instead_of_pixels_are_refused() -> None:
    tiny = family("llava")
    inputs = tiny.inputs(1)
    with torch.no_grad():
        features = tiny.model.get_image_features(inputs.pop("pixel_values"))
    with (
        vlmfix.wrapped(tiny.model, VisualContrastiveDecoding()),
        pytest.raises(BadInput, match="not features that were encoded before"),
    ):
        logits(tiny.model, inputs, mm_encoder_outputs={"image": features})


def test_noise_fades_out_with_the_step() -> None:
    tiny = family("llava")
    inputs = prompt(tiny)
    plain = logits(tiny.model, inputs)
    moved = []
    for step in (0, 300, 999):
        with vlmfix.wrapped(tiny.model, VisualContrastiveDecoding(1.0, 0.0, step, seed=0)):
            moved.append(float((logits(tiny.model, inputs) - plain).abs().mean()))
    assert moved == sorted(moved) and noise_weights(0)[1] < 0.005 and moved[0] < 0.1 * moved[2]
