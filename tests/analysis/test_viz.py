"""Pictures of maps: which cell gets which colour where, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vlmfix.analysis.viz import darken_dropped, draw_maps, draw_tokens, overlay
from vlmfix.errors import BadInput, MissingDependency

matplotlib = pytest.importorskip("matplotlib")

DARK, LIGHT = (68, 1, 84), (253, 231, 36)  # the ends of viridis


def grey(width: int, height: int, level: int = 128) -> Image.Image:
    return Image.new("RGB", (width, height), (level, level, level))


def test_cells_lie_where_their_tokens_are() -> None:
    grid = torch.tensor([[0.0, 0.0, 0.2], [0.4, 0.0, 0.0]])
    drawn = np.asarray(overlay(grey(30, 20), grid, opacity=1.0))
    assert drawn.shape == (20, 30, 3)
    light = (drawn == LIGHT).all(-1)
    dark = (drawn == DARK).all(-1)
    assert light[10:, :10].all() and light.sum() == 100
    middle = drawn[:10, 20:].reshape(-1, 3)
    assert (middle == middle[0]).all()  # flat cells: nothing is interpolated
    assert tuple(middle[0]) not in (DARK, LIGHT)
    assert dark.sum() == 400


def test_opacity_blends_with_the_grey_image() -> None:
    image = Image.new("RGB", (4, 4), (255, 0, 0))
    level = (128 + image.convert("L").getpixel((0, 0))) // 2
    drawn = overlay(image, [[1.0]], opacity=0.5).getpixel((0, 0))
    assert all(abs(a - (b + level) / 2) <= 1 for a, b in zip(drawn, LIGHT, strict=True))
    assert overlay(image, [[1.0]], opacity=0.0).getpixel((0, 0)) == (level,) * 3


def test_the_scale_starts_at_zero_and_ends_where_it_is_told() -> None:
    def colour(value: float, high: float | None) -> tuple[int, ...]:
        return overlay(grey(2, 2), [[value]], high=high, opacity=1.0).getpixel((0, 0))

    assert colour(0.1, None) == colour(0.7, None) == colour(0.3, 0.3) == LIGHT
    assert colour(0.9, 0.3) == LIGHT  # clipped
    assert colour(0.0, None) == colour(0.0, 0.3) == DARK
    assert colour(0.1, 0.2) == colour(0.3, 0.6) not in (LIGHT, DARK)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("count", [1, 3, 6])
def test_several_maps_in_one_figure(tmp_path: Path, count: int, shared: bool) -> None:
    grids = {f"map {at}": torch.full((2, 2 + at), 0.1 * (at + 1)) for at in range(count)}
    path = tmp_path / "new" / "maps.png"
    draw_maps(grey(40, 20), grids, path, shared_scale=shared)
    with Image.open(path) as drawn:
        pixels = np.asarray(drawn.convert("RGB")).astype(int)
    # Each flat map is one colour: 0.75 of its place on the scale over 0.25 of the grey image.
    places = [(at + 1) / count if shared else 1.0 for at in range(count)]
    for place in set(places):
        flat = np.array(matplotlib.colormaps["viridis"]([place], bytes=True)[0, :3], dtype=int)
        expected = 0.75 * flat + 0.25 * 128
        found = (np.abs(pixels - expected) <= 2).all(-1).mean()
        assert found > 0.02 * places.count(place)


@pytest.mark.parametrize(
    "grid", [[0.1, 0.2], [[-0.1]], [[float("nan")]], [[float("inf")]], np.zeros((0, 3))], ids=str
)
def test_what_is_no_map(grid: object, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot be drawn"):
        overlay(grey(2, 2), grid)
    with pytest.raises(BadInput, match="cannot be drawn"):
        draw_maps(grey(2, 2), {"map": grid}, tmp_path / "map.png")


def test_other_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match="opacity"):
        overlay(grey(2, 2), [[1.0]], opacity=2.0)
    with pytest.raises(BadInput, match="no map to draw"):
        draw_maps(grey(2, 2), {}, tmp_path / "map.png")
    assert not list(tmp_path.iterdir())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependency, match=r"vlmfix\[eval\]"):
        overlay(grey(2, 2), [[1.0]])


def test_a_map_of_zeros_is_dark() -> None:
    assert overlay(grey(2, 2), [[0.0]], opacity=1.0).getpixel((1, 1)) == DARK


def picture() -> Image.Image:
    """Six blocks of 10 x 10 pixels, each of a colour of its own."""
    blocks = (np.arange(18).reshape(2, 3, 3) * 13 + 20).astype(np.uint8)
    return Image.fromarray(blocks.repeat(10, 0).repeat(10, 1))


def test_dropped_patches_are_dark_and_the_others_as_they_were() -> None:
    mask = torch.tensor([[True, False, True], [False, False, True]])
    image = picture()
    before, drawn = np.asarray(image), np.asarray(darken_dropped(image, mask))
    assert drawn.shape == (20, 30, 3)
    for row in range(2):
        for column in range(3):
            here = (slice(10 * row, 10 * row + 10), slice(10 * column, 10 * column + 10))
            if mask[row, column]:
                assert (drawn[here] == before[here]).all()
            else:
                assert (drawn[here] == (before[here] * 0.15).astype(np.uint8)).all()


def test_several_masks_in_one_figure(tmp_path: Path) -> None:
    masks = {f"k = {at}": torch.arange(6).view(2, 3) < at for at in (2, 5)}
    path = tmp_path / "new" / "tokens.png"
    draw_tokens(picture(), masks, path)
    with Image.open(path) as drawn:
        pixels = np.asarray(drawn.convert("RGB")).astype(int)
    area = {}
    for block, colour in enumerate(np.asarray(picture())[::10, ::10].reshape(6, 3).astype(int)):
        for dark, own in ((False, colour), (True, (colour * 0.15).astype(int))):
            area[block, dark] = int((np.abs(pixels - own) <= 1).all(-1).sum())
    # Three panels; the first shows every block, the others those that stay, and the rest darkened.
    unit = area[0, False] / 3
    for block in range(6):
        shown = 1 + sum(block < kept for kept in (2, 5))
        assert area[block, False] == pytest.approx(unit * shown, rel=0.1)
        assert (area[block, True] > 0.5 * unit) == (shown < 3)


@pytest.mark.parametrize(
    "mask", [[True, False], [[0.5]], [[1, 0]], np.zeros((0, 3), dtype=bool)], ids=str
)
def test_what_is_no_mask(mask: object, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot be drawn"):
        darken_dropped(grey(2, 2), mask)
    with pytest.raises(BadInput, match="cannot be drawn"):
        draw_tokens(grey(2, 2), {"mask": mask}, tmp_path / "tokens.png")
    with pytest.raises(BadInput, match="nothing to draw"):
        draw_tokens(grey(2, 2), {}, tmp_path / "tokens.png")
    assert not list(tmp_path.iterdir())


def test_darkening_needs_no_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    darken_dropped(grey(2, 2), [[True]])
    with pytest.raises(MissingDependency, match=r"vlmfix\[eval\]"):
        draw_tokens(grey(2, 2), {"mask": [[True]]}, tmp_path / "tokens.png")
