"""Samples to answers: batched, each (image, prompt) once, every answer on disk as soon as it is.

The runner knows no model: it is given a function from samples to answers.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, runtime_checkable

import numpy as np

from vlmfix.evals.tasks import Answer, Sample, Task

__all__ = [
    "Answerer",
    "ArmRun",
    "ModelUnderTest",
    "Recorder",
    "distinct_requests",
    "noise_seed",
    "run_arm",
]

Answerer = Callable[[Sequence[Sample], int], Sequence[Answer]]
"""A batch of samples in, one answer per sample out, in order.

The second argument seeds whatever is drawn meanwhile: tokens, and the noise of some methods.
"""


@runtime_checkable
class ModelUnderTest(Protocol):
    """What the harness asks of a model."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """Model id, dtype, device: what a reader must know to repeat the run."""

    def check(self, methods: Sequence[Any]) -> None:
        """Raise now what applying any of the methods would raise later."""

    def describe(self, method: Any | None) -> Any:
        """A method with all of its options, as JSON-able facts."""

    def arm(
        self, method: Any | None, gen_kwargs: Mapping[str, Any], image: Callable[[str], Any]
    ) -> AbstractContextManager[Answerer]:
        """The model under `method` (None: plain) for as long as the context lasts.

        Args:
            method: as the caller of `evaluate` named it.
            gen_kwargs: of generate, the same for every arm.
            image: file name -> picture.
        """


@dataclass(frozen=True)
class ArmRun:
    """All answers of one arm to one task.

    Args:
        answers: per sampling seed, one list aligned with the samples; one list in all if greedy.
        cost: forward passes, tokens and seconds, of all seeds.
    """

    answers: list[list[Answer]]
    cost: dict[str, float]


class Recorder:
    """Appends one JSON line per sample, flushed at once, so that a crash loses nothing finished.

    Args:
        path: the .jsonl file.
        task: reads the answers.
        common: keys that all records of the file share.
    """

    def __init__(self, path: Path, task: Task, common: Mapping[str, Any]) -> None:
        self._task, self._common = task, common
        self._file: IO[str] = path.open("a", encoding="utf-8")

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def write(
        self, sample: Sample, answer: Answer, latency: float, draw: int | None = None
    ) -> None:
        """Record one answer.

        Args:
            sample: what was asked.
            answer: what came back.
            latency: seconds that the batch took that held it.
            draw: number of the sampling seed; None: greedy.
        """
        failed = answer.error is not None
        parsed, correct = (None, None) if failed else self._task.parse(sample, answer)
        record = {
            **self._common,
            "sampling_seed": draw,
            "task": sample.task,
            "split": sample.split,
            "sample_id": sample.sample_id,
            "image": sample.image,
            "prompt": sample.prompt,
            "target": sample.target,
            "response": None if failed else answer.text,
            "n_prompt_tokens": answer.prompt_tokens,
            "n_new_tokens": answer.new_tokens,
            "finish": "error" if failed else answer.finish,
            "latency_s": round(latency, 4),
            "error": answer.error,
            "parsed": parsed,
            "correct": correct,
        }
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._file.flush()


def distinct_requests(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Samples grouped by (image, prompt), groups of one image side by side.

    POPE asks about the same objects in all three splits; under one method and greedy decoding the
    answer is the same, so it is asked for once. Sampled once, it stands in every split, too: each
    split is as it would be alone, and what they share, the bootstrap over images keeps together.
    """
    by_image: dict[str | None, dict[str, list[Sample]]] = {}
    for sample in samples:
        by_image.setdefault(sample.image, {}).setdefault(sample.prompt, []).append(sample)
    return [group for prompts in by_image.values() for group in prompts.values()]


def noise_seed(seed: int, draw: int, task: str, batch: int) -> int:
    """What the random numbers of one batch are seeded with: the same in every arm.

    The arms then sample with common random numbers: where their probabilities agree, so do their
    tokens, and differences between arms are not those between two throws of the dice.

    Args:
        seed: of the evaluation.
        draw: number of the sampling seed.
        task: name of the task.
        batch: number of the batch.
    """
    return random.Random(f"{seed}/{draw}/{task}/{batch}").getrandbits(32)


def run_arm(
    samples: Sequence[Sample],
    answer: Answerer,
    batch_size: int,
    recorder: Recorder,
    advance: Callable[[int], None] = lambda n: None,
    seed: int = 0,
    draws: Sequence[int | None] = (None,),
) -> ArmRun:
    """Answer all samples, once per sampling seed.

    A batch that fails is recorded as errors of its samples, and the run goes on.

    Args:
        samples: of one task.
        answer: the model under one method.
        batch_size: distinct requests per call of `answer`.
        recorder: where the answers go.
        advance: told the number of requests done, after every batch.
        seed: of the evaluation.
        draws: numbers of the sampling seeds; one None: greedy.
    """
    groups = distinct_requests(samples)
    replies: list[list[Answer]] = []
    batches: list[tuple[float, list[Answer]]] = []
    for draw in draws:
        found: dict[str, Answer] = {}
        for number, start in enumerate(range(0, len(groups), batch_size)):
            batch = groups[start : start + batch_size]
            first = batch[0][0]
            # Greedy, one seed for all batches: a method's noise depends on no batch then.
            noise = seed if draw is None else noise_seed(seed, draw, first.task, number)
            began = time.perf_counter()
            answers = _answer([group[0] for group in batch], answer, noise)
            seconds = time.perf_counter() - began
            for group, reply in zip(batch, answers, strict=True):
                for sample in group:
                    recorder.write(sample, reply, seconds, draw)
                    found[sample.sample_id] = reply
            if answers[0].error is None:
                batches.append((seconds, answers))
            advance(len(batch))
        replies.append([found[sample.sample_id] for sample in samples])
    return ArmRun(replies, _cost(batches))


def _answer(batch: Sequence[Sample], answer: Answerer, noise: int) -> list[Answer]:
    try:
        answers = list(answer(batch, noise))
        if len(answers) != len(batch):
            raise RuntimeError(f"{len(answers)} answers came back for {len(batch)} samples")
    except Exception as error:
        # Whatever it was (an image, memory, a method), the other batches may be fine.
        return [Answer("", error=f"{type(error).__name__}: {error}")] * len(batch)
    return answers


def _cost(batches: Sequence[tuple[float, list[Answer]]]) -> dict[str, float]:
    """Cost of the batches that went well; the first is left out of speed, as warm-up."""
    answers = [answer for _, batch in batches for answer in batch]
    timed = batches[1:] or batches
    seconds = sum(s for s, _ in timed)
    tokens = sum(answer.new_tokens for _, batch in timed for answer in batch)
    latencies = [s for s, batch in timed for _ in batch]
    p50, p95 = np.quantile(latencies, [0.5, 0.95]).tolist() if latencies else (0.0, 0.0)
    return {
        "answers": len(answers),
        "passes_per_answer": sum(a.passes for a in answers) / len(answers) if answers else 0.0,
        "new_tokens": sum(a.new_tokens for a in answers),
        "seconds": sum(s for s, _ in batches),
        "tokens_per_second": tokens / seconds if seconds else 0.0,
        "latency_p50_s": p50,
        "latency_p95_s": p95,
    }
