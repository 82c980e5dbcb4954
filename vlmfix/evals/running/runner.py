"""Samples to answers: batched, each request once, every answer on disk as soon as it is there.

The runner knows no model: it is given a function from requests to answers.

What is in a batch decides the last bits of its answers, so it is planned from the list of all
samples and from nothing else: not from what an earlier run has finished, nor from the number of
processes.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from vlmfix.errors import BadInput
from vlmfix.evals.running.records import Done, Recorder
from vlmfix.evals.tasks import Answer, Sample

__all__ = [
    "Answerer",
    "Batch",
    "Group",
    "ModelUnderTest",
    "Request",
    "Turn",
    "noise_seed",
    "plan_batches",
    "remaining",
    "run_arm",
]


@dataclass(frozen=True)
class Turn:
    """What stands in a chat before a question: a prompt, its picture if any, and the answer."""

    image: str | None
    prompt: str
    answer: str


@dataclass(frozen=True)
class Request:
    """One thing to ask a model.

    Args:
        sample: whose picture and prompt are the last turn of the chat.
        turns: those before it, the first one first.
        prefix: beginning of the answer that the model goes on from; "" for none.
    """

    sample: Sample
    turns: tuple[Turn, ...] = ()
    prefix: str = ""


Answerer = Callable[[Sequence[Request], int], Sequence[Answer]]
"""A batch of requests in, one answer per request out, in order.

The second argument seeds all random draws: tokens, and the noise of some methods.
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
        self,
        method: Any | None,
        gen_kwargs: Mapping[str, Any],
        image: Callable[[str], Any],
        wants_p_yes: bool,
    ) -> AbstractContextManager[Answerer]:
        """The model under `method` (None: plain) for as long as the context lasts.

        Args:
            method: as the caller of `evaluate` named it.
            gen_kwargs: of generate, the same for every arm that decodes alike.
            image: name -> picture.
            wants_p_yes: whether answers carry `Answer.p_yes`.
        """


@dataclass
class Group:
    """Samples that ask the same: one request, one answer for all of them.

    POPE asks about the same objects in all three splits; under one method and greedy decoding the
    answer is the same, so it is asked for once. Sampled once, it stands in every split, too: each
    split is as it would be alone, and what they share, the bootstrap over images keeps together.

    Attributes:
        parent: the group whose answer this one follows.
        pictured: whether a picture stands in its chat.
        samples: one or more.
        children: groups that follow it.
    """

    parent: Group | None
    pictured: bool
    samples: list[Sample] = field(default_factory=list)
    children: list[Group] = field(default_factory=list)


@dataclass(frozen=True)
class Batch:
    """Groups that are asked at once; `number` counts the batches of a task."""

    number: int
    groups: Sequence[Group]


def plan_batches(samples: Sequence[Sample], size: int) -> list[list[Batch]]:
    """The batches of a task, by block.

    A block is up to `size` conversations from first to last turn: a batch of the samples that
    follow none, then one of those that follow these, and so on. Nothing in a block waits for
    another block. Chats with and without a picture never share a batch, since many processors do
    not take them together.

    Args:
        samples: of one task; one that follows another comes after it.
        size: requests per batch.

    Raises:
        ValueError: a sample follows one that does not come before it.
    """
    groups: dict[tuple[Any, ...], Group] = {}
    group_of: dict[str, Group] = {}
    for sample in samples:
        if sample.follows is not None and sample.follows not in group_of:
            raise ValueError(
                f"{sample.task}: {sample.sample_id} follows {sample.follows}, which does not come "
                "before it: put the turns of a chat in their order"
            )
        parent = None if sample.follows is None else group_of[sample.follows]
        asked = (sample.image, sample.prompt, sample.prefix, sample.grow, sample.until)
        key = (id(parent), *asked)
        if key not in groups:
            pictured = sample.image is not None or (parent is not None and parent.pictured)
            groups[key] = Group(parent, pictured)
            if parent is not None:
                parent.children.append(groups[key])
        groups[key].samples.append(sample)
        group_of[sample.sample_id] = groups[key]

    roots: dict[str | None, list[Group]] = {}
    for group in groups.values():
        if group.parent is None:
            # Requests about one picture side by side: it is read once.
            roots.setdefault(group.samples[0].image, []).append(group)
    without = roots.pop(None, [])
    blocks: list[list[Batch]] = []
    number = 0
    for first in (*_chunks(sum(roots.values(), []), size), *_chunks(without, size)):
        block, wave = [], first
        while wave:
            for pictured in (True, False):
                alike = [group for group in wave if group.pictured == pictured]
                for some in _chunks(alike, size):
                    block.append(Batch(number, some))
                    number += 1
            wave = [child for group in wave for child in group.children]
        blocks.append(block)
    return blocks


def remaining(blocks: Sequence[Sequence[Batch]], done: Done, draws: Sequence[int | None]) -> int:
    """How many requests `run_arm` will make of these."""
    batches = [batch for block in blocks for batch in block]
    return sum(
        len(batch.groups) for draw in draws for batch in batches if _waiting(batch, done, draw)
    )


