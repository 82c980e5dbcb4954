"""The models that `vlmfix bench` times: the bundled one, and random weights in known shapes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from vlmfix.chat import encode_chats
from vlmfix.errors import BadInput
from vlmfix.families import describe_model
from vlmfix.loading import as_device, as_dtype, load, load_image

__all__ = ["LARGE", "MODELS", "SHAPES", "Subject", "subject"]

TEXT_TOKENS = 28  # after the image, by default
_SCORE_DEVIATION = 2.0
_ROOM = 1.25  # memory that a large shape needs, in units of its weights


@dataclass(frozen=True)
class TowerSizes:
    """Sizes of a vision tower."""

    hidden: int
    layers: int
    heads: int
    mlp: int
    patch: int


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder, of its vision tower, and of its image in visual tokens.

    The four ids at the end of the vocabulary are image, video, start and end of vision.
    """

    hidden: int
    layers: int
    heads: int
    mlp: int
    vocabulary: int
    tower: TowerSizes
    side: int

    @property
    def decoder(self) -> dict[str, Any]:
        """The arguments of every decoder config."""
        return {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "max_position_embeddings": 2**17,  # rotary positions need no memory
            "bos_token_id": 1,
            "eos_token_id": 2,
        }

    def image(self) -> list[int]:
        """The prompt tokens of one image."""
        return [self.vocabulary - 1] * self.side**2

    def config(self) -> Any:
        """The configuration of the model."""
        raise NotImplementedError

    def pixels(self, batch: int) -> dict[str, torch.Tensor]:
        """The inputs of the vision tower, one random image per row."""
        raise NotImplementedError


class Llava(Shape):
    """LLaVA-1.5: CLIP, a projector, Llama with as many key heads as query heads."""

    def config(self) -> Any:
        tower = self.tower
        return transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(
                hidden_size=tower.hidden,
                intermediate_size=tower.mlp,
                num_hidden_layers=tower.layers,
                num_attention_heads=tower.heads,
                image_size=self.side * tower.patch,
                patch_size=tower.patch,
            ),
            text_config=transformers.LlamaConfig(**self.decoder),
            image_token_index=self.vocabulary - 1,
        )

    def pixels(self, batch: int) -> dict[str, torch.Tensor]:
        side = self.side * self.tower.patch
        return {"pixel_values": torch.randn(1, 3, side, side).repeat(batch, 1, 1, 1)}


