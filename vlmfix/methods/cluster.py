"""Cluster and aggregate: k-means over the visual tokens of an image, one token per cluster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from vlmfix.base.contrast import noise_generator
from vlmfix.base.method import option
from vlmfix.base.pruning import Kept, TokenMethod, VisualTokens

__all__ = ["ClusterAggregation", "averages", "k_means", "medoids", "spread_seeds"]


def spread_seeds(points: torch.Tensor, count: int, generator: torch.Generator) -> list[int]:
    """Seeds of k-means++: the first is any point, each next one is sampled by squared distance.

    Arthur, Vassilvitskii: "k-means++: The Advantages of Careful Seeding", SODA 2007.

    Args:
        points: (n, D).
        count: how many are wanted.
        generator: on the CPU.

    Returns:
        Indices of points that all differ: `count`, or fewer where no more points differ.
    """
    seeds = [int(torch.randint(len(points), (1,), generator=generator))]
    nearest = _distances(points, points[seeds[0]])
    while len(seeds) < count and bool(nearest.any()):
        chances = nearest.cpu().double()
        seeds.append(int(torch.multinomial(chances, 1, generator=generator)))
        nearest = torch.minimum(nearest, _distances(points, points[seeds[-1]]))
    return seeds


def k_means(points: torch.Tensor, seeds: list[int], iterations: int) -> torch.Tensor:
    """Lloyd's iteration, until no point changes its cluster.

    A cluster that loses its last point gets the point farthest from its own centre.

    Args:
        points: (n, D).
        seeds: indices of k points that all differ.
        iterations: the most times that all centres move.

    Returns:
        (n,) int64, the cluster of each point: each of 0 ... k - 1 has some.
    """
    points = points - points.mean(0)  # keeps digits in the difference of squares below
    clusters = _assign(points, points[seeds])
    for _ in range(iterations):
        moved = _assign(points, averages(clusters, len(seeds)) @ points)
        if torch.equal(moved, clusters):
            break
        clusters = moved
    return clusters


def averages(
    clusters: torch.Tensor, count: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """(count, n) of the dtype: row k times the points is the mean of those in cluster k."""
    members = torch.nn.functional.one_hot(clusters, count).T.to(dtype)
    return members / members.sum(1, keepdim=True)


def medoids(points: torch.Tensor, clusters: torch.Tensor, count: int) -> torch.Tensor:
    """(count,) int64: of each cluster the point nearest to its mean, of equal ones the first."""
    # Two points are equally far from their mean, and in float64 they stay so: there half the sum
    # of two float32 numbers is exact. Else rounding, and with it the batch, chooses one of them.
    points = points.double()
    means = averages(clusters, count, points.dtype) @ points
    distances = _distances(points, means[clusters])
    own = clusters == torch.arange(count, device=clusters.device)[:, None]
    return torch.where(own, distances, torch.inf).argmin(1)


def _distances(points: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """(n,) squared distances, by differences: between equal points exactly 0."""
    return (points - others).square().sum(1)


def _assign(points: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """(n,) the nearest centre of each point; none is left without a point."""
    # |x - c|^2 without |x|^2, which is the same for all centres.
    clusters = (centres.square().sum(1) - 2 * points @ centres.T).argmin(1)
    sizes = torch.nn.functional.one_hot(clusters, len(centres)).sum(0)
    for empty in (sizes == 0).nonzero().flatten():
        distances = _distances(points, centres[clusters])
        farthest = torch.where(sizes[clusters] > 1, distances, -1.0).argmax()
        sizes[clusters[farthest]] -= 1
        clusters[farthest] = empty
    return clusters


@dataclass(frozen=True)
class ClusterAggregation(TokenMethod):
    """Group the visual tokens of an image by k-means; each group becomes the mean of its tokens.

    Omri, Shroff, Tambe: "Token Sequence Compression for Efficient Multimodal Computing", arXiv
    2504.17892. Tokens are clustered as the language model would get them, behind the projector. No
    training, no attention, nothing from the question.

    Reconstruction: neither the paper's settings nor code of the authors were available. Known are
    k-means, the mean of each cluster, and the place behind the projector. k-means++, 10 iterations
    and the order are choices made here: a token stands where the medoid of its cluster stood, the
    member nearest to the mean, since positions must be whole numbers.

    Why k-means is written out here: scikit-learn and scipy run on the CPU, where the features
    would have to go. scipy's (1.17) also leaves clusters without points, or several at the same
    place, where fewer tokens differ than are wanted. Here every cluster has a point, and an image
    with fewer distinct tokens than its budget gets fewer. Distances are float32 in every dtype of
    the model, those that choose a medoid float64. Every image has a random generator of its own,
    so that a prompt keeps the same tokens in any batch.
    """

    iterations: int = option(
        10, "most iterations of k-means; it stops when no token changes its cluster", 1, 1000
    )
    representative: Literal["mean", "medoid"] = option(
        "mean", "what replaces a cluster: mean of its tokens, or medoid, the token nearest to it"
    )
    seed: int = option(0, "random seed of k-means++", 0, 2**63, high_open=True)

    name: ClassVar[str] = "cluster"

    def keep(self, visual: VisualTokens, budget: int) -> Kept:
        points = visual.features.float()
        seeds = spread_seeds(points, budget, noise_generator(self.seed + visual.number))
        clusters = k_means(points, seeds, self.iterations)
        index, order = medoids(points, clusters, len(seeds)).sort()
        if self.representative == "medoid":
            return Kept(index)
        return Kept(index, averages(clusters, len(seeds))[order])
