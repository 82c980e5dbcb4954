"""Times one layer's attention for the row that decoding computes, edited and unedited.

    python -m vlmfix.bench.kernels [--output FILE.csv] [--plot FILE.png]

On a GPU the Triton kernels are timed, by replaying CUDA graphs; without one, the plain torch path,
and every row says that it is no measurement of the kernels. Arms take turns within each round, so a
machine that slows down slows all of them. Every arm goes through several copies of the KV cache,
together too large for the processor's cache, as decoding goes through layers. An arm is timed only
after its output agreed with float64 in the same run.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from vlmfix.bench.per_head import amplify_image, attend_materialised, redistribute_per_head
from vlmfix.errors import BadInput, MissingDependency
from vlmfix.kernels import ops, reference
from vlmfix.kernels.reference import FusedEdit
from vlmfix.machine import facts

__all__ = ["NO_GPU", "Report", "Shape", "default_shapes", "draw", "main", "run", "write_csv"]

NO_GPU = "not measured on a GPU"
PERCENTILES = (20, 50, 80)
#: Least bytes of keys and values in all copies of a cache, up to the largest number of copies.
_COLD_BYTES = {"cpu": 2**27, "cuda": 2**28}
_MOST_COPIES = 64
_KEEP, _RHO, _MINIMUM = 0.6, 0.5, 0.2  # VAR
_ALPHA = 0.5  # PAI

Cache = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # query, key, value
Operator = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """One row of `heads` query heads against a cache; `masked`: through a mask, all of it True."""

    batch: int = 1
    heads: int = 32
    key_heads: int = 32
    keys: int = 700
    width: int = 128
    dtype: str = "bfloat16"
    masked: bool = False

    def __str__(self) -> str:
        mask = "masked" if self.masked else "unmasked"
        heads = f"{self.heads}:{self.key_heads}"
        return f"B={self.batch} heads={heads} K={self.keys} {self.dtype} {mask}"

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values, which every attention has to read."""
        size = getattr(torch, self.dtype).itemsize
        return 2 * self.batch * self.key_heads * self.keys * self.width * int(size)


@dataclass
class Report:
    """Rows that were measured, and the reasons for those that were not."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Arm:
    """An operator, the edit that it must equal in float64, and the way to run it."""

    name: str
    call: Operator
    edit: str = "plain"
    graph: bool = True  # whether a CUDA graph can hold it
    backend: SDPBackend | None = None  # backend of torch's attention; None: not called

    def chosen(self) -> contextlib.AbstractContextManager[Any]:
        """Run torch's attention on the backend within the block."""
        chosen: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        return chosen if self.backend is None else sdpa_kernel(self.backend)


@dataclass
class _Problem:
    """Inputs of one shape: several caches, and the groups of their keys that edits read."""

    caches: list[Cache]
    edits: dict[str, FusedEdit]
    groups: torch.Tensor
    mask: torch.Tensor | None
    scaling: float


def default_shapes(device: str) -> list[Shape]:
    """The shapes of the published tables; on a CPU the few that take seconds."""
    gpu = device.startswith("cuda")
    return [
        Shape(batch, heads, key_heads, keys, dtype=dtype, masked=masked)
        for dtype, batch, (heads, key_heads), keys, masked in itertools.product(
            ("bfloat16",) if gpu else ("bfloat16", "float32"),
            (1, 8) if gpu else (1,),
            ((32, 32), (28, 4)),
            (700, 2048, 8192, 32768) if gpu else (700, 2048),
            (False, True),
        )
    ]


