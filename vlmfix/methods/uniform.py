"""A regular grid of visual tokens: the baseline that stands for a lower resolution."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from vlmfix.base.pruning import Kept, TokenMethod, VisualTokens, largest, share_budget

__all__ = ["UniformGrid", "grid_size", "grid_tokens", "spread"]


def spread(count: int, kept: int) -> torch.Tensor:
    """(kept,) int64: the middles of `kept` equal parts of 0 ... count - 1.

    round((i + 1/2) count / kept - 1/2), halves up.
    """
    return (2 * torch.arange(kept) + 1) * count // (2 * kept)


def grid_size(rows: int, columns: int, budget: int) -> tuple[int, int]:
    """Rows and columns of a coarse grid with at most `budget` cells.

    Candidates have a number of rows, or of columns, next to the one that keeps the aspect of the
    fine grid, and as many of the other as the budget holds. The one with most cells is taken; of
    equal ones, the one with fewest rows.
    """
    sizes = []
    for round_ in (math.floor, math.ceil):
        height = min(max(1, round_(math.sqrt(budget * rows / columns))), rows, budget)
        width = min(max(1, round_(math.sqrt(budget * columns / rows))), columns, budget)
        sizes.append((height, min(columns, budget // height)))
        sizes.append((min(rows, budget // width), width))
    return max(sorted(sizes), key=lambda size: size[0] * size[1])


def grid_tokens(row: torch.Tensor, column: torch.Tensor, budget: int) -> torch.Tensor:
    """Choose the tokens of one tile on a coarse grid, and fill the budget from the middle outwards.

    Args:
        row, column: (n,) int64, where the tokens stand; rows and columns at the edges that the
            model dropped as padding are absent.
        budget: at most n.

    Returns:
        (budget,) int64, ascending.
    """
    row, column = row - row.min(), column - column.min()
    rows, columns = int(row.max()) + 1, int(column.max()) + 1
    height, width = grid_size(rows, columns, budget)
    on_grid = torch.isin(row, spread(rows, height)) & torch.isin(column, spread(columns, width))
    away = (row - (rows - 1) / 2) ** 2 + (column - (columns - 1) / 2) ** 2
    return largest(torch.where(on_grid, 1.0, -away), budget)


@dataclass(frozen=True)
class UniformGrid(TokenMethod):
    """Keep the visual tokens of a regular coarse grid over the image.

    A baseline: Omri, Shroff, Tambe: "Token Sequence Compression for Efficient Multimodal
    Computing", arXiv 2504.17892, find regular sampling surprisingly strong. How they place the
    grid is not known here; ours has about the image's aspect, and its rows and columns lie in the
    middles of equal parts. What is left of the budget goes to the tokens nearest to the middle of
    the image. Tiles of an image (LLaVA-NeXT) get shares in proportion to their tokens.
    """

    name: ClassVar[str] = "uniform"
    needs_tiles: ClassVar[bool] = True

    def keep(self, visual: VisualTokens, budget: int) -> Kept:
        _, row, column = visual.grid()
        groups = visual.by_tile()
        shares = share_budget([len(group) for group in groups], budget)
        chosen = [
            group[grid_tokens(row[group], column[group], share)]
            for group, share in zip(groups, shares, strict=True)
            if share
        ]
        return Kept(torch.cat(chosen).sort().values)
