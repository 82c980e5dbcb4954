"""Controls that go with every comparison: is a gain more than a shift, and is it text at all?

A method that only says "yes" more or less often moves accuracy and F1 without seeing better. Two
controls on the recorded probability of yes tell that apart: the area under the ROC curve, which no
shift changes, and the *prior-matched baseline*, the base with its yes-logit shifted by a constant
until it says yes as often as the method. What the method is ahead of that is the honest part of its
gain ("The Mirage of Performance Gains", arXiv 2504.10020, shows how little it can be).

A method that empties captions wins CHAIR, so answers are also counted that are hardly answers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmfix.evals.scoring.metrics import estimate
from vlmfix.evals.scoring.stats import REPLICATES, Floats, Resamples
from vlmfix.evals.tasks import Answer, Sample, Task

__all__ = ["add_controls", "degenerate", "repeats_itself", "yes_no_controls"]

#: Share of a text's word 4-grams that it had before, from which on it repeats itself.
REPEATED = 0.2

#: An arm is warned about where a share exceeds the base's by more than this.
TOLERATED = 0.05

# Typographic dashes and quotes are no sign of another script or of broken decoding.
_FOREIGN = re.compile("[^\x00-\x7f\u2010-\u2027]")

_WARNED = {
    "empty_share": "empty",
    "cut_share": "cut by the token limit",
    "repeated_share": "repeating themselves",
    "non_ascii_share": "with characters beyond ASCII",
}


def add_controls(
    scored: dict[str, Any],
    task: Task,
    samples: Sequence[Sample],
    arms: Mapping[str, Sequence[Answer]],
    draws: Sequence[int] | None = None,
    seed: int = 0,
) -> None:
    """Write the controls next to the scores of every arm.

    Args:
        scored: what `task.score` gave for the same samples and arms; arm -> entry, added to.
        task: reads the answers.
        samples: the items.
        arms: arm -> answers, the base first.
        draws: the seed of every answer; None: greedy.
        seed: of the bootstrap.
    """
    base = next(iter(arms.values()))
    for arm, answers in arms.items():
        scored[arm] |= degenerate(answers, base)
    if not task.wants_p_yes or all(a.p_yes is None for one in arms.values() for a in one):
        return
    asked = [i for i, sample in enumerate(samples) if sample.target in ("yes", "no")]
    chosen = [samples[i] for i in asked]
    given = {arm: [answers[i] for i in asked] for arm, answers in arms.items()}
    found = yes_no_controls(
        labels=[sample.target for sample in chosen],
        p_yes={arm: [answer.p_yes for answer in answers] for arm, answers in given.items()},
        verdicts={
            arm: [task.parse(*pair)[0] for pair in zip(chosen, answers, strict=True)]
            for arm, answers in given.items()
        },
        splits=[sample.split for sample in chosen],
        clusters=[sample.image_id for sample in chosen],
        draws=None if draws is None else [draws[i] for i in asked],
        seed=seed,
    )
    for arm, entry in found.items():
        scored[arm] |= entry


def repeats_itself(text: str) -> bool:
    """Whether more than 20 % of the text's word 4-grams stood in it before."""
    words = text.split()
    number = max(0, len(words) - 3)
    # Grams that begin with different words differ; many texts need no more to be told.
    if number - len(set(words[:number])) <= REPEATED * number:
        return False
    grams = set(zip(words, words[1:], words[2:], words[3:], strict=False))
    return number - len(grams) > REPEATED * number


