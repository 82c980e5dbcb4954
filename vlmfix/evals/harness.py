"""One evaluation from start to end: tasks, base and methods, files, results.

Everything that can be refused is refused before the model is asked and before anything is written.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from secrets import token_hex
from typing import Any

from vlmfix._version import __version__
from vlmfix.errors import BadInput
from vlmfix.evals.arms import BASE, file_name, named_arms
from vlmfix.evals.coco import CocoData
from vlmfix.evals.progress import progress_bar
from vlmfix.evals.report import write_json
from vlmfix.evals.runner import ArmRun, ModelUnderTest, Recorder, distinct_requests, run_arm
from vlmfix.evals.tasks import Options, Task, get_task

__all__ = ["evaluate", "output_folder", "positive"]

FORMAT = 1


def evaluate(
    tasks: Sequence[str],
    model: Any = "emoji",
    methods: Sequence[Any] = (),
    data: str | Path | CocoData | None = None,
    limit: int | None = None,
    output: str | Path | None = None,
    batch_size: int = 32,
    seed: int = 0,
    prompt_style: str = "lmms",
    parser: str = "official",
    max_new_tokens: int | None = None,
    overwrite: bool = False,
    quiet: bool = False,
    *,
    n_images: int | None = 500,
    truncate: str = "none",
    questions: Mapping[str, str | Path] | None = None,
    splits: Sequence[str] | None = None,
    temperature: float | None = None,
    seeds: int = 1,
    dtype: Any = None,
    device: Any = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Ask the plain model and the model under each method the same items, and compare them.

    Greedy decoding by default. With a temperature every item is answered once per seed, and all
    arms draw with the same random numbers (`runner.noise_seed`); how figures of several seeds and
    their intervals are made is said in `metrics.summarise`. Sampled figures are comparable under
    equal seeds, tasks, splits and batch size, which decide the random numbers of an item.

    Args:
        tasks: names from `vlmfix.evals.TASKS`.
        model: "emoji", a folder, a hub id, or (model, processor). A wrapped model is asked with
            each method instead of its own, in this thread alone.
        methods: one arm each: a name with options, a list of them (a stack), or a method object.
        data: COCO-format folder or .zip; None takes the bundled evaluation images.
        limit: ask about the first so many selected images only; the results say PARTIAL.
        output: folder for results.json and samples_*.jsonl; None makes one under runs/.
        batch_size: (image, prompt) pairs per generate call.
        seed: of image selection, question building, bootstrap, sampling, and noise that methods
            draw.
        prompt_style: of yes/no questions: bare, lmms, vcd or clearsight.
        parser: of yes/no answers, a key of `parsers.PARSERS`; strict is reported beside it.
        max_new_tokens: None takes 16 for POPE and 512 for CHAIR.
        overwrite: replace the results that `output` already holds.
        quiet: no progress bar.
        n_images: images that a task selects; None takes all eligible ones.
        truncate: "sentence" drops the sentence of a caption that the token limit cut.
        questions: POPE question files by split, instead of building questions.
        splits: POPE splits to build, of `pope.SPLITS`; None: random, popular, adversarial.
        temperature: sample at it, from all tokens (top_p 1, top_k 0); None: greedy.
        seeds: how many answers are sampled to each item, each with a seed of its own.
        dtype: of the model, if it is loaded here.
        device: of the model, if it is loaded here.
        progress: called after every batch with (requests done, requests in all, what is running).
            What it raises ends the run.

    Returns:
        What results.json holds. `results["errors"]` counts items without an answer.

    Raises:
        VlmfixError: an unknown task (UnknownTask) or method, options, data or an output folder that
            cannot be used (BadInput). Nothing has been written then.
    """
    if not tasks:
        raise BadInput("no task to evaluate: name at least one, such as pope")
    task_types = {name: get_task(name) for name in tasks}
    arms = named_arms(methods)
    positive(limit=limit, batch_size=batch_size, max_new_tokens=max_new_tokens, n_images=n_images)
    draws = _draws(temperature, seeds)
    started = datetime.now(timezone.utc)
    folder = output_folder(output, overwrite, started, task_types, model)
    opened = data if isinstance(data, CocoData) else CocoData(data or _bundled_data())
    options = Options(
        seed=seed,
        limit=limit,
        n_images=n_images,
        prompt_style=prompt_style,
        parser=parser,
        max_new_tokens=max_new_tokens,
        truncate=truncate,
        questions={k: Path(v) for k, v in questions.items()} if questions else None,
        splits=splits,
    )
    ready = {name: task_type(opened, options) for name, task_type in task_types.items()}
    pictures = [sample.image for task in ready.values() for sample in task.samples]
    opened.require_images(list(dict.fromkeys(pictures)))
    applied = [method for method in arms.values() if method is not None]
    asked = _model(model, applied, dtype, device)
    asked.check(applied)

    folder.mkdir(parents=True, exist_ok=True)
    for stale in [folder / "results.json", *folder.glob("samples_*.jsonl")]:
        stale.unlink(missing_ok=True)
    run_id = f"{started:%Y%m%dT%H%M%SZ}-{token_hex(4)}"
    results: dict[str, Any] = {
        "format": FORMAT,
        "run_id": run_id,
        "timestamp": started.isoformat(timespec="seconds"),
        "partial": any(task.partial for task in ready.values()),
        "errors": 0,
        "config": {
            **asked.facts,
            "methods": {arm: asked.describe(method) for arm, method in arms.items()},
            "data": opened.source.name,
            "data_sha256": opened.sha256,
            "limit": limit,
            "n_images": n_images,
            "seed": seed,
            "temperature": temperature,
            "seeds": seeds,
            "batch_size": batch_size,
            "versions": _versions(),
            "threads": _threads(),
        },
        "tasks": {},
    }
    image = lru_cache(maxsize=64)(opened.image)
    asks = sum(len(distinct_requests(task.samples)) for task in ready.values())
    with progress_bar(len(arms) * len(draws) * asks, quiet, progress) as advance:
        for name, task in ready.items():
            gen_kwargs = _decoding(max_new_tokens or task.max_new_tokens, temperature)
            runs = {}
            for arm, method in arms.items():
                common = {
                    "run_id": run_id,
                    "method": arm,
                    "method_cfg": asked.describe(method),
                    "gen_kwargs": gen_kwargs,
                    "seed": seed,
                    "rank": 0,
                }
                path = folder / f"samples_{name}_{file_name(arm)}.jsonl"
                with (
                    Recorder(path, task, common) as recorder,
                    asked.arm(method, gen_kwargs, image) as answer,
                ):
                    runs[arm] = run_arm(
                        task.samples,
                        answer,
                        batch_size,
                        recorder,
                        lambda n, label=f"{name} {arm}": advance(n, label),  # type: ignore[misc]
                        seed,
                        draws,
                    )
            entry = _score(task, runs)
            results["tasks"][name] = {**entry, "gen_kwargs": gen_kwargs}
            results["errors"] += sum(entry["arms"][arm]["n_errors"] for arm in arms)
    results["partial"] = results["partial"] or results["errors"] > 0
    write_json(folder / "results.json", results)
    results["output"] = str(folder)  # for the caller; a file need not say where it lay
    return results


