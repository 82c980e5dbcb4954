"""The verbs of the library: wrap, unwrap, wrapped, using, suspended, last_call."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar, get_args

import torch

from vlmfix.engine.call import CallReport
from vlmfix.engine.session import SESSION, Session
from vlmfix.engine.stack import Stack
from vlmfix.engine.stages import fitted_stack, idle
from vlmfix.engine.state import Implementation
from vlmfix.errors import BadInput, StateError
from vlmfix.families import ModelInfo, describe_model
from vlmfix.families.served import served_model
from vlmfix.registry import MethodSpec

__all__ = ["last_call", "session_of", "suspended", "unwrap", "using", "wrap", "wrapped"]

Model = TypeVar("Model", bound=torch.nn.Module)


def wrap(model: Model, methods: MethodSpec, *, impl: Implementation = "auto") -> Model:
    """Make `model.generate()` and `model(...)` run with methods; returns the same object.

    All checks run before the model is changed, so that it stays as it was after an error.

    Args:
        model: a Hugging Face vision-language model in eval mode, or a PEFT model around one whose
            adapters sit in its layers (LoRA).
        methods: "var", "var:keep=0.4", a method object, a list of them (a stack), or None for a
            model that stays plain outside of `using`.
        impl: implementation of edited rows while decoding. "auto": the fused Triton kernel on a GPU
            for edits that have a fused form, else torch; "torch": always torch; "triton": always
            the kernel, or an error.

    Raises:
        UnknownMethod, BadInput: a method, an option or `impl` that cannot be used.
        UnsupportedModel: a model that the hooks cannot reach, or that a method cannot run on.
        CalibrationNeeded: constants that are unknown for this model.
        CompositionError: methods that exclude each other.
        StateError: the model is wrapped already, or in training mode.
    """
    inside = served_model(model)
    if SESSION in getattr(inside, "__dict__", {}):
        current = inside.__dict__[SESSION].default.specs()
        raise StateError(
            f"this model is already wrapped with {list(current)}. Call vlmfix.unwrap(model) first, "
            "or run another stack for a while with vlmfix.using(model, ...)."
        )
    _check_implementation(impl)
    info = describe_model(model)
    if model.training:
        raise StateError(
            "this model is in training mode; vlmfix works at inference only. Call model.eval() "
            "before vlmfix.wrap(model, ...)."
        )
    stack = _stack(inside, info, methods, impl)
    Session(inside, info, stack, impl).attach()
    if inside is not model:  # who asks the outer one finds the same session
        model.__dict__[SESSION] = inside.__dict__[SESSION]
    return model


def unwrap(model: Model) -> Model:
    """Restore the model bit for bit to its state before `wrap`; returns the same object.

    Raises:
        StateError: the model is not wrapped, or is generating in some thread.
    """
    session = _session(model, "unwrap")
    with session.host.lock:
        if session.running:
            raise StateError(
                f"{session.running} generate() call(s) are running on this model. Wait for them "
                "to end, then call vlmfix.unwrap(model)."
            )
        session.detach()
        getattr(model, "__dict__", {}).pop(SESSION, None)
    return model


@contextmanager
def wrapped(model: Model, methods: MethodSpec, *, impl: Implementation = "auto") -> Iterator[Model]:
    """Run `wrap` before a with-block and `unwrap` after it, also after an exception."""
    wrap(model, methods, impl=impl)
    try:
        yield model
    finally:
        unwrap(model)


@contextmanager
def using(model: Model, methods: MethodSpec) -> Iterator[Model]:
    """Run another stack on a wrapped model, in this task or thread only; `None` is the plain model.

    Blocks nest, and other threads and asyncio tasks keep their stacks. What a task starts with a
    copy of its context (`asyncio.to_thread`) is in the block, too. generate() in a plain thread of
    its own, as with a streamer, needs `using` inside that thread. A block that a generator opens
    holds while the generator runs.

    Raises:
        StateError: the model is not wrapped (`wrap(model, None)` makes it so without any method);
            or, by a call inside, that a suspended generator has a block open and nothing says
            whether it holds for that call.
    """
    session = _session(model, "using")
    stack = _stack(session.host.model, session.host.info, methods, session.host.impl)
    with session.use(stack):
        yield model


def suspended(model: Model) -> AbstractContextManager[Model]:
    """Run the plain model in this task or thread: `using(model, None)`."""
    return using(model, None)


def last_call(model: torch.nn.Module) -> CallReport:
    """The report of this task's or thread's last generate() (or forward) on a wrapped model.

    Raises:
        StateError: the model is not wrapped, or no call ran with a method yet.
    """
    call = _session(model, "last_call").last_call()
    if call is None:
        raise StateError("no call has run with a method on this model yet; generate() first.")
    return call.report()


@contextmanager
def session_of(model: torch.nn.Module) -> Iterator[Session]:
    """The session of a wrapped model; a plain model is wrapped without a method in the block."""
    if SESSION in getattr(served_model(model), "__dict__", {}):
        yield _session(model, "session_of")
    else:
        with wrapped(model, None):
            yield _session(model, "session_of")


def _session(model: torch.nn.Module, verb: str) -> Session:
    session = getattr(served_model(model), "__dict__", {}).get(SESSION)
    if not isinstance(session, Session):
        raise StateError(f"vlmfix.{verb}: this model is not wrapped. Call vlmfix.wrap(model, ...).")
    return session


def _stack(
    model: torch.nn.Module, info: ModelInfo, methods: MethodSpec, impl: Implementation
) -> Stack:
    stack = fitted_stack(model, info, methods, impl)
    for method in stack.methods:
        if reason := idle(method, info):
            warnings.warn(f"{method.name} will change nothing: {reason}.", stacklevel=3)
    return stack


def _check_implementation(impl: str) -> None:
    if impl not in get_args(Implementation):
        raise BadInput(f"impl={impl!r} must be 'auto', 'torch' or 'triton'.")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if impl == "triton" and not torch.cuda.is_available() and not interpreted:
        raise BadInput(
            "impl='triton' needs a CUDA device and this machine shows none. Use impl='auto', which "
            "takes the torch implementation here."
        )
