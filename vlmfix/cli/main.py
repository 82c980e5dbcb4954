"""The command line. Every heavy import lives inside its command, so `--help` needs no torch.

Exit codes: 0 all went well; 1 the command ran but reports a failure; 2 the input cannot be used;
130 interrupted.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from vlmfix._version import __version__
from vlmfix.cli import options as opt
from vlmfix.cli import show
from vlmfix.errors import BadInput, CalibrationNeeded, UnsupportedModel, VlmfixError

__all__ = ["app", "main"]

app = typer.Typer(
    help="Inference-time fixes for vision-language models that describe things that are not there.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line; an error made on purpose is one message and exit code 2."""
    try:
        app()
    except VlmfixError as error:
        from rich.console import Console
        from rich.text import Text

        message = Text.assemble(("error: ", "bold red"), str(error))
        Console(stderr=True).print(message, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"vlmfix {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command("methods")
def methods_command(
    name: opt.MethodName = None,
    json: opt.Json = False,
) -> None:
    """List the methods, or explain one."""
    from vlmfix import registry

    if name is None:
        rows = registry.list_methods()
        show.report(json, rows, show.methods(rows))
    else:
        info = registry.describe(name)
        show.report(json, info, show.method(info))


@app.command("doctor")
def doctor_command(
    model: opt.ModelArgument = "emoji",
    dtype: opt.Dtype = None,
    device: opt.Device = None,
    json: opt.Json = False,
) -> None:
    """Show what vlmfix sees in a model, and which methods fit. Exit code 1 if it is unsupported."""
    with show.only_stderr(json):
        from vlmfix.analysis.doctor import examine
        from vlmfix.loading import load_model

        _quiet_transformers()
        report = examine(load_model(model, dtype=dtype, device=device))
    show.report(json, report, show.doctor(report))
    if not report["supported"]:
        raise typer.Exit(1)


@app.command("generate")
def generate_command(
    image: opt.Image,
    prompt: opt.Prompt,
    model: opt.Model = "emoji",
    method: opt.Methods = None,
    compare: opt.Compare = False,
    save_refined: opt.SaveRefined = None,
    max_new_tokens: opt.AnswerTokens = 64,
    dtype: opt.Dtype = None,
    device: opt.Device = None,
    json: opt.Json = False,
) -> None:
    """Ask a model about an image, plain or with methods."""
    from vlmfix.registry import list_methods, parse_spec

    every = compare and method is None
    stacks: list[list[str]] = parse_spec(method) if method else []
    if every:
        stacks = [[row.name] for row in list_methods()]
    if compare or not stacks:
        stacks = [[], *stacks]
    with show.only_stderr(json):
        arms = _answers(
            image, prompt, model, stacks, max_new_tokens, dtype, device, every, save_refined
        )
    result = {"model": model, "image": image, "prompt": prompt, "answers": arms}
    shown = arms[0]["answer"] if len(arms) == 1 else show.answers(arms)
    show.report(json, result, shown)


def _answers(
    image: str,
    prompt: str,
    model_name: str,
    stacks: list[list[str]],
    max_new_tokens: int,
    dtype: str | None,
    device: str | None,
    skip_unfit: bool,
    save_refined: Path | None,
) -> list[dict[str, Any]]:
    """One greedy answer per stack of methods, and what each stack did.

    `skip_unfit`: leave out, with a line on stderr, what does not fit the model.
    """
    import vlmfix
    from vlmfix.loading import load, load_image
    from vlmfix.registry import build_stack

    # All that can be wrong is found before the model is loaded.
    built = [build_stack(stack) for stack in stacks]
    if save_refined is not None:
        from vlmfix.evals.reporting.head_plots import require_matplotlib

        require_matplotlib()
        if not any(method.stage == "pixels" for stack in built for method in stack):
            raise BadInput("--save-refined: no method that refines images; add --method carve")
    content = [{"type": "image", "image": load_image(image)}, {"type": "text", "text": prompt}]
    messages = [{"role": "user", "content": content}]
    _quiet_transformers()
    model, processor = load(model_name, dtype=dtype, device=device)
    arms: list[dict[str, Any]] = []
    for names, stack in zip(stacks, built, strict=True):
        arm: dict[str, Any] = {"method": "+".join(names) or "base"}
        settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False}
        if stack:
            try:
                vlmfix.wrap(model, stack)
            except (CalibrationNeeded, UnsupportedModel) as error:
                if not skip_unfit:
                    raise
                print(f"{arm['method']} is left out: {error}", file=sys.stderr)
                continue
        arm["answer"] = vlmfix.generate(model, processor, messages, **settings)
        arm["last_call"] = None
        if stack:
            report = vlmfix.last_call(model)
            arm["last_call"] = report.to_dict() | {"pixels": _refined(report, save_refined, names)}
            vlmfix.unwrap(model)
        arms.append(arm)
    return arms


