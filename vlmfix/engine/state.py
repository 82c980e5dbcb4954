"""What each thread that uses a wrapped model is doing: its call, its forward, its stack."""

from __future__ import annotations

import threading
from typing import Any, Literal

from vlmfix.engine.call import Call
from vlmfix.engine.frame import Frame
from vlmfix.engine.lifetime import Lifetime

__all__ = ["Implementation", "State"]

#: How edited rows are computed while decoding, see `vlmfix.wrap`.
Implementation = Literal["auto", "torch", "triton"]


class State:
    """What the threads that use one wrapped model do; every property is this thread's own."""

    def __init__(self) -> None:
        # torch.compile follows a plain threading.local, and no class derived from it.
        self._local = threading.local()
        self._last: Call | None = None

    @property
    def thread(self) -> Lifetime:
        """What parts of the engine keep for as long as this thread lives."""
        if not hasattr(self._local, "kept"):
            self._local.kept = Lifetime()
        kept: Lifetime = self._local.kept
        return kept

    @property
    def frame(self) -> Frame | None:
        """The frame of the forward that this thread is in."""
        return getattr(self._local, "frame", None)

    @frame.setter
    def frame(self, frame: Frame | None) -> None:
        self._local.frame = frame

    @property
    def prepared(self) -> dict[Any, Any] | None:
        """What the compiled decode step of this thread runs, by stage; None outside of one."""
        return getattr(self._local, "prepared", None)

    @prepared.setter
    def prepared(self, prepared: dict[Any, Any] | None) -> None:
        self._local.prepared = prepared

    @property
    def call(self) -> Call | None:
        """The call that this thread is in; None in a bare forward."""
        return getattr(self._local, "call", None)

    @call.setter
    def call(self, call: Call | None) -> None:
        self._local.call = call

    @property
    def last(self) -> Call | None:
        """The last call of this thread, or of any thread if this one made none."""
        own: Call | None = getattr(self._local, "last", None)
        return own or self._last

    @last.setter
    def last(self, call: Call) -> None:
        self._last = self._local.last = call
