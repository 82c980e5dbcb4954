"""How fast a model generates with methods, and in how much memory, over the same model plain.

Arms take turns within each round, so a machine that slows down slows all of them, and the ratio of
a round compares neighbours in time. The prompt and the decode steps are timed apart. Before an arm
is timed it must have edited rows while decoding, and its logits must agree with a forward that has
no cache, no kernel and no graph; otherwise there is no row for it, but the reason.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from vlmfix import machine
from vlmfix.bench_arm import CHECKED, MINIMUM_TOKENS, Arm, Decoding, Memory, Turn
from vlmfix.bench_models import LARGE, MODELS, Subject, subject
from vlmfix.calibrate import load_calibration
from vlmfix.errors import BadInput
from vlmfix.registry import build_stack

__all__ = ["NO_GPU", "PERCENTILES", "SLOW_PLAIN", "Report", "render", "run", "write_csv"]

PERCENTILES = (20, 50, 80)
LEGEND = (
    "Median [20 %, 80 %] of the rounds. Memory: peak above the weights, less the KV cache, over "
    "plain's."
)
NO_GPU = "not measured on a GPU"
# Seen with torch 2.13: 0.85 ms for 16 heads and 608 keys, 0.10 ms as two matrix products.
SLOW_PLAIN = (
    "torch's own attention is slow on a CPU for one query row in half precision, and a layer with "
    "a method avoids it: ratios above 1 come from there; --dtype float32 shows a method's cost"
)
# A random model has no massive activations, nor has every trained one. One channel and a threshold
# of one standard deviation call about a third of the tokens sinks, and without a least mass on the
# image VAR edits nearly every head, however long the text: more work than usual. The csv says
# which options ran.
FORCED = {
    "var": "var:sink_channels=0;tau=1;minimum_visual_mass=0",
    "vcd": "vcd:beta=0",
    "avc": "avc:beta=0",
    "m3id": "m3id:decay=1;beta=0",
}


@dataclass
class Report:
    """Rows that were measured, and what was not and why."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def run(
    models: Sequence[str] = ("emoji", "llava-300m"),
    methods: Sequence[Sequence[str]] = (("var",), ("vhr",), ("pai",)),
    *,
    dtypes: Sequence[str] = ("bfloat16",),
    devices: Sequence[str] | None = None,
    rounds: int = 9,
    new_tokens: int = 32,
    batch: int = 1,
    text_tokens: int | None = None,
    cache: str = "dynamic",
    compile: str | None = None,
    threads: int = 1,
    progress: Callable[[str], None] = lambda line: None,
) -> Report:
    """Time generate() on every model, plain and with every stack of methods.

    Args:
        models: Names of `MODELS`.
        methods: One stack of specs per arm.
        dtypes: bfloat16, float16 or float32.
        devices: cpu, cuda, cuda:1; if absent, the CPU, and a GPU where there is one. Without it,
            the models of `LARGE` run on a GPU only.
        rounds: Timed turns of every arm.
        new_tokens: Tokens per turn, the same in every arm.
        batch: Rows, all of the same prompt.
        text_tokens: Text tokens after the image; 28 if absent. Not for emoji.
        cache: dynamic or static.
        compile: Backend of torch.compile for the decode steps, e.g. inductor; needs the static
            cache. None: not compiled.
        threads: Torch threads; put back afterwards.
        progress: Told what runs next.

    Returns:
        One row per model, device, dtype and arm; tokens/s counts all rows of the batch.

    Raises:
        BadInput: A name or a number that cannot be used, or too little memory for a model.
    """
    if unknown := set(models) - set(MODELS):
        names = ", ".join(MODELS)
        raise BadInput(f"no benchmark model {sorted(unknown)[0]!r}: choose from {names}")
    if rounds < 1 or new_tokens < MINIMUM_TOKENS:
        raise BadInput(f"a benchmark needs at least 1 round and {MINIMUM_TOKENS} new tokens")
    if cache not in ("dynamic", "static"):
        raise BadInput(f"no cache {cache!r}: choose dynamic or static")
    if compile is not None and cache != "static":
        raise BadInput("generate() compiles decode steps over a static cache only: --cache static")
    if text_tokens is not None and text_tokens < 1:
        raise BadInput("a prompt needs at least 1 text token after the image")
    places = [(name, device) for name in models for device in _devices(name, devices)]
    report = Report()
    if not any(device.startswith("cuda") for _, device in places):
        report.notes.append(NO_GPU)
    if ("cpu" in {device for _, device in places}) and set(dtypes) - {"float32", "fp32"}:
        report.notes.append(SLOW_PLAIN)
    decoding = Decoding(new_tokens, cache, compile)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        # The commit of now is the code that runs, whatever the checkout becomes meanwhile.
        facts = {device: machine.facts(device) for _, device in places}
        for name, device in places:
            for dtype in dtypes:
                progress(f"{name}, {dtype}, {device}")
                made = subject(name, dtype, device, batch, text_tokens)
                with _room_for_graphs(decoding, 1 + len(methods)):
                    _measure(made, methods, decoding, rounds, facts[device], report)
    finally:
        torch.set_num_threads(before)
    return report


