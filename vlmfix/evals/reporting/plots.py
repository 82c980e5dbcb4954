"""Pictures of a score card: differences with their intervals, and CHAIRi against recall."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlmfix.evals.reporting.card import Card, Cell, Row, Table, heading
from vlmfix.evals.reporting.head_plots import require_matplotlib

__all__ = ["draw_card", "draw_chair", "draw_forest"]

_DPI = 150
_PANELS_PER_ROW = 4
_MARKERS = "osD^vP>X<*hd"
_LONGEST = 28


def draw_card(card: Card, folder: Path) -> dict[int, list[str]]:
    """Draw every table of a card.

    Args:
        card: from `card.make_card`.
        folder: where the .png files go; it must exist.

    Returns:
        number of a table -> names of its files.

    Raises:
        MissingDependency: matplotlib is not installed.
    """
    drawn: dict[int, list[str]] = {}
    for number, table in enumerate(card):
        end = f"_{number + 1}" if len(card) > 1 else ""
        for stem, figure in (("forest", draw_forest(table)), ("chair", draw_chair(table))):
            if figure is not None:
                figure.savefig(folder / f"{stem}{end}.png", format="png", dpi=_DPI)
                drawn.setdefault(number, []).append(f"{stem}{end}.png")
    return drawn


def _figure(width: float, height: float) -> Any:
    require_matplotlib()
    # Not pyplot: its figures and its choice of a screen are global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def draw_forest(table: Table) -> Any | None:
    """Differences to the base with 95 % intervals, a panel per metric and a line per method.

    A filled mark stands where the interval leaves out zero.

    Returns:
        A matplotlib Figure; None without methods.
    """
    panels = [
        (number, column)
        for number, block in enumerate(table.blocks)
        for column in block.columns
        if any(_delta(row, number, column.metric) for row in table.rows)
    ]
    methods = [row for row in table.rows if any(_delta(row, n, c.metric) for n, c in panels)]
    if not panels:
        return None
    lines = -(-len(panels) // _PANELS_PER_ROW)
    across = min(len(panels), _PANELS_PER_ROW)
    figure = _figure(2.2 + 2.1 * across, lines * (1.1 + 0.24 * len(methods)))
    axes = figure.subplots(lines, across, squeeze=False, sharey=True)
    for unused in axes.flat[len(panels) :]:
        unused.set_visible(False)
    for (number, column), panel in zip(panels, axes.flat, strict=False):
        block = table.blocks[number]
        name = heading(table, number, column.title)
        panel.set_title(name + (" (PARTIAL)" if block.partial else ""), fontsize=8)
        panel.axvline(0, color="0.6", linewidth=0.8)
        for height, row in enumerate(methods):
            cell = _delta(row, number, column.metric)
            if cell is None or cell.delta is None:
                continue
            low, high = cell.delta_ci or (cell.delta, cell.delta)
            sure = cell.delta_ci is not None and not low <= 0 <= high
            colour = "#0b559f" if sure else "0.45"
            panel.plot([low, high], [height, height], color=colour, linewidth=1.4)
            panel.plot(
                [cell.delta], [height], "o", markersize=4.5, color=colour,
                markerfacecolor=colour if sure else "white",
            )  # fmt: skip
        panel.set_ylim(len(methods) - 0.5, -0.5)
        panel.set_yticks(range(len(methods)), [_short(row.method) for row in methods], fontsize=7)
        panel.tick_params(axis="x", labelsize=7)
        panel.set_xlabel("points" if column.percent else "", fontsize=7)
    partial = "PARTIAL: " if table.partial else ""
    figure.suptitle(
        f"{partial}difference to base, 95 % intervals\n{_short(table.title, 90)}", fontsize=9
    )
    return figure


def _delta(row: Row, number: int, metric: str) -> Cell | None:
    cell = row.cells.get((number, metric))
    return cell if cell is not None and cell.delta is not None else None


def draw_chair(table: Table) -> Any | None:
    """CHAIRi against recall with 95 % intervals, and how both grow with the length of captions.

    Low and to the right is better. A thin line leads from captions cut to their first 64 and 128
    words, whole sentences, to the captions as they are: a method that is merely shorter stays on
    the base's line.

    Returns:
        A matplotlib Figure; None without captions.
    """
    blocks = [
        number for number in range(len(table.blocks)) if any(number in r.caps for r in table.rows)
    ]
    if not blocks:
        return None
    from matplotlib import colormaps

    rows = [row for row in table.rows if row.caps]
    colours = colormaps["tab20"](range(20))
    figure = _figure(4.6 * len(blocks) + 1.9, max(4.0, 0.9 + 0.2 * len(rows)))
    axes = figure.subplots(1, len(blocks), squeeze=False)[0]
    marks: list[Any] = []
    for number, panel in zip(blocks, axes, strict=True):
        marks = []
        for i, row in enumerate(rows):
            if number not in row.caps:
                continue
            colour = "black" if row.is_base else colours[i % len(colours)]
            *short, (_, recall, chair) = row.caps[number]
            if short:
                path = [(r.value, c.value) for _, r, c in row.caps[number]]
                panel.plot(*zip(*path, strict=True), color=colour, linewidth=0.8, alpha=0.5)
            panel.errorbar(
                recall.value, chair.value, xerr=_spread(recall), yerr=_spread(chair),
                color=colour, elinewidth=0.7, alpha=0.45, fmt="none",
            )  # fmt: skip
            marks += panel.plot(
                [recall.value], [chair.value], color=colour, linestyle="none",
                marker="*" if row.is_base else _MARKERS[i % len(_MARKERS)],
                markersize=11 if row.is_base else 6, label=_short(row.method), zorder=3,
            )  # fmt: skip
        block = table.blocks[number]
        tokens = block.settings.get("gen_kwargs", {}).get("max_new_tokens")
        limit = f", up to {tokens} tokens" if tokens else ""
        panel.set_title(
            f"{'PARTIAL: ' if block.partial else ''}{block.n_images} images{limit}", fontsize=9
        )
        panel.set_xlabel("recall % (right is better)", fontsize=9)
        panel.set_ylabel("CHAIRi % (low is better)", fontsize=9)
        panel.tick_params(labelsize=8)
    figure.legend(handles=marks, loc="outside right center", fontsize=7, frameon=False)
    return figure


def _spread(cell: Cell) -> list[list[float]] | None:
    """Lengths of the error bars, as matplotlib takes them: (2, 1)."""
    if cell.ci is None:
        return None
    return [[max(0.0, cell.value - cell.ci[0])], [max(0.0, cell.ci[1] - cell.value)]]


def _short(text: str, longest: int = _LONGEST) -> str:
    return text if len(text) <= longest else f"{text[: longest - 3]}..."
