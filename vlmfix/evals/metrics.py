"""Metrics as ratios of sums, for every arm, split, mean and pool, with paired intervals.

A task turns each answer into a row of counts. Every metric is (weighted sum of counts) over
(weighted sum of counts): accuracy is correct / n, F1 is 2 tp / (2 tp + fp + fn). That one form lets
a bootstrap resample the counts of whole images once and recompute everything from the sums.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlmfix.evals.stats import (
    REPLICATES,
    Floats,
    Resamples,
    holm,
    mcnemar,
    percentile_interval,
    wilson,
)

__all__ = ["Arm", "Ratio", "counts_table", "summarise"]


@dataclass(frozen=True)
class Ratio:
    """A metric: one linear form of the counts over another.

    Args:
        name: the key in results.
        top: weight of each count in the numerator.
        bottom: weight of each count in the denominator.
        proportion: both are counts of the same trials, so Wilson's interval applies too.
        defined_if: counts whose sum must be positive; the denominator where empty.
    """

    name: str
    top: Mapping[str, float]
    bottom: Mapping[str, float]
    proportion: bool = False
    defined_if: tuple[str, ...] = ()

    def of(self, sums: Floats, columns: Sequence[str]) -> Floats:
        """(..., counts) -> (...); 0.0 where the denominator is 0."""
        top, bottom = (_linear(sums, columns, form) for form in (self.top, self.bottom))
        return np.divide(top, bottom, out=np.zeros_like(top), where=bottom != 0)

    def defined(self, sums: Floats, columns: Sequence[str]) -> bool:
        """Whether the textbook formula divides by something other than zero; sums: (counts,)."""
        form = dict.fromkeys(self.defined_if, 1.0) or self.bottom
        return bool(_linear(sums, columns, form) > 0)


def _linear(sums: Floats, columns: Sequence[str], form: Mapping[str, float]) -> Floats:
    weights = np.array([form.get(column, 0.0) for column in columns])
    return np.asarray(sums @ weights)


@dataclass(frozen=True)
class Arm:
    """The scored answers of one arm.

    Args:
        counts: (items, counts), the items in the same order for all arms.
        correct: one flag per item for McNemar, or None where the item has no right and wrong.
    """

    counts: Floats
    correct: Sequence[bool] | None = None


def counts_table(rows: Sequence[Mapping[str, float]], columns: Sequence[str]) -> Floats:
    """Rows of named counts as a matrix (items, counts); a missing name is 0."""
    return np.array([[row.get(c, 0.0) for c in columns] for row in rows], dtype=np.float64).reshape(
        len(rows), len(columns)
    )


def summarise(
    arms: Mapping[str, Arm],
    columns: Sequence[str],
    ratios: Sequence[Ratio],
    splits: Sequence[str],
    clusters: Sequence[object],
    replicates: int = REPLICATES,
    seed: int = 0,
    requests: Sequence[object] | None = None,
) -> dict[str, Any]:
    """Metrics of every arm, and differences to the first arm.

    Args:
        arms: name -> scored answers; the first is the base that the others are compared with.
        columns: names of the counts.
        ratios: the metrics.
        splits: the split of every item.
        clusters: the image of every item.
        replicates: bootstrap resamples.
        seed: of the bootstrap.
        requests: what every item asked; items of different splits that asked the same have one
            answer between them, and McNemar over the pool counts it once. None: all differ.

    Returns:
        arm -> {"scores": place -> metric -> {"value", "ci", "ci_method"[, "wilson"]}, "counts":
        place -> count -> sum, "flags": ["place.metric: ..."]} and, for all but the first arm,
        "delta": place -> {metric -> {"value", "ci"}, "mcnemar": {...}}. A place is a split, and
        with several splits also "mean" (unweighted over splits) and "pooled".
    """
    names = list(dict.fromkeys(splits))
    split_of = np.array([names.index(split) for split in splits], dtype=np.intp)
    resamples = Resamples(clusters, replicates, seed)
    sums: dict[str, Floats] = {}
    drawn: dict[str, Floats] = {}
    for arm, scored in arms.items():
        spread = np.zeros((len(splits), len(names), len(columns)))
        spread[np.arange(len(splits)), split_of] = scored.counts
        sums[arm] = spread.sum(axis=0)
        drawn[arm] = resamples.sums(spread)

    base = next(iter(arms))
    result: dict[str, Any] = {}
    values = {arm: _places(sums[arm][None], columns, ratios, names) for arm in arms}
    replicas = {arm: _places(drawn[arm], columns, ratios, names) for arm in arms}
    for arm in arms:
        place_sums = {name: sums[arm][i] for i, name in enumerate(names)}
        if len(names) > 1:
            place_sums["pooled"] = sums[arm].sum(axis=0)
        entry: dict[str, Any] = {"scores": {}, "counts": {}, "flags": []}
        for place, metrics in values[arm].items():
            entry["scores"][place] = {
                ratio.name: _score(
                    ratio,
                    float(metrics[ratio.name][0]),
                    replicas[arm][place][ratio.name],
                    resamples.n_clusters,
                    place_sums.get(place),
                    columns,
                )
                for ratio in ratios
            }
        for place, total in place_sums.items():
            entry["counts"][place] = {c: float(v) for c, v in zip(columns, total, strict=True)}
            entry["flags"] += [
                f"{place}.{ratio.name}: zero denominator"
                for ratio in ratios
                if not ratio.defined(total, columns)
            ]
        if arm != base:
            entry["delta"] = {
                place: {
                    ratio.name: {
                        "value": float(values[arm][place][ratio.name][0])
                        - float(values[base][place][ratio.name][0]),
                        "ci": _interval(
                            replicas[arm][place][ratio.name] - replicas[base][place][ratio.name],
                            resamples.n_clusters,
                        ),
                    }
                    for ratio in ratios
                }
                for place in values[arm]
            }
        result[arm] = entry
    _add_mcnemar(result, arms, names, split_of, requests)
    return result


def _places(
    sums: Floats, columns: Sequence[str], ratios: Sequence[Ratio], names: Sequence[str]
) -> dict[str, dict[str, Floats]]:
    """(R, splits, counts) -> place -> metric -> (R,)."""
    places: dict[str, dict[str, Floats]] = {name: {} for name in names}
    if len(names) > 1:
        places |= {"mean": {}, "pooled": {}}
    for ratio in ratios:
        per_split = ratio.of(sums, columns)
        for i, name in enumerate(names):
            places[name][ratio.name] = per_split[:, i]
        if len(names) > 1:
            places["mean"][ratio.name] = per_split.mean(axis=1)
            places["pooled"][ratio.name] = ratio.of(sums.sum(axis=1), columns)
    return places


def _interval(replicas: Floats, n_clusters: int) -> list[float] | None:
    # One image says nothing about the spread between images.
    return list(percentile_interval(replicas)) if n_clusters > 1 else None


def _score(
    ratio: Ratio,
    value: float,
    replicas: Floats,
    n_clusters: int,
    total: Floats | None,
    columns: Sequence[str],
) -> dict[str, Any]:
    score: dict[str, Any] = {
        "value": value,
        "ci": _interval(replicas, n_clusters),
        "ci_method": "bootstrap",
    }
    if ratio.proportion and total is not None:
        top, bottom = (float(_linear(total, columns, form)) for form in (ratio.top, ratio.bottom))
        score["wilson"] = list(wilson(top, bottom))
        if bottom > 0 and (n_clusters < 2 or top in (0.0, bottom)):
            # Resampling all-right or all-wrong answers gives an interval of width zero.
            score["ci"], score["ci_method"] = score["wilson"], "wilson"
    return score


def _add_mcnemar(
    result: dict[str, Any],
    arms: Mapping[str, Arm],
    names: Sequence[str],
    split_of: Any,
    requests: Sequence[object] | None,
) -> None:
    base, *methods = arms
    base_correct = arms[base].correct
    if base_correct is None or not methods:
        return
    places = {name: np.flatnonzero(split_of == i).tolist() for i, name in enumerate(names)}
    if len(names) > 1:
        # One answer seen in three splits is one piece of evidence, not three.
        keys = range(len(split_of)) if requests is None else requests
        first = {key: i for i, key in reversed(list(enumerate(keys)))}
        places["pooled"] = sorted(first.values())
    for place, items in places.items():
        tests = []
        for method in methods:
            correct = arms[method].correct
            assert correct is not None
            tests.append(mcnemar([base_correct[i] for i in items], [correct[i] for i in items]))
        for method, test, p_holm in zip(methods, tests, holm([t.p for t in tests]), strict=True):
            result[method]["delta"][place]["mcnemar"] = {
                "better": test.better,
                "worse": test.worse,
                "p": test.p,
                "p_holm": p_holm,
            }
