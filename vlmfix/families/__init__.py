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
from vlmfix.families.served import served_model
from vlmfix.families.source import uses_interface

__all__ = [
    "REFUSED",
    "ModelInfo",
    "describe_model",
    "last_logits",
    "pixel_names",
    "require_visual_tokens",
    "vision_arguments",
    "vision_names",
]

#: Families that the generic rule cannot serve, by `config.model_type`, with the reason.
REFUSED: dict[str, str] = {
    "instructblipvideo": (
        "it takes videos alone, and its generate() runs the language model inside on embeddings"
    ),
    "blip": "images enter through cross-attention layers, not as visual tokens in the prompt",
    "evolla": "it answers questions about proteins; there is no image in its prompts",
    "git": "image features stand in front of the text without a placeholder in the prompt",
    "idefics": "images enter through cross-attention layers, not as visual tokens in the prompt",
    "kosmos-2": "image positions are given by a mask, not by a placeholder id",
    "kosmos-2.5": "image positions are given by a mask, not by a placeholder id",
    "pi0": "it predicts the actions of a robot and generates no text",
}


#: What configurations call the number of copies of the residual stream (AltUp, hyper-connections).
_STREAMS = ("altup_num_inputs", "hc_mult", "hc_count")

#: What Mllama's forward takes of images.
_MLLAMA = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask", "cross_attention_mask")

#: Families whose prompt tokens attend to all of the prompt, also to what comes later.
_PREFIX_MODELS = ("paligemma",)


