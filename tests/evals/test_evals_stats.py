"""Intervals and tests: against brute force, at the edges, and fast enough."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from scipy.stats import binomtest, bootstrap

from vlmfix.evals.scoring import stats
from vlmfix.evals.scoring.metrics import Arm, Ratio, counts_table, summarise
from vlmfix.evals.scoring.stats import Resamples, holm, mcnemar, percentile_interval, wilson

RATIOS = (
    Ratio("accuracy", {"correct": 1}, {"n": 1}, proportion=True),
    Ratio("f1", {"tp": 2}, {"tp": 2, "miss": 1}, defined_if=("tp",)),
)
COLUMNS = ("n", "correct", "tp", "miss")


def test_bootstrap_resamples_whole_images() -> None:
    """Three images: the exact distribution is known by listing all 27 resamples."""
    clusters = ["a", "a", "b", "c", "c", "c"]
    values = np.array([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])[:, None]
    per_image = [3.0, 4.0, 56.0]
    possible = [sum(draw) for draw in itertools.product(per_image, repeat=3)]
    drawn = Resamples(clusters, replicates=20_000, seed=0).sums(values)[:, 0]
    assert set(drawn) == set(possible)
    for total in set(possible):
        exact = possible.count(total) / 27
        assert (drawn == total).mean() == pytest.approx(exact, abs=0.012)


def test_sums_equal_a_brute_force_replay() -> None:
    generator = np.random.default_rng(5)
    clusters = generator.integers(0, 7, size=40).tolist()
    counts = generator.random((40, 2, 3))
    resamples = Resamples(clusters, replicates=50, seed=3)
    sums = resamples.sums(counts)
    order = list(dict.fromkeys(clusters))
    draw = np.random.default_rng(3)
    for replicate in range(50):
        total = np.zeros((2, 3))
        for image in draw.integers(len(order), size=len(order)):
            total += counts[[c == order[image] for c in clusters]].sum(axis=0)
        np.testing.assert_allclose(sums[replicate], total)


def rows(flags: list[bool]) -> Arm:
    table = [{"n": 1, "correct": ok, "tp": ok, "miss": not ok} for ok in flags]
    return Arm(counts_table(table, COLUMNS), flags)


def test_identical_arms_differ_by_exactly_nothing() -> None:
    """Both arms see the same resamples; independent ones would give the delta a spread."""
    flags = (np.random.default_rng(0).random(200) < 0.7).tolist()
    splits, images = ["s"] * 200, [i // 4 for i in range(200)]
    arms = {"base": rows(flags), "same": rows(flags)}
    result = summarise(arms, COLUMNS, RATIOS, splits, images)
    for metric in ("accuracy", "f1"):
        assert result["same"]["delta"]["s"][metric] == {"value": 0.0, "ci": [0.0, 0.0]}
        low, high = result["base"]["scores"]["s"][metric]["ci"]
        assert low < result["base"]["scores"]["s"][metric]["value"] < high
    assert result["same"]["delta"]["s"]["mcnemar"]["p"] == 1.0


def test_mean_is_over_splits_and_pool_over_items() -> None:
    flags = [True, False, False, False, True, True]
    splits = ["x", "x", "x", "x", "y", "y"]
    result = summarise({"base": rows(flags)}, COLUMNS, RATIOS, splits, range(6), 200)
    scores = {k: v["accuracy"]["value"] for k, v in result["base"]["scores"].items()}
    assert scores == pytest.approx({"x": 0.25, "y": 1.0, "mean": 0.625, "pooled": 0.5})
    alone = summarise({"base": rows(flags)}, COLUMNS, RATIOS, ["x"] * 6, range(6), 200)
    assert set(alone["base"]["scores"]) == {"x"}


def test_one_image_has_no_bootstrap_interval() -> None:
    result = summarise({"b": rows([True, False])}, COLUMNS, RATIOS, ["s", "s"], ["i", "i"], 100)
    assert result["b"]["scores"]["s"]["f1"]["ci"] is None
    assert result["b"]["scores"]["s"]["accuracy"]["ci_method"] == "wilson"


def test_nothing_at_all() -> None:
    result = summarise({"b": Arm(counts_table([], COLUMNS), [])}, COLUMNS, RATIOS, [], [], 100)
    assert result == {"b": {"scores": {}, "counts": {}, "flags": []}}


def test_wilson_edges() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 10)[0] == 0.0 and 0.2 < wilson(0, 10)[1] < 0.35
    assert wilson(10, 10)[1] == 1.0


def test_mcnemar_edges() -> None:
    assert mcnemar([True, False], [True, False]).p == 1.0
    assert mcnemar([False] * 5, [True] * 5).p == pytest.approx(2 / 32)
    assert mcnemar([True, False] * 2, [False, True] * 2).p == 1.0
    many = mcnemar([True] * 3000 + [False] * 2000, [False] * 3000 + [True] * 2000)
    assert 0 < many.p < 1e-40
    with pytest.raises(ValueError, match="shorter"):
        mcnemar([True, True], [True])


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_percentile_interval() -> None:
    assert percentile_interval(np.arange(1001.0)) == pytest.approx((25.0, 975.0))


def test_nine_thousand_rows_take_less_than_two_seconds() -> None:
    generator = np.random.default_rng(0)
    splits = [name for name in "abc" for _ in range(3000)]
    images = [i % 3000 // 6 for i in range(9000)]
    arms = {name: rows((generator.random(9000) < 0.8).tolist()) for name in ("base", "m", "n")}
    began = time.process_time()
    summarise(arms, COLUMNS, RATIOS, splits, images, replicates=2000)
    assert time.process_time() - began < 2.0


@pytest.mark.parametrize(("k", "n"), [(0, 7), (1, 7), (450, 500), (2693, 3000), (7, 7)])
def test_wilson_is_scipys(k: int, n: int) -> None:
    theirs = binomtest(k, n).proportion_ci(0.95, method="wilson")
    assert wilson(k, n) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


@pytest.mark.parametrize(("better", "worse"), [(38, 59), (0, 5), (3, 3), (1, 0), (120, 80)])
def test_mcnemar_is_scipys_binomial_test(better: int, worse: int) -> None:
    base = [False] * better + [True] * worse + [True] * 10
    method = [True] * better + [False] * worse + [True] * 10
    assert mcnemar(base, method).p == pytest.approx(binomtest(better, better + worse).pvalue)


def test_holm_rejects_what_the_step_down_procedure_rejects() -> None:
    """By definition: in order, while p_(k) <= alpha / (m - k); the first that is not ends it."""
    draw = np.random.default_rng(2)
    for _ in range(200):
        p_values = (draw.random(draw.integers(1, 9)) ** 3).tolist()
        for alpha in (0.01, 0.05, 0.3):
            rejected, order = set(), sorted(range(len(p_values)), key=p_values.__getitem__)
            for k, index in enumerate(order):
                if p_values[index] > alpha / (len(p_values) - k):
                    break
                rejected.add(index)
            assert {i for i, p in enumerate(holm(p_values)) if p <= alpha} == rejected


def test_clustered_error_is_that_of_cluster_totals() -> None:
    """scipy's bootstrap of cluster means, and the formula for equal clusters, give our spread."""
    draw = np.random.default_rng(3)
    skill = draw.random(500)
    right = draw.random((500, 6)) < skill[:, None]
    ours = Resamples(np.repeat(np.arange(500), 6).tolist(), replicates=4000).sums(
        right.reshape(-1, 1).astype(float)
    )
    error = (ours[:, 0] / right.size).std()
    means = right.mean(axis=1)
    theirs = bootstrap((means,), np.mean, n_resamples=4000, vectorized=True, rng=4)
    assert error == pytest.approx(theirs.standard_error, rel=0.05)
    assert error == pytest.approx(means.std() / np.sqrt(500), rel=0.05)
    assert error > 1.3 * np.sqrt(right.mean() * (1 - right.mean()) / right.size)


