"""Metrics as ratios of sums, for every arm, split, mean and pool, with paired intervals.

A task turns each answer into a row of counts. Every metric is (weighted sum of counts) over
(weighted sum of counts): accuracy is correct / n, F1 is 2 tp / (2 tp + fp + fn). That one form lets
a bootstrap resample the counts of whole images once and recompute everything from the sums.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vlmfix.evals.scoring.stats import (
    REPLICATES,
    Floats,
    Resamples,
    holm,
    majority,
    mcnemar,
    percentile_interval,
    wilson,
)

__all__ = ["Arm", "Ratio", "counts_table", "estimate", "summarise"]


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
    values = (row.get(column, 0.0) for row in rows for column in columns)
    flat = np.fromiter(values, dtype=np.float64, count=len(rows) * len(columns))
    return flat.reshape(len(rows), len(columns))


def summarise(
    arms: Mapping[str, Arm],
    columns: Sequence[str],
    ratios: Sequence[Ratio],
    splits: Sequence[str],
    clusters: Sequence[object],
    replicates: int = REPLICATES,
    seed: int = 0,
    requests: Sequence[object] | None = None,
    draws: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Metrics of every arm, and differences to the first arm.

    Where answers were sampled with several seeds, each seed gives a value, and the figure is their
    mean. Its interval comes from resamples of images, and an image brings its answers of all seeds:
    one image more or less is what the data could have held, five seeds of one image are not five
    images. Tokens of different images are drawn independently under one seed, so this interval
    holds the noise of sampling, too, and seeds need no resampling of their own. It does not hold
    what a method draws once for many images, such as the noise of VCD.

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
        draws: the seed under which every item was answered; None: one answer to each.

    Returns:
        arm -> {"scores": place -> metric -> {"value", "ci", "ci_method"[, "wilson"]}, "counts":
        place -> count -> sum over all seeds, "flags": ["place.metric: ..."]} and, for all but the
        first arm, "delta": place -> {metric -> {"value", "ci"}, "mcnemar": {"better", "worse", "p",
        "p_holm"}}. A place is a split, and with several splits also "mean" (unweighted over splits)
        and "pooled". With several seeds each score and each difference also has "by_seed", its
        values, and "sd", their standard deviation (n - 1); "mcnemar" is {"p", "p_holm", "by_seed":
        [{"better", "worse", "p"}]}, where p is the `stats.majority` of those by seed. Answers of
        several seeds to one question are not independent, so McNemar cannot take them together.
    """
    names = list(dict.fromkeys(splits))
    split_of = np.array([names.index(split) for split in splits], dtype=np.intp)
    seeds = list(dict.fromkeys(draws or ())) or [0]
    seed_of = np.array([seeds.index(draw) for draw in draws or [0] * len(splits)], dtype=np.intp)
    cells = [
        [np.flatnonzero((seed_of == s) & (split_of == i)) for i in range(len(names))]
        for s in range(len(seeds))
    ]
    resamples = Resamples(clusters, replicates, seed)
    sums: dict[str, Floats] = {}
    drawn: dict[str, Floats] = {}
    for arm, scored in arms.items():
        sums[arm] = np.zeros((len(seeds), len(names), len(columns)))
        drawn[arm] = np.zeros((replicates, *sums[arm].shape))
        at = [(s, i) for s in range(len(seeds)) for i in range(len(names))]
        # One at a time: of a million answers, each is a large copy.
        parts = ((scored.counts[cells[s][i]], cells[s][i]) for s, i in at)
        for (s, i), redrawn in zip(at, resamples.sums_of(parts), strict=True):
            sums[arm][s, i] = scored.counts[cells[s][i]].sum(axis=0)
            drawn[arm][:, s, i] = redrawn

    base = next(iter(arms))
    result: dict[str, Any] = {}
    values = {arm: _places(sums[arm][None], columns, ratios, names) for arm in arms}
    replicas = {arm: _places(drawn[arm], columns, ratios, names) for arm in arms}
    for arm in arms:
        place_sums = {name: sums[arm][:, i] for i, name in enumerate(names)}
        if len(names) > 1:
            place_sums["pooled"] = sums[arm].sum(axis=1)
        entry: dict[str, Any] = {"scores": {}, "counts": {}, "flags": []}
        for place, metrics in values[arm].items():
            entry["scores"][place] = {
                ratio.name: _score(
                    ratio,
                    metrics[ratio.name][0],
                    replicas[arm][place][ratio.name],
                    resamples.n_clusters,
                    place_sums.get(place),
                    columns,
                )
                for ratio in ratios
            }
        for place, total in place_sums.items():
            counts = zip(columns, total.sum(axis=0), strict=True)
            entry["counts"][place] = {column: float(value) for column, value in counts}
            for ratio in ratios:
                undefined = sum(not ratio.defined(one, columns) for one in total)
                if undefined:
                    where = f" in {undefined} of {len(seeds)} seeds" if len(seeds) > 1 else ""
                    entry["flags"].append(f"{place}.{ratio.name}: zero denominator{where}")
        if arm != base:
            entry["delta"] = {
                place: {
                    ratio.name: estimate(
                        values[arm][place][ratio.name][0] - values[base][place][ratio.name][0],
                        replicas[arm][place][ratio.name] - replicas[base][place][ratio.name],
                        resamples.n_clusters,
                    )
                    for ratio in ratios
                }
                for place in values[arm]
            }
        result[arm] = entry
    if len(arms) == 1:
        return result
    places = {name: [row[i].tolist() for row in cells] for i, name in enumerate(names)}
    if len(names) > 1:
        # One answer seen in three splits is one piece of evidence, not three.
        keys = range(len(split_of)) if requests is None else requests
        places["pooled"] = []
        for s in range(len(seeds)):
            first = {keys[i]: i for i in reversed(np.flatnonzero(seed_of == s).tolist())}
            places["pooled"].append(sorted(first.values()))
    _add_mcnemar(result, arms, places)
    return result


