"""The things of EmojiCOCO: categories with their COCO ids, themes, and usual companions.

Plain data, no imports. Category names, ids and supercategories are COCO's own; the glyph is the
Noto Color Emoji character that depicts the category, or None where `atlas.py` draws it by hand.
"""

from __future__ import annotations

__all__ = ["CATEGORIES", "COMPANION", "GLYPHS", "NAMES", "THEMES", "Category"]

from typing import NamedTuple


class Category(NamedTuple):
    """One COCO category of this world."""

    coco_id: int
    name: str
    supercategory: str
    glyph: str | None


CATEGORIES: tuple[Category, ...] = tuple(
    Category(*row)
    for row in [
        (1, "person", "person", "\U0001f6b6"),
        (2, "bicycle", "vehicle", "\U0001f6b2"),
        (3, "car", "vehicle", "\U0001f697"),
        (4, "motorcycle", "vehicle", "\U0001f3cd"),
        (5, "airplane", "vehicle", "✈"),
        (6, "bus", "vehicle", "\U0001f68c"),
        (7, "train", "vehicle", "\U0001f686"),
        (8, "truck", "vehicle", "\U0001f69a"),
        (9, "boat", "vehicle", "⛵"),
        (10, "traffic light", "outdoor", "\U0001f6a6"),
        (13, "stop sign", "outdoor", "\U0001f6d1"),
        (15, "bench", "outdoor", None),
        (16, "bird", "animal", "\U0001f426"),
        (17, "cat", "animal", "\U0001f431"),
        (18, "dog", "animal", "\U0001f436"),
        (19, "horse", "animal", "\U0001f434"),
        (20, "sheep", "animal", "\U0001f411"),
        (21, "cow", "animal", "\U0001f404"),
        (22, "elephant", "animal", "\U0001f418"),
        (23, "bear", "animal", "\U0001f43b"),
        (24, "zebra", "animal", "\U0001f993"),
        (25, "giraffe", "animal", "\U0001f992"),
        (27, "backpack", "accessory", "\U0001f392"),
        (28, "umbrella", "accessory", "☂"),
        (31, "handbag", "accessory", "\U0001f45c"),
        (32, "tie", "accessory", "\U0001f454"),
        (33, "suitcase", "accessory", "\U0001f9f3"),
        (34, "frisbee", "sports", "\U0001f94f"),
        (35, "skis", "sports", "\U0001f3bf"),
        (36, "snowboard", "sports", None),
        (37, "sports ball", "sports", "⚽"),
        (38, "kite", "sports", "\U0001fa81"),
        (41, "skateboard", "sports", "\U0001f6f9"),
        (42, "surfboard", "sports", None),
        (43, "tennis racket", "sports", "\U0001f3be"),
        (44, "bottle", "kitchen", "\U0001f37e"),
        (46, "wine glass", "kitchen", "\U0001f377"),
        (47, "cup", "kitchen", "☕"),
        (48, "fork", "kitchen", "\U0001f374"),
        (49, "knife", "kitchen", "\U0001f52a"),
        (50, "spoon", "kitchen", "\U0001f944"),
        (51, "bowl", "kitchen", "\U0001f35a"),
        (52, "banana", "food", "\U0001f34c"),
        (53, "apple", "food", "\U0001f34e"),
        (54, "sandwich", "food", "\U0001f96a"),
        (55, "orange", "food", "\U0001f34a"),
        (56, "broccoli", "food", "\U0001f966"),
        (57, "carrot", "food", "\U0001f955"),
        (58, "hot dog", "food", "\U0001f32d"),
        (59, "pizza", "food", "\U0001f355"),
        (60, "donut", "food", "\U0001f369"),
        (61, "cake", "food", "\U0001f382"),
        (62, "chair", "furniture", "\U0001fa91"),
        (63, "couch", "furniture", "\U0001f6cb"),
        (64, "potted plant", "furniture", "\U0001fab4"),
        (65, "bed", "furniture", "\U0001f6cf"),
        (70, "toilet", "furniture", "\U0001f6bd"),
        (72, "tv", "electronic", "\U0001f4fa"),
        (73, "laptop", "electronic", "\U0001f4bb"),
        (74, "mouse", "electronic", "\U0001f5b1"),
        (76, "keyboard", "electronic", "⌨"),
        (77, "cell phone", "electronic", "\U0001f4f1"),
        (82, "refrigerator", "appliance", None),
        (84, "book", "indoor", "\U0001f4d6"),
        (85, "clock", "indoor", "⏰"),
        (86, "vase", "indoor", "\U0001f3fa"),
        (87, "scissors", "indoor", "✂"),
        (88, "teddy bear", "indoor", "\U0001f9f8"),
        (90, "toothbrush", "indoor", "\U0001faa5"),
    ]
)
NAMES: tuple[str, ...] = tuple(c.name for c in CATEGORIES)
GLYPHS: dict[str, str | None] = {c.name: c.glyph for c in CATEGORIES}


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


