"""A model whose answers are a function of the request, for whole runs of any task."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlmfix.evals import evaluate
from vlmfix.evals.running.runner import Request
from vlmfix.evals.tasks import Answer


class Scripted:
    """Answers every request by `reply(arm, request)`, and keeps requests and pictures.

    Args:
        reply: (None or the method, request) -> the answer's text.
    """

    facts: Mapping[str, Any] = {"model": "scripted", "dtype": "float32", "device": "cpu"}

    def __init__(self, reply: Callable[[Any, Request], str]) -> None:
        self.reply = reply
        self.requests: list[Request] = []
        self.pictures: dict[str, Any] = {}

    def check(self, methods: Sequence[Any]) -> None:
        pass

    def describe(self, method: Any | None) -> Any:
        return method and [{"method": method}]

    @contextmanager
    def arm(
        self,
        method: Any | None,
        gen_kwargs: Mapping[str, Any],
        image: Callable[[str], Any],
        wants_p_yes: bool,
    ) -> Iterator[Callable[[Sequence[Request], int], list[Answer]]]:
        def answer(batch: Sequence[Request], noise: int) -> list[Answer]:
            for request in batch:
                self.requests.append(request)
                if request.sample.image is not None:
                    self.pictures[request.sample.image] = image(request.sample.image)
            return [Answer(self.reply(method, request), 10, 2, "eos", 2.0) for request in batch]

        yield answer

    def run(self, task: str, data: Path, output: Path, **options: Any) -> dict[str, Any]:
        """The task's entry of a run of base and one method."""
        results = evaluate(
            [task], self, ["var"], data={task: data}, output=output, quiet=True, **options
        )
        assert results["errors"] == 0
        entry: dict[str, Any] = results["tasks"][task]
        return entry
