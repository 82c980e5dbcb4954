"""What each thread that uses a wrapped model is doing: its call, its forward; the last call."""

from __future__ import annotations

import threading
import weakref
from contextvars import ContextVar
from typing import Any, Literal

from vlmfix.engine.call import Call
from vlmfix.engine.frame import Frame
from vlmfix.engine.lifetime import Lifetime

__all__ = ["Implementation", "State"]

#: How edited rows are computed while decoding, see `vlmfix.wrap`.
Implementation = Literal["auto", "torch", "triton"]


class _Token:
    """Stands for one call in a context."""


#: For each model, which of its calls was the last one of this context.
_LAST: ContextVar[tuple[tuple[weakref.ref[State], _Token], ...]] = ContextVar(
    "vlmfix_last", default=()
)


class State:
    """What the threads that use one wrapped model do; every property is this thread's own."""

    def __init__(self) -> None:
        # torch.compile follows a plain threading.local, and no class derived from it.
        self._local = threading.local()
        self._last: Call | None = None
        self._by_token: weakref.WeakKeyDictionary[_Token, Call] = weakref.WeakKeyDictionary()

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
        """The last call of this task or thread, or of any if this one made none."""
        for state, token in _LAST.get():
            if state() is self:
                return self._by_token.get(token)
        return self._last

    @last.setter
    def last(self, call: Call) -> None:
        # A context outlives models, so that it holds tokens and the state holds the calls.
        token = _Token()
        others = (one for one in _LAST.get() if one[0]() not in (None, self))
        _LAST.set((*others, (weakref.ref(self), token)))
        self._last = self._by_token[token] = call
