"""The sprite atlas: one small picture per category, in `data/atlas.png`, with an index.

`python -m vlmfix.emoji.atlas --font NotoColorEmoji.ttf` rebuilds it; that is the only step that
needs the font (SIL Open Font License 1.1, see `data/OFL.txt`).
"""

from __future__ import annotations

__all__ = ["CELL", "build", "load_sprites", "sprite_sizes"]

import argparse
import json
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from vlmfix.emoji.catalogue import CATEGORIES, GLYPHS, NAMES
from vlmfix.errors import BadInput

if TYPE_CHECKING:
    from PIL.Image import Image

DATA = Path(__file__).parent / "data"
CELL = 64
"""Width and height of an atlas cell in pixels; a sprite's longer side fills it."""
_COLUMNS = 10
_FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")  # Debian fonts-noto-color-emoji


@lru_cache(maxsize=1)
def _index() -> dict[str, list[int]]:
    index: dict[str, list[int]] = json.loads((DATA / "atlas.json").read_text())["sprites"]
    return index


@lru_cache(maxsize=1)
def sprite_sizes() -> dict[str, tuple[int, int]]:
    """Category name -> (width, height) in the atlas, in pixels. Needs no Pillow."""
    return {name: (box[2], box[3]) for name, box in _index().items()}


@lru_cache(maxsize=1)
def load_sprites() -> dict[str, Image]:
    """Category name -> RGBA sprite, cut out of the committed atlas."""
    from PIL import Image

    with Image.open(DATA / "atlas.png") as file:
        sheet = file.convert("RGBA")
    return {n: sheet.crop((x, y, x + w, y + h)) for n, (x, y, w, h) in _index().items()}


def _hand_drawn(name: str) -> Image:
    """Draw a category for which the font has no true glyph (its surfboard carries a surfer)."""
    from PIL import Image, ImageDraw

    picture = Image.new("RGBA", (128, 128), (0, 0, 0, 0))
    draw = ImageDraw.Draw(picture)
    if name == "bench":
        for y in (30, 48):
            draw.rounded_rectangle(
                (4, y, 124, y + 12), 4, fill="#a0652d", outline="#5f3a16", width=3
            )
        draw.rounded_rectangle((0, 72, 128, 86), 4, fill="#b9783a", outline="#5f3a16", width=3)
        for x in (14, 104):
            draw.rectangle((x, 30, x + 8, 112), fill="#4a4a4a")
    elif name == "surfboard":
        draw.ellipse((44, 2, 84, 126), fill="#ffd54a", outline="#b36a00", width=4)
        draw.rectangle((60, 8, 68, 120), fill="#e0413a")
        draw.line((46, 70, 82, 70), fill="#1f7fd1", width=9)
        picture = picture.rotate(-25, resample=Image.Resampling.BICUBIC, expand=True)
    elif name == "snowboard":
        draw.rounded_rectangle((42, 2, 86, 126), 22, fill="#7a3fc4", outline="#35155f", width=4)
        for y in (34, 84):
            draw.rectangle((38, y, 90, y + 10), fill="#20242b")
        draw.ellipse((54, 54, 74, 74), fill="#6ef0d0")
        picture = picture.rotate(35, resample=Image.Resampling.BICUBIC, expand=True)
    elif name == "refrigerator":
        draw.rounded_rectangle((28, 2, 100, 124), 8, fill="#dfe9ef", outline="#62737f", width=4)
        draw.line((28, 46, 100, 46), fill="#62737f", width=4)
        draw.rectangle((38, 18, 44, 38), fill="#43525c")
        draw.rectangle((38, 56, 44, 92), fill="#43525c")
    else:
        raise BadInput(f"no drawing and no glyph for category {name!r}: add one to atlas.py")
    return picture


def _from_font(name: str, font: Path) -> Image:
    from PIL import Image, ImageDraw, ImageFont

    try:
        face = ImageFont.truetype(str(font), 109)  # the only size that the bitmap font holds
    except OSError as error:
        raise BadInput(
            f"cannot read the emoji font {font}: {error}. "
            "Install fonts-noto-color-emoji, or give its file with --font"
        ) from error
    picture = Image.new("RGBA", (136, 128), (0, 0, 0, 0))
    ImageDraw.Draw(picture).text((0, 0), GLYPHS[name] or "", font=face, embedded_color=True)
    # Two glyphs show a second COCO category, which would make answers about it false.
    if name == "fork":  # fork and knife, side by side
        picture = picture.crop((0, 0, 68, 128))
    elif name == "tennis racket":  # racket and ball
        picture.paste((0, 0, 0, 0), (0, 0, 50, 60))
    return picture


def build(font: Path = _FONT, folder: Path = DATA) -> None:
    """Write `atlas.png` and `atlas.json` into `folder`. Raises BadInput if the font is unusable."""
    from PIL import Image

    rows = -(-len(NAMES) // _COLUMNS)
    sheet = Image.new("RGBA", (_COLUMNS * CELL, rows * CELL), (0, 0, 0, 0))
    index: dict[str, list[int]] = {}
    for number, category in enumerate(CATEGORIES):
        name = category.name
        sprite = _from_font(name, font) if category.glyph else _hand_drawn(name)
        sprite = sprite.crop(sprite.getbbox())
        sprite.thumbnail((CELL, CELL), Image.Resampling.LANCZOS)
        x, y = number % _COLUMNS * CELL, number // _COLUMNS * CELL
        sheet.paste(sprite, (x, y))
        index[name] = [x, y, *sprite.size]
    folder.mkdir(parents=True, exist_ok=True)
    sheet.save(folder / "atlas.png", optimize=True)
    about = "Noto Color Emoji glyphs (SIL OFL 1.1, OFL.txt), scaled; a few sprites drawn by vlmfix"
    (folder / "atlas.json").write_text(json.dumps({"about": about, "sprites": index}) + "\n")


def main() -> None:
    """Command line of `python -m vlmfix.emoji.atlas`."""
    parser = argparse.ArgumentParser(description="Rebuild the sprite atlas from the emoji font.")
    parser.add_argument("--font", type=Path, default=_FONT)
    parser.add_argument(
        "--output", type=Path, default=DATA, help="folder for atlas.png, atlas.json"
    )
    arguments = parser.parse_args()
    build(arguments.font, arguments.output)
    print(f"wrote {len(NAMES)} sprites to {arguments.output / 'atlas.png'}")


if __name__ == "__main__":
    main()
