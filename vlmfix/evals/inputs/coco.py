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
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from vlmfix.errors import BadInput
from vlmfix.evals.inputs.folder import ImageFolder
from vlmfix.evals.inputs.pictures import UNREADABLE, Pictures, only_one
from vlmfix.evals.inputs.rows import decode_text, parse_json

__all__ = ["Box", "CocoData"]


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

    def _read_instances(self) -> None:
        content = self._json(self.instances_name, "images", "annotations", "categories")
        where = f"{self.source}: {self.instances_name}"
        try:
            self.categories: dict[int, str] = {
                int(row["id"]): str(row["name"]) for row in content["categories"]
            }
            self.files: dict[int, str] = {
                int(row["id"]): str(row["file_name"])
                for row in sorted(content["images"], key=lambda row: int(row["id"]))
            }
            rows = sorted(
                (int(row["image_id"]), int(row["id"]), int(row["category_id"]))
                for row in content["annotations"]
            )
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput(f"{where} has a row without a usable {error}: repair the file") from None
        unknown = sorted({image for image, _, _ in rows} - set(self.files))
        if unknown:
            raise BadInput(f"{where} annotates images it does not list: {unknown[:10]}")
        strange = sorted({category for _, _, category in rows} - set(self.categories))
        if strange:
            raise BadInput(f"{where} uses categories it does not list: {strange[:10]}")
        # Order of first occurrence matters: POPE asks about the first objects of an image.
        self.objects: dict[int, list[str]] = {image: [] for image in self.files}
        for image, _, category in rows:
            name = self.categories[category]
            if name not in self.objects[image]:
                self.objects[image].append(name)

    @cached_property
    def captions(self) -> dict[int, list[str]]:
        """Captions of every image by image id, in the order of the file; empty without a file."""
        if not self.captions_name:
            return {}
        content = self._json(self.captions_name, "annotations")
        captions: dict[int, list[str]] = {}
        try:
            for row in content["annotations"]:
                captions.setdefault(int(row["image_id"]), []).append(str(row["caption"]))
        except (KeyError, TypeError, ValueError) as error:
            where = f"{self.source}: {self.captions_name}"
            raise BadInput(f"{where} has a row without a usable {error}: repair the file") from None
        return captions

    @cached_property
    def boxes(self) -> dict[int, list[Box]]:
        """The boxes of every image by image id, in the order of the annotations' ids.

        Raises:
            BadInput: an annotation without a box.
        """
        content = self._json(self.instances_name, "annotations")
        found: dict[int, list[Box]] = {image: [] for image in self.objects}
        with self._usable("box", "`bbox` in every annotation"):
            for row in sorted(content["annotations"], key=lambda row: int(row["id"])):
                left, top, width, height = map(float, row["bbox"])
                name = self.categories[int(row["category_id"])]
                found[int(row["image_id"])].append(Box(name, left, top, width, height, row))
        return found

    @cached_property
    def largest(self) -> dict[int, dict[str, float]]:
        """Share of the image, from 0 to 1, that an object's largest box covers.

        By image id and object, in the order of `objects`. The box of a crowd is one box.

        Raises:
            BadInput: an annotation without a box, or an image without its size.
        """
        content = self._json(self.instances_name, "images")
        shares = {image: dict.fromkeys(names, 0.0) for image, names in self.objects.items()}
        boxes_of = self.boxes
        with self._usable("size", "`width` and `height` in every image"):
            sizes = {int(row["id"]): row["width"] * row["height"] for row in content["images"]}
            for image, boxes in boxes_of.items():
                for box in boxes:
                    share = box.width * box.height / sizes[image]
                    shares[image][box.name] = max(shares[image][box.name], share)
        return shares

    @contextmanager
    def _usable(self, what: str, needs: str) -> Iterator[None]:
        """Turn the errors of a broken row into one that names the file."""
        try:
            yield
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise BadInput(
                f"{self.source}: {self.instances_name} has a row without a usable {what} "
                f"({error}): what is asked here needs {needs}"
            ) from None

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
