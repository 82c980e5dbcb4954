"""Controls: against scikit-like brute force, at ties and edges, and what trips the guard."""

from __future__ import annotations

import itertools
import math
import time
from typing import Any

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from vlmfix.evals.scoring.controls import add_controls, degenerate, repeats_itself, yes_no_controls
from vlmfix.evals.tasks import Answer, Sample


def area(labels: list[str], p_yes: list[float]) -> float:
    """Share of (yes, no) pairs in which the yes item has the larger p_yes, ties half."""
    yes = [p for p, label in zip(p_yes, labels, strict=True) if label == "yes"]
    no = [p for p, label in zip(p_yes, labels, strict=True) if label == "no"]
    wins = [(y > n) + (y == n) / 2 for y, n in itertools.product(yes, no)]
    return sum(wins) / len(wins)


def world(n: int, seed: int, digits: int = 1) -> tuple[list[str], list[float], list[str]]:
    """Labels, p_yes with many ties, and verdicts of another arm."""
    draw = np.random.default_rng(seed)
    truth = draw.random(n) < 0.5
    p_yes = (0.2 + 0.3 * truth + 0.5 * draw.random(n)).round(digits).tolist()
    other = draw.random(n) < 0.3 + 0.4 * truth
    words = np.array(["no", "yes"])
    return words[truth.astype(int)].tolist(), p_yes, words[other.astype(int)].tolist()


def controls(
    labels: list[str], base: list[float], method: list[str], clusters: Any = None, **more: Any
) -> dict[str, dict[str, Any]]:
    return yes_no_controls(
        labels,
        {"base": base, "m": [float(v == "yes") for v in method]},
        {"base": ["yes" if p > 0.5 else "no" for p in base], "m": method},
        splits=more.pop("splits", ["s"] * len(labels)),
        clusters=clusters if clusters is not None else range(len(labels)),
        replicates=more.pop("replicates", 200),
        **more,
    )


def test_area_under_the_curve_counts_pairs() -> None:
    labels, p_yes, method = world(60, 0)
    found = controls(labels, p_yes, method)
    assert found["base"]["auc"]["s"]["value"] == pytest.approx(area(labels, p_yes))
    yes = [p for p, label in zip(p_yes, labels, strict=True) if label == "yes"]
    no = [p for p, label in zip(p_yes, labels, strict=True) if label == "no"]
    u = mannwhitneyu(yes, no).statistic / (len(yes) * len(no))
    assert found["base"]["auc"]["s"]["value"] == pytest.approx(u)


