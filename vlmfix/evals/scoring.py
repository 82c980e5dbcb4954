"""From answers to the results of one task: scores, controls, and which items they are about."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from vlmfix.evals.controls import add_controls
from vlmfix.evals.tasks import Answer, Sample, Task

__all__ = ["score_task"]


def score_task(
    task: Task,
    samples: Sequence[Sample],
    arms: Mapping[str, Sequence[Answer]],
    draws: Sequence[int | None],
    seed: int,
) -> dict[str, Any]:
    """What results.json holds of a task, but for what only a run knows (costs, decoding).

    Args:
        task: scores the answers.
        samples: the items that are scored.
        arms: arm -> the answers to all samples, sampling seed by sampling seed; the base first.
        draws: the sampling seeds; one None: greedy.
        seed: of the bootstrap.
    """
    repeated = [sample for _ in draws for sample in samples]
    seeds = [i for i in range(len(draws)) for _ in samples]
    scored = task.score(repeated, arms, seeds)
    add_controls(scored, task, repeated, arms, seeds, seed)
    images = list(dict.fromkeys(sample.image_id for sample in samples))
    return {
        **task.facts,
        "n_samples": len(samples),
        "n_images": len(images),
        "splits": list(dict.fromkeys(sample.split for sample in samples)),
        "image_ids": images,
        "image_ids_sha256": hashlib.sha256(json.dumps(images).encode()).hexdigest(),
        "arms": scored,
    }
