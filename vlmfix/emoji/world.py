"""What can be in a picture: sampling of scenes, with everything that is true of them.

A scene is plain data; `draw.py` paints it, `language.py` talks about it. All randomness comes
from the `random.Random` given by the caller, so equal seeds give equal scenes. The two
distributions differ in one dial only: how often an object's usual companion is there.
"""

from __future__ import annotations

__all__ = ["EVALUATION", "SIZE", "TRAINING", "Distribution", "Item", "Scene", "sample_scene"]

from dataclasses import dataclass
from random import Random

from vlmfix.emoji.atlas import CELL, sprite_sizes
from vlmfix.emoji.catalogue import COMPANION, THEMES

SIZE = 112
"""Width and height of a picture in pixels."""
_SMALLEST, _LARGEST = 13, 36
_MAX_OBJECTS = 6
_MAX_OVERLAP = 0.3
_TRIES = 16

Box = tuple[int, int, int, int]
"""(left, top, right, bottom) in pixels, right and bottom exclusive."""


@dataclass(frozen=True)
class Distribution:
    """How scenes are sampled."""

    name: str
    companion: float
    """Probability that an independent object brings its companion along. Counted over all
    objects p becomes 2p / (1 + p): both members of a pair have their companion next to them."""
    seeds: tuple[int, ...]
    """Numbers of independent objects, drawn uniformly."""
    empty: float = 0.0
    """Share of scenes without any object."""


# An object of these has its companion next to it in 86 % and in 34 % of the cases. The numbers of
# seeds make both show about 4.5 categories per scene.
TRAINING = Distribution("training", 0.8, (2, 2, 3, 3, 3), empty=0.02)
EVALUATION = Distribution("evaluation", 0.22, (3, 4, 4, 4))


@dataclass(frozen=True)
class Item:
    """One object in a scene. `size` is the sprite's longer side in pixels."""

    name: str
    box: Box
    size: int
    flipped: bool
    faint: bool
    """Half transparent."""

    @property
    def area(self) -> int:
        """Area of the box in square pixels."""
        return (self.box[2] - self.box[0]) * (self.box[3] - self.box[1])


@dataclass(frozen=True)
class Scene:
    """A theme, its objects in painting order (later ones on top), and the backdrop."""

    theme: str
    items: tuple[Item, ...]
    colour: tuple[int, int, int]
    shapes: tuple[tuple[bool, Box, tuple[int, int, int]], ...]
    """Backdrop shapes: (is an ellipse, box, colour)."""

    @property
    def names(self) -> list[str]:
        """Distinct categories, most prominent first."""
        ordered = sorted(self.items, key=lambda item: -item.area)
        return list(dict.fromkeys(item.name for item in ordered))


def _overlap(a: Box, b: Box) -> int:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0


def _choose_objects(rng: Random, theme: str, distribution: Distribution) -> list[str]:
    pool = THEMES[theme]
    chosen: list[str] = []
    # A companion comes through the dial alone: a seed next to its companion would raise the rate.
    for _ in range(rng.choice(distribution.seeds)):
        free = [n for n in pool if n not in chosen and COMPANION[n] not in chosen]
        free = [n for n in free if n not in {COMPANION[c] for c in chosen}]
        if not free or len(chosen) >= _MAX_OBJECTS:
            break
        seed = rng.choice(free)
        chosen.append(seed)
        companion = COMPANION[seed]
        if companion in pool and rng.random() < distribution.companion:
            chosen.append(companion)
    return chosen[:_MAX_OBJECTS]


def _place(rng: Random, name: str, others: list[Item]) -> Item | None:
    """Find room for one object: no box may hide more than a part of another. None if crowded."""
    size = rng.randint(_SMALLEST, _LARGEST)
    width, height = sprite_sizes()[name]
    width = max(3, round(width * size / CELL))
    height = max(3, round(height * size / CELL))
    flipped, faint = rng.random() < 0.5, rng.random() < 0.3
    for _ in range(_TRIES):
        x, y = rng.randint(0, SIZE - width), rng.randint(0, SIZE - height)
        box = (x, y, x + width, y + height)
        if all(
            _overlap(box, other.box) <= _MAX_OVERLAP * min(width * height, other.area)
            for other in others
        ):
            return Item(name, box, size, flipped, faint)
    return None


def sample_scene(rng: Random, distribution: Distribution = TRAINING) -> Scene:
    """Draw a scene: a theme, objects of it with or without companions, a place for each.

    Args:
        rng: source of all randomness; it is advanced.
        distribution: TRAINING (companions present) or EVALUATION (mostly absent).
    """
    theme = rng.choice(list(THEMES))
    empty = distribution.empty > 0 and rng.random() < distribution.empty
    objects = [] if empty else _choose_objects(rng, theme, distribution)
    objects += [name for name in objects if rng.random() < 0.12]  # a second one of its kind
    rng.shuffle(objects)
    colour = (rng.randint(120, 245), rng.randint(120, 245), rng.randint(120, 245))
    shapes = []
    for _ in range(rng.randint(0, 5)):
        x, y = rng.randint(0, SIZE), rng.randint(0, SIZE)
        box = (x, y, x + rng.randint(4, 50), y + rng.randint(4, 50))
        red, green, blue = (max(0, min(255, v + rng.randint(-55, 55))) for v in colour)
        shapes.append((rng.random() < 0.5, box, (red, green, blue)))
    items: list[Item] = []
    for name in objects:
        item = _place(rng, name, items)
        if item is not None:
            items.append(item)
    return Scene(theme, tuple(items), colour, tuple(shapes))
