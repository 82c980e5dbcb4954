"""One model, many answers: whoever wants the model stands in line, and holds it for one turn."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Turns"]


class Turns:
    """A lock that is given in the order of asking.

    Answers that pass it on after every token are written side by side, while no two forwards ever
    run at once: nothing of one can meet the other in the model, and a turn's time is its own.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._line: deque[object] = deque()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Hold the model for as long as the block takes."""
        self._enter()
        try:
            yield
        finally:
            self._leave()

    def pass_on(self) -> None:
        """Within a turn: let all who wait have one, then take the next."""
        self._leave()
        self._enter()

    @property
    def waiting(self) -> int:
        """How many stand in line, the one who holds the model included."""
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
