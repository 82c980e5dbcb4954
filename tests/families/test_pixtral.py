"""Methods that read the vision tower, on Pixtral's: pictures of several sizes in one sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from matrix import family
from prompts import noise
from pruned import answer, same_answer
from tiny import TinyFamily
from tiny_configs import IMAGE

import vlmfix
from vlmfix.errors import BadInput

Inputs = dict[str, Any]

NAMES = ("mistral3", "mistral_large4", "lighton_ocr", "llava_pixtral")
#: Height and width of the pictures of each prompt: two in the first, one in the second.
SIZES = (((16, 32), (8, 16)), ((32, 24),))
BREAK, END = 60, 61  # text, as it is for Pixtral: behind every row of tokens, and behind a picture


def prompts(tiny: TinyFamily) -> tuple[Inputs, list[Inputs]]:
    """Two prompts with pictures of three sizes, padded; and each by itself."""
    side = 4 * (1 if tiny.name == "llava_pixtral" else 2)
    texts = []
    for number, sizes in enumerate(SIZES):
        text = [1, 20, 21]
        for height, width in sizes:
            lines = [[*[IMAGE] * (width // side), BREAK]] * (height // side)
            text += [*sum(lines, [])[:-1], END, 30 + number]
        texts.append([*text, 40, 41, 42])
    length = max(map(len, texts))
    ids = torch.tensor([[0] * (length - len(text)) + text for text in texts])
    pixels, sizes = noise(3, 3, 32, 32), torch.tensor(sum(SIZES, ()))
    together = {"pixel_values": pixels, "image_sizes": sizes, "input_ids": ids}
    alone = []
    for text, rows in zip(texts, (slice(0, 2), slice(2, 3)), strict=True):
        height, width = sizes[rows].amax(0).tolist()
        own = {"pixel_values": pixels[rows, :, :height, :width], "image_sizes": sizes[rows]}
        alone.append({**own, "input_ids": torch.tensor([text])})
    for inputs in (together, *alone):
        inputs["attention_mask"] = (inputs["input_ids"] != 0).long()
    return together, alone


@pytest.mark.parametrize(
    "method",
    [
        "hiprune:ratio=0.5;alpha=1",
        "visionzip:ratio=0.5;contextual_share=0.5",
        "ptp:ratio=0.5;temperature=0.05",
        "uniform:ratio=0.5",
        "imba:alpha=2;beta=1;local_ratio=0.5;start_layer=0",
    ],
)
# The sparse attention of Mistral Large 4's decoder chooses other keys in a batch, plain as it is.
@pytest.mark.parametrize("name", [name for name in NAMES if name != "mistral_large4"])
def test_pictures_of_several_sizes_are_answered_as_if_alone(name: str, method: str) -> None:
    tiny = family(name)
    together, alone = prompts(tiny)
    found, kept = answer(tiny, method, together), []
    assert not same_answer(found, answer(tiny, None, together), exactly=False)
    for row, inputs in enumerate(alone):
        own = answer(tiny, method, inputs)
        kept += own.kept
        for a, b in zip(own.logits, found.logits, strict=True):
            assert torch.allclose(a[0], b[row], atol=1e-5)
    assert kept == found.kept
    assert len(kept) == (0 if method.startswith("imba") else 3)


@pytest.mark.parametrize("name", NAMES)
def test_maps_have_the_shape_of_each_picture(name: str) -> None:
    tiny = family(name)
    together, _ = prompts(tiny)
    side = 4 * (1 if name == "llava_pixtral" else 2)
    maps = vlmfix.attention_map(tiny.model, together)
    shapes = [[tuple(one.grids()[0].shape[-2:]) for one in images] for images in maps]
    assert shapes == [[(h // side, w // side) for h, w in sizes] for sizes in SIZES]
    del together["image_sizes"]
    with pytest.raises(BadInput, match="lack image_sizes"):
        vlmfix.attention_map(tiny.model, together)
