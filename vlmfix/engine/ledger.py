"""What every key position of one KV cache is: padding, text, image, video or generated.

The ledger belongs to a cache, not to a step counter: beams, roll-back, chunked prefill, static
and sliding caches all read the same positions, because a position never changes its kind.
Positions beyond the prompt are GENERATED without being written, so decoding writes nothing and a
rejected draft needs no undoing. Where a cache is cut further back, into a prompt, its ledger is cut
with it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from vlmfix.engine.lifetime import Lifetime
from vlmfix.families.kinds import GENERATED, IMAGE, PAD, TEXT, VIDEO

__all__ = ["Ledger", "Memory"]

_GROWTH = 256  # positions added at once, so that growing buffers are rare during decoding


class Memory:
    """What a stage remembers of the prompts of one ledger; base class of what ledgers keep."""

    def grow(self, capacity: int) -> None:
        """The ledger has room for so many keys from now on."""

    def changed(self) -> None:
        """Kinds were written or the question became known: nothing derived from them holds."""

    def cut(self, length: int) -> None:
        """Forget what was noted about the prompt tokens from `length` on; `changed` follows.

        Raises:
            StateError: what is remembered holds for the whole prompt alone.
        """

    def rows_are_alike(self) -> bool:
        """Whether all rows could change places."""
        return True

    def require(self, stages: Collection[str]) -> None:
        """Refuse a forward over this cache under stages that cannot go on from this memory.

        Args:
            stages: names of the stages that run.

        Raises:
            StateError: the stage that must go on is not among them.
        """


class Ledger(Lifetime):
    """Kinds of the keys of one cache (or of one forward without a cache), and stages' memories.

    Attributes:
        kinds: (B, capacity) uint8, values of families/kinds.py.
        prompt_length: positions below it are prompt, the rest is generated; 0: not known yet.
        last_prompt: (B,) position of the last prompt token that is not padding.
        length: positions that forwards under methods have filled.
        written: positions whose kind was entered; those behind are GENERATED.
    """

    def __init__(self, batch: int, capacity: int, device: torch.device) -> None:
        super().__init__()
        shape = (batch, capacity + _GROWTH)
        self.kinds = torch.full(shape, GENERATED, dtype=torch.uint8, device=device)
        self.prompt_length = self.length = self.written = 0
        self.last_prompt = torch.zeros(batch, dtype=torch.long, device=device)
        self._question: tuple[torch.Tensor, torch.Tensor] | None = None
        self._before: tuple[Any, ...] | None = None

    def begin(self) -> None:
        """A forward is about to add positions; what one that never ended entered is undone."""
        if self._before is not None:
            kinds, self.last_prompt, self._question, *lengths = self._before
            self.prompt_length, self.length, self.written = lengths
            room = self.capacity - kinds.shape[1]  # memories have grown with it
            self.kinds = torch.nn.functional.pad(kinds, (0, room), value=GENERATED)
            if self._question is not None:
                self.say_question(*self._question)
            self._changed()
        lengths = [self.prompt_length, self.length, self.written]
        self._before = (self.kinds, self.last_prompt, self._question, *lengths)

    def end(self) -> None:
        """The forward has run, and the cache holds its positions."""
        self._before = None

    @property
    def capacity(self) -> int:
        return self.kinds.shape[1]

    def memories(self) -> list[Memory]:
        """What stages remember here."""
        return [thing for thing in self.kept() if isinstance(thing, Memory)]

    def reserve(self, positions: int) -> None:
        """Make room for `positions` keys; new room is GENERATED."""
        if positions <= self.capacity:
            return
        extra = positions - self.capacity + _GROWTH
        self.kinds = torch.nn.functional.pad(self.kinds, (0, extra), value=GENERATED)
        for memory in self.memories():
            memory.grow(self.capacity)
        if self._question is not None:
            question, content = self._question
            self.say_question(question, content)

    def write(self, start: int, kinds: torch.Tensor, prompt_length: int) -> None:
        """Enter the kinds (B, Q) of the positions from `start`; positions past the prompt stay."""
        self.reserve(start + kinds.shape[1])
        self.prompt_length = prompt_length
        stop = min(start + kinds.shape[1], prompt_length)
        # Not in place: a forward that fails gives back what was here before, see `begin`.
        parts = [self.kinds[:, :start], kinds[:, : stop - start], self.kinds[:, stop:]]
        self.kinds = torch.cat(parts, dim=1)
        self.written = max(self.written, stop)
        valid = self.kinds[:, :prompt_length] != PAD
        last = valid.shape[1] - 1 - valid.flip(1).to(torch.uint8).argmax(1)
        self.last_prompt = torch.where(valid.any(1), last, torch.full_like(last, -1))
        self._changed()

    def cut(self, length: int) -> None:
        """Follow a cache that holds `length` positions now, and held more before."""
        if length < self.written:  # else only tokens of an answer went
            for memory in self.memories():
                memory.cut(length)
            gone = torch.full_like(self.kinds[:, length:], GENERATED)
            self.kinds = torch.cat([self.kinds[:, :length], gone], dim=1)
            self.written = length
            self.prompt_length = 0  # what follows may be another prompt
            self._question = None
            self._changed()
        self.length = min(self.length, length)

    @property
    def whole(self) -> bool:
        """Whether every position of the prompt has been written."""
        return 0 < self.prompt_length <= self.written

    def say_question(self, question: torch.Tensor, content: torch.Tensor) -> None:
        """Enter which tokens are the user's question, and which of them carry content: (B, L)."""
        room = self.capacity
        masks = [
            torch.nn.functional.pad(mask, (0, room - mask.shape[1])) for mask in (question, content)
        ]
        self._question = (masks[0].to(self.kinds.device), masks[1].to(self.kinds.device))
        self._changed()

    def rows_are_alike(self) -> bool:
        """Whether all rows could change places, as those of one prompt can."""
        mine = [self.kinds, *(self._question or ())]
        return all(bool((x == x[:1]).all()) for x in mine) and all(
            memory.rows_are_alike() for memory in self.memories()
        )

    def _changed(self) -> None:
        for memory in self.memories():
            memory.changed()

    @property
    def knows_question(self) -> bool:
        """Whether the question was said."""
        return self._question is not None

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
