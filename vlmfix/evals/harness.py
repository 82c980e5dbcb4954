"""One evaluation from start to end: tasks, base and methods, files, results.

Everything that can be refused is refused before the model is asked and before anything is written.
"""

from __future__ import annotations

import json
import platform
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from secrets import token_hex
from typing import Any

from vlmfix._version import __version__
from vlmfix.errors import BadInput
from vlmfix.evals.options import DEFAULTS, Options
from vlmfix.evals.reporting.card import make_card
from vlmfix.evals.reporting.write import write_card
from vlmfix.evals.running.arms import Arm, decoded_arms, file_name, named_arms
from vlmfix.evals.running.cost import cost, peak_memory
from vlmfix.evals.running.files import write_json
from vlmfix.evals.running.lock import locked
from vlmfix.evals.running.processes import Processes
from vlmfix.evals.running.progress import progress_bar
from vlmfix.evals.running.records import Recorder, answer_of, digest, merge, part
from vlmfix.evals.running.runner import ModelUnderTest, plan_batches, remaining, run_arm
from vlmfix.evals.running.store import FORMAT, answered, begin, output_folder
from vlmfix.evals.scoring.compare import compare_arms
from vlmfix.evals.tasks import Answer, DataSource, Task, get_task

__all__ = ["evaluate"]

#: Visual tokens of a bundled image in the bundled model.
_BUNDLED_TOKENS = 64
_USUAL_SIZE = (448, 448)

Data = str | Path | DataSource