def test_resamples_that_are_not_kept_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of many clusters are drawn again instead; no matrix of floats is ever whole."""
    clusters = np.random.default_rng(1).integers(0, 90, 400).tolist()
    counts = np.random.default_rng(2).integers(0, 9, (400, 3, 2)).astype(float)
    items = np.arange(0, 400, 3)
    kept = Resamples(clusters, replicates=70, seed=5)
    # By the definition: as many clusters as there are, drawn with repeats.
    draw = np.random.default_rng(5)
    n = kept.n_clusters
    weights = np.stack([np.bincount(draw.integers(n, size=n), minlength=n) for _ in range(70)])
    expected = np.einsum("ri,ijk->rjk", weights[:, kept.cluster_of], counts)
    assert np.array_equal(kept.sums(counts), expected)
    both = kept.sums_of([(counts, None), (counts[items], items)])
    assert np.array_equal(both[0], expected)
    assert np.array_equal(both[1], kept.sums(counts[items], items))
    monkeypatch.setattr(stats, "_KEPT", 0)
    monkeypatch.setattr(stats, "_TILE", 7)
    assert np.array_equal(Resamples(clusters, replicates=70, seed=5).sums(counts), expected)
    assert {block.dtype for block in kept.blocks()} == {np.dtype(np.uint8)}


def test_five_thousand_images_take_less_than_five_seconds() -> None:
    """As 5,000 captions do: every image is a cluster, and twelve counts are drawn."""
    counts = np.random.default_rng(0).random((5000, 12))
    began = time.process_time()
    Resamples(range(5000)).sums(counts)
    assert time.process_time() - began < 2.5
