"""Cutting tokens out of a prompt: which are real, what goes, how the rest closes up.

Everything here returns new tensors; what came in is never changed.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from vlmfix.errors import BadInput, UnsupportedModel
from vlmfix.families import ModelInfo

__all__ = [
    "PER_TOKEN",
    "TOKEN_TYPES",
    "compact",
    "module_state",
    "prompt_without_images",
    "real_tokens",
    "require_cuttable",
]

#: Names under which a model's configuration gives the ids that open and close a visual span. An
#: id counts only next to a placeholder: the opening one before it, the closing one after it.
#: InternVL, SmolVLM, Idefics3, Mistral 3 and Aya Vision name their wrappers in the tokenizer
#: alone, so no configuration tells them and they stay in the prompt.
_OPENING = ("vision_start_token_id", "image_start_token_id", "video_start_token_id", "boi_token_id")
_CLOSING = ("vision_end_token_id", "image_end_token_id", "video_end_token_id", "eoi_token_id")

#: Inputs that tell the type of each token, and all inputs with one entry per token.
TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
PER_TOKEN = ("input_ids", "position_ids", *TOKEN_TYPES)

#: Inputs that fill placeholders which are no visual tokens and would stay in the prompt, unfilled.
_AUDIO = ("input_features", "input_audio_embeds", "audio_values")

#: Attributes that a forward leaves on the model's modules (M-RoPE families).
_STATE = ("rope_deltas",)

_ABSENT = object()


def prompt_without_images(
    model: torch.nn.Module, info: ModelInfo, inputs: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments of a plain forward on the same prompts with every visual token deleted.

    Deleted are the image and video placeholders of `info`, and next to them the ids that open and
    close a visual span where the model's configuration names them (Qwen-VL, GLM-4V, Gemma 3,
    Llama 4, ...). Everything else stays: BOS, system prompt, newlines, the time stamps of a video.
    A row without visual tokens keeps its tokens. Rows are padded on the left to the new longest
    row, and positions restart without the gap.

    Args:
        model: the model that `info` describes; only its configuration is read.
        info: its description.
        inputs: keyword arguments of the model's forward or generate for whole prompts, with
            `input_ids` (B, L); see `real_tokens` for the masks that are understood. Not changed.

    Returns:
        `input_ids`, `attention_mask`, `position_ids`, each (B, L') int64, and those of
        `TOKEN_TYPES` that came in. Positions are two-dimensional for
        every family: M-RoPE models spread them over time, height and width, which is what they
        give text; PaliGemma counts from 1, which rotary embeddings, being relative, do not see.
        No pixels, no cache, no `use_cache`.

    Raises:
        BadInput: no `input_ids`; a mask that does not fit them; audio inputs; a row that holds
            nothing but visual tokens.
    """
    ids = inputs.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2:
        raise BadInput(
            "a prompt can be cut only where its token ids are known: pass input_ids of shape "
            "(batch, length). inputs_embeds alone do not tell where the image is."
        )
    audio = [name for name in _AUDIO if inputs.get(name) is not None]
    if audio:
        raise BadInput(
            f"the prompt carries audio ({', '.join(audio)}), whose placeholders a forward without "
            "images would leave unfilled. Ask about image and text only."
        )
    real = real_tokens(ids, inputs.get("attention_mask"))
    keep = real & ~_visual_span(ids, info, model.config)
    empty = (~keep.any(1)).nonzero().flatten().tolist()
    if empty:
        raise BadInput(
            f"row {empty[0]} of the prompt holds nothing but visual tokens, so nothing is left "
            "without them. Put a question or a start token into the prompt."
        )
    # Padding is masked, so its id is never seen; 0 is in every vocabulary.
    tensors = {"input_ids": (ids, 0)}
    for name in TOKEN_TYPES:
        values = inputs.get(name)
        if values is not None:
            tensors[name] = (values, 0)
    kept, mask = compact(keep, tensors)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {**kept, "attention_mask": mask, "position_ids": positions}


def require_cuttable(name: str, info: ModelInfo, model: torch.nn.Module) -> None:
    """Refuse a model whose prompts cannot be cut to some of their visual tokens.

    Args:
        name: of the method that would.
        info: structure of the model.
        model: the model.

    Raises:
        UnsupportedModel: such a model.
    """
    host: Any = model
    forward = inspect.signature(host.forward).parameters
    if not hasattr(host.base_model, "get_image_features"):
        reason = "it has no image encoder that can run by itself (get_image_features)"
    elif "mm_encoder_outputs" not in forward:
        reason = (
            "its forward takes no encoded features, which those of transformers do from "
            "transformers 5.21 on"
        )
    elif getattr(host.config, "deepstack_layer_map", None) is not None:
        reason = "its image features enter at many decoder layers, and none of them is the token"
    else:
        return
    raise UnsupportedModel(
        f"{name} hands a language model fewer visual tokens, which it cannot do on model type "
        f"{info.model_type!r}: {reason}. Use a method that keeps all of them (pai, vhr, m3id, ...)."
    )


