"""Tiny vision-language models with random weights, built from configs in code: no files, no hub.

`build("llava")` gives a `TinyFamily`: the model and matching inputs. Every model has a vocabulary
of 100 ids (90 and above are special), a decoder of width 64 with 3 or 4 layers, 4 query heads and
2 key heads, and images of 16 x 16 pixels. Weights are drawn from N(0, 0.15): the usual 0.02 makes
attention nearly flat, so that an edit of it would not be seen in the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tiny_configs
import tiny_families
import tiny_layouts
import torch
from tiny_configs import IMAGE, VIDEO
from tiny_layouts import Inputs, Layout

BUILDERS = tiny_configs.BUILDERS | tiny_families.BUILDERS
LAYOUTS = tiny_layouts.LAYOUTS | tiny_families.LAYOUTS

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
    "moe_mm_token_type_ids",
    "image_embeds_position_mask",
    "cross_attention_mask",
)
"""Inputs whose second axis is the sequence, so that removing padding must cut them."""


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
            side_by_side = self.layout.side_by_side and name == "pixel_values"
            axis = -1 if side_by_side else 0
            size = value.shape[axis] // batch
            part = value.narrow(axis, row * size, size)
            if name == self.layout.places:
                part = part - part.min()
            alone[name] = part[:, keep] if name in PER_POSITION else part
        return alone


def build(name: str, seed: int = 0) -> TinyFamily:
    """Build a family of `BUILDERS`; the same seed gives the same weights."""
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