def _devices(name: str, devices: Sequence[str] | None) -> Sequence[str]:
    if devices is not None:
        return devices
    has_gpu = torch.cuda.is_available()
    if name not in LARGE:
        return ("cpu", "cuda") if has_gpu else ("cpu",)
    if not has_gpu:
        raise BadInput(
            f"{name} is meant for a GPU, and torch sees none here. `--device cpu` runs it on the "
            "CPU all the same, in minutes per turn."
        )
    return ("cuda",)


@contextmanager
def _room_for_graphs(decoding: Decoding, arms: int) -> Iterator[None]:
    """One graph per arm: past a limit torch.compile would quietly stop compiling."""
    if decoding.compile is None:
        yield
        return
    import torch._dynamo as dynamo

    dynamo.reset()
    limit = max(8, 4 * arms)
    with dynamo.config.patch(recompile_limit=limit, fail_on_recompile_limit_hit=True):
        yield


def _measure(
    subject: Subject,
    methods: Sequence[Sequence[str]],
    decoding: Decoding,
    rounds: int,
    facts: dict[str, Any],
    report: Report,
) -> None:
    plain = Arm("plain", subject, (), decoding)
    arms, memory, edited = [plain], {"plain": plain.memory()}, {"plain": 0.0}
    logits = plain.reference_logits()
    found = load_calibration(subject.model)
    forced = FORCED if found is None or not found.sink_channels else {}
    for specs in methods:
        name = "+".join(specs)
        stack = build_stack([forced.get(spec, spec) for spec in specs])
        arm = Arm(name, subject, stack, decoding)
        used, rows = arm.memory(), arm.edited_rows()
        why = arm.disagreement(logits)
        decode_rows = (rows - arm.edited_rows()) / (decoding.new_tokens - CHECKED)
        if decode_rows <= 0:
            why = "it edited no row while decoding"
        if why is not None:
            where = f"{name} on {subject.name} ({subject.dtype}, {subject.device})"
            report.refused.append(f"{where}: {why}")
            continue
        arms.append(arm)
        memory[name], edited[name] = used, decode_rows
    for arm in arms:
        arm.turn()
    turns: dict[str, list[Turn]] = {arm.name: [] for arm in arms}
    order, shuffle = list(arms), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)  # so that no arm always follows the same other one
        for arm in order:
            turns[arm.name].append(arm.turn())
    batch, prompt = subject.inputs["input_ids"].shape
    weights = list(subject.model.parameters())
    for arm in arms:
        report.rows.append(
            {
                **facts,
                "model": subject.name,
                "parameters": sum(p.numel() for p in weights),
                "dtype": subject.dtype,
                "batch": batch,
                "prompt": prompt,
                "visual_tokens": subject.visual_tokens,
                "new_tokens": decoding.new_tokens,
                "rounds": rounds,
                "cache": decoding.cache,
                "compile": decoding.compile or "",
                "arm": arm.name,
                "spec": arm.spec,
                "edited_rows_per_step": edited[arm.name],
                **_times(turns[arm.name], turns["plain"], batch),
                "weight_bytes": sum(p.numel() * p.element_size() for p in weights),
                **_memory(memory[arm.name], memory["plain"]),
            }
        )


