"""Questions and answers as plain data, and their limits. No model in here."""

from __future__ import annotations

import io
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from PIL import Image

import vlmfix
from vlmfix.errors import BadInput, VlmfixError
from vlmfix.images import formats

if TYPE_CHECKING:
    from vlmfix.base.method import Method
    from vlmfix.engine.call import CallReport

__all__ = [
    "MAX_CHARACTERS",
    "MAX_PANES",
    "MAX_PIXELS",
    "Pane",
    "Question",
    "message",
    "read_picture",
]

MAX_PIXELS = 25_000_000
MAX_CHARACTERS = 4_000
MAX_PANES = 4


@dataclass(frozen=True)
class Question:
    """A question about a picture.

    Attributes:
        picture: upright, in RGB.
        prompt: the text of the question.
        max_new_tokens: longest answer.
    """

    picture: Image.Image
    prompt: str
    max_new_tokens: int = 96

    @property
    def chat(self) -> list[dict[str, Any]]:
        """The question as `vlmfix.generate` takes it."""
        content = [{"type": "image", "image": self.picture}, {"type": "text", "text": self.prompt}]
        return [{"role": "user", "content": content}]


@dataclass
class Pane:
    """One answer, while it is written and after.

    Attributes:
        method: None is the plain model.
        tokens: the answer so far, with the token that ended it.
        seconds: working time of the model on this answer, without waiting for other panes.
        passes: rows that went through the decoder, as in `vlmfix eval`: a branch in the same batch
            counts as a second pass.
        done: whether the answer is finished or has failed.
        finish: "eos" or "length".
        report: the report of `vlmfix.last_call`; None for the plain model.
        note: why the method can change nothing on this model; None if it can.
        error: the message of the error; None without one.
    """

    method: Method | None
    tokens: list[int] = field(default_factory=list)
    seconds: float = 0.0
    passes: int = 0
    done: bool = False
    finish: str | None = None
    report: CallReport | None = None
    note: str | None = None
    error: str | None = None

    @property
    def name(self) -> str:
        """The heading of the pane."""
        return "base" if self.method is None else self.method.spec()


def read_picture(source: str | bytes) -> Image.Image:
    """Read an uploaded picture, upright and in RGB; its size is checked before its pixels.

    Args:
        source: path or bytes of an image file.

    Raises:
        BadInput: not an image, a damaged one, or more than `MAX_PIXELS`.
    """
    if isinstance(source, str):
        with open(source, "rb") as file:  # a message must not show the server's paths
            source = file.read()
    try:
        with Image.open(io.BytesIO(source), formats=formats()) as header:
            width, height = header.size
    except Exception:
        width = height = 0  # load_image says what is wrong
    if width * height > MAX_PIXELS:
        raise BadInput(
            f"the picture is too large: {width} x {height} pixels are "
            f"{width * height / 1e6:.0f} megapixels, and the demo takes up to "
            f"{MAX_PIXELS // 10**6}, because models use far fewer and all visitors share the "
            "memory. Scale it down."
        )
    return vlmfix.load_image(source)


def message(error: Exception) -> str:
    """The message that a visitor sees; an unexpected error is logged on the server in full."""
    if isinstance(error, VlmfixError):
        return str(error)
    logging.getLogger(__name__).error("the demo failed", exc_info=error)
    return f"something went wrong ({type(error).__name__}); the log of the server has the details."