def degenerate(answers: Sequence[Answer], base: Sequence[Answer]) -> dict[str, Any]:
    """How many answers are hardly answers, next to the base's.

    Args:
        answers: of one arm.
        base: of the base, in the same order; the same object for the base itself.

    Returns:
        "n_empty", and the shares from 0 to 1 "empty_share", "cut_share" (by the token limit),
        "repeated_share" (`repeats_itself`), "non_ascii_share" and "same_as_base"; "warnings": where
        one of the first four exceeds the base's by more than 5 points (5 % for the base itself,
        whose cut answers are no news).
    """
    shares = _shares(answers)
    usual = dict.fromkeys(shares, 0.0) | {"cut_share": 1.0} if answers is base else _shares(base)
    same = sum(a.text == b.text for a, b in zip(answers, base, strict=True))
    warnings = []
    for key, words in _WARNED.items():
        if shares[key] - usual[key] > TOLERATED:
            beside = "" if answers is base else f" (base {usual[key]:.0%})"
            warnings.append(f"{shares[key]:.0%} of the answers {words}{beside}")
    return {
        "n_empty": sum(not answer.text.strip() for answer in answers),
        **shares,
        "same_as_base": same / max(1, len(answers)),
        "warnings": warnings,
    }


def _shares(answers: Sequence[Answer]) -> dict[str, float]:
    n = max(1, len(answers))
    return {
        "empty_share": sum(not answer.text.strip() for answer in answers) / n,
        "cut_share": sum(answer.finish == "length" for answer in answers) / n,
        "repeated_share": sum(repeats_itself(answer.text) for answer in answers) / n,
        "non_ascii_share": sum(
            not answer.text.isascii() and bool(_FOREIGN.search(answer.text)) for answer in answers
        )
        / n,
    }


def yes_no_controls(
    labels: Sequence[str],
    p_yes: Mapping[str, Sequence[float | None]],
    verdicts: Mapping[str, Sequence[str | None]],
    splits: Sequence[str],
    clusters: Sequence[object],
    draws: Sequence[int] | None = None,
    seed: int = 0,
    replicates: int = REPLICATES,
) -> dict[str, dict[str, Any]]:
    """ROC-AUC of p_yes for every arm, and the prior-matched baseline for every method.

    The shift is fitted again in every split, in the pool, under every seed and in every resample,
    so the intervals hold its uncertainty, too. Items count that have a p_yes under every arm that
    has any; arms without any have no controls.

    Args:
        labels: the truth of every item, "yes" or "no".
        p_yes: arm -> probability of yes of every item, from 0 to 1; the base first.
        verdicts: arm -> how its answers were read: "yes", "no", or anything else.
        splits: the split of every item.
        clusters: the image of every item.
        draws: the seed of every answer; None: greedy.
        seed: of the bootstrap.
        replicates: bootstrap resamples.

    Returns:
        arm -> {"auc": place -> {"value", "ci"}, "n_p_yes": items, "p_yes_agrees": share of answers
        that read as p_yes > 0.5 says} and, for methods, "auc_delta": place -> {"value", "ci"} and
        "prior_matched": place -> {"shift": added to the base's yes-logit, None if none is finite or
        there are several seeds, "accuracy" and "f1": {"base", "method", "delta"}}, where "base" is
        the shifted base. Places are those of `metrics.summarise`. A place whose items have one
        label only is left out.
    """
    base = next(iter(p_yes))
    known = [arm for arm in p_yes if any(p is not None for p in p_yes[arm])]
    if not known:
        return {}
    kept = [i for i in range(len(labels)) if all(p_yes[arm][i] is not None for arm in known)]
    resamples = Resamples([clusters[i] for i in kept], replicates, seed)
    truth = np.array([labels[i] == "yes" for i in kept], dtype=bool)
    scores = {arm: np.array([p_yes[arm][i] for i in kept], dtype=np.float64) for arm in known}
    said_yes = {arm: np.array([verdicts[arm][i] == "yes" for i in kept]) for arm in known}
    right = {
        arm: np.array([verdicts[arm][i] == labels[i] for i in kept], dtype=bool) for arm in known
    }
    places = _places(
        [splits[i] for i in kept], [draws[i] for i in kept] if draws is not None else None, truth
    )
    found: dict[str, dict[str, Any]] = {}
    areas: dict[str, dict[str, Floats]] = {}
    for arm in known:
        areas[arm] = {
            # (1 + R, seeds); row 0: the items as they are.
            place: np.stack([_area(at, truth, scores[arm], resamples) for at in cells], axis=1)
            for place, cells in places.items()
        }
        agrees = (scores[arm] > 0.5) == said_yes[arm]
        found[arm] = {
            "n_p_yes": len(kept),
            "p_yes_agrees": float(agrees.mean()) if kept else 0.0,
            "auc": _estimates(_with_mean(areas[arm], places), resamples),
        }
    for arm in known:
        if arm == base or base not in known:
            continue
        change = {place: areas[arm][place] - areas[base][place] for place in places}
        found[arm]["auc_delta"] = _estimates(_with_mean(change, places), resamples)
        found[arm]["prior_matched"] = _prior_matched(
            places, truth, scores[base], said_yes[arm], right[arm], resamples
        )
    return found


