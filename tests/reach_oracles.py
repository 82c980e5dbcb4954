"""What a method should give on any family, worked out by the model's own eager attention.

A layer's attention gets a mask of ours: scores lifted as PAI lifts them, or keys hidden that a
pruning method drops. What else the family hands to its attention goes to its own function, so
an argument that vlmfix does not know shows as a difference.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from vlmfix.families import ModelInfo

_NAME = "vlmfix_oracle"


class _Eager(str):
    """The oracle's name, equal to "eager" as well: sparse attention asks before it hides keys."""

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) or other == "eager"

    __hash__ = str.__hash__


@dataclass
class Edit:
    """What the oracle does to a forward without a cache.

    image: (B, K) bool, the visual tokens.
    lift: PAI's alpha, for the last row of every layer; 0: no lift.
    hidden: (B, K) bool, keys that no row sees from layer `first` on.
    choose: FastV: hide at layer `first` all but this share of the visual tokens, by the attention
        of the last row in the layer before.
    """

    image: torch.Tensor
    lift: float = 0.0
    hidden: torch.Tensor | None = None
    first: int = 0
    choose: float | None = None
    layers: dict[int, int] = field(default_factory=dict)

    def mask(self, inputs: dict[str, Any], mask: torch.Tensor) -> torch.Tensor:
        """The mask (B, H, Q, K) that makes the model's own attention do it."""
        layer = self.layers[id(inputs["module"])]
        if self.lift:
            lifted = (
                self.lift * _scores(**inputs).abs() * self.image[:, None, None, : mask.shape[3]]
            )
            lifted[:, :, :-1] = 0
            mask = mask + lifted
        if self.hidden is not None and layer >= self.first:
            hidden = self.hidden[:, None, None, : mask.shape[3]]
            mask = mask.masked_fill(hidden, torch.finfo(mask.dtype).min)
        return mask

    def see(self, layer: int, weights: torch.Tensor) -> None:
        """Choose, from the weights (B, H, Q, K) of a layer, what is hidden from the next on."""
        if self.choose is None or layer != self.first - 1:
            return
        received = weights[:, :, -1].float().mean(1)
        self.hidden = torch.zeros_like(self.image)
        for row, image in enumerate(self.image):
            places = image.nonzero().flatten()
            keep = max(1, round(len(places) * self.choose))
            order = received[row, places].argsort(descending=True, stable=True)
            self.hidden[row, places[order[keep:]]] = True


_current: Edit | None = None


def _scores(
    module: Any, query: torch.Tensor, key: torch.Tensor, arguments: dict[str, Any]
) -> torch.Tensor:
    """(B, H, Q, K): what the softmax gets of queries and keys."""
    scaling = arguments.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    keys = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query @ keys.transpose(2, 3) * scaling
    cap = arguments.get("softcap")
    return scores if cap is None else cap * torch.tanh(scores / cap)


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    **arguments: Any,
) -> Any:
    assert _current is not None
    eager = sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[attr-defined]
    rows, keys = query.shape[2], key.shape[2]
    lowest = torch.finfo(query.dtype).min
    if mask is None:
        causal = arguments.get("is_causal", getattr(module, "is_causal", True))
        mask = torch.zeros(rows, keys, dtype=query.dtype)
        mask = torch.full_like(mask, lowest).triu(keys - rows + 1) if causal else mask
        mask = mask[None, None]
    elif mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, lowest)
    mask = mask[..., :keys].expand(len(query), query.shape[1], rows, keys).clone()
    inputs = {"module": module, "query": query, "key": key, "arguments": arguments}
    mask = _current.mask(inputs, mask)
    output, weights = eager(module, query, key, value, mask, **arguments)
    _current.see(_current.layers[id(module)], weights)
    return output, weights


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, eager_mask)


@contextmanager
def oracle(model: Any, info: ModelInfo, edit: Edit) -> Iterator[None]:
    """Run a plain model with the edit."""
    global _current
    edit.layers = {id(module): layer for layer, module in info.attention.items()}
    before = {layer: module.config for layer, module in info.attention.items()}
    text = model.config.get_text_config(decoder=True)
    implementation = text._attn_implementation_internal
    text._attn_implementation_internal = "eager"
    for module in info.attention.values():
        own = copy.copy(module.config)
        own._attn_implementation_internal = _Eager(_NAME)  # type: ignore[union-attr]
        module.config = own  # type: ignore[assignment]
    _current = edit
    try:
        yield
    finally:
        _current = None
        text._attn_implementation_internal = implementation
        for layer, module in info.attention.items():
            module.config = before[layer]
