"""One arm of `vlmfix bench`: the plain model, or a copy that shares its weights, with methods.

Every turn writes the same tokens, so that all arms see the same keys.
"""

from __future__ import annotations

import copy
import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch.nn.functional import pad
from transformers import CompileConfig, LogitsProcessor
from transformers.cache_utils import Cache
from transformers.generation.streamers import BaseStreamer

import vlmfix
from vlmfix.base.attention import AttentionMethod, Keys, Plan
from vlmfix.base.method import Method
from vlmfix.bench.models import Subject
from vlmfix.families import ModelInfo, describe_model, last_logits
from vlmfix.families.tower import describe_tower

__all__ = ["MINIMUM_TOKENS", "Arm", "Check", "Decoding", "Memory", "Turn", "TwoProducts"]

_CHECKED = 3  # tokens of the check: one from the prompt, two from decode steps
MINIMUM_TOKENS = _CHECKED + 1
_PROFILED = 8  # tokens of the turn whose memory is measured: a profiler makes them slow
_TOKEN = 5  # the token that every turn writes; no placeholder and no end in any of the models

#: Largest relative error of the logits of an arm against the reference. Measured on a CPU, for a
#: random 330 M LLaVA: 1e-6 in float32; in bfloat16 0.013 for the plain model, whose logits with and
#: without a cache differ as well, and up to 0.03 where a contrast weighs the rounding of branches.
_TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}


@dataclass(frozen=True)
class Decoding:
    """How generate() runs, the same in every arm.

    Attributes:
        new_tokens: tokens per turn, at least `MINIMUM_TOKENS`.
        cache: "dynamic" or "static".
        compile: backend of torch.compile for decode steps; None: no compilation.
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
    """Seconds of one generate().

    Attributes:
        first_token: from the call to the first new token.
        step: of a decode step.
        prefill: within the language model's layers before the first token: the prompt, and the
            probe passes of a method. Choosing visual tokens is not in it.
        tower: within the vision tower.
    """

    first_token: float
    step: float
    prefill: float
    tower: float


class Memory(NamedTuple):
    """Bytes of a short turn, not compiled: its peak above the memory used before, its KV cache."""

    peak: int
    cache: int


@dataclass(frozen=True)
class Check:
    """The results of an arm's turns before the timed ones.

    Attributes:
        memory: memory of a short turn.
        streams: rows that a pass runs per row of the batch, branches included.
        edited_rows: rows of attention or of logits that the methods changed, per decode step.
        visual_tokens: visual tokens that the language model got, of all rows; None: all of them.
        reference: (B, _CHECKED, V) float32, its logits without a cache, minus the mean of each row.
        refusal: why the speed of this arm means nothing; None if its logits are right.
    """

    memory: Memory
    streams: int
    edited_rows: float
    visual_tokens: int | None
    reference: torch.Tensor
    refusal: str | None


@dataclass(frozen=True)
class TwoProducts(AttentionMethod):
    """A control that edits nothing, and so gets each decoded row from two matrix products.

    Edited rows and the branches of a contrastive method are computed that way, while the plain
    model runs torch's own attention. A method's cost over this arm is its own.
    """

    name: ClassVar[str] = "two products"

    def layers(self, info: ModelInfo) -> Sequence[int]:
        return tuple(info.attention)

    def plan(self, keys: Keys) -> Plan:
        return Plan({}, [True] * len(keys.kinds))

    def edit_weights(
        self, weights: torch.Tensor, **plan: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return weights, torch.zeros_like(weights[..., 0], dtype=torch.bool)


class Arm:
    """A model that is ready to be timed.

    Attributes:
        name: "plain", "two products", or the specs as given.
        model: the subject's own model if there are no methods, else a wrapped copy.
        spec: the specs as they ran.
        is_control: whether it is the arm of `TwoProducts`.
        edits: whether it has methods other than that.
        warm: whether timed turns can start right after the check.
    """

    def __init__(
        self, name: str, subject: Subject, methods: Sequence[Method], decoding: Decoding
    ) -> None:
        self.name, self.inputs, self.dtype = name, subject.inputs, subject.dtype
        self.device, self.decoding, self.methods = subject.device, decoding, tuple(methods)
        self.is_control = self.methods == (TwoProducts(),)
        self.edits = bool(methods) and not self.is_control
        # A static cache of another length compiles again, and a GPU's allocator has to grow.
        self.warm = decoding.compile is None and self.device == "cpu"
        self.spec = "+".join(method.spec() for method in methods)
        self.model = subject.model
        if methods:
            # Wrapping for each turn would make torch.compile start over, and a wrapped model under
            # `suspended` still runs the hooks.
            self.model = vlmfix.wrap(_twin(subject.model), list(methods))
        self._tower = describe_tower(self.model, describe_model(self.model)).module

    def turn(self) -> Turn:
        """Time one generate()."""
        prefill = Stopwatch(self.model.get_decoder(), self.device)
        tower = Stopwatch(self._tower, self.device)

        def stop() -> None:  # decode steps may be compiled, which these hooks would prevent
            prefill.stop()
            tower.stop()

        clock = Clock(stop)
        try:
            start = time.perf_counter()
            self._generate(self.decoding.new_tokens, self.decoding.arguments(), streamer=clock)
        finally:
            stop()
        # times[0] is the prompt, times[1] the token that prefill gave.
        first, last, steps = clock.times[1], clock.times[-1], len(clock.times) - 2
        return Turn(first - start, (last - first) / steps, prefill.seconds, tower.seconds)

    def check(self, plain: torch.Tensor | None) -> Check:
        """Run the turns that are not timed, and check the arm's work.

        The logits of its decode steps must be close to those that it has without a cache: within a
        tolerance by dtype, and at least twice as close as the plain model's, so that an arm that
        does nothing fails. The mean of each row is subtracted first, because a constant added to
        all logits changes nothing, and methods that combine log-probabilities add a large one.

        Args:
            plain: `Check.reference` of the plain model; None for an arm that edits nothing.
        """
        memory, rows = self._memory(), self._rows()
        reference = self._reference()
        output = self._generate(_CHECKED, self.decoding.arguments(), output_logits=True)
        edited = (rows - self._rows()) / (self._profiled - _CHECKED)
        logits, expected = _centred(torch.stack(output.logits, dim=1))[:, 1:], reference[:, 1:]
        norm, tolerance = expected.norm(), _TOLERANCES[self.dtype]
        error = float((logits - expected).norm() / norm)
        change = math.inf if plain is None else float((plain[:, 1:] - expected).norm() / norm)
        refusal = None
        kept = self._kept()
        if plain is not None and edited <= 0 and kept is None:
            refusal = "it edited no row while decoding, and dropped no visual token"
        elif not (error <= tolerance and error <= change / 2):
            refusal = (
                f"its logits differ from those without a cache by {error:.2g} of their norm; "
                f"allowed are {tolerance:g} and half of what the method changes, which is "
                f"{change:.2g}"
            )
        streams = vlmfix.last_call(self.model).streams if self.methods else 1
        return Check(memory, streams, edited, kept, reference, refusal)

    def _reference(self) -> torch.Tensor:
        """The logits (B, _CHECKED, V) that choose the first tokens, without a cache.

        One forward over the prompt and the tokens that every turn writes: without a decode step,
        a kernel or a graph; edited rows replace those of the model's own attention.
        """
        inputs = dict(self.inputs)
        length, more = inputs["input_ids"].shape[1], (0, _CHECKED - 1)
        inputs["input_ids"] = pad(inputs["input_ids"], more, value=_TOKEN)
        inputs["attention_mask"] = pad(inputs["attention_mask"], more, value=1)
        if "mm_token_type_ids" in inputs:
            inputs["mm_token_type_ids"] = pad(inputs["mm_token_type_ids"], more, value=0)
        if self.methods:
            inputs["prompt_length"] = length
        with torch.no_grad():
            output = self.model(**inputs, use_cache=False, **last_logits(self.model, _CHECKED))
        return _centred(output.logits[:, -_CHECKED:])

    def _rows(self) -> int:
        """Rows of attention or of logits that the last turn changed, its prompt included."""
        if not self.methods:
            return 0
        report = vlmfix.last_call(self.model)
        return report.edited_rows + report.contrasted_rows

    def _kept(self) -> int | None:
        """Visual tokens of all rows that the last turn kept; None if it dropped none."""
        sizes = vlmfix.last_call(self.model).visual_tokens if self.methods else ()
        kept, count = (sum(column) for column in zip(*sizes, strict=True)) if sizes else (0, 0)
        return kept if kept < count else None

    @property
    def _profiled(self) -> int:
        return min(_PROFILED, self.decoding.new_tokens)

    def _memory(self) -> Memory:
        """Measure one short generate(), decode steps not compiled.

        On CUDA it is the memory that the caching allocator handed out. On a CPU it is that of
        torch's tensors in a profile; scratch memory inside a library call is not in it.
        """
        tokens, arguments = self._profiled, self.decoding.arguments(compiled=False)
        gc.collect()  # garbage of other arms must not be freed in between
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
    """Allows one token, which is not the end."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores (B, V) -> scores with one finite value per row."""
        chosen = torch.full_like(scores, -torch.inf)
        chosen[:, _TOKEN] = 0
        return chosen


