"""Differences to the base as a forest plot: one line per method and split, with its interval."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["forest_plot"]


def forest_plot(results: Mapping[str, Any], path: str | Path, metric: str = "accuracy") -> None:
    """Draw what `vlmfix.evals.evaluate` found on POPE.

    Args:
        results: its results.
        path: where the picture goes; the ending says the format.
        metric: a metric of POPE, in percentage points.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    arms = results["tasks"]["pope"]["arms"]
    lines = [
        (arm, place, scores[metric])
        for arm, scored in arms.items()
        for place, scores in scored.get("delta", {}).items()
    ]
    figure = Figure(figsize=(6.4, 1.1 + 0.3 * len(lines)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.axvline(0, color="0.5", linewidth=0.8)
    for at, (_, place, delta) in enumerate(lines):
        value = 100 * delta["value"]
        low, high = (100 * bound for bound in delta["ci"] or (delta["value"],) * 2)
        colour, mark = ("black", "D") if place == "pooled" else ("#0072B2", "o")
        axes.plot([low, high], [at, at], color=colour, linewidth=1.4)
        axes.plot([value], [at], mark, color=colour, markersize=5)
    axes.set_yticks(range(len(lines)), [f"{arm}, {place}" for arm, place, _ in lines], fontsize=8)
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.set_xlabel(f"{metric}, points above (right) or below the base; 95 % intervals", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", linewidth=0.3)
    figure.savefig(path)