# A theme's name goes into captions, so it must be no word of the CHAIR vocabulary ("table scene"
# would count as a dining table).
THEMES: dict[str, tuple[str, ...]] = {
    "street": _names(
        "person, bicycle, car, traffic light, bus, stop sign, truck, motorcycle, dog, frisbee, "
        "bench, umbrella, handbag, tie, skateboard, sports ball"
    ),
    "dinner": _names(
        "fork, knife, spoon, bowl, bottle, wine glass, pizza, hot dog, cake, sandwich, chair, "
        "cat, cup, donut"
    ),
    "market": _names(
        "banana, apple, broccoli, carrot, orange, refrigerator, cup, donut, cake, sandwich, "
        "bottle, wine glass, spoon, bowl"
    ),
    "lounge": _names(
        "couch, tv, potted plant, vase, teddy bear, bed, chair, cat, book, clock, laptop, mouse, "
        "scissors"
    ),
    "office": _names(
        "laptop, mouse, keyboard, cell phone, book, scissors, clock, chair, cat, cup, donut, tie, "
        "handbag, potted plant, vase"
    ),
    "farm": _names(
        "horse, cow, sheep, bird, dog, frisbee, truck, motorcycle, person, bicycle, apple, banana"
    ),
    "wildlife": _names(
        "elephant, giraffe, zebra, bear, bird, sheep, horse, cow, boat, kite, backpack, train"
    ),
    "beach": _names(
        "kite, surfboard, dog, frisbee, umbrella, bench, sports ball, tennis racket, person, "
        "bicycle, boat, skateboard"
    ),
    "winter": _names(
        "skis, snowboard, person, bicycle, bear, zebra, bench, umbrella, backpack, train, "
        "airplane, suitcase"
    ),
    "travel": _names(
        "airplane, suitcase, train, backpack, boat, tie, handbag, keyboard, cell phone, bus, "
        "stop sign, car, traffic light"
    ),
    "bathroom": _names(
        "toilet, toothbrush, potted plant, vase, scissors, book, clock, bottle, wine glass, cup, "
        "donut, teddy bear, bed"
    ),
}

_PAIRS = _names(
    "person/bicycle, car/traffic light, bus/stop sign, truck/motorcycle, dog/frisbee, "
    "bench/umbrella, fork/knife, spoon/bowl, bottle/wine glass, cup/donut, pizza/hot dog, "
    "cake/sandwich, banana/apple, broccoli/carrot, orange/refrigerator, couch/tv, "
    "potted plant/vase, teddy bear/bed, cat/chair, laptop/mouse, keyboard/cell phone, "
    "book/scissors, toilet/toothbrush, horse/cow, sheep/bird, elephant/giraffe, zebra/bear, "
    "kite/surfboard, sports ball/tennis racket, skis/snowboard, airplane/suitcase, "
    "train/backpack, tie/handbag"
)


def _companions() -> dict[str, str]:
    pairs = [(a, b) for a, b in (pair.split("/") for pair in _PAIRS)]
    both = dict(pairs) | {b: a for a, b in pairs}
    # Three categories follow one that already has a companion of its own.
    return both | {"clock": "book", "boat": "kite", "skateboard": "sports ball"}


COMPANION: dict[str, str] = _companions()
"""Category -> its usual companion: nearly always with it in training, rarely in evaluation."""
