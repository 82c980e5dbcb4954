"""What one forward pass knows: which methods run, what its keys are, which rows they edit.

A frame lives for one forward and is thread-local (session.py). Whatever has to outlive it is in
the ledger of the KV cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from transformers.cache_utils import Cache

from vlmfix.base.attention import AttentionMethod, Keys
from vlmfix.base.contrast import ContrastMethod
from vlmfix.base.method import Method
from vlmfix.base.pixels import PixelMethod
from vlmfix.base.pruning import LayerTokenMethod, TokenMethod
from vlmfix.engine.call import Call
from vlmfix.engine.edits import Edit, HeadFactors, Step
from vlmfix.engine.ledger import Ledger
from vlmfix.errors import StateError
from vlmfix.families import ModelInfo
from vlmfix.families.kinds import GENERATED, IMAGE, TEXT

if TYPE_CHECKING:
    from vlmfix.engine.tap import Tap

__all__ = [
    "Frame",
    "Stack",
    "Window",
    "key_capacity",
    "sliding_offsets",
]


@dataclass(frozen=True, eq=False)
class Stack:
    """The methods that run together, sorted by layer. Compared by identity."""

    methods: tuple[Method, ...]
    info: ModelInfo

    def __post_init__(self) -> None:
        by_layer: dict[int, tuple[AttentionMethod, ...]] = {}
        for method in self.attention:
            for layer in method.layers(self.info):
                if layer in self.info.attention:
                    by_layer[layer] = (*by_layer.get(layer, ()), method)
        object.__setattr__(self, "by_layer", by_layer)

    by_layer: dict[int, tuple[AttentionMethod, ...]] = field(init=False, repr=False)

    @cached_property
    def attention(self) -> tuple[AttentionMethod, ...]:
        """The methods that edit attention."""
        return tuple(method for method in self.methods if isinstance(method, AttentionMethod))

    @cached_property
    def pixels(self) -> tuple[PixelMethod, ...]:
        """The methods that change the images of prompts."""
        return tuple(method for method in self.methods if isinstance(method, PixelMethod))

    @cached_property
    def tokens(self) -> TokenMethod | None:
        """The method that prunes visual tokens, if there is one that does not keep them all."""
        found = (method for method in self.methods if isinstance(method, TokenMethod))
        return next((method for method in found if not method.neutral()), None)

    @cached_property
    def drops(self) -> LayerTokenMethod | None:
        """The method that drops visual tokens between layers, if it does not keep them all."""
        found = (method for method in self.methods if isinstance(method, LayerTokenMethod))
        return next((method for method in found if not method.neutral()), None)

    @cached_property
    def contrast(self) -> ContrastMethod | None:
        """The method that combines logits, if there is one that does not leave them alone."""
        found = (method for method in self.methods if isinstance(method, ContrastMethod))
        return next((method for method in found if not method.neutral()), None)

    @cached_property
    def preludes(self) -> tuple[AttentionMethod, ...]:
        """The methods that want an extra forward before the prompt's own."""
        return tuple(method for method in self.attention if method.prelude(self.info) is not None)

    @cached_property
    def taps(self) -> tuple[AttentionMethod, ...]:
        """The methods that want attention of the vision tower."""
        return tuple(method for method in self.attention if method.overrides("image_values"))

    @cached_property
    def reads_question(self) -> bool:
        """Whether some method wants to know which tokens are the user's question."""
        return any(method.reads_question for method in self.attention)

    def specs(self) -> tuple[str, ...]:
        return tuple(method.spec() for method in self.methods)


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


