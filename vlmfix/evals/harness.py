"""One evaluation from start to end: tasks, base and methods, files, results.

Everything that can be refused is refused before the model is asked and before anything is written.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from secrets import token_hex
from typing import Any

from vlmfix._version import __version__
from vlmfix.errors import BadInput
from vlmfix.evals.reporting.card import make_card, write_card
from vlmfix.evals.reporting.report import write_json
from vlmfix.evals.running.arms import (
    BASE,
    NOOP,
    Arm,
    decoded_arms,
    file_name,
    greedy_twin,
    named_arms,
)
from vlmfix.evals.running.cost import cost, peak_memory
from vlmfix.evals.running.processes import Processes
from vlmfix.evals.running.progress import progress_bar
from vlmfix.evals.running.records import (
    Done,
    Recorder,
    answer_of,
    differences,
    digest,
    merge,
    part,
    read_records,
)
from vlmfix.evals.running.runner import ModelUnderTest, plan_batches, remaining, run_arm
from vlmfix.evals.scoring.controls import add_controls
from vlmfix.evals.tasks import Answer, DataSource, Options, Task, get_task

__all__ = ["evaluate", "output_folder", "positive"]

FORMAT = 1

#: Written before the first answer: what was asked for, so that a resumed run can be told to differ.
RUN_FILE = "run.json"

Data = str | Path | DataSource


def evaluate(
    tasks: Sequence[str],
    model: Any = "emoji",
    methods: Sequence[Any] = (),
    data: Data | Mapping[str, Data] | None = None,
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
    ground_truth: str | None = None,
    official_typo: bool = False,
    image_ids: str | Path | None = None,
    chair_engine: str = "builtin",
    chair_mode: str = "compat",
    amber_similarity: str = "exact",
    temperature: float | None = None,
    seeds: int = 1,
    greedy_too: bool = False,
    noop: bool = False,
    resume: bool = False,
    dtype: Any = None,
    device: Any = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Ask the plain model and the model under each method the same items, and compare them.

    Greedy decoding by default. With a temperature every item is answered once per seed, and all
    arms draw with the same random numbers (`runner.noise_seed`); how figures of several seeds and
    their intervals are made is said in `metrics.summarise`. Sampled figures are comparable under
    equal seeds, tasks, splits and batch size, which decide the random numbers of an item.

    Under `accelerate launch` (or torchrun) every process answers a share of the batches; the
    answers are those of one process. Every answer is on disk at once: a run that was ended by
    whatever cause goes on with `resume`, and gives what it would have given in one go.

    Args:
        tasks: names from `vlmfix.evals.TASKS`.
        model: "emoji", a folder, a hub id, or (model, processor). A wrapped model is asked with
            each method instead of its own, in this thread alone.
        methods: one arm each: a name with options, a list of them (a stack), or a method object.
        data: folder or file in the format of the tasks (COCO for pope and chair); or a mapping from
            task to its own, where "*" stands for all other tasks. None, and tasks that the mapping
            leaves out, take the bundled images.
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
        questions: POPE question files by split, instead of building questions; "all" takes the
            splits that a file or hub set names itself.
        splits: POPE splits to build, of `pope.SPLITS`; None: random, popular, adversarial.
        ground_truth: of built POPE questions: instances or instances+captions; None takes the
            captions where there are some and all categories are COCO's.
        official_typo: POPE writes "in the imange" after "an", as the published files do.
        image_ids: file of the images that CHAIR describes, instead of drawing them.
        chair_engine: what finds objects in captions: builtin, or nltk as the official code.
        chair_mode: compat, or fixed for repaired rules that compare with no published figure.
        amber_similarity: when two nouns are the same to AMBER: exact (equal words), spacy (vectors
            of en_core_web_lg, as the official code) or spacy:MODEL.
        temperature: sample at it, from all tokens (top_p 1, top_k 0); None: greedy.
        seeds: how many answers are sampled to each item, each with a seed of its own.
        greedy_too: with a temperature, run every arm greedily, too, as "<arm> greedy". Beside the
            comparison with the sampled base, results have that with the greedy base
            (`against_greedy`): a method that is better than sampling only may be worse than greedy.
        noop: add an arm that is hooked like a method and edits nothing; its answers have to be the
            base's.
        resume: go on with the run in `output`, with the settings that it began with. Finished
            answers stay, errors are asked again. An empty or new folder starts a run.
        dtype: of the model, if it is loaded here.
        device: of the model, if it is loaded here; with several processes, a GPU each.
        progress: called after every batch with (requests done, requests in all, what is running).
            What it raises ends the run.

    Returns:
        What results.json holds, in every process. `results["errors"]` counts items without an
        answer.

    Raises:
        VlmfixError: an unknown task (UnknownTask) or method; options, data or an output folder that
            cannot be used, or a resumed run with other settings (BadInput). Nothing has been
            written then.
    """
    if not tasks:
        raise BadInput("no task to evaluate: name at least one, such as pope")
    task_types = {name: get_task(name) for name in tasks}
    named = named_arms(methods, noop)
    positive(
        limit=limit,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        n_images=n_images,
        seeds=seeds,
    )
    arms = decoded_arms(named, temperature, seeds, greedy_too)
    if resume and (output is None or overwrite):
        raise BadInput("resume: name the run's folder with output= (--output), without overwrite")
    started = datetime.now(timezone.utc)
    processes = Processes()
    # Asked once: the next process would find what the first one makes.
    folder = processes.once(
        lambda: output_folder(output, overwrite or resume, started, task_types, model)
    )
    opened = _open(task_types, data)
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
        ground_truth=ground_truth,
        official_typo=official_typo,
        image_ids=None if image_ids is None else Path(image_ids),
        chair_engine=chair_engine,
        chair_mode=chair_mode,
        amber_similarity=amber_similarity,
    )
    ready = {name: task_type(opened[name], options) for name, task_type in task_types.items()}
    for name, task in ready.items():
        pictures = [sample.image for sample in task.samples if sample.image is not None]
        opened[name].require_images(list(dict.fromkeys(pictures)))
    plans = {name: plan_batches(task.samples, batch_size) for name, task in ready.items()}
    applied = [method for method in named.values() if method is not None]
    if processes.size > 1 and device in (None, "cuda"):
        device = processes.device()
    asked = _model(model, applied, dtype, device)
    asked.check(applied)

    config = _plain_json(
        {
            **asked.facts,
            "methods": {arm: asked.describe(method) for arm, method in named.items()},
            **{k: v for k, v in asdict(options).items() if k != "questions"},
            "temperature": temperature,
            "seeds": seeds,
            "greedy_too": greedy_too,
            "batch_size": batch_size,
            "versions": _versions(),
            # What they ask says it all; where the file of questions lies may change.
            "tasks": {name: _fingerprint(task, opened[name]) for name, task in ready.items()},
        }
    )
    jobs = [
        _Job(
            name,
            arm,
            f"samples_{name}_{file_name(arm)}",
            one,
            one.gen_kwargs(max_new_tokens or task.max_new_tokens),
        )
        for name, task in ready.items()
        for arm, one in arms.items()
    ]
    run_id = f"{started:%Y%m%dT%H%M%SZ}-{token_hex(4)}"
    run_id, found = processes.once(lambda: (run_id, _begin(folder, run_id, config, jobs, resume)))
    done = {job.stem: _done(folder, job.stem) for job in jobs}
    # Whole blocks of batches, every size-th: what is in a batch, and so the last bits of its
    # answers, is the same for any number of processes. Shares of the samples would be batched
    # otherwise.
    shares = {name: blocks[processes.rank :: processes.size] for name, blocks in plans.items()}
    left = sum(remaining(shares[job.task], done[job.stem], job.arm.draws) for job in jobs)
    memory = {}
    quiet = quiet or processes.rank > 0
    if not quiet:
        kept = f", {found} of them from before" if found else ""
        print(f"answers go to {folder}{kept}; what is ended goes on with --resume", file=sys.stderr)
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
                "seed": seed,
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
                    seed,
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
            entry = _score(task, answers, seed)
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


