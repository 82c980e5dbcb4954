"""How tiny models get their inputs: pixels, markers of an image, and what is read off the ids."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tiny_configs import BOI, EOI, IMAGE, VISION_END, VISION_START
from torch import Tensor

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Layout:
    """How a family writes one image into the prompt and hands over its pixels."""

    image_tokens: int
    pixels: Callable[[int, torch.Generator], Inputs]
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    lead: int = 1
    """Random text tokens between the first token and the image."""
    extra: Callable[[Tensor], Inputs] | None = None
    """More inputs, computed from the input ids."""
    side_by_side: bool = False
    """Whether the pixels of a batch lie next to each other on the last axis, not on the first."""
    places: str | None = None
    """An input that counts the patches of the whole batch; that of one row starts at 0."""


def small_picture(*shape: int) -> Callable[[int, torch.Generator], Inputs]:
    def pixels(batch: int, generator: torch.Generator) -> Inputs:
        return {"pixel_values": torch.randn(batch, *shape, 16, 16, generator=generator)}

    return pixels


def sized(side: int, *shape: int) -> Callable[[int, torch.Generator], Inputs]:
    def pixels(batch: int, generator: torch.Generator) -> Inputs:
        sizes = torch.tensor([[side, side]] * batch)
        return {**small_picture(*shape)(batch, generator), "image_sizes": sizes}

    return pixels


def qwen_patches(batch: int, generator: torch.Generator) -> Inputs:
    # 4 x 4 patches of 4 x 4 pixels, 3 channels, each frame twice: the Qwen layout.
    values = torch.randn(batch * 16, 3 * 2 * 4 * 4, generator=generator)
    return {"pixel_values": values, "image_grid_thw": torch.tensor([[1, 4, 4]] * batch)}


def mllama_tiles(batch: int, generator: torch.Generator) -> Inputs:
    return {
        "pixel_values": torch.randn(batch, 1, 2, 3, 16, 16, generator=generator),
        "aspect_ratio_ids": torch.ones(batch, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.tensor([[[1, 0]]] * batch),
    }


def mllama_cross_mask(ids: Tensor) -> Inputs:
    seen = ((ids == IMAGE).long().cumsum(1) > 0).long()
    second_tile = torch.zeros_like(seen)
    return {"cross_attention_mask": torch.stack([seen, second_tile], dim=-1)[:, :, None]}


def qformer_question(ids: Tensor) -> Inputs:
    question = torch.arange(9, 14).repeat(ids.shape[0], 1)
    return {"qformer_input_ids": question, "qformer_attention_mask": torch.ones_like(question)}


def mm_types(ids: Tensor) -> Inputs:
    return {"mm_token_type_ids": (ids == IMAGE).long()}


def token_types(ids: Tensor) -> Inputs:
    return {"token_type_ids": (ids == IMAGE).long()}


def all_zero_types(ids: Tensor) -> Inputs:
    return {"token_type_ids": torch.zeros_like(ids)}


def kosmos_positions(ids: Tensor) -> Inputs:
    # Kosmos-2 has no image id: the places are told apart by this mask alone.
    image = ids == IMAGE
    return {"input_ids": ids.masked_fill(image, 3), "image_embeds_position_mask": image.long()}


def nothing(batch: int, generator: torch.Generator) -> Inputs:
    return {}


_QWEN = Layout(4, qwen_patches, (VISION_START,), (VISION_END,), extra=mm_types)
# An image of 32 x 32 is one base view and 2 x 2 tiles: 16 + 8 rows of 8 patches and a newline.
_TILED = Layout(88, sized(32, 5, 3))

LAYOUTS: dict[str, Layout] = {
    "llava": Layout(16, small_picture(3)),
    "llava_next": _TILED,
    "llava_onevision": _TILED,
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN,
    "glm4v": _QWEN,
    "internvl": Layout(4, small_picture(3)),
    "gemma3": Layout(4, small_picture(3), (BOI,), (EOI,), extra=token_types),
    "smolvlm": Layout(4, small_picture(1, 3)),
    "idefics3": Layout(4, small_picture(1, 3)),
    "paligemma": Layout(16, small_picture(3), lead=0, extra=all_zero_types),
    "mistral3": Layout(4, sized(16, 3)),
    "aya_vision": Layout(4, small_picture(3)),
    "mllama": Layout(1, mllama_tiles, extra=mllama_cross_mask),
    "instructblip": Layout(4, small_picture(3), extra=qformer_question),
    "kosmos2": Layout(4, small_picture(3), extra=kosmos_positions),
    "llama": Layout(0, nothing),
}
