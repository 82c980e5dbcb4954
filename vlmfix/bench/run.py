"""Speed and memory of generation with methods, relative to the same model plain.

Arms take turns within each round, so a machine that slows down slows all of them, and the ratio of
a round compares neighbours in time. The prompt and the decode steps are timed separately. Before an
arm is timed it must have edited rows while decoding, or dropped visual tokens, and its logits must
agree with a forward without cache, kernel and graph; otherwise the report gives the reason instead
of a row.

On a CPU one more arm edits nothing, but computes its attention as methods that edit or contrast do.
The speed of such a method over the plain model is that of this arm, times the method's over it.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from vlmfix.analysis.calibrate import load_calibration
from vlmfix.base.method import Method
from vlmfix.bench.arm import MINIMUM_TOKENS, Arm, Check, Decoding, Memory, Turn, TwoProducts
from vlmfix.bench.models import LARGE, MODELS, Subject, subject
from vlmfix.errors import BadInput
from vlmfix.registry import build_stack

__all__ = ["NO_GPU", "PERCENTILES", "SLOW_PLAIN", "Report", "render", "run", "write_csv"]

PERCENTILES = (20, 50, 80)
LEGEND = (
    "Median (20-80 %) of the rounds, over plain. rows: of a pass, per sample. kept: visual tokens. "
    "prefill: the language model on the prompt. two products: tokens/s over the arm that edits "
    "nothing. peak: above the weights, KV cache included."
)
NO_GPU = "not measured on a GPU"
# Measured with torch 2.13: 0.85 ms for 16 heads and 608 keys, 0.10 ms as two matrix products.
SLOW_PLAIN = (
    "torch's own attention is slow on a CPU for one query row in half precision. A layer with an "
    "edited row, and every layer of a contrastive step, runs two matrix products instead, and "
    "ratios above 1 come from there. The arm 'two products' (not with --compile) does only that: "
    "relative to it a method shows its own cost, and a contrastive method that of its rows"
)
# A contrastive method runs without its cut at beta: rounding can move a token across the cut, which
# changes its logit by 1e4 and fails the comparison of logits (the cut costs a few passes over one
# row of logits). The weight of m3id and pai_guidance is raised, as at their defaults the first
# tokens differ from the plain model's by little more than half-precision rounding; a weight costs
# nothing. The csv names the options that ran.
FORCED = {
    "avc": "avc:beta=0",
    "m3id": "m3id:decay=1;beta=0",
    "pai_guidance": "pai_guidance:gamma=2;beta=0",
    "rbd": "rbd:beta=0",
    "vcd": "vcd:beta=0",
}
# A random model has no massive activations, nor has every trained one. With one channel and a
# threshold of one standard deviation, about a third of the tokens are sinks, and without a least
# mass on the image VAR edits nearly every head at any length of text: more work than usual.
FORCED_SINKS = {"var": "var:sink_channels=0;tau=1;minimum_visual_mass=0"}


@dataclass
class Report:
    """Rows that were measured, and the reasons for those that were not."""

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
        models: names of `MODELS`.
        methods: one stack of specs per arm. A bare name of `FORCED`, or of `FORCED_SINKS` where
            the model has no calibrated sinks, runs with the options there.
        dtypes: bfloat16, float16 or float32.
        devices: cpu, cuda, cuda:1; default: the CPU, and a GPU if there is one. By default the
            models of `LARGE` run on a GPU only.
        rounds: timed turns of every arm.
        new_tokens: tokens per turn, the same in every arm.
        batch: rows of the batch, all of the same prompt.
        text_tokens: text tokens after the image; default: 28. Not for emoji.
        cache: dynamic or static.
        compile: backend of torch.compile for the decode steps, e.g. inductor; needs the static
            cache. None: not compiled.
        threads: torch threads; restored afterwards.
        progress: called with a line about what runs next.

    Returns:
        One row per model, device, dtype and arm; tokens/s counts all samples of the batch.

    Raises:
        BadInput: a name or a number that cannot be used, or too little memory for a model.
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
    on_cpu = "cpu" in {device for _, device in places}
    if on_cpu and set(dtypes) - {"float32", "fp32"} and _by_products(map(build_stack, methods)):
        report.notes.append(SLOW_PLAIN)
    decoding = Decoding(new_tokens, cache, compile)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        # Read now, because the checkout may change while the benchmark runs.
        facts = {device: machine.facts(device) for _, device in places}
        for name, device in places:
            for dtype in dtypes:
                where = f"{name}, {dtype}, {device}"
                progress(where)
                made = subject(name, dtype, device, batch, text_tokens)
                with _room_for_graphs(decoding, 1 + len(methods)):
                    arms, checks = _checked(made, methods, decoding, report)
                    progress(f"{where}: {rounds} rounds of {', '.join(arm.name for arm in arms)}")
                    turns = _turns(arms, rounds)
                for row in _rows(made, decoding, arms, checks, turns):
                    report.rows.append({**facts[device], **row})
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
            "CPU, in minutes per turn."
        )
    return ("cuda",)


@contextmanager
def _room_for_graphs(decoding: Decoding, arms: int) -> Iterator[None]:
    """Allow one graph per arm: beyond a limit torch.compile silently stops compiling."""
    if decoding.compile is None:
        yield
        return
    import torch._dynamo as dynamo

    dynamo.reset()
    limit = max(8, 4 * arms)
    with dynamo.config.patch(recompile_limit=limit, fail_on_recompile_limit_hit=True):
        yield


def _checked(
    subject: Subject, methods: Sequence[Sequence[str]], decoding: Decoding, report: Report
) -> tuple[list[Arm], list[Check]]:
    """The arms that pass their check, the plain one first; the report names the others."""
    arms: list[Arm] = []
    checks: list[Check] = []
    for arm in _arms(subject, methods, decoding):
        check = arm.check(checks[0].reference if arm.edits else None)
        if check.refusal is None:
            arms.append(arm)
            checks.append(check)
            continue
        where = f"{arm.name} on {subject.name} ({subject.dtype}, {subject.device})"
        report.refused.append(f"{where}: {check.refusal}")
        if not arms:  # without the plain model there is nothing to compare with
            break
    return arms, checks


def _arms(subject: Subject, methods: Sequence[Sequence[str]], decoding: Decoding) -> Iterator[Arm]:
    yield Arm("plain", subject, (), decoding)
    forced = _forced(subject.model)
    stacks = [build_stack([forced.get(spec, spec) for spec in specs]) for specs in methods]
    if _by_products(stacks) and subject.device == "cpu" and decoding.compile is None:
        yield Arm(TwoProducts.name, subject, [TwoProducts()], decoding)
    for specs, stack in zip(methods, stacks, strict=True):
        yield Arm("+".join(specs), subject, stack, decoding)


def _by_products(stacks: Iterable[Sequence[Method]]) -> bool:
    """Whether a stack edits attention or contrasts, and so leaves torch's attention on a CPU."""
    return any(part.stage in ("attention", "logits") for stack in stacks for part in stack)


