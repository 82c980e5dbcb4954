"""Forwards of vlmfix's own, and the observer that several stages use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vlmfix.base.observer import Observer, SeenRows
from vlmfix.engine.call import Call
from vlmfix.engine.hooks import Host
from vlmfix.engine.stack import PLAIN, Stack
from vlmfix.families import require_visual_tokens
from vlmfix.families.surgeon import module_state

__all__ = ["LastRow", "Observers", "internal_pass"]


@dataclass(frozen=True)
class Observers:
    """What looks at the forwards of a thread."""

    all: tuple[Observer, ...]


def internal_pass(
    host: Host,
    inputs: Mapping[str, Any],
    *,
    stack: Stack = PLAIN,
    call: Call | None = None,
    observers: Sequence[Observer] = (),
) -> Any:
    """Run one forward that belongs to no call of the user.

    It leaves nothing behind: no report, no gradient, no state on the model. The cache in its
    arguments, if there is one, is filled as ever.

    Args:
        host: the wrapped model.
        inputs: arguments of the model's forward.
        stack: what runs; the plain model if nothing is said.
        call: the record of this pass, which says where the prompt ends; None: all is prompt.
        observers: what looks.

    Returns:
        The output of the model.
    """
    state = host.state
    if observers:
        require_visual_tokens(host.info, "what looks at attention")
    with host.lock:
        for stage in stack.stages:
            stage.reach(host)
        host.reach_attention(
            layer
            for observer in observers
            for layer in observer.watched
            if layer in host.info.attention
        )
    outer, state.call = state.call, call or Call()
    try:
        with (
            state.thread.keeping(stack),
            state.thread.keeping(Observers(tuple(observers))),
            module_state(host.model),
            torch.no_grad(),
        ):
            return host.model(**{**inputs, "return_dict": True})
    finally:
        state.call = outer


@dataclass(frozen=True, eq=False)
class LastRow(Observer):
    """Keeps, per watched layer, the mean over heads of one row: (B, row + 1) float32."""

    row: int = 0

    def see_weights(self, rows: SeenRows) -> None:
        weights, first_key = rows.weights, rows.first_key
        if not 0 <= self.row - rows.position < weights.shape[2]:
            return
        shown = weights[:, :, self.row - rows.position].float().mean(1)
        inside = min(shown.shape[1], self.row + 1 - first_key)
        kept = shown.new_zeros(len(shown), self.row + 1)
        kept[:, first_key : first_key + inside] = shown[:, :inside]
        self.seen[rows.layer] = kept