def _refined(report: Any, folder: Path | None, names: list[str]) -> dict[str, Any]:
    """What methods made of the image, as plain data; pictures of it in a folder if asked."""
    facts: dict[str, Any] = {}
    for method, (finding,) in report.pixels.items():
        if finding is None:
            continue
        facts[method] = finding.facts()
        if folder is not None:
            stem = re.sub(r"[^\w.=]+", "-", "+".join(names))
            facts[method]["files"] = [str(path) for path in finding.save(folder, stem)]
    return facts


@app.command("eval")
def eval_command(
    task: opt.Task = None,
    tasks: opt.Tasks = None,
    list_tasks: opt.ListTasks = False,
    suite: opt.Suite = None,
    model: opt.Model = "emoji",
    method: opt.Methods = None,
    data: opt.Data = None,
    limit: opt.Limit = None,
    images: opt.Images = "500",
    questions: opt.Questions = None,
    splits: opt.Splits = None,
    ground_truth: opt.GroundTruth = None,
    official_typo: opt.OfficialTypo = False,
    image_ids: opt.ImageIds = None,
    chair_engine: opt.ChairEngine = "builtin",
    chair_mode: opt.ChairMode = "compat",
    amber_similarity: opt.AmberSimilarity = "exact",
    output: opt.ResultFolder = None,
    batch_size: opt.BatchSize = 32,
    seed: opt.Seed = 0,
    prompt_style: opt.PromptStyle = "lmms",
    parser: opt.Parser = "official",
    truncate: opt.Truncate = "none",
    max_new_tokens: opt.NewTokens = None,
    temperature: opt.Temperature = None,
    seeds: opt.Seeds = 1,
    greedy_too: opt.GreedyToo = False,
    noop: opt.NoOp = False,
    resume: opt.Resume = False,
    overwrite: opt.Overwrite = False,
    dtype: opt.Dtype = None,
    device: opt.Device = None,
    threads: opt.Threads = None,
    json: opt.Json = False,
) -> None:
    """Evaluate the base model and methods on the same items. Exit code 1 if any item failed."""
    from vlmfix import evals
    from vlmfix.evals.running.processes import is_first_process
    from vlmfix.evals.tasks import get_task
    from vlmfix.registry import parse_spec

    names = _split(f"{task or ''},{tasks or ''}")
    if list_tasks or names == ["list"]:
        docs = {name: get_task(name).__doc__ or "" for name in sorted(evals.TASKS)}
        rows = [{"name": name, "summary": doc.split("\n")[0]} for name, doc in docs.items()]
        show.report(json, rows, show.facts({row["name"]: row["summary"] for row in rows}))
        return
    methods = ["+".join(stack) for stack in parse_spec(method)] if method else []
    if suite is not None:
        given = {
            "TASK": names,
            "--images": images != "500",
            "--image-ids": image_ids,
            "--questions": questions,
            "--splits": splits,
            "--max-new-tokens": max_new_tokens,
        }
        if clash := [name for name, value in given.items() if value]:
            raise BadInput(f"--suite {suite} settles {', '.join(clash)}: leave it out")
        with show.only_stderr(json):
            _quiet_transformers()
            _set_threads(threads)
            from vlmfix.evals.suites import run_suite

            card = run_suite(
                suite,
                model,
                methods or None,
                _data(data, list(evals.TASKS)),
                output,
                overwrite=overwrite,
                resume=resume,
                dtype=dtype,
                device=device,
                limit=limit,
                ground_truth=ground_truth,
                official_typo=official_typo,
                chair_engine=chair_engine,
                chair_mode=chair_mode,
                amber_similarity=amber_similarity,
                batch_size=batch_size,
                seed=seed,
                prompt_style=prompt_style,
                parser=parser,
                truncate=truncate,
                temperature=temperature,
                seeds=seeds,
                greedy_too=greedy_too,
                noop=noop,
                quiet=json,
            )
        if is_first_process():
            show.report(json, card, show.suite(card))
        if card["errors"]:
            raise typer.Exit(1)
        return
    if not names:
        raise BadInput(
            f"no task: give one or more of {', '.join(evals.TASKS)}, comma-separated, or --suite"
        )
    with show.only_stderr(json):
        _quiet_transformers()
        _set_threads(threads)
        results = evals.evaluate(
            names,
            model=model,
            methods=methods,
            data=_data(data, names),
            limit=limit,
            n_images=_images(images),
            questions=_questions(questions),
            splits=None if splits is None else _split(splits),
            ground_truth=ground_truth,
            official_typo=official_typo,
            image_ids=image_ids,
            chair_engine=chair_engine,
            chair_mode=chair_mode,
            amber_similarity=amber_similarity,
            output=output,
            batch_size=batch_size,
            seed=seed,
            prompt_style=prompt_style,
            parser=parser,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seeds=seeds,
            greedy_too=greedy_too,
            noop=noop,
            resume=resume,
            overwrite=overwrite,
            quiet=json,
            truncate=truncate,
            dtype=dtype,
            device=device,
        )
    if not is_first_process():
        return
    show.report(json, results, evals.render(results))
    if not json:
        print(f"written to {results['output']}")
    if results["errors"]:
        print(show.failure(results), file=sys.stderr)
        raise typer.Exit(1)