def _places(
    sums: Floats, columns: Sequence[str], ratios: Sequence[Ratio], names: Sequence[str]
) -> dict[str, dict[str, Floats]]:
    """(R, seeds, splits, counts) -> place -> metric -> (R, seeds)."""
    places: dict[str, dict[str, Floats]] = {name: {} for name in names}
    if len(names) > 1:
        places |= {"mean": {}, "pooled": {}}
    for ratio in ratios:
        per_split = ratio.of(sums, columns)
        for i, name in enumerate(names):
            places[name][ratio.name] = per_split[..., i]
        if len(names) > 1:
            places["mean"][ratio.name] = per_split.mean(axis=-1)
            places["pooled"][ratio.name] = ratio.of(sums.sum(axis=-2), columns)
    return places


def estimate(values: Floats, replicas: Floats, n_clusters: int) -> dict[str, Any]:
    """Mean over seeds, its interval, and with several seeds what lies behind the mean.

    Args:
        values: (seeds,).
        replicas: (R, seeds).
        n_clusters: number of images.
    """
    # One image says nothing about the spread between images.
    interval = percentile_interval(replicas.mean(axis=1)) if n_clusters > 1 else None
    found: dict[str, Any] = {"value": float(values.mean()), "ci": interval and list(interval)}
    if len(values) > 1:
        found |= {"by_seed": values.tolist(), "sd": float(values.std(ddof=1))}
    return found


def _score(
    ratio: Ratio,
    values: Floats,
    replicas: Floats,
    n_clusters: int,
    total: Floats | None,
    columns: Sequence[str],
) -> dict[str, Any]:
    score = {**estimate(values, replicas, n_clusters), "ci_method": "bootstrap"}
    if ratio.proportion and total is not None:
        # Wilson's trials are independent: questions, not their repetitions under other seeds.
        mean = total.mean(axis=0)
        top, bottom = (float(_linear(mean, columns, form)) for form in (ratio.top, ratio.bottom))
        score["wilson"] = list(wilson(top, bottom))
        if bottom > 0 and (n_clusters < 2 or top in (0.0, bottom)):
            # Resampling all-right or all-wrong answers gives an interval of width zero.
            score["ci"], score["ci_method"] = score["wilson"], "wilson"
    return score


def _add_mcnemar(
    result: dict[str, Any], arms: Mapping[str, Arm], places: Mapping[str, Sequence[Sequence[int]]]
) -> None:
    """Test every method against the base; `places`: place -> per seed, the items to compare."""
    base, *methods = arms
    base_correct = arms[base].correct
    if base_correct is None or not methods:
        return
    for place, by_seed in places.items():
        found = []
        for method in methods:
            correct = arms[method].correct
            assert correct is not None
            found.append(
                [
                    mcnemar([base_correct[i] for i in items], [correct[i] for i in items])
                    for items in by_seed
                ]
            )
        p_values = [majority([test.p for test in tests]) for tests in found]
        for method, tests, p, p_holm in zip(methods, found, p_values, holm(p_values), strict=True):
            one = asdict(tests[0]) if len(tests) == 1 else {"p": p}
            more = {} if len(tests) == 1 else {"by_seed": [asdict(test) for test in tests]}
            result[method]["delta"][place]["mcnemar"] = {**one, "p_holm": p_holm, **more}
