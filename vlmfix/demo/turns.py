"""One model, many answers: each waits in line for the model and holds it for one turn."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Turns"]


class Turns:
    """A lock that is granted in the order of requests.

    Answers that pass it on after every token are written side by side, while no two forwards run
    at once: answers cannot disturb each other in the model, and the seconds of a turn are its own.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._line: deque[object] = deque()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Hold the model within the block."""
        self._enter()
        try:
            yield
        finally:
            self._leave()

    def pass_on(self) -> None:
        """Within a turn: give one to all who wait, then take the next."""
        self._leave()
        self._enter()

    @property
    def waiting(self) -> int:
        """The length of the line, including the holder of the model."""
        return len(self._line)

    def _enter(self) -> None:
        me = object()
        with self._changed:
            self._line.append(me)
            self._changed.wait_for(lambda: self._line[0] is me)

    def _leave(self) -> None:
        with self._changed:
            self._line.popleft()
            self._changed.notify_all()
