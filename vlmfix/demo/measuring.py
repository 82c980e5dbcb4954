"""A quick POPE that shares the model with other visitors."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator, Sequence
from queue import Empty, SimpleQueue
from typing import Any

from vlmfix.base.method import Method
from vlmfix.demo.engine import Engine
from vlmfix.errors import BadInput
from vlmfix.evals import evaluate
from vlmfix.families.surgeon import module_state

__all__ = ["measure"]

#: Requests per batch; other visitors wait while a batch runs.
_BATCH = 8


def measure(
    engine: Engine, methods: Sequence[Method], images: int, stop: threading.Event | None = None
) -> Iterator[tuple[int, int, str] | dict[str, Any]]:
    """Run POPE on the first bundled images, base and methods, by `vlmfix.evals.evaluate`.

    Args:
        engine: holds the model.
        methods: one arm each, in addition to the base.
        images: number of images, each with six questions in each of three splits.
        stop: event that ends the run after its batch, without results.

    Yields:
        (requests done, requests in all, label of the arm), and finally the results.

    Raises:
        VlmfixError: methods that cannot run here.
    """
    events: SimpleQueue[Any] = SimpleQueue()
    stop = stop or threading.Event()

    def progress(done: int, steps: int, label: str) -> None:
        events.put((done, steps, label))
        if stop.is_set():
            raise BadInput("stopped; there are no results.")
        with module_state(engine.model):
            engine.turns.pass_on()

    def work() -> None:
        try:
            with tempfile.TemporaryDirectory() as folder, engine.turns.turn():
                results = evaluate(
                    ["pope"],
                    (engine.model, engine.processor),
                    list(methods),
                    limit=images,
                    batch_size=_BATCH,
                    output=folder,
                    quiet=True,
                    progress=progress,
                )
            results["config"]["model"] = engine.name
            events.put(results)
        except Exception as error:
            events.put(error)

    thread = threading.Thread(target=work, daemon=True)
    with engine.in_use():
        try:
            thread.start()
            while True:
                try:
                    event = events.get(timeout=1)
                except Empty:
                    continue
                if isinstance(event, Exception):
                    raise event
                yield event
                if isinstance(event, dict):
                    return
        finally:
            stop.set()
            thread.join()
