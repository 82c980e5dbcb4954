"""One arm of `vlmfix bench`: the plain model, or a copy that shares its weights, with methods.

Every turn writes the same tokens, so that all arms see the same keys.
"""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import CompileConfig, LogitsProcessor
from transformers.cache_utils import Cache
from transformers.generation.streamers import BaseStreamer

import vlmfix
from vlmfix.bench_models import Subject
from vlmfix.method import Method

__all__ = ["CHECKED", "MINIMUM_TOKENS", "Arm", "Decoding", "Memory", "Turn"]

CHECKED = 3  # tokens of the check: one from the prompt, two from decode steps
MINIMUM_TOKENS = CHECKED + 1
_TOKEN = 5  # what every turn writes; no placeholder and no end in any of the models

#: Largest relative error of the logits of an arm against the reference. Seen on a CPU, for a
#: random 330 M LLaVA: 1e-6 in float32 and 0.014 in bfloat16, where the plain model with and
#: without a cache differs as much.
_TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}


@dataclass(frozen=True)
class Decoding:
    """How generate() runs, the same in every arm.

    Attributes:
        new_tokens: tokens per turn, at least `MINIMUM_TOKENS`.
        cache: "dynamic" or "static".
        compile: backend of torch.compile for decode steps; None: they are not compiled.
    """

    new_tokens: int
    cache: str = "dynamic"
    compile: str | None = None

    def arguments(self, compiled: bool = True) -> dict[str, Any]:
        """The arguments of generate() that choose the cache, and whether steps are compiled."""
        if self.cache == "dynamic":
            return {}
        static: dict[str, Any] = {"cache_implementation": "static"}
        if self.compile is None or not compiled:
            return {**static, "disable_compile": True}
        if self.compile == "inductor":
            config = CompileConfig()
        else:  # modes are inductor's
            config = CompileConfig(backend=self.compile, mode=None)
        config._compile_all_devices = True  # transformers compiles on accelerators only
        return {**static, "compile_config": config}


class Turn(NamedTuple):
    """Seconds from the call of generate() to the first new token, and per decode step."""

    first_token: float
    step: float


class Memory(NamedTuple):
    """Bytes of a turn without compiling: the peak above what was there, and its KV cache."""

    peak: int
    cache: int


class Arm:
    """A model that is ready to be timed.

    Attributes:
        name: "plain", or the specs as they were given.
        model: the subject's own model if there are no methods, else a wrapped copy.
        spec: the specs as they ran.
    """

    def __init__(
        self, name: str, subject: Subject, methods: Sequence[Method], decoding: Decoding
    ) -> None:
        self.name, self.inputs, self.dtype = name, subject.inputs, subject.dtype
        self.device, self.decoding = subject.device, decoding
        self.spec = "+".join(method.spec() for method in methods)
        self.model = subject.model
        if methods:
            # Wrapping for each turn would make torch.compile start anew, and a wrapped model that
            # is plain for a while still runs the hooks.
            self.model = vlmfix.wrap(_twin(subject.model), list(methods))

    def turn(self) -> Turn:
        """Time one generate()."""
        clock = Clock()
        start = time.perf_counter()
        self._generate(self.decoding.new_tokens, self.decoding.arguments(), streamer=clock)
        # times[0] is the prompt, times[1] the token that prefill gave.
        first, last, steps = clock.times[1], clock.times[-1], len(clock.times) - 2
        return Turn(first - start, (last - first) / steps)

    def memory(self) -> Memory:
        """Measure one generate(), decode steps not compiled.

        On CUDA it is what the caching allocator handed out. On a CPU it is what the profiler saw
        of torch's tensors; scratch memory inside a library call is not in it.
        """
        tokens, arguments = self.decoding.new_tokens, self.decoding.arguments(compiled=False)
        gc.collect()  # what others left behind must not go away meanwhile
        if self.device.startswith("cuda"):
            before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            output = self._generate(tokens, arguments)
            peak = torch.cuda.max_memory_allocated(self.device) - before
        else:
            with torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
            ) as profile:
                output = self._generate(tokens, arguments)
            peak = _peak(profile)
        return Memory(peak, _cache_bytes(output.past_key_values))

    def edited_rows(self) -> int:
        """Rows of attention or of logits that the last turn changed, its prompt included."""
        report = vlmfix.last_call(self.model)
        return report.edited_rows + report.contrasted_rows

    def logits(self) -> torch.Tensor:
        """Float32 logits (B, CHECKED, V) of generate(), as it is timed."""
        output = self._generate(CHECKED, self.decoding.arguments(), output_logits=True)
        return torch.stack(output.logits, dim=1).float()

    def reference_logits(self) -> torch.Tensor:
        """The same logits without a cache: no decode step, no kernel, no graph.

        Then every forward is a prefill, whose edited rows come after the model's own attention.
        """
        output = self._generate(CHECKED, {"use_cache": False}, output_logits=True)
        return torch.stack(output.logits, dim=1).float()

    def disagreement(self, plain: torch.Tensor) -> str | None:
        """Why the speed of this arm means nothing; None if it computes what it should.

        The logits of its decode steps must lie within a tolerance by dtype of the reference, and
        at least twice as near to it as those of the plain model (`plain`, from
        `reference_logits`), which the same error would otherwise let pass.
        """
        reference = self.reference_logits()[:, 1:]
        norm = reference.norm()
        error = float((self.logits()[:, 1:] - reference).norm() / norm)
        change = float((plain[:, 1:] - reference).norm() / norm)
        tolerance = _TOLERANCES[self.dtype]
        if error <= tolerance and error <= change / 2:
            return None
        return (
            f"its logits differ from those without a cache by {error:.2g} of their norm; allowed "
            f"are {tolerance:g} and half of what the method changes, which is {change:.2g}"
        )

    def _generate(self, tokens: int, arguments: dict[str, Any], **more: Any) -> Any:
        output = self.model.generate(
            **self.inputs,
            **arguments,
            **more,
            do_sample=False,
            max_new_tokens=tokens,
            pad_token_id=0,
            logits_processor=[SameToken()],
            return_dict_in_generate=True,
        )
        made = output.sequences.shape[1] - self.inputs["input_ids"].shape[1]
        if made != tokens:
            raise RuntimeError(f"{made} new tokens came instead of {tokens}")
        return output


class SameToken(LogitsProcessor):  # type: ignore[misc]  # transformers is untyped
    """Lets one token through, and never the end."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores (B, V) -> scores of which only one is finite."""
        chosen = torch.full_like(scores, -torch.inf)
        chosen[:, _TOKEN] = 0
        return chosen


class Clock(BaseStreamer):  # type: ignore[misc]  # transformers is untyped
    """Notes when each new token is there; handing it over waits for the device."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Called with the prompt, then with each step's tokens."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to do."""


def _twin(model: Any) -> Any:
    """A copy of a model that shares its weights."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def _peak(profile: torch.profiler.profile) -> int:
    """Most bytes of CPU tensors alive at once, above those from before the profile."""
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    results: Any = profile.profiler.kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def _cache_bytes(cache: Cache) -> int:
    return sum(
        tensor.numel() * tensor.element_size()
        for layer in cache.layers
        for tensor in (layer.keys, layer.values)
    )
