"""keep_plausible: which tokens survive, and that those ruled out stay in order far below them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from vlmfix.base.contrast import keep_plausible

BASE = torch.tensor([2.0, 1.5, 0.0, -1.0], dtype=torch.float64)
BRANCH = torch.tensor([2.2, 0.5, 0.1, -3.0], dtype=torch.float64)
DTYPES = [torch.float32, torch.float64]


def logits(seed: int, dtype: torch.dtype, tokens: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (2, 3, tokens) before and after a contrast that reorders many of them."""
    generator = torch.Generator().manual_seed(seed)
    base, branch = 4 * torch.randn(2, 2, 3, tokens, generator=generator, dtype=dtype)
    return base, base + 1.5 * (base - branch)


def test_worked_row() -> None:
    kept = keep_plausible(2 * BASE - BRANCH, BASE, 0.1)
    assert torch.allclose(kept[:3], torch.tensor([1.8, 2.5, -0.1], dtype=torch.float64))
    wanted = torch.tensor([0.316123, 0.636594, 0.047282, 0.0], dtype=torch.float64)
    assert torch.allclose(kept.softmax(-1), wanted, rtol=0, atol=1e-6)
    assert kept.softmax(-1)[3] == 0 and kept.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("beta", [1e-4, 0.01, 0.1, 0.5, 0.999, 1.0])
