"""Chats as CARVE rewrites them: other requests, other images. They come from `chat.split_chat`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

__all__ = ["last_text", "request", "with_images"]


def last_text(plain: Sequence[Any]) -> int | None:
    """The index of the user's last message that holds text."""
    said = [
        at
        for at, message in enumerate(plain)
        if message["role"] == "user" and any(part["type"] == "text" for part in message["content"])
    ]
    return said[-1] if said else None


def request(plain: Sequence[Any], at: int, text: str | None, suffix: str) -> list[Any]:
    """A chat whose message `at` asks for a short answer, to `text` if it is given."""
    parts = plain[at]["content"]
    last = max(i for i, part in enumerate(parts) if part["type"] == "text")
    said = parts[last]["text"] if text is None else text
    if not said.rstrip().endswith(suffix):
        said = f"{said} {suffix}"
    kept = [
        {"type": "text", "text": said} if i == last else part
        for i, part in enumerate(parts)
        if i == last or text is None or part["type"] == "image"
    ]
    return [*plain[:at], {**plain[at], "content": kept}, *plain[at + 1 :]]


def with_images(plain: Sequence[Any], shown: Sequence[Sequence[Image.Image]]) -> list[Any]:
    """A chat with one or several images in the place of each of its markers."""
    left = iter(shown)
    chat = []
    for message in plain:
        content: list[Any] = []
        for part in message["content"]:
            if part["type"] == "image":
                content += [{"type": "image", "image": image} for image in next(left)]
            else:
                content.append(part)
        chat.append({**message, "content": content})
    return chat
