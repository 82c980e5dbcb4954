"""Answers written side by side: a thread per pane, a turn per token."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence

import torch
from transformers.generation.streamers import BaseStreamer

import vlmfix
from vlmfix.base.method import Method
from vlmfix.chat import end_tokens
from vlmfix.demo.asking import MAX_PANES, Pane, Question, message
from vlmfix.demo.engine import Engine
from vlmfix.errors import BadInput
from vlmfix.evals.running.models import PassCounter, count_passes
from vlmfix.families.surgeon import module_state

__all__ = ["STOPPED", "answer"]

#: `Pane.error` of an answer that a visitor stopped.
STOPPED = "stopped."

#: Seconds between two checks of the answers.
_PAUSE = 0.05


class _Stopped(Exception):
    """The answer is not wanted any more."""


class _Streamer(BaseStreamer):  # type: ignore[misc]  # transformers is untyped
    """Collects the tokens of one answer, and passes the model on after each of them."""

    def __init__(
        self, engine: Engine, pane: Pane, passes: PassCounter, stop: threading.Event
    ) -> None:
        self._engine, self._pane, self._passes, self._stop = engine, pane, passes, stop
        self._begun = False
        self._since = time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, then one token at a time."""
        if not self._begun:
            self._begun = True
            return
        self._pane.tokens.append(int(value))
        self.end()
        if self._stop.is_set():
            raise _Stopped
        # Some families keep the positions of the last prompt on a module.
        with module_state(self._engine.model):
            self._engine.turns.pass_on()
        self._since = time.perf_counter()
        self._passes.rows = self._pane.passes  # the hook also counted the other panes

    def end(self) -> None:
        """Add seconds and passes since the turn began."""
        now = time.perf_counter()
        self._pane.seconds += now - self._since
        self._since = now
        self._pane.passes = self._passes.rows


def answer(
    engine: Engine,
    asked: Question,
    methods: Sequence[Method | None],
    stop: threading.Event | None = None,
) -> Iterator[list[Pane]]:
    """Write the answers side by side, greedily.

    Args:
        engine: holds the model.
        asked: picture and prompt.
        methods: one per pane; None is the plain model.
        stop: event that ends the answers at once.

    Yields:
        The panes, the same objects every time, after every change and at the end. An error in one
        pane becomes its `error`, and the others continue.

    Raises:
        BadInput: too many panes.
    """
    if not 1 <= len(methods) <= MAX_PANES:
        raise BadInput(f"{len(methods)} panes: the demo shows 1 to {MAX_PANES}.")
    panes = [Pane(method) for method in methods]
    stop = stop or threading.Event()
    threads = [
        threading.Thread(target=_write, args=(engine, pane, asked, stop), daemon=True)
        for pane in panes
    ]
    with engine.in_use():
        try:
            for thread in threads:
                thread.start()
            seen = -1
            while not all(pane.done for pane in panes):
                now = sum(len(pane.tokens) + pane.done for pane in panes)
                if now != seen:
                    seen = now
                    yield panes
                time.sleep(_PAUSE)
            yield panes
        finally:  # also when the visitor has gone
            stop.set()
            for thread in threads:
                thread.join()


def _write(engine: Engine, pane: Pane, asked: Question, stop: threading.Event) -> None:
    """Write one answer, in a thread of its own."""
    try:
        with (
            engine.turns.turn(),
            vlmfix.using(engine.model, pane.method),
            count_passes(engine.model) as passes,
        ):
            if pane.method is not None:
                pane.note = pane.method.prepared(engine.info, engine.model).idle()
            vlmfix.generate(
                engine.model,
                engine.processor,
                asked.chat,
                max_new_tokens=asked.max_new_tokens,
                do_sample=False,
                num_beams=1,
                streamer=_Streamer(engine, pane, passes, stop),
            )
            if pane.method is not None:
                pane.report = vlmfix.last_call(engine.model)
            ended = pane.tokens[-1:] and pane.tokens[-1] in end_tokens(engine.model, {})
            pane.finish = "eos" if ended else "length"
    except _Stopped:
        pane.error = STOPPED
    except Exception as error:
        pane.error = message(error)
    finally:
        pane.done = True
