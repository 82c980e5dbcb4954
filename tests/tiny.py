"""Tiny vision-language models with random weights, built from configs in code: no files, no hub.

`build("llava")` gives a `TinyFamily`: the model and matching inputs. Every model has a vocabulary
of 100 ids (90 and above are special), a decoder of width 64 with 3 or 4 layers, 4 query heads and
2 key heads, and images of 16 x 16 pixels. Weights are drawn from N(0, 0.15): the usual 0.02 makes
attention nearly flat, so that an edit of it would not be seen in the output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tiny_configs import BOI, BUILDERS, EOI, IMAGE, VIDEO, VISION_END, VISION_START
from torch import Tensor

Inputs = dict[str, Any]

FAMILIES = (
    "llava",
    "llava_next",
    "qwen2_5_vl",
    "qwen3_vl",
    "internvl",
    "gemma3",
    "smolvlm",
    "paligemma",
)
"""The families that every method must support."""

OTHERS = (
    "llava_onevision",
    "qwen2_vl",
    "mistral3",
    "idefics3",
    "aya_vision",
    "glm4v",
    "mllama",
    "instructblip",
    "kosmos2",
    "llama",
)
"""More families: some work, some are refused (`llama` sees no image at all)."""

PER_POSITION = (
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "mm_token_type_ids",
    "image_embeds_position_mask",
    "cross_attention_mask",
)
"""Inputs whose second axis is the sequence, so that removing padding must cut them."""


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


@dataclass(frozen=True)
class TinyFamily:
    """A tiny model in eval mode, float32, and what is needed to make inputs for it."""

    name: str
    model: Any
    layout: Layout
    image_token_id: int | None
    """The id that the model's config names as the image placeholder; None if it names none."""

    @property
    def image_tokens(self) -> int:
        """Prompt positions that one image fills."""
        return self.layout.image_tokens

    def inputs(self, batch: int = 1, seed: int = 0, lengths: Sequence[int] | None = None) -> Inputs:
        """Make a prompt batch with one image per row, left-padded to one width.

        Args:
            batch: Rows.
            seed: Same seed, same text and pixels.
            lengths: Text tokens after the image, one number per row; 6, 8, 10, ... if absent.

        Returns:
            Keyword arguments for `model.generate` or the model's forward.
        """
        tails = [6 + 2 * row for row in range(batch)] if lengths is None else list(lengths)
        if len(tails) != batch:
            raise ValueError(f"{len(tails)} lengths for a batch of {batch}")
        generator = torch.Generator().manual_seed(seed)
        layout = self.layout
        image = [*layout.before, *[IMAGE] * layout.image_tokens, *layout.after]
        rows = [
            [1, *_text(layout.lead, generator), *image, *_text(tail, generator)] for tail in tails
        ]
        inputs = _left_padded(rows)
        inputs.update(layout.pixels(batch, generator))
        if layout.extra is not None:
            inputs.update(layout.extra(inputs["input_ids"]))
        return inputs

    def single(self, inputs: Inputs, row: int) -> Inputs:
        """Take one row of a batch made by `inputs`, alone and without its padding."""
        batch = inputs["input_ids"].shape[0]
        keep = inputs["attention_mask"][row].bool()
        alone: Inputs = {}
        for name, value in inputs.items():
            # Patches of all images may lie on one axis, so a row is a slice, not an index.
            size = value.shape[0] // batch
            part = value[row * size : (row + 1) * size]
            alone[name] = part[:, keep] if name in PER_POSITION else part
        return alone


def build(name: str, seed: int = 0) -> TinyFamily:
    """Build one family of `FAMILIES` or `OTHERS`; the same seed gives the same weights."""
    torch.manual_seed(seed)
    model: Any = BUILDERS[name]()
    model.eval()
    _redraw(model, seed)
    layout = LAYOUTS[name]
    named = getattr(model.config, "image_token_id", None)
    return TinyFamily(name, model, layout, named)


def generate_kwargs(**overrides: Any) -> Inputs:
    """Arguments of a short greedy generate that never writes an image placeholder."""
    return {
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": 2,
        "suppress_tokens": [IMAGE, VIDEO],
        **overrides,
    }


def _redraw(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Gates and embeddings that start at zero would switch a part of the model off.
            silent = parameter.abs().max() < 1e-6 and "bias" not in name and "norm" not in name
            if parameter.ndim >= 2 or silent:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)


