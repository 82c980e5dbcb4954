"""Scores of benchmarks whose groups overlap: an item may count in several places at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlmfix.evals.scoring.metrics import Arm, Ratio, summarise

__all__ = ["by_draw", "summarise_places"]


def summarise_places(
    arms: Mapping[str, Arm],
    columns: Sequence[str],
    ratios: Sequence[Ratio],
    places: Mapping[str, Sequence[int]],
    clusters: Sequence[object],
    seed: int = 0,
    draws: Sequence[int] | None = None,
) -> dict[str, Any]:
    """`metrics.summarise` where the caller says which items make which place.

    Args:
        arms: as `summarise` takes them.
        columns: names of the counts.
        ratios: the metrics.
        places: place -> indices of its items; places without items are left out.
        clusters: the image of every item.
        seed: of the bootstrap.
        draws: the seed under which every item was answered; None: one answer to each.

    Returns:
        As `summarise` returns it, without "mean" and "pooled", which mean nothing here.
    """
    chosen = {place: list(items) for place, items in places.items() if len(items)}
    items = [i for indices in chosen.values() for i in indices]
    spread = {
        arm: Arm(
            scored.counts[np.array(items, dtype=np.intp)],
            scored.correct and [scored.correct[i] for i in items],
        )
        for arm, scored in arms.items()
    }
    result = summarise(
        spread,
        columns,
        ratios,
        splits=[place for place, indices in chosen.items() for _ in indices],
        clusters=[clusters[i] for i in items],
        seed=seed,
        draws=draws and [draws[i] for i in items],
    )
    for entry in result.values():
        for part in (entry["scores"], entry["counts"], entry.get("delta", {})):
            for place in ("mean", "pooled"):
                if place not in chosen:
                    part.pop(place, None)
        entry["flags"] = [flag for flag in entry["flags"] if flag.partition(".")[0] in chosen]
    return result


def by_draw(draws: Sequence[int] | None, n: int) -> list[list[int]]:
    """Indices of the n items, a list per sampling seed; one list without seeds or items."""
    if not draws:
        return [list(range(n))]
    return [[i for i in range(n) if draws[i] == draw] for draw in dict.fromkeys(draws)]
