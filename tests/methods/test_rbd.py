"""RBD: the worked numbers and property tests of our reconstruction."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from matrix import family, logits, prompt
from tiny import generate_kwargs

import vlmfix
from vlmfix.base.contrast import Prompt
from vlmfix.errors import BadInput
from vlmfix.families import describe_model
from vlmfix.methods.noise import noised
from vlmfix.methods.rbd import ReBalancingContrastiveDecoding, significant
from vlmfix.methods.vcd import VisualContrastiveDecoding
from vlmfix.registry import build, describe

BASE = torch.tensor([2.0, 1.5, 0.0, -1.0], dtype=torch.float64).view(1, 1, 4)
TEXTUAL = torch.tensor([2.2, 0.5, 0.1, -3.0], dtype=torch.float64).view(1, 1, 4)
VISUAL = torch.tensor([1.8, 2.1, -0.2, -1.5], dtype=torch.float64).view(1, 1, 4)
TOKEN = torch.tensor([1])


def contrast(method: ReBalancingContrastiveDecoding) -> torch.Tensor:
    """(4,), the worked logits combined; only the branches that are weighed exist."""
    branches = [TEXTUAL] * bool(method.a_t) + [VISUAL] * bool(method.a_v)
    assert method.streams() == len(branches)
    return method.contrast(BASE, branches, TOKEN)[0, 0]


def assert_close(got: torch.Tensor, wanted: list[float]) -> None:
    assert torch.allclose(got, torch.tensor(wanted, dtype=got.dtype), rtol=0, atol=1e-6)


# -- the maths -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a_t", "a_v", "combined", "probabilities"),
    [
        (1.0, 0.5, [1.7, 2.8, -0.2], [0.240747, 0.723245, 0.036008, 0.0]),
        (0.0, 1.0, [1.8, 2.1, -0.2], [0.402383, 0.543160, 0.054457, 0.0]),
        (1.0, 0.0, [1.8, 2.5, -0.1], [0.316123, 0.636594, 0.047282, 0.0]),
        (0.0, 0.0, [2.0, 1.5, 0.0], [0.574097, 0.348207, 0.077696, 0.0]),
    ],
)
def test_worked_contrast(
    a_t: float, a_v: float, combined: list[float], probabilities: list[float]
) -> None:
    got = contrast(ReBalancingContrastiveDecoding(a_t=a_t, a_v=a_v))
    assert_close(got[:3], combined)
    assert_close(got.softmax(-1), probabilities)
    assert got.softmax(-1)[3] == 0


def test_a_branch_that_equals_the_base_is_inert() -> None:
    base, other = torch.randn(2, 2, 3, 50, generator=torch.Generator().manual_seed(0))
    token = torch.arange(3)
    both = ReBalancingContrastiveDecoding(2.0, 0.7, beta=0.0)
    assert torch.equal(both.contrast(base, [base, base], token), base)
    textual = ReBalancingContrastiveDecoding(2.0, 0.0, beta=0.0).contrast(base, [other], token)
    assert torch.equal(both.contrast(base, [other, base], token), textual)
    visual = ReBalancingContrastiveDecoding(0.0, 0.7, beta=0.0).contrast(base, [other], token)
    assert torch.equal(both.contrast(base, [base, other], token), visual)


def test_without_a_visual_branch_it_is_vcd_to_the_bit() -> None:
    base, other = 5 * torch.randn(2, 2, 3, 500, generator=torch.Generator().manual_seed(1))
    for weight, beta in ((0.5, 0.1), (1.0, 0.0), (0.3, 0.2)):
        mine = ReBalancingContrastiveDecoding(weight, 0.0, beta)
        theirs = VisualContrastiveDecoding(weight, beta)
        got, wanted = (m.contrast(base, [other], torch.arange(3)) for m in (mine, theirs))
        assert torch.equal(got, wanted)


@pytest.mark.parametrize(("a_t", "a_v"), [(0.0, 0.0), (0.5, 0.5), (3.0, 1.0)])
def test_beta_one_keeps_the_best_token_of_the_base(a_t: float, a_v: float) -> None:
    row = contrast(ReBalancingContrastiveDecoding(a_t, a_v, beta=1.0)).softmax(-1)
    assert row.tolist() == [1.0, 0.0, 0.0, 0.0]


def test_what_runs_which_branch() -> None:
    info = describe_model(family("llava").model)
    layers = tuple(range(info.num_layers))
    for a_t, a_v, count, watched in (
        (0.5, 0.5, 2, layers),
        (0.5, 0.0, 1, ()),
        (0.0, 0.5, 1, layers),
        (0.0, 0.0, 0, ()),
    ):
        method = ReBalancingContrastiveDecoding(a_t, a_v)
        assert method.streams() == count and not method.neutral()
        assert tuple(method.watched(info)) == watched
    assert ReBalancingContrastiveDecoding(0.0, 0.0, beta=0.0).neutral()
    assert not ReBalancingContrastiveDecoding(0.5, 0.0, beta=0.0).neutral()
    assert not ReBalancingContrastiveDecoding(0.0, 0.5, beta=0.0).neutral()


# -- the significant tokens ------------------------------------------------------------------------


def test_worked_selection() -> None:
    """Mean 0.05, standard deviation 0.04 (0.044 if it were the unbiased one)."""
    attention = torch.tensor([0.02, 0.05, 0.03, 0.12, 0.08, 0.0])
    for mu, tokens in (
        (0.0, [1, 3, 4]),
        (0.5, [3, 4]),
        (0.74, [3, 4]),
        (0.76, [3]),
        (1.74, [3]),
        (1.76, [3]),  # none reaches it: the largest
        (-0.6, [1, 2, 3, 4]),
        (-1000.0, [0, 1, 2, 3, 4, 5]),
        (1000.0, [3]),
    ):
        # A hair more than the mean, so that the rounding of 0.05 does not decide.
        chosen = significant(attention + torch.tensor([0, 1e-6, 0, 0, 0, 0]), mu)
        assert chosen.nonzero().flatten().tolist() == tokens


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3])
def test_equal_attention_makes_all_significant(value: float) -> None:
    for count in (1, 2, 7, 576):
        for mu in (-3.0, 0.0, 2.0):
            assert significant(torch.full((count,), value), mu).all()
    assert significant(torch.zeros(0), 0.0).shape == (0,)


def test_scale_does_not_matter() -> None:
    attention = torch.rand(40, generator=torch.Generator().manual_seed(0))
    for mu in (0.0, 1.0):
        assert torch.equal(significant(attention, mu), significant(attention / 512, mu))
        assert 0 < significant(attention, mu).sum() < 40


def prompts(rows: list[torch.Tensor], **vision: Any) -> Prompt:
    """Left-padded prompts of a start token, (layers, N) attention to an image, one text token."""
    info = describe_model(family("llava").model)
    length = max(row.shape[1] for row in rows) + 2
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    visual, real = ids != 0, ids != 0
    seen = torch.zeros(len(rows[0]), len(rows), length)
    for index, row in enumerate(rows):
        start = length - row.shape[1] - 1
        visual[index, start:-1] = True
        real[index, start - 1 :] = True
        seen[:, index, start - 1] = seen[:, index, -1] = 0.4  # text must not enter the mean
        seen[:, index, start:-1] = row
    return Prompt(info, ids, real, visual, vision, dict(enumerate(seen)))


def test_the_visual_branch_hides_what_is_not_significant() -> None:
    attention = torch.tensor([[0.0, 0.0, 0.3, 0.2], [0.3, 0.5, 0.1, 0.25]])
    assert_close(attention.mean(0), [0.15, 0.25, 0.2, 0.225])  # mean 0.20625
    (branch,) = ReBalancingContrastiveDecoding(a_t=0.0).branches(prompts([attention]))
    assert branch.hidden is not None and branch.vision is None and branch.image
    assert branch.hidden.tolist() == [[False, True, False, True, False, False]]
    (all_of_it,) = ReBalancingContrastiveDecoding(a_t=0.0, mu=-1000).branches(prompts([attention]))
    assert all_of_it.hidden is not None and not all_of_it.hidden.any()


def test_rows_do_not_depend_on_the_batch() -> None:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.rand(3, count, generator=generator) / 50 for count in (6, 33, 0, 12, 576)]
    method = ReBalancingContrastiveDecoding(a_t=0.0)
    (batch,) = method.branches(prompts(rows))
    assert batch.hidden is not None
    for index, row in enumerate(rows):
        (alone,) = method.branches(prompts([row]))
        length = row.shape[1] + 2
        assert alone.hidden is not None
        assert torch.equal(batch.hidden[index, -length:], alone.hidden[0])
        assert not batch.hidden[index, :-length].any()
        assert bool(alone.hidden.any()) == bool(row.shape[1])


def test_the_textual_branch_comes_first_and_is_that_of_vcd() -> None:
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    made = prompts([torch.rand(3, 4)], pixel_values=pixels)
    textual, visual = ReBalancingContrastiveDecoding(noise_step=700, seed=3).branches(made)
    assert textual.vision is not None and textual.hidden is None and visual.vision is None
    assert torch.equal(textual.vision["pixel_values"], noised(made, 700, 3)["pixel_values"])
    (theirs,) = VisualContrastiveDecoding(noise_step=700, seed=3).branches(made)
    assert theirs.vision is not None
    assert torch.equal(theirs.vision["pixel_values"], textual.vision["pixel_values"])


def test_options() -> None:
    built = build("rbd:a_t=1;a_v=0.2;beta=0.2;noise_step=700;mu=1.5;seed=3")
    assert built == ReBalancingContrastiveDecoding(1.0, 0.2, 0.2, 700, 1.5, 3)
    assert build(built.spec()) == built
    facts = describe("rbd")
    assert all("xperimental" in facts[key] for key in ("title", "summary", "doc"))
    bad: tuple[dict[str, Any], ...] = (
        {"a_t": -0.1},
        {"a_v": -0.1},
        {"beta": 1.1},
        {"noise_step": 1000},
        {"mu": 1e4},
        {"mu": float("nan")},
        {"seed": -1},
    )
    for options in bad:
        with pytest.raises(BadInput, match="out of range"):
            ReBalancingContrastiveDecoding(**options)


# -- under generate() ------------------------------------------------------------------------------


def answers(model: Any, inputs: dict[str, Any], **kwargs: Any) -> torch.Tensor:
    """Ids of a short generate(), sampled from the global generator where it samples."""
    torch.manual_seed(5)
    output: torch.Tensor = model.generate(**inputs, **generate_kwargs(**kwargs))
    return output


SAMPLING = {"do_sample": True, "temperature": 0.9}


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "smolvlm"])
def test_tokens_of_vcd_without_the_visual_branch(name: str) -> None:
    tiny = family(name)
    inputs = prompt(tiny)
    pairs = (
        (ReBalancingContrastiveDecoding(a_t=0.8, a_v=0.0, seed=1), {}),
        (ReBalancingContrastiveDecoding(a_t=0.8, a_v=0.0), SAMPLING),
        (ReBalancingContrastiveDecoding(a_t=0.8, a_v=0.0, seed=1), {"num_beams": 3}),
    )
    for method, mode in pairs:
        got = []
        for one in (method, VisualContrastiveDecoding(alpha=0.8, seed=method.seed)):
            with vlmfix.wrapped(tiny.model, one):
                got.append((logits(tiny.model, inputs), answers(tiny.model, inputs, **mode)))
                report = vlmfix.last_call(tiny.model)
            assert report.streams == 2
        # A seed of None is that of torch, which answers() sets after the bare forward.
        assert method.seed is None or torch.equal(got[0][0], got[1][0])
        assert torch.equal(got[0][1], got[1][1])


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen3_vl", "gemma3", "internvl"])
def test_with_all_tokens_significant_the_visual_branch_is_the_base(name: str) -> None:
    tiny = family(name)
    inputs = prompt(tiny)
    plain = logits(tiny.model, inputs)
    with vlmfix.wrapped(tiny.model, ReBalancingContrastiveDecoding(0.0, 3.0, 0.0, mu=-1000.0)):
        assert torch.allclose(logits(tiny.model, inputs), plain, atol=1e-4)
    with vlmfix.wrapped(tiny.model, ReBalancingContrastiveDecoding(0.0, 3.0, 0.0, mu=0.0)):
        assert (logits(tiny.model, inputs) - plain).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_both_branches_add_up(name: str) -> None:
    tiny = family(name)
    inputs = prompt(tiny)
    plain = logits(tiny.model, inputs)
    moved = []
    for a_t, a_v in ((0.6, 0.4), (0.6, 0.0), (0.0, 0.4)):
        with vlmfix.wrapped(tiny.model, ReBalancingContrastiveDecoding(a_t, a_v, 0.0, seed=2)):
            moved.append(logits(tiny.model, inputs) - plain)
    assert torch.allclose(moved[0], moved[1] + moved[2], atol=1e-4)
    assert min(float(move.abs().max()) for move in moved) > 1e-2


def test_beta_one_is_greedy_decoding_of_the_base() -> None:
    tiny = family("llava")
    inputs = prompt(tiny)
    # Nothing may be forbidden that the base would have said.
    free = {"suppress_tokens": None, "min_new_tokens": None, "eos_token_id": None}
    plain = answers(tiny.model, inputs, **free)
    with vlmfix.wrapped(tiny.model, ReBalancingContrastiveDecoding(3.0, 3.0, beta=1.0)):
        for mode in ({}, SAMPLING):
            assert torch.equal(answers(tiny.model, inputs, **free, **mode), plain)
        assert vlmfix.last_call(tiny.model).streams == 3


def test_a_row_without_an_image_stays_while_others_change() -> None:
    tiny = family("llava")
    inputs = prompt(tiny)
    second = inputs["input_ids"][1]
    second[second == tiny.image_token_id] = 7
    inputs["pixel_values"] = inputs["pixel_values"][[0, 2]]
    plain = logits(tiny.model, inputs)
    with vlmfix.wrapped(tiny.model, ReBalancingContrastiveDecoding(1.0, 1.0, 0.0, seed=0)):
        moved = (logits(tiny.model, inputs) - plain).abs().amax(1)
    assert moved[1] == 0 and moved[0] > 1e-2 and moved[2] > 1e-2
