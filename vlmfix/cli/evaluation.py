"""Commands that compare a model with and without methods: eval, score, report."""

from __future__ import annotations

import sys
from dataclasses import fields
from datetime import UTC
from pathlib import Path
from typing import Any

import typer

from vlmfix.cli import options as opt
from vlmfix.cli import show
from vlmfix.cli.fields import with_options
from vlmfix.cli.start import quiet_transformers, set_threads
from vlmfix.errors import BadInput
from vlmfix.evals.options import SCORING, Options, flags, split

__all__ = ["eval_command", "report_command", "score_command"]


@with_options()
def eval_command(
    *,
    task: opt.Task = None,
    tasks: opt.Tasks = None,
    list_tasks: opt.ListTasks = False,
    suite: opt.Suite = None,
    model: opt.Model = "emoji",
    method: opt.Methods = None,
    data: opt.Data = None,
    options: Options,
    dtype: opt.Dtype = None,
    device: opt.Device = None,
    threads: opt.Threads = None,
    json: opt.Json = False,
) -> None:
    """Evaluate the base model and methods on the same items. Exit code 1 if any item failed."""
    from vlmfix import evals
    from vlmfix.evals.running.processes import is_first_process
    from vlmfix.evals.suites import run_suite
    from vlmfix.registry import parse_spec

    names = split(f"{task or ''},{tasks or ''}")
    if list_tasks or names == ["list"]:
        docs = {name: evals.get_task(name).__doc__ or "" for name in evals.list_tasks()}
        rows = [{"name": name, "summary": doc.split("\n")[0]} for name, doc in docs.items()]
        show.report(json, rows, show.facts({row["name"]: row["summary"] for row in rows}))
        return
    methods = ["+".join(stack) for stack in parse_spec(method)] if method else []
    if suite is not None:
        _refuse_settled(suite, names, options)
    elif not names:
        raise BadInput(
            f"no task: give one or more of {', '.join(evals.list_tasks())}, comma-separated, or "
            "--suite"
        )
    with show.only_stderr(json):
        quiet_transformers()
        set_threads(threads)
        how: dict[str, Any] = {"quiet": json, "dtype": dtype, "device": device}
        if suite is not None:
            given = _data(data, evals.list_tasks())
            results = run_suite(suite, model, methods or None, given, options, **how)
        else:
            results = evals.evaluate(names, model, methods, _data(data, names), options, **how)
    if not is_first_process():
        return
    show.report(json, results, show.suite(results) if suite else evals.render(results))
    if not suite and not json:
        print(f"written to {results['output']}")
    if results["errors"]:
        if not suite:
            print(show.failure(results), file=sys.stderr)
        raise typer.Exit(1)


def _refuse_settled(suite: str, tasks: list[str], options: Options) -> None:
    from vlmfix.evals.suites import SETTLED

    given = options.changed() & set(SETTLED)
    clash = ["TASK"] if tasks else []
    clash += [flags(item)[0] for item in fields(Options) if item.name in given]
    if clash:
        raise BadInput(f"--suite {suite} settles {', '.join(clash)}: leave it out")


@with_options(*SCORING, "output", "overwrite")
def score_command(
    *,
    task: opt.ScoredTask,
    answers: opt.Answers,
    baseline: opt.Baseline = None,
    questions: opt.AnsweredQuestions = None,
    annotations: opt.Annotations = None,
    parser: opt.ScoreParser = "official",
    options: Options,
    json: opt.Json = False,
) -> None:
    """Score files of answers, ours or anyone's, without a model; two of them as a pair."""
    import gc
    from datetime import datetime

    from vlmfix import evals
    from vlmfix.evals.running.files import write_json
    from vlmfix.evals.running.store import output_folder
    from vlmfix.evals.score import score

    # Of millions of rows none is garbage, and to look for it takes a third of the time.
    gc.disable()
    with show.only_stderr(json):
        folder = None
        if options.output is not None:
            now = datetime.now(UTC)
            folder = output_folder(options.output, options.overwrite, now, [task], None)
        results = score(
            task,
            _by_split("--answers", answers),
            _by_split("--baseline", baseline) if baseline else None,
            annotations=annotations,
            questions=_by_split("--questions", questions, "all") if questions else None,
            parser=parser,
            **{name: getattr(options, name) for name in SCORING},
        )
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "results.json", results)
    show.report(json, results, evals.render(results))
    if folder is not None and not json:
        print(f"written to {folder}")


def report_command(
    folder: opt.RunFolder,
    output: opt.ResultFolder = None,
    plots: opt.CardPlots = True,
) -> None:
    """Make the score card of a run, or of a folder of runs: Markdown, JSON, csv and pictures."""
    from vlmfix.evals.reporting.write import report

    for path in report(folder, output, plots):
        print(path)


def _data(given: list[str] | None, tasks: list[str]) -> dict[str, str] | None:
    """Data by task, from PATH or TASK=PATH; "*" for a bare path."""
    found: dict[str, str] = {}
    for text in given or ():
        task, equals, path = text.partition("=")
        # A path may hold an equals sign itself.
        key, path = (task, path) if equals and task in tasks else ("*", text)
        if key in found:
            whose = "all tasks" if key == "*" else key
            raise BadInput(f"--data: {found[key]} and {path} are both given for {whose}: keep one")
        found[key] = path
    return found or None


def _by_split(option: str, given: list[str], whole: str = "") -> dict[str, str]:
    """Files by split, from FILE or SPLIT=FILE; a bare file goes under `whole`."""
    found: dict[str, str] = {}
    for text in given:
        split, equals, file = text.partition("=")
        # The name of a file may hold an equals sign itself.
        if not equals or Path(text).exists():
            split, file = whole, text
        if split in found:
            raise BadInput(f"{option}: several files for one split: write SPLIT={file} for each")
        found[split] = file
    return found
