"""Suites: several tasks with settled settings and one score card, `vlmfix eval --suite NAME`.

A suite is a folder of runs, one per part, so a part can be looked at, resumed and scored as any
other run. Its figures compare methods under one suite. "quick" is too small for a paper.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vlmfix.errors import BadInput
from vlmfix.evals.options import DEFAULTS, Options
from vlmfix.evals.tasks import list_tasks

__all__ = ["SETTLED", "SUITES", "Part", "parts_of", "run_suite"]


@dataclass(frozen=True)
class Part:
    """One run.

    Args:
        tasks: what it evaluates; their names joined by + are its folder.
        options: of `evaluate`, next to those that the caller chooses.
    """

    tasks: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)


#: "quick": minutes on a laptop with the bundled model. "pope" and "full": the papers' protocols.
SUITES: dict[str, tuple[Part, ...]] = {
    "quick": (
        Part(("pope",), {"n_images": 100, "splits": ("adversarial",)}),
        Part(("chair",), {"n_images": 50, "max_new_tokens": 48}),
    ),
    "pope": (Part(("pope",)),),
    "full": (Part(("pope",)), Part(("chair",))),
}

#: Options that a suite leaves no choice about on the command line.
SETTLED = ("n_images", "image_ids", "questions", "splits", "max_new_tokens")

#: What else the full suite asks about the bundled images.
_BUNDLED = ("mme", "rope")


def parts_of(suite: str, data: Mapping[str, Any] | None) -> tuple[Part, ...]:
    """The parts of a suite; the full one also has every task whose own data is given.

    Args:
        suite: a key of `SUITES`.
        data: task -> path, as `evaluate` takes it; None: the bundled images.

    Raises:
        BadInput: no such suite.
    """
    if suite not in SUITES:
        raise BadInput(f"no suite {suite!r}: choose from {', '.join(SUITES)}")
    parts = SUITES[suite]
    if suite != "full":
        return parts
    more = _BUNDLED if data is None else [name for name in list_tasks() if name in data]
    known = {task for part in parts for task in part.tasks}
    return (*parts, *(Part((task,)) for task in more if task not in known))


def run_suite(
    suite: str,
    model: str | Path = "emoji",
    methods: Iterable[Any] | None = None,
    data: Mapping[str, Any] | None = None,
    options: Options = DEFAULTS,
    *,
    quiet: bool = False,
    dtype: Any = None,
    device: Any = None,
    **changes: Any,
) -> dict[str, Any]:
    """Run the parts of a suite one after the other, and write their score card.

    Args:
        suite: a key of `SUITES`.
        model: "emoji", a folder or a hub id.
        methods: as `evaluate` takes them; None: every method that fits the model.
        data: task -> path, as `evaluate` takes it; None: the bundled images.
        options: for all parts; `output` is the folder of the suite.
        quiet: no progress bars.
        dtype: of the model.
        device: of the model.
        changes: fields of `Options` by name, over those of `options`.

    Returns:
        {"suite", "output", "left_out": method -> why it does not fit, "errors": items without an
        answer, "files": those of the card, "parts": folder -> results}.

    Raises:
        BadInput: no such suite, or an option that the suite settles.
        VlmfixError: as `evaluate`.
    """
    import vlmfix
    from vlmfix.analysis.doctor import examine
    from vlmfix.evals.harness import evaluate
    from vlmfix.evals.reporting.write import report
    from vlmfix.evals.running.files import write_json
    from vlmfix.evals.running.models import TransformersModel
    from vlmfix.evals.running.processes import Processes
    from vlmfix.evals.running.store import output_folder

    parts = parts_of(suite, data)
    given = set(changes) | options.changed()
    if clash := sorted({name for part in parts for name in part.options} & given):
        raise BadInput(f"the suite {suite} settles {', '.join(clash)}: leave it out")
    options = replace(options, **changes)
    if options.resume and options.output is None:
        raise BadInput("resume: name the suite's folder with output= (--output)")
    started, processes = datetime.now(UTC), Processes()
    folder = processes.once(
        lambda: output_folder(
            options.output, options.overwrite or options.resume, started, [suite], model
        )
    )
    loaded, processor = vlmfix.load(model, dtype=dtype, device=processes.device(device))
    left_out: dict[str, str] = {}
    if methods is None:
        rows = examine(loaded)["methods"]
        left_out = {row["name"]: row["why"] for row in rows if not row["fits"]}
        methods = [row["name"] for row in rows if row["fits"]]
    chosen = list(methods)
    asked = TransformersModel(loaded, processor, name=str(model))
    asked.check(chosen)
    results = {}
    for part in parts:
        name = "+".join(part.tasks)
        results[name] = evaluate(
            part.tasks,
            asked,
            chosen,
            None if data is None else {k: data[k] for k in (*part.tasks, "*") if k in data},
            replace(options, output=folder / name, **part.options),
            quiet=quiet,
        )

    def finish() -> list[str]:
        write_json(folder / "suite.json", {"suite": suite, "left_out": left_out})
        return [str(path) for path in report(folder, plots=find_spec("matplotlib") is not None)]

    return {
        "suite": suite,
        "output": str(folder),
        "left_out": left_out,
        "errors": sum(part["errors"] for part in results.values()),
        "files": processes.once(finish),
        "parts": results,
    }
