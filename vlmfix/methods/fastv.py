"""FastV: drop visual tokens after the first layers, by the last prompt token's attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from vlmfix.base.method import option
from vlmfix.base.pruning import LayerTokenMethod, largest
from vlmfix.errors import BadInput, UnsupportedModel
from vlmfix.families import ModelInfo
from vlmfix.families.tower import last_entry

__all__ = ["FastV"]


@dataclass(frozen=True)
class FastV(LayerTokenMethod):
    """Keep the visual tokens that the last prompt token attends to most in an early layer.

    Chen et al.: "An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration
    for Large Vision-Language Models", ECCV 2024, arXiv 2403.06764. Layers before `layer` run on the
    whole prompt; from that layer on, hidden states, KV cache and masks hold only the kept tokens,
    at their original positions.

    Paper and code: the paper speaks of the attention that a token receives, the code takes the row
    of the last prompt token, mean over heads, and so does this. The paper drops half of the tokens
    after two layers; a script of the authors uses three. The code runs one prompt at a time with a
    fixed span of image tokens; here every prompt of a batch has a budget of its own.
    """

    layer: int | None = option(
        None,
        "first decoder layer, counted from 0, that runs without the dropped tokens; default: 2, or "
        "where image features have entered (Qwen3-VL: 3)",
    )

    name: ClassVar[str] = "fastv"
    default_ratio: ClassVar[float] = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer is not None and self.layer < 1:
            raise BadInput(
                f"fastv: layer={self.layer} leaves no layer to choose by; give 1 or more."
            )

    def prepared(self, info: ModelInfo, model: Any) -> FastV:
        entered = last_entry(model.config)
        layer = self.layer
        if layer is None:  # the layer before has to have attention to choose by
            late = (at + 1 for at in sorted(info.attention) if at + 1 >= max(2, entered))
            layer = next(late, 2)
        if not entered <= layer < info.num_layers:
            raise BadInput(
                f"fastv: layer={layer} must be below {info.num_layers}, the layers of this "
                f"model, and at least {max(1, entered)}: image features enter before that."
            )
        text = model.config.get_text_config(decoder=True)
        if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=text).layers):
            raise UnsupportedModel(
                f"fastv cannot run on model type {info.model_type!r}: its sliding or recurrent "
                "layers do not keep all keys, so there are none to drop. Prune before the language "
                "model instead (hiprune, divprune, ...)."
            )
        if layer - 1 not in info.attention:
            raise BadInput(
                f"fastv: layer {layer - 1} of this model has no attention to choose by. "
                f"Choose layer so that layer - 1 is one of {sorted(info.attention)}."
            )
        return replace(self, layer=layer)

    def first_layer(self, info: ModelInfo) -> int:
        assert self.layer is not None  # set by prepared()
        return self.layer

    def keep(self, attention: torch.Tensor, budget: int) -> torch.Tensor:
        return largest(attention, budget)
