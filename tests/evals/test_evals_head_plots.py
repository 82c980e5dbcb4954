"""Layer x head maps: what the colours stand for, and that a picture comes out."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlmfix.errors import BadInput, MissingDependency
from vlmfix.evals.reporting.head_plots import draw_layer_head_map, layer_head_map

pytest.importorskip("matplotlib")

VALUES = np.array([[0.5, 2.0, -1.0], [0.0, 1.0, 3.0]])


def test_writes_a_picture(tmp_path: Path) -> None:
    path = tmp_path / "map.png"
    layer_head_map(VALUES, "some model", path, "unit", marked=[(1, 2)])
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert 400 < picture.width < 2000 and 300 < picture.height < 2000
        assert len(picture.convert("RGB").getcolors(2**24) or ()) > 20


@pytest.mark.parametrize("shape", [(1, 1), (60, 56), (2, 64)])
def test_any_shape_fits(shape: tuple[int, int], tmp_path: Path) -> None:
    path = tmp_path / "map.png"
    layer_head_map(np.arange(np.prod(shape)).reshape(shape), "a" * 200, path, "unit")
    with Image.open(path) as picture:
        assert max(picture.size) < 2000


def test_colours_span_the_values() -> None:
    axes = draw_layer_head_map(VALUES, "title", "unit").axes
    (picture,) = axes[0].images
    assert picture.get_clim() == (-1.0, 3.0)
    assert np.array_equal(picture.get_array(), VALUES)
    assert (axes[0].get_xlabel(), axes[0].get_ylabel()) == ("head", "layer")
    assert axes[1].get_ylabel() == "unit"
    assert axes[0].get_ylim()[0] < axes[0].get_ylim()[1]  # layer 0 is the lowest row
    (from_zero,) = draw_layer_head_map(VALUES + 2, "title", "unit").axes[0].images
    assert from_zero.get_clim() == (0.0, 5.0)


def test_symmetric_colours_have_white_at_zero() -> None:
    (picture,) = draw_layer_head_map(VALUES, "title", "unit", symmetric=True).axes[0].images
    assert picture.get_clim() == (-3.0, 3.0)
    assert min(picture.to_rgba(0.0)[:3]) > 0.95
    assert min(picture.to_rgba(3.0)[:3]) < 0.2


def test_heads_that_do_not_exist_are_white_and_do_not_count() -> None:
    values = VALUES.copy()
    values[1, 2] = np.nan
    (picture,) = draw_layer_head_map(values, "title", "unit").axes[0].images
    assert picture.get_clim() == (-1.0, 2.0)
    assert np.ma.masked_invalid(picture.get_array()).mask[1, 2]


def test_a_long_title_stays_on_the_picture() -> None:
    figure = draw_layer_head_map(VALUES, "a long title of many words " * 8, "unit")
    figure.canvas.draw()
    box = figure.axes[0].title.get_window_extent()
    assert box.y1 <= figure.bbox.y1 and figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1


def test_marks_lie_on_their_heads() -> None:
    (axes, _) = draw_layer_head_map(VALUES, "title", "unit", marked=[(1, 2)]).axes
    (mark,) = axes.patches
    assert mark.get_xy() == (1.5, 0.5) and (mark.get_width(), mark.get_height()) == (1, 1)


@pytest.mark.parametrize("values", [[1.0, 2.0], [[np.nan]]])
def test_no_map(values: Any) -> None:
    with pytest.raises(BadInput, match="layer x head map"):
        draw_layer_head_map(values, "title", "unit")


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingDependency, match=r"vlmfix\[eval\]"):
        layer_head_map(VALUES, "title", tmp_path / "map.png", "unit")