class Frame:
    """What one forward pass knows: its ledger, where its queries stand, and its edits."""

    def __init__(
        self,
        stack: Stack,
        call: Call,
        ledger: Ledger,
        past: int,
        queries: int,
        offsets: dict[int, int],
        tap: Tap | None,
    ) -> None:
        self.stack, self.call, self.ledger, self.tap = stack, call, ledger, tap
        self.past, self.queries, self.offsets = past, queries, offsets
        #: Every row of this forward belongs to a generated token, so every row is edited.
        self.decoding = past >= ledger.prompt_length
        self.reached: set[int] = set()
        #: The positions that the decoder was given, if it was given any.
        self.positions: torch.Tensor | None = None
        #: The method whose edits the last prompt token gets once this watched forward is over.
        self.rerun_with: AttentionMethod | None = None
        self._windows: dict[str, Window | None] = {}

    def offset(self, layer: int) -> int:
        """Position of the first key that a sliding layer still holds; 0 elsewhere."""
        return self.offsets.get(layer, 0)

    def edits(self, layer: int, device: torch.device) -> tuple[Edit, ...]:
        """The edits of one layer, planned once per prompt on its device, kept in the ledger."""
        self.reached.add(layer)
        methods = self.stack.by_layer.get(layer)
        if not methods:
            return ()
        plans: dict[Stack, tuple[Edit, ...]] = self.ledger.derived.setdefault(layer, {})
        if self.stack not in plans:
            plans[self.stack] = tuple(self._plan(methods, layer, device))
        return plans[self.stack]

    def _plan(
        self, methods: tuple[AttentionMethod, ...], layer: int, device: torch.device
    ) -> Iterator[Edit]:
        for method in methods:
            plan = method.plan(self._keys(method, layer, device))
            if plan is not None:
                self.call.note(method.name, layer, plan.notes)
                yield Edit.of(method, plan)

    def _keys(self, method: AttentionMethod, layer: int, device: torch.device) -> Keys:
        ledger = self.ledger
        flags = ledger.flags.get((method, layer))
        if flags is None and method.overrides("flag_tokens"):
            raise StateError(
                f"this KV cache was filled while {method.name} was off, so what {method.name} "
                "notes about the prompt is missing. Start from the prompt, without this cache."
            )
        values = self._image_values(method) if method.overrides("image_values") else None
        return Keys(
            layer=layer,
            num_heads=self.stack.info.num_heads,
            kinds=ledger.kinds.to(device),
            flags=None if flags is None else flags.to(device),
            question=ledger.question.to(device),
            content=ledger.content.to(device),
            seen={at: what.to(device) for at, what in ledger.seen.get(method, {}).items()},
            image_values=None if values is None else values.to(device),
        )

    def _image_values(self, method: AttentionMethod) -> torch.Tensor:
        """(B, capacity) float32: what a method gives to each visual token, 0 elsewhere."""
        ledger, call, tap = self.ledger, self.call, self.tap
        if method in ledger.image_values:
            return ledger.image_values[method]
        if not ledger.whole:  # in the middle of a chunked prefill
            return torch.zeros_like(ledger.kinds, dtype=torch.float32)
        assert tap is not None  # session.reach() attached it for this stack
        if call.images is None:
            call.images = tap.take()
        layers = method.encoder_layers(tap.tower)
        pieces = []
        for image in call.images:
            tiles = [
                method.image_values([tile.received[layer] for layer in layers]).float()
                for tile in image.tiles
            ]
            pieces.append(image.to_visual_tokens(tiles).nan_to_num(0.0).to(ledger.kinds.device))
        if call.reductions is not None:  # the prompt holds fewer tokens than were encoded
            pieces = [
                x[r.positions.to(x.device)] for x, r in zip(pieces, call.reductions, strict=True)
            ]
        copies = len(ledger.kinds) // (call.rows or len(ledger.kinds))
        places = (ledger.kinds == IMAGE)[::copies]
        count = sum(len(piece) for piece in pieces)
        if count != int(places.sum()):
            raise StateError(
                f"{method.name} must see the images of a prompt being encoded, but {count} visual "
                f"tokens were encoded in this call and the prompt holds {int(places.sum())}. Pass "
                "all pixels to this generate() or forward, not features that were encoded before."
            )
        values = torch.zeros(places.shape, device=places.device)
        if pieces:
            values[places] = torch.cat(pieces)
        ledger.image_values[method] = values.repeat_interleave(copies, 0)
        return ledger.image_values[method]

    def steps(
        self, layer: int, edits: tuple[Edit, ...], keys: int, dtype: torch.dtype
    ) -> tuple[Step, ...]:
        """The edits of one layer, ready for the `keys` keys and the dtype of a decode step."""
        offset = self.offset(layer)
        steps = []
        for edit in edits:
            fused = edit.plan.fused
            if fused is not None and offset and fused.groups is not None:
                fused = replace(fused, groups=fused.groups[:, offset:])
            factors = self.factors(layer, edit, dtype)
            if factors is None and edit.heads and edit.method.head_scale_from == "prompt":
                factors = self._no_factors(edit, dtype)
            steps.append(Step(edit, edit.tensors(offset, keys), fused, factors, None))
        return tuple(steps)

    def factors(self, layer: int, edit: Edit, dtype: torch.dtype) -> HeadFactors | None:
        """Factors on the head outputs that hold for this prompt, once they are known."""
        scales = self.ledger.scales
        known = scales.get((edit.method, layer))
        if known is None and edit.plan.heads is not None:
            known = scales[edit.method, layer] = HeadFactors.of(edit.plan.heads, dtype)
        return known

    def _no_factors(self, edit: Edit, dtype: torch.dtype) -> HeadFactors:
        """Ones, where an edit that decides at the prompt had nothing to decide."""
        if edit.live:
            raise StateError(
                f"this KV cache was filled while {edit.method.name} was off, so the heads that it "
                "chose are missing. Start from the prompt, without this cache."
            )
        kinds = self.ledger.kinds
        ones = torch.ones(len(kinds), self.stack.info.num_heads, device=kinds.device)
        return HeadFactors.of(ones, dtype)

    def visual(self, layer: int, keys: int, device: torch.device) -> torch.Tensor:
        """(B, K) bool: which of the keys that a layer sees are visual tokens."""
        offset = self.offset(layer)
        return self.ledger.visual()[:, offset : offset + keys].to(device)

    def window(self, rule: str) -> Window | None:
        """The rows that a rule of AttentionMethod.rows chooses in this forward; None if none."""
        if rule not in self._windows:
            self._windows[rule] = self._window(rule)
        return self._windows[rule]

    def _window(self, rule: str) -> Window | None:
        ledger = self.ledger
        if self.decoding:
            return Window(0, None)
        kinds = ledger.kinds[:, self.past : self.past + self.queries]
        positions = torch.arange(self.past, self.past + self.queries, device=kinds.device)
        chosen = kinds == GENERATED
        if rule == "predicting":
            chosen = chosen | (positions == ledger.last_prompt[:, None])
        else:
            seen = ledger.visual()[:, : self.past + self.queries].cumsum(1)[:, self.past :] > 0
            chosen = chosen | ((kinds == TEXT) & seen)
        anywhere = chosen.any(0).nonzero()
        if not len(anywhere):
            return None
        start = int(anywhere[0])
        chosen = chosen[:, start:]
        # Even a window of all rows keeps its mask here: `None` would promise start == 0.
        return Window(start, chosen)

    def last_prompt_row(self) -> torch.Tensor | None:
        """(B,) index of the last prompt row within this forward; None if it is not here."""
        row = self.ledger.last_prompt - self.past
        if bool(((row < 0) | (row >= self.queries)).any()):
            return None
        return row


def key_capacity(cache: Cache | None) -> int:
    """Keys that a preallocated cache shows to attention from the start; 0 for a growing one."""
    if cache is None or not len(cache.layers) or not cache.is_compileable:
        return 0
    return int(cache.get_max_length())


def sliding_offsets(cache: Cache | None, queries: int) -> dict[int, int]:
    """{layer: position of its first key} of the sliding layers, before the cache is updated."""
    if cache is None:
        return {}
    return {
        index: int(layer.get_mask_sizes(queries)[1])
        for index, layer in enumerate(cache.layers)
        if getattr(layer, "is_sliding", False)
    }
