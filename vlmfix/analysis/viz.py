"""Pictures of maps over an image, and of images with pruned patches darkened.

Figures and colours need matplotlib (the extra `eval`). Under a map the image is drawn in few greys
around the middle one, so that every colour means attention and hardly depends on the image. The
colours are viridis, whose lightness rises evenly: it is readable with red-green colour blindness
and in grey print.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from vlmfix.errors import BadInput, MissingDependency

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["darken_dropped", "draw_maps", "draw_tokens", "overlay"]

_COLOURS = "viridis"
_OPACITY = 0.75
_MIDDLE = 128
_ROW = 5  # the most panels side by side
_SIDE = 2.6  # side of a panel in inches
_LIGHT = 0.15  # share of its brightness that a dropped cell keeps


def overlay(
    image: Image, grid: ArrayLike, *, high: float | None = None, opacity: float = _OPACITY
) -> Image:
    """Lay a map over an image: one flat cell per visual token, nothing interpolated.

    Args:
        image: the image as the vision tower was given it. If the processor crops (LLaVA-1.5 takes
            the middle square), crop it in the same way, or the map is misplaced.
        grid: (rows, columns), not negative.
        high: the value of the lightest colour; the darkest is 0. None: the map's maximum.
        opacity: opacity of the map, in [0, 1].

    Returns:
        An RGB image of the size of `image`.

    Raises:
        BadInput: a grid that is not two-dimensional, not finite or negative, or a bad opacity.
        MissingDependency: matplotlib is not installed.
    """
    colormaps = _matplotlib().colormaps
    from PIL import Image as images

    values = _checked(grid)
    if not 0 <= opacity <= 1:
        raise BadInput(f"opacity={opacity!r}: give a number from 0 to 1.")
    top = _top(values.max() if high is None else high)
    colours = colormaps[_COLOURS](np.clip(values / top, 0, 1), bytes=True)[..., :3]
    cells = images.fromarray(np.ascontiguousarray(colours))
    cells = cells.resize(image.size, images.Resampling.NEAREST)
    grey = image.convert("L").point([(_MIDDLE + level) // 2 for level in range(256)])
    return images.blend(grey.convert("RGB"), cells, opacity)


def draw_maps(
    image: Image,
    grids: Mapping[str, ArrayLike],
    path: str | Path,
    *,
    shared_scale: bool = True,
    label: str = "attention weight",
) -> None:
    """Draw an image and maps over it side by side to an image file.

    Args:
        image: see `overlay`.
        grids: title -> (rows, columns).
        path: the file to write; its ending names the format.
        shared_scale: whether all maps share a scale from 0 to their maximum.
        label: label of the scale.

    Raises:
        BadInput: no map, or one that `overlay` refuses.
        MissingDependency: matplotlib is not installed.
    """
    colormaps = _matplotlib().colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    if not grids:
        raise BadInput("there is no map to draw: give at least one grid with a title.")
    values = {title: _checked(grid) for title, grid in grids.items()}
    tops = {title: float(grid.max()) for title, grid in values.items()}
    if shared_scale:
        tops = dict.fromkeys(tops, max(tops.values()))
    pure = colormaps[_COLOURS](np.linspace(0, 1, 256))[:, :3]
    as_drawn = ListedColormap(_OPACITY * pure + (1 - _OPACITY) * _MIDDLE / 255)
    figure, axes = _panels(image, len(values), margin=0.8)
    for panel, (title, grid) in zip(axes[1:], values.items(), strict=False):
        panel.imshow(overlay(image, grid, high=tops[title]))
        panel.set_title(title, fontsize=9)
        if not shared_scale or panel is axes[len(values)]:
            scale = ScalarMappable(Normalize(0, _top(tops[title])), as_drawn)
            where = list(axes) if shared_scale else panel
            bar = figure.colorbar(scale, ax=where, shrink=0.8, pad=0.02)
            bar.ax.tick_params(labelsize=7)
            bar.set_label(label, fontsize=8)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def darken_dropped(image: Image, mask: ArrayLike) -> Image:
    """Darken the patches of an image whose visual tokens were dropped.

    Args:
        image: see `overlay`.
        mask: (rows, columns) bool, True where a token is kept; `KeptTokens.masks` has them.

    Returns:
        An RGB image of the size of `image`, bit for bit the same where a token is kept.

    Raises:
        BadInput: a mask that is not two-dimensional or not bool.
    """
    from PIL import Image as images

    stays = _checked_mask(mask)
    cells = images.fromarray(stays.astype(np.uint8) * 255)
    cells = cells.resize(image.size, images.Resampling.NEAREST)
    light = image.convert("RGB")
    return images.composite(light, light.point(lambda level: int(_LIGHT * level)), cells)


def draw_tokens(image: Image, masks: Mapping[str, ArrayLike], path: str | Path) -> None:
    """Draw an image, and its copies with dropped patches darkened, to an image file.

    Args:
        image: see `overlay`.
        masks: title -> (rows, columns) bool, True where a token is kept.
        path: the file to write; its ending names the format.

    Raises:
        BadInput: no mask, or one that `darken_dropped` refuses.
        MissingDependency: matplotlib is not installed.
    """
    _matplotlib()
    if not masks:
        raise BadInput("there is nothing to draw: give at least one mask with a title.")
    stays = {title: _checked_mask(mask) for title, mask in masks.items()}
    figure, axes = _panels(image, len(stays))
    for panel, (title, mask) in zip(axes[1:], stays.items(), strict=False):
        panel.imshow(darken_dropped(image, mask))
        panel.set_title(f"{title}: {int(mask.sum())} of {mask.size}", fontsize=9)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _panels(image: Image, count: int, margin: float = 0.0) -> tuple[Any, Any]:
    """A figure with the image, `count` panels after it, and a margin at the right in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = math.ceil((count + 1) / _ROW)
    columns = math.ceil((count + 1) / lines)
    height = _SIDE * min(2.0, image.height / image.width)
    size = (_SIDE * columns + margin, (height + 0.35) * lines)
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for panel in axes:
        panel.axis("off")
    axes[0].imshow(image.convert("RGB"))
    return figure, axes


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise MissingDependency(
            "drawing maps needs matplotlib: pip install 'vlmfix[eval]' (or pip install matplotlib)."
        ) from error
    return matplotlib


def _checked(grid: ArrayLike) -> np.ndarray[Any, np.dtype[np.float64]]:
    values = np.asarray(grid, dtype=np.float64)
    if values.ndim != 2 or not values.size or not (values >= 0).all() or np.isinf(values).any():
        raise BadInput(
            f"a map of shape {values.shape} cannot be drawn: give (rows, columns) of finite values "
            "that are not negative, e.g. map.grids()[0].mean((0, 1, 2))."
        )
    return values


def _checked_mask(mask: ArrayLike) -> np.ndarray[Any, np.dtype[np.bool_]]:
    values = np.asarray(mask)
    if values.ndim != 2 or not values.size or values.dtype != np.bool_:
        raise BadInput(
            f"a mask of shape {values.shape} and type {values.dtype} cannot be drawn: give (rows, "
            "columns) of bool, e.g. one of KeptTokens.masks()."
        )
    return values


def _top(high: float) -> float:
    """The value of the lightest colour; a map of zeros is dark everywhere."""
    return float(high) if high > 0 else 1.0
