"""What one forward pass knows: what its keys are, which rows stand where, who looks.

A frame lives for one forward and belongs to one thread (state.py). What has to outlive it is in
the ledger of the KV cache. What a stage needs during a forward it keeps with the frame.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from transformers.cache_utils import Cache

from vlmfix.base.observer import Observer, Rows
from vlmfix.engine.call import Call
from vlmfix.engine.ledger import Ledger
from vlmfix.engine.lifetime import Lifetime
from vlmfix.families.kinds import GENERATED, PAD, TEXT

__all__ = ["Frame", "Window", "key_capacity", "sliding_offsets", "without_gaps"]


@dataclass(frozen=True)
class Window:
    """Query rows from `start` on; `chosen` (B, Q - start) bool says which. None: all, from 0."""

    start: int
    chosen: torch.Tensor | None

    def mask(self, first: int, last: int, device: torch.device) -> torch.Tensor | None:
        """(B, last - first) bool: which of the queries from `first` to `last` it chooses."""
        if self.chosen is None:
            return None
        chosen = self.chosen[:, max(0, first - self.start) : max(0, last - self.start)]
        missing = last - first - chosen.shape[1]
        return torch.nn.functional.pad(chosen, (missing, 0)).to(device)

    def last(self, skipped: int) -> Window | None:
        """The same window seen from row `skipped` on; None if it ends before."""
        start = max(0, self.start - skipped)
        if self.chosen is None:
            return Window(start, None)
        chosen = self.chosen[:, max(0, skipped - self.start) :]
        return Window(start, chosen) if bool(chosen.any()) else None


class Frame(Lifetime):
    """What one forward pass knows: its call, its ledger, and where its queries stand.

    Attributes:
        call: the call that it belongs to.
        ledger: of its KV cache, or of its own without a cache.
        past: positions before its queries.
        queries: their number, Q.
        needed: how many of them, the last ones, need logits. Layers that read the keys of earlier
            ones may compute these rows alone.
        offsets: {layer: position of its first key}, for sliding layers.
        decoding: whether every row belongs to a generated token, so that every row is edited.
        observers: what looks at this forward.
        expected: layers whose attention must come by before the forward ends.
        reached: layers whose attention has come by.
    """

    def __init__(
        self,
        call: Call,
        ledger: Ledger,
        past: int,
        queries: int,
        offsets: dict[int, int],
        needed: int | None = None,
    ) -> None:
        super().__init__()
        self.needed = needed or queries
        self.call, self.ledger = call, ledger
        self.past, self.queries, self.offsets = past, queries, offsets
        self.decoding = past >= ledger.prompt_length
        self.observers: tuple[Observer, ...] = ()
        self.expected: set[int] = set()
        self.reached: set[int] = set()
        self._windows: dict[str, Window | None] = {}

    def observe(self, observers: Sequence[Observer]) -> None:
        """Let observers look at this forward, too. Their layers must be hooked."""
        self.observers += tuple(observers)
        self.expected.update(layer for observer in observers for layer in observer.watched)

    def observers_of(self, layer: int) -> list[Observer]:
        """Who looks at a layer."""
        return [observer for observer in self.observers if layer in observer.watched]

    def offset(self, layer: int) -> int:
        """Position of the first key that a sliding layer still holds; 0 elsewhere."""
        return self.offsets.get(layer, 0)

    def visual(self, layer: int, keys: int, device: torch.device) -> torch.Tensor:
        """(B, K) bool: which of the keys that a layer sees are visual tokens."""
        offset = self.offset(layer)
        return self.ledger.visual()[:, offset : offset + keys].to(device)

    @cached_property
    def gaps(self) -> torch.Tensor | None:
        """(B, P) bool: padding between an image and what follows it; None if there is none.

        The processors of BLIP put placeholders in front of a prompt that is padded already.
        """
        if self.decoding:
            return None
        kinds = self.ledger.kinds[:, : self.past + self.queries]
        behind = self.ledger.visual()[:, : kinds.shape[1]].cumsum(1) > 0
        gaps = (kinds == PAD) & behind
        return gaps if bool(gaps.any()) else None

    def window(self, rule: Rows, rows: int) -> Window | None:
        """The rows that a rule of `observer.Rows` chooses in this forward; None if none.

        Args:
            rule: the rule.
            rows: how many of the queries, the last ones, are there to choose from.
        """
        if rule not in self._windows:
            self._windows[rule] = self._window(rule)
        window = self._windows[rule]
        return window if window is None else window.last(self.queries - rows)

    def _window(self, rule: Rows) -> Window | None:
        ledger = self.ledger
        if self.decoding:
            return Window(0, None)
        kinds = ledger.kinds[:, self.past : self.past + self.queries]
        positions = torch.arange(self.past, self.past + self.queries, device=kinds.device)
        chosen = kinds == GENERATED
        if rule == "all":
            chosen = kinds != PAD
        elif rule == "predicting":
            chosen = chosen | (positions == ledger.last_prompt[:, None])
        elif rule == "text":
            seen = ledger.visual()[:, : self.past + self.queries].cumsum(1)[:, self.past :] > 0
            chosen = chosen | ((kinds == TEXT) & seen)
        anywhere = chosen.any(0).nonzero()
        if not len(anywhere):
            return None
        start = int(anywhere[0])
        chosen = chosen[:, start:]
        # Even a window of all rows keeps its mask here: `None` would promise start == 0.
        return Window(start, chosen)

    def last_prompt_row(self, rows: int) -> torch.Tensor | None:
        """(B,) index of the last prompt row among the last `rows` queries; None: not there."""
        row = self.ledger.last_prompt - self.past - (self.queries - rows)
        if bool(((row < 0) | (row >= rows)).any()):
            return None
        return row


def without_gaps(
    weights: torch.Tensor, gaps: torch.Tensor, before: torch.Tensor | None
) -> torch.Tensor:
    """Attention rows (B, H, R, K) in which padding shows what the last real row before it shows.

    Args:
        weights: rows that lie side by side.
        gaps: (B, R) bool, which of them are such padding.
        before: the rows that were shown last, the last of which is the first of these.
    """
    filled = list(weights.unbind(2))
    if before is not None:
        filled[0] = before[:, :, -1]
    for row in range(1, len(filled)):
        gap = gaps[:, row, None, None].to(weights.device)
        filled[row] = torch.where(gap, filled[row - 1], filled[row])
    return torch.stack(filled, dim=2)


def key_capacity(cache: Cache | None) -> int:
    """Keys that a preallocated cache shows to attention from the start; 0 for a growing one."""
    if cache is None or not len(cache.layers) or not cache.is_compileable:
        return 0
    return int(cache.get_max_length())


def sliding_offsets(
    cache: Cache | None, queries: int, shared_keys: Mapping[int, int]
) -> dict[int, int]:
    """{layer: position of its first key} of the sliding layers, before the cache is updated.

    A layer of `shared_keys` has no place in the cache; its keys begin where those of its source do.
    """
    if cache is None:
        return {}
    offsets = {
        index: int(layer.get_mask_sizes(queries)[1])
        for index, layer in enumerate(cache.layers)
        if getattr(layer, "is_sliding", False) and index not in shared_keys
    }
    borrowed = {
        layer: offsets[source] for layer, source in shared_keys.items() if source in offsets
    }
    return {**offsets, **borrowed}
