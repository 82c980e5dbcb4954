"""Edited rows of compiled decode steps: device scalars that graphs add to."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from vlmfix.engine.call import Call
from vlmfix.engine.hooks import Host

__all__ = ["collect", "lend"]


@dataclass
class _Counters:
    """int64 scalars by layer. A thread keeps them for good, and a call has them on loan.

    A graph that changes an input is recorded as a CUDA graph only if that input never moves, so
    the scalars outlive a call.
    """

    by_layer: dict[int, torch.Tensor] = field(default_factory=dict)


def lend(host: Host, call: Call, layer: int, device: torch.device) -> torch.Tensor:
    """The scalar to which the compiled steps of a call add the rows that they edit in a layer."""
    lent = call.of(_Counters).by_layer
    if layer not in lent:
        mine = host.state.thread.of(_Counters).by_layer
        if layer not in mine:
            with torch.inference_mode(False):  # later calls may run outside of it
                mine[layer] = torch.zeros((), dtype=torch.int64, device=device)
            torch._dynamo.mark_static_address(mine[layer])
        lent[layer] = mine[layer].zero_()
    return lent[layer]


def collect(call: Call) -> None:
    """Give a call that is over the counts of its compiled steps; the next one takes the scalars."""
    for layer, counter in call.of(_Counters).by_layer.items():
        call.count(layer, counter.clone())
