"""One per wrapped model: runs the stages of this thread's stack around each forward and call.

State of a prompt lives with its KV cache (ledger.py), state of a generate call with the call
(call.py), state of a forward with its frame; nothing counts steps.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, NoReturn

import torch
from transformers import GenerationMixin
from transformers.cache_utils import Cache

from vlmfix.engine.caches import Caches
from vlmfix.engine.call import Call
from vlmfix.engine.counters import collect
from vlmfix.engine.dispatch import in_python
from vlmfix.engine.frame import Frame, sliding_offsets
from vlmfix.engine.hooks import Host
from vlmfix.engine.observe import Observers
from vlmfix.engine.stack import Stack
from vlmfix.engine.stage import DecodeStep, Forward, Generation
from vlmfix.engine.state import Implementation
from vlmfix.engine.using import Blocks
from vlmfix.errors import BadInput, CompositionError, StateError, UnsupportedModel
from vlmfix.families import ModelInfo
from vlmfix.families.inner import generating_module
from vlmfix.families.prompt import every_row
from vlmfix.families.question import find_question

__all__ = ["SESSION", "Session"]

SESSION = "_vlmfix_session"  # where a wrapped model keeps its Session

_GENERATE = inspect.unwrap(GenerationMixin.generate).__code__


class Session:
    """The stacks that run on one wrapped model, and the ledgers of its KV caches.

    Attributes:
        host: the model with the hooks in it.
        default: the stack that the model was wrapped with.
        caches: what is known of the KV caches that it filled.
        running: generate() calls that are running now, in all threads.
    """

    def __init__(
        self, model: torch.nn.Module, info: ModelInfo, stack: Stack, impl: Implementation
    ) -> None:
        self.host, self.default = Host(model, info, impl), stack
        self.running = 0
        self._state = self.host.state
        self.caches, self._blocks = Caches(self.host), Blocks()

    # -- life cycle ---------------------------------------------------------------------------

    def attach(self) -> None:
        """Put the hooks in; on any failure everything is taken out again."""
        host = self.host
        try:
            host.attach(
                self,
                {
                    "generate": self.generate,
                    "get_compiled_call": self.get_compiled_call,
                    "prepare_inputs_for_generation": self.prepare_inputs_for_generation,
                },
            )
            self.reach(self.default)
            host.model.__dict__[SESSION] = self
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Take everything out; the model is then bit for bit what it was."""
        self.host.detach()
        self.host.model.__dict__.pop(SESSION, None)

    def reach(self, stack: Stack) -> None:
        """Hook what the stages of a stack need."""
        with self.host.lock:
            for stage in stack.stages:
                stage.reach(self.host)

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise StateError(
            "a wrapped model cannot be copied or pickled: its hooks belong to the original. "
            "Call vlmfix.unwrap(model) first, copy, then wrap each."
        )

    def __reduce__(self) -> NoReturn:
        self.__deepcopy__({})

    # -- which stack --------------------------------------------------------------------------

    @property
    def stack(self) -> Stack:
        """What runs here: an internal pass, else the innermost `using`, else what was wrapped."""
        return self._state.thread.get(Stack) or self._blocks.innermost() or self.default

    def use(self, stack: Stack) -> AbstractContextManager[None]:
        """Run another stack in this task, or thread without tasks."""
        self.reach(stack)
        return self._blocks.open(stack)

    def last_call(self) -> Call | None:
        """The last call of this task or thread, or of any if this one made none."""
        return self._state.last

    def before_chats(
        self, processor: Any, chats: Sequence[Any]
    ) -> tuple[Sequence[Any], AbstractContextManager[Any]]:
        """The chats as the stages change them, and the with-block in which to answer them."""
        block = ExitStack()
        for stage in self.stack.stages:
            chats, found = stage.before_chats(self.host, processor, chats)
            if found is not None:
                block.enter_context(self._state.thread.keeping(found))
        return chats, block

    # -- generate -----------------------------------------------------------------------------

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own generate(), which knows here where the prompt ends."""
        with self.host.lock:
            self.running += 1
        try:
            return self._generate(args, kwargs)
        finally:
            with self.host.lock:
                self.running -= 1

    def _generate(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        processor = kwargs.pop("processor", None)
        stack, state, own = self.stack, self._state, self.host.model_method("generate")
        if not stack.methods:
            return own(*args, **kwargs)
        kwargs.pop("labels", None)  # some processors add them; an answer has no loss
        names = inspect.signature(own).parameters
        named = {**dict(zip(names, args, strict=False)), **kwargs}
        ids = named.get("input_ids", named.pop("inputs", None))
        if ids is None:
            raise BadInput(
                "generate() got no input_ids, so vlmfix cannot see where the image is. Pass the "
                "token ids of the prompt (inputs_embeds alone do not say it), or run the plain "
                "model with vlmfix.using(model, None)."
            )
        named["input_ids"] = ids
        call = Call(stack.specs(), prompt_length=ids.shape[1], rows=ids.shape[0])
        generation = Generation(self.host, call, ids, named, named)
        self.host.take_images()  # those encoded before belong to another prompt
        asked = processor is not None and any(stage.reads_question for stage in stack.stages)
        if asked:
            call.question = find_question(processor, self.host.info, ids)
        for stage in stack.stages:
            stage.before_generate(generation)
        if generation.kwargs is not named:  # a stage changed them
            args, kwargs = (), generation.kwargs
            if asked:
                call.question = find_question(processor, self.host.info, kwargs["input_ids"])
        outer, state.call = state.call, call
        try:
            output = self.host.generate(*args, **kwargs)
        finally:
            state.call = outer
        call.finish(output)
        collect(call)
        state.last = call
        for stage in reversed(stack.stages):
            output = stage.after_generate(generation, output)
        return output

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own, which generate() calls before each of its forwards."""
        inputs = self.host.model_method("prepare_inputs_for_generation")(*args, **kwargs)
        call = self._state.call
        if call is not None:
            call.announce(inputs.get("input_ids"))
        elif self.stack.methods:
            _refuse_plain_generate(self.host.model)
        return inputs

    def get_compiled_call(self, *args: Any, **kwargs: Any) -> Any:
        """The model's compiled forward, with the Python part of a decode step before the graph.

        generate() compiles decode steps only. What such a step does is settled once the prompt is
        known: the stages prepare it as inputs of the graph, which then needs no Python of ours.
        Before that, or with a cache that we cannot follow, the hooks run as they do without
        compiling.
        """
        compiled = self.host.model_method("get_compiled_call")(*args, **kwargs)

        def run(*args: Any, **kwargs: Any) -> Any:
            stack, state = self.stack, self._state
            cache = kwargs.get("past_key_values")
            frame = self._step_frame(cache)
            if frame is None:
                state.prepared = None if stack.methods else {}
                try:
                    return compiled(*args, **kwargs)
                finally:
                    state.prepared = None
            step = DecodeStep(self.host, frame, cache, kwargs, {})
            for stage in stack.stages:
                stage.before_step(step)
            state.prepared = step.prepared
            try:
                output = compiled(*args, **step.kwargs)
            finally:
                state.prepared = None
            for stage in reversed(stack.stages):
                output = stage.after_step(step, output)
            return output

        return run

    def _step_frame(self, cache: Any) -> Frame | None:
        """The frame of a decode step over a cache; None if it is not known."""
        if not self.stack.methods or not isinstance(cache, Cache) or not cache.is_compileable:
            return None
        ledger, call = self.caches.ledger(cache), self._state.call
        if call is None or ledger is None or not ledger.whole:
            return None
        call.passes += 1
        ledger.length += 1
        # The number of past positions lives on the device; all that counts here is that the
        # prompt is behind us.
        return Frame(
            call,
            ledger,
            ledger.prompt_length,
            1,
            sliding_offsets(cache, 1, self.host.info.shared_keys),
        )

    # -- forward ------------------------------------------------------------------------------

    @property
    def wanted(self) -> bool:
        """Whether a forward of this thread runs with methods, or is looked at."""
        observers = self._state.thread.get(Observers)
        return bool(self.stack.methods) or (observers is not None and bool(observers.all))

    # Each hook is two functions: the outer one is all that a compiled step sees of it.

    def before(self, module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
        return None if self._state.prepared is not None else self._begin(args, kwargs)

    @in_python
    def _begin(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        state, stack = self._state, self.stack
        prompt_length = kwargs.pop("prompt_length", None)
        observers = state.thread.get(Observers) or Observers(())
        state.frame = None
        state.thread.forget(Forward)
        if args:  # everything here looks arguments up by name
            names = inspect.signature(self.host.model.forward).parameters
            args, kwargs = (), {**dict(zip(names, args, strict=False)), **kwargs}
        if not stack.methods and not observers.all:
            self.caches.pass_by(kwargs)
            return args, kwargs
        if self.host.model.training:
            raise StateError(
                "this model is in training mode; vlmfix works at inference only. Call model.eval() "
                "before it runs, or vlmfix.unwrap(model) before training."
            )
        if kwargs.get("cache") is not None:
            raise CompositionError(
                "continuous batching (generate_batch) mixes rows of many prompts in one batch, "
                "which no method supports. Use generate(), or vlmfix.using(model, None)."
            )
        if kwargs.get("input_ids") is None:
            raise BadInput(
                "the forward got no input_ids, so vlmfix cannot see where the image is. Pass "
                "input_ids, or run the plain model with vlmfix.using(model, None)."
            )
        call = state.call
        if call is not None and not call.runs(kwargs["input_ids"]):
            call = None
        forward = Forward(
            self.host, kwargs, kwargs, prompt_length, call, stack.specs(), stack.names, self.caches
        )
        for stage in stack.stages:
            stage.before_forward(forward)
        forward.frame.observe(observers.all)
        if forward.frame.observers:
            forward.kwargs = every_row(self.host.info, forward.kwargs)
        state.frame = forward.frame
        state.thread.keep(forward)
        return args, forward.kwargs

    def enter_decoder(self, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        if self._state.prepared is None:
            self._check_rows(args, kwargs)

    @in_python
    def _check_rows(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse a model whose decoder gets other positions than its input ids show."""
        frame = self._state.frame
        if frame is None and self.stack.methods:  # no forward of the model has led here
            _refuse_plain_generate(self.host.model)
        given = (kwargs.get("inputs_embeds"), kwargs.get("input_ids"), *args[:1])
        rows = next((x.shape[1] for x in given if x is not None), None)
        if frame is not None and rows not in (None, frame.queries):
            raise UnsupportedModel(
                f"the decoder of {type(self.host.model).__name__} gets {rows} positions in a "
                f"forward of {frame.queries} tokens: the model puts an image in the place of fewer "
                "placeholders, so vlmfix cannot see which position is which. Run the plain model "
                "with vlmfix.unwrap(model)."
            )

    def enter_layer(self, layer: int, module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
        return None if self._state.prepared is not None else self._enter(layer, args, kwargs)

    @in_python
    def _enter(self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        frame = self._state.frame
        if frame is None:
            return None
        for stage in self.stack.stages:
            args, kwargs = stage.enter_layer(frame, layer, args, kwargs)
        return args, kwargs

    def after(self, module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        return None if self._state.prepared is not None else self._conclude(output)

    @in_python
    def _conclude(self, output: Any) -> Any:
        """After a forward: every planned layer must have come by, then the stages finish."""
        forward = self._state.thread.get(Forward)
        if forward is None:
            return None
        frame, info = forward.frame, self.host.info
        missing = (frame.expected & set(info.attention)) - frame.reached
        if missing and not frame.past:
            raise UnsupportedModel(
                f"the attention of decoder layers {sorted(missing)} of "
                f"{type(self.host.model).__name__} never reached vlmfix: they do not use "
                "transformers' attention interface. Nothing was edited; run the plain model with "
                "vlmfix.unwrap(model)."
            )
        try:
            self.caches.follow(forward, output, self.stack)
            for stage in reversed(self.stack.stages):
                output = stage.after_forward(forward, output)
            self.caches.hold(forward)
        finally:  # torch runs no hook after an interrupt
            self._end()
        return output

    def end(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        if self._state.prepared is None:
            self._end()

    @in_python
    def _end(self) -> None:
        # The frame holds the cache's ledger: leaving it would keep the last prompt alive.
        self._state.frame = None
        self._state.thread.forget(Forward)


def _refuse_plain_generate(model: torch.nn.Module) -> None:
    """Refuse a generate() of this model that runs in this thread and is not the wrapped one.

    Raises:
        StateError: there is one.
    """
    frame, own = sys._getframe(1), (model, generating_module(model))
    while frame is not None:
        if frame.f_code is _GENERATE and frame.f_locals.get("self") in own:
            raise StateError(
                "this generate() was taken from the model before vlmfix.wrap, or from its class, "
                "so no method knows of it. Call model.generate(...) on the wrapped model."
            )
        frame = frame.f_back  # type: ignore[assignment]  # None ends the loop
