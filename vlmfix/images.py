"""Read images from paths, bytes or data: URLs, as a processor can take them."""

from __future__ import annotations

import base64
import binascii
import os
import struct
import zipfile
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_to_bytes

from vlmfix.errors import BadInput

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["formats", "load_image", "one_line"]

#: What is read, by Pillow's names. Left out is what runs another program (EPS), what may hold a
#: picture larger than its header says (ICO, ICNS), and what no camera, scanner or data set writes.
_FORMATS = ("AVIF", "BMP", "GIF", "HEIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")


def formats() -> tuple[str, ...]:
    """The formats that vlmfix reads and this Pillow knows: the argument of `PIL.Image.open`."""
    from PIL import Image

    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def load_image(source: str | bytes | os.PathLike[str] | Image) -> Image:
    """Read an image upright and in RGB.

    Args:
        source: a path, a `data:` URL, the bytes of an image file, a PIL image, or "emoji:1" for
            the first image of the bundled evaluation split.

    Returns:
        A PIL image of mode RGB, rotated by its EXIF orientation; the first frame of several.

    Raises:
        BadInput: a missing file, a file that is no image or in none of the `formats`, a damaged
            image, no pixels or too many.
    """
    from PIL import Image, UnidentifiedImageError

    label, opened = _open(source)
    try:
        if isinstance(opened, Image.Image):
            return _upright(label, opened)
        with Image.open(opened, formats=formats()) as image:  # a damaged file, too, is closed
            return _upright(label, image)
    except BadInput:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadInput(
            f"{label} is too large ({error}); scale it down, or raise PIL.Image.MAX_IMAGE_PIXELS"
        ) from error
    except UnidentifiedImageError as error:
        raise BadInput(
            f"{label} is not an image that Pillow can read as {', '.join(formats())}: convert it "
            "to one of them"
        ) from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        raise BadInput(f"{label} is damaged: {one_line(error)}; fetch it again") from error


def _upright(label: str, image: Image) -> Image:
    """The first frame as RGB, rotated by its EXIF orientation."""
    from PIL import Image, ImageOps

    if not (image.width and image.height):
        raise BadInput(f"{label} has no pixels ({image.width} x {image.height})")
    limit = Image.MAX_IMAGE_PIXELS
    # The header alone is read so far: a bomb is refused before it goes off.
    if limit is not None and image.width * image.height > limit:
        raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
    if image.mode == "F" or image.mode.startswith("I"):
        raise BadInput(
            f"{label} has {image.mode} grey levels, which would turn white in 8 bits: "
            "scale it to 8 bits first"
        )
    if image.mode == "P":
        image = image.convert("RGBA")
    return ImageOps.exif_transpose(image).convert("RGB")


def _open(source: Any) -> tuple[str, Path | BytesIO | Image]:
    """What to call the source in a message, and something to read it from."""
    from PIL import Image

    if isinstance(source, Image.Image):
        return "the image", source
    if isinstance(source, (bytes, bytearray)):
        return f"the image ({len(source)} bytes)", BytesIO(source)
    if isinstance(source, str) and source.startswith("data:"):
        return "the image in the data: URL", BytesIO(_data_url(source))
    if isinstance(source, str) and source.startswith("emoji:"):
        return source, BytesIO(_bundled_image(source))
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        raise BadInput(f"{source} is a web address: download the image and pass the file")
    if not isinstance(source, (str, os.PathLike)):
        raise BadInput(
            f"cannot read an image from {type(source).__name__}: "
            "pass a path, a data: URL, bytes or a PIL image"
        )
    path = Path(source).expanduser()
    if path.is_dir():
        raise BadInput(f"{path} is a folder: pass one image file")
    if not path.exists():
        raise BadInput(f"no image file {path}: check the path")
    return str(path), path


def _data_url(url: str) -> bytes:
    header, comma, body = url.partition(",")
    if not comma:
        raise BadInput("the data: URL has no comma, so it holds no data")
    if not header.endswith(";base64"):
        return unquote_to_bytes(body)
    try:
        return base64.b64decode(body, validate=True)
    except binascii.Error as error:
        raise BadInput(f"the data: URL is not valid base64: {error}") from error


def _bundled_image(source: str) -> bytes:
    from vlmfix.emoji import evaluation_split

    with zipfile.ZipFile(evaluation_split()) as split:
        names = sorted(name for name in split.namelist() if name.startswith("images/"))
        number = source.partition(":")[2]
        if not number.isdecimal() or not 1 <= int(number) <= len(names):
            raise BadInput(f"no bundled image {source!r}: there are emoji:1 to emoji:{len(names)}")
        return split.read(names[int(number) - 1])


def one_line(error: BaseException) -> str:
    """The first line of an error's message, at most 200 characters."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")[:200]