def run(
    shapes: Sequence[Shape],
    device: str,
    *,
    rounds: int = 25,
    progress: Callable[[str], None] = lambda line: None,
) -> Report:
    """Time every operator on every shape.

    Args:
        shapes: the shapes to time.
        device: "cpu" or "cuda".
        rounds: timed turns of every arm.
        progress: called with a line about what runs next.

    Returns:
        One row per shape and arm, times in microseconds per call. `over_sdpa` divides by the time
        of the fastest SDPA arm in the same round.
    """
    if rounds < 1:
        raise BadInput(f"rounds={rounds}: a benchmark needs at least one")
    report = Report()
    machine = {**facts(device), "note": "" if device.startswith("cuda") else NO_GPU}
    with torch.inference_mode():
        for shape in shapes:
            progress(str(shape))
            try:
                _measure(shape, device, rounds, machine, report)
            except torch.OutOfMemoryError:
                report.refused.append(f"{shape}: not enough memory on {device}")
    return report


def _measure(
    shape: Shape, device: str, rounds: int, machine: dict[str, Any], report: Report
) -> None:
    problem = _problem(shape, device)
    implementation: ops.Implementation = "triton" if device.startswith("cuda") else "torch"
    arms, errors = [], {}
    exact = {name: _exact(problem, edit) for name, edit in problem.edits.items()}
    allowed = _eager_errors(problem, exact)
    for arm in _arms(problem, implementation):
        try:
            # The first arm is the eager one; its error bounds that of the others.
            with arm.chosen():
                error, reason = _check(arm, problem, exact, allowed)
        except (RuntimeError, BadInput) as failure:  # a backend that does not take this shape
            error, reason = math.inf, str(failure).splitlines()[0]
        if reason:
            report.refused.append(f"{arm.name}, {shape}: {reason}")
            continue
        arms.append(arm)
        errors[arm.name] = error
    turns = itertools.cycle(problem.caches)
    calls = {arm.name: _timed(arm, problem, turns, device) for arm in arms}
    seconds: dict[str, list[float]] = {arm.name: [] for arm in arms}
    order = [arm.name for arm in arms]
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        # In a fixed order an arm would always find the processor's cache as the same arm left it.
        shuffle(order)
        for name in order:
            seconds[name].append(calls[name]())
    sdpa = [name for name in order if name.startswith("sdpa")]
    best = min(sdpa, key=lambda name: statistics.median(seconds[name]), default=None)
    for arm in arms:
        ratio = []
        if best is not None:
            ratio = [s / b for s, b in zip(seconds[arm.name], seconds[best], strict=True)]
        report.rows.append(
            {
                **machine,
                "dtype": shape.dtype,
                "batch": shape.batch,
                "heads": shape.heads,
                "key_heads": shape.key_heads,
                "keys": shape.keys,
                "width": shape.width,
                "masked": shape.masked,
                "cache_bytes": shape.cache_bytes,
                "arm": arm.name,
                "best_sdpa": best or "",
                "implementation": implementation if arm.name.startswith("vlmfix") else "",
                "cuda_graph": arm.graph and device.startswith("cuda"),
                "copies": len(problem.caches),
                "rounds": rounds,
                "error": errors[arm.name],
                **_spread("microseconds", [1e6 * second for second in seconds[arm.name]]),
                **_spread("over_sdpa", ratio),
            }
        )


