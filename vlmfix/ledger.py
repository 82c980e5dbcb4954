"""What every key position of one KV cache is: padding, text, image, video or generated.

The ledger belongs to a cache, not to a step counter: beams, roll-back, chunked prefill, static
and sliding caches all read the same positions, because a position never changes its kind.
Whatever lies beyond the prompt is GENERATED without being written, so decoding writes nothing
and a rejected draft needs no undoing.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["GENERATED", "IMAGE", "PAD", "TEXT", "VIDEO", "Ledger"]

PAD, TEXT, IMAGE, VIDEO, GENERATED = range(5)

_GROWTH = 256  # positions added at once, so that growing buffers are rare during decoding


class Ledger:
    """Kinds and per-layer facts of the keys of one cache (or of one forward without a cache).

    Attributes:
        kinds: (B, capacity) uint8, values of this module.
        prompt_length: positions below it are prompt, the rest is generated.
        last_prompt: (B,) position of the last prompt token that is not padding.
        flags: {(method, layer): (B, capacity) bool}, what a method noted about prompt tokens.
        scales: {(method, layer): (B, H)}, head factors that a method chose for this prompt.
        derived: {layer: anything}, what was derived from kinds and flags; emptied when they change.
    """

    def __init__(self, batch: int, capacity: int, device: torch.device) -> None:
        shape = (batch, capacity + _GROWTH)
        self.kinds = torch.full(shape, GENERATED, dtype=torch.uint8, device=device)
        self.prompt_length = 0
        self.last_prompt = torch.zeros(batch, dtype=torch.long, device=device)
        self.flags: dict[tuple[Any, int], torch.Tensor] = {}
        self.scales: dict[tuple[Any, int], torch.Tensor] = {}
        self.derived: dict[int, Any] = {}

    @property
    def capacity(self) -> int:
        return self.kinds.shape[1]

    def reserve(self, positions: int) -> None:
        """Make room for `positions` keys; new room is GENERATED and unflagged."""
        if positions <= self.capacity:
            return
        extra = positions - self.capacity + _GROWTH
        self.kinds = torch.nn.functional.pad(self.kinds, (0, extra), value=GENERATED)
        self.flags = {
            key: torch.nn.functional.pad(flags, (0, extra)) for key, flags in self.flags.items()
        }
        self.derived.clear()

    def write(self, start: int, kinds: torch.Tensor, prompt_length: int) -> None:
        """Enter the kinds (B, Q) of the positions from `start`; positions past the prompt stay."""
        self.reserve(start + kinds.shape[1])
        self.prompt_length = prompt_length
        stop = min(start + kinds.shape[1], prompt_length)
        self.kinds[:, start:stop] = kinds[:, : stop - start]
        valid = self.kinds[:, :prompt_length] != PAD
        last = valid.shape[1] - 1 - valid.flip(1).to(torch.uint8).argmax(1)
        self.last_prompt = torch.where(valid.any(1), last, torch.full_like(last, -1))
        self.derived.clear()

    def flag(self, method: Any, layer: int, start: int, flags: torch.Tensor) -> None:
        """Note (B, Q) flags of a method about the tokens from `start`; prompt tokens only."""
        buffer = self.flags.get((method, layer))
        if buffer is None:
            buffer = torch.zeros_like(self.kinds, dtype=torch.bool)
            self.flags[method, layer] = buffer
        stop = min(start + flags.shape[1], self.prompt_length)
        if stop > start:
            buffer[:, start:stop] = flags[:, : stop - start]
            self.derived.pop(layer, None)

    def visual(self) -> torch.Tensor:
        """(B, capacity) bool: image and video tokens."""
        return (self.kinds == IMAGE) | (self.kinds == VIDEO)
