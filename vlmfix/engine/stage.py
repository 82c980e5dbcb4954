"""What runs one kind of method: the points at which a stage takes part, and what it gets there.

The session runs the stages of a stack in their order, and in reverse where a forward or a call is
over; it knows none of them by name. A stage implements the points that it needs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Protocol

import torch
from transformers.cache_utils import Cache, EncoderDecoderCache

from vlmfix.base.method import Method
from vlmfix.engine.call import Call
from vlmfix.engine.frame import Frame
from vlmfix.engine.hooks import Host
from vlmfix.engine.ledger import Ledger
from vlmfix.engine.state import Implementation
from vlmfix.families import ModelInfo
from vlmfix.families.inner import generating_module

__all__ = ["DecodeStep", "Forward", "Generation", "Stage", "decoder_cache"]


@dataclass
class Generation:
    """One generate() call that is about to start, or is over.

    Attributes:
        host: the wrapped model.
        call: its record.
        ids: (rows, L) token ids of the prompts, as the user gave them.
        given: the arguments as the user gave them, by name.
        kwargs: the arguments that the model's generate() will get; a stage may change them.
    """

    host: Host
    call: Call
    ids: torch.Tensor
    given: Mapping[str, Any]
    kwargs: dict[str, Any]

    def option(self, name: str) -> Any:
        """What generate() makes of an option: the argument, the configuration's, the model's."""
        own = generating_module(self.host.model).generation_config
        configs = (self.given.get("generation_config"), own)
        values = (self.given.get(name), *(getattr(config, name, None) for config in configs))
        return next((value for value in values if value is not None), None)


class CachesLike(Protocol):
    """What a forward asks of `caches.Caches`."""

    def ledger(self, cache: Cache | None) -> Ledger | None:
        """What is known of a cache."""

    def frame(self, forward: Forward) -> Frame:
        """The frame of a forward."""


@dataclass
class Forward:
    """One forward of the model that is about to start, or is over.

    Attributes:
        host: the wrapped model.
        given: the arguments as they came, by name.
        kwargs: the arguments that the forward will get; a stage may change them.
        prompt_length: where the answer begins, if a bare forward was told.
        call: the generate() call, or the internal pass, that it belongs to; None: a bare forward.
        methods: the stack, as specs.
        stages: their names.
        caches: what is known of KV caches.
    """

    host: Host
    given: Mapping[str, Any]
    kwargs: dict[str, Any]
    prompt_length: int | None
    call: Call | None
    methods: tuple[str, ...]
    stages: Collection[str]
    caches: CachesLike

    @cached_property
    def frame(self) -> Frame:
        """The frame, made from the arguments as they are when the first stage asks for it."""
        return self.caches.frame(self)

    @property
    def cache(self) -> Cache | None:
        """The KV cache of the decoder, if there is one."""
        return decoder_cache(self.kwargs)


def decoder_cache(kwargs: Mapping[str, Any]) -> Cache | None:
    """The KV cache of the decoder among the arguments of a forward, if there is one."""
    cache = kwargs.get("past_key_values")
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    return cache if isinstance(cache, Cache) else None


@dataclass
class DecodeStep:
    """One decode step that runs as a compiled graph.

    Attributes:
        host: the wrapped model.
        frame: of the step.
        cache: its KV cache, of fixed length.
        kwargs: the arguments that the graph will get; a stage may change them.
        prepared: {key of a stage: what its hooks run inside the graph}, see `State.prepared`.
    """

    host: Host
    frame: Frame
    cache: Any
    kwargs: dict[str, Any]
    prepared: dict[Any, Any]


class Stage:
    """Runs the methods of one kind. A stage object belongs to one stack; it has no other state."""

    #: How error messages and memories name the stage.
    name: ClassVar[str]

    @classmethod
    def of(cls, methods: Sequence[Method], info: ModelInfo) -> Stage | None:
        """The stage for its share of the methods that are not neutral; None if it has none."""
        raise NotImplementedError

    @classmethod
    def check(cls, methods: Sequence[Method], info: ModelInfo, impl: Implementation) -> None:
        """Refuse a stack that this stage cannot run.

        Raises:
            CompositionError: methods that exclude each other, or one that `impl` cannot run.
        """

    def examine(self, model: torch.nn.Module, info: ModelInfo) -> None:
        """Refuse a model on which no call of this stage could run. Changes and runs nothing.

        `wrap`, `using` and `doctor` ask here, so that a user learns of it before any prompt.

        Raises:
            UnsupportedModel: what of the model stands in the way.
        """

    @property
    def reads_question(self) -> bool:
        """Whether a method wants to know which tokens are the user's question."""
        return False

    def reach(self, host: Host) -> None:
        """Hook what the stage needs of the model.

        Raises:
            UnsupportedModel: it cannot be reached.
        """

    def before_chats(
        self, host: Host, processor: Any, chats: Sequence[Any]
    ) -> tuple[Sequence[Any], Any]:
        """Change the chats that vlmfix.generate was given, and say what was found (or None)."""
        return chats, None

    def before_generate(self, generation: Generation) -> None:
        """Prepare a call, or change its arguments."""

    def check_cache(self, cache: Cache) -> None:
        """Refuse a cache that the stage cannot go on with behind a prompt.

        Raises:
            CompositionError: its layers hold keys in a form that the stage cannot change.
        """

    def before_forward(self, forward: Forward) -> None:
        """Prepare a forward, or change its arguments."""

    def enter_layer(
        self, frame: Frame, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """See, or change, the arguments of a decoder layer whose input the stage has reached."""
        return args, kwargs

    def after_forward(self, forward: Forward, output: Any) -> Any:
        """See, or change, what a forward returns."""
        return output

    def after_generate(self, generation: Generation, output: Any) -> Any:
        """See, or change, what generate() returns."""
        return output

    def before_step(self, step: DecodeStep) -> None:
        """Prepare a compiled decode step, which skips all points of a forward."""

    def after_step(self, step: DecodeStep, output: Any) -> Any:
        """See, or change, what a compiled decode step returns."""
        return output
