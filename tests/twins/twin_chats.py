"""Chats about pictures, as users write them, and what of them is the question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

QUESTION = "Is there a red bicycle next to the dog in this picture?"
CONTENT = "red bicycle next dog picture"


def picture(width: int = 224, height: int = 224, seed: int = 0) -> Image.Image:
    """Smooth colours, other ones for another seed."""
    colours = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC)


def user(images: Sequence[Image.Image], text: str) -> dict[str, Any]:
    shown = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*shown, {"type": "text", "text": text}]}


@dataclass(frozen=True)
class Kind:
    """A chat, and the strings that `find_question` has to mark in it."""

    chat: list[dict[str, Any]]
    question: str = QUESTION
    content: str = CONTENT

    @property
    def images(self) -> list[Image.Image]:
        parts = [p for m in self.chat if not isinstance(m["content"], str) for p in m["content"]]
        return [part["image"] for part in parts if part["type"] == "image"]

    @property
    def texts(self) -> list[str]:
        """All that was said."""
        found = []
        for message in self.chat:
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            found += [part["text"] for part in parts if part["type"] == "text"]
        return found


def kinds() -> dict[str, Kind]:
    """Every kind of chat that a user may hold."""
    image, other = picture(), picture(seed=1)
    said = {"role": "assistant", "content": "A dog."}
    return {
        "one": Kind([user([image], QUESTION)]),
        "two": Kind([user([image, other], QUESTION)]),
        "wide": Kind([user([picture(1000, 200)], QUESTION)]),
        "tiny": Kind([user([picture(50, 50)], QUESTION)]),
        "system": Kind([{"role": "system", "content": "Answer briefly."}, user([image], QUESTION)]),
        "second turn": Kind([user([image], "What is shown?"), said, user([], QUESTION)]),
        # The words of content; marks between them are none.
        "newlines": Kind(
            [user([image], "Describe the image.\nUse two sentences.")],
            "Describe the image.\nUse two sentences.",
            "Describe image Use two sentences",
        ),
        # "why" is a stop word: where there is no content, the whole question counts.
        "one word": Kind([user([image], "Why?")], "Why?", "Why?"),
        "text first": Kind(
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": QUESTION},
                        {"type": "image", "image": image},
                    ],
                }
            ]
        ),
        "begun": Kind([user([image], QUESTION), {"role": "assistant", "content": "Yes, there"}]),
    }


KINDS = tuple(kinds())
