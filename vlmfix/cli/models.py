"""Commands about methods and single answers: methods, doctor, generate."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import typer

from vlmfix.cli import options as opt
from vlmfix.cli import show
from vlmfix.cli.start import quiet_transformers
from vlmfix.errors import BadInput, CalibrationNeeded, UnsupportedModel

__all__ = ["doctor_command", "generate_command", "methods_command"]


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

        quiet_transformers()
        report = examine(load_model(model, dtype=dtype, device=device))
    show.report(json, report, show.doctor(report))
    if not report["supported"]:
        raise typer.Exit(1)


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
    quiet_transformers()
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