def _times(turns: Sequence[Turn], plain: Sequence[Turn], batch: int) -> dict[str, float]:
    """Percentiles over the rounds; a ratio is taken within its round."""
    pairs = list(zip(turns, plain, strict=True))
    return {
        **_spread("first_token_seconds", [turn.first_token for turn in turns]),
        **_spread("first_token_over_plain", [a.first_token / p.first_token for a, p in pairs]),
        **_spread("tokens_per_second", [batch / turn.step for turn in turns]),
        **_spread("tokens_per_second_over_plain", [p.step / a.step for a, p in pairs]),
    }


def _spread(name: str, values: list[float]) -> dict[str, float]:
    found = np.percentile(values, PERCENTILES)
    return {f"{name}_p{p}": float(v) for p, v in zip(PERCENTILES, found, strict=True)}


def _memory(memory: Memory, plain: Memory) -> dict[str, float]:
    """What a turn needs on top of the weights, and on top of weights and KV cache over plain."""
    return {
        "peak_above_weights_bytes": memory.peak,
        "kv_cache_bytes": memory.cache,
        "memory_over_plain": (memory.peak - memory.cache) / (plain.peak - plain.cache),
    }


def write_csv(report: Report, path: Path) -> None:
    """Append the rows to a csv file, with a header if it is new.

    Raises:
        BadInput: The file holds other columns.
    """
    if not report.rows:
        return
    columns = list(report.rows[0])
    new = not path.exists()
    if not new:
        with path.open(newline="") as file:
            if next(csv.reader(file), []) != columns:
                raise BadInput(f"{path} holds other columns: give a new file to --output")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if new:
            writer.writeheader()
        writer.writerows(report.rows)


def render(report: Report) -> RenderableType:
    """One table per model, dtype and prompt, then what was not measured."""
    lines: list[RenderableType] = []
    for (model, dtype, batch, prompt, cache, compiled), rows in groupby(report.rows, _setting):
        title = f"{model}, {dtype}, B={batch}, K={prompt}, {cache} cache"
        title += f", compiled ({compiled})" if compiled else ""
        table = Table(title=title, title_justify="left", box=None, pad_edge=False, expand=False)
        table.add_column("arm")
        for column in ("first token", "over plain", "tokens/s", "over plain", "memory"):
            table.add_column(column, justify="right", no_wrap=True)
        for row in rows:
            table.add_row(
                row["arm"],
                f"{row['first_token_seconds_p50']:.3g} s",
                _interval(row, "first_token_over_plain"),
                f"{row['tokens_per_second_p50']:.3g}",
                _interval(row, "tokens_per_second_over_plain"),
                f"{row['memory_over_plain']:.3f}",
            )
        lines += [table, Text()]
    if report.rows:
        keys = ("device", "threads", "torch", "transformers", "vlmfix", "git")
        lines.append(Text(LEGEND))
        lines.append(Text(", ".join(f"{key} {report.rows[0][key]}" for key in keys)))
    lines += [Text(f"refused: {line}", "yellow") for line in report.refused]
    lines += [Text(line) for line in report.notes]
    return Group(*lines)


def _setting(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("model", "dtype", "batch", "prompt", "cache", "compile"))


def _interval(row: dict[str, Any], quantity: str) -> str:
    low, middle, high = (row[f"{quantity}_p{p}"] for p in PERCENTILES)
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"
