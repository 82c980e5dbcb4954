"""What the tabs share: the engine, which methods fit, and who is to be stopped."""

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

#: Of every event: it is for this page alone, and no veil goes over what it writes.
QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}

_SIDE = 448  # of a picture that is shown, at least, in pixels


@dataclass
class Run:
    """The last answers of one visitor.

    Attributes:
        asked: what was asked.
        panes: the answers, the base first.
        truth: objects of the picture, if somebody knows.
        number: of the model that answered.
    """

    asked: Question
    panes: list[Pane]
    truth: frozenset[str] | None
    number: int


class Desk:
    """One for all visitors.

    Args:
        engine: holds the model.
        folder: for files that live as long as the page.
    """

    def __init__(self, engine: Engine, folder: Path) -> None:
        self.engine, self.folder = engine, folder
        self._stops: dict[str | None, threading.Event] = {}
        self.examine()

    def examine(self) -> None:
        """Find out which methods fit the model; once for each model."""
        rows = examine(self.engine.model)["methods"]
        #: Why a method does not fit; None: it does.
        self.fits = {row["name"]: None if row["fits"] else str(row["why"]) for row in rows}

    def choices(self) -> list[tuple[str, str]]:
        """Methods as a visitor reads them, with a word about those that do nothing here."""
        names = [row.name for row in list_methods()]
        return [(f"{name} (see About)" if self.fits[name] else name, name) for name in names]

    def begin(self, request: gr.Request) -> threading.Event:
        """What ends the next run of this visitor; the one before ends now."""
        self.stop(request)
        event = self._stops[request.session_hash] = threading.Event()
        return event

    def stop(self, request: gr.Request) -> None:
        """End what this visitor runs."""
        if before := self._stops.pop(request.session_hash, None):
            before.set()


def enlarged(picture: Image.Image) -> Image.Image:
    """A small picture enlarged without smoothing, a large one made smaller."""
    longest = max(picture.size)
    if longest >= _SIDE:
        small = picture.copy()
        small.thumbnail((2 * _SIDE, 2 * _SIDE))
        return small
    times = -(-_SIDE // longest)
    size = (picture.width * times, picture.height * times)
    return picture.resize(size, Image.Resampling.NEAREST)