def real_tokens(
    ids: torch.Tensor, mask: torch.Tensor | Mapping[str, torch.Tensor | None] | None
) -> torch.Tensor:
    """Which prompt tokens are no padding.

    Args:
        ids: (B, L) token ids of whole prompts.
        mask: the attention mask that came with them. None: no padding, which is also what
            generate() makes of a mask of ones. (B, L): nonzero for real tokens. (B, 1, L, K), as
            generate() prepares it for a static cache, bool (True: visible) or additive (0:
            visible); the first L of the K keys are the prompt. A dict of such masks by kind of
            layer, of which any serves.

    Returns:
        (B, L) bool, on the device of `ids`.

    Raises:
        BadInput: a mask of another shape.
    """
    if isinstance(mask, Mapping):
        mask = next((value for value in mask.values() if value is not None), None)
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    batch, length = ids.shape
    if tuple(mask.shape) == (batch, length):
        return (mask != 0).to(ids.device)
    if mask.ndim == 4 and mask.shape[0] == batch and mask.shape[2] == length <= mask.shape[3]:
        visible = mask if mask.dtype == torch.bool else mask == 0
        # A real token sees at least itself, behind a sliding window too; padding is never seen.
        return visible[:, 0].diagonal(dim1=1, dim2=2).to(ids.device)
    raise BadInput(
        f"attention_mask has shape {tuple(mask.shape)}, input_ids {tuple(ids.shape)}: the mask "
        "must cover the whole prompt, as (batch, length) or (batch, 1, length, keys)."
    )


def compact(
    keep: torch.Tensor, tensors: Mapping[str, tuple[torch.Tensor, int]]
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Drop tokens from every row, close up, and pad on the left to the new longest row.

    Args:
        keep: (B, L) bool, False on padding too.
        tensors: name -> (tensor (..., B, L), value of the new padding). Leading axes, such as the
            three of M-RoPE positions, are kept.

    Returns:
        ({name: tensor (..., B, L')}, attention mask (B, L') int64 with 0 on padding), where L' is
        the number of tokens that the longest row keeps.
    """
    width = int(keep.sum(1).max())
    # A stable sort of the flags moves what is dropped to the left and keeps every order.
    order = keep.to(torch.uint8).argsort(dim=1, stable=True)[:, keep.shape[1] - width :]
    kept = keep.gather(1, order)
    closed = {
        name: tensor.gather(-1, order.expand(*tensor.shape[:-1], width)).masked_fill(~kept, fill)
        for name, (tensor, fill) in tensors.items()
    }
    return closed, kept.long()


@contextmanager
def module_state(model: torch.nn.Module) -> Iterator[None]:
    """Put back, on exit, the state that a forward of another prompt leaves on the model.

    M-RoPE families store `rope_deltas` of the last prompt on a module and read it while decoding.
    """
    saved = [
        (module, name, module.__dict__.get(name, _ABSENT))
        for module in model.modules()
        for name in _STATE
    ]
    try:
        yield
    finally:
        for module, name, value in saved:
            if value is not _ABSENT:
                module.__dict__[name] = value
            else:
                module.__dict__.pop(name, None)


def _visual_span(ids: torch.Tensor, info: ModelInfo, config: Any) -> torch.Tensor:
    """(B, L) bool: visual placeholders, and the ids that open and close their spans."""
    visual = _one_of(ids, (*info.image_token_ids, *info.video_token_ids))
    opening = _one_of(ids, _named(config, _OPENING))
    closing = _one_of(ids, _named(config, _CLOSING))
    span = visual.clone()
    span[:, :-1] |= opening[:, :-1] & visual[:, 1:]
    span[:, 1:] |= closing[:, 1:] & visual[:, :-1]
    return span


def _one_of(ids: torch.Tensor, tokens: tuple[int, ...]) -> torch.Tensor:
    return torch.isin(ids, torch.tensor(tokens, dtype=ids.dtype, device=ids.device))


def _named(config: Any, names: tuple[str, ...]) -> tuple[int, ...]:
    found = (getattr(config, name, None) for name in names)
    return tuple(int(token) for token in found if token is not None)
