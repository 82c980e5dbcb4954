"""How fast a model decodes with methods, over the same model plain, in one process.

Arms take turns within each round, so a machine that slows down slows all of them, and the ratio of
a round compares neighbours in time. Only decode steps count: the clock starts when the first new
token is there. A row whose method changed nothing while decoding is refused, not printed.
"""

from __future__ import annotations

import csv
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from transformers.generation.streamers import BaseStreamer

import vlmfix
from vlmfix.bench_models import MODELS, Subject, subject
from vlmfix.calibrate import load_calibration
from vlmfix.errors import BadInput
from vlmfix.registry import build_stack

__all__ = ["Report", "render", "run", "write_csv"]

PERCENTILES = (20, 50, 80)
NO_GPU = "not measured on a GPU"
# Seen with torch 2.13: 0.85 ms for 16 heads and 608 keys, 0.10 ms as two matrix products.
SLOW_PLAIN = (
    "torch's own attention is slow on a CPU for one query row in half precision, and a layer with "
    "a method avoids it: ratios above 1 come from there; --dtype float32 shows a method's cost"
)
# A random model has no massive activations, nor has every trained one. One channel and a threshold
# of one standard deviation call about a third of the tokens sinks, so VAR edits nearly every head:
# more work than usual. The csv says which options ran.
FORCED = {"var": "var:sink_channels=0;tau=1"}


