"""Intervals and tests: Wilson, the image-clustered bootstrap, exact McNemar, Rüger, Holm.

Sources: Wilson 1927 (JASA 22); Efron and Tibshirani 1993, chapters 8 and 13 (percentile bootstrap,
resampling whole clusters); McNemar 1947 in its exact binomial form; Rüger 1978 (Metrika 25);
Holm 1979.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "McNemar",
    "Resamples",
    "holm",
    "majority",
    "mcnemar",
    "percentile_interval",
    "wilson",
]

Floats = NDArray[np.float64]

REPLICATES = 2000
LEVEL = 0.95


def wilson(successes: float, trials: float, level: float = LEVEL) -> tuple[float, float]:
    """Wilson score interval of a proportion; (0, 1) without trials."""
    if trials <= 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + level / 2)
    share = successes / trials
    centre = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    # At the edges the formula gives 0 and 1 up to rounding.
    low = (centre - spread) / scale if successes > 0 else 0.0
    high = (centre + spread) / scale if successes < trials else 1.0
    return low, high


@dataclass(frozen=True)
class McNemar:
    """Discordant pairs and the exact two-sided p value.

    Args:
        better: items that only the method gets right.
        worse: items that only the base gets right.
        p: two-sided exact binomial p value; 1.0 without discordant pairs.
    """

    better: int
    worse: int
    p: float


def mcnemar(base: Sequence[bool], method: Sequence[bool]) -> McNemar:
    """Exact McNemar test of two paired lists of right/wrong.

    Args:
        base: one flag per item, in the order of `method`.
        method: one flag per item.

    Raises:
        ValueError: the lists differ in length.
    """
    pairs = list(zip(base, method, strict=True))
    better = sum(1 for b, m in pairs if m and not b)
    worse = sum(1 for b, m in pairs if b and not m)
    total = better + worse
    tail, ways = 0, 1
    for j in range(min(better, worse) + 1):
        tail += ways
        ways = ways * (total - j) // (j + 1)
    # Whole numbers until the last division: 2 ** total overflows a float beyond 1023 pairs.
    return McNemar(better, worse, min(1.0, 2 * tail / 2**total) if total else 1.0)


def majority(p_values: Sequence[float]) -> float:
    """One p value from several tests of one hypothesis, under any dependence (Rüger 1978).

    Under the hypothesis n tests expect at most n t p values up to t, so k of them are that small
    with probability n t / k at most (Markov). Here k is more than half of n: 3 of 5.

    Args:
        p_values: one or more.
    """
    n = len(p_values)
    k = n // 2 + 1
    return min(1.0, n / k * sorted(p_values)[k - 1])


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p values, in the order given."""
    adjusted = [1.0] * len(p_values)
    running = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted


class Resamples:
    """Bootstrap resamples of whole clusters, shared by everything that is compared.

    All arms, splits and metrics see the same resamples, so differences between arms are paired.

    Args:
        clusters: (items,) the cluster of every item: its image.
        replicates: number of resamples, R.
        seed: of the generator that draws them.

    Attributes:
        n_clusters: number of clusters, C.
        cluster_of: (items,) the number of every item's cluster.
        replicates: R.
    """

    def __init__(
        self, clusters: Sequence[object], replicates: int = REPLICATES, seed: int = 0
    ) -> None:
        number: dict[object, int] = {}
        self.cluster_of = np.array(
            [number.setdefault(cluster, len(number)) for cluster in clusters], dtype=np.intp
        )
        self.n_clusters, self.replicates, self._seed = len(number), replicates, seed

    def blocks(self) -> Iterator[NDArray[np.uint8]]:
        """How often each resample holds each cluster, some resamples at a time: (r, C)."""
        shape = self.n_clusters, self.replicates, self._seed
        if self.n_clusters * self.replicates > _KEPT:
            return _blocks(*shape)
        kept = _weights(*shape)
        return (kept[start : start + _PART] for start in range(0, len(kept), _PART))

    def sums(self, counts: Floats, items: NDArray[np.intp] | None = None) -> Floats:
        """Sums of item counts in every resample: (items, ...) -> (R, ...).

        Args:
            counts: of all items, or of those that `items` lists.
            items: (n,) indices; None: all.
        """
        return self.sums_of([(counts, items)])[0]

    def sums_of(self, parts: Iterable[tuple[Floats, NDArray[np.intp] | None]]) -> list[Floats]:
        """`sums` of several (counts, items) in one pass over the resamples."""
        shapes: list[tuple[int, ...]] = []
        columns = [np.zeros((self.n_clusters, 0))]
        for counts, items in parts:
            cluster_of = self.cluster_of if items is None else self.cluster_of[items]
            flat = counts.reshape(len(counts), math.prod(counts.shape[1:]))
            of_part = np.zeros((self.n_clusters, flat.shape[1]))
            for column in range(flat.shape[1]):
                of_part[:, column] = np.bincount(cluster_of, flat[:, column], self.n_clusters)
            columns.append(of_part)
            shapes.append(counts.shape[1:])
        per_cluster = np.concatenate(columns, axis=1)
        found = np.zeros((self.replicates, per_cluster.shape[1]))
        start = 0
        for block in self.blocks():
            into = found[start : start + len(block)]
            # Tiles stay in the cache while small whole numbers become floats.
            for at in range(0, self.n_clusters, _TILE):
                tile = slice(at, at + _TILE)
                into += block[:, tile].astype(np.float64) @ per_cluster[tile]
            start += len(block)
        ends = np.cumsum([math.prod(shape) for shape in shapes], dtype=np.intp)
        pieces = np.split(found, ends[:-1], axis=1) if shapes else []
        return [
            piece.reshape(self.replicates, *shape)
            for piece, shape in zip(pieces, shapes, strict=True)
        ]


#: Resamples at a time: more would leave the cache.
_PART = 32
#: Clusters at a time.
_TILE = 4096
#: Most bytes of weights that are kept for the next comparison; beyond it they are drawn again.
_KEPT = 500_000_000


def _blocks(n: int, replicates: int, seed: int) -> Iterator[NDArray[np.uint8]]:
    """Draw n clusters of n, `replicates` times: (r, n), rows sum to n.

    A cluster comes once on average, so a byte holds how often: more than 255 of more than 255
    clusters has a probability of 1e-500.
    """
    generator = np.random.default_rng(seed)
    for start in range(0, replicates, _PART):
        block = np.zeros((min(_PART, replicates - start), n), dtype=np.uint8)
        for row in block if n else ():
            row[:] = np.bincount(generator.integers(n, size=n), minlength=n)
        yield block


@lru_cache(maxsize=1)
def _weights(n: int, replicates: int, seed: int) -> NDArray[np.uint8]:
    """All blocks; the comparisons of a task draw the same."""
    kept = np.zeros((replicates, n), dtype=np.uint8)
    for start, block in zip(range(0, replicates, _PART), _blocks(n, replicates, seed), strict=True):
        kept[start : start + len(block)] = block
    kept.setflags(write=False)
    return kept


def percentile_interval(replicates: Floats, level: float = LEVEL) -> tuple[float, float]:
    """Percentile interval of one statistic's replicates: (R,) -> (low, high)."""
    low, high = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