def test_survivors_are_those_of_the_probabilities_and_keep_their_logits(
    beta: float, dtype: torch.dtype
) -> None:
    base, combined = logits(0, dtype)
    kept = keep_plausible(combined, base, beta)
    share = base.double().softmax(-1)
    share /= share.amax(-1, keepdim=True)
    survivors = share >= beta
    assert survivors.any(-1).all() and not survivors.all(-1).any()
    assert torch.equal(kept[survivors], combined[survivors])
    assert kept.isfinite().all() and kept.dtype == dtype
    for temperature in (0.5, 1.0, 10.0):
        chances = (kept / temperature).softmax(-1)
        assert not chances[~survivors].any() and (chances[survivors] > 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_ruled_out_tokens_keep_their_order_below_all_others(dtype: torch.dtype) -> None:
    base, combined = logits(1, dtype)
    kept = keep_plausible(combined, base, 0.1)
    survivors = kept == combined
    for sample, place in itertools.product(range(2), range(3)):
        row, plausible = kept[sample, place], survivors[sample, place]
        gap = row[plausible].min() - row[~plausible].max()
        assert gap.item() == pytest.approx(1e4, abs=2e-3)
        ranked = row[~plausible][combined[sample, place][~plausible].argsort()]
        assert (ranked.diff() >= 0).all() and ranked[-1] - ranked[0] > 10


def test_a_beam_search_finds_candidates_where_one_token_survives() -> None:
    base, combined = logits(2, torch.float32)
    kept = keep_plausible(combined, base, 1.0)
    best = kept.log_softmax(-1).topk(6).values
    assert best.isfinite().all() and (best[..., 1:] < -9e3).all()


def test_a_processor_may_forbid_every_survivor() -> None:
    """min_new_tokens sets the end token to minus infinity, which may have been the only one."""
    base, combined = logits(3, torch.float32)
    kept = keep_plausible(combined, base, 1.0)
    only = base.argmax(-1, keepdim=True)
    forbidden = kept.scatter(-1, only, -math.inf)
    wanted = combined.scatter(-1, only, -math.inf).argmax(-1)
    assert torch.equal(forbidden.argmax(-1), wanted) and forbidden.softmax(-1).isfinite().all()


def test_beta_zero_keeps_everything() -> None:
    base, combined = logits(4, torch.float32)
    assert torch.equal(keep_plausible(combined, base, 0.0), combined)


@pytest.mark.parametrize("dtype", DTYPES)
def test_beta_one_keeps_the_best_of_the_base_and_its_ties(dtype: torch.dtype) -> None:
    base, combined = logits(5, dtype)
    kept = keep_plausible(combined, base, 1.0)
    assert torch.equal(kept.argmax(-1), base.argmax(-1))
    tied = torch.tensor([3.0, 1.0, 3.0, 3.0], dtype=dtype)
    row = keep_plausible(torch.tensor([0.0, 9.0, 1.0, 0.0], dtype=dtype), tied, 1.0)
    assert row[[0, 2, 3]].tolist() == [0.0, 1.0, 0.0] and row[1] == -1e4


def test_a_token_on_the_threshold_survives() -> None:
    base = torch.tensor([0.0, math.log(0.25), math.log(0.25) - 1e-12], dtype=torch.float64)
    assert keep_plausible(base, base, 0.25)[:2].tolist() == base[:2].tolist()
    assert keep_plausible(base, base, 0.25)[2] < -9e3


@pytest.mark.parametrize("shift", [-700.0, 0.0, 700.0])
def test_shifts_of_the_base_change_nothing(shift: float) -> None:
    base, combined = logits(6, torch.float64)
    kept = keep_plausible(combined, base + shift, 0.1)
    assert torch.equal(kept, keep_plausible(combined, base, 0.1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_that_the_model_forbids(dtype: torch.dtype) -> None:
    """Minus infinity, or the least number, in the base: ruled out, and no harm to the others."""
    for least in (-math.inf, torch.finfo(dtype).min):
        base, combined = (row[0, 0].clone() for row in logits(7, dtype))
        worst = base.argsort()[:3]
        base[worst] = combined[worst] = least
        kept = keep_plausible(combined, base, 0.1)
        assert not kept.isnan().any() and (kept[worst] <= kept.min()).all()
        base[worst] = combined[worst] = -50.0
        others = torch.ones_like(kept, dtype=torch.bool).scatter(0, worst, False)
        assert torch.equal(kept[others], keep_plausible(combined, base, 0.1)[others])
        assert kept.softmax(-1)[worst].tolist() == [0.0] * 3


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_tokens_that_the_model_forbids_in_every_stream(beta: float) -> None:
    """The difference of two minus infinities must not spread."""
    base, branch = (logits(12 + seed, torch.float32)[0] for seed in range(2))
    wanted = keep_plausible(base + (base - branch), base, beta)
    base, branch = (torch.nn.functional.pad(x, (0, 2), value=-math.inf) for x in (base, branch))
    kept = keep_plausible(base + (base - branch), base, beta)
    assert torch.equal(kept[..., :-2], wanted) and not kept.softmax(-1)[..., -2:].any()


def test_where_nothing_but_the_forbidden_is_implausible() -> None:
    base = torch.tensor([1.0, 0.9, -math.inf])
    assert keep_plausible(base, base, 0.5).tolist() == base.tolist()


def test_rows_do_not_see_each_other() -> None:
    base, combined = logits(8, torch.float32)
    kept = keep_plausible(combined, base, 0.1)
    for sample in range(2):
        for row in range(3):
            alone = keep_plausible(combined[sample, row], base[sample, row], 0.1)
            assert torch.equal(kept[sample, row], alone)


def test_the_mask_alone() -> None:
    """A contrast of weight 0 is the base on its plausible tokens: greedy decoding stays."""
    base, _ = logits(9, torch.float32)
    kept = keep_plausible(base, base, 0.1)
    assert torch.equal(kept.argmax(-1), base.argmax(-1))
    survivors = kept == base
    assert survivors.sum(-1).min() >= 1 and not survivors.all()
    share = base.softmax(-1) * survivors
    assert torch.allclose(kept.softmax(-1), share / share.sum(-1, keepdim=True))


def test_nothing_is_written_into_what_was_given() -> None:
    base, combined = logits(10, torch.float32)
    before = base.clone(), combined.clone()
    keep_plausible(combined, base, 0.1)
    assert torch.equal(base, before[0]) and torch.equal(combined, before[1])


def test_inference_tensors() -> None:
    with torch.inference_mode():
        base, combined = logits(11, torch.float32)
        kept = keep_plausible(combined, base, 0.1)
    base, combined = logits(11, torch.float32)
    assert torch.equal(kept, keep_plausible(combined, base, 0.1))
