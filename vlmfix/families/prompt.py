"""What the tokens of a prompt are, read from the arguments of a forward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vlmfix.errors import BadInput
from vlmfix.families import ModelInfo
from vlmfix.families.kinds import IMAGE, PAD, TEXT, VIDEO

__all__ = ["carries_vision", "every_row", "made_positions", "prompt_kinds", "require_image"]

#: Decoders that count positions by the attention mask where they are given none.
_COUNT_BY_MASK = ("opt",)

#: Keyword arguments whose presence says that a forward really carries images or video.
_VISION = (
    "mm_encoder_outputs",
    "pixel_values",
    "pixel_values_videos",
    "pixel_values_images",
    "image_pixel_values",
    "image_embeds",
    "image_hidden_states",
)


def prompt_kinds(
    info: ModelInfo, ids: torch.Tensor, past: int, kwargs: dict[str, Any]
) -> torch.Tensor:
    """Kinds (B, Q) of the prompt tokens in this forward."""
    kinds = torch.full(ids.shape, TEXT, dtype=torch.uint8, device=ids.device)
    if carries_vision(kwargs):
        for kind, tokens in (
            (IMAGE, info.image_token_ids),
            (VIDEO, info.video_token_ids),
        ):
            for token in tokens:
                kinds[ids == token] = kind
    mask = kwargs.get("attention_mask")
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
    if isinstance(mask, torch.Tensor):
        window = slice(past, past + ids.shape[1])
        if mask.ndim == 2:
            missing = max(0, window.stop - mask.shape[1])  # transformers hides what a mask lacks
            kinds[torch.nn.functional.pad(mask, (0, missing))[:, window] == 0] = PAD
        else:  # already expanded, as for a static cache; additive masks are 0 where visible
            visible = mask if mask.dtype == torch.bool else mask == 0
            kinds[~visible[:, 0, -1, window]] = PAD
    return kinds


def require_image(info: ModelInfo, kinds: torch.Tensor, kwargs: dict[str, Any]) -> None:
    """Refuse a whole prompt that carries images and shows no place for them."""
    if carries_vision(kwargs) and not bool(((kinds == IMAGE) | (kinds == VIDEO)).any()):
        raise BadInput(
            "images were passed, but the prompt holds no image token (id "
            f"{', '.join(map(str, info.image_token_ids))}). Build the prompt with the "
            "model's processor, or use vlmfix.generate()."
        )


def every_row(info: ModelInfo, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a forward in which every layer computes every row.

    Where the rows that need logits are given as a number, Gemma 4 leaves the others out of layers
    that read the keys of earlier ones; edits, and whoever looks, need the whole prompt there.
    """
    kept = kwargs.get("logits_to_keep")
    if not info.shared_keys or not isinstance(kept, int) or not kept:
        return kwargs
    return {**kwargs, "logits_to_keep": torch.arange(-kept, 0)}


def carries_vision(kwargs: Mapping[str, Any]) -> bool:
    """Whether the arguments of a forward bring images or video, as pixels or as features."""
    values = [kwargs.get(name) for name in _VISION]
    return any(bool(v) if isinstance(v, dict) else v is not None for v in values)


def made_positions(info: ModelInfo, real: torch.Tensor) -> torch.Tensor:
    """Positions (B or 1, L) that a decoder itself gives to tokens; `real` (B, L): no padding."""
    if info.text_type in _COUNT_BY_MASK:
        return (real.long().cumsum(1) - 1).clamp(min=0)
    return torch.arange(real.shape[1], device=real.device)[None]
