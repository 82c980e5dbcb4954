"""What vlmfix knows about a model: where its decoder is, and which ids stand for visual tokens.

One generic rule serves every family whose language model attends to visual tokens that sit in
the prompt as placeholder ids; the table below holds what departs from it. Facts are read from
the model object, never from its name, and checked again on the first forward (session.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from vlmfix.errors import UnsupportedModel

__all__ = [
    "REFUSED",
    "ModelInfo",
    "describe_model",
    "last_logits",
    "vision_arguments",
    "vision_names",
]

#: Families that the generic rule cannot serve, by `config.model_type`, with the reason.
REFUSED: dict[str, str] = {
    "instructblipvideo": (
        "it takes videos alone, and its generate() runs the language model inside on embeddings"
    ),
    "kosmos-2": "image positions are given by a mask, not by a placeholder id",
    "kosmos-2.5": "image positions are given by a mask, not by a placeholder id",
    "mllama": "images enter through cross-attention layers, not as visual tokens in the prompt",
    "phi4_multimodal": "its vision tower shares the text configuration; no run of it was checked",
}


#: Families whose prompt tokens attend to all of the prompt, also to what comes later.
_PREFIX_MODELS = ("paligemma",)


@dataclass(frozen=True)
class ModelInfo:
    """Structure of one model, as plain numbers and references to its modules.

    `layers` are the decoder layers; `attention` maps the index of every layer with softmax
    attention to its module (hybrid models lack some); `image_token_ids` and `video_token_ids`
    are the placeholder ids.
    """

    model_type: str
    text_type: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    image_token_ids: tuple[int, ...]
    video_token_ids: tuple[int, ...]
    layers: tuple[torch.nn.Module, ...] = field(repr=False)
    attention: dict[int, torch.nn.Module] = field(repr=False)

    @property
    def sees_whole_prompt(self) -> bool:
        """Whether prompt tokens attend to later prompt tokens, too (a prefix language model)."""
        return self.model_type in _PREFIX_MODELS


def describe_model(model: torch.nn.Module) -> ModelInfo:
    """Read the structure of a Hugging Face VLM.

    Raises:
        UnsupportedModel: no configuration, a text-only or encoder-decoder model, a family of
            `REFUSED`, no decoder layers, or no attention that goes through transformers'
            attention interface.
    """
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(model, "generate"):
        raise UnsupportedModel(
            f"{type(model).__name__} is not a Hugging Face generation model (it has no config or "
            "no generate()). Load it with AutoModelForImageTextToText.from_pretrained(...)."
        )
    if hasattr(model, "get_base_model"):
        raise UnsupportedModel(
            f"{type(model).__name__} is a PEFT model, whose own hooks never fire inside "
            "generate(). Wrap the base instead: vlmfix.wrap(model.get_base_model(), ...)."
        )
    model_type = str(getattr(config, "model_type", "unknown"))
    if model_type in REFUSED:
        raise UnsupportedModel(
            f"model type {model_type!r} is not supported: {REFUSED[model_type]}. "
            "`vlmfix doctor` lists what is."
        )
    text_config = config.get_text_config(decoder=True)
    if any(getattr(one, "is_encoder_decoder", False) for one in (config, text_config)):
        raise UnsupportedModel(
            f"model type {model_type!r} is an encoder-decoder model; vlmfix works on decoder-only "
            "language models that attend to visual tokens in their prompt."
        )
    images = _token_ids(config, "image_token_id")
    videos = _token_ids(config, "video_token_id")
    if not images or text_config is config:
        raise UnsupportedModel(
            f"model type {model_type!r} shows no image token id and no language model of its own: "
            "it looks like a text-only model. vlmfix needs a vision-language model, e.g. one "
            "loaded with AutoModelForImageTextToText."
        )
    layers = _decoder_layers(model, model_type)
    attention = _attention_modules(layers)
    if not attention:
        raise UnsupportedModel(
            f"model type {model_type!r}: none of the {len(layers)} decoder layers has an attention "
            "module with `layer_idx` and `config`, so no edit could reach it."
        )
    can_switch = getattr(type(model), "_can_set_attn_implementation", None)
    if can_switch is not None and not can_switch():
        raise UnsupportedModel(
            f"{type(model).__name__} does not dispatch through transformers' attention interface "
            "(old remote code?). Use the version of this model that is part of transformers."
        )
    heads = int(text_config.num_attention_heads)
    hidden = int(text_config.hidden_size)
    return ModelInfo(
        model_type=model_type,
        text_type=str(text_config.model_type),
        hidden_size=hidden,
        num_layers=len(layers),
        num_heads=heads,
        num_key_value_heads=int(getattr(text_config, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(text_config, "head_dim", None) or hidden // heads),
        vocab_size=int(text_config.vocab_size),
        image_token_ids=images,
        video_token_ids=videos,
        layers=layers,
        attention=attention,
    )


def last_logits(model: Any, count: int) -> dict[str, int]:
    """The argument that makes a forward compute its last `count` logits only, if it has one."""
    takes = "logits_to_keep" in inspect.signature(model.forward).parameters
    return {"logits_to_keep": count} if takes else {}


def vision_arguments(model: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Those arguments of a forward or of generate() that carry images and video.

    They are what the model's own vision encoder takes, and features that it gave before
    (`mm_encoder_outputs`).
    """
    names = {"mm_encoder_outputs", *vision_names(model)}
    return {name: kwargs[name] for name in names if kwargs.get(name) is not None}


def vision_names(model: Any) -> frozenset[str]:
    """Names of the arguments that the model's own vision encoder takes."""
    names: set[str] = set()
    for encoder in ("get_image_features", "get_video_features"):
        function = getattr(model.base_model, encoder, None)
        if function is not None:
            names.update(inspect.signature(function).parameters)
    return frozenset(names - {"kwargs", "return_dict", "input_ids", "attention_mask"})


def _token_ids(config: Any, name: str) -> tuple[int, ...]:
    value = getattr(config, name, None)
    return () if value is None else (int(value),)


def _decoder_layers(model: Any, model_type: str) -> tuple[torch.nn.Module, ...]:
    """Descend from get_decoder() to the module that holds `.layers`.

    Some families return a causal language model there, whose decoder is one step further down.
    """
    decoder = model.get_decoder()
    while decoder is not None and not hasattr(decoder, "layers"):
        decoder = getattr(decoder, "model", None) or getattr(decoder, "decoder", None)
    if decoder is None:
        raise UnsupportedModel(
            f"model type {model_type!r}: no decoder layers below get_decoder(). "
            "docs/add-a-model.md tells how to describe a new family."
        )
    return tuple(decoder.layers)


def _attention_modules(layers: tuple[torch.nn.Module, ...]) -> dict[int, torch.nn.Module]:
    found: dict[int, torch.nn.Module] = {}
    for index, layer in enumerate(layers):
        for child in layer.children():
            named = "Attention" in type(child).__name__
            if named and getattr(child, "layer_idx", None) == index and hasattr(child, "config"):
                found[index] = child
    return found
