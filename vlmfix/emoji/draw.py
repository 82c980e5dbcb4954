"""Paint scenes with the sprites of the atlas, and measure how much of objects stays visible."""

from __future__ import annotations

__all__ = ["paint", "visible_shares"]

from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from vlmfix.emoji.atlas import load_sprites
from vlmfix.emoji.world import SIZE, Item, Scene

_FAINT = 0.55  # opacity of half-transparent objects


@lru_cache(maxsize=20_000)
def _sprite(name: str, width: int, height: int, flipped: bool, faint: bool) -> Image.Image:
    sprite = load_sprites()[name].resize((width, height), Image.Resampling.BILINEAR)
    if flipped:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if faint:
        alpha = sprite.getchannel("A").point([int(value * _FAINT) for value in range(256)])
        sprite.putalpha(alpha)
    return sprite


def _sprite_of(item: Item) -> Image.Image:
    left, top, right, bottom = item.box
    return _sprite(item.name, right - left, bottom - top, item.flipped, item.faint)


def paint(scene: Scene) -> Image.Image:
    """The scene as an RGB picture of SIZE x SIZE pixels."""
    picture = Image.new("RGB", (SIZE, SIZE), scene.colour)
    draw = ImageDraw.Draw(picture)
    for is_ellipse, box, colour in scene.shapes:
        (draw.ellipse if is_ellipse else draw.rectangle)(box, fill=colour)
    for item in scene.items:
        sprite = _sprite_of(item)
        picture.paste(sprite, item.box[:2], sprite)
    return picture


def visible_shares(scene: Scene) -> list[float]:
    """For each item, the share of its opaque pixels that no later item paints over (0..1)."""
    owner = np.full((SIZE, SIZE), -1)
    totals = []
    for number, item in enumerate(scene.items):
        mask = np.asarray(_sprite_of(item).getchannel("A")) > 40
        totals.append(max(1, int(mask.sum())))
        left, top, right, bottom = item.box
        owner[top:bottom, left:right][mask] = number
    return [float((owner == n).sum()) / total for n, total in enumerate(totals)]