def _score(task: Task, runs: Mapping[str, ArmRun]) -> dict[str, Any]:
    """Score what every arm answered: an item that failed once, under any arm, counts for none."""
    everything = range(len(task.samples))
    rows = [row for run in runs.values() for row in run.answers]
    answered = [i for i in everything if all(row[i].error is None for row in rows)]
    draws = range(len(runs[BASE].answers))
    samples = [task.samples[i] for _ in draws for i in answered]
    answers = {arm: [row[i] for row in run.answers for i in answered] for arm, run in runs.items()}
    scored = task.score(samples, answers, [draw for draw in draws for _ in answered])
    base, n = answers[BASE], max(1, len(samples))
    for arm, run in runs.items():
        texts = answers[arm]
        scored[arm] |= {
            "cost": run.cost,
            "n_errors": sum(answer.error is not None for row in run.answers for answer in row),
            "n_empty": sum(not answer.text.strip() for answer in texts),
            "cut_share": sum(answer.finish == "length" for answer in texts) / n,
            "same_as_base": sum(a.text == b.text for a, b in zip(texts, base, strict=True)) / n,
        }
    images = list(dict.fromkeys(sample.image_id for sample in task.samples))
    excluded = set(everything) - set(answered)
    return {
        **task.facts,
        "partial": task.partial or bool(excluded),
        "n_samples": len(answered),
        "n_images": len(images),
        "splits": list(dict.fromkeys(sample.split for sample in task.samples)),
        "image_ids": images,
        "image_ids_sha256": hashlib.sha256(json.dumps(images).encode()).hexdigest(),
        "excluded": [task.samples[i].sample_id for i in sorted(excluded)],
        "arms": scored,
    }