@dataclass(frozen=True)
class Qwen(Shape):
    """Qwen2.5-VL: windowed tower, 2 x 2 patches per visual token, grouped-query attention."""

    key_heads: int
    rotary_sections: tuple[int, int, int]

    def config(self) -> Any:
        tower, last = self.tower, self.vocabulary - 1
        text = {
            **self.decoder,
            "num_key_value_heads": self.key_heads,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": list(self.rotary_sections),
            },
        }
        vision = {
            "depth": tower.layers,
            "hidden_size": tower.hidden,
            "intermediate_size": tower.mlp,
            "num_heads": tower.heads,
            "out_hidden_size": self.hidden,
            "patch_size": tower.patch,
            "window_size": 8 * tower.patch,
            "fullatt_block_indexes": list(range(tower.layers // 4 - 1, tower.layers, 8)),
        }
        return transformers.Qwen2_5_VLConfig(
            text_config=text,
            vision_config=vision,
            image_token_id=last,
            video_token_id=last - 1,
            vision_start_token_id=last - 2,
            vision_end_token_id=last - 3,
        )

    def image(self) -> list[int]:
        last = self.vocabulary - 1
        return [last - 2, *super().image(), last - 3]

    def pixels(self, batch: int) -> dict[str, torch.Tensor]:
        grid = 2 * self.side
        # Three channels of two frames each: an image is shown twice.
        patches = torch.randn(grid**2, 3 * 2 * self.tower.patch**2)
        return {
            "pixel_values": patches.repeat(batch, 1),
            "image_grid_thw": torch.tensor([[1, grid, grid]] * batch),
        }


SHAPES: dict[str, Shape] = {
    "llava-tiny": Llava(64, 5, 4, 96, 128, TowerSizes(16, 4, 1, 64, 4), 6),
    "llava-300m": Llava(1024, 24, 16, 2816, 8192, TowerSizes(256, 4, 4, 1024, 14), 24),
    "llava-1.5-7b": Llava(4096, 32, 32, 11008, 32064, TowerSizes(1024, 24, 16, 4096, 14), 24),
    "qwen2.5-vl-tiny": Qwen(64, 5, 4, 96, 128, TowerSizes(32, 4, 2, 48, 4), 6, 2, (2, 3, 3)),
    "qwen2.5-vl-7b": Qwen(
        3584, 28, 28, 18944, 152064, TowerSizes(1280, 32, 16, 3420, 14), 24, 4, (16, 24, 24)
    ),
}
#: Shapes for a GPU: on a CPU they run only if the device is asked for by name.
LARGE = frozenset({"llava-1.5-7b", "qwen2.5-vl-7b"})
MODELS = ("emoji", *SHAPES)


@dataclass(frozen=True)
class Subject:
    """A model and a prompt to time."""

    name: str
    model: Any
    inputs: dict[str, Any]
    device: str
    dtype: str
    visual_tokens: int


def subject(
    name: str, dtype: str, device: str, batch: int, text_tokens: int | None = None
) -> Subject:
    """Build a model on its device, and a prompt of `batch` equal rows.

    Args:
        name: one of `MODELS`.
        dtype: bfloat16, float16 or float32.
        device: cpu, cuda or cuda:N.
        batch: rows of the prompt.
        text_tokens: text tokens after the image; default: 28. The bundled model has a prompt of
            its own.

    Raises:
        BadInput: another text length for the bundled model, or too little memory.
    """
    where, kind = as_device(device), as_dtype(dtype)
    if name == "emoji":
        if text_tokens is not None:
            raise BadInput("emoji has a prompt of its own: give --text-tokens to another model")
        model, inputs = _bundled(where, kind, batch)
    else:
        shape = SHAPES[name]
        if name in LARGE:
            _check_memory(name, shape, where, kind)
        model = _random_model(shape, where, kind)
        inputs = _prompt(shape, batch, TEXT_TOKENS if text_tokens is None else text_tokens)
    moved = {key: value.to(where) for key, value in inputs.items()}
    moved["pixel_values"] = moved["pixel_values"].to(kind)
    visual = int((moved["input_ids"][0] == model.config.image_token_id).sum())
    return Subject(name, model, moved, device, str(kind).removeprefix("torch."), visual)


def _bundled(
    where: torch.device, dtype: torch.dtype, batch: int
) -> tuple[Any, dict[str, torch.Tensor]]:
    model, processor = load("emoji", dtype=dtype, device=where)
    content = [
        {"type": "image", "image": load_image("emoji:1")},
        {"type": "text", "text": "Describe the image."},
    ]
    inputs = encode_chats(processor, [[{"role": "user", "content": content}]])
    return model, {k: v.repeat(batch, *[1] * (v.ndim - 1)) for k, v in inputs.items()}


def _random_model(shape: Shape, where: torch.device, dtype: torch.dtype) -> Any:
    """A model of random weights, made on its device; the random state is restored."""
    gpus = [where] if where.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus), torch.device(where):
        torch.manual_seed(0)
        model = transformers.AutoModelForImageTextToText.from_config(shape.config(), dtype=dtype)
    # With the initial weights attention is nearly flat, and in half precision an edit of it would
    # be lost in rounding. Queries and keys each have the standard deviation 0.02 * sqrt(width).
    factor = _SCORE_DEVIATION / (0.02**2 * shape.hidden)
    with torch.no_grad():
        for attention in describe_model(model).attention.values():
            attention.get_parameter("q_proj.weight").mul_(factor)
    return model.eval()


def _prompt(shape: Shape, batch: int, text_tokens: int) -> dict[str, torch.Tensor]:
    """4 text tokens, the image, then `text_tokens` more; the same in every row."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(3, shape.vocabulary - 4, (4 + text_tokens,), generator=generator)
    image = torch.tensor(shape.image())
    ids = torch.cat([words[:4], image, words[4:]]).repeat(batch, 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pixels = shape.pixels(batch)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}
    if "image_grid_thw" in pixels:
        inputs["mm_token_type_ids"] = (ids == shape.vocabulary - 1).long()
    return inputs


def _check_memory(name: str, shape: Shape, where: torch.device, dtype: torch.dtype) -> None:
    """Refuse a model that does not fit, before it is built."""
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(shape.config(), dtype=dtype)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    free = _free_memory(where)
    if free is not None and free < _ROOM * weights:
        raise BadInput(
            f"{name} in {str(dtype).removeprefix('torch.')} has {weights / 2**30:.1f} GiB of "
            f"weights and needs {_ROOM * weights / 2**30:.1f} GiB; {where} has "
            f"{free / 2**30:.1f} GiB free. Take a smaller model or another --device."
        )


def _free_memory(where: torch.device) -> int | None:
    """Free bytes on a device; None if the system does not report them."""
    if where.type == "cuda":
        return int(torch.cuda.mem_get_info(where)[0])
    info = Path("/proc/meminfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None
