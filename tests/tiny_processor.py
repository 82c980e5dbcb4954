"""A processor for any tiny family: words of a fixed vocabulary, pixels drawn from the image's own.

Real processors of most families need torchvision. Here an image is only known by its pixels: equal
images get equal inputs, others get others, of the shape that the family's layout says. In families
with a grid per image, it follows the image's sides: a patch has 4 x 4 pixels.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from tiny import TinyFamily
from tiny_configs import IMAGE
from tiny_folders import CHAT, tokenizer
from transformers import BatchFeature


class TinyProcessor:
    """Every prompt holds at most one image."""

    chat_template = CHAT

    def __init__(self, family: TinyFamily) -> None:
        self.layout = family.layout
        self.tokenizer = tokenizer()

    def apply_chat_template(self, chat: Any, **kwargs: Any) -> str:
        text: str = self.tokenizer.apply_chat_template(chat, chat_template=CHAT, **kwargs)
        return text

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        texts: list[str] = self.tokenizer.batch_decode(*args, **kwargs)
        return texts

    def __call__(self, text: list[str], images: Any, **kwargs: Any) -> BatchFeature:
        layout = self.layout
        pixels = [self._pixels(image) for row in images or () for image in row]
        counts = iter([self._tokens(one) for one in pixels])
        rows = []
        for prompt in text:
            words = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
            ids = []
            for word in words:
                span = (
                    [*layout.before, *[IMAGE] * next(counts), *layout.after]
                    if word == IMAGE
                    else [word]
                )
                ids += span
            # PaliGemma puts its image first and its start token behind it.
            rows.append([1, *ids] if layout.lead else [*ids, 1])
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        inputs = {"input_ids": ids, "attention_mask": mask}
        for name in pixels[0] if pixels else ():
            inputs[name] = torch.cat([one[name] for one in pixels])
        if layout.extra is not None:
            inputs.update(layout.extra(ids))
        return BatchFeature(inputs)

    def _pixels(self, image: Any) -> dict[str, torch.Tensor]:
        seed = int.from_bytes(hashlib.sha256(image.tobytes()).digest()[:4], "little")
        generator = torch.Generator().manual_seed(seed)
        pixels: dict[str, torch.Tensor] = self.layout.pixels(1, generator)
        if "image_grid_thw" in pixels:
            grid = [1, image.height // 4, image.width // 4]
            patches = torch.randn(grid[1] * grid[2], 96, generator=generator)
            pixels = {"pixel_values": patches, "image_grid_thw": torch.tensor([grid])}
        return pixels

    def _tokens(self, pixels: dict[str, torch.Tensor]) -> int:
        grid = pixels.get("image_grid_thw")
        return self.layout.image_tokens if grid is None else int(grid.prod()) // 4