def _text(count: int, generator: torch.Generator) -> list[int]:
    return torch.randint(5, 80, (count,), generator=generator).tolist()


def _left_padded(rows: list[list[int]]) -> Inputs:
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for row, tokens in enumerate(rows):
        ids[row, width - len(tokens) :] = torch.tensor(tokens)
        mask[row, width - len(tokens) :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def _picture(*shape: int) -> Callable[[int, torch.Generator], Inputs]:
    def pixels(batch: int, generator: torch.Generator) -> Inputs:
        return {"pixel_values": torch.randn(batch, *shape, 16, 16, generator=generator)}

    return pixels


def _sized(side: int, *shape: int) -> Callable[[int, torch.Generator], Inputs]:
    def pixels(batch: int, generator: torch.Generator) -> Inputs:
        sizes = torch.tensor([[side, side]] * batch)
        return {**_picture(*shape)(batch, generator), "image_sizes": sizes}

    return pixels


def _patches(batch: int, generator: torch.Generator) -> Inputs:
    # 4 x 4 patches of 4 x 4 pixels, 3 channels, each frame twice: the Qwen layout.
    values = torch.randn(batch * 16, 3 * 2 * 4 * 4, generator=generator)
    return {"pixel_values": values, "image_grid_thw": torch.tensor([[1, 4, 4]] * batch)}


def _mllama_tiles(batch: int, generator: torch.Generator) -> Inputs:
    return {
        "pixel_values": torch.randn(batch, 1, 2, 3, 16, 16, generator=generator),
        "aspect_ratio_ids": torch.ones(batch, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.tensor([[[1, 0]]] * batch),
    }


def _mllama_cross_mask(ids: Tensor) -> Inputs:
    seen = ((ids == IMAGE).long().cumsum(1) > 0).long()
    second_tile = torch.zeros_like(seen)
    return {"cross_attention_mask": torch.stack([seen, second_tile], dim=-1)[:, :, None]}


def _qformer_question(ids: Tensor) -> Inputs:
    question = torch.arange(9, 14).repeat(ids.shape[0], 1)
    return {"qformer_input_ids": question, "qformer_attention_mask": torch.ones_like(question)}


def _mm_types(ids: Tensor) -> Inputs:
    return {"mm_token_type_ids": (ids == IMAGE).long()}


def _token_types(ids: Tensor) -> Inputs:
    return {"token_type_ids": (ids == IMAGE).long()}


def _all_zero_types(ids: Tensor) -> Inputs:
    return {"token_type_ids": torch.zeros_like(ids)}


def _kosmos_positions(ids: Tensor) -> Inputs:
    # Kosmos-2 has no image id: the places are told apart by this mask alone.
    image = ids == IMAGE
    return {"input_ids": ids.masked_fill(image, 3), "image_embeds_position_mask": image.long()}


def _nothing(batch: int, generator: torch.Generator) -> Inputs:
    return {}


_QWEN = Layout(4, _patches, (VISION_START,), (VISION_END,), extra=_mm_types)
# An image of 32 x 32 is one base view and 2 x 2 tiles: 16 + 8 rows of 8 patches and a newline.
_TILED = Layout(88, _sized(32, 5, 3))

LAYOUTS: dict[str, Layout] = {
    "llava": Layout(16, _picture(3)),
    "llava_next": _TILED,
    "llava_onevision": _TILED,
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN,
    "glm4v": _QWEN,
    "internvl": Layout(4, _picture(3)),
    "gemma3": Layout(4, _picture(3), (BOI,), (EOI,), extra=_token_types),
    "smolvlm": Layout(4, _picture(1, 3)),
    "idefics3": Layout(4, _picture(1, 3)),
    "paligemma": Layout(16, _picture(3), lead=0, extra=_all_zero_types),
    "mistral3": Layout(4, _sized(16, 3)),
    "aya_vision": Layout(4, _picture(3)),
    "mllama": Layout(1, _mllama_tiles, extra=_mllama_cross_mask),
    "instructblip": Layout(4, _picture(3), extra=_qformer_question),
    "kosmos2": Layout(4, _picture(3), extra=_kosmos_positions),
    "llama": Layout(0, _nothing),
}