def _forced(model: Any) -> dict[str, str]:
    """The specs that run on a model in place of bare names."""
    calibration = load_calibration(model)
    has_sinks = calibration is not None and calibration.sink_channels
    return FORCED if has_sinks else FORCED | FORCED_SINKS


def _turns(arms: Sequence[Arm], rounds: int) -> list[list[Turn]]:
    """Timed turns by arm, one per round, in a new random order in each round."""
    for arm in arms:
        if not arm.warm:
            arm.turn()
    turns: list[list[Turn]] = [[] for _ in arms]
    order, shuffle = list(zip(arms, turns, strict=True)), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)  # so that no arm always follows the same other one
        for arm, done in order:
            done.append(arm.turn())
    return turns


def _rows(
    subject: Subject,
    decoding: Decoding,
    arms: Sequence[Arm],
    checks: Sequence[Check],
    turns: Sequence[Sequence[Turn]],
) -> Iterator[dict[str, Any]]:
    """One row per arm; the first arm is the plain model."""
    batch, prompt = subject.inputs["input_ids"].shape
    weights = list(subject.model.parameters())
    control = next((t for arm, t in zip(arms, turns, strict=True) if arm.is_control), None)
    for arm, check, own in zip(arms, checks, turns, strict=True):
        yield {
            "model": subject.name,
            "parameters": sum(p.numel() for p in weights),
            "dtype": subject.dtype,
            "batch": batch,
            "prompt": prompt,
            "visual_tokens": subject.visual_tokens,
            "new_tokens": decoding.new_tokens,
            "rounds": len(own),
            "cache": decoding.cache,
            "compile": decoding.compile or "",
            "arm": arm.name,
            "spec": arm.spec,
            "streams": check.streams,
            "edited_rows_per_step": check.edited_rows,
            "visual_tokens_kept": _per_row(check.visual_tokens, batch, subject.visual_tokens),
            **_times(own, turns[0], control, batch),
            "weight_bytes": sum(p.numel() * p.element_size() for p in weights),
            **_memory(check.memory, checks[0].memory),
        }


def _per_row(kept: int | None, batch: int, all_of_them: int) -> float:
    return all_of_them if kept is None else kept / batch


