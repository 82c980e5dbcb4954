"""Prompts, images and a pruning method that several test files share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from tiny import TinyFamily, build
from tiny_configs import IMAGE
from torch import Tensor

from vlmfix.base.observer import Observer
from vlmfix.base.pruning import Kept, TokenMethod, VisualTokens
from vlmfix.engine.observe import internal_pass
from vlmfix.families import ModelInfo
from vlmfix.wrapper import session_of

Inputs = dict[str, Any]

PIXELS = ("pixel_values", "pixel_attention_mask", "image_sizes", "image_grid_thw")


def encode(model: Any, inputs: Inputs) -> Tensor:
    """All visual tokens of all images, in the order of the prompts: (n, D)."""
    arguments = {name: inputs[name] for name in PIXELS if name in inputs}
    with torch.no_grad():
        features = model.get_image_features(**arguments, return_dict=True).pooler_output
    return torch.cat([part.flatten(0, -2) for part in features])


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


def qwen_images(*grids: tuple[int, int]) -> Inputs:
    patches = sum(height * width for height, width in grids)
    thw = torch.tensor([[1, height, width] for height, width in grids])
    return {"pixel_values": noise(patches, 96), "image_grid_thw": thw}


def two_images(tiny: TinyFamily) -> tuple[Inputs, Inputs]:
    """One prompt with two images, and the same images as two prompts."""
    apart = tiny.inputs(batch=2, lengths=[5, 5])
    image = [*tiny.layout.before, *[IMAGE] * tiny.image_tokens, *tiny.layout.after]
    ids = torch.tensor([[1, *image, 20, 21, *image, 22, 23]])
    together = {key: apart[key] for key in PIXELS if key in apart}
    if tiny.name == "smolvlm":  # (rows, images of a row, ...)
        together["pixel_values"] = together["pixel_values"].transpose(0, 1)
    for key in ("token_type_ids", "mm_token_type_ids"):
        if key in apart:
            together[key] = (ids == IMAGE).long() * int(apart[key].max())
    return {**together, "input_ids": ids, "attention_mask": torch.ones_like(ids)}, apart


def state(model: Any) -> list[Any]:
    """Every attribute of every module, by identity where it has one."""
    return [
        (id(module), {key: id(value) for key, value in vars(module).items()})
        for module in model.modules()
    ]


def internvl_prompt(runs: list[list[int]], seed: int = 0) -> Inputs:
    """Prompts of InternVL, per row a list of pictures of so many tiles, padded on the left."""
    rows = []
    for row, pictures in enumerate(runs):
        ids = [1, 9]
        for tiles in pictures:
            ids += [20, *[IMAGE] * (4 * tiles), 21]
        rows.append(ids + [30 + row, 31, 32, *range(40, 40 + row)])
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    generator = torch.Generator().manual_seed(seed)
    count = sum(map(sum, runs))
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "pixel_values": torch.randn(count, 3, 16, 16, generator=generator),
    }


def picture(seed: int, width: int = 16) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 255, (16, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def ask(image: Image.Image, text: str) -> list[dict[str, Any]]:
    content = [{"type": "image", "image": image}, {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


def tiny_model(name: str) -> Any:
    model = build(name).model
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 0
    return model


@dataclass(frozen=True, eq=False)
class Probe(TokenMethod):
    """Keeps every other token, and what it was told."""

    layer: int | None = None
    told: list[VisualTokens] = field(default_factory=list)

    name: ClassVar[str] = "probe"
    __hash__ = object.__hash__

    def relevance_layer(self, info: ModelInfo) -> int | None:
        return self.layer

    def keep(self, visual: VisualTokens, budget: int) -> Kept:
        self.told.append(visual)
        return Kept(torch.arange(len(visual))[::2][:budget])


def observed(model: Any, inputs: Inputs, observer: Observer) -> Tensor:
    """Next-token logits (B, V) of an internal pass of the plain model, which an observer sees."""
    with session_of(model) as session:
        logits: Tensor = internal_pass(session.host, inputs, observers=[observer]).logits
    return logits[:, -1]