def _waiting(batch: Batch, done: Done, draw: int | None) -> list[tuple[Sample, Group]]:
    return [
        (sample, group)
        for group in batch.groups
        for sample in group.samples
        if (draw, sample.sample_id) not in done
    ]


def _chunks(groups: list[Group], size: int) -> list[list[Group]]:
    return [groups[start : start + size] for start in range(0, len(groups), size)]


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
    blocks: Sequence[Sequence[Batch]],
    answer: Answerer,
    recorder: Recorder,
    done: Done,
    advance: Callable[[int], None] = lambda n: None,
    seed: int = 0,
    draws: Sequence[int | None] = (None,),
) -> None:
    """Answer all samples of the blocks, once per sampling seed, and record the answers.

    A batch that fails is recorded as errors of its samples, and the run goes on. A batch that runs
    out of memory, or holds an input that cannot be used, is halved: until it fits, or until that
    input (a damaged picture) is alone and fails alone. A batch of which an earlier run has answered
    a part is asked again as a whole, for the sake of its other rows; what has been recorded stays.

    Args:
        blocks: this process's share of what `plan_batches` gives.
        answer: the model under one method.
        recorder: where the answers go.
        done: answers of an earlier run; those given here are added.
        advance: told the number of requests done, after every batch that was asked.
        seed: of the evaluation.
        draws: numbers of the sampling seeds; one None: greedy.
    """
    for draw in draws:
        for batch in (batch for block in blocks for batch in block):
            if not (waiting := _waiting(batch, done, draw)):
                continue
            # Greedy, one seed for all batches: a method's noise depends on no batch then.
            task = batch.groups[0].samples[0].task
            noise = seed if draw is None else noise_seed(seed, draw, task, batch.number)
            began = time.perf_counter()
            replies, halvings = _answer_groups(batch.groups, answer, noise, done, draw)
            seconds = time.perf_counter() - began
            for sample, group in waiting:
                prefix, reply = replies[id(group)]
                recorder.write(sample, reply, seconds, draw, prefix, batch.number, halvings)
                done[draw, sample.sample_id] = reply
            advance(len(batch.groups))


def _answer_groups(
    groups: Sequence[Group], answer: Answerer, noise: int, done: Done, draw: int | None
) -> tuple[dict[int, tuple[str, Answer]], int]:
    """id(group) -> prefix and answer; and how often the batch was halved."""
    replies: dict[int, tuple[str, Answer]] = {}
    asked: list[tuple[Group, Request]] = []
    for group in groups:
        request = _request(group, done, draw)
        if isinstance(request, Request):
            asked.append((group, request))
        else:
            replies[id(group)] = "", Answer("", error=request)
    answers, halvings = _answer([request for _, request in asked], answer, noise, draw)
    for (group, request), reply in zip(asked, answers, strict=True):
        replies[id(group)] = request.prefix, reply
    return replies, halvings


def _request(group: Group, done: Done, draw: int | None) -> Request | str:
    """What to ask; or why nothing can be asked."""
    sample = group.samples[0]
    if group.parent is None:
        return Request(sample, prefix=sample.prefix)
    above = _request(group.parent, done, draw)
    if isinstance(above, str):
        return above
    before = above.sample
    reply = done[draw, before.sample_id]
    if reply.error is not None:
        return f"the turn before it, {before.sample_id}, has no answer: {reply.error}"
    said = reply.text.partition(before.until)[0] if before.until else reply.text
    # Answers come back without the space that they began with.
    space = " " if above.prefix.strip() and said and not above.prefix[-1].isspace() else ""
    written = above.prefix + space + said
    if sample.grow:
        return Request(sample, above.turns, written + sample.prefix)
    turn = Turn(before.image, before.prompt, written)
    return Request(sample, (*above.turns, turn), sample.prefix)


def _answer(
    batch: Sequence[Request], answer: Answerer, noise: int, draw: int | None
) -> tuple[list[Answer], int]:
    if not batch:
        return [], 0
    try:
        answers = list(answer(batch, noise))
        if len(answers) != len(batch):
            raise RuntimeError(f"{len(answers)} answers came back for {len(batch)} samples")
        return answers, 0
    except Exception as error:
        # Whatever it was (an image, memory, a method), the other batches may be fine.
        if len(batch) == 1 or not (isinstance(error, BadInput) or _out_of_memory(error)):
            return [Answer("", error=f"{type(error).__name__}: {error}")] * len(batch), 0
    # Out here the error is gone, and with it the frames that held the batch's tensors. Only this
    # batch is halved: were the next ones, too, what they answer would depend on the one before.
    if (torch := sys.modules.get("torch")) is not None:
        torch.cuda.empty_cache()
    middle = (len(batch) + 1) // 2
    first, left = _answer(batch[:middle], answer, noise, draw)
    # Sampled, the halves must not draw the same numbers; greedy, a method's noise stays the same.
    other = noise if draw is None else (noise + middle) % 2**32
    second, right = _answer(batch[middle:], answer, other, draw)
    return first + second, 1 + left + right


def _out_of_memory(error: Exception) -> bool:
    """Whether the device or the machine had no room (torch is not imported to tell)."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))
    )