@app.command("score")
def score_command(
    task: opt.ScoredTask,
    answers: opt.Answers,
    baseline: opt.Baseline = None,
    questions: opt.AnsweredQuestions = None,
    annotations: opt.Annotations = None,
    parser: opt.ScoreParser = "official",
    truncate: opt.Truncate = "none",
    chair_engine: opt.ChairEngine = "builtin",
    chair_mode: opt.ChairMode = "compat",
    amber_similarity: opt.AmberSimilarity = "exact",
    seed: opt.Seed = 0,
    output: opt.ResultFolder = None,
    overwrite: opt.Overwrite = False,
    json: opt.Json = False,
) -> None:
    """Score files of answers, ours or anyone's, without a model; two of them as a pair."""
    from datetime import datetime, timezone

    from vlmfix import evals
    from vlmfix.evals.harness import output_folder
    from vlmfix.evals.reporting.report import write_json
    from vlmfix.evals.score import score

    with show.only_stderr(json):
        folder = None
        if output is not None:
            folder = output_folder(output, overwrite, datetime.now(timezone.utc), [task], None)
        results = score(
            task,
            _by_split("--answers", answers),
            _by_split("--baseline", baseline) if baseline else None,
            questions=_by_split("--questions", questions, "all") if questions else None,
            annotations=annotations,
            parser=parser,
            truncate=truncate,
            chair_engine=chair_engine,
            chair_mode=chair_mode,
            amber_similarity=amber_similarity,
            seed=seed,
        )
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "results.json", results)
    show.report(json, results, evals.render(results))
    if folder is not None and not json:
        print(f"written to {folder}")


@app.command("report")
def report_command(
    folder: opt.RunFolder,
    output: opt.ResultFolder = None,
    plots: opt.CardPlots = True,
) -> None:
    """Make the score card of a run, or of a folder of runs: Markdown, JSON, csv and pictures."""
    from vlmfix.evals.reporting.card import report

    for path in report(folder, output, plots):
        print(path)


@app.command("calibrate")
def calibrate_command(
    model: opt.ModelArgument = "emoji",
    only: opt.Only = None,
    save: opt.Save = True,
    beside: opt.Beside = False,
    allow_none: opt.AllowNone = False,
    plots: opt.Plots = None,
    dtype: opt.Dtype = None,
    device: opt.Device = None,
    json: opt.Json = False,
) -> None:
    """Measure what VAR, GIFT and others need to know of a model."""
    with show.only_stderr(json):
        from vlmfix.analysis.calibrate import calibrate
        from vlmfix.loading import load

        if plots is not None:
            from vlmfix.evals.reporting.head_plots import require_matplotlib

            require_matplotlib()
        _quiet_transformers()
        loaded, processor = load(model, dtype=dtype, device=device)
        found = calibrate(
            loaded,
            processor,
            only=None if only is None else _split(only),
            save=save,
            beside=beside,
            allow_none=allow_none,
        )
        if plots is not None:
            _plot_vision_heads(model, found.vision_heads, plots)
    values = found.to_dict()
    show.report(json, values, show.calibration(values))


def _plot_vision_heads(
    model: str, heads: tuple[tuple[float, ...], ...] | None, folder: Path
) -> None:
    from vlmfix.evals.reporting.head_plots import layer_head_map

    if heads is None:
        raise BadInput("--plots: no vision-aware heads to draw; measure them with --only heads")
    folder.mkdir(parents=True, exist_ok=True)
    title = f"{Path(model).name}: vision-aware head divergence"
    layer_head_map(heads, title, folder / "vision_heads.png", "mean VHD")
    print(f"drawn: {folder / 'vision_heads.png'}", file=sys.stderr)


