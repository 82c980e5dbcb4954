"""Massive activations: the measure that finds attention sinks, and the layers' inputs for it."""

from __future__ import annotations

from typing import Any

import torch

from vlmfix.families import ModelInfo
from vlmfix.families.inner import generating_module

__all__ = ["DEFAULT_FRACTION", "layer_inputs", "magnitude"]

#: Threshold as a share of sqrt(width), the largest value that magnitude() can take. VAR's 20 at
#: width 4096 is this share.
DEFAULT_FRACTION = 0.3125


def magnitude(hidden: torch.Tensor) -> torch.Tensor:
    """|x_d| / rms(x) of every channel, (..., D) -> (..., D) float32; without any norm weight."""
    hidden = hidden.float()
    return hidden.abs() * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-6)


def layer_inputs(
    model: torch.nn.Module, info: ModelInfo, inputs: dict[str, Any]
) -> dict[int, torch.Tensor]:
    """The residual stream (B, Q, D) that enters every decoder layer, before its norm."""
    seen: dict[int, torch.Tensor] = {}

    def keep(index: int) -> Any:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen[index] = (args[0] if args else kwargs["hidden_states"]).detach()

        return hook

    handles = [
        layer.register_forward_pre_hook(keep(index), with_kwargs=True)
        for index, layer in enumerate(info.layers)
    ]
    try:
        with torch.no_grad():
            generating_module(model)(**inputs)  # of BLIP-2, which takes no text without an image
    finally:
        for handle in handles:
            handle.remove()
    return seen
