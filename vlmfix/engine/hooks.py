"""The model with vlmfix's hooks in it: what is hooked, and how everything comes out again."""

from __future__ import annotations

import copy
import functools
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Protocol

import torch

from vlmfix.engine.attention import NAME, SLOT, Slot
from vlmfix.engine.dispatch import base_attention, own_name
from vlmfix.engine.recorder import VisionRecorder
from vlmfix.engine.state import Implementation, State
from vlmfix.errors import StateError
from vlmfix.families import ModelInfo
from vlmfix.families.inner import INNER, OuterGeneration, outer_forward
from vlmfix.families.placement import computing_device
from vlmfix.families.tower import EncodedImage, Tower

__all__ = ["Hooks", "Host"]


class Hooks(Protocol):
    """What a host calls: around each forward of the model, and where a hooked layer begins."""

    @property
    def wanted(self) -> bool:
        """Whether a forward of this thread has to run with the hooks."""

    def before(self, module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
        """A forward pre-hook of the model."""

    def after(self, module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """A forward hook of the model."""

    def end(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        """Drop what this thread knows of its forward; also runs after an exception."""

    def enter_decoder(self, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        """A forward pre-hook of the decoder."""

    def enter_layer(self, layer: int, module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
        """A forward pre-hook of a decoder layer."""


class Host:
    """A model, its structure, and what of it is hooked.

    Stages ask for what they need (`reach_attention`, `reach_inputs`, `record_tower`, `add_hook`);
    asking twice does no harm. Nothing is hooked that no stage asked for.

    Attributes:
        model: the model.
        info: its structure.
        impl: how edited rows are computed while decoding.
        state: what the threads that use it do.
        recorder: of its vision tower; None while no stage reads it.
        lock: held while hooks change.
    """

    def __init__(self, model: torch.nn.Module, info: ModelInfo, impl: Implementation) -> None:
        self.model: Any = model
        self.info, self.impl, self.state = info, impl, State()
        self.recorder: VisionRecorder | None = None
        self.lock = threading.RLock()
        self._hooks: Hooks | None = None
        self._handles: list[Any] = []
        self._hooked: set[Any] = set()
        self._configs: dict[int, Any] = {}
        self._shadowed: dict[str, Any] = {}
        self._restore_implementation: Callable[[], None] | None = None

    # -- in and out ---------------------------------------------------------------------------

    def attach(self, hooks: Hooks, shadows: Mapping[str, Callable[..., Any]]) -> None:
        """Put the hooks of the model itself in.

        Args:
            hooks: what they call.
            shadows: functions to put over methods of the model, on this object only.
        """
        self._hooks = hooks
        self._use_supported_attention()
        self._handles += [
            self.model.register_forward_pre_hook(hooks.before, with_kwargs=True),
            self.model.register_forward_hook(hooks.after, with_kwargs=True),
            self.model.register_forward_hook(hooks.end, always_call=True),
            self.model.get_decoder().register_forward_pre_hook(
                hooks.enter_decoder, with_kwargs=True
            ),
        ]
        inner = self.info.model_type in INNER
        forward = outer_forward(self.model) if inner else self.model.forward
        stand_ins = {
            name: _stand_in(getattr(self.model, name), function)
            for name, function in shadows.items()
        }
        stand_ins["forward"] = _stand_in(forward, self._guarded(forward, hooks))
        for name, stand_in in stand_ins.items():
            self._shadowed[name] = self.model.__dict__.get(name)
            self.model.__dict__[name] = stand_in

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
        if self.recorder is not None:
            self.recorder.detach()
            self.recorder = None
        for name, before in self._shadowed.items():
            del self.model.__dict__[name]
            if before is not None:
                self.model.__dict__[name] = before
        self._shadowed.clear()
        if self._restore_implementation is not None:
            self._restore_implementation()
            self._restore_implementation = None

    def _guarded(self, forward: Callable[..., Any], hooks: Hooks) -> Callable[..., Any]:
        """The model's forward, which no way in or out takes past the hooks.

        torch runs no hook where a module's forward is called by its name, as PEFT does, and none
        after an interrupt (Ctrl-C).
        """
        state = self.state

        def run(*args: Any, **kwargs: Any) -> Any:
            if state.prepared is not None:
                return forward(*args, **kwargs)
            if state.frame is None and hooks.wanted:
                return self.model(*args, **kwargs)
            try:
                return forward(*args, **kwargs)
            except BaseException:
                hooks.end(self.model, args, None)
                raise

        return run

    def model_method(self, name: str) -> Callable[..., Any]:
        """A shadowed method as it was: the user's own on this object, else the class's."""
        method = getattr(type(self.model), name)
        found: Callable[..., Any] = self._shadowed.get(name) or method.__get__(self.model)
        return found

    @property
    def generate(self) -> Callable[..., Any]:
        """The model's generate(), whose every token is a forward of the model itself."""
        if self.info.model_type in INNER:
            return OuterGeneration(self.model).generate
        return self.model_method("generate")

    def device(self, layer: int) -> torch.device:
        """Where a decoder layer computes."""
        return computing_device(self.info.layers[layer])

    # -- what stages ask for ------------------------------------------------------------------

    def reach_attention(self, layers: Iterable[int]) -> None:
        """Dispatch the attention of decoder layers to `attention_forward`."""
        for layer in layers:
            if layer in self._configs:
                continue
            module: Any = self.info.attention[layer]
            if SLOT in module.__dict__:
                raise StateError(
                    "the language model inside this model is part of another wrapped model. Call "
                    "vlmfix.unwrap on that one first, or wrap a model with weights of its own."
                )
            self._configs[layer] = module.config
            module.__dict__[SLOT] = Slot(self.state, layer, base_attention(module), self.impl)
            # The model object keeps its own configuration, so it goes on making its native masks.
            override = copy.copy(module.config)
            override._attn_implementation_internal = own_name(NAME, module)
            module.config = override

    def reach_inputs(self, layers: Iterable[int]) -> None:
        """Call `Hooks.enter_layer` where these decoder layers begin."""
        assert self._hooks is not None  # stages ask after attach()
        for layer in layers:
            hook = partial(self._hooks.enter_layer, layer)
            self.add_hook(("input", layer), self.info.layers[layer], hook, pre=True)

    def add_hook(
        self, key: Any, module: torch.nn.Module, hook: Callable[..., Any], *, pre: bool = False
    ) -> None:
        """Register a forward hook (or pre-hook) that takes keyword arguments, once per key."""
        if key in self._hooked:
            return
        register = module.register_forward_pre_hook if pre else module.register_forward_hook
        self._handles.append(register(hook, with_kwargs=True))
        self._hooked.add(key)

    def record_tower(self, tower: Tower, layers: Iterable[int]) -> None:
        """Record these layers of the vision tower, next to those that are recorded already."""
        if self.recorder is not None:
            self.recorder.add(layers)
            return
        recorder = VisionRecorder(tower, layers)
        recorder.attach()
        self.recorder = recorder

    @property
    def tower(self) -> Tower | None:
        """The vision tower that is recorded, if one is."""
        return None if self.recorder is None else self.recorder.tower

    def take_images(self) -> list[EncodedImage] | None:
        """What was recorded of this thread's last encoding; None without a recorder."""
        return None if self.recorder is None else self.recorder.take()

    # -- attention implementations ------------------------------------------------------------

    def _use_supported_attention(self) -> None:
        """Switch a flash or flex decoder to SDPA while wrapped: its masks would not fit here."""
        model = self.model
        text = model.config.get_text_config(decoder=True)
        if text._attn_implementation in ("sdpa", "eager", None):
            return
        before = text._attn_implementation
        own = (k for k in model.config.sub_configs if getattr(model.config, k, None) is text)
        key = next(own, "")  # "" is the configuration itself, where the decoder has no other
        warnings.warn(
            f"the decoder runs {before!r} attention, whose masks vlmfix cannot read; it runs SDPA "
            "until vlmfix.unwrap(model).",
            stacklevel=5,
        )
        model.set_attn_implementation({key: "sdpa"})
        self._restore_implementation = lambda: model.set_attn_implementation({key: before})


def _stand_in(method: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """A function under the name and the signature of a method, which transformers reads."""

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return call
