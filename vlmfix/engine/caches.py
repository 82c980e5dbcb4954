"""The KV caches that one wrapped model has filled: the ledger of each, and the frames over them."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from vlmfix.engine.call import Call
from vlmfix.engine.frame import Frame, key_capacity, sliding_offsets
from vlmfix.engine.hooks import Host
from vlmfix.engine.ledger import Ledger
from vlmfix.engine.stack import Stack
from vlmfix.engine.stage import Forward, decoder_cache
from vlmfix.errors import StateError, VlmfixError
from vlmfix.families.prompt import carries_vision, prompt_kinds, require_image

__all__ = ["Caches"]


class Caches:
    """The ledgers of a model's KV caches, by cache; they end with it."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._ledgers: weakref.WeakKeyDictionary[Any, Ledger] = weakref.WeakKeyDictionary()
        self._calls: weakref.WeakKeyDictionary[Ledger, Call] = weakref.WeakKeyDictionary()
        self._keys: weakref.WeakKeyDictionary[Any, torch.Tensor] = weakref.WeakKeyDictionary()
        self._refused: weakref.WeakKeyDictionary[Any, VlmfixError] = weakref.WeakKeyDictionary()

    def __len__(self) -> int:
        return len(self._ledgers)

    def ledger(self, cache: Cache | None) -> Ledger | None:
        """What is known of a cache."""
        return None if cache is None else self._ledgers.get(cache)

    def remember(self, cache: Cache, ledger: Ledger) -> None:
        """Say what the keys of a cache are that was filled without methods."""
        ledger.length = int(cache.get_seq_length())
        self._ledgers[cache] = ledger

    def pass_by(self, kwargs: dict[str, Any]) -> None:
        """The plain model is about to run on these arguments; what it adds no method will see."""
        cache = decoder_cache(kwargs)
        ledger = self.ledger(cache)
        if cache is None or ledger is None:
            return
        self._keys.pop(cache, None)
        ledger.begin()
        ledger.end()
        for memory in ledger.memories():
            memory.require(())
        ledger.cut(int(cache.get_seq_length()))

    def follow(self, forward: Forward, output: Any, stack: Stack) -> None:
        """A forward has run: follow its cache, also where the model made that itself."""
        made = getattr(output, "past_key_values", None)
        forward.frame.ledger.end()
        if forward.cache is not None or not isinstance(made, Cache):
            return
        try:
            for stage in stack.stages:
                stage.check_cache(made)
        except VlmfixError as error:  # of use to the forward that goes on from it, if one does
            self._refused[made] = error
            return
        forward.kwargs["past_key_values"] = made
        self._ledgers[made] = forward.frame.ledger

    def hold(self, forward: Forward) -> None:
        """A forward and all that belongs to it are over: its cache keeps its rows from now on."""
        keys = _keys_of(forward.cache)
        if forward.cache is not None and keys is not None:
            self._keys[forward.cache] = keys

    # -- frames -------------------------------------------------------------------------------

    def frame(self, forward: Forward) -> Frame:
        """The frame of a forward that is about to run, with a new ledger where a prompt begins.

        Raises:
            StateError: a cache that was filled while no method ran, or that its stages cannot go
                on from.
        """
        kwargs, cache = forward.kwargs, forward.cache
        ids = kwargs["input_ids"]
        batch, queries = ids.shape
        past = int(cache.get_seq_length()) if cache is not None else 0
        ledger = self._followed(cache, past, forward) if past and cache is not None else None
        if ledger is None:
            ledger = Ledger(batch, queries, ids.device)
            ledger.begin()
            if cache is not None:
                self._ledgers[cache] = ledger
        call = forward.call or self._bare_call(forward, ledger, past)
        call.passes += 1
        call.batch = max(call.batch, batch)
        prompt_length = call.prompt_length or queries
        if past < prompt_length:
            self._write(forward, ledger, call, past, prompt_length)
        ledger.length = past + queries
        ledger.reserve(max(ledger.length, key_capacity(cache)))
        for memory in ledger.memories():
            memory.require(forward.stages)
        offsets = sliding_offsets(cache, queries, self._host.info.shared_keys)
        needed = kwargs.get("logits_to_keep")
        needed = needed if isinstance(needed, int) else None
        return Frame(call, ledger, past, queries, offsets, needed)

    def _followed(self, cache: Cache, past: int, forward: Forward) -> Ledger:
        """The ledger of a cache that holds `past` positions, cut to them."""
        if (refused := self._refused.get(cache)) is not None:
            raise refused
        ledger = self._ledgers.get(cache)
        if ledger is not None:
            ledger.begin()  # undoes what a forward entered that failed
        if ledger is None or past > ledger.length:
            seen = 0 if ledger is None else ledger.length
            raise StateError(
                f"this KV cache holds {past} positions, {past - seen} of which no method has seen: "
                "they were filled while the plain model ran. Start from the prompt with an empty "
                "cache, or fill all of the cache under methods."
            )
        # Beam search reorders rows, too, which then never leave their prompt.
        within = forward.call is not None and forward.call.passes > 0
        held, keys = self._keys.pop(cache, None), _keys_of(cache)
        moved = held is not None and keys is not None and not _shares_memory(held, keys)
        moved = moved and past == ledger.length and not within and not ledger.rows_are_alike()
        if moved or len(forward.kwargs["input_ids"]) != len(ledger.kinds):
            raise StateError(
                "rows of this KV cache were reordered, selected or repeated since it was filled, "
                f"or tokens for {len(forward.kwargs['input_ids'])} of its {len(ledger.kinds)} rows "
                "have come, and what is known of its prompts does not follow. Start from the "
                "prompts, in the order that is wanted, without this cache."
            )
        ledger.cut(past)
        return ledger

    def _write(
        self, forward: Forward, ledger: Ledger, call: Call, past: int, prompt_length: int
    ) -> None:
        """Enter the kinds of the prompt tokens of a forward."""
        info, kwargs = self._host.info, forward.kwargs
        ids = kwargs["input_ids"]
        batch, queries = ids.shape
        # An answer that a later turn goes on from is a part of its prompt: text, or padding.
        answer = ids.new_full((batch, max(0, past - ledger.written)), -1)
        start = past - answer.shape[1]
        kinds = prompt_kinds(info, torch.cat([answer, ids], dim=1), start, kwargs)
        if past == 0 and queries >= prompt_length:
            require_image(info, kinds, kwargs)
        ledger.write(start, kinds, prompt_length)
        if call.question is not None and not ledger.knows_question:
            copies = batch // len(call.question[0])
            ledger.say_question(*(m.repeat_interleave(copies, 0) for m in call.question))

    def _bare_call(self, forward: Forward, ledger: Ledger, past: int) -> Call:
        """The call of a bare forward: what it gets is prompt, unless the caller said otherwise."""
        if not past and "mm_encoder_outputs" not in forward.kwargs:
            self._host.take_images()  # this forward encodes its own images
        call = self._calls.get(ledger) or Call(forward.methods)
        self._calls[ledger] = call
        self._host.state.last = call
        end = past + forward.kwargs["input_ids"].shape[1]
        known = ledger.prompt_length
        if past and carries_vision(forward.kwargs):  # a later turn: nobody generates images
            known = max(known, end)
        call.prompt_length = forward.prompt_length or known or end
        return call


def _keys_of(cache: Cache | None) -> torch.Tensor | None:
    """Keys that a cache holds in one piece, in memory that forwards alone replace; None: none."""
    if cache is None or cache.offloading:
        return None
    whole = (layer for layer in cache.layers if type(layer) in (DynamicLayer, StaticLayer))
    return next((layer.keys for layer in whole if layer.is_initialized), None)


def _shares_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether both are pieces of one tensor, as what is left of a cache that was cut."""
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
