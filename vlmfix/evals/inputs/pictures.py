"""Pictures by name, read in one way wherever they lie."""

from __future__ import annotations

import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from vlmfix.errors import BadInput
from vlmfix.images import load_image

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["UNREADABLE", "Pictures", "only_one"]

#: What reading a file raises; the last three: members of a .zip that are damaged, encrypted or
#: packed in an odd way.
UNREADABLE = (OSError, zipfile.BadZipFile, zlib.error, RuntimeError)


def only_one(
    name: str, places: Sequence[str], content: Callable[[str], bytes], source: object
) -> str | None:
    """The one of several places that holds the picture of that name; None without any.

    A place that is the name itself, the full path, comes before all others. Copies of one picture
    are one picture.

    Args:
        name: of the picture, as the benchmark's files have it.
        places: paths that end in the name.
        content: place -> the file there.
        source: what holds the places, for messages.

    Raises:
        BadInput: the places hold different pictures.
    """
    exact = [place for place in places if PurePosixPath(place) == PurePosixPath(name)]
    found = exact or list(places)
    if len(found) > 1 and len({content(place) for place in found}) > 1:
        raise BadInput(
            f"{source} holds {len(found)} different pictures called {name}: {', '.join(found[:3])}."
            " Name the full path in the benchmark's files, or leave one of these folders there"
        )
    return found[0] if found else None


class Pictures(ABC):
    """The half of a `tasks.DataSource` that is about pictures.

    Attributes:
        place: where the pictures are, for messages.
        remedy: what to do about missing ones.
    """

    place: object
    remedy: str

    @abstractmethod
    def holds(self, name: str) -> bool:
        """Whether there is a picture of that name; raises BadInput where several fit."""

    @abstractmethod
    def content(self, name: str) -> bytes:
        """The file of a picture that is there."""

    def require_images(self, names: Sequence[str]) -> None:
        """Check that the pictures are there, before any work is spent on them.

        Raises:
            BadInput: some are missing, or are in several places; the message names the first ones.
        """
        if missing := [name for name in names if not self.holds(name)]:
            raise BadInput(
                f"{self.place} lacks {len(missing)} of {len(names)} images, first "
                f"{', '.join(missing[:3])}: {self.remedy}"
            )

    def image(self, name: str) -> Image.Image:
        """The picture of that name, as `vlmfix.generate` reads it (`images.load_image`).

        Raises:
            BadInput: it is missing, or `load_image` refuses it.
        """
        self.require_images([name])
        try:
            return load_image(self.content(name))
        except (BadInput, *UNREADABLE) as error:
            raise BadInput(f"{self.place}: {name} is not a readable image ({error})") from None
