"""A benchmark's folder: its pictures by the names that its own files use."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cached_property
from os.path import isfile
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, ClassVar

from vlmfix.errors import BadInput
from vlmfix.evals.inputs.pictures import Pictures, only_one

if TYPE_CHECKING:
    from typing import Self


__all__ = ["ImageFolder"]


class ImageFolder(Pictures):
    """The data of one benchmark; what else the benchmark brings is up to subclasses.

    The name of a picture may lead through folders. It is looked for in the folder itself, then in
    those below it, two levels deep, because every download unpacks a little differently. Different
    pictures of one name in several of those are refused.

    Attributes:
        task: the benchmark's name.
        needs: which files it needs, and where they come from.

    Args:
        root: the folder.
        files: files that decide the questions and their truth; they make the fingerprint.
    """

    remedy = "unpack the benchmark's pictures into it"
    task: ClassVar[str] = ""
    needs: ClassVar[str] = ""

    @classmethod
    def open(cls, path: str | Path | None) -> Self:
        """The data in a folder; there is none bundled (`Task.open`).

        Raises:
            BadInput: None, no folder, or files that are missing or broken.
        """
        if path is None:
            raise BadInput(
                f"{cls.task} has no bundled data: name its folder, --data {cls.task}=FOLDER (in "
                f"Python, data={{{cls.task!r}: FOLDER}}). It needs {cls.needs}"
            )
        return cls(path)

    @classmethod
    def existing(cls, path: str | Path) -> Path:
        """The folder that a subclass reads; raises BadInput if there is none."""
        folder = Path(path)
        if not folder.is_dir():
            raise BadInput(
                f"{cls.task}: {folder} is no folder: unpack the benchmark there. It needs "
                f"{cls.needs}"
            )
        return folder

    def __init__(self, root: str | Path, files: Iterable[Path] = ()) -> None:
        self.root = self.place = Path(root)
        self._files = sorted(files)

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.root.resolve().name

    @cached_property
    def sha256(self) -> str:
        """Fingerprint of the files, without that of the pictures."""
        digest = hashlib.sha256()
        for path in self._files:
            digest.update(path.read_bytes())
        return digest.hexdigest()

    @cached_property
    def _folders(self) -> list[Path]:
        below = (path for pattern in ("*/", "*/*/") for path in sorted(self.root.glob(pattern)))
        return [self.root, *(path for path in below if path.is_dir())]

    def find(self, name: str) -> Path | None:
        """Where the picture of that name lies, if it does; raises BadInput where several fit."""
        relative = PurePosixPath(name)
        if relative.is_absolute() or ".." in relative.parts:
            return None
        files = (folder / relative for folder in self._folders)
        # Not Path.is_file: it raises on names that are too long.
        places = [file.relative_to(self.root).as_posix() for file in files if isfile(file)]
        place = only_one(name, places, lambda at: (self.root / at).read_bytes(), self.root)
        return None if place is None else self.root / place

    def holds(self, name: str) -> bool:
        """Whether there is a picture of that name; raises BadInput where several fit."""
        return self.find(name) is not None

    def content(self, name: str) -> bytes:
        """The file of a picture that is there."""
        path = self.find(name)
        assert path is not None
        return path.read_bytes()
