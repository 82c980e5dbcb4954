"""ROPE's files: five boxed objects per image, and the classes that the prompt lists.

Paper: Chen et al. 2024 (arXiv 2407.06192). Reference: sled-group/moh, data_handler.py and
constant.py. In the authors' pictures (.png) boxes and labels are drawn; where only the raw picture
is there, we draw them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmfix.errors import BadInput
from vlmfix.evals.inputs.folder import ImageFolder
from vlmfix.evals.inputs.rows import Row, read_object, read_rows, refuse_repeats, short

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["OBJECTS", "RopeData", "RopeEntry", "RopeObject", "draw_boxes"]

OBJECTS = 5
"""Per image."""

#: The authors' folders, and what the paper calls them.
FOLDERS = {"train": "seen", "validation": "unseen"}

#: The authors' files, and the class distribution of the five objects that each is about.
FILES = {
    "merged_mixed_data.json": "mixed",
    "merged_homogenous_data.json": "homogenous",
    "merged_heterogenous_data.json": "heterogenous",
    "AAAAB_data.json": "AAAAB",
    "BAAAA_data.json": "BAAAA",
}

PROMPTS = "rope_prompts.json"

NEEDS = (
    "train/ or validation/ with one or more of "
    + ", ".join(FILES)
    + ", and the pictures; from huggingface.co/datasets/sled-umich/ROPE"
)


@dataclass(frozen=True)
class RopeObject:
    """One object.

    Args:
        name: its class, in lower case.
        box: left, top, right, bottom in pixels.
    """

    name: str
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class RopeEntry:
    """One image with five objects.

    Args:
        split: such as "unseen_mixed".
        image: name of the picture with its boxes, unique in the data.
        picture: name of the picture itself, which several entries may share.
        objects: obj1 to obj5.
        classes: what the prompt lists.
    """

    split: str
    image: str
    picture: str
    objects: tuple[RopeObject, ...]
    classes: tuple[str, ...]


class RopeData(ImageFolder):
    """A folder with ROPE's files.

    A file rope_prompts.json in it replaces our prompts: {"multi": text with {classes}, "single":
    text with {classes} and {object}}.

    Attributes:
        entries: of all files that are there.
        prompts: what rope_prompts.json holds; None without it.

    Args:
        root: the folder.

    Raises:
        BadInput: none of the files is there, or one is broken; the message names file and entry.
    """

    task = "rope"
    needs = NEEDS

    def __init__(self, root: str | Path) -> None:
        folder = self.existing(root)
        found = [
            (folder / inner / file, f"{seen}_{kind}", seen)
            for inner, seen in FOLDERS.items()
            for file, kind in FILES.items()
            if (folder / inner / file).is_file()
        ]
        if not found:
            raise BadInput(f"rope: {folder} holds none of the files. It needs {NEEDS}")
        prompts = folder / PROMPTS
        self.prompts = _prompts(prompts) if prompts.is_file() else None
        read = [path for path, _, _ in found] + ([prompts] if self.prompts else [])
        super().__init__(folder, read)
        self.entries: list[RopeEntry] = []
        for path, split, seen in found:
            self.entries += [_entry(row, split, seen) for row in read_rows(path, "ROPE entries")]
        refuse_repeats([entry.image for entry in self.entries], "ROPE images")

    @cached_property
    def _of_image(self) -> dict[str, RopeEntry]:
        return {entry.image: entry for entry in self.entries}

    def _drawn(self, name: str) -> str:
        """The name of the authors' picture, with boxes in it."""
        return str(Path(self._of_image[name].picture).with_suffix(".png").as_posix())

    def find(self, name: str) -> Path | None:
        """Where the picture lies that the entry is about: the authors' own, or the raw one."""
        if name not in self._of_image:
            return super().find(name)
        return super().find(self._drawn(name)) or super().find(self._of_image[name].picture)

    def image(self, name: str) -> Image.Image:
        """The picture of an entry, with its boxes.

        Raises:
            BadInput: it is missing or cannot be decoded.
        """
        picture = super().image(name)
        if super().find(self._drawn(name)) is None:
            picture = draw_boxes(picture, [thing.box for thing in self._of_image[name].objects])
        return picture


def _prompts(path: Path) -> dict[str, str]:
    prompts = read_object(path, "ROPE prompts")
    for key, slots in {"multi": ("{classes}",), "single": ("{classes}", "{object}")}.items():
        text = prompts.get(key)
        if not isinstance(text, str) or not all(slot in text for slot in slots):
            raise BadInput(f"{path}: {key!r} must be a text with {' and '.join(slots)} in it")
    return prompts


def _entry(row: Row, split: str, seen: str) -> RopeEntry:
    picture, source = row.text("folder").lstrip("/"), row.text("data_source")
    if not Path(picture).name:
        raise BadInput(f"{row.where}: `folder` is {short(picture)}, which names no picture")
    lists = _class_lists()[seen]
    if source not in lists:
        raise BadInput(f"{row.where}: data_source {short(source)} is none of {', '.join(lists)}")
    objects = row.first("objects")
    if not isinstance(objects, list) or len(objects) != OBJECTS:
        raise BadInput(f"{row.where}: `objects` is {short(objects)}, not a list of {OBJECTS}")
    things = tuple(_object(thing, f"{row.where}, object {n}") for n, thing in enumerate(objects, 1))
    return RopeEntry(split, f"{split}/{picture}", picture, things, tuple(lists[source]))


def _object(thing: Any, where: str) -> RopeObject:
    try:
        name = thing["name"].lower()
        left, top, right, bottom = (
            float(thing["bndbox"][side]) for side in ("xmin", "ymin", "xmax", "ymax")
        )
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise BadInput(
            f"{where} has no usable {error}: expected `name` and `bndbox` with xmin, ymin, xmax, "
            "ymax"
        ) from None
    if not (-inf < left < right < inf and -inf < top < bottom < inf):
        raise BadInput(f"{where}: the box {(left, top, right, bottom)} is empty, or without end")
    return RopeObject(name, (left, top, right, bottom))


@cache
def _class_lists() -> Mapping[str, Mapping[str, Sequence[str]]]:
    """seen or unseen -> COCO or ADE -> the 50 classes of the prompt, in the authors' order."""
    text = files("vlmfix.evals").joinpath("data", "rope_classes.json").read_text(encoding="utf-8")
    lists: Mapping[str, Mapping[str, Sequence[str]]] = json.loads(text)
    return lists


def draw_boxes(
    picture: Image.Image, boxes: Sequence[tuple[float, float, float, float]]
) -> Image.Image:
    """A copy of the picture with red boxes, labelled obj1, obj2, ...

    Lines are 0.5 % of the longer side wide; a label stands on top of its box, or below the upper
    edge where there is no room.

    Args:
        picture: in RGB.
        boxes: left, top, right, bottom in pixels.
    """
    from PIL import ImageDraw, ImageFont

    drawn = picture.copy()
    pen, longer = ImageDraw.Draw(drawn), max(picture.size)
    font = ImageFont.load_default(size=max(8, round(0.03 * longer)))
    for number, (left, top, right, bottom) in enumerate(boxes, start=1):
        pen.rectangle((left, top, right, bottom), outline="red", width=max(1, round(longer / 200)))
        label = f"obj{number}"
        _, _, width, height = pen.textbbox((0, 0), label, font=font)
        x = max(0, min(left, picture.width - width))
        y = top - height if top >= height else top
        pen.rectangle((x, y, x + width, y + height), fill="black")
        pen.text((x, y), label, fill="white", font=font)
    return drawn
