"""The state that the tabs share: the engine, which methods fit, and which runs to stop."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from vlmfix.analysis.doctor import examine
from vlmfix.demo.asking import Pane, Question
from vlmfix.demo.engine import Engine
from vlmfix.registry import list_methods

__all__ = ["QUIET", "Desk", "Run", "enlarged"]

#: Arguments of every event: hidden from the API, and without an overlay on its outputs.
QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}

_SIDE = 448  # least longest side of a shown picture in pixels


@dataclass
class Run:
    """The last answers of one visitor.

    Attributes:
        asked: the question.
        panes: the answers, the base first.
        truth: objects of an EmojiCOCO picture; None for other pictures.
        number: `Engine.number` of the model that answered.
    """

    asked: Question
    panes: list[Pane]
    truth: frozenset[str] | None
    number: int


class Desk:
    """The shared state of all visitors.

    Args:
        engine: holds the model.
        folder: folder for files that are deleted with the page.
    """

    def __init__(self, engine: Engine, folder: Path) -> None:
        self.engine, self.folder = engine, folder
        self._stops: dict[str | None, threading.Event] = {}
        self.examine()

    def examine(self) -> None:
        """Check which methods fit the model, once per model."""
        rows = examine(self.engine.model)["methods"]
        #: Why a method does not fit; None if it does.
        self.fits = {row["name"]: None if row["fits"] else str(row["why"]) for row in rows}

    def choices(self) -> list[tuple[str, str]]:
        """The choices of a method control; those that do not fit the model point to About."""
        names = [row.name for row in list_methods()]
        return [(f"{name} (see About)" if self.fits[name] else name, name) for name in names]

    def begin(self, request: gr.Request) -> threading.Event:
        """The event that stops the next run of this visitor; the previous run is stopped now."""
        self.stop(request)
        event = self._stops[request.session_hash] = threading.Event()
        return event

    def stop(self, request: gr.Request) -> None:
        """Stop the run of this visitor."""
        if before := self._stops.pop(request.session_hash, None):
            before.set()


def enlarged(picture: Image.Image) -> Image.Image:
    """Enlarge a small picture without smoothing, and shrink a large one."""
    longest = max(picture.size)
    if longest >= _SIDE:
        small = picture.copy()
        small.thumbnail((2 * _SIDE, 2 * _SIDE))
        return small
    times = -(-_SIDE // longest)
    size = (picture.width * times, picture.height * times)
    return picture.resize(size, Image.Resampling.NEAREST)
