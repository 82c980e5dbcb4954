"""One per wrapped model: what was hooked, what to restore, which methods run in which thread.

Only the frame is thread-local. State of a prompt lives with its KV cache (ledger.py), state of a
generate call with the call (call.py); nothing counts steps.
"""

from __future__ import annotations

import copy
import inspect
import threading
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

import torch
from transformers import GenerationMixin
from transformers.cache_utils import Cache, EncoderDecoderCache

from vlmfix.base.contrast import Branch
from vlmfix.base.pruning import LayerTokenMethod, TokenMethod
from vlmfix.engine.attention import NAME, SLOT, Implementation, Slot, base_attention, in_python
from vlmfix.engine.call import Call
from vlmfix.engine.dropping import check_prompt, enter_layer, last_row_watcher
from vlmfix.engine.edits import Step
from vlmfix.engine.frame import Frame, Stack, key_capacity, sliding_offsets
from vlmfix.engine.ledger import Ledger
from vlmfix.engine.prelude import look_first, run_last_token
from vlmfix.engine.shortening import Shortened, put_back, shorten
from vlmfix.engine.streams import before_forward, combine, combine_decoded, replace_embeddings
from vlmfix.engine.tap import Tap
from vlmfix.errors import BadInput, CompositionError, StateError, UnsupportedModel
from vlmfix.families import ModelInfo, vision_arguments
from vlmfix.families.kinds import IMAGE, VIDEO
from vlmfix.families.prompt import prompt_kinds, require_image
from vlmfix.families.question import find_question
from vlmfix.families.tower import EncodedImage, Tower, describe_tower

__all__ = ["SESSION", "Session"]

SESSION = "_vlmfix_session"  # where a wrapped model keeps its Session

#: Arguments of a forward that hold images or videos not yet encoded.
_PIXELS = ("pixel_values", "pixel_values_videos")
#: Names of the arguments that generate() also takes by position.
_GENERATE_ARGUMENTS = tuple(inspect.signature(GenerationMixin.generate).parameters)[1:]


