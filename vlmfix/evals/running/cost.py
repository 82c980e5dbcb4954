"""What answers cost: forward passes, tokens, seconds, memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from vlmfix.evals.running.records import Record
from vlmfix.evals.running.runner import Batch

__all__ = ["cost", "peak_memory"]

MIB = 1 << 20


def cost(records: Sequence[Record], blocks: Sequence[Sequence[Batch]]) -> dict[str, float]:
    """Passes, tokens and seconds of one arm, of all its seeds and processes.

    The first batch of every process is left out of speed, as warm-up; so is the first after a
    resumption. Seconds and tokens per second are of one process: with more, they run side by side.

    Args:
        records: of one arm and task.
        blocks: of all processes, from `runner.plan_batches`.
    """
    first = {group.samples[0].sample_id for block in blocks for b in block for group in b.groups}
    answered = [r for r in records if r["sample_id"] in first and r["error"] is None]
    batches: dict[tuple[Any, int], list[Record]] = {}
    for record in answered:
        batches.setdefault((record["sampling_seed"], record["batch"]), []).append(record)
    warm: dict[tuple[str, int], tuple[int, int]] = {}
    for (draw, number), rows in batches.items():
        started = rows[-1]["run_id"], rows[-1]["rank"]
        warm[started] = min(warm.get(started, (draw or 0, number)), (draw or 0, number))
    timed = [
        rows
        for (draw, number), rows in batches.items()
        if warm[rows[-1]["run_id"], rows[-1]["rank"]] != (draw or 0, number)
    ] or list(batches.values())
    seconds = sum(rows[-1]["latency_s"] for rows in timed)
    latencies = [rows[-1]["latency_s"] for rows in timed for _ in rows]
    p50, p95 = np.quantile(latencies, [0.5, 0.95]).tolist() if latencies else (0.0, 0.0)
    n = len(answered)
    return {
        "answers": n,
        "passes_per_answer": sum(r["passes"] for r in answered) / n if n else 0.0,
        "new_tokens": sum(r["n_new_tokens"] for r in answered),
        "seconds": sum(rows[-1]["latency_s"] for rows in batches.values()),
        "tokens_per_second": _tokens(timed) / seconds if seconds else 0.0,
        "answers_per_second": sum(map(len, timed)) / seconds if seconds else 0.0,
        "latency_p50_s": p50,
        "latency_p95_s": p95,
        "halved_batches": sum(rows[-1]["halvings"] > 0 for rows in batches.values()),
    }


def _tokens(batches: Sequence[Sequence[Record]]) -> int:
    return sum(record["n_new_tokens"] for rows in batches for record in rows)


@contextmanager
def peak_memory() -> Iterator[dict[str, float]]:
    """The most memory in use while the context lasts, in MiB, filled in at its end.

    Yields:
        {"peak_gpu_mib"} of the busiest GPU, from torch's allocator, where there is one; else
        {"peak_process_mib"}, which the operating system counts from the start of the process (it
        cannot be set back), where it counts it at all.
    """
    found: dict[str, float] = {}
    torch: Any = sys.modules.get("torch")
    gpus = torch.cuda.device_count() if torch is not None and torch.cuda.is_initialized() else 0
    for gpu in range(gpus):
        torch.cuda.reset_peak_memory_stats(gpu)
    yield found
    if gpus:
        peaks = [torch.cuda.max_memory_allocated(gpu) for gpu in range(gpus)]
        found["peak_gpu_mib"] = max(peaks) / MIB
        return
    try:
        import resource
    except ImportError:  # Windows
        return
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found["peak_process_mib"] = peak / MIB if sys.platform == "darwin" else peak / 1024
