"""From recorded attention of the vision tower, patch by patch, to the visual tokens of images."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from vlmfix.errors import UnsupportedModel
from vlmfix.families import pixel_names
from vlmfix.families.tower import (
    EncodedImage,
    Order,
    Received,
    Tile,
    Tower,
    grid_index,
    grid_shapes,
    packed_index,
    patch_grids,
    places,
    square_sides,
    tile_shape,
)

__all__ = ["RecordedCalls", "recorded_images"]


#: Per layer and call of the attention function, the pair of `received_attention` and the keys
#: (B, K, D), mean over heads.
RecordedCalls = dict[int, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]


def recorded_images(
    tower: Tower,
    calls: RecordedCalls,
    arguments: dict[str, Any],
    features: Any,
    hidden: torch.Tensor,
) -> list[EncodedImage]:
    """What one encoding gave, image by image.

    Args:
        tower: the tower.
        calls: what its attention modules recorded.
        arguments: those of `get_image_features`, by name.
        features: the projected features: a list of (n, D), or one (images, n, D) tensor.
        hidden: what the last block of the tower made of its tokens; only read where it has a class
            token, and then (tiles, 1 + patches, d).

    Raises:
        UnsupportedModel: a layer that did not run, or another number of visual tokens than the
            family's rule gives.
    """
    silent = [layer for layer, found in calls.items() if not found]
    if silent:
        raise UnsupportedModel(
            f"layers {silent} of the vision tower of {tower.model_type!r} did not run attention "
            "that the recorder could read. Ask for other layers."
        )
    images = _LAYOUTS[tower.layout](tower, calls, arguments)
    expected = sum(len(image.index) for image in images)
    tokens = sum(math.prod(part.shape[:-1]) for part in features)
    if tokens != expected:
        raise UnsupportedModel(
            f"the vision tower of {tower.model_type!r} made {tokens} visual tokens where the "
            f"recorder counts {expected}, so its values would go to the wrong tokens. Call the "
            "model with the arguments of its processor and the feature settings of its "
            "configuration."
        )
    if not tower.has_cls or tower.cls_last:
        return images
    # A copy: a view would keep the hidden states of all patches.
    outputs = iter(hidden.detach()[:, 0].to(torch.float32, copy=True))
    return [
        replace(one, tiles=tuple(replace(t, cls_output=next(outputs)) for t in one.tiles))
        for one in images
    ]


def _tiles(tower: Tower, calls: RecordedCalls, arguments: dict[str, Any]) -> list[EncodedImage]:
    """Every tile is an image of its own."""
    return [
        EncodedImage((tile,), torch.arange(tile.rows * tile.columns, device=_device(calls)))
        for tile in _square_tiles(tower, calls, arguments)
    ]


def _packed(tower: Tower, calls: RecordedCalls, arguments: dict[str, Any]) -> list[EncodedImage]:
    """LLaVA-NeXT: several tiles per image."""
    tiles = _square_tiles(tower, calls, arguments)
    images = []
    for size in arguments["image_sizes"]:
        count, index = packed_index(tower, size, tiles[0].rows * tiles[0].columns)
        own, tiles = tuple(tiles[:count]), tiles[count:]
        images.append(EncodedImage(own, index.to(_device(calls))))
    return images


def _patches(tower: Tower, calls: RecordedCalls, arguments: dict[str, Any]) -> list[EncodedImage]:
    """Patches of all images on one axis; the tower calls attention per segment, or masks others."""
    grids = patch_grids(tower, arguments)
    sorted_by = _window_order(tower, grids)
    sides, shapes = square_sides(tower, arguments), grid_shapes(tower, arguments)
    counts, sizes = grids.prod(1).tolist(), grids[:, 1:].tolist()

    def fold(values: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        patches = torch.cat([value[:, tower.prefix :].flatten(0, 1) for value in values])
        if sorted_by is not None:
            unit, order = sorted_by
            units = patches.view(-1, unit, *patches.shape[1:])
            patches = units[order.to(patches.device)].flatten(0, 1)
        # Layers behind a merger that stands between layers (MiniCPM) see squares, not patches.
        seen = math.isqrt(sum(counts) // len(patches))
        parts = torch.split(patches, [count // seen**2 for count in counts])
        return [
            _merged(tower.order, part, [length // seen for length in size], shape, side // seen)
            for part, size, shape, side in zip(parts, sizes, shapes, sides, strict=True)
        ]

    by_layer = {}
    for layer, found in calls.items():
        columns, _, keys = zip(*found, strict=True)
        by_layer[layer] = [
            Received(column, None, key)
            for column, key in zip(fold(columns), fold(keys), strict=True)
        ]
    return [
        EncodedImage(
            (Tile(rows, columns, dict(zip(by_layer, received, strict=True))),),
            grid_index(tower, rows, columns).to(_device(calls)),
        )
        for (rows, columns), *received in zip(shapes, *by_layer.values(), strict=True)
    ]


def _window_order(tower: Tower, grids: torch.Tensor) -> tuple[int, torch.Tensor] | None:
    """How to undo a sorting by windows: of how many patches at a time, and their order."""
    module: Any = tower.module
    if not hasattr(module, "window_size"):
        return None
    from transformers.vision_utils import get_vision_window_index

    side = module.spatial_merge_size  # of what is sorted: squares (Qwen2.5-VL), or patches (Muse)
    index, _ = get_vision_window_index(
        grids,
        spatial_merge_size=side,
        window_size=module.window_size,
        patch_size=module.config.patch_size,
    )
    return side**2, torch.argsort(index)


def _merged(
    order: Order, patches: torch.Tensor, size: list[int], shape: tuple[int, int], side: int
) -> torch.Tensor:
    """The mean over the patches of each visual token of an image: (rows columns, ...).

    Args:
        order: how the patches lie on their axis.
        patches: (n, ...).
        size: rows and columns of patches.
        shape: rows and columns of visual tokens; patches beyond them make none.
        side: of the square of patches that makes a token.
    """
    if order == "squares":
        return patches.view(-1, side**2, *patches.shape[1:]).mean(1)
    rows, columns = shape
    whole = patches.view(*size, *patches.shape[1:])[: rows * side, : columns * side]
    squares = whole.reshape(rows, side, columns, side, *patches.shape[1:])
    return squares.mean(dim=(1, 3)).flatten(0, 1)


def _placed(tower: Tower, calls: RecordedCalls, arguments: dict[str, Any]) -> list[EncodedImage]:
    """Patches of an image per row, each at its place; those of a square become one token."""
    where, shapes = places(arguments).to(_device(calls)), grid_shapes(tower, arguments)

    def fold(values: torch.Tensor) -> list[torch.Tensor]:
        folded = []
        for own, place, (rows, columns) in zip(values, where, shapes, strict=True):
            x, y = place.unbind(-1)
            real = x >= 0
            token = (y // tower.merge * columns + x // tower.merge)[real]
            sums = own.new_zeros(rows * columns, *own.shape[1:])
            folded.append(sums.index_add_(0, token, own[real]) / tower.merge**2)
        return folded

    by_layer = {}
    for layer, ((column, _, key),) in calls.items():  # one call: all images are one batch
        both = zip(fold(column), fold(key), strict=True)
        by_layer[layer] = [Received(values, None, keys) for values, keys in both]
    return [
        EncodedImage(
            (Tile(rows, columns, dict(zip(by_layer, received, strict=True))),),
            torch.arange(rows * columns, device=_device(calls)),
        )
        for (rows, columns), *received in zip(shapes, *by_layer.values(), strict=True)
    ]


_LAYOUTS = {
    "tiles": _tiles,
    "packed": _packed,
    "patches": _patches,
    "sized": _patches,
    "placed": _placed,
}


def _square_tiles(tower: Tower, calls: RecordedCalls, arguments: dict[str, Any]) -> list[Tile]:
    """The tiles of one call per layer, without the class token, folded to visual tokens."""
    height, width = arguments[pixel_names(arguments)[0]].shape[-2:]
    merge, has_cls = tower.merge, int(tower.has_cls)
    rows, columns = tile_shape(tower, height, width)

    def fold(values: torch.Tensor) -> torch.Tensor:
        if values.shape[1] != has_cls + rows * columns * merge**2:
            raise UnsupportedModel(
                f"the vision tower of {tower.model_type!r} sees {values.shape[1] - has_cls} "
                f"patches in {height} x {width} pixels, which are no {rows} x {columns} squares "
                f"of {merge} x {merge}. Give it images of the size that its processor makes."
            )
        patches = values[:, has_cls:]
        squares = patches.view(-1, rows, merge, columns, merge, *values.shape[2:])
        return squares.mean(dim=(2, 4)).flatten(1, 2)

    by_layer = {}
    for layer, ((column, first, key),) in calls.items():  # one call: all tiles are one batch
        heard = [None] * len(first) if not has_cls else list(fold(first))
        by_layer[layer] = [
            Received(*values) for values in zip(fold(column), heard, fold(key), strict=True)
        ]
    return [
        Tile(rows, columns, dict(zip(by_layer, received, strict=True)))
        for received in zip(*by_layer.values(), strict=True)
    ]


def _device(calls: RecordedCalls) -> torch.device:
    """Where the tower computes."""
    return next(iter(calls.values()))[0][0].device