class Clock(BaseStreamer):  # type: ignore[misc]  # transformers is untyped
    """Records the time of each new token; receiving it waits for the device.

    Args:
        at_first: called at the first new token.
    """

    def __init__(self, at_first: Callable[[], None]) -> None:
        self.times: list[float] = []
        self._at_first = at_first

    def put(self, value: torch.Tensor) -> None:
        """Record a time, for the prompt and then for each step's tokens."""
        self.times.append(time.perf_counter())
        if len(self.times) == 2:
            self._at_first()

    def end(self) -> None:
        """Do nothing at the end of the answer."""


class Stopwatch:
    """Adds up the seconds within a module, until it is stopped.

    Args:
        module: the module to time, including forwards that an exception ends.
        device: a GPU is synchronised at both ends of a forward.
    """

    def __init__(self, module: torch.nn.Module, device: str) -> None:
        self.seconds, self._device, self._began = 0.0, device, 0.0
        self._hooks = (
            module.register_forward_pre_hook(self._start),
            module.register_forward_hook(self._end, always_call=True),
        )

    def stop(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    def _start(self, *_: Any) -> None:
        self._began = self._now()

    def _end(self, *_: Any) -> None:
        self.seconds += self._now() - self._began

    def _now(self) -> float:
        if self._device.startswith("cuda"):
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def _centred(logits: torch.Tensor) -> torch.Tensor:
    """Logits (..., V) minus their mean over V, in float32."""
    logits = logits.float()
    return logits - logits.mean(-1, keepdim=True)


def _twin(model: Any) -> Any:
    """A copy of a model that shares its weights."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared)
    # A forward that transformers compiled for the original would run the original.
    twin.__dict__.pop("_compiled_call", None)
    return twin


def _peak(profile: torch.profiler.profile) -> int:
    """The most bytes of CPU tensors alive at once, above those from before the profile."""
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
