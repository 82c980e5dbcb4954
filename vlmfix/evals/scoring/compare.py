"""Every arm of a run against its base, on the items that all of them answered."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from vlmfix.evals.running.arms import BASE, NOOP, greedy_twin
from vlmfix.evals.scoring.controls import add_controls
from vlmfix.evals.tasks import Answer, Task

__all__ = ["compare_arms"]


def compare_arms(
    task: Task, runs: Mapping[str, Sequence[Sequence[Answer]]], seed: int
) -> dict[str, Any]:
    """Score what every arm answered: an item that failed once, under any arm, counts for none.

    Args:
        task: reads the answers.
        runs: arm -> its answers by seed; a greedy arm next to sampled ones has one list, which
            stands for every seed.
        seed: of the bootstrap.

    Returns:
        The task's entry of the results, without what the run itself knows.
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
