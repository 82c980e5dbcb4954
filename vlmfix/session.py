"""One per wrapped model: what was hooked, what to restore, which methods run in which thread.

Only the frame is thread-local. State of a prompt lives with its KV cache (ledger.py), state of a
generate call with the call (call.py); nothing counts steps.
"""

from __future__ import annotations

import copy
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn

import torch
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vlmfix.attention import NAME, SLOT, Slot, in_python
from vlmfix.call import Call
from vlmfix.errors import BadInput, CompositionError, StateError, UnsupportedModel
from vlmfix.families import ModelInfo
from vlmfix.frame import (
    Frame,
    Stack,
    key_capacity,
    prompt_kinds,
    require_image,
    sliding_offsets,
)
from vlmfix.ledger import Ledger

__all__ = ["SESSION", "Session"]

SESSION = "_vlmfix_session"  # where a wrapped model keeps its Session


class Session:
    """Hooks of one wrapped model, and everything needed to take them out again."""

    def __init__(self, model: torch.nn.Module, info: ModelInfo, stack: Stack) -> None:
        self.model, self.info, self.default = model, info, stack
        self.local = threading.local()
        self.lock = threading.RLock()
        self.running = 0
        self.last: Call | None = None
        self._ledgers: weakref.WeakKeyDictionary[Any, Ledger] = weakref.WeakKeyDictionary()
        self._calls: weakref.WeakKeyDictionary[Ledger, Call] = weakref.WeakKeyDictionary()
        self._handles: list[Any] = []
        self._hooked_inputs: set[int] = set()
        self._configs: dict[int, Any] = {}
        self._generate: Any = None
        self._restore_implementation: Any = None

    # -- life cycle ---------------------------------------------------------------------------

    def attach(self) -> None:
        """Put the hooks in; on any failure everything is taken out again."""
        try:
            self._use_supported_attention()
            self._handles = [
                self.model.register_forward_pre_hook(self._before, with_kwargs=True),
                self.model.register_forward_hook(self._check, with_kwargs=True),
                self.model.register_forward_hook(self._after, always_call=True),
            ]
            self.reach(self.default)
            self._generate = self.model.__dict__.get("generate")
            self.model.__dict__["generate"] = self.generate
            self.model.__dict__[SESSION] = self
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Take everything out; the model is then bit for bit what it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for layer, config in self._configs.items():
            module: Any = self.info.attention[layer]
            module.config = config
            module.__dict__.pop(SLOT, None)
        self._configs.clear()
        self._hooked_inputs.clear()
        if SESSION in self.model.__dict__:
            del self.model.__dict__[SESSION], self.model.__dict__["generate"]
            if self._generate is not None:
                self.model.__dict__["generate"] = self._generate
        if self._restore_implementation is not None:
            self._restore_implementation()
            self._restore_implementation = None

    def reach(self, stack: Stack) -> None:
        """Hook the layers that a stack wants and that are not hooked yet."""
        with self.lock:
            for layer, methods in stack.by_layer.items():
                if layer not in self._configs:
                    self._hook_attention(layer)
                flags = any(method.overrides("flag_tokens") for method in methods)
                if flags and layer not in self._hooked_inputs:
                    self._hook_input(layer)

    def _hook_attention(self, layer: int) -> None:
        module: Any = self.info.attention[layer]
        self._configs[layer] = module.config
        module.__dict__[SLOT] = Slot(self, layer, _base_attention(module))
        # The model object keeps its own configuration, so it goes on making its native masks.
        override = copy.copy(module.config)
        override._attn_implementation_internal = NAME
        module.config = override

    def _hook_input(self, layer: int) -> None:
        handle = self.info.layers[layer].register_forward_pre_hook(
            partial(self._flag, layer), with_kwargs=True
        )
        self._handles.append(handle)
        self._hooked_inputs.add(layer)

    def _use_supported_attention(self) -> None:
        """Switch a flash or flex decoder to SDPA while wrapped: its masks would not fit here."""
        model: Any = self.model
        text = model.config.get_text_config(decoder=True)
        if text._attn_implementation in ("sdpa", "eager", None):
            return
        before = text._attn_implementation
        key = next(k for k in model.config.sub_configs if getattr(model.config, k, None) is text)
        warnings.warn(
            f"the decoder runs {before!r} attention, whose masks vlmfix cannot read; it runs SDPA "
            "until vlmfix.unwrap(model).",
            stacklevel=4,
        )
        model.set_attn_implementation({key: "sdpa"})
        self._restore_implementation = lambda: model.set_attn_implementation({key: before})

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise StateError(
            "a wrapped model cannot be copied or pickled: its hooks belong to the original. "
            "Call vlmfix.unwrap(model) first, copy, then wrap each."
        )

    def __reduce__(self) -> NoReturn:
        self.__deepcopy__({})

    # -- which stack, which frame -------------------------------------------------------------

    @property
    def frame(self) -> Frame | None:
        """The frame of the forward that this thread is in."""
        return getattr(self.local, "frame", None)

    @property
    def stack(self) -> Stack:
        """The stack of this thread: the innermost `using`, else what was wrapped."""
        stacks: list[Stack] = getattr(self.local, "stacks", [])
        return stacks[-1] if stacks else self.default

    @contextmanager
    def use(self, stack: Stack) -> Iterator[None]:
        """Run another stack in this thread."""
        self.reach(stack)
        if not hasattr(self.local, "stacks"):
            self.local.stacks = []
        self.local.stacks.append(stack)
        try:
            yield
        finally:
            self.local.stacks.pop()

    def last_call(self) -> Call | None:
        """The last call of this thread, or of any thread if this one made none."""
        own: Call | None = getattr(self.local, "last", None)
        return own or self.last

    # -- generate -----------------------------------------------------------------------------

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own generate(), which knows here where the prompt ends."""
        inner = self._generate or type(self.model).generate.__get__(self.model)  # type: ignore[attr-defined]
        with self.lock:
            self.running += 1
        try:
            return self._generate_with_methods(inner, args, kwargs)
        finally:
            with self.lock:
                self.running -= 1

    def _generate_with_methods(self, inner: Any, args: Any, kwargs: Any) -> Any:
        stack = self.stack
        if not stack.methods:
            return inner(*args, **kwargs)
        ids = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
        if ids is None:
            raise BadInput(
                "generate() got no input_ids, so vlmfix cannot see where the image is. Pass the "
                "token ids of the prompt (inputs_embeds alone do not say it), or run the plain "
                "model with vlmfix.using(model, None)."
            )
        call = Call(methods=stack.specs(), prompt_length=ids.shape[1])
        outer = getattr(self.local, "call", None)
        self.local.call = call
        try:
            output = inner(*args, **kwargs)
        finally:
            self.local.call = outer
        call.finish(output)
        self.last = self.local.last = call
        return output

    # -- forward ------------------------------------------------------------------------------

    @in_python
    def _before(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        prompt_length = kwargs.pop("prompt_length", None)
        stack = self.stack
        if not stack.methods:
            self.local.frame = None
            return args, kwargs
        if kwargs.get("cache") is not None:
            raise CompositionError(
                "continuous batching (generate_batch) mixes rows of many prompts in one batch, "
                "which no method supports. Use generate(), or vlmfix.using(model, None)."
            )
        ids = kwargs.get("input_ids", args[0] if args else None)
        cache = kwargs.get("past_key_values")
        if isinstance(cache, EncoderDecoderCache):
            cache = cache.self_attention_cache
        if not isinstance(cache, Cache):
            cache = None
        if ids is None:
            raise BadInput(
                "the forward got no input_ids, so vlmfix cannot see where the image is. Pass "
                "input_ids, or run the plain model with vlmfix.using(model, None)."
            )
        self.local.frame = self._frame(stack, ids, cache, prompt_length, kwargs)
        return args, kwargs

    def _frame(
        self,
        stack: Stack,
        ids: torch.Tensor,
        cache: Cache | None,
        prompt_length: int | None,
        kwargs: dict[str, Any],
    ) -> Frame:
        batch, queries = ids.shape
        past = int(cache.get_seq_length()) if cache is not None else 0
        ledger = self._ledgers.get(cache) if cache is not None else None
        call: Call | None = getattr(self.local, "call", None)
        if ledger is None or past == 0:
            if past:
                raise StateError(
                    f"this KV cache holds {past} positions that no method has seen. Start from "
                    "the prompt with an empty cache, or prefill the cache under the same methods."
                )
            ledger = Ledger(batch, past + queries, ids.device)
            if cache is not None:
                self._ledgers[cache] = ledger
        if call is None:  # a bare forward: what it gets is prompt, unless somebody said otherwise
            call = self._calls.get(ledger) or Call(methods=stack.specs())
            self._calls[ledger] = call
            self.last = self.local.last = call
            call.prompt_length = prompt_length or ledger.prompt_length or queries
        prompt_length = call.prompt_length or queries
        call.passes += 1
        call.batch = max(call.batch, batch)
        if past < prompt_length:
            kinds = prompt_kinds(self.info, ids, past, kwargs)
            if past == 0 and queries >= prompt_length:
                require_image(self.info, kinds, kwargs)
            ledger.write(past, kinds, prompt_length)
        ledger.reserve(max(past + queries, key_capacity(cache)))
        offsets = sliding_offsets(cache, queries)
        return Frame(stack, call, ledger, past, queries, offsets)

    @in_python
    def _flag(
        self, layer: int, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """At a layer's input: let methods note prompt tokens."""
        frame = self.frame
        if frame is None or frame.decoding:
            return
        hidden = args[0] if args else kwargs["hidden_states"]
        for method in frame.stack.by_layer.get(layer, ()):
            if method.overrides("flag_tokens"):
                frame.ledger.flag(method, layer, frame.past, method.flag_tokens(hidden))

    @in_python
    def _check(
        self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any], output: Any
    ) -> None:
        """After the first forward of a prompt: every planned layer must have come by."""
        frame = self.frame
        if frame is None or frame.past:
            return
        missing = sorted(set(frame.stack.by_layer) - frame.reached)
        if missing:
            raise UnsupportedModel(
                f"the attention of decoder layers {missing} of {type(self.model).__name__} never "
                "reached vlmfix: they do not use transformers' attention interface. Nothing was "
                "edited; run the plain model with vlmfix.unwrap(model)."
            )

    @in_python
    def _after(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        # The frame holds the cache's ledger: leaving it would keep the last prompt alive.
        self.local.frame = None


def _base_attention(module: Any) -> Any:
    """The attention function that the module used before it was hooked."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager)
