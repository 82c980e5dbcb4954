"""How a module of this folder adds a family, and what several of them share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from tiny_configs import BOI, EOI, IMAGE, VIDEO, VISION_END, VISION_START
from tiny_layouts import Inputs, Layout, mm_types, qwen_patches
from transformers.modeling_outputs import BaseModelOutputWithPooling

Build = Callable[[], Any]

BUILDERS: dict[str, Build] = {}
LAYOUTS: dict[str, Layout] = {}

FOUR = {"num_hidden_layers": 4}
HYBRID = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
LINEAR = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
SIGLIP = {"vision_use_head": False}
SAM = {
    "hidden_size": 32,
    "output_channels": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 16,
    "window_size": 2,
    "global_attn_indexes": [1],
    "mlp_dim": 48,
}
GLM_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "image_start_token_id": VISION_START,
    "image_end_token_id": VISION_END,
    "video_start_token_id": BOI,
    "video_end_token_id": EOI,
}


def family(layout: Layout) -> Callable[[Build], Build]:
    """Add the decorated builder under its name, with the way its inputs are made."""

    def note(function: Build) -> Build:
        BUILDERS[function.__name__] = function
        LAYOUTS[function.__name__] = layout
        return function

    return note


def patches(
    *shape: int, grid: tuple[int, int, int] = (1, 4, 4), **more: Any
) -> Callable[[int, torch.Generator], Inputs]:
    """All patches of a batch on one axis, each of `shape`, with a grid per image.

    Args:
        shape: of one patch.
        grid: frames, rows and columns of patches of each image.
        more: further inputs, the same value for each image.
    """
    count = grid[0] * grid[1] * grid[2]

    def pixels(batch: int, generator: torch.Generator) -> Inputs:
        values = torch.randn(batch * count, *shape, generator=generator)
        extra = {name: torch.tensor([value] * batch) for name, value in more.items()}
        return {"pixel_values": values, "image_grid_thw": torch.tensor([grid] * batch), **extra}

    return pixels


def picture(
    side: int, *shape: int, name: str = "pixel_values"
) -> Callable[[int, torch.Generator], Inputs]:
    """Pictures (B, *shape, side, side) under this name."""

    def pixels(batch: int, generator: torch.Generator) -> Inputs:
        return {name: torch.randn(batch, *shape, side, side, generator=generator)}

    return pixels


def qwen(
    pixels: Callable[[int, torch.Generator], Inputs] = qwen_patches, tokens: int = 4
) -> Layout:
    """An image between two markers, and a type for each token."""
    return Layout(tokens, pixels, (VISION_START,), (VISION_END,), extra=mm_types)


def spans(
    pixels: Callable[[int, torch.Generator], Inputs] = qwen_patches, tokens: int = 4
) -> Layout:
    """The same for families that take no types of tokens."""
    return Layout(tokens, pixels, (VISION_START,), (VISION_END,))


class Convolutions(torch.nn.Module):
    """In place of a convolutional tower of timm (not installed): (B, width, rows, columns)."""

    def __init__(self, width: int, patch: int, config: Any) -> None:
        super().__init__()
        self.config = config
        self.convolution = torch.nn.Conv2d(3, width, patch, patch)

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> Any:
        return BaseModelOutputWithPooling(last_hidden_state=self.convolution(pixel_values))


class Patches(Convolutions):
    """In place of a vision transformer of timm: (B, 1 + patches, width), a class token first."""

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> Any:
        x = self.convolution(pixel_values).flatten(2).transpose(1, 2)
        with_class = torch.cat([x.mean(1, keepdim=True), x], dim=1)
        return BaseModelOutputWithPooling(last_hidden_state=with_class)


def with_tower(
    module: Any, kind: str, tower: Callable[[Any], torch.nn.Module], build: Build
) -> Any:
    """Build a model whose vision tower, of a `model_type` with `kind` in it, is `tower(config)`.

    Args:
        module: the modeling file, which makes its towers by AutoModel.
    """
    auto = module.AutoModel

    class Replacement:
        @staticmethod
        def from_config(config: Any, **kwargs: Any) -> Any:
            replaced = kind in config.model_type
            return tower(config) if replaced else hf.AutoModel.from_config(config, **kwargs)

    module.AutoModel = Replacement
    try:
        return build()
    finally:
        module.AutoModel = auto
