"""M3ID: the worked numbers of its specification, and the two rules."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from matrix import family
from matrix import prompt as padded_prompt
from tiny import generate_kwargs

import vlmfix
from vlmfix.base.contrast import Branch, Prompt
from vlmfix.errors import BadInput
from vlmfix.families import describe_model
from vlmfix.methods.m3id import MutualInformationDecoding, growing_weight
from vlmfix.registry import build

BASE = torch.tensor([2.0, 1.5, 0.0, -1.0], dtype=torch.float64)
BLIND = torch.tensor([2.2, 0.5, 0.1, -3.0], dtype=torch.float64)
PUBLISHED = {"max_weight": None}


def combine(method: MutualInformationDecoding, *tokens: int) -> torch.Tensor:
    """(R, V), with the worked logits in every row."""
    base, blind = (row.expand(1, len(tokens), 4) for row in (BASE, BLIND))
    streams = [blind] if method.streams() else []
    return method.contrast(base, streams, torch.tensor(tokens))[0]


def assert_close(got: torch.Tensor, wanted: list[float]) -> None:
    assert torch.allclose(got, torch.tensor(wanted, dtype=got.dtype), rtol=0, atol=1e-6)


def test_weights() -> None:
    tokens = torch.tensor([1, 10, 35, 64, 256, 512])
    wanted = [0.020201, 0.221403, 1.013753, 2.59664, 166.3, 28000.0]
    free = growing_weight(tokens, 0.02, None, torch.float64)
    assert torch.allclose(free, torch.tensor(wanted, dtype=torch.float64), rtol=3e-4)
    assert_close(free[:3], wanted[:3])
    bounded = growing_weight(tokens, 0.02, 3.0, torch.float64)
    assert torch.equal(bounded[:4], free[:4]) and bounded[4:].tolist() == [3.0, 3.0]
    assert not growing_weight(tokens, 0.0, None, torch.float64).any()


def test_the_bound_is_reached_at_the_seventieth_token() -> None:
    weight = growing_weight(torch.tensor([69, 70]), 0.02, 3.0, torch.float64)
    assert weight[0] < 3 and weight[1] == 3


def test_worked_contrast() -> None:
    first, later = combine(MutualInformationDecoding(**PUBLISHED), 1, 35)
    plain = BASE.log_softmax(-1)
    assert_close(plain, [-0.583139, -1.083139, -2.583139, -3.583139])
    assert_close(BLIND.log_softmax(-1), [-0.270528, -1.970528, -2.370528, -5.470528])
    assert_close(first[:3], [-0.589454, -1.065212, -2.587434])
    assert_close(first.softmax(-1), [0.569145, 0.353674, 0.077181, 0.0])
    assert_close(later[:3], [-0.900048, -0.183545, -2.798673])
    assert_close(later.softmax(-1), [0.312790, 0.640362, 0.046848, 0.0])
    assert first.softmax(-1)[3] == 0 and later.softmax(-1)[3] == 0


def test_the_bound_ends_the_growth() -> None:
    method = MutualInformationDecoding(max_weight=0.5)
    rows = combine(method, 1, 35, 5000)
    assert torch.equal(rows[0], combine(MutualInformationDecoding(**PUBLISHED), 1)[0])
    assert torch.equal(rows[1], rows[2])
    plain, blind = BASE.log_softmax(-1), BLIND.log_softmax(-1)
    assert torch.allclose(rows[1][:3], (plain + 0.5 * (plain - blind))[:3])


def test_gate_contrasts_only_where_the_model_is_unsure() -> None:
    """The best token has probability 0.558."""
    plain = BASE.log_softmax(-1)
    sure = MutualInformationDecoding(rule="gate", confidence=0.3, **PUBLISHED)
    assert torch.equal(combine(sure, 35)[0], plain)
    unsure = MutualInformationDecoding(rule="gate", confidence=0.9, **PUBLISHED)
    free = MutualInformationDecoding(beta=0.0, **PUBLISHED)
    assert torch.equal(combine(unsure, 1, 35), combine(free, 1, 35))
    assert_close(combine(unsure, 1)[0][:3], [-0.589454, -1.065212, -2.587434])
    assert combine(unsure, 35)[0].softmax(-1)[3] > 0


def test_gate_decides_row_by_row() -> None:
    method = MutualInformationDecoding(rule="gate", confidence=0.5, **PUBLISHED)
    base = torch.stack([BASE, BASE / 4])[:, None]
    got = method.contrast(base, [BLIND.expand(2, 1, 4)], torch.tensor([35]))
    plain = base.log_softmax(-1)
    assert torch.equal(got[0], plain[0]) and not torch.allclose(got[1], plain[1], atol=0.1)


def test_without_growth_only_the_rule_is_left() -> None:
    plain = BASE.log_softmax(-1)
    for still in ({"decay": 0.0}, {"max_weight": 0.0}):
        mask = MutualInformationDecoding(**still)
        assert mask.streams() == 0 and not mask.neutral()
        row = combine(mask, 35)[0]
        assert torch.equal(row[:3], plain[:3]) and row.softmax(-1)[3] == 0
        assert MutualInformationDecoding(**still, beta=0.0).neutral()
        assert MutualInformationDecoding(**still, rule="gate").neutral()
    never = MutualInformationDecoding(rule="gate", confidence=0.0)
    assert never.neutral() and never.streams() == 0
    assert MutualInformationDecoding().streams() == 1 and not MutualInformationDecoding().neutral()
    assert not MutualInformationDecoding(beta=0.0).neutral()


def test_equal_streams_are_the_identity_at_any_token() -> None:
    method = MutualInformationDecoding(beta=0.0, **PUBLISHED)
    base = BASE.expand(1, 2, 4)
    got = method.contrast(base, [base], torch.tensor([1, 512]))
    assert torch.equal(got, base.log_softmax(-1))


def test_beta_one_keeps_the_best_token_of_the_base() -> None:
    rows = combine(MutualInformationDecoding(beta=1.0), 1, 35, 600).softmax(-1)
    assert rows.tolist() == [[1.0, 0.0, 0.0, 0.0]] * 3


def test_very_long_answers_stay_finite_in_float32() -> None:
    """exp(0.1 t) leaves float32 at the 888th token; ruled-out tokens stay ruled out."""
    base, blind = (row.float().expand(1, 1, 4) for row in (BASE, BLIND))
    for beta, chances in ((0.1, [0.0, 1.0, 0.0, 0.0]), (0.9, [1.0, 0.0, 0.0, 0.0])):
        method = MutualInformationDecoding(decay=0.1, beta=beta, **PUBLISHED)
        row = method.contrast(base, [blind], torch.tensor([4000]))[0, 0]
        assert row.isfinite().all() and row.softmax(-1).tolist() == chances


@pytest.mark.parametrize("rule", ["apc", "gate"])
def test_a_token_that_the_model_forbids_stays_forbidden(rule: Literal["apc", "gate"]) -> None:
    method = MutualInformationDecoding(rule=rule, confidence=1.0, beta=0.5)
    base, blind = (row.clone().expand(1, 1, 4).contiguous() for row in (BASE, BLIND))
    base[..., 3] = blind[..., 3] = -torch.inf
    row = method.contrast(base, [blind], torch.tensor([35]))[0, 0]
    assert row[3] == -torch.inf and row[:3].isfinite().all()


def test_a_prefill_and_its_steps_agree() -> None:
    """Several rows in one call, as prompt lookup has them, count their tokens one by one."""
    method = MutualInformationDecoding(decay=0.3)
    together = combine(method, 4, 5, 6)
    assert torch.equal(together, torch.cat([combine(method, t) for t in (4, 5, 6)]))
    assert not torch.equal(together[0], together[2])


def test_the_branch_is_the_prompt_without_its_images() -> None:
    info = describe_model(family("llava").model)
    ids = torch.zeros(1, 3, dtype=torch.long)
    prompt = Prompt(info, ids, ids == 0, ids == 1, {})
    assert MutualInformationDecoding().branches(prompt) == [Branch(image=False)]


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_without_growth_no_second_stream_runs_and_greedy_answers_stay(name: str) -> None:
    tiny = family(name)
    inputs = padded_prompt(tiny)
    tokens = tiny.model.generate(**inputs, **generate_kwargs())
    with vlmfix.wrapped(tiny.model, "m3id:decay=0"):
        assert torch.equal(tiny.model.generate(**inputs, **generate_kwargs()), tokens)
        report = vlmfix.last_call(tiny.model)
    assert report.streams == 1 and report.extra_passes == 0
    assert report.contrasted_rows == 3 * 6


def test_the_gate_opens_in_generate() -> None:
    """Open, it is the contrast without a rule; closed, the plain model."""
    tiny = family("llava")
    inputs = padded_prompt(tiny)
    made = {}
    for spec in ("rule=gate;confidence=1", "beta=0", "rule=gate;confidence=1e-9"):
        with vlmfix.wrapped(tiny.model, f"m3id:decay=0.5;{spec}"):
            made[spec] = tiny.model.generate(**inputs, **generate_kwargs())
    opened, free, closed = made.values()
    assert torch.equal(opened, free) and not torch.equal(opened, closed)
    assert torch.equal(closed, tiny.model.generate(**inputs, **generate_kwargs()))


def test_options() -> None:
    built = build("m3id:decay=0.05;max_weight=none;rule=gate;confidence=0.4")
    assert built == MutualInformationDecoding(0.05, None, "gate", 0.1, 0.4)
    assert build(built.spec()) == built
    bad = ({"decay": -0.1}, {"max_weight": -1.0}, {"beta": 1.1}, {"confidence": 2.0})
    for options in bad:
        with pytest.raises(BadInput, match="out of range"):
            MutualInformationDecoding(**options)
    with pytest.raises(BadInput, match="must be one of apc, gate"):
        MutualInformationDecoding(rule="both")