def _begin(
    folder: Path, run_id: str, config: Mapping[str, Any], jobs: Sequence[_Job], resume: bool
) -> int:
    """Make the folder ready; returns how many answers of an earlier run count.

    Raises:
        BadInput: there is no run to go on with, or it had another config.
    """
    run_file = folder / RUN_FILE
    if resume and folder.is_dir() and any(folder.iterdir()):
        if not run_file.exists():
            raise BadInput(
                f"resume: {folder} holds no {RUN_FILE}, so nobody can tell which run it was: name "
                "the folder of a run, or start again with overwrite=True (--overwrite)"
            )
        then = json.loads(run_file.read_text(encoding="utf-8"))["config"]
        if changed := differences(then, config):
            raise BadInput(
                f"resume: the run in {folder} had other settings: {'; '.join(changed)}. Go on with "
                "those it had, or name another folder"
            )
        for stray in folder.glob(".*.tmp"):
            stray.unlink()
        kept = [(job.stem, row) for job in jobs for row in merge(folder, job.stem, retry=True)]
        if strange := sorted({stem for stem, row in kept if row["config"] != digest(config)}):
            raise BadInput(
                f"resume: {folder} holds answers that another run gave, in {strange[0]}.jsonl: "
                "take that file away, and they are asked again"
            )
        return len(kept)
    folder.mkdir(parents=True, exist_ok=True)
    for stale in [
        run_file,
        folder / "results.json",
        *folder.glob("samples_*.jsonl"),
        *folder.glob("card.*"),
    ]:
        stale.unlink(missing_ok=True)
    write_json(run_file, {"format": FORMAT, "run_id": run_id, "config": config})
    return 0