@dataclass(frozen=True)
class ModelInfo:
    """Structure of one model, as plain numbers and references to its modules.

    `layers` are the decoder layers; `attention` maps the index of every layer with softmax
    attention to its module (hybrid models lack some); `image_token_ids` and `video_token_ids`
    are the placeholder ids.

    Layers may differ: `num_heads`, `num_key_value_heads` and `head_dim` are the largest numbers,
    and `fewer_heads` maps the index of each layer with fewer query heads to their number.
    `shared_keys` maps a layer that computes no keys of its own to the layer whose keys it reads.
    `streams` is the number of copies of the residual stream between layers. `cross_attention` are
    the layers through which images enter, where the prompt has none of their tokens.
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
    fewer_heads: dict[int, int] = field(repr=False)
    shared_keys: dict[int, int] = field(repr=False)
    streams: int
    cross_attention: tuple[int, ...] = ()

    def heads_of(self, layer: int) -> int:
        """Query heads of a layer with attention."""
        return self.fewer_heads.get(layer, self.num_heads)

    @property
    def sees_whole_prompt(self) -> bool:
        """Whether prompt tokens attend to later prompt tokens, too (a prefix language model)."""
        return self.model_type in _PREFIX_MODELS


def describe_model(model: torch.nn.Module) -> ModelInfo:
    """Read the structure of a Hugging Face VLM.

    Raises:
        UnsupportedModel: a module around a model, no configuration, a text-only or
            encoder-decoder model, a family of `REFUSED`, no decoder layers, or no attention that
            goes through transformers' attention interface.
    """
    model = served_model(model)
    config: Any = getattr(model, "config", None)
    model_type = str(getattr(config, "model_type", "unknown"))
    if model_type in REFUSED:
        raise UnsupportedModel(
            f"model type {model_type!r} is not supported: {REFUSED[model_type]}. "
            "`vlmfix doctor` lists what is."
        )
    if config is None or not hasattr(model, "generate"):
        raise UnsupportedModel(
            f"{type(model).__name__} is not a Hugging Face generation model (it has no config or "
            "no generate()). Load it with AutoModelForImageTextToText.from_pretrained(...)."
        )
    text_config = config.get_text_config(decoder=True)
    if any(getattr(one, "is_encoder_decoder", False) for one in (config, text_config)):
        raise UnsupportedModel(
            f"model type {model_type!r} is an encoder-decoder model; vlmfix works on decoder-only "
            "language models that attend to visual tokens in their prompt."
        )
    images = _token_ids(config, "image_token_id")
    videos = _token_ids(config, "video_token_id")
    if not images:
        raise _without_images(config, model_type)
    layers = _decoder_layers(model, model_type)
    attention = _attention_modules(layers)
    if not attention:
        raise UnsupportedModel(
            f"model type {model_type!r}: none of the {len(layers)} decoder layers has an attention "
            "module with `layer_idx` and `config`, so no edit could reach it."
        )
    closed = sorted({type(m).__name__ for m in attention.values() if not uses_interface(m)})
    if closed:
        raise UnsupportedModel(
            f"{', '.join(closed)} of {type(model).__name__} does not dispatch through "
            "transformers' attention interface (old remote code?). Use the version of this model "
            "that is part of transformers."
        )
    configs = {layer: _layer_config(text_config, layer) for layer in attention}
    hidden = int(text_config.hidden_size)
    heads = {layer: int(own.num_attention_heads) for layer, own in configs.items()}
    return ModelInfo(
        model_type=model_type,
        text_type=str(text_config.model_type),
        hidden_size=hidden,
        num_layers=len(layers),
        num_heads=max(heads.values()),
        num_key_value_heads=max(
            int(getattr(own, "num_key_value_heads", None) or heads[layer])
            for layer, own in configs.items()
        ),
        head_dim=max(
            int(getattr(own, "head_dim", None) or hidden // heads[layer])
            for layer, own in configs.items()
        ),
        vocab_size=int(text_config.vocab_size),
        image_token_ids=images,
        video_token_ids=videos,
        layers=layers,
        attention=attention,
        fewer_heads={at: count for at, count in heads.items() if count < max(heads.values())},
        shared_keys=_shared_keys(text_config, len(layers)),
        streams=max(int(getattr(text_config, name, None) or 1) for name in _STREAMS),
        cross_attention=_cross_attention(layers),
    )


def require_visual_tokens(info: ModelInfo, what: str) -> None:
    """Refuse `what` on a model whose prompts hold no visual tokens.

    Raises:
        UnsupportedModel: images enter through cross-attention.
    """
    if info.cross_attention:
        raise UnsupportedModel(
            f"{what} needs visual tokens among those of the prompt, and in model type "
            f"{info.model_type!r} images enter through cross-attention (layers "
            f"{', '.join(map(str, info.cross_attention))}): no attention is shared between them "
            "and the text. Use a method that contrasts logits: m3id, vcd, pai_guidance."
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
    if model.config.model_type == "mllama":  # has no such function; its mask says who sees what
        names.update(_MLLAMA)
    return frozenset(names - {"kwargs", "return_dict", "input_ids", "attention_mask"})


def pixel_names(vision: Mapping[str, Any]) -> list[str]:
    """Those of the arguments of a vision encoder that hold pixels, not sizes, masks or features."""
    return [name for name, value in vision.items() if "pixel_values" in name and value is not None]


def _token_ids(config: Any, name: str) -> tuple[int, ...]:
    """What a configuration, or that of its vision tower, names as the placeholder."""
    places = (config, getattr(config, "vision_config", None))
    named = (getattr(place, name, None) for place in places)
    return next(((int(value),) for value in named if value is not None), ())


def _without_images(config: Any, model_type: str) -> UnsupportedModel:
    text_only = config.get_text_config() is config and not hasattr(config, "vision_config")
    looks = ": it looks like a text-only model" if text_only else ""
    return UnsupportedModel(
        f"model type {model_type!r} names no image token id in its configuration{looks}. vlmfix "
        "needs a vision-language model whose images stand in the prompt as placeholder tokens, "
        "e.g. one loaded with AutoModelForImageTextToText."
    )


def _layer_config(text_config: Any, layer: int) -> Any:
    """The configuration of one layer, where layers differ; else that of all."""
    differ = getattr(text_config, "is_heterogeneous", False)
    return text_config.per_layer_config[layer] if differ else text_config


def _shared_keys(text_config: Any, layers: int) -> dict[int, int]:
    """{layer: layer whose keys it reads}: the last of its kind that computes keys (Gemma 3n, 4)."""
    shared = int(getattr(text_config, "num_kv_shared_layers", None) or 0)
    own = layers - shared
    kinds = text_config.layer_types if shared else ()
    return {
        layer: max(source for source in range(own) if kinds[source] == kinds[layer])
        for layer in range(own, layers)
        if shared
    }


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


def _cross_attention(layers: tuple[torch.nn.Module, ...]) -> tuple[int, ...]:
    return tuple(
        index
        for index, layer in enumerate(layers)
        if any("CrossAttention" in type(child).__name__ for child in layer.children())
    )


def _attention_modules(layers: tuple[torch.nn.Module, ...]) -> dict[int, torch.nn.Module]:
    """{layer: its attention to the prompt}."""
    found: dict[int, torch.nn.Module] = {}
    for index, layer in enumerate(layers):
        for child in layer.children():
            name = type(child).__name__
            named = "Attention" in name and "CrossAttention" not in name
            if named and getattr(child, "layer_idx", None) == index and hasattr(child, "config"):
                found[index] = child
    return found
