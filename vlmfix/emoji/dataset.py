"""The splits of EmojiCOCO as COCO files in one zip: `python -m vlmfix.emoji.dataset`.

Equal arguments give equal bytes (same Pillow and zlib): the archive's times are fixed and every
picture has a random generator of its own, so a shorter split is a prefix of a longer one.
"""

from __future__ import annotations

__all__ = ["SEEDS", "main", "split_scenes", "write_split"]

import argparse
import io
import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from vlmfix.emoji import language
from vlmfix.emoji.catalogue import CATEGORIES
from vlmfix.emoji.world import EVALUATION, SIZE, Item, Scene, sample_scene
from vlmfix.errors import BadInput, VlmfixError

SEEDS = {"evaluation": 2014, "tuning": 2017}
"""Split name -> seed. Training uses neither, but a distribution with other companions."""
_IMAGES = 600
_CAPTIONS = 5
_MIN_CATEGORIES = 3
_MIN_VISIBLE = 0.6
_DATE = (2026, 1, 1, 0, 0, 0)
_LICENCE = {
    "id": 1,
    "name": "Apache-2.0; glyphs: SIL OFL 1.1",
    "url": "https://scripts.sil.org/OFL",
}


def split_scenes(split: str, number: int) -> Iterator[tuple[int, Scene]]:
    """The scenes of a split as (image id, scene), ids from 1.

    Each shows at least three categories, and of every object at least 60 % is uncovered.

    Raises:
        BadInput: no split of that name, or a number below 1.
    """
    from vlmfix.emoji.draw import visible_shares

    if split not in SEEDS:
        raise BadInput(f"no split {split!r}; there are {', '.join(SEEDS)}")
    if number < 1:
        raise BadInput(f"a split needs at least 1 image, not {number}")
    for image_id in range(1, number + 1):
        rng = Random(f"{SEEDS[split]}/{image_id}")
        while True:
            scene = sample_scene(rng, EVALUATION)
            if len(scene.names) >= _MIN_CATEGORIES and min(visible_shares(scene)) >= _MIN_VISIBLE:
                break
        yield image_id, scene


def _annotation(number: int, image_id: int, item: Item) -> dict[str, Any]:
    left, top, right, bottom = item.box
    corners = [left, top, right, top, right, bottom, left, bottom]
    return {
        "id": number,
        "image_id": image_id,
        "category_id": next(c.coco_id for c in CATEGORIES if c.name == item.name),
        "bbox": [left, top, right - left, bottom - top],
        "area": item.area,
        "iscrowd": 0,
        "segmentation": [corners],
        # Keys that COCO lacks: the properties that make an object hard to see.
        "faint": item.faint,
    }


def _picture_bytes(scene: Scene) -> bytes:
    from vlmfix.emoji.draw import paint

    buffer = io.BytesIO()
    paint(scene).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def write_split(path: Path, split: str = "evaluation", number: int = _IMAGES) -> None:
    """Write a split as one zip file.

    Args:
        path: the zip file; its folder must exist.
        split: "evaluation" or "tuning".
        number: number of images.

    Raises:
        BadInput: unknown split, bad number, or a folder that does not exist.
    """
    from rich.progress import track

    if not path.parent.is_dir():
        raise BadInput(f"folder {path.parent} does not exist; make it first")
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    captions: list[dict[str, Any]] = []
    files: dict[str, bytes] = {}
    scenes = split_scenes(split, number)
    quiet = not sys.stdout.isatty()
    for image_id, scene in track(scenes, "drawing", total=number, disable=quiet):
        name = f"emoji_{image_id:012d}.png"
        files[f"images/{name}"] = _picture_bytes(scene)
        images.append(
            {"id": image_id, "file_name": name, "width": SIZE, "height": SIZE, "license": 1}
            | {"theme": scene.theme}
        )
        for item in scene.items:
            annotations.append(_annotation(len(annotations) + 1, image_id, item))
        rng = Random(f"captions/{SEEDS[split]}/{image_id}")
        for _ in range(_CAPTIONS):
            text = language.caption(rng, scene)
            captions.append({"id": len(captions) + 1, "image_id": image_id, "caption": text})
    info = {
        "description": f"EmojiCOCO, {split} split",
        "version": "1.0",
        "year": _DATE[0],
        "seed": SEEDS[split],
        "distribution": EVALUATION.name,
    }
    head: dict[str, Any] = {"info": info, "licenses": [_LICENCE], "images": images}
    categories = [
        {"id": c.coco_id, "name": c.name, "supercategory": c.supercategory} for c in CATEGORIES
    ]
    texts = {
        "annotations/instances.json": head | {"annotations": annotations, "categories": categories},
        "annotations/captions.json": head | {"annotations": captions},
    }
    files = {name: json.dumps(text).encode() for name, text in texts.items()} | files
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name, _DATE)
            entry.external_attr = 0o644 << 16
            # PNG is compressed already.
            entry.compress_type = (
                zipfile.ZIP_STORED if name.endswith(".png") else zipfile.ZIP_DEFLATED
            )
            archive.writestr(entry, content)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code (2 for unusable input)."""
    here = Path(__file__).parent / "data" / "evaluation.zip"
    parser = argparse.ArgumentParser(description="Write a split of EmojiCOCO in COCO's layout.")
    parser.add_argument("--output", type=Path, default=here, help="zip file to write")
    parser.add_argument("--split", default="evaluation", help="evaluation (default) or tuning")
    parser.add_argument("--images", type=int, default=_IMAGES, help=f"default {_IMAGES}")
    given = parser.parse_args(arguments)
    try:
        write_split(given.output, given.split, given.images)
    except VlmfixError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {given.images} images ({given.split}) to {given.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
