"""Pictures by name, read in one way wherever they lie."""

from __future__ import annotations

import zipfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from io import BytesIO
from typing import TYPE_CHECKING

from vlmfix.errors import BadInput

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Pictures"]


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
        """Whether there is a picture of that name."""

    @abstractmethod
    def content(self, name: str) -> bytes:
        """The file of a picture that is there."""

    def require_images(self, names: Sequence[str]) -> None:
        """Check that the pictures are there, before any work is spent on them.

        Raises:
            BadInput: some are missing; the message names the first ones.
        """
        if missing := [name for name in names if not self.holds(name)]:
            raise BadInput(
                f"{self.place} lacks {len(missing)} of {len(names)} images, first "
                f"{', '.join(missing[:3])}: {self.remedy}"
            )

    def image(self, name: str) -> Image.Image:
        """The picture of that name, in RGB.

        Raises:
            BadInput: it is missing or cannot be decoded.
        """
        from PIL import Image, UnidentifiedImageError

        self.require_images([name])
        try:
            return Image.open(BytesIO(self.content(name))).convert("RGB")
        except (UnidentifiedImageError, OSError, zipfile.BadZipFile) as error:
            raise BadInput(f"{self.place}: {name} is not a readable image ({error})") from None
