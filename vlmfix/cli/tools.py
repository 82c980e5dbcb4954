"""Commands that measure a model, and the demo: calibrate, attribute, bench, demo."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from vlmfix.cli import options as opt
from vlmfix.cli import show
from vlmfix.cli.start import quiet_transformers, set_threads
from vlmfix.errors import BadInput
from vlmfix.evals.options import split

__all__ = ["attribute_command", "bench_command", "calibrate_command", "demo_command"]


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
        quiet_transformers()
        loaded, processor = load(model, dtype=dtype, device=device)
        found = calibrate(
            loaded,
            processor,
            only=None if only is None else split(only),
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

        quiet_transformers()
        set_threads(threads)
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
        quiet_transformers()
        report = bench.run(
            ["llava-tiny" if quick and name == "llava-300m" else name for name in split(model)],
            methods,
            dtypes=split(dtype),
            devices=split(device) if device else None,
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


def demo_command(
    model: opt.ModelArgument = "emoji",
    host: opt.Host = "127.0.0.1",
    port: opt.Port = None,
    allow_host: opt.AllowHost = None,
    allow_model_choice: opt.AllowModelChoice = False,
    open_browser: opt.OpenBrowser = False,
    dtype: opt.Dtype = None,
    device: opt.Device = None,
    threads: opt.Threads = None,
) -> None:
    """Serve the demo to the browser: base and methods side by side, maps, a quick evaluation."""
    from vlmfix.demo.app import serve

    quiet_transformers()
    set_threads(threads)
    serve(
        model,
        host=host,
        port=port,
        hosts=allow_host or (),
        allow_model_choice=allow_model_choice,
        open_browser=open_browser,
        dtype=dtype,
        device=device,
    )
