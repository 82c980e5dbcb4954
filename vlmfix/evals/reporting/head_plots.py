"""Layer x head maps as pictures."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from vlmfix.errors import BadInput, MissingDependency

__all__ = ["draw_layer_head_map", "layer_head_map", "require_matplotlib"]

_DPI = 150


def require_matplotlib() -> None:
    """Raise now what drawing would raise later.

    Raises:
        MissingDependency: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingDependency(
            "plots need matplotlib: `pip install 'vlmfix[eval]'` (or `pip install matplotlib`)"
        ) from error


def layer_head_map(
    values: ArrayLike,
    title: str,
    path: Path,
    unit: str,
    symmetric: bool = False,
    marked: Sequence[Sequence[int]] = (),
) -> None:
    """Write one value per head as a PNG, layers upwards, heads to the right.

    Args:
        values: (L, H); NaN where there is no attention head, left white.
        title: above the map.
        path: the .png file; its folder must exist.
        unit: what the colours stand for.
        symmetric: colours run from -m to m around white, m being the largest magnitude; else from
            the smallest value (or 0, if that is smaller) to the largest.
        marked: (layer, head) pairs to outline.

    Raises:
        BadInput: `values` is not two-dimensional, or holds no number.
        MissingDependency: matplotlib is not installed.
    """
    draw_layer_head_map(values, title, unit, symmetric, marked).savefig(
        path, format="png", dpi=_DPI
    )


def draw_layer_head_map(
    values: ArrayLike,
    title: str,
    unit: str,
    symmetric: bool = False,
    marked: Sequence[Sequence[int]] = (),
) -> Any:
    """The matplotlib Figure that `layer_head_map` writes; arguments and errors as there."""
    require_matplotlib()
    # Not pyplot: its figures and its choice of a screen are global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator

    grid = np.asarray(values, dtype=float)
    if grid.ndim != 2 or not np.isfinite(grid).any():
        raise BadInput(f"a layer x head map needs numbers of shape (L, H), not {grid.shape}")
    layers, heads = grid.shape
    size = (2.4 + min(9.0, max(3.0, 0.26 * heads)), 1.4 + min(9.0, max(2.2, 0.26 * layers)))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    low, high = float(np.nanmin(grid)), float(np.nanmax(grid))
    limit = max(abs(low), abs(high))
    # Both maps are readable without red and green: purple-orange around white, and cividis.
    colours, low, high = ("PuOr_r", -limit, limit) if symmetric else ("cividis", min(low, 0), high)
    picture = axes.imshow(
        grid, cmap=colours, vmin=low, vmax=high, origin="lower", aspect="auto",
        interpolation="nearest",
    )  # fmt: skip
    for layer, head in marked:
        corner = (head - 0.5, layer - 0.5)
        axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="black", linewidth=1.5))
    # matplotlib's own wrapping makes no room for the lines that it adds.
    axes.set_title(textwrap.fill(title, int(9 * size[0])), fontsize=10)
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=16, integer=True))
    figure.colorbar(picture, ax=axes, label=unit)
    return figure
