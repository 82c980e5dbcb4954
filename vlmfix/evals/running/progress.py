"""The progress bar of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["progress_bar"]


@contextmanager
def progress_bar(
    steps: int, quiet: bool, told: Callable[[int, int, str], None] | None = None
) -> Iterator[Callable[[int, str], None]]:
    """One bar over all arms and tasks, on stderr, with the time left.

    Args:
        steps: requests in all.
        quiet: show nothing.
        told: called after every batch with (requests done so far, requests in all, what is
            running).

    Yields:
        (requests done, what is running) -> None.
    """
    if told is not None:
        done = 0
        with progress_bar(steps, quiet) as advance:

            def both(n: int, label: str) -> None:
                nonlocal done
                done += n
                advance(n, label)
                told(done, steps, label)

            yield both
        return
    if quiet:
        yield lambda n, label: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("loading", total=steps)
        yield lambda n, label: progress.update(bar, advance=n, description=label)
