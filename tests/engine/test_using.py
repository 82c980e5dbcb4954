"""`using` and `last_call` belong to a task, a thread, or a generator that runs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import copy_context
from typing import Any

import pytest
import torch
from matrix import ROWS
from tiny import build

import vlmfix
from vlmfix.errors import StateError

STRONG = {row.name: row.strong for row in ROWS}


class Asked:
    """A wrapped model that says which method answers."""

    def __init__(self) -> None:
        tiny = build("llava")
        self.model, self._inputs, self._known = tiny.model, tiny.inputs(1), {}
        vlmfix.wrap(self.model, None)
        for name in (None, "pai", "vaf"):
            with vlmfix.using(self.model, STRONG[name] if name else None):
                self._known[name] = self._logits()

    def _logits(self) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = self.model(**self._inputs).logits
        return logits

    def who(self) -> str | None:
        """The method that ran."""
        found = self._logits()
        return next(name for name, known in self._known.items() if torch.equal(found, known))

    def using(self, name: str | None) -> Any:
        return vlmfix.using(self.model, STRONG[name] if name else None)

    def stream(self, name: str) -> Iterator[str | None]:
        with self.using(name):
            for _ in range(3):
                yield self.who()

    @contextmanager
    def helper(self, name: str) -> Iterator[None]:
        with self.using(name):
            yield


@pytest.fixture(scope="module")
def asked() -> Asked:
    return Asked()


def test_tasks_keep_their_methods_and_reports(asked: Asked) -> None:
    async def ask(name: str, first: float, then: float) -> tuple[str | None, str]:
        with asked.using(name):
            await asyncio.sleep(first)
            found = asked.who()
            await asyncio.sleep(then)
            return found, vlmfix.last_call(asked.model).methods[0].split(":")[0]

    async def both() -> list[tuple[str | None, str]]:
        return list(await asyncio.gather(ask("pai", 0.02, 0.05), ask("vaf", 0.01, 0.03)))

    assert asyncio.run(both()) == [("pai", "pai"), ("vaf", "vaf")]
    assert asked.who() is None


def test_a_thread_of_a_task_is_in_its_block_and_a_plain_thread_is_not(asked: Asked) -> None:
    async def ask() -> str | None:
        with asked.using("pai"):
            return await asyncio.to_thread(asked.who)

    assert asyncio.run(ask()) == "pai"
    found: list[str | None] = []
    with asked.using("pai"):
        thread = threading.Thread(target=lambda: found.append(asked.who()))
        thread.start()
        thread.join()
    assert found == [None]


def test_a_suspended_generator_keeps_its_method_to_itself(asked: Asked) -> None:
    first, second = asked.stream("pai"), asked.stream("vaf")
    assert next(first) == "pai"
    with pytest.raises(StateError, match="a generator that is suspended"):
        asked.who()
    assert next(second) == "vaf" and next(first) == "pai" and next(second) == "vaf"
    for name in (None, "vaf"):
        with asked.using(name):
            assert asked.who() == name
    first.close()
    second.close()
    assert asked.who() is None


def test_a_generator_goes_on_in_another_context(asked: Asked) -> None:
    """As web servers run them: each value in a thread of its own."""
    stream = asked.stream("pai")
    assert [copy_context().run(next, stream) for _ in range(3)] == ["pai"] * 3
    assert copy_context().run(next, stream, "end") == "end" and asked.who() is None


def test_context_managers_made_of_generators_hold_for_their_block(asked: Asked) -> None:
    with asked.helper("pai"):
        assert asked.who() == "pai"
        with asked.using("vaf"):
            assert asked.who() == "vaf"
        assert asked.who() == "pai"

    def inside() -> Iterator[str | None]:
        with asked.helper("vaf"):
            yield asked.who()
            yield asked.who()

    stream = inside()
    assert next(stream) == "vaf"
    with asked.using(None):
        assert asked.who() is None
    assert next(stream) == "vaf"
    stream.close()


def test_async_generators(asked: Asked) -> None:
    async def stream(name: str) -> AsyncIterator[str | None]:
        with asked.using(name):
            for _ in range(2):
                await asyncio.sleep(0)
                yield asked.who()

    @asynccontextmanager
    async def helper(name: str) -> AsyncIterator[None]:
        with asked.using(name):
            yield

    async def run() -> None:
        values = stream("pai")
        assert await anext(values) == "pai"
        with pytest.raises(StateError, match="a generator that is suspended"):
            asked.who()
        with asked.using("vaf"):
            assert asked.who() == "vaf"
        assert await anext(values) == "pai"
        await values.aclose()  # type: ignore[attr-defined]  # it is an async generator
        assert asked.who() is None
        async with helper("vaf"):
            assert asked.who() == "vaf"

    asyncio.run(run())


def test_a_dropped_generator_leaves_nothing(asked: Asked) -> None:
    stream = asked.stream("pai")
    next(stream)
    del stream
    assert asked.who() is None
