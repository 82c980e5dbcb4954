"""The regular grid: where its rows and columns lie, what tops it up, and its tiles."""

from __future__ import annotations

import pytest
import torch
from matrix import family
from pruned import (
    answer,
    check_a_row_without_image,
    check_batch_equals_singles,
    check_keep_all_is_identity,
    check_text_only_is_untouched,
    same_answer,
)
from tiny import FAMILIES, build

import vlmfix
from vlmfix.base.pruning import VisualTokens
from vlmfix.errors import UnsupportedModel
from vlmfix.families.tower import Tile
from vlmfix.methods.uniform import UniformGrid, grid_size, grid_tokens, spread


def raster(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    place = torch.arange(rows * columns)
    return place // columns, place % columns


def picture(rows: int, columns: int, budget: int) -> str:
    """The tokens that stay, drawn."""
    kept = set(grid_tokens(*raster(rows, columns), budget).tolist())
    lines = [
        "".join(".#"[row * columns + column in kept] for column in range(columns))
        for row in range(rows)
    ]
    return " ".join(lines)


def test_rows_lie_in_the_middles_of_equal_parts() -> None:
    assert spread(24, 8).tolist() == [1, 4, 7, 10, 13, 16, 19, 22]
    assert spread(24, 12).tolist() == list(range(1, 24, 2))  # round(0.5) and so on, halves up
    assert spread(6, 2).tolist() == [1, 4]
    assert spread(7, 3).tolist() == [1, 3, 5]
    assert spread(5, 5).tolist() == [0, 1, 2, 3, 4]
    assert spread(9, 1).tolist() == [4]
    for count in range(1, 30):
        for kept in range(1, count + 1):
            places = spread(count, kept)
            exact = (torch.arange(kept).double() + 0.5) * count / kept - 0.5
            assert bool((places == torch.floor(exact + 0.5 + 1e-9)).all())
            assert len(set(places.tolist())) == kept and places[0] >= 0 and places[-1] < count


@pytest.mark.parametrize(
    ("shape", "budget", "expected"),
    [
        ((24, 24), 64, (8, 8)),
        ((24, 24), 128, (11, 11)),
        ((24, 24), 192, (13, 14)),
        ((24, 24), 575, (23, 24)),
        ((24, 24), 1, (1, 1)),
        ((24, 24), 2, (1, 2)),
        ((24, 24), 3, (1, 3)),
        ((12, 48), 64, (4, 16)),
        ((48, 12), 64, (16, 4)),
        ((2, 8), 9, (1, 8)),
        ((24, 2), 40, (20, 2)),
        ((2, 24), 40, (2, 20)),
        ((1, 30), 7, (1, 7)),
        ((30, 1), 7, (7, 1)),
        ((4, 6), 23, (4, 5)),
    ],
)
def test_size_of_the_coarse_grid(
    shape: tuple[int, int], budget: int, expected: tuple[int, int]
) -> None:
    assert grid_size(*shape, budget) == expected


def test_size_fits_and_keeps_the_aspect() -> None:
    for rows in range(1, 13):
        for columns in range(1, 13):
            for budget in range(1, rows * columns):
                height, width = grid_size(rows, columns, budget)
                assert 1 <= height <= rows and 1 <= width <= columns
                assert height * width <= budget
                ideal = (budget * rows / columns) ** 0.5, (budget * columns / rows) ** 0.5
                off = [
                    abs(size - min(max(wanted, 1), most, budget))
                    for size, wanted, most in zip(
                        (height, width), ideal, (rows, columns), strict=True
                    )
                ]
                assert min(off) < 1


def test_worked_grids() -> None:
    assert picture(6, 6, 4) == "...... .#..#. ...... ...... .#..#. ......"
    # Four places, and of the tokens nearest to the middle the first.
    assert picture(6, 6, 5) == "...... .#..#. ..#... ...... .#..#. ......"
    assert picture(5, 5, 5) == "..... .#.#. ..#.. .#.#. ....."
    assert picture(2, 8, 5) == "........ #.#.##.#"
    assert picture(1, 6, 3) == ".#.#.#"
    assert picture(6, 1, 3) == ". # . # . #"
    for budget in range(1, 48):
        assert picture(6, 8, budget).count("#") == budget


def test_rows_and_columns_that_are_padding() -> None:
    """The grid lies over what is there, wherever in the tile that is."""
    row, column = raster(4, 5)
    for down, right in ((0, 0), (2, 0), (0, 3), (2, 3)):
        for budget in range(1, 20):
            assert torch.equal(
                grid_tokens(row + down, column + right, budget), grid_tokens(row, column, budget)
            )


def tokens_of(*shapes: tuple[int, int]) -> VisualTokens:
    tiles = tuple(Tile(rows, columns, {}) for rows, columns in shapes)
    count = sum(rows * columns for rows, columns in shapes)
    none = torch.zeros(0, 2)
    return VisualTokens(torch.zeros(count, 2), tiles, torch.arange(count), None, none, 0)


def test_tiles_get_shares_by_their_size() -> None:
    visual = tokens_of((6, 6), (2, 6), (4, 6))
    index = UniformGrid().keep(visual, 12).index.tolist()
    parts = [
        [at for at in index if low <= at < high] for low, high in ((0, 36), (36, 48), (48, 72))
    ]
    assert [len(part) for part in parts] == [6, 2, 4]
    for (rows, columns), part, start in zip(
        ((6, 6), (2, 6), (4, 6)), parts, (0, 36, 48), strict=True
    ):
        own = grid_tokens(*raster(rows, columns), len(part))
        assert part == (own + start).tolist()
    # Fewer than there are tiles: the largest ones have them.
    assert UniformGrid().keep(visual, 1).index.tolist() == [21]
    assert len(UniformGrid().keep(visual, 2).index) == 2


def test_shuffled_places() -> None:
    """Tokens stand in the prompt in another order than in the tiles (LLaVA-NeXT)."""
    plain = tokens_of((4, 4))
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    shuffled = VisualTokens(plain.features, plain.tiles, order, None, plain.question, 0)
    index = UniformGrid().keep(shuffled, 4).index
    assert sorted(order[index].tolist()) == [5, 7, 13, 15]


# -- on models ------------------------------------------------------------------------------------


def test_places_on_models() -> None:
    assert answer(family("llava"), "uniform:tokens=4", family("llava").inputs(1)).kept == [
        [5, 7, 13, 15]
    ]
    tiny = family("llava_next")
    (kept,) = answer(tiny, "uniform:tokens=20", tiny.inputs(1)).kept
    base = [at for at in kept if at < 16]
    tokens = [divmod(at - 16, 9) for at in kept if at >= 16]
    assert base == [5, 7, 13, 15]
    odd = [(row, column) for row in (1, 3, 5, 7) for column in (1, 3, 5, 7, 8)]  # 8: the newline
    assert tokens == odd


@pytest.mark.parametrize("name", FAMILIES)
def test_batch_equals_singles(name: str) -> None:
    check_batch_equals_singles(family(name), "uniform:ratio=0.5")


@pytest.mark.parametrize("name", FAMILIES)
def test_keep_all_is_identity(name: str) -> None:
    check_keep_all_is_identity(family(name), ["uniform:ratio=1", "uniform:tokens=1000"])


def test_text_only_and_rows_without_image() -> None:
    check_text_only_is_untouched(family("llava"), "uniform")
    check_a_row_without_image(family("llava"), "uniform")


def test_pixels_do_not_matter() -> None:
    tiny = family("llava")
    one, other = (answer(tiny, "uniform", tiny.inputs(2, seed=seed)) for seed in (1, 2))
    assert one.kept == other.kept and not same_answer(one, other)


@pytest.mark.parametrize("name", ["llava_onevision", "idefics2"])
def test_families_without_places_are_refused(name: str) -> None:
    tiny = build(name)
    with pytest.raises(UnsupportedModel, match="^uniform: .*cannot be read"):
        vlmfix.wrap(tiny.model, "uniform")
