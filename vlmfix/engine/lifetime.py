"""The lifetimes of what the engine knows: a thread, a call, a KV cache, a forward.

A stage keeps what it has to remember with the lifetime that fits, as one object of a class of its
own. No other part has to know that class, so a new stage adds nothing to calls, caches or forwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

__all__ = ["Lifetime"]

Kept = TypeVar("Kept")


class Lifetime:
    """Something that ends, and the objects that end with it: at most one of each class."""

    def __init__(self) -> None:
        self._kept: dict[type, Any] = {}

    def get(self, kind: type[Kept]) -> Kept | None:
        """The object of this class, if one is kept."""
        found: Kept | None = self._kept.get(kind)
        return found

    def of(self, kind: type[Kept]) -> Kept:
        """The object of this class; the first to ask makes it, without arguments."""
        if kind not in self._kept:
            self._kept[kind] = kind()
        found: Kept = self._kept[kind]
        return found

    def keep(self, thing: Kept) -> Kept:
        """Keep an object, in place of one of its class."""
        self._kept[type(thing)] = thing
        return thing

    def forget(self, kind: type) -> None:
        """Keep no object of this class any more."""
        self._kept.pop(kind, None)

    def kept(self) -> tuple[Any, ...]:
        """Everything that is kept."""
        return tuple(self._kept.values())

    @contextmanager
    def keeping(self, thing: Any) -> Iterator[None]:
        """Keep an object for the length of a with-block, then what was kept in its place."""
        before = self._kept.get(type(thing))
        self.keep(thing)
        try:
            yield
        finally:
            if before is None:
                self.forget(type(thing))
            else:
                self.keep(before)
