"""The structure of a model as vlmfix reads it, and the methods that fit it: `vlmfix doctor`."""

from __future__ import annotations

from typing import Any

import torch
from transformers.utils import is_torchvision_available

from vlmfix.analysis.calibrate import load_calibration
from vlmfix.engine.stages import fitted_stack, idle
from vlmfix.errors import VlmfixError
from vlmfix.families import describe_model
from vlmfix.registry import list_methods

__all__ = ["examine"]


def examine(model: torch.nn.Module) -> dict[str, Any]:
    """Describe a model as plain data, without running or changing it.

    Returns:
        `supported` and `reason`; the structure as vlmfix reads it; the calibration, if there is
        one; and for every method whether it fits, and why not.
    """
    config: Any = getattr(model, "config", None)
    report: dict[str, Any] = {
        "class": type(model).__name__,
        "model_type": getattr(config, "model_type", None),
        "supported": True,
        "reason": None,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "torchvision": is_torchvision_available(),
    }
    try:
        info = describe_model(model)
    except VlmfixError as error:
        return {**report, "supported": False, "reason": str(error), "methods": []}
    skipped = sorted(set(range(info.num_layers)) - set(info.attention))
    vision = getattr(config, "vision_config", None)
    calibration = load_calibration(model)
    return {
        **report,
        "text_type": info.text_type,
        "layers": info.num_layers,
        "attention_layers": len(info.attention),
        "layers_without_attention": skipped,
        "heads": info.num_heads,
        "kv_heads": info.num_key_value_heads,
        "head_dim": info.head_dim,
        "hidden_size": info.hidden_size,
        "vocabulary": info.vocab_size,
        "image_token_id": info.image_token_ids[0],
        "video_token_id": info.video_token_ids[0] if info.video_token_ids else None,
        "visual_tokens": _visual_tokens(config),
        "vision_tower": getattr(vision, "model_type", None),
        "attention_implementation": config.get_text_config(decoder=True)._attn_implementation,
        "calibration": calibration.to_dict() if calibration else None,
        "methods": [_fit(row.name, info, model) for row in list_methods()],
    }


def _fit(name: str, info: Any, model: torch.nn.Module) -> dict[str, Any]:
    try:
        (prepared,) = fitted_stack(model, info, name).methods
    except VlmfixError as error:
        return {"name": name, "fits": False, "why": str(error)}
    if reason := idle(prepared, info):
        return {"name": name, "fits": False, "why": f"would change nothing: {reason}"}
    return {"name": name, "fits": True, "why": f"runs as {prepared.spec()}"}


def _is_a_grid(count: int, vision: Any) -> bool:
    """Whether so many tokens are the tower's patches, up to 4 x 4 of them to a token.

    Pixtral's checkpoints say 1: their images have as many tokens as their size makes.
    """
    sides = (getattr(vision, name, None) for name in ("image_size", "patch_size"))
    size, patch = (side[0] if isinstance(side, (list, tuple)) else side for side in sides)
    if not size or not patch:
        return False
    return any(count * merge**2 == (size // patch) ** 2 for merge in range(1, 5))


def _visual_tokens(config: Any) -> str:
    """The number of placeholders per image, as far as the configuration tells it."""
    fixed = getattr(config, "image_seq_length", None) or getattr(
        config, "mm_tokens_per_image", None
    )
    if getattr(config, "image_grid_pinpoints", None):
        return "by image: a base grid, tiles by the image's shape, and newline tokens"
    if fixed and _is_a_grid(fixed, getattr(config, "vision_config", None)):
        return f"{fixed} per image, or per tile where the processor cuts images"
    return "by image size; counted from the prompt's placeholder ids"
