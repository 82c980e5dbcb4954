"""Which tests `make test` runs; `make test-full` runs all of them.

A test, or a case of it, is left to `make test-full` if it carries the marker `slow`. Two things
give it that marker: its own line, and this file, for tests that carry `rotated`. These run a
product of cases, say every method on every family in every mode, of which `make test` takes few
that still show everything: every pair of a method and a family, of a method and a mode, and so on.
The choice is made from the cases as they are collected, so that a new row is chosen from, too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

import pytest

Shows = Callable[[Mapping[str, Any]], Iterable[Hashable]]
"""From a case, {parameter: value}, with "test" for the name of its function: what it shows."""


def mark_slow(items: Sequence[pytest.Item]) -> None:
    """Give `slow` to the cases of rotated tests that show nothing new.

    Tests of one file that say the same function in `rotated(shows=...)` are chosen from together;
    any other test alone, so that each value of its parameters occurs, and of three parameters or
    more each pair of values.
    """
    pools: dict[Hashable, list[pytest.Function]] = {}
    for item in items:
        marker = item.get_closest_marker("rotated")
        if (
            marker is None
            or item.get_closest_marker("slow")
            or not isinstance(item, pytest.Function)
        ):
            continue
        shows = marker.kwargs.get("shows", item.originalname)
        pools.setdefault((item.path, shows), []).append(item)
    for (_, shows), pool in pools.items():
        cases = [{**_parameters(item), "test": item.originalname} for item in pool]
        given = shows if callable(shows) else values_or_pairs(cases)
        chosen = fewest([frozenset(given(case)) for case in cases])
        for at, item in enumerate(pool):
            if at not in chosen:
                item.add_marker(pytest.mark.slow)


def _parameters(item: pytest.Function) -> dict[str, Any]:
    callspec = getattr(item, "callspec", None)
    assert callspec is not None, f"{item.nodeid} has no parameters to rotate"
    return dict(callspec.params)


def values_or_pairs(cases: Sequence[Mapping[str, Any]]) -> Shows:
    """What cases of one test show: values of two parameters, pairs of values of more than two."""
    names = [name for name in cases[0] if len({_key(case[name]) for case in cases}) > 1]

    def shows(case: Mapping[str, Any]) -> Iterable[Hashable]:
        values = [(name, _key(case[name])) for name in names]
        return combinations(values, 2) if len(names) > 2 else values

    return shows


def _key(value: Any) -> Hashable:
    return value if isinstance(value, Hashable) else repr(value)


def fewest(shown: Sequence[Collection[Hashable]]) -> set[int]:
    """Indices of few cases that show together whatever any of them shows.

    Those that show most of what no chosen case has shown are taken first, in the order of the
    cases: the same cases give the same choice.
    """
    seen: set[Hashable] = set()
    chosen: set[int] = set()
    # What is new in a case only becomes less: one pass per number finds every case with so many.
    for wanted in range(max(map(len, shown), default=0), 0, -1):
        for at, case in enumerate(shown):
            if at not in chosen and sum(thing not in seen for thing in case) >= wanted:
                chosen.add(at)
                seen.update(case)
    return chosen