def _draws(temperature: float | None, seeds: int) -> Sequence[int | None]:
    """The numbers of the sampling seeds; one None for greedy decoding."""
    positive(seeds=seeds)
    if temperature is None:
        if seeds > 1:
            raise BadInput(
                f"seeds={seeds} without a temperature: greedy answers are the same under every "
                "seed. Sample with temperature=1.0 (--temperature 1.0), or leave seeds out"
            )
        return (None,)
    if not 0 < temperature < math.inf:
        raise BadInput(
            f"temperature={temperature}: must be positive; leave it out for greedy decoding"
        )
    return range(seeds)


def _decoding(max_new_tokens: int, temperature: float | None) -> dict[str, Any]:
    """Arguments of generate().

    Sampling is spelled out: transformers' own top_k is 50, and checkpoints bring settings, too.
    """
    shared = {
        "max_new_tokens": max_new_tokens,
        "do_sample": temperature is not None,
        "num_beams": 1,
    }
    if temperature is None:
        return shared
    return {**shared, "temperature": float(temperature), "top_p": 1.0, "top_k": 0}


def positive(**values: int | None) -> None:
    """Raise BadInput unless every option that is given is 1 or more."""
    for name, value in values.items():
        if value is not None and value < 1:
            raise BadInput(f"{name}={value}: must be 1 or more")


def output_folder(
    output: str | Path | None,
    overwrite: bool,
    started: datetime,
    names: Iterable[str],
    model: Any,
) -> Path:
    """Where results go: `output`, or a new folder under runs/; it is not made yet.

    Args:
        output: what the user asked for.
        overwrite: whether it may hold something.
        started: time of the run.
        names: what is run, part of the name of a new folder.
        model: the model's name, if it is a text or path.

    Raises:
        BadInput: `output` is a file, or holds something.
    """
    if output is None:
        name = Path(model).name if isinstance(model, (str, Path)) else "model"
        stamp = f"{started:%Y%m%dT%H%M%S.%f}"[:-3] + "Z"
        output = Path("runs") / f"{stamp}-{'+'.join(names)}-{file_name(name)}"
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"output: {folder} is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise BadInput(
            f"output: {folder} is not empty: name another folder, or replace its results with "
            "overwrite=True (--overwrite)"
        )
    return folder


def _bundled_data() -> Path:
    from vlmfix import emoji

    return Path(emoji.evaluation_split())


def _model(model: Any, methods: Sequence[Any], dtype: Any, device: Any) -> ModelUnderTest:
    from vlmfix.evals.models import TransformersModel

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
    for package in ("torch", "transformers", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _threads() -> int | None:
    torch = sys.modules.get("torch")
    return int(torch.get_num_threads()) if torch is not None else None
