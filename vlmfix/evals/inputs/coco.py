"""COCO-format data: a folder or a .zip with annotations and images, read lazily.

Expected layout, at the top or one folder down:

    annotations/instances*.json     images, annotations, categories
    annotations/captions*.json      optional
    images/ or val2014/ ...         the pictures, found by their `file_name`, the full path first;
                                    one that fits different pictures is refused

Source of the format: https://cocodataset.org/#format-data
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator, Mapping
from functools import cached_property
from math import isfinite
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from vlmfix.errors import BadInput
from vlmfix.evals.inputs.folder import ImageFolder
from vlmfix.evals.inputs.pictures import UNREADABLE, Pictures, only_one
from vlmfix.evals.inputs.rows import Row, decode_text, parse_json, refuse_repeats, short

__all__ = ["Box", "CocoData"]


def _is_length(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)


class Box(NamedTuple):
    """One annotated object.

    Args:
        name: its category.
        left: in pixels, as `top`, `width` and `height`.
        top: from the upper edge.
        width: of the box.
        height: of the box.
        row: the annotation as the file has it.
    """

    name: str
    left: float
    top: float
    width: float
    height: float
    row: Mapping[str, Any]

    @property
    def area(self) -> float:
        """In square pixels."""
        return self.width * self.height


class CocoData(Pictures):
    """One COCO-format data set.

    Args:
        source: a folder or a .zip file.

    Raises:
        BadInput: nothing there, no instances file, several that fit, or a file that is not COCO.
    """

    def __init__(self, source: str | Path) -> None:
        self.source = self.place = Path(source)
        self.remedy = f"put them into {self.source / 'images'}"
        if not self.source.exists():
            raise BadInput(f"no data at {self.source}: pass a folder or a .zip in COCO format")
        self._zip: zipfile.ZipFile | None = None
        if self.source.is_file():
            try:
                self._zip = zipfile.ZipFile(self.source)
            except zipfile.BadZipFile:
                raise BadInput(
                    f"{self.source} is neither a folder nor a readable .zip: pass a folder or a "
                    ".zip that holds annotations/instances*.json"
                ) from None
        self.instances_name = self._pick("instances")
        self.captions_name = self._pick("captions")
        self._read_instances()

    @classmethod
    def open(cls, path: str | Path | None) -> CocoData:
        """The data at `path`; None: the bundled evaluation images (`Task.open` of COCO tasks)."""
        if path is None:
            from vlmfix import emoji

            path = emoji.evaluation_split()
        return cls(path)

    @property
    def name(self) -> str:
        """Name of the folder or .zip."""
        return self.source.name

    def _listing(self) -> Iterator[str]:
        """Names of the JSON files at the top, in annotations/, or one folder down."""
        if self._zip is not None:
            yield from (name for name in self._zip.namelist() if name.endswith(".json"))
            return
        for pattern in ("*.json", "annotations/*.json", "*/annotations/*.json"):
            for path in sorted(self.source.glob(pattern)):
                yield path.relative_to(self.source).as_posix()

    def _pick(self, kind: str) -> str:
        names = sorted({n for n in self._listing() if PurePosixPath(n).name.startswith(kind)})
        if kind == "captions" and len(names) > 1:
            # The captions must speak of the same images as the instances.
            twin = PurePosixPath(self.instances_name).name.replace("instances", "captions", 1)
            names = [n for n in names if PurePosixPath(n).name == twin]
        elif len(names) > 1:
            # Unpacked COCO annotations hold train and val; every protocol here asks val.
            names = [n for n in names if "val" in PurePosixPath(n).name] or names
        if len(names) > 1:
            raise BadInput(
                f"{self.source} holds several {kind} files ({', '.join(names)}): keep one of them"
            )
        if not names and kind == "instances":
            raise BadInput(
                f"{self.source} holds no annotations/instances*.json: it is not COCO-format data"
            )
        return names[0] if names else ""

    def _bytes(self, name: str) -> bytes:
        if self._zip is not None:
            return self._zip.read(name)
        return (self.source / name).read_bytes()

    def _json(self, name: str, *keys: str) -> dict[str, Any]:
        where = f"{self.source}: {name}"
        try:
            text = decode_text(self._bytes(name), where, "COCO annotations")
        except UNREADABLE as error:
            raise BadInput(f"{where} cannot be read ({error}): fetch or write it again") from None
        content = parse_json(text, where, "fetch or write it again")
        missing = [key for key in keys if not isinstance(content, dict) or key not in content]
        if missing:
            raise BadInput(f"{where} has no {', '.join(missing)}: it is not a COCO-format file")
        return dict(content)

    def _rows(self, name: str, key: str, content: Mapping[str, Any]) -> list[Row]:
        """The objects of one list of a COCO file, each with its place."""
        where = f"{self.source}: {name}, {key}"
        rows = content[key]
        if not isinstance(rows, list):
            raise BadInput(f"{where} is {short(rows)}, which is no list: repair the file")
        for number, row in enumerate(rows, start=1):
            if not isinstance(row, dict):
                raise BadInput(f"{where}, item {number} is {short(row)}, which is no object")
        return [Row(f"{where}, item {number}", row) for number, row in enumerate(rows, start=1)]

    def _read_instances(self) -> None:
        name = self.instances_name
        content = self._json(name, "images", "annotations", "categories")
        kinds = self._rows(name, "categories", content)
        images = self._rows(name, "images", content)
        where = f"{self.source}: {name}"
        refuse_repeats([row.number("id") for row in kinds], f"{where}, categories: id")
        refuse_repeats([row.number("id") for row in images], f"{where}, images: id")
        self.categories: dict[int, str] = {row.number("id"): row.text("name") for row in kinds}
        self.files: dict[int, str] = dict(
            sorted((row.number("id"), row.text("file_name")) for row in images)
        )
        rows = sorted(
            (row.number("image_id"), row.number("id"), row.number("category_id"))
            for row in self._rows(name, "annotations", content)
        )
        unknown = sorted({image for image, _, _ in rows} - set(self.files))
        if unknown:
            raise BadInput(f"{where} annotates images it does not list: {unknown[:10]}")
        strange = sorted({category for _, _, category in rows} - set(self.categories))
        if strange:
            raise BadInput(f"{where} uses categories it does not list: {strange[:10]}")
        # Order of first occurrence matters: POPE asks about the first objects of an image.
        self.objects: dict[int, list[str]] = {image: [] for image in self.files}
        for image, _, category in rows:
            kind = self.categories[category]
            if kind not in self.objects[image]:
                self.objects[image].append(kind)

    @cached_property
    def captions(self) -> dict[int, list[str]]:
        """Captions of every image by image id, in the order of the file; empty without a file."""
        if not self.captions_name:
            return {}
        content = self._json(self.captions_name, "annotations")
        captions: dict[int, list[str]] = {}
        for row in self._rows(self.captions_name, "annotations", content):
            captions.setdefault(row.number("image_id"), []).append(row.text("caption"))
        return captions

    @cached_property
    def boxes(self) -> dict[int, list[Box]]:
        """The boxes of every image by image id, in the order of the annotations' ids.

        Raises:
            BadInput: an annotation without a box.
        """
        name = self.instances_name
        content = self._json(name, "annotations")
        found: dict[int, list[Box]] = {image: [] for image in self.objects}
        rows = self._rows(name, "annotations", content)
        for row in sorted(rows, key=lambda row: row.number("id")):
            sides = row.first("bbox")
            if not isinstance(sides, list) or len(sides) != 4 or not all(map(_is_length, sides)):
                raise BadInput(
                    f"{row.where} is without a usable box (`bbox` is {short(sides)}): what is "
                    "asked here needs `bbox` in every annotation"
                )
            kind, (left, top, width, height) = row.number("category_id"), map(float, sides)
            box = Box(self.categories[kind], left, top, width, height, row.values)
            found[row.number("image_id")].append(box)
        return found

    @cached_property
    def largest(self) -> dict[int, dict[str, float]]:
        """Share of the image, from 0 to 1, that an object's largest box covers.

        By image id and object, in the order of `objects`. The box of a crowd is one box.

        Raises:
            BadInput: an annotation without a box, or an image without its size.
        """
        boxes_of = self.boxes
        content = self._json(self.instances_name, "images")
        shares = {image: dict.fromkeys(names, 0.0) for image, names in self.objects.items()}
        sizes = {}
        for row in self._rows(self.instances_name, "images", content):
            size = [row.first(side) for side in ("width", "height")]
            if not all(_is_length(side) and side > 0 for side in size):
                raise BadInput(
                    f"{row.where} is without a usable size ({short(size)}): what is asked here "
                    "needs `width` and `height` in every image"
                )
            sizes[row.number("id")] = size[0] * size[1]
        for image, boxes in boxes_of.items():
            for box in boxes:
                shares[image][box.name] = max(shares[image][box.name], box.area / sizes[image])
        return shares

    @cached_property
    def sha256(self) -> str:
        """Fingerprint: of the .zip, or of the annotation files of a folder."""
        digest = hashlib.sha256()
        if self._zip is not None:
            with self.source.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        else:
            for name in filter(None, (self.instances_name, self.captions_name)):
                digest.update(self._bytes(name))
        return digest.hexdigest()

    @cached_property
    def _members(self) -> dict[str, list[str]]:
        """Names inside the .zip by their last part."""
        assert self._zip is not None
        found: dict[str, list[str]] = {}
        for name in self._zip.namelist():
            found.setdefault(PurePosixPath(name).name, []).append(name)
        return found

    def _find(self, file_name: str) -> str | None:
        if self._zip is None:
            found = self._pictures.find(file_name)
            return None if found is None else found.relative_to(self.source).as_posix()
        wanted = PurePosixPath(file_name)
        places = [
            name
            for name in self._members.get(wanted.name, ())
            if PurePosixPath(name).parts[-len(wanted.parts) :] == wanted.parts
        ]
        return only_one(file_name, places, self._bytes, self.source)

    @cached_property
    def _pictures(self) -> ImageFolder:
        """The pictures of a folder data set."""
        return ImageFolder(self.source)

    def holds(self, name: str) -> bool:
        """Whether there is a picture with this `file_name`; raises BadInput where several fit."""
        return self._find(name) is not None

    def content(self, name: str) -> bytes:
        """The file of a picture that is there."""
        return self._bytes(self._find(name) or name)
