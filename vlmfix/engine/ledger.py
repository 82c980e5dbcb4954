"""What every key position of one KV cache is: padding, text, image, video or generated.

The ledger belongs to a cache, not to a step counter: beams, roll-back, chunked prefill, static
and sliding caches all read the same positions, because a position never changes its kind.
Whatever lies beyond the prompt is GENERATED without being written, so decoding writes nothing
and a rejected draft needs no undoing.
"""

from __future__ import annotations

from typing import Any

import torch

from vlmfix.families.kinds import GENERATED, IMAGE, PAD, TEXT, VIDEO

__all__ = ["Ledger"]

_GROWTH = 256  # positions added at once, so that growing buffers are rare during decoding


class Ledger:
    """Kinds and per-layer facts of the keys of one cache (or of one forward without a cache).

    Attributes:
        kinds: (B, capacity) uint8, values of this module.
        prompt_length: positions below it are prompt, the rest is generated.
        last_prompt: (B,) position of the last prompt token that is not padding.
        flags: {(method, layer): (B, capacity) bool}, what a method noted about prompt tokens.
        scales: {(method, layer): edits.HeadFactors}, the head factors of this prompt.
        seen: {method: {layer: tensor}}, what the watcher of a method's prelude kept.
        image_values: {method: (B, capacity) float32}, what a method gave to each visual token.
        derived: {layer: anything}, what was derived from kinds and flags; emptied when they change.
        streams: the branch rows of the cache (streams.Streams), once they have been joined to it.
        contrast: the contrastive method that has run its branches of the prompt.
        dropped: what later layers no longer hold of the prompt (dropping.Dropped).
        pieces: {name: tensor}, per-token inputs of a prompt whose branches are still to run.
    """

    def __init__(self, batch: int, capacity: int, device: torch.device) -> None:
        shape = (batch, capacity + _GROWTH)
        self.kinds = torch.full(shape, GENERATED, dtype=torch.uint8, device=device)
        self.prompt_length = 0
        self._written = 0
        self.last_prompt = torch.zeros(batch, dtype=torch.long, device=device)
        self.flags: dict[tuple[Any, int], torch.Tensor] = {}
        self.scales: dict[tuple[Any, int], Any] = {}
        self.seen: dict[Any, dict[int, torch.Tensor]] = {}
        self.image_values: dict[Any, torch.Tensor] = {}
        self._question: tuple[torch.Tensor, torch.Tensor] | None = None
        self.derived: dict[int, Any] = {}
        self.streams: Any = None
        self.contrast: Any = None
        self.dropped: Any = None
        self.pieces: dict[str, torch.Tensor] | None = None

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
        self.image_values = {
            key: torch.nn.functional.pad(values, (0, extra))
            for key, values in self.image_values.items()
        }
        if self._question is not None:
            question, content = self._question
            self.say_question(question, content)
        self.derived.clear()

    def write(self, start: int, kinds: torch.Tensor, prompt_length: int) -> None:
        """Enter the kinds (B, Q) of the positions from `start`; positions past the prompt stay."""
        self.reserve(start + kinds.shape[1])
        self.prompt_length = prompt_length
        stop = min(start + kinds.shape[1], prompt_length)
        self.kinds[:, start:stop] = kinds[:, : stop - start]
        self._written = max(self._written, stop)
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

    @property
    def whole(self) -> bool:
        """Whether every position of the prompt has been written."""
        return 0 < self.prompt_length <= self._written

    def say_question(self, question: torch.Tensor, content: torch.Tensor) -> None:
        """Enter which tokens are the user's question, and which of them carry content: (B, L)."""
        room = self.capacity
        masks = [
            torch.nn.functional.pad(mask, (0, room - mask.shape[1])) for mask in (question, content)
        ]
        self._question = (masks[0].to(self.kinds.device), masks[1].to(self.kinds.device))
        self.derived.clear()

    @property
    def question(self) -> torch.Tensor:
        """(B, capacity) bool: text of the question; unless said, all text after the last image."""
        if self._question is not None:
            return self._question[0]
        visual = self.visual()
        after = visual.flip(1).cumsum(1).flip(1) == 0
        return (self.kinds == TEXT) & after & visual.any(1, keepdim=True)

    @property
    def content(self) -> torch.Tensor:
        """(B, capacity) bool: tokens of the question that carry content; unless said, all of it."""
        return self.question if self._question is None else self._question[1]

    def visual(self) -> torch.Tensor:
        """(B, capacity) bool: image and video tokens."""
        return (self.kinds == IMAGE) | (self.kinds == VIDEO)
