"""What a method looks at before a prompt runs with edits: its prelude (method.Prelude).

A prelude is an extra forward over the prompt, whole or without its images, in which a watcher
looks and nothing is edited. Where the prompt's own forward can play that part, only the last
prompt token runs twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from vlmfix.base.attention import AttentionMethod, Prelude, Watcher
from vlmfix.engine.call import Call
from vlmfix.engine.frame import Frame, Stack
from vlmfix.errors import CompositionError
from vlmfix.families import last_logits
from vlmfix.families.kinds import PAD
from vlmfix.families.surgeon import PER_TOKEN, prompt_without_images

if TYPE_CHECKING:
    from vlmfix.engine.session import Session

__all__ = ["look_first", "run_last_token"]


def look_first(
    session: Session,
    frame: Frame,
    ids: torch.Tensor,
    cache: Cache | None,
    kwargs: dict[str, Any],
) -> Frame:
    """Run the preludes of a prompt whose forward is about to start.

    Args:
        session: whose model it is.
        frame: of the prompt's forward.
        ids: (B, Q) its token ids.
        cache: its cache, if it has one.
        kwargs: its keyword arguments.

    Returns:
        The frame to run the prompt under: `frame`, or one that only watches, after which
        `run_last_token` has to be called.

    Raises:
        CompositionError: the forward holds a part of the prompt only.
    """
    length = frame.ledger.prompt_length
    if frame.queries < length:
        names = ", ".join(sorted(method.name for method in frame.stack.preludes))
        raise CompositionError(
            f"{names} must see the whole prompt at once, but this forward holds {frame.queries} "
            f"of its {length} tokens (chunked prefill). Generate without prefill_chunk_size."
        )
    if not bool(frame.ledger.visual().any()):
        return frame
    if can_rerun(frame, cache, kwargs):
        return _watching(session, frame)
    for method in frame.stack.preludes:
        seen = frame.call.seen
        if method not in seen:  # without a cache, every step is a prompt; looking once is enough
            prelude = method.prelude(session.info)
            assert prelude is not None  # Stack.preludes
            frame.call.extra_passes += 1
            _watch(session, prelude, frame, ids, kwargs)
            seen[method] = prelude.watcher.seen
        frame.ledger.seen[method] = seen[method]
    return frame


def _watch(
    session: Session, prelude: Prelude, frame: Frame, ids: torch.Tensor, kwargs: dict[str, Any]
) -> None:
    """One forward over the prompt without a cache, in which only the watcher looks."""
    model: Any = session.model
    ledger = frame.ledger
    length = ledger.prompt_length  # a forward may hold drafted tokens beyond it
    inputs = {**kwargs, "input_ids": ids[:, :length]}
    for name in PER_TOKEN:
        if inputs.get(name) is not None:
            inputs[name] = inputs[name][..., :length]
    # A static cache's mask spans its capacity; transformers makes another of this one.
    inputs["attention_mask"] = (ledger.kinds[:, :length] != PAD).long()
    call = Call(methods=())
    if prelude.prompt == "text":
        inputs = prompt_without_images(model, session.info, inputs)
    else:
        call.question, call.rows = frame.call.question, frame.call.rows
        for name in ("past_key_values", "labels"):
            inputs.pop(name, None)
    inputs |= {"use_cache": False, "return_dict": True}
    inputs |= last_logits(model, 1)
    call.prompt_length = inputs["input_ids"].shape[1]
    watching = Stack((prelude.watcher,), session.info)
    with session.apart(watching, call), torch.no_grad():
        model(**inputs)


# -- rerun of the last token ---------------------------------------------------------------------
# A method that edits predicting rows only leaves everything before the last prompt token as it is.
# So the prompt runs unedited under the watcher, and the last token alone runs again with edits, on
# the cache cut by one.


def can_rerun(frame: Frame, cache: Cache | None, kwargs: dict[str, Any]) -> bool:
    """Whether running the last token again is exact, and all that the caller wants back.

    It is not with several methods, a cache that cannot be cut (static, sliding, recurrent), padding
    on the right, or prompts whose tokens see the last one; it does not serve a caller who wants
    hidden states, attentions or a loss.
    """
    methods, ledger = frame.stack.methods, frame.ledger
    method = methods[0]
    if len(methods) > 1 or not isinstance(method, AttentionMethod) or method.rows != "predicting":
        return False
    prelude = method.prelude(frame.stack.info)
    if prelude is None or prelude.prompt != "whole" or frame.stack.info.sees_whole_prompt:
        return False
    if not isinstance(cache, DynamicCache) or any(
        type(x) is not DynamicLayer for x in cache.layers
    ):
        return False
    more = kwargs.get("output_hidden_states") or kwargs.get("output_attentions")
    if more or kwargs.get("labels") is not None:
        return False
    if not 2 <= frame.queries == ledger.prompt_length:
        return False
    return bool((ledger.last_prompt == frame.queries - 1).all())


def _watching(session: Session, frame: Frame) -> Frame:
    """The frame under which the prompt runs for the watcher alone."""
    method = frame.stack.preludes[0]
    prelude = method.prelude(session.info)
    assert prelude is not None
    stack = Stack((prelude.watcher,), session.info)
    session.reach(stack)
    watching = Frame(
        stack, frame.call, frame.ledger, frame.past, frame.queries, frame.offsets, frame.tap
    )
    watching.rerun_with = method
    return watching


def run_last_token(session: Session, frame: Frame, kwargs: dict[str, Any], output: Any) -> Any:
    """The last prompt token once more, with edits; its logits replace those of `output`.

    Args:
        session: whose model it is.
        frame: of the watched forward that gave `output`.
        kwargs: its keyword arguments.
        output: what it returned.
    """
    ledger, call, method = frame.ledger, frame.call, frame.rerun_with
    watcher = frame.stack.methods[0]
    assert isinstance(watcher, Watcher)
    call.seen[method] = ledger.seen[method] = watcher.seen
    kwargs["past_key_values"].crop(-1)
    as_they_are = ("past_key_values", "attention_mask", "use_cache")
    inputs = {
        name: value[..., -1:] if name in PER_TOKEN else value
        for name in (*PER_TOKEN, *as_they_are)
        if (value := kwargs.get(name)) is not None
    }
    call.passes -= 1  # the forward that now follows is not one of generate()'s
    call.extra_passes += 1
    last = session.model(**inputs, return_dict=True)
    output.logits = torch.cat([output.logits[:, :-1], last.logits[:, -1:]], dim=1)
    return output
