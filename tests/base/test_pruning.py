"""What the base of pruning methods computes on plain numbers."""

from __future__ import annotations

import random

import pytest
import torch

from vlmfix.base.pruning import largest, share_budget

SOFT = [0.3183, 0.3481, 0.2035, 0.1301]
SHARP = [0.3809, 0.5448, 0.0637, 0.0106]


@pytest.mark.parametrize(
    ("budget", "weights", "expected"),
    [
        (32, SOFT, [10, 11, 7, 4]),
        (32, SHARP, [12, 16, 3, 1]),
        (52, SOFT, [16, 16, 12, 8]),
        (52, SHARP, [16, 16, 16, 4]),
        (64, SOFT, [16] * 4),
        (64, SHARP, [16] * 4),
        (32, [1.0] * 4, [8] * 4),
        (30, [1.0] * 4, [8, 8, 7, 7]),
        (4, SHARP, [1] * 4),
        (3, SHARP, [1, 2, 0, 0]),
        (10, [1.0, 0.0, 0.0, 0.0], [7, 1, 1, 1]),
        (20, [1.0, 0.0, 0.0, 0.0], [16, 2, 1, 1]),
    ],
)
def test_shares_of_four_tiles(budget: int, weights: list[float], expected: list[int]) -> None:
    assert share_budget([16] * 4, budget, weights) == expected


def test_shares_by_size() -> None:
    assert share_budget([30, 10, 20], 6) == [3, 1, 2]
    assert share_budget([16, 0, 8], 6) == [4, 0, 2]  # a tile that is all padding
    assert share_budget([5], 3) == [3]
    assert share_budget([1, 1, 1], 2) == [1, 1, 0]


def test_shares_always_sum_and_stay_within_bounds() -> None:
    draw = random.Random(0)
    for _ in range(3000):
        counts = [draw.choice([0, 1, 2, 16, 255]) for _ in range(draw.randint(1, 13))]
        weights = [draw.choice([0.0, 1e-9, 1.0, draw.random()]) for _ in counts]
        budget = draw.randint(0, sum(counts))
        shares = share_budget(counts, budget, weights)
        assert sum(shares) == budget
        floor = budget >= sum(count > 0 for count in counts)
        for share, count in zip(shares, counts, strict=True):
            assert min(floor, count) <= share <= count


def test_the_largest_and_ties() -> None:
    scores = torch.tensor([0.2, 0.7, 0.2, 0.9, 0.2, 0.7])
    assert [largest(scores, count).tolist() for count in range(1, 6)] == [
        [3],
        [1, 3],
        [1, 3, 5],
        [0, 1, 3, 5],
        [0, 1, 2, 3, 5],
    ]
    assert largest(torch.zeros(100), 40).tolist() == list(range(40))