_Places = dict[str, list[NDArray[np.intp]]]


def _places(
    splits: Sequence[str], draws: Sequence[int] | None, truth: NDArray[np.bool_]
) -> _Places:
    """Place -> per seed, its items."""
    names, seeds = np.array(splits), np.array(draws if draws is not None else [0] * len(splits))
    each = list(dict.fromkeys(seeds.tolist()))
    found = {
        name: [np.flatnonzero((names == name) & (seeds == draw)) for draw in each]
        for name in dict.fromkeys(splits)
    }
    if len(found) > 1:
        found["pooled"] = [np.flatnonzero(seeds == draw) for draw in each]
    return {
        place: cells
        for place, cells in found.items()
        if all(truth[at].any() and not truth[at].all() for at in cells)
    }


def _with_mean(values: dict[str, Floats], places: _Places) -> dict[str, Floats]:
    """With the unweighted mean over splits, where there are several."""
    splits = [place for place in places if place != "pooled"]
    if len(splits) < 2:
        return values
    return {**values, "mean": np.mean([values[place] for place in splits], axis=0)}


def _parts(resamples: Resamples) -> Iterator[Floats]:
    """Weights of the clusters (C, r): first of the items as they are (r = 1), then resamples."""
    yield np.ones((resamples.n_clusters, 1))
    for block in resamples.blocks():
        yield block.T.astype(np.float64, order="C")


def _area(
    at: NDArray[np.intp], truth: NDArray[np.bool_], p_yes: Floats, resamples: Resamples
) -> Floats:
    """ROC-AUC of the items `at`: the share of (yes, no) pairs in order, ties half: (1 + R,).

    0.5 in resamples that hold one of the labels only.
    """
    yes, no = at[truth[at]], at[~truth[at]]
    no = no[np.argsort(-p_yes[no])]
    above = np.searchsorted(-p_yes[no], -p_yes[yes], side="left")
    not_below = np.searchsorted(-p_yes[no], -p_yes[yes], side="right")
    areas = []
    for weights in _parts(resamples):
        of_yes = weights[resamples.cluster_of[yes]]
        summed = _running(weights[resamples.cluster_of[no]])
        beaten = summed[-1] - (summed[above] + summed[not_below]) / 2
        won = np.einsum("ir,ir->r", of_yes, beaten)
        pairs = of_yes.sum(axis=0) * summed[-1]
        areas.append(np.divide(won, pairs, out=np.full_like(won, 0.5), where=pairs > 0))
    return np.concatenate(areas)


def _running(weights: Floats) -> Floats:
    """(n, r) -> (n + 1, r): sums of the first 0, 1, ..., n rows."""
    return np.concatenate([np.zeros((1, weights.shape[1])), weights.cumsum(axis=0)])


def _estimates(values: Mapping[str, Floats], resamples: Resamples) -> dict[str, Any]:
    return {
        place: estimate(rows[0], rows[1:], resamples.n_clusters) for place, rows in values.items()
    }


