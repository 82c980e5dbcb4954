"""The places in an image of the pieces that a processor makes of it: whole, middle, tiles.

A processor may resize, cut to the middle, cut into tiles or add a small view of the whole: each
piece is an upright rectangle of the image. So vlmfix gives the processor an image whose colours are
coordinates, and reads the coordinates off the pieces.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from vlmfix.chat import encode_chats
from vlmfix.errors import UnsupportedModel

__all__ = ["Box", "piece_places"]

#: left, top, right, bottom in pixels of an image; right and bottom are exclusive.
Box = tuple[int, int, int, int]

#: Share of a side within which an edge counts as the image's own: colours have 256 levels, and a
#: resize blurs the outermost ones.
_TOLERANCE = 1 / 64
_SMALL = (64, 64)


def piece_places(processor: Any, width: int, height: int) -> list[Box]:
    """The part of an image that each of its pieces shows, in the order of `pixel_values`.

    Args:
        processor: returns `pixel_values` of shape (..., 3, H, W), one entry per piece (the layout
            "tiles" of families/tower.py).
        width: width of the image in pixels.
        height: height of the image in pixels.

    Raises:
        UnsupportedModel: a piece that is no upright rectangle of the image.
    """
    across = np.linspace(0, 255, width).round().astype(np.uint8)
    down = np.linspace(0, 255, height).round().astype(np.uint8)
    bands = [across[None, :].repeat(height, 0), down[:, None].repeat(width, 1)]
    ramps = Image.merge("RGB", [Image.fromarray(bands[at]) for at in (0, 1, 1)])
    # A black and a white image show the normalised values of 0 and 255.
    low, high = (
        _pieces(processor, Image.new("RGB", _SMALL, level))[0].mean((1, 2), keepdim=True)
        for level in ("black", "white")
    )
    places = []
    for share in (_pieces(processor, ramps) - low) / (high - low):
        left, right = _edges(share[0], width)
        top, bottom = _edges(share[1].T, height)
        places.append((left, top, right, bottom))
    return places


def _pieces(processor: Any, image: Image.Image) -> torch.Tensor:
    """(pieces, 3, H, W) float64 of an image."""
    content = [{"type": "image", "image": image}, {"type": "text", "text": "?"}]
    inputs = encode_chats(processor, [[{"role": "user", "content": content}]])
    pixels: torch.Tensor = inputs["pixel_values"]
    return pixels.flatten(0, -4).double()


def _edges(shares: torch.Tensor, side: int) -> tuple[int, int]:
    """The begin and the end of a piece along one side of the image.

    Args:
        shares: (lines, count), coordinates along each line of its pixels: 0 and 1 are the centres
            of the first and the last pixel of the image.
        side: length of that side of the image in pixels.
    """
    if side == 1:
        return 0, 1
    count = shares.shape[1]
    # A straight line through the inner half, because a resize blurs near the edges.
    at = np.arange(count // 4, count - count // 4)
    values = shares.numpy()[:, at]
    slope, start = np.polyfit(at + 0.5, values.mean(0), 1)
    # An image of few pixels becomes steps when it is enlarged.
    slack = max(_TOLERANCE, 0.5 / (side - 1))
    straight = np.abs(values - start - slope * (at + 0.5)).max() < slack
    low, high = (0.5 + share * (side - 1) for share in (start, start + slope * count))
    slack *= side
    if not (straight and -slack <= low < high <= side + slack):
        raise UnsupportedModel(
            "the processor turns, mirrors, pads or distorts images, so the place of a visual token "
            "is unknown. Use the model's own processor."
        )
    return (0 if low < slack else round(low)), (side if high > side - slack else round(high))
