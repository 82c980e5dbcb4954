"""The stage of methods that prune visual tokens between two decoder layers.

The layer before shows what the last prompt token attends to; at the next one the hidden states of
the prompt are cut to what a method keeps, and from there on each layer gets positions and masks for
these alone. The first layer's cache stays whole, and it is the one that transformers counts by.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers.cache_utils import Cache, DynamicLayer

from vlmfix.base.attention import AttentionMethod
from vlmfix.base.method import Method
from vlmfix.base.pruning import LayerTokenMethod
from vlmfix.engine.edits import require_attention
from vlmfix.engine.frame import Frame
from vlmfix.engine.hooks import Host
from vlmfix.engine.ledger import Memory
from vlmfix.engine.observe import LastRow
from vlmfix.engine.stage import Forward, Stage
from vlmfix.engine.state import Implementation
from vlmfix.errors import BadInput, CompositionError, StateError, UnsupportedModel
from vlmfix.families import ModelInfo
from vlmfix.families.kinds import PAD
from vlmfix.families.surgeon import TOKEN_TYPES

__all__ = ["Dropped", "KeptPlaceholders", "LayerPruningStage"]


@dataclass(frozen=True)
class KeptPlaceholders:
    """Of one call: (B, L) bool, the visual tokens of the prompts that later layers keep."""

    kept: torch.Tensor


@dataclass(frozen=True, eq=False)
class Dropped(Memory):
    """What the layers from `first` on keep of the prompts of one cache.

    Attributes:
        first: the first of these layers.
        index: (B, P) int64: the places in the prompt of the P columns that stay, ascending behind
            those that only fill up.
        filler: (B, P) bool: columns that only fill up a row with fewer tokens; no row sees them.
        length: L, columns of the prompt.
    """

    first: int
    index: torch.Tensor
    filler: torch.Tensor
    length: int

    def require(self, stages: Collection[str]) -> None:
        if LayerPruningStage.name not in stages:
            raise StateError(
                "later layers of this KV cache hold fewer tokens, which a method has dropped. Go "
                "on with the same method, or start from the prompt without this cache."
            )

    def rows_are_alike(self) -> bool:
        return False

    def cut(self, length: int) -> None:
        raise StateError(
            "this KV cache was cut inside a prompt of which later layers hold other tokens than "
            "the first. Start from the prompt without this cache."
        )

    def places(self, total: int) -> torch.Tensor:
        """(B, P + total - L): the columns that stay of `total`; all behind the prompt do."""
        behind = torch.arange(self.length, total, device=self.index.device)
        return torch.cat([self.index, behind.expand(len(self.index), -1)], dim=1)


@dataclass(frozen=True, eq=False)
class LayerPruningStage(Stage):
    """Cuts the hidden states of prompts where a method's first layer begins."""

    method: LayerTokenMethod
    first: int

    name: ClassVar[str] = "layer pruning"

    @classmethod
    def of(cls, methods: Sequence[Method], info: ModelInfo) -> LayerPruningStage | None:
        own = [method for method in methods if isinstance(method, LayerTokenMethod)]
        return cls(own[0], own[0].first_layer(info)) if own else None

    @classmethod
    def check(cls, methods: Sequence[Method], info: ModelInfo, impl: Implementation) -> None:
        own = [method for method in methods if isinstance(method, LayerTokenMethod)]
        attention = any(
            isinstance(method, AttentionMethod) and set(method.layers(info)) & set(info.attention)
            for method in methods
        )
        if own and (attention or any(x.stage in ("hidden", "logits") for x in methods)):
            raise CompositionError(
                f"{own[0].name} leaves some layers fewer keys than others, which no method that "
                "edits attention or hidden states or combines logits reckons with. Prune before "
                "the language model instead (hiprune, divprune, ...), or run it alone."
            )

    def examine(self, model: torch.nn.Module, info: ModelInfo) -> None:
        require_attention(info, [self.first - 1])

    def reach(self, host: Host) -> None:
        host.reach_attention([self.first - 1])
        host.reach_inputs(range(self.first, host.info.num_layers))

    def check_cache(self, cache: Cache) -> None:
        wrong = {type(x).__name__ for x in cache.layers if type(x) is not DynamicLayer}
        if wrong or cache.offloading:
            raise CompositionError(
                f"{self.method.name} leaves layers with fewer keys than others, which "
                f"{', '.join(sorted(wrong)) or 'an offloaded cache'} cannot hold. Generate with a "
                "dynamic cache, or prune before the language model (hiprune, ...)."
            )

    def before_forward(self, forward: Forward) -> None:
        frame = forward.frame
        ledger = frame.ledger
        if frame.decoding or not bool(ledger.visual().any()):
            return
        _check_prompt(self.method, forward)
        if forward.cache is not None:
            self.check_cache(forward.cache)
        observer = LastRow((self.first - 1,), row=ledger.prompt_length - 1)
        frame.observe([observer])
        frame.keep(observer)

    def enter_layer(
        self, frame: Frame, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        ledger, observer = frame.ledger, frame.get(LastRow)
        if frame.past == 0 and layer == self.first and observer is not None:  # there is an image
            if layer - 1 not in observer.seen:
                raise UnsupportedModel(
                    f"the attention of decoder layer {layer - 1}, by which {self.method.name} "
                    "chooses, never reached vlmfix: it does not use transformers' attention "
                    "interface. Prune before the language model instead (hiprune, divprune, ...)."
                )
            dropped = _drop(self.method, frame, layer, observer.seen[layer - 1])
            if dropped is not None:
                ledger.keep(dropped)
        known = ledger.get(Dropped)
        if known is None or layer < known.first:
            return args, kwargs
        return _cut_inputs(known, frame, layer, args, kwargs)


def _check_prompt(method: LayerTokenMethod, forward: Forward) -> None:
    """Refuse, before a prompt runs, what cannot be cut in the middle.

    Raises:
        CompositionError: a prompt in chunks.
        BadInput: a prompt that is padded on the right, or labels.
    """
    if forward.kwargs.get("labels") is not None:
        raise BadInput(f"{method.name} drops rows of the prompt, so labels would not fit it.")
    frame = forward.frame
    length = frame.ledger.prompt_length
    if frame.queries < length:
        raise CompositionError(
            f"{method.name} must see the whole prompt at once, but this forward holds "
            f"{frame.queries} of its {length} tokens (chunked prefill, or a later turn over a "
            "cache). Generate without prefill_chunk_size or past_key_values."
        )
    if bool((frame.ledger.kinds[:, length - 1] == PAD).any()):
        raise BadInput(
            f"{method.name} looks at the last column of a prompt, which is padded. Pad on the left."
        )


def _cut_inputs(
    dropped: Dropped, frame: Frame, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a decoder layer for the columns that stay."""
    changed = dict(kwargs)
    total = frame.past + frame.queries
    places = dropped.places(total)
    rows = None
    if frame.past == 0:  # the prompt, and what follows it without a cache
        rows = places
        hidden = args[0] if args else kwargs["hidden_states"]
        if layer == dropped.first:
            hidden = _take(hidden, places)
        args = (hidden, *args[1:]) if args else args
        if not args:
            changed["hidden_states"] = hidden
        positions = kwargs.get("position_embeddings")
        if positions is not None:
            changed["position_embeddings"] = tuple(_take(x, places) for x in positions)
        if kwargs.get("position_ids") is not None:
            ids = kwargs["position_ids"]
            changed["position_ids"] = _take(ids[..., None], places)[..., 0]
        for name in TOKEN_TYPES:
            if kwargs.get(name) is not None:  # experts of their own for visual tokens
                changed[name] = _take(kwargs[name][..., None], places)[..., 0]
    filler = torch.nn.functional.pad(dropped.filler, (0, places.shape[1] - dropped.filler.shape[1]))
    mask = kwargs.get("attention_mask")
    changed["attention_mask"] = _cut_mask(mask, places, rows, filler)
    return args, changed


def _choose(
    method: LayerTokenMethod, attention: torch.Tensor, visual: torch.Tensor
) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """Ask a method which visual tokens of every prompt stay.

    Args:
        method: prepared.
        attention: (B, L) float32, what the last prompt token pays to each token.
        visual: (B, L) bool, which of them are visual tokens.

    Returns:
        (B, L) bool, the visual tokens that stay; and how many of how many do, for each prompt that
        has some.
    """
    kept, sizes = visual.clone(), []
    for row, mine in enumerate(visual):
        count = int(mine.sum())
        if not count:
            continue
        budget = method.budget(count)
        sizes.append((budget, count))
        if budget < count:
            chosen = torch.zeros(count, dtype=torch.bool, device=visual.device)
            chosen[method.keep(attention[row, mine], budget)] = True
            kept[row, mine] = chosen
    return kept, sizes


def _drop(
    method: LayerTokenMethod, frame: Frame, layer: int, attention: torch.Tensor
) -> Dropped | None:
    """What stays of every prompt; None if everything does."""
    ledger, call = frame.ledger, frame.call
    length = ledger.prompt_length
    visual = ledger.visual()[:, :length]
    kept, sizes = _choose(method, attention.to(visual.device), visual)
    copies = len(visual) // (call.rows or len(visual))  # beams and returned sequences agree
    call.visual_tokens = tuple(sizes[::copies])
    call.keep(KeptPlaceholders(kept[::copies]))
    if torch.equal(kept, visual):
        if method.tokens is None:
            warnings.warn(
                f"{method.name} drops none of the {int(visual.sum())} visual tokens of these "
                "prompts: so much of them is all. Give a smaller ratio, or larger images.",
                stacklevel=2,
            )
        return None
    keep = (ledger.kinds[:, :length] != PAD) & (kept | ~visual)
    width = int(keep.sum(1).max())
    index = keep.to(torch.uint8).argsort(dim=1, stable=True)[:, length - width :]
    return Dropped(layer, index, ~keep.gather(1, index), length)


def _take(values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """(..., B or 1, Q, D) at places (B, P) -> (..., B, P, D)."""
    places = places.to(values.device)
    values = values.expand(*values.shape[:-3], len(places), *values.shape[-2:])
    index = places[..., None].expand(*values.shape[:-2], places.shape[1], values.shape[-1])
    return values.gather(-2, index)


def _cut_mask(
    mask: torch.Tensor | None,
    places: torch.Tensor,
    rows: torch.Tensor | None,
    filler: torch.Tensor,
) -> torch.Tensor | None:
    """A mask (B, 1, Q, K), bool or additive, for the columns at `places`, and rows if given.

    Every row sees at least itself: one that sees nothing gives NaN in some implementations.
    """
    if mask is None:
        if not bool(filler.any()):
            return None
        visible = ~filler[:, None, None, :]
        if rows is None:
            return visible
        causal = torch.ones(rows.shape[1], rows.shape[1], dtype=torch.bool, device=rows.device)
        own = torch.eye(rows.shape[1], dtype=torch.bool, device=rows.device)
        return (visible & causal.tril()) | own
    if rows is not None:
        index = rows[:, None, :, None].to(mask.device)
        mask = mask.gather(2, index.expand(-1, mask.shape[1], -1, mask.shape[3]))
    index = places[:, None, None, :].to(mask.device)
    mask = mask.gather(3, index.expand(-1, mask.shape[1], mask.shape[2], -1))
    hidden = filler[:, None, None, :].to(mask.device)
    if rows is not None:
        hidden = hidden & ~torch.eye(rows.shape[1], dtype=torch.bool, device=mask.device)
    return mask.masked_fill(
        hidden, False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    )
