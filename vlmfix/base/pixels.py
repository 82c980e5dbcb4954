"""The base class of methods that change the images of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from vlmfix.base.method import Method, StageName

__all__ = ["PixelMethod"]


@dataclass(frozen=True)
class PixelMethod(Method):
    """A method that changes the images of prompts after internal passes of the plain model."""

    stage: ClassVar[StageName] = "pixels"

    def rewrite(
        self, model: Any, processor: Any, chats: Sequence[Any]
    ) -> tuple[list[Any], list[Any]]:
        """New chats (as `vlmfix.generate` takes them), and what was found in each of them.

        Runs before the answer, with no method of the stack at work.

        Args:
            model: the wrapped model.
            processor: its processor.
            chats: a batch of chats.

        Returns:
            Two lists with an entry per chat. `last_call(model).pixels[name]` shows the second.
        """
        raise NotImplementedError
