"""The objects of EmojiCOCO that have an unambiguous colour, and the colours that objects lack.

The world knows no colours; they are read off the sprites. A category has a colour if at least 65 %
of its opaque pixels are in the core of that colour, and lacks one if at most 1 % are anywhere near
it. Cores and surroundings leave a gap on purpose: whether a pizza is orange is left open.
"""

from __future__ import annotations

__all__ = ["COLOURS", "absent_colours", "colours_of_sprites"]

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from vlmfix.emoji.atlas import load_sprites

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "brown", "white", "black")
_HAS, _LACKS = 0.65, 0.01
_OPAQUE = 200


def _within(low: float, high: float) -> Callable[[Any], Any]:
    """Whether a hue in degrees lies between two; the circle closes at 360."""
    if low > high:
        return lambda hue: (hue >= low) | (hue <= high)
    return lambda hue: (hue >= low) & (hue <= high)


# Hue of the core and of the surroundings in degrees, then least saturation and the range of
# brightness of the core, 0 to 1. A dull or dark orange is a brown, or has no clear name.
_HUES = {
    "red": (_within(345, 14), _within(330, 24), 0.5, 0.4, 1.0),
    "orange": (_within(22, 40), _within(8, 52), 0.85, 0.85, 1.0),
    "yellow": (_within(46, 60), _within(34, 76), 0.5, 0.75, 1.0),
    "green": (_within(75, 155), _within(62, 180), 0.4, 0.3, 1.0),
    "blue": (_within(190, 232), _within(170, 265), 0.4, 0.4, 1.0),
    "purple": (_within(255, 295), _within(232, 335), 0.4, 0.3, 1.0),
    "brown": (_within(5, 36), _within(0, 50), 0.4, 0.25, 0.7),
}


@lru_cache(maxsize=1)
def _shares() -> dict[str, dict[str, tuple[float, float]]]:
    """Category -> colour -> share of its opaque pixels in the core and in the surroundings."""
    return {name: _shares_of(sprite) for name, sprite in load_sprites().items()}


def _shares_of(sprite: Any) -> dict[str, tuple[float, float]]:
    rgba = np.asarray(sprite, dtype=np.float64)
    hsv = np.asarray(sprite.convert("RGB").convert("HSV"), dtype=np.float64)
    hue, saturation, value = np.moveaxis(hsv[rgba[..., 3] > _OPAQUE] / 255, -1, 0)
    hue = hue * 360
    masks = {
        "white": ((saturation < 0.15) & (value > 0.85), (saturation < 0.3) & (value > 0.7)),
        "black": ((saturation < 0.4) & (value < 0.25), value < 0.4),
    }
    for colour, (core, around, pale, dark, bright) in _HUES.items():
        vivid = (saturation >= pale) & (value >= dark) & (value <= bright)
        masks[colour] = (core(hue) & vivid, around(hue) & (saturation > 0.15))
    return {c: (float(core.mean()), float(around.mean())) for c, (core, around) in masks.items()}


def colours_of_sprites() -> dict[str, str]:
    """Category -> its colour, for those that have one."""
    return {
        name: colour
        for name, shares in _shares().items()
        for colour in COLOURS
        if shares[colour][0] >= _HAS
    }


def absent_colours(name: str) -> list[str]:
    """The colours that a category lacks."""
    return [colour for colour in COLOURS if _shares()[name][colour][1] <= _LACKS]