def evaluate(
    tasks: Sequence[str],
    model: Any = "emoji",
    methods: Sequence[Any] = (),
    data: Data | Mapping[str, Data] | None = None,
    options: Options = DEFAULTS,
    *,
    quiet: bool = False,
    dtype: Any = None,
    device: Any = None,
    progress: Callable[[int, int, str], None] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Ask the plain model and the model under each method the same items, and compare them.

    Greedy decoding by default. With a temperature every item is answered once per seed, and all
    arms draw with the same random numbers (`runner.noise_seed`); how figures of several seeds and
    their intervals are made is said in `metrics.summarise`. Sampled figures are comparable under
    equal seeds, tasks, splits and batch size, which decide the random numbers of an item.

    Under `accelerate launch` (or torchrun) every process answers a share of the batches; the
    answers are those of one process. Every answer is on disk at once: a run that was ended
    goes on with `resume`, and gives what it would have given in one go.

    Args:
        tasks: names, of `vlmfix.evals.list_tasks()`.
        model: "emoji", a folder, a hub id, or (model, processor). A wrapped model is asked with
            each method instead of its own, in this thread alone.
        methods: one arm each: a name with options, a list of them (a stack), or a method object.
        data: folder or file in the format of the tasks (COCO for pope and chair); or a mapping from
            task to its own, where "*" stands for all other tasks. None, and tasks that the mapping
            leaves out, take the bundled images.
        options: what else can be chosen.
        quiet: no progress bar.
        dtype: of the model, if it is loaded here.
        device: of the model, if it is loaded here; with several processes, a GPU each.
        progress: called after every batch with (requests done, requests in all, what is running).
            What it raises ends the run.
        changes: fields of `Options` by name, over those of `options`: `limit=100`.

    Returns:
        What results.json holds, in every process. `results["errors"]` counts items without an
        answer.

    Raises:
        VlmfixError: an unknown task (UnknownTask) or method; options, data or an output folder that
            cannot be used, another run in that folder, or a resumed run with other settings
            (BadInput). Nothing has been written then.
    """
    options = replace(options, **changes)
    if not tasks:
        raise BadInput("no task to evaluate: name at least one, such as pope")
    task_types = {name: get_task(name) for name in tasks}
    named = named_arms(methods, options.noop)
    arms = decoded_arms(named, options.temperature, options.seeds, options.greedy_too)
    if options.resume and (options.output is None or options.overwrite):
        raise BadInput("resume: name the run's folder with output= (--output), without overwrite")
    started = datetime.now(UTC)
    processes = Processes()
    # Asked once: the next process would find what the first one makes.
    folder = processes.once(
        lambda: output_folder(
            options.output, options.overwrite or options.resume, started, task_types, model
        )
    )
    opened = _open(task_types, data)
    ready = {name: task_type(opened[name], options) for name, task_type in task_types.items()}
    for name, task in ready.items():
        pictures = [sample.image for sample in task.samples if sample.image is not None]
        opened[name].require_images(list(dict.fromkeys(pictures)))
    plans = {name: plan_batches(task.samples, options.batch_size) for name, task in ready.items()}
    applied = [method for method in named.values() if method is not None]
    asked = _model(model, applied, dtype, processes.device(device))
    asked.check(applied)
    if processes.rank == 0:
        for name, task in ready.items():
            if _given(name, data) is None and (shown := _shown(task)):
                _warn_of_few_tokens(name, asked, opened[name].image(shown))

    config = _plain_json(
        {
            **asked.facts,
            "methods": {arm: asked.describe(method) for arm, method in named.items()},
            **options.deciding(),
            "versions": _versions(),
            "tasks": {name: _fingerprint(task, opened[name]) for name, task in ready.items()},
        }
    )
    jobs = [
        _Job(
            name,
            arm,
            f"samples_{name}_{file_name(arm)}",
            one,
            one.gen_kwargs(options.max_new_tokens or task.max_new_tokens),
        )
        for name, task in ready.items()
        for arm, one in arms.items()
    ]
    run_id = f"{started:%Y%m%dT%H%M%SZ}-{token_hex(4)}"
    stems = [job.stem for job in jobs]
    with ExitStack() as held:

        def start() -> tuple[str, int]:
            held.enter_context(locked(folder))
            return run_id, begin(folder, run_id, config, stems, options.resume, options.overwrite)

        run_id, found = processes.once(start)
        done = {stem: answered(folder, stem) for stem in stems}
        # Whole blocks of batches, every size-th: what is in a batch, and so the last bits of its
        # answers, is the same for any number of processes. Shares of the samples would be batched
        # otherwise.
        shares = {name: blocks[processes.rank :: processes.size] for name, blocks in plans.items()}
        left = sum(remaining(shares[job.task], done[job.stem], job.arm.draws) for job in jobs)
        memory = {}
        quiet = quiet or processes.rank > 0
        if not quiet:
            kept = f", {found} of them from before" if found else ""
            print(
                f"answers go to {folder}{kept}; what is ended goes on with --resume",
                file=sys.stderr,
            )
        with progress_bar(left, quiet, progress) as advance:
            for job in jobs:
                task = ready[job.task]
                common = {
                    "run_id": run_id,
                    "rank": processes.rank,
                    "config": digest(config),
                    "method": job.name,
                    "method_cfg": asked.describe(job.arm.method),
                    "gen_kwargs": job.gen_kwargs,
                    "seed": options.seed,
                }
                image = lru_cache(maxsize=64)(opened[job.task].image)
                with (
                    peak_memory() as peak,
                    Recorder(part(folder, job.stem, processes.rank), task, common) as recorder,
                    asked.arm(job.arm.method, job.gen_kwargs, image, task.wants_p_yes) as answer,
                ):
                    run_arm(
                        shares[job.task],
                        answer,
                        recorder,
                        done[job.stem],
                        lambda n, label=f"{job.task} {job.name}": advance(n, label),  # type: ignore[misc]  # a default binds it
                        options.seed,
                        job.arm.draws,
                    )
                peaks = processes.gather(peak)
                memory[job.stem] = {key: max(p[key] for p in peaks) for key in peak}

        def finish() -> dict[str, Any]:
            results: dict[str, Any] = {
                "format": FORMAT,
                "run_id": run_id,
                "timestamp": started.isoformat(timespec="seconds"),
                "partial": any(task.partial for task in ready.values()),
                "errors": 0,
                "resumed": found,
                "config": {**config, "threads": _threads(), "processes": processes.size},
                "tasks": {},
            }
            for name, task in ready.items():
                of_task = [job for job in jobs if job.task == name]
                records = {job.name: merge(folder, job.stem) for job in of_task}
                answers = {job.name: _answers(task, job.arm, records[job.name]) for job in of_task}
                entry = compare_arms(task, answers, options.seed)
                for job in of_task:
                    entry["arms"][job.name] |= {
                        "cost": cost(records[job.name], plans[name]) | memory[job.stem],
                        "gen_kwargs": job.gen_kwargs,
                    }
                results["tasks"][name] = {
                    **entry,
                    "data": opened[name].name,
                    "data_sha256": opened[name].sha256,
                    "gen_kwargs": of_task[0].gen_kwargs,
                }
                results["errors"] += sum(arm["n_errors"] for arm in entry["arms"].values())
            results["partial"] = results["partial"] or results["errors"] > 0
            write_json(folder / "results.json", results)
            write_card(make_card({folder.name: results}), folder, plots=False)
            return results

        results = processes.once(finish)
        results["output"] = str(folder)  # for the caller; a file need not say where it lay
        return results


@dataclass(frozen=True)
class _Job:
    """One arm of one task.

    Args:
        task: name.
        name: of the arm.
        stem: of its files.
        arm: how it answers.
        gen_kwargs: of generate().
    """

    task: str
    name: str
    stem: str
    arm: Arm
    gen_kwargs: dict[str, Any]


def _answers(task: Task, arm: Arm, records: Sequence[Mapping[str, Any]]) -> list[list[Answer]]:
    """Per sampling seed, one list aligned with the samples; one list in all if greedy."""
    found = {(row["sampling_seed"], row["sample_id"]): answer_of(row) for row in records}
    return [[found[draw, sample.sample_id] for sample in task.samples] for draw in arm.draws]


def _fingerprint(task: Task, data: DataSource) -> dict[str, Any]:
    """What decides the questions of a task, for the comparison with an earlier run."""
    asked = [
        [s.sample_id, s.split, s.image, s.prompt, s.follows, s.prefix, s.grow, s.until, s.target]
        for s in task.samples
    ]
    return {
        "data_sha256": data.sha256,
        "samples_sha256": digest(_plain_json(asked)),
        **_plain_json(task.facts),
    }


def _plain_json(content: Any) -> Any:
    """The content as it reads when it has been written to a JSON file."""
    return json.loads(json.dumps(content, default=str))


def _open(
    task_types: Mapping[str, type[Task]], data: Data | Mapping[str, Data] | None
) -> dict[str, DataSource]:
    """Task -> its data; tasks that open the same path the same way share one."""
    chosen: Mapping[str, Any] = data if isinstance(data, Mapping) else {"*": data}
    if strange := sorted(set(chosen) - {*task_types, "*"}):
        raise BadInput(
            f"data for {', '.join(strange)}, which is not evaluated here: name one of "
            f"{', '.join(task_types)}, or * for all others"
        )
    opened: dict[Any, DataSource] = {}
    found = {}
    for name, task_type in task_types.items():
        source = _given(name, data)
        if isinstance(source, DataSource):
            found[name] = source
            continue
        key = (task_type.open, source)
        if key not in opened:
            opened[key] = task_type.open(source)
        found[name] = opened[key]
    return found


def _given(task: str, data: Data | Mapping[str, Data] | None) -> Any:
    """What the caller named as the data of a task; None: the bundled images."""
    return data.get(task, data.get("*")) if isinstance(data, Mapping) else data


def _shown(task: Task) -> str | None:
    """The first picture that a task shows."""
    return next((sample.image for sample in task.samples if sample.image is not None), None)


def _warn_of_few_tokens(task: str, asked: ModelUnderTest, picture: Any) -> None:
    """Say it where a model sees less of the bundled images than the bundled model does."""
    from vlmfix.evals.running.models import TransformersModel

    if not isinstance(asked, TransformersModel):
        return
    number, of_usual = (
        asked.visual_tokens(shown) or 0 for shown in (picture, picture.resize(_USUAL_SIZE))
    )
    # Some models make as few of any picture (InstructBLIP: 32).
    if number < min(of_usual, _BUNDLED_TOKENS):
        warnings.warn(
            f"{task}: the bundled images have {picture.width} x {picture.height} pixels, and this "
            f"model makes {number} visual tokens of one: too few for methods that weigh or drop "
            f"visual tokens to show what they do. Name pictures of usual size with data= (--data)",
            stacklevel=3,
        )


def _model(model: Any, methods: Sequence[Any], dtype: Any, device: Any) -> ModelUnderTest:
    from vlmfix.evals.running.models import TransformersModel

    if isinstance(model, ModelUnderTest):
        return model
    if isinstance(model, (str, Path)):
        import vlmfix
        from vlmfix.registry import build_stack

        # A misspelt method should not cost the minutes that a large model takes to load.
        for method in methods:
            build_stack(method)

        return TransformersModel(*vlmfix.load(model, dtype=dtype, device=device), name=str(model))
    if isinstance(model, tuple) and len(model) == 2:
        return TransformersModel(*model)
    raise BadInput(
        f"cannot evaluate a {type(model).__name__}: pass a name, a folder or (model, processor)"
    )


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"vlmfix": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "accelerate", "numpy", "pillow"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _threads() -> int | None:
    torch = sys.modules.get("torch")
    return int(torch.get_num_threads()) if torch is not None else None