def _problem(shape: Shape, device: str) -> _Problem:
    """Caches in which every other head attends to the image, far from VAR's thresholds.

    Four keys in five are visual, one in 33 of those is a sink. Heads that attend to the image put
    about a fifth of their mass on the sinks; the others put nearly all of it on the text.
    """
    dtype = getattr(torch, shape.dtype)
    copies = -(-_COLD_BYTES[torch.device(device).type] // shape.cache_bytes)
    source = torch.Generator(device).manual_seed(0)
    index = torch.arange(shape.keys, device=device)
    visual = (index >= shape.keys // 20) & (index < shape.keys * 17 // 20)
    sinks = visual & (index % 33 == 0)
    # Two channels of keys and queries encode the kind of a key, and add this much to a score.
    text_score, sink_score, level = 5.0, 2.0, 4.0
    scaling = shape.width**-0.5

    def normal(*dims: int) -> torch.Tensor:
        return torch.randn(dims, generator=source, device=device)

    caches = []
    for _ in range(max(1, min(copies, _MOST_COPIES))):
        query = normal(shape.batch, 1, shape.heads, shape.width)
        query[..., 0] = text_score / (level * scaling)
        query[:, :, ::2, 0] *= -1
        query[..., 1] = sink_score / (level * scaling)
        key = normal(shape.batch, shape.key_heads, shape.keys, shape.width)
        key[..., 0] = level * ~visual
        key[..., 1] = level * sinks
        value = normal(shape.batch, shape.key_heads, shape.keys, shape.width)
        caches.append((query.to(dtype).transpose(1, 2), key.to(dtype), value.to(dtype)))
    groups = (visual.to(torch.uint8) * 3 - sinks.to(torch.uint8)).repeat(shape.batch, 1)
    groups[:, 0] = 1
    gain = torch.ones(4, 2)
    gain[2:] = torch.tensor([1 + _ALPHA, 1 - _ALPHA])
    scale = torch.rand(shape.batch, shape.heads, generator=source, device=device) + 0.5
    edits = {
        "plain": FusedEdit(),
        "var": FusedEdit(
            groups, epilogue="var", keep=_KEEP, rho=_RHO, minimum_visual_mass=_MINIMUM
        ),
        "pai": FusedEdit(groups, gain=gain.to(device)),
        "vhr": FusedEdit(head_scale=scale),
    }
    every = torch.ones(shape.batch, 1, 1, shape.keys, dtype=torch.bool, device=device)
    return _Problem(caches, edits, groups, every if shape.masked else None, scaling)


def _arms(problem: _Problem, implementation: ops.Implementation) -> list[_Arm]:
    """All arms, the eager one first."""
    scaling, mask = problem.scaling, problem.mask

    def eager(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return attend_materialised(query, key, value, scaling=scaling, mask=mask)

    def loop(weights: torch.Tensor) -> torch.Tensor:
        return redistribute_per_head(
            weights, problem.groups, keep=_KEEP, rho=_RHO, minimum_visual_mass=_MINIMUM
        )

    def per_head(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return attend_materialised(query, key, value, scaling=scaling, mask=mask, edit=loop)

    def ours(edit: FusedEdit) -> Operator:
        def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            return ops.attend_rows(
                query, key, value, edit, scaling=scaling, mask=mask, impl=implementation
            ).out

        return call

    def sdpa(packed: bool) -> Operator:
        def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            shape = query.shape
            if packed:  # heads that share a key head as its rows: equivalent for one position
                query = query.reshape(shape[0], key.shape[1], -1, shape[3])
            grouped = query.shape[1] != key.shape[1]
            found = scaled_dot_product_attention(
                query, key, value, attn_mask=mask, scale=scaling, enable_gqa=grouped
            )
            return found.reshape(shape)

        return call

    query, key, _ = problem.caches[0]
    backends = {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}
    if query.is_cuda:
        backends["efficient"] = SDPBackend.EFFICIENT_ATTENTION
        backends["cudnn"] = SDPBackend.CUDNN_ATTENTION
    forms = [("", False)] + [(" packed", True)] * (query.shape[1] != key.shape[1])
    return [
        _Arm("eager", eager),
        *(
            _Arm(f"sdpa {name}{suffix}", sdpa(packed), backend=backend)
            for name, backend in backends.items()
            for suffix, packed in forms
        ),
        *(_Arm(f"vlmfix {name}", ours(edit), name) for name, edit in problem.edits.items()),
        _Arm("per-head loop var", per_head, "var", graph=False),  # it waits for indices
    ]


def _exact(problem: _Problem, edit: FusedEdit) -> torch.Tensor:
    query, key, value = (tensor.double() for tensor in problem.caches[0])
    mask, scaling = problem.mask, problem.scaling
    return reference.attend_rows(query, key, value, edit, scaling=scaling, mask=mask).out


def _eager_errors(problem: _Problem, exact: dict[str, torch.Tensor]) -> dict[str, float]:
    """Largest error of eager attention in the dtype, by edit.

    PAI sharpens the softmax, which raises the error of every operator, so it is held to eager PAI;
    the other edits act behind the softmax and are held to eager attention without an edit. The
    error depends on the order of the sums, and libraries choose another one for several rows, such
    as packed heads, than for a single row: the larger error of both counts.
    """

    def amplified(scores: torch.Tensor) -> torch.Tensor:
        return amplify_image(scores, problem.groups, alpha=_ALPHA)

    def largest(name: str, edit_scores: Callable[[torch.Tensor], torch.Tensor] | None) -> float:
        query, key, value = problem.caches[0]
        options: dict[str, Any] = {"scaling": problem.scaling, "mask": problem.mask}
        outputs = [
            attend_materialised(
                query.expand(-1, -1, rows, -1), key, value, edit_scores=edit_scores, **options
            )
            for rows in (1, 8)
        ]
        return max(float((output.double() - exact[name]).abs().max()) for output in outputs)

    return {**dict.fromkeys(exact, largest("plain", None)), "pai": largest("pai", amplified)}


def _check(
    arm: _Arm, problem: _Problem, exact: dict[str, torch.Tensor], allowed: dict[str, float]
) -> tuple[float, str]:
    """The largest error of an arm, and why it must not be timed ("" if it may)."""
    found, expected = arm.call(*problem.caches[0]), exact[arm.edit]
    error = float((found.double() - expected).abs().max())
    rounding = torch.finfo(found.dtype).eps * float(expected.abs().max())
    # Factors of up to 1.5 behind the softmax may raise the error of eager attention as much.
    bound = 16 * rounding if arm.name == "eager" else 4 * allowed[arm.edit] + rounding
    if not error <= bound:
        return error, f"wrong by {error:.1e}, where {bound:.1e} is allowed"
    if arm.edit != "plain":
        moved = float((expected - exact["plain"]).abs().max())
        if moved < 4 * error:
            return error, f"the edit moves the output by {moved:.1e} only, its error is {error:.1e}"
    return error, ""


def _timed(
    arm: _Arm, problem: _Problem, turns: Iterator[Cache], device: str
) -> Callable[[], float]:
    """A function that runs an arm and returns its seconds per call.

    On a CPU it takes the next of `turns`, which all arms share, so that no arm finds the data of
    the previous one in the processor's cache. On a GPU it runs through all caches.
    """
    if not device.startswith("cuda"):

        def on_cpu() -> float:
            tensors = next(turns)
            with arm.chosen():
                start = time.perf_counter()
                arm.call(*tensors)
                return time.perf_counter() - start

        return on_cpu

    def all_caches() -> None:
        with arm.chosen():
            for tensors in problem.caches:
                arm.call(*tensors)

    replay: Callable[[], Any] = all_caches
    if arm.graph:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):  # compiles, and initialises what a capture may not
            all_caches()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            all_caches()
        replay = graph.replay
    replay()

    def on_gpu() -> float:
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record()
        replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / len(problem.caches)

    return on_gpu


def _spread(name: str, values: list[float]) -> dict[str, float]:
    found = np.percentile(values, PERCENTILES) if values else [math.nan] * len(PERCENTILES)
    return {f"{name}_p{p}": float(v) for p, v in zip(PERCENTILES, found, strict=True)}


def write_csv(report: Report, path: Path) -> None:
    """Write the rows to a csv file, replacing an old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(report.rows[0]) if report.rows else [])
        writer.writeheader()
        writer.writerows(report.rows)


def draw(report: Report, path: Path) -> None:
    """Draw the time over the fastest SDPA, one panel per dtype and head count, as a PNG.

    Raises:
        BadInput: there is nothing to draw.
        MissingDependency: matplotlib is not installed.
    """
    rows = [row for row in report.rows if not row["masked"]]
    if not rows:
        raise BadInput("there is nothing to draw: no row without a mask was measured")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependency("drawing needs matplotlib: pip install 'vlmfix[eval]'") from error
    panels = list(dict.fromkeys((row["dtype"], row["heads"], row["key_heads"]) for row in rows))
    places = list(dict.fromkeys((row["batch"], row["keys"]) for row in rows))
    # The fastest SDPA is the line at 1.
    arms = [a for a in dict.fromkeys(row["arm"] for row in rows) if not a.startswith("sdpa")]
    figure = Figure(figsize=(max(7.0, 1.6 * len(places) * len(panels)), 3.8), dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    step = 0.8 / len(arms)
    for axis, panel in zip(axes, panels, strict=True):
        for number, arm in enumerate(arms):
            chosen = [
                (places.index((row["batch"], row["keys"])), row)
                for row in rows
                if row["arm"] == arm and (row["dtype"], row["heads"], row["key_heads"]) == panel
            ]
            low, middle, high = (
                np.array([row[f"over_sdpa_p{p}"] for _, row in chosen]) for p in PERCENTILES
            )
            at = np.array([place for place, _ in chosen]) + (number + 0.5) * step - 0.4
            spread = np.array([middle - low, high - middle])
            axis.errorbar(at, middle, spread, label=arm, color=f"C{number}", fmt="o", capsize=3)
        axis.axhline(1.0, color="0.2", linewidth=1)
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(axis="y", color="0.9")
        axis.set_xlim(-0.5, len(places) - 0.5)
        axis.set_xticks(range(len(places)), [f"B={b}\nK={k}" for b, k in places])
        axis.set_title("{}, heads {}:{}".format(*panel), fontsize=10)
    axes[0].set_ylabel("time over the fastest SDPA (log)")
    axes[-1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    first = rows[0]
    where = f"{first['device']}, torch {first['torch']}, {first['threads']} thread(s)"
    points = "median, 20 to 80 %"
    figure.suptitle(", ".join(filter(None, (where, first["note"], points))), fontsize=10)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _table(report: Report) -> str:
    """The rows as text: median [20 %, 80 %]."""
    lines = []
    for row in report.rows:
        mask = "masked" if row["masked"] else "unmasked"
        where = (
            f"{row['dtype']:9} B={row['batch']} {row['heads']}:{row['key_heads']} "
            f"K={row['keys']} {mask}"
        )
        cells = [
            "{1:9.3g} [{0:.3g}, {2:.3g}]".format(*(row[f"{name}_p{p}"] for p in PERCENTILES))
            for name in ("microseconds", "over_sdpa")
        ]
        best = " = best" if row["arm"] == row["best_sdpa"] else ""
        lines.append(f"{where:36} {row['arm']:20} us {cells[0]:30} x sdpa {cells[1]}{best}")
    lines += [f"refused: {line}" for line in report.refused]
    lines += sorted({row["note"] for row in report.rows if row["note"]})
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, print, and write the files."""
    parser = argparse.ArgumentParser(prog="python -m vlmfix.bench.kernels", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--output", type=Path, help="csv file to write the rows to")
    parser.add_argument("--plot", type=Path, help="PNG file to draw the times in; needs matplotlib")
    parser.add_argument("--rounds", type=int, default=25, help="timed turns of every arm")
    parser.add_argument("--threads", type=int, default=1, help="torch threads on a CPU")
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        help="device to time on; default: a GPU if there is one",
    )
    chosen = parser.parse_args(arguments)
    device = chosen.device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(chosen.threads)
    report = run(
        default_shapes(device),
        device,
        rounds=chosen.rounds,
        progress=lambda line: print(line, flush=True),
    )
    print(_table(report))
    if chosen.output is not None:
        write_csv(report, chosen.output)
    if chosen.plot is not None:
        draw(report, chosen.plot)


if __name__ == "__main__":
    main()