def test_intervals_replay_the_resampled_images() -> None:
    labels, p_yes, method = world(40, 1)
    images = [i // 4 for i in range(40)]
    found = controls(labels, p_yes, method, images, replicates=60, seed=7)
    draw = np.random.default_rng(7)
    areas, gains = [], []
    for _ in range(60):
        items = [i for image in draw.integers(10, size=10) for i in range(40) if i // 4 == image]
        sub_labels, sub = [labels[i] for i in items], [p_yes[i] for i in items]
        areas.append(area(sub_labels, sub))
        said = [method[i] for i in items]
        accuracy = np.mean([a == b for a, b in zip(said, sub_labels, strict=True)])
        gains.append(accuracy - shifted_accuracy(sub_labels, sub, said.count("yes")))
    low, high = found["base"]["auc"]["s"]["ci"]
    assert (low, high) == pytest.approx(np.quantile(areas, [0.025, 0.975]).tolist())
    matched = found["m"]["prior_matched"]["s"]["accuracy"]["delta"]
    assert matched["ci"] == pytest.approx(np.quantile(gains, [0.025, 0.975]).tolist())


def shifted_accuracy(labels: list[str], p_yes: list[float], number: int) -> float:
    """The `number` largest are called yes; items tied at the threshold share what is left."""
    right, left = 0.0, float(number)
    for value in sorted(set(p_yes), reverse=True):
        tied = [label for p, label in zip(p_yes, labels, strict=True) if p == value]
        share = min(1.0, max(0.0, left / len(tied)))
        left -= len(tied)
        right += sum(share if label == "yes" else 1 - share for label in tied)
    return right / len(labels)


def test_a_mere_shift_gains_nothing_over_the_prior_matched_base() -> None:
    """The method is the base with 0.6 added to its yes-logit: accuracy moves, the rest is nil."""
    labels, p_yes, _ = world(400, 2, digits=12)
    base = [min(p, 0.99) for p in p_yes]
    logits = [math.log(p / (1 - p)) + 0.6 for p in base]
    method = ["yes" if z > 0 else "no" for z in logits]
    found = yes_no_controls(
        labels,
        {"base": base, "m": [1 / (1 + math.exp(-z)) for z in logits]},
        {"base": ["yes" if p > 0.5 else "no" for p in base], "m": method},
        splits=["s"] * 400,
        clusters=range(400),
        replicates=300,
    )
    raw = [
        np.mean([v == label for v, label in zip(said, labels, strict=True)])
        for said in (["yes" if p > 0.5 else "no" for p in base], method)
    ]
    assert abs(raw[1] - raw[0]) > 0.05
    matched = found["m"]["prior_matched"]["s"]
    for metric in ("accuracy", "f1"):
        assert matched[metric]["delta"]["value"] == pytest.approx(0, abs=1e-12)
        assert matched[metric]["delta"]["ci"] == pytest.approx([0, 0], abs=1e-12)
    assert matched["accuracy"]["method"]["value"] == pytest.approx(raw[1])
    assert matched["shift"] == pytest.approx(0.6, abs=0.05)
    assert found["m"]["auc_delta"]["s"]["value"] == pytest.approx(0, abs=1e-12)
    assert found["base"]["p_yes_agrees"] == found["m"]["p_yes_agrees"] == 1.0


def test_a_method_that_sees_better_gains_beyond_the_shift() -> None:
    labels, p_yes, _ = world(300, 3)
    found = controls(labels, p_yes, labels)
    delta = found["m"]["prior_matched"]["s"]["accuracy"]["delta"]
    assert delta["ci"][0] > 0
    assert found["m"]["auc_delta"]["s"]["ci"][0] > 0


def test_unparsed_answers_are_wrong_but_not_yes() -> None:
    labels = ["yes", "no", "yes", "no"]
    found = controls(labels, [0.9, 0.1, 0.8, 0.2], ["yes", None, "yes", "no"])
    matched = found["m"]["prior_matched"]["s"]["accuracy"]
    assert matched["method"]["value"] == 0.75
    assert matched["base"]["value"] == 1.0


def test_places_mean_pool_and_one_sided_splits() -> None:
    labels, p_yes, method = world(90, 4)
    splits = [s for s in "abc" for _ in range(30)]
    labels[60:] = ["no"] * 30  # c has no yes: no curve there
    found = controls(labels, p_yes, method, splits=splits)
    auc = {place: score["value"] for place, score in found["base"]["auc"].items()}
    assert set(auc) == {"a", "b", "mean", "pooled"}
    assert auc["mean"] == pytest.approx((auc["a"] + auc["b"]) / 2)
    assert auc["pooled"] == pytest.approx(area(labels, p_yes))
    assert set(found["m"]["prior_matched"]) == {"a", "b", "mean", "pooled"}


def test_seeds_are_values_of_their_own() -> None:
    labels, p_yes, method = world(40, 5)
    found = controls(labels, p_yes, method, [*range(20)] * 2, draws=[0] * 20 + [1] * 20)
    halves = [area(labels[:20], p_yes[:20]), area(labels[20:], p_yes[20:])]
    assert found["base"]["auc"]["s"]["by_seed"] == pytest.approx(halves)
    assert found["base"]["auc"]["s"]["value"] == pytest.approx(sum(halves) / 2)
    assert found["m"]["prior_matched"]["s"]["shift"] is None


def test_items_and_arms_without_p_yes() -> None:
    labels, p_yes, method = world(20, 6)
    some: list[float | None] = [None, *p_yes[1:]]
    verdicts = {"base": method, "m": method, "none": method}
    given = {"base": some, "m": p_yes, "none": [None] * 20}
    more = {"splits": ["s"] * 20, "clusters": range(20), "replicates": 50}
    found = yes_no_controls(labels, given, verdicts, **more)
    assert set(found) == {"base", "m"}
    assert found["m"]["n_p_yes"] == 19
    nothing = {"base": [None] * 20, "m": [None] * 20}
    assert yes_no_controls(labels, nothing, verdicts, **more) == {}
    without_base = {"base": [None] * 20, "m": p_yes}
    alone = yes_no_controls(labels, without_base, verdicts, **more)
    assert set(alone) == {"m"} and "prior_matched" not in alone["m"]


def test_no_finite_shift_makes_all_answers_yes() -> None:
    labels, p_yes, _ = world(20, 8)
    found = controls(labels, p_yes, ["yes"] * 20)
    matched = found["m"]["prior_matched"]["s"]
    assert matched["shift"] is None
    assert matched["accuracy"]["delta"]["value"] == 0.0


@pytest.mark.slow
def test_nine_thousand_rows_are_quick() -> None:
    labels, p_yes, method = world(9000, 9, digits=12)
    splits, images = [s for s in "abc" for _ in range(3000)], [i % 3000 // 6 for i in range(9000)]
    began = time.process_time()
    controls(labels, p_yes, method, images, splits=splits, replicates=2000)
    assert time.process_time() - began < 4


def test_repeated_text() -> None:
    assert not repeats_itself("A dog and a cat sit on a red bench near the old tree.")
    assert repeats_itself("a dog and a cat and " * 4)
    assert not repeats_itself("yes") and not repeats_itself("")
    # 10 words have 7 four-grams; one of them twice is 14 %, two are 29 %.
    assert not repeats_itself("a b c d x a b c d y")
    assert repeats_itself("a b c d e a b c d e")


def test_degenerate_answers_are_counted_and_warned_about() -> None:
    base = [Answer("A dog on a bench.")] * 20
    assert degenerate(base, base)["warnings"] == []
    method = [
        *[Answer("")] * 2,
        *[Answer("the the the the the the the", finish="length")] * 2,
        *[Answer("狗在长凳上")] * 2,
        *base[:14],
    ]
    found = degenerate(method, base)
    assert found["n_empty"] == 2
    shares = ("empty_share", "cut_share", "repeated_share", "non_ascii_share")
    assert [found[key] for key in shares] == [0.1] * 4
    assert found["same_as_base"] == 0.7
    assert found["warnings"] == [
        "10% of the answers empty (base 0%)",
        "10% of the answers cut by the token limit (base 0%)",
        "10% of the answers repeating themselves (base 0%)",
        "10% of the answers with characters beyond ASCII (base 0%)",
    ]
    # What the base does as well is no news.
    assert degenerate(list(method), method)["warnings"] == []
    assert len(degenerate(method, method)["warnings"]) == 3
    assert degenerate([Answer("\u201cNo\u201d \u2013 it isn\u2019t")], base[:1])["warnings"] == []


class YesNo:
    wants_p_yes = True

    def parse(self, sample: Sample, answer: Answer) -> tuple[str | None, bool]:
        verdict = answer.text.lower() or None
        return verdict, verdict == sample.target


def test_controls_join_the_scores() -> None:
    labels, p_yes, method = world(30, 10)
    samples = [Sample("t", "s", str(i), "i", i, "?", label) for i, label in enumerate(labels)]
    samples.append(Sample("t", "s", "free", "i", 99, "Describe.", ["dog"]))
    arms = {
        "base": [*(Answer("yes" if p > 0.5 else "no", p_yes=p) for p in p_yes), Answer("A dog.")],
        "m": [*(Answer(v, p_yes=float(v == "yes")) for v in method), Answer("A cat.")],
    }
    scored: dict[str, Any] = {"base": {"scores": 1}, "m": {"scores": 2}}
    add_controls(scored, YesNo(), samples, arms)
    assert scored["base"]["scores"] == 1 and scored["base"]["n_p_yes"] == 30
    assert scored["base"]["auc"]["s"]["value"] == pytest.approx(area(labels, p_yes))
    expected = shifted_accuracy(labels, p_yes, method.count("yes"))
    matched = scored["m"]["prior_matched"]["s"]["accuracy"]
    assert matched["base"]["value"] == pytest.approx(expected)
    assert scored["m"]["warnings"] == []
