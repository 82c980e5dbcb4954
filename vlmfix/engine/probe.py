"""What a method looks at before a prompt runs with edits: its probe pass.

A probe pass is an extra forward over the prompt, whole or without its images, in which an observer
looks and nothing is edited. Where the prompt's own forward can play that part, only the last
prompt token runs twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from vlmfix.base.attention import AttentionMethod, ProbePass
from vlmfix.base.observer import Observer
from vlmfix.engine.call import Call
from vlmfix.engine.observe import internal_pass
from vlmfix.engine.plans import AttentionNotes
from vlmfix.engine.prefill import DecoderPositions
from vlmfix.engine.stage import Forward
from vlmfix.errors import CompositionError
from vlmfix.families import ModelInfo, last_logits
from vlmfix.families.kinds import PAD
from vlmfix.families.surgeon import PER_TOKEN, prompt_without_images

__all__ = ["Rerun", "probe", "run_last_token"]


@dataclass(frozen=True)
class Rerun:
    """Says of a forward that it runs unedited, and its last token once more with edits.

    Attributes:
        method: whose edits they are.
        observer: what looks at the forward meanwhile.
    """

    method: AttentionMethod
    observer: Observer


@dataclass
class _Seen:
    """What observers kept in one call: without a cache every step is a prompt."""

    by_method: dict[AttentionMethod, dict[int, torch.Tensor]] = field(default_factory=dict)


def probe(forward: Forward, methods: Sequence[AttentionMethod], alone: bool) -> None:
    """Run the probe passes of a prompt whose forward is about to start.

    Where the forward itself can be the probe pass, its frame keeps a `Rerun` and gets an observer.

    Args:
        forward: of the prompt.
        methods: those with a probe pass.
        alone: whether no other method runs.

    Raises:
        CompositionError: the forward holds a part of the prompt only.
    """
    frame, info = forward.frame, forward.host.info
    length = frame.ledger.prompt_length
    if frame.queries < length:
        names = ", ".join(sorted(method.name for method in methods))
        raise CompositionError(
            f"{names} must see the whole prompt at once, but this forward holds {frame.queries} "
            f"of its {length} tokens (chunked prefill). Generate without prefill_chunk_size."
        )
    if not bool(frame.ledger.visual().any()):
        return
    if alone and can_rerun(forward, methods[0]):
        observer = _probe_pass(methods[0], info).observer
        forward.host.reach_attention(set(observer.watched) & set(info.attention))
        frame.keep(Rerun(methods[0], observer))
        frame.observe([observer])
        return
    for method in methods:
        seen = frame.call.of(_Seen).by_method
        if method not in seen:
            wanted = _probe_pass(method, info)
            frame.call.extra_passes += 1
            _run(forward, wanted)
            seen[method] = wanted.observer.seen
        frame.ledger.of(AttentionNotes).seen[method] = seen[method]


def _probe_pass(method: AttentionMethod, info: ModelInfo) -> ProbePass:
    wanted = method.probe_pass(info)
    assert wanted is not None  # AttentionStage.probes
    return wanted


def _run(forward: Forward, wanted: ProbePass) -> None:
    """One forward over the prompt without a cache, in which only the observer looks."""
    host, frame, kwargs = forward.host, forward.frame, forward.kwargs
    ledger = frame.ledger
    length = ledger.prompt_length  # a forward may hold drafted tokens beyond it
    inputs = {**kwargs, "input_ids": kwargs["input_ids"][:, :length]}
    for name in PER_TOKEN:
        if inputs.get(name) is not None:
            inputs[name] = inputs[name][..., :length]
    # A static cache's mask spans its capacity; transformers makes another of this one.
    inputs["attention_mask"] = (ledger.kinds[:, :length] != PAD).long()
    call = Call()
    if wanted.prompt == "text":
        inputs = prompt_without_images(host.model, host.info, inputs)
    else:
        call.question, call.rows = frame.call.question, frame.call.rows
        for name in ("past_key_values", "labels"):
            inputs.pop(name, None)
    call.prompt_length = inputs["input_ids"].shape[1]
    inputs |= {"use_cache": False, **last_logits(host.model, 1)}
    internal_pass(host, inputs, call=call, observers=[wanted.observer])


# -- rerun of the last token ---------------------------------------------------------------------
# A method that edits predicting rows only leaves everything before the last prompt token as it is.
# So the prompt runs unedited under the observer, and the last token alone runs again with edits, on
# the cache cut by one.


def can_rerun(forward: Forward, method: AttentionMethod) -> bool:
    """Whether running the last token again is exact, and all that the caller wants back.

    It is not with a cache that cannot be cut (static, sliding, recurrent), padding on the right,
    or prompts whose tokens see the last one; it does not serve a caller who wants hidden states,
    attentions or a loss.
    """
    frame, kwargs, info = forward.frame, forward.kwargs, forward.host.info
    ledger, cache = frame.ledger, forward.cache
    if method.rows != "predicting" or info.sees_whole_prompt:
        return False
    if _probe_pass(method, info).prompt != "whole":
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


def run_last_token(forward: Forward, rerun: Rerun, output: Any) -> Any:
    """Run the last prompt token once more, with edits; its logits replace those of `output`.

    Args:
        forward: the observed forward that gave `output`.
        rerun: says whose edits.
        output: what it returned.
    """
    frame, kwargs = forward.frame, forward.kwargs
    seen = rerun.observer.seen
    frame.call.of(_Seen).by_method[rerun.method] = seen
    frame.ledger.of(AttentionNotes).seen[rerun.method] = seen
    kwargs["past_key_values"].crop(-1)
    frame.ledger.written -= 1  # the same token comes again, so nothing noted is cut
    as_they_are = ("past_key_values", "attention_mask", "use_cache")
    inputs = {
        name: value[..., -1:] if name in PER_TOKEN else value
        for name in (*PER_TOKEN, *as_they_are)
        if (value := kwargs.get(name)) is not None
    }
    made = frame.get(DecoderPositions)
    if "position_ids" not in inputs and made is not None and made.ids is not None:
        inputs["position_ids"] = made.ids[..., -1:]
    frame.call.passes -= 1  # the forward that now follows is not one of generate()'s
    frame.call.announce(inputs["input_ids"])
    frame.call.extra_passes += 1
    last = forward.host.model(**inputs, return_dict=True)
    output.logits = torch.cat([output.logits[:, :-1], last.logits[:, -1:]], dim=1)
    return output
