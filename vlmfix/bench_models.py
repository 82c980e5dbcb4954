"""The models that `vlmfix bench` times: the bundled one, and LLaVAs with random weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers

from vlmfix.loading import as_device, as_dtype, load, load_image

__all__ = ["MODELS", "SIZES", "Subject", "subject"]


@dataclass(frozen=True)
class Sizes:
    """Sizes of a LLaVA with random weights."""

    hidden: int
    layers: int
    heads: int
    mlp: int
    vocabulary: int
    image: int
    patch: int


SIZES = {
    "llava-300m": Sizes(1024, 24, 16, 2816, 8192, 336, 14),
    "llava-tiny": Sizes(64, 5, 4, 96, 128, 24, 4),
}
MODELS = ("emoji", *SIZES)


@dataclass(frozen=True)
class Subject:
    """A model and a prompt to time."""

    name: str
    model: Any
    inputs: dict[str, Any]
    device: str
    dtype: str
    visual_tokens: int


def subject(name: str, dtype: str, device: str, batch: int) -> Subject:
    """A model on its device and a prompt of `batch` equal rows for it."""
    where, kind = as_device(device), as_dtype(dtype)
    if name == "emoji":
        model, processor = load("emoji", dtype=kind, device=where)
        content = [{"type": "image"}, {"type": "text", "text": "Describe the image."}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        inputs = dict(processor(text=text, images=load_image("emoji:1"), return_tensors="pt"))
        inputs = {k: v.repeat(batch, *[1] * (v.ndim - 1)) for k, v in inputs.items()}
    else:
        model, inputs = _random_llava(SIZES[name], kind, batch)
        model = model.to(where)
    moved = {key: value.to(where) for key, value in inputs.items()}
    moved["pixel_values"] = moved["pixel_values"].to(kind)
    visual = int((moved["input_ids"][0] == model.config.image_token_id).sum())
    return Subject(name, model, moved, device, str(kind).removeprefix("torch."), visual)


def _random_llava(sizes: Sizes, dtype: torch.dtype, batch: int) -> tuple[Any, dict[str, Any]]:
    """A LLaVA with random weights, and a prompt of 4 + image + 28 tokens; the RNG is put back."""
    image_id = sizes.vocabulary - 1
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=sizes.hidden // 4,
            intermediate_size=sizes.hidden,
            num_hidden_layers=4,
            num_attention_heads=sizes.heads // 4,
            image_size=sizes.image,
            patch_size=sizes.patch,
        ),
        text_config=transformers.LlamaConfig(
            vocab_size=sizes.vocabulary,
            hidden_size=sizes.hidden,
            intermediate_size=sizes.mlp,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads,
            max_position_embeddings=4096,
        ),
        image_token_index=image_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()
        words = torch.randint(3, image_id, (32,))
        pixels = torch.randn(1, 3, sizes.image, sizes.image)
    image = torch.full(((sizes.image // sizes.patch) ** 2,), image_id)
    ids = torch.cat([words[:4], image, words[4:]]).repeat(batch, 1)
    return model, {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels.repeat(batch, 1, 1, 1),
    }