@dataclass
class Report:
    """Rows that were measured, and what was not and why."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Clock(BaseStreamer):  # type: ignore[misc]
    """Notes when each new token is there; handing it over waits for the device."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Called with the prompt, then with each step's tokens."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to do."""


def run(
    models: Sequence[str] = ("emoji", "llava-300m"),
    methods: Sequence[Sequence[str]] = (("var",), ("pai",)),
    *,
    dtypes: Sequence[str] = ("bfloat16",),
    devices: Sequence[str] | None = None,
    rounds: int = 9,
    new_tokens: int = 32,
    batch: int = 1,
    threads: int = 1,
    progress: Callable[[str], None] = lambda line: None,
) -> Report:
    """Time the decoding of every model plain and with every stack of methods.

    Args:
        models: Names of `MODELS`.
        methods: One stack of specs per arm.
        dtypes: bfloat16, float16 or float32.
        devices: cpu, cuda; if absent, the CPU, and a GPU where there is one.
        rounds: Timed turns of every arm.
        new_tokens: Tokens per turn, the same in every arm.
        batch: Rows, all of the same prompt.
        threads: Torch threads; put back afterwards.
        progress: Told what runs next.

    Returns:
        One row per model, dtype, device and arm; tokens/s counts all rows of the batch.

    Raises:
        BadInput: A name or a number that cannot be used.
    """
    if unknown := set(models) - set(MODELS):
        names = ", ".join(MODELS)
        raise BadInput(f"no benchmark model {sorted(unknown)[0]!r}: choose from {names}")
    if rounds < 1 or new_tokens < 3:
        raise BadInput("a benchmark needs at least 1 round and 3 new tokens")
    report = Report()
    has_gpu = torch.cuda.is_available()
    if devices is None:
        devices = ("cpu", "cuda") if has_gpu else ("cpu",)
    if not has_gpu or "cuda" not in devices:
        report.notes.append(NO_GPU)
    if "cpu" in devices and set(dtypes) - {"float32", "fp32"}:
        report.notes.append(SLOW_PLAIN)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for name in models:
            for device in devices:
                for dtype in dtypes:
                    progress(f"{name}, {dtype}, {device}")
                    made = subject(name, dtype, device, batch)
                    _measure(made, methods, rounds, new_tokens, report)
    finally:
        torch.set_num_threads(before)
    return report


def _measure(
    subject: Subject,
    methods: Sequence[Sequence[str]],
    rounds: int,
    new_tokens: int,
    report: Report,
) -> None:
    stacks: dict[str, Any] = {"plain": None}
    edited = {"plain": 0}
    for specs in methods:
        arm = "+".join(specs)
        found = load_calibration(subject.model)
        if found is None or not found.sink_channels:
            specs = [FORCED.get(spec, spec) for spec in specs]
        stack = build_stack(list(specs))
        # Two untimed turns: rows edited by the prompt alone, and rows edited while decoding.
        first, more = (_turn(subject, stack, tokens)[1] for tokens in (1, new_tokens))
        if more <= first:
            why = f"{arm} on {subject.name} ({subject.dtype}, {subject.device}) edited no row"
            report.refused.append(f"{why} while decoding, so its speed means nothing")
            continue
        stacks[arm], edited[arm] = stack, more
    _turn(subject, None, new_tokens)
    seconds: dict[str, list[float]] = {arm: [] for arm in stacks}
    order = list(stacks)
    for _ in range(rounds):
        for arm in order:
            seconds[arm].append(_turn(subject, stacks[arm], new_tokens)[0])
        order = order[1:] + order[:1]
    batch, prompt = subject.inputs["input_ids"].shape
    for arm, stack in stacks.items():
        speed = [batch / step for step in seconds[arm]]
        ratio = [p / s for p, s in zip(seconds["plain"], seconds[arm], strict=True)]
        report.rows.append(
            {
                **_machine(subject.device),
                "model": subject.name,
                "parameters": sum(p.numel() for p in subject.model.parameters()),
                "dtype": subject.dtype,
                "batch": batch,
                "prompt": prompt,
                "visual_tokens": subject.visual_tokens,
                "new_tokens": new_tokens,
                "rounds": rounds,
                "arm": arm,
                "spec": "+".join(method.spec() for method in stack or ()),
                "edited_rows": edited[arm],
                **_spread("tokens_per_second", speed),
                **_spread("over_plain", ratio),
            }
        )


def _turn(subject: Subject, stack: Any, new_tokens: int) -> tuple[float, int]:
    """Seconds per decode step, and attention rows that were edited (prompt included)."""
    if stack is None:
        return _decode(subject, new_tokens), 0
    with vlmfix.wrapped(subject.model, stack) as model:
        seconds = _decode(subject, new_tokens)
        return seconds, vlmfix.last_call(model).edited_rows


def _decode(subject: Subject, new_tokens: int) -> float:
    clock = Clock()
    model = subject.model
    model.generate(
        **subject.inputs,
        do_sample=False,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        suppress_tokens=[model.config.image_token_id],
        pad_token_id=0,
        streamer=clock,
    )
    # times[0] is the prompt, times[1] the token that prefill gave.
    steps = len(clock.times) - 2
    if steps != new_tokens - 1:
        raise RuntimeError(f"{steps + 1} new tokens came instead of {new_tokens}")
    return (clock.times[-1] - clock.times[1]) / max(steps, 1)


def _spread(name: str, values: list[float]) -> dict[str, float]:
    found = np.percentile(values, PERCENTILES)
    return {f"{name}_p{p}": float(v) for p, v in zip(PERCENTILES, found, strict=True)}


def _machine(device: str) -> dict[str, Any]:
    gpu = device.startswith("cuda")
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "vlmfix": vlmfix.__version__,
        "git": _git(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if gpu else _cpu(),
        "threads": torch.get_num_threads(),
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _git() -> str:
    """The commit of the checkout that runs, "+" if it has changes; empty if there is none."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


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
    """The rows as a table, then what was not measured."""
    table = Table(caption="median [20 %, 80 %] of the rounds")
    for column in ("model", "dtype", "arm", "B", "K", "tokens/s", "over plain", "edited rows"):
        table.add_column(column)
    for row in report.rows:
        cells = [row[key] for key in ("model", "dtype", "arm", "batch", "prompt")]
        speed, ratio = (
            "{1:.3g} [{0:.3g}, {2:.3g}]".format(*(row[f"{name}_p{p}"] for p in PERCENTILES))
            for name in ("tokens_per_second", "over_plain")
        )
        table.add_row(*map(str, cells), speed, ratio, str(row["edited_rows"]))
    lines: list[RenderableType] = [table]
    if report.rows:
        keys = ("device", "threads", "torch", "transformers", "vlmfix", "git")
        lines.append(Text(", ".join(f"{key} {report.rows[0][key]}" for key in keys)))
    lines += [Text(f"refused: {line}", "yellow") for line in report.refused]
    lines += [Text(line) for line in report.notes]
    return Group(*lines)