class Session:
    """Hooks of one wrapped model, and everything needed to take them out again."""

    def __init__(
        self, model: torch.nn.Module, info: ModelInfo, stack: Stack, impl: Implementation
    ) -> None:
        self.model, self.info, self.default, self.impl = model, info, stack, impl
        self.local = threading.local()
        self.lock = threading.RLock()
        self.running = 0
        self.last: Call | None = None
        self._ledgers: weakref.WeakKeyDictionary[Any, Ledger] = weakref.WeakKeyDictionary()
        self._calls: weakref.WeakKeyDictionary[Ledger, Call] = weakref.WeakKeyDictionary()
        self._handles: list[Any] = []
        self._hooked_inputs: set[int] = set()
        self._hooked_decoder = False
        self._configs: dict[int, Any] = {}
        self._tap: Tap | None = None
        self._shadowed: dict[str, Any] = {}
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
            self._shadow("generate", self.generate)
            self._shadow("get_compiled_call", self.get_compiled_call)
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
        self._hooked_decoder = False
        if self._tap is not None:
            self._tap.detach()
            self._tap = None
        for name, before in self._shadowed.items():
            del self.model.__dict__[name]
            if before is not None:
                self.model.__dict__[name] = before
        self._shadowed.clear()
        self.model.__dict__.pop(SESSION, None)
        if self._restore_implementation is not None:
            self._restore_implementation()
            self._restore_implementation = None

    def _shadow(self, name: str, function: Any) -> None:
        """Put our function over a method of the model, on this object only."""
        self._shadowed[name] = self.model.__dict__.get(name)
        self.model.__dict__[name] = function

    def _model_method(self, name: str) -> Any:
        """The method that we shadow: somebody's own on this object, else the class's."""
        method = getattr(type(self.model), name)
        return self._shadowed.get(name) or method.__get__(self.model)

    def reach(self, stack: Stack) -> None:
        """Hook the layers that a stack wants and that are not hooked yet."""
        with self.lock:
            for layer, methods in stack.by_layer.items():
                if layer not in self._configs:
                    self._hook_attention(layer)
                flags = any(method.overrides("flag_tokens") for method in methods)
                if flags and layer not in self._hooked_inputs:
                    self._hook_input(layer)
            if stack.drops is not None:
                for layer in range(stack.drops.first_layer(self.info), self.info.num_layers):
                    if layer not in self._hooked_inputs:
                        self._hook_input(layer)
            if stack.taps or stack.tokens is not None:
                self._tap_tower(stack)
            if stack.contrast is not None and not self._hooked_decoder:
                self._hook_decoder()

    def _tap_tower(self, stack: Stack) -> None:
        """Read the layers of the vision tower that a stack wants, beside those read already."""
        before, pruning = self._tap, stack.tokens
        try:
            tower = before.tower if before else describe_tower(self.model, self.info)
        except UnsupportedModel:
            if stack.taps or pruning is None or pruning.needs_tiles:
                raise
            return  # then every placeholder is a visual token like any other
        layers = {layer for method in stack.taps for layer in method.encoder_layers(tower)}
        if pruning is not None:  # any layer tells which placeholders are newlines
            layers.update(pruning.encoder_layers(tower) or (0,))
        if before is not None:
            if layers <= set(before.layers):
                return
            layers.update(before.layers)
            before.detach()
        self._tap = Tap(tower, layers)
        self._tap.attach()

    @property
    def tower(self) -> Tower | None:
        """The vision tower that is read; None without a tap."""
        return None if self._tap is None else self._tap.tower

    def take_images(self) -> list[EncodedImage] | None:
        """What the tap saw of this thread's last encoding; None without a tap."""
        return None if self._tap is None else self._tap.take()

    def _hook_attention(self, layer: int) -> None:
        module: Any = self.info.attention[layer]
        self._configs[layer] = module.config
        module.__dict__[SLOT] = Slot(self, layer, base_attention(module), self.impl)
        # The model object keeps its own configuration, so it goes on making its native masks.
        override = copy.copy(module.config)
        override._attn_implementation_internal = NAME
        module.config = override

    def _hook_decoder(self) -> None:
        """What branches need: the decoder's inputs, and on a CPU the attention of every layer."""
        model: Any = self.model
        hook = model.get_decoder().register_forward_pre_hook(self._enter_decoder, with_kwargs=True)
        self._handles.append(hook)
        self._hooked_decoder = True
        for layer in self.info.attention:
            if self._device(layer).type == "cpu" and layer not in self._configs:
                self._hook_attention(layer)

    def _hook_input(self, layer: int) -> None:
        handle = self.info.layers[layer].register_forward_pre_hook(
            partial(self._before_layer, layer), with_kwargs=True
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
    def prepared_steps(self) -> dict[int, tuple[Step, ...]] | None:
        """What the compiled decode step of this thread runs, by layer; None outside of one."""
        return getattr(self.local, "steps", None)

    @property
    def stack(self) -> Stack:
        """The stack of this thread: the innermost `using`, else what was wrapped."""
        stacks: list[Stack] = getattr(self.local, "stacks", [])
        return stacks[-1] if stacks else self.default

    @contextmanager
    def apart(self, stack: Stack, call: Call) -> Iterator[None]:
        """Run forwards that belong to no call of the user: nothing of them is reported."""
        outer = getattr(self.local, "call", None)
        self.local.call = call
        try:
            with self.use(stack):
                yield
        finally:
            self.local.call = outer

    @contextmanager
    def filling(self, branch: Branch) -> Iterator[None]:
        """Replace embeddings as a branch says in the forwards of this thread."""
        self.local.filling = branch
        try:
            yield
        finally:
            self.local.filling = None

    @contextmanager
    def rewritten(self, found: dict[str, list[Any]]) -> Iterator[None]:
        """Answer prompts that the methods of the stack that change images have been through.

        Args:
            found: what each of them found, by its name: an entry per prompt.
        """
        self.local.rewritten = found
        try:
            yield
        finally:
            self.local.rewritten = None

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

    def remember(self, cache: Cache, ledger: Ledger) -> None:
        """Say what the keys of a cache are that was filled without methods."""
        self._ledgers[cache] = ledger

    def last_call(self) -> Call | None:
        """The last call of this thread, or of any thread if this one made none."""
        own: Call | None = getattr(self.local, "last", None)
        return own or self.last

    # -- generate -----------------------------------------------------------------------------

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own generate(), which knows here where the prompt ends."""
        inner = self._model_method("generate")
        with self.lock:
            self.running += 1
        try:
            return self._generate_with_methods(inner, args, kwargs)
        finally:
            with self.lock:
                self.running -= 1

    def _generate_with_methods(self, inner: Any, args: Any, kwargs: Any) -> Any:
        processor = kwargs.pop("processor", None)
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
        found: dict[str, list[Any]] | None = getattr(self.local, "rewritten", None)
        if stack.pixels and found is None:
            raise BadInput(
                f"{stack.pixels[0].name} changes the images of a prompt, which generate() no "
                "longer has: it gets pixels that a processor has scaled. Ask through "
                "vlmfix.generate(model, processor, messages)."
            )
        call = Call(methods=stack.specs(), prompt_length=ids.shape[1], rows=ids.shape[0])
        call.pixels = found or {}
        if stack.contrast is not None:  # generate() encodes images before the first forward
            call.vision = vision_arguments(self.model, kwargs)
            if features := call.vision.get("mm_encoder_outputs"):  # which beams repeat in place
                copies = {modality: copy.copy(given) for modality, given in features.items()}
                call.vision["mm_encoder_outputs"] = copies
        if self._tap is not None:
            self._tap.take()  # whatever was encoded before belongs to another prompt
        asked = stack.reads_question or (stack.tokens is not None and stack.tokens.reads_question)
        if processor is not None and asked:
            call.question = find_question(processor, self.info, ids)
        cut = None
        if stack.tokens is not None:
            named = dict(zip(_GENERATE_ARGUMENTS, args, strict=False))
            cut = self._shorten(stack.tokens, call, {**named, **kwargs, "input_ids": ids})
        if cut is not None:
            args, kwargs = (), cut
            if processor is not None and asked:
                call.question = find_question(processor, self.info, cut["input_ids"])
        outer = getattr(self.local, "call", None)
        self.local.call = call
        try:
            output = inner(*args, **kwargs)
        finally:
            self.local.call = outer
        call.finish(output)
        self.last = self.local.last = call
        return output if cut is None else put_back(output, ids, cut["input_ids"].shape[1])

    def _shorten(
        self, method: TokenMethod, call: Call, kwargs: dict[str, Any]
    ) -> dict[str, Any] | None:
        """The arguments of generate() for prompts with fewer visual tokens; None: as they are."""
        _require_empty_cache(method, kwargs.get("past_key_values"))
        kwargs.pop("inputs", None)
        shortened = shorten(self, method, kwargs, call.question)
        if shortened is None:
            return None
        cut = shortened.kwargs
        positions = cut.get("position_ids")
        one_axis = positions is not None and positions.ndim == 2
        if one_axis and self._generation_option("use_cache", kwargs) is False:
            raise BadInput(
                f"{method.name}: positions=original leaves gaps, which transformers takes for "
                "several prompts in one row when there is no cache. Use positions=contiguous, or a "
                "cache."
            )
        call.prompt_length = cut["input_ids"].shape[1]
        _note_pruned(call, shortened)
        config = cut.get("generation_config")
        if config is not None:
            cut["generation_config"] = config = copy.deepcopy(config)
        for name in ("max_length", "min_length"):  # they count the prompt
            value = self._generation_option(name, kwargs)
            if not value:
                continue
            if config is None or kwargs.get(name) is not None:
                cut[name] = value - shortened.removed
            else:
                setattr(config, name, value - shortened.removed)
        return cut

    def _generation_option(self, name: str, kwargs: dict[str, Any]) -> Any:
        """What generate() makes of an option: the argument, the configuration's, the model's."""
        model: Any = self.model
        configs = (kwargs.get("generation_config"), model.generation_config)
        values = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
        return next((value for value in values if value is not None), None)

    def get_compiled_call(self, *args: Any, **kwargs: Any) -> Any:
        """The model's compiled forward, with the Python part of a decode step before the graph.

        generate() compiles decode steps only. What such a step does is settled once the prompt is
        known: its plans become inputs of the graph, which then needs no Python of ours. Before
        that, or with a cache that we cannot follow, the hooks run as they do without compiling.
        """
        compiled = self._model_method("get_compiled_call")(*args, **kwargs)

        def step(*args: Any, **kwargs: Any) -> Any:
            cache: Any = kwargs.get("past_key_values")
            frame = self._step_frame(cache)
            contrast = None if frame is None or frame.stack.contrast is None else frame
            if contrast is not None:
                # The length of a static cache may be a tensor, which the step will change.
                past = torch.as_tensor(cache.get_seq_length(), device=self._device(0))
                token = (past - contrast.ledger.prompt_length + 2).reshape(1)
                if contrast.ledger.streams is not None:
                    kwargs = contrast.ledger.streams.widen(kwargs, contrast)
            self.local.steps = self._steps(frame, cache)
            try:
                output = compiled(*args, **kwargs)
            finally:
                self.local.steps = None
            return output if contrast is None else combine_decoded(contrast, output, token)

        return step

    def _step_frame(self, cache: Any) -> Frame | None:
        """The frame of a decode step over a cache; None if it is not known."""
        stack = self.stack
        if not stack.methods or not isinstance(cache, Cache) or not cache.is_compileable:
            return None
        ledger = self._ledgers.get(cache)
        call: Call | None = getattr(self.local, "call", None)
        if call is None or ledger is None or not ledger.whole:
            return None
        call.passes += 1
        # The number of past positions lives on the device; all that counts here is that the
        # prompt is behind us.
        past, offsets = ledger.prompt_length, sliding_offsets(cache, 1)
        return Frame(stack, call, ledger, past, 1, offsets, self._tap)

    def _steps(self, frame: Frame | None, cache: Any) -> dict[int, tuple[Step, ...]] | None:
        """By layer, what a decode step runs; None: what the hooks find, as without compiling."""
        stack = self.stack
        if frame is None:
            return None if stack.methods else {}
        call = frame.call
        steps = {}
        dtype: Any = self.model.dtype
        for layer in stack.by_layer:
            device = self._device(layer)
            edits = frame.edits(layer, device)
            steps[layer] = tuple(
                replace(step, counter=self._counter(call, layer, device))
                for step in frame.steps(layer, edits, cache.get_max_length(layer), dtype)
            )
        return steps

    def _counter(self, call: Call, layer: int, device: torch.device) -> torch.Tensor:
        """An int64 scalar for the edited rows of one layer in the compiled steps of one call.

        A graph that changes an input is recorded as a CUDA graph only if that input never moves,
        so each thread keeps its counters from call to call.
        """
        if layer not in call.counters:
            mine: dict[int, torch.Tensor] = self.local.__dict__.setdefault("counters", {})
            if layer not in mine:
                mine[layer] = torch.zeros((), dtype=torch.int64, device=device)
                torch._dynamo.mark_static_address(mine[layer])
            call.counters[layer] = mine[layer].zero_()
        return call.counters[layer]

    def _device(self, layer: int) -> torch.device:
        return next(self.info.layers[layer].parameters()).device

    # -- forward ------------------------------------------------------------------------------

    # Each hook is two functions: the outer one is all that a compiled step sees of it.

    def _before(self, module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
        return None if self.prepared_steps is not None else self._begin(args, kwargs)

    @in_python
    def _begin(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
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
        if args:  # everything here looks arguments up by name
            names = inspect.signature(self.model.forward).parameters
            args, kwargs = (), {**dict(zip(names, args, strict=False)), **kwargs}
        ids = kwargs.get("input_ids")
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
        shortened, vision = None, {}
        if stack.tokens is not None and any(kwargs.get(name) is not None for name in _PIXELS):
            _require_empty_cache(stack.tokens, cache)
            vision = vision_arguments(self.model, kwargs)
            shortened = shorten(self, stack.tokens, kwargs, prompt_length=prompt_length)
        if shortened is not None:  # in generate() it was done before
            kwargs = shortened.kwargs
            ids = kwargs["input_ids"]
            prompt_length = None if prompt_length is None else prompt_length - shortened.removed
        frame = self._frame(stack, ids, cache, prompt_length, kwargs)
        if shortened is not None:
            _note_pruned(frame.call, shortened)
            frame.call.vision = vision
        if stack.preludes and not frame.past:
            frame = look_first(self, frame, ids, cache, kwargs)
        in_prompt = frame.past < frame.ledger.prompt_length
        if stack.drops is not None and in_prompt and bool(frame.ledger.visual().any()):
            frame = self._watch_last_row(stack.drops, frame, kwargs)
        if stack.drops is None and frame.ledger.dropped is not None:
            raise StateError(
                "later layers of this KV cache hold fewer tokens, which a method has dropped. Go "
                "on with the same method, or start from the prompt without this cache."
            )
        if stack.contrast is not None:
            frame, kwargs = before_forward(self, frame, kwargs)
        elif frame.ledger.streams is not None:
            raise StateError(
                "this KV cache also holds the rows of a contrastive method's branches. Go on with "
                "the same method, or start from the prompt without this cache."
            )
        self.local.frame = frame
        return args, kwargs

    def _watch_last_row(
        self, method: LayerTokenMethod, frame: Frame, kwargs: dict[str, Any]
    ) -> Frame:
        """The frame of a prompt under which the row that a method chooses by is kept."""
        check_prompt(method, frame, kwargs)
        watcher = last_row_watcher(method, frame)
        stack = Stack((*frame.stack.methods, watcher), self.info)
        self.reach(stack)
        frame.ledger.seen[method] = watcher.seen
        return Frame(
            stack, frame.call, frame.ledger, frame.past, frame.queries, frame.offsets, frame.tap
        )

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
            if self._tap is not None and not past and "mm_encoder_outputs" not in kwargs:
                self._tap.take()  # this forward encodes its own images
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
            if past and bool(((kinds == IMAGE) | (kinds == VIDEO)).any()):
                ledger.image_values.clear()  # a later turn brought images
            ledger.write(past, kinds, prompt_length)
            if call.question is not None and past == 0:
                copies = batch // len(call.question[0])
                ledger.say_question(*(m.repeat_interleave(copies, 0) for m in call.question))
        ledger.reserve(max(past + queries, key_capacity(cache)))
        offsets = sliding_offsets(cache, queries)
        return Frame(stack, call, ledger, past, queries, offsets, self._tap)

    def _enter_decoder(self, module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
        return None if self.prepared_steps is not None else self._prepare_decoder(args, kwargs)

    @in_python
    def _prepare_decoder(self, args: Any, kwargs: dict[str, Any]) -> Any:
        """Before the decoder: note the positions, and fill in what a branch says."""
        branch: Branch | None = getattr(self.local, "filling", None)
        if branch is not None:
            return args, replace_embeddings(branch, kwargs)
        if self.frame is not None:
            self.frame.positions = kwargs.get("position_ids")
        return None

    def _before_layer(
        self, layer: int, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        return None if self.prepared_steps is not None else self._enter_layer(layer, args, kwargs)

    @in_python
    def _enter_layer(self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """At a layer's input: let methods note prompt tokens, or drop them."""
        frame = self.frame
        if frame is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        for method in () if frame.decoding else frame.stack.by_layer.get(layer, ()):
            if method.overrides("flag_tokens"):
                frame.ledger.flag(method, layer, frame.past, method.flag_tokens(hidden))
        return enter_layer(frame, layer, args, kwargs)

    def _check(self, module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        return None if self.prepared_steps is not None else self._conclude(args, kwargs, output)

    @in_python
    def _conclude(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """After a forward: every planned layer must have come by; streams are combined."""
        frame = self.frame
        if frame is None:
            return None
        missing = set(frame.stack.by_layer) - frame.reached
        if missing and not frame.past:
            raise UnsupportedModel(
                f"the attention of decoder layers {sorted(missing)} of "
                f"{type(self.model).__name__} never reached vlmfix: they do not use transformers' "
                "attention interface. Nothing was edited; run the plain model with "
                "vlmfix.unwrap(model)."
            )
        if frame.rerun_with is not None:
            return run_last_token(self, frame, kwargs, output)
        if frame.stack.contrast is not None:
            return combine(self, frame, kwargs, output)
        return None

    def _after(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        if self.prepared_steps is None:
            self._end()

    @in_python
    def _end(self) -> None:
        # The frame holds the cache's ledger: leaving it would keep the last prompt alive.
        self.local.frame = None


def _require_empty_cache(method: TokenMethod, cache: Cache | None) -> None:
    if cache is not None and cache.get_seq_length():
        raise StateError(
            f"{method.name} cuts whole prompts, and this call goes on from a KV cache. Start from "
            "the whole conversation, without past_key_values."
        )


def _note_pruned(call: Call, shortened: Shortened) -> None:
    """What later parts of a call must know of a prompt that was cut."""
    call.reductions, call.placeholders = shortened.reductions, shortened.placeholders
    call.visual_tokens = tuple(one.size for one in shortened.reductions)
    images = [one.image for one in shortened.reductions]
    call.images = None if None in images else images  # type: ignore[assignment]  # none is None