def _times(
    turns: Sequence[Turn], plain: Sequence[Turn], control: Sequence[Turn] | None, batch: int
) -> dict[str, float | None]:
    """Percentiles over the rounds; a ratio is taken within its round."""
    pairs = list(zip(turns, plain, strict=True))
    return {
        **_spread("first_token_seconds", [turn.first_token for turn in turns]),
        **_spread("first_token_over_plain", [a.first_token / p.first_token for a, p in pairs]),
        **_spread("prefill_seconds", [turn.prefill for turn in turns]),
        **_spread("prefill_over_plain", [a.prefill / p.prefill for a, p in pairs]),
        **_spread("tower_seconds", [turn.tower for turn in turns]),
        **_spread("tokens_per_second", [batch / turn.step for turn in turns]),
        **_spread("tokens_per_second_over_plain", [p.step / a.step for a, p in pairs]),
        **_spread(
            "tokens_per_second_over_two_products",
            [c.step / a.step for a, c in zip(turns, control, strict=True)] if control else None,
        ),
    }


def _spread(name: str, values: list[float] | None) -> dict[str, float | None]:
    if values is None:
        return {f"{name}_p{p}": None for p in PERCENTILES}
    found = np.percentile(values, PERCENTILES)
    return {f"{name}_p{p}": float(v) for p, v in zip(PERCENTILES, found, strict=True)}


def _memory(memory: Memory, plain: Memory) -> dict[str, float]:
    """Memory of a turn above the weights, and the KV cache's part of it."""
    return {
        "peak_above_weights_bytes": memory.peak,
        "peak_over_plain": memory.peak / plain.peak,
        "kv_cache_bytes": memory.cache,
        "kv_cache_over_plain": memory.cache / plain.cache,
    }


def write_csv(report: Report, path: Path) -> None:
    """Append the rows to a csv file, with a header if it is new.

    Raises:
        BadInput: the file has other columns.
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
    """Tables by model, dtype and prompt, then the refusals and notes."""
    lines: list[RenderableType] = []
    for (model, dtype, batch, prompt, cache, compiled), group in groupby(report.rows, _setting):
        rows = list(group)
        title = f"{model}, {dtype}, B={batch}, K={prompt}, {cache} cache"
        title += f", compiled ({compiled})" if compiled else ""
        plain = (rows[0][f"{name}_p50"] for name in ("first_token_seconds", "tokens_per_second"))
        title += "\nplain: {:.3g} s to the first token, then {:.3g} tokens/s".format(*plain)
        table = Table(title=title, title_justify="left", box=None, pad_edge=False, expand=False)
        # Columns that say nothing about the arms of a table are left out.
        pruned = any(row["visual_tokens_kept"] < row["visual_tokens"] for row in rows)
        omitted = {
            "rows": all(row["streams"] == 1 for row in rows),
            "kept": not pruned,
            "prefill": not pruned,
            "two\nproducts": not any(
                row["tokens_per_second_over_two_products_p50"] for row in rows
            ),
        }
        cells = [_cells(row, _median if pruned else _interval) for row in rows]
        shown = [column for column in cells[0] if not omitted.get(column)]
        for column in shown:
            right = column != "arm"
            table.add_column(
                column, justify="right" if right else "left", no_wrap=right, overflow="fold"
            )
        for row_cells in cells:
            table.add_row(*(row_cells[column] for column in shown))
        lines += [table, Text()]
    if report.rows:
        keys = ("device", "threads", "torch", "transformers", "vlmfix", "git")
        lines.append(Text(LEGEND))
        lines.append(Text(", ".join(f"{key} {report.rows[0][key]}" for key in keys)))
    lines += [Text(f"refused: {line}", "yellow") for line in report.refused]
    lines += [Text(line) for line in report.notes]
    return Group(*lines)


def _cells(row: dict[str, Any], figure: Callable[[dict[str, Any], str], str]) -> dict[str, str]:
    """The cells of a row by heading."""
    return {
        "arm": row["arm"],
        "rows": str(row["streams"]),
        "kept": f"{row['visual_tokens_kept']:g}",
        "prefill": _median(row, "prefill_over_plain"),
        "first token": figure(row, "first_token_over_plain"),
        "tokens/s": figure(row, "tokens_per_second_over_plain"),
        "two\nproducts": _median(row, "tokens_per_second_over_two_products"),
        "peak": f"{row['peak_over_plain']:.2f}",
        "KV\ncache": f"{row['kv_cache_over_plain']:.2f}",
    }


def _setting(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("model", "dtype", "batch", "prompt", "cache", "compile"))


def _interval(row: dict[str, Any], quantity: str) -> str:
    low, middle, high = (row[f"{quantity}_p{p}"] for p in PERCENTILES)
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def _median(row: dict[str, Any], quantity: str) -> str:
    middle = row[f"{quantity}_p50"]
    return "" if middle is None else f"{middle:.2f}"
