"""Evaluation of a model with and without methods, on the same items.

    results = vlmfix.evals.evaluate(["pope"], methods=["var", "pai"], limit=100)
    rich.print(vlmfix.evals.render(results))

Importing this package is light: torch, PIL and rich come in with the first call that needs them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vlmfix.evals.options import Options
from vlmfix.evals.tasks import TASKS, Task, get_task, list_tasks

if TYPE_CHECKING:
    from vlmfix.evals.harness import evaluate
    from vlmfix.evals.reporting.report import render, to_markdown

__all__ = [
    "TASKS",
    "Options",
    "Task",
    "evaluate",
    "get_task",
    "list_tasks",
    "render",
    "to_markdown",
]

_HOME = {
    "evaluate": "vlmfix.evals.harness",
    "render": "vlmfix.evals.reporting.report",
    "to_markdown": "vlmfix.evals.reporting.report",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