@app.command("attribute")
def attribute_command(
    model: opt.ModelArgument = "emoji",
    data: opt.AttributionData = None,
    limit: opt.AttributionImages = 200,
    top: opt.Top = 0.02,
    output: opt.ResultFolder = None,
    overwrite: opt.Overwrite = False,
    save: opt.KeepHeads = False,
    beside: opt.Beside = False,
    batch_size: opt.BatchSize = 32,
    max_new_tokens: opt.AnswerTokens = 512,
    seed: opt.Seed = 0,
    dtype: opt.Dtype = None,
    device: opt.Device = None,
    threads: opt.Threads = None,
    json: opt.Json = False,
) -> None:
    """Find the heads that write hallucinated words, by switching each head off."""
    with show.only_stderr(json):
        from vlmfix.evals.attribution import attribute
        from vlmfix.loading import load

        _quiet_transformers()
        _set_threads(threads)
        loaded, processor = load(model, dtype=dtype, device=device)
        results = attribute(
            loaded,
            processor,
            data,
            name=model,
            limit=limit,
            top=top,
            output=output,
            overwrite=overwrite,
            save=save,
            beside=beside,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            seed=seed,
            quiet=json,
        )
    show.report(json, results, show.attribution(results))


@app.command("bench")
def bench_command(
    model: opt.BenchModels = "emoji,llava-300m",
    method: opt.Methods = "var,vhr,pai",
    dtype: opt.BenchDtypes = "bfloat16,float32",
    device: opt.BenchDevices = None,
    rounds: opt.Rounds = 9,
    new_tokens: opt.BenchTokens = 32,
    batch_size: opt.BatchSize = 1,
    text_tokens: opt.TextTokens = None,
    cache: opt.CacheKind = "dynamic",
    compile: opt.Compile = False,
    output: opt.CsvFile = None,
    plot: opt.PlotFile = None,
    quick: opt.Quick = False,
    threads: opt.BenchThreads = 1,
    json: opt.Json = False,
) -> None:
    """Measure speed and memory, wrapped over plain. Exit code 1 if a row was refused."""
    from vlmfix.registry import parse_spec

    methods = parse_spec(method) if method else []
    with show.only_stderr(json):
        from vlmfix.bench import plot as bench_plot
        from vlmfix.bench import run as bench

        if plot is not None:
            bench_plot.require_matplotlib()
        _quiet_transformers()
        report = bench.run(
            ["llava-tiny" if quick and name == "llava-300m" else name for name in _split(model)],
            methods,
            dtypes=_split(dtype),
            devices=_split(device) if device else None,
            rounds=3 if quick else rounds,
            new_tokens=8 if quick else new_tokens,
            batch=batch_size,
            text_tokens=text_tokens,
            cache="static" if compile else cache,
            compile="inductor" if compile else None,
            threads=threads,
            progress=lambda line: print(line, file=sys.stderr),
        )
        if output is not None:
            bench.write_csv(report, output)
        if plot is not None:
            bench_plot.draw(report.rows, plot)
    show.report(json, report, bench.render(report))
    if report.refused:
        raise typer.Exit(1)


@app.command("demo")
def demo_command(
    model: opt.ModelArgument = "emoji",
    host: opt.Host = "127.0.0.1",
    port: opt.Port = None,
    allow_model_choice: opt.AllowModelChoice = False,
    open_browser: opt.OpenBrowser = False,
    dtype: opt.Dtype = None,
    device: opt.Device = None,
    threads: opt.Threads = None,
) -> None:
    """Serve the demo to the browser: base and methods side by side, maps, a quick evaluation."""
    from vlmfix.demo.app import serve

    _quiet_transformers()
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    serve(
        model,
        host=host,
        port=port,
        allow_model_choice=allow_model_choice,
        open_browser=open_browser,
        dtype=dtype,
        device=device,
    )


def _images(text: str) -> int | None:
    """How many images a task selects; None for all."""
    if text == "all":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise BadInput(f"--images {text}: give a number of images, or 'all'")
    return int(text)


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


def _questions(pairs: list[str] | None) -> dict[str, str] | None:
    """Question files by split, from SPLIT=FILE."""
    if not pairs:
        return None
    if bad := [pair for pair in pairs if not all(pair.partition("="))]:
        raise BadInput(f"--questions {bad[0]}: write SPLIT=FILE, e.g. random=coco_random.json")
    return {split: file for split, _, file in (pair.partition("=") for pair in pairs)}


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


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def _quiet_transformers() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
