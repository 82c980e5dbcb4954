"""Which stack a `using` block asks for: per task and per thread, also across generators.

A block is kept in a context variable, so that threads, asyncio tasks and what they start with a
copy of their context each see their own. Python runs a generator in the context of whoever asks it
for a value, so a block that a generator opened would leak to its caller, or be lost where another
context goes on with it. Such a block therefore also knows the frame that opened it, and holds where
that frame is running.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import FrameType

from vlmfix.engine.stack import Stack
from vlmfix.errors import StateError

__all__ = ["Blocks"]


@dataclass(frozen=True, eq=False)
class _Block:
    """One open `using` block; `opener` is the frame of the generator that opened it, if one did."""

    owner: weakref.ref[Blocks]
    stack: Stack
    opener: FrameType | None


#: The open blocks of this context, of all models, the innermost last.
_OPEN: ContextVar[tuple[_Block, ...]] = ContextVar("vlmfix_using", default=())


class Blocks:
    """The open `using` blocks of one wrapped model."""

    def __init__(self) -> None:
        self._of_generators: list[_Block] = []

    @contextmanager
    def open(self, stack: Stack) -> Iterator[None]:
        """Keep a stack for the length of a with-block."""
        block = _Block(weakref.ref(self), stack, _generator_frame())
        open_here = _OPEN  # a generator may end with the interpreter, when modules are empty
        open_here.set((*open_here.get(), block))
        if block.opener is not None:
            self._of_generators.append(block)
        try:
            yield
        finally:
            # A generator may be closed in another context than it began in.
            open_here.set(tuple(one for one in open_here.get() if one is not block))
            if block.opener is not None:
                self._of_generators.remove(block)

    def innermost(self) -> Stack | None:
        """The stack that holds here; None: what the model was wrapped with.

        Raises:
            StateError: it cannot be told, since a generator that opened a block is suspended.
        """
        mine = [block for block in _OPEN.get() if block.owner() is self]
        if not self._of_generators:
            return mine[-1].stack if mine else None
        running = _running_frames()
        elsewhere = [
            one for one in self._of_generators if one.opener in running and one not in mine
        ]
        if elsewhere and not mine:
            return elsewhere[-1].stack
        skipped = False
        for block in reversed(mine):
            if block.opener is None and not skipped and not elsewhere:
                return block.stack
            if block.opener in running:
                return block.stack
            skipped = skipped or block.opener is not None
        if skipped or elsewhere:
            raise StateError(
                "a generator that is suspended (or that another context began) has a using block "
                "open, so whether it holds for this call cannot be told. Open a vlmfix.using block "
                "right around the call, or close the generator."
            )
        return None


def _running_frames() -> set[FrameType]:
    frames, frame = set(), sys._getframe(1)
    while frame is not None:
        frames.add(frame)
        frame = frame.f_back  # type: ignore[assignment]  # None ends the loop
    return frames


def _generator_frame() -> FrameType | None:
    """The frame that opens a block, if it is a generator's that no context manager drives."""
    frame: FrameType | None = sys._getframe(1)
    generators = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
    while frame is not None:
        driver = frame.f_back
        between = frame.f_code.co_filename in (__file__, contextlib.__file__)
        managed = driver is not None and driver.f_code.co_filename == contextlib.__file__
        if not between and not (frame.f_code.co_flags & generators and managed):
            break
        frame = driver
    return frame if frame is not None and frame.f_code.co_flags & generators else None