def _done(folder: Path, stem: str) -> Done:
    """Answers that an earlier run has left."""
    path = folder / f"{stem}.jsonl"
    rows = read_records(path) if path.exists() else []
    return {(row["sampling_seed"], row["sample_id"]): answer_of(row) for row in rows}


def _answers(task: Task, arm: Arm, records: Sequence[Mapping[str, Any]]) -> list[list[Answer]]:
    """Per sampling seed, one list aligned with the samples; one list in all if greedy."""
    found = {(row["sampling_seed"], row["sample_id"]): answer_of(row) for row in records}
    return [[found[draw, sample.sample_id] for sample in task.samples] for draw in arm.draws]


def _score(task: Task, runs: Mapping[str, Sequence[Sequence[Answer]]], seed: int) -> dict[str, Any]:
    """Score what every arm answered: an item that failed once, under any arm, counts for none.

    Args:
        task: reads the answers.
        runs: arm -> its answers by seed; a greedy arm beside sampled ones has one list, which
            stands for every seed.
        seed: of the bootstrap.
    """
    everything = range(len(task.samples))
    rows = [row for run in runs.values() for row in run]
    answered = [i for i in everything if all(row[i].error is None for row in rows)]
    draws = range(max(map(len, runs.values())))
    drawn = [draw for draw in draws for _ in answered]
    samples = [task.samples[i] for _ in draws for i in answered]
    answers = {
        arm: [run[draw % len(run)][i] for draw in draws for i in answered]
        for arm, run in runs.items()
    }
    scored = task.score(samples, answers, drawn)
    add_controls(scored, task, samples, answers, drawn, seed)
    for arm, run in runs.items():
        scored[arm]["n_errors"] = sum(answer.error is not None for row in run for answer in row)
    for base, noop in ((BASE, NOOP), (greedy_twin(BASE), greedy_twin(NOOP))):
        if noop in runs:
            scored[noop]["flags"] += _told_apart(answers[base], answers[noop])
    images = list(dict.fromkeys(sample.image_id for sample in task.samples))
    excluded = set(everything) - set(answered)
    entry = {
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
    if (reference := greedy_twin(BASE)) in runs:
        again = task.score(samples, {reference: answers[reference], **answers}, drawn)
        entry["against_greedy"] = {
            arm: {key: again[arm][key] for key in ("delta", "matched_length") if key in again[arm]}
            for arm in runs
            if arm != reference
        }
    return entry


def _told_apart(base: Sequence[Answer], noop: Sequence[Answer]) -> list[str]:
    """A flag where the control that edits nothing did not answer as the base did."""
    pairs = list(zip(base, noop, strict=True))
    texts = sum(a.text != b.text for a, b in pairs)
    masses = sum(a.p_yes != b.p_yes for a, b in pairs)
    if not texts and not masses:
        return []
    return [
        f"edits nothing, and yet {texts} answers and {masses} probabilities of yes of {len(pairs)} "
        "differ from the base's: differences of that size are no effect of a method"
    ]


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
        source = chosen.get(name, chosen.get("*"))
        if isinstance(source, DataSource):
            found[name] = source
            continue
        key = (task_type.open, source)
        if key not in opened:
            opened[key] = task_type.open(source)
        found[name] = opened[key]
    return found


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
