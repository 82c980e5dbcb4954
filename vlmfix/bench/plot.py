"""A picture of a benchmark: every arm over plain, with the spread of its rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmfix.bench.run import PERCENTILES
from vlmfix.errors import BadInput
from vlmfix.evals.reporting.head_plots import require_matplotlib

__all__ = ["draw", "require_matplotlib"]

_PANELS = (
    ("tokens_per_second_over_plain", "decode tokens/s over plain (more is better)", (0.9, 1.0)),
    ("first_token_over_plain", "time to first token over plain (less is better)", (1.0,)),
)
# For arms that drop visual tokens: at 64 of 576 tokens, at least twice the speed is expected.
_PREFILL = (
    "prefill_over_plain",
    "language model's prefill over plain (less is better)",
    (0.5, 1.0),
)
_EQUAL = "tokens_per_second_over_two_products_p50"
_ROW = 0.28  # height of a row in inches


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw median, 20th and 80th percentile of the ratios, one line per arm, to an image file.

    A hollow mark is the median of tokens/s over the arm that edits nothing (`TwoProducts`).

    Args:
        rows: rows of `bench.run` or of its csv file.
        path: the file to write; its ending names the format.

    Raises:
        BadInput: there is no arm other than plain.
        MissingDependency: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    arms = [row for row in rows if row["arm"] != "plain"]
    if not arms:
        raise BadInput("there is nothing to draw: no arm other than plain was measured")
    figure = Figure(figsize=(10, 1.1 + _ROW * len(arms)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    # A csv file of an older version has no such column.
    shown = (_PREFILL, _PANELS[1]) if any(map(_is_pruned, arms)) else _PANELS
    panels = figure.subplots(1, len(shown), sharey=True)
    methods = list(dict.fromkeys(row["arm"] for row in arms))
    for axes, (quantity, title, marks) in zip(panels, shown, strict=True):
        for mark in marks:
            axes.axvline(mark, color="0.3", linewidth=0.8, linestyle="-" if mark == 1 else "--")
        for place, row in enumerate(arms):
            low, middle, high = (float(row[f"{quantity}_p{p}"]) for p in PERCENTILES)
            color = f"C{methods.index(row['arm'])}"
            axes.plot([low, high], [place, place], color=color, linewidth=2)
            axes.plot([middle], [place], "o", color=color, markersize=5)
            equal = row[_EQUAL] if quantity == _PANELS[0][0] else None
            if equal not in (None, ""):  # "" where a csv file has none
                axes.plot([float(equal)], [place], "o", color=color, markersize=5, mfc="none")
        axes.set_title(title, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(axis="x", linewidth=0.3)
    panels[0].set_yticks(range(len(arms)), [_label(row) for row in arms])
    panels[0].invert_yaxis()
    devices = dict.fromkeys(f"{row['device']}, torch {row['torch']}" for row in arms)
    hollow = "hollow: median over the arm 'two products'; " if shown is _PANELS else ""
    figure.supxlabel(
        f"median and 20-80 % of the rounds; {hollow}" + "; ".join(devices),
        fontsize=8,
        color="0.3",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _is_pruned(row: Mapping[str, Any]) -> bool:
    return float(row.get("visual_tokens_kept") or "inf") < float(row["visual_tokens"])


def _label(row: Mapping[str, Any]) -> str:
    run = " ".join(filter(None, (row["cache"], row["compile"])))
    cache = "" if run == "dynamic" else f", {run}"
    where = f"{row['model']}, {row['dtype']}, B={row['batch']}, K={row['prompt']}{cache}"
    return f"{where}: {row['arm']}"