def _prior_matched(
    places: _Places,
    truth: NDArray[np.bool_],
    base_p_yes: Floats,
    said_yes: NDArray[np.bool_],
    right: NDArray[np.bool_],
    resamples: Resamples,
) -> dict[str, Any]:
    pairs = {
        # (1 + R, seeds, 2, 2): shifted base and method, accuracy and F1.
        place: np.stack(
            [_pair(at, truth, base_p_yes, said_yes, right, resamples) for at in cells], axis=1
        )
        for place, cells in places.items()
    }
    found: dict[str, Any] = {}
    for place, values in _with_mean(pairs, places).items():
        cells = places.get(place, ())
        only = cells[0] if len(cells) == 1 else None
        found[place] = {
            "shift": None
            if only is None
            else _shift(base_p_yes[only], int(np.count_nonzero(said_yes[only])))
        }
        for i, metric in enumerate(("accuracy", "f1")):
            base, method = values[..., 0, i], values[..., 1, i]
            parts = {"base": base, "method": method, "delta": method - base}
            found[place][metric] = _estimates(parts, resamples)
    return found


def _pair(
    at: NDArray[np.intp],
    truth: NDArray[np.bool_],
    base_p_yes: Floats,
    said_yes: NDArray[np.bool_],
    right: NDArray[np.bool_],
    resamples: Resamples,
) -> Floats:
    """The base shifted to the method's number of yes, and the method: (1 + R, 2, 2).

    Of items with the p_yes at the threshold as large a share is called yes as is needed: no shift
    can tell them apart.
    """
    order = at[np.argsort(-base_p_yes[at], kind="stable")]
    falling = -base_p_yes[order]
    first = np.searchsorted(falling, falling, side="left")
    after = np.searchsorted(falling, falling, side="right")
    pairs = []
    for weights in _parts(resamples):
        drawn = weights[resamples.cluster_of[order]]
        n, n_yes = drawn.sum(axis=0), truth[order] @ drawn
        number, true_yes = said_yes[order] @ drawn, (said_yes & truth)[order] @ drawn
        summed, summed_yes = _running(drawn), _running(drawn * truth[order, None])
        last = np.minimum((summed[1:] < number).sum(axis=0), len(order) - 1)
        low, high, each = first[last], after[last], np.arange(len(n))
        before, tied = summed[low, each], summed[high, each] - summed[low, each]
        share = np.divide(number - before, tied, out=np.zeros_like(n), where=tied > 0)
        yes_before, yes_after = summed_yes[low, each], summed_yes[high, each]
        shifted_yes = yes_before + share * (yes_after - yes_before)
        shifted = _accuracy_and_f1(shifted_yes, number, n_yes, n)
        method = _accuracy_and_f1(true_yes, number, n_yes, n)
        # An unparsed answer is no yes and still wrong where the truth is no.
        method[:, 0] = np.divide(right[order] @ drawn, n, out=np.zeros_like(n), where=n > 0)
        pairs.append(np.stack([shifted, method], axis=1))
    return np.concatenate(pairs)


def _accuracy_and_f1(true_yes: Floats, said_yes: Floats, n_yes: Floats, n: Floats) -> Floats:
    """(r,) counts -> (r, 2); 0 where undefined. The positive class of F1 is yes, as in POPE."""
    correct = true_yes + (n - n_yes) - (said_yes - true_yes)
    accuracy = np.divide(correct, n, out=np.zeros_like(n), where=n > 0)
    named = said_yes + n_yes
    f1 = np.divide(2 * true_yes, named, out=np.zeros_like(n), where=named > 0)
    return np.stack([accuracy, f1], axis=1)


def _shift(p_yes: Floats, number: int) -> float | None:
    """What to add to the yes-logit so that `number` items say yes; None if nothing finite does."""
    if not 0 < number < len(p_yes):
        return None
    lowest_yes, highest_no = np.sort(p_yes)[::-1][[number - 1, number]]
    with np.errstate(divide="ignore"):
        logits = [float(np.log(p) - np.log1p(-p)) for p in (lowest_yes, highest_no)]
    middle = -sum(logits) / 2
    return middle if np.isfinite(middle) else None
