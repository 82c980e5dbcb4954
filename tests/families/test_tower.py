"""Every row of the table of vision towers, by the pixel oracle: paint one spot of a picture, and
the visual token that vlmfix names for that spot must move, and no other.

Attention carries a change to every patch, so it is silenced: what is left of the tower, and the
projector behind it, shows where a spot goes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from matrix import family
from PIL import Image
from tiny import TinyFamily, build
from torch import Tensor
from transformers import (
    CohereCompassImageProcessorPil,
    Cosmos3EdgeImageProcessorPil,
    Ernie4_5_VLMoeImageProcessorPil,
    Glm4vImageProcessorPil,
    Glm46VImageProcessorPil,
    HunYuanVLImageProcessorPil,
    MiniCPMV4_6ImageProcessorPil,
    PaddleOCRVLImageProcessorPil,
    Qwen2VLImageProcessorPil,
    VideoLlama3ImageProcessorPil,
)

import vlmfix
from vlmfix.analysis.doctor import examine
from vlmfix.engine.recorder import VisionRecorder
from vlmfix.errors import UnsupportedModel
from vlmfix.families import describe_model, vision_arguments
from vlmfix.families.tower import (
    _FAMILIES,
    EncodedImage,
    Tower,
    describe_tower,
    grid_shapes,
    last_entry,
)

Inputs = dict[str, Any]

PATCH = 4
#: Rows and columns of patches of two pictures, for families that take any size.
PICTURES = ((4, 8), (8, 4))
#: Patches per image where they are padded; Gemma 4 wants a whole number of squares.
PADDED = 40


# -- pictures as patches --------------------------------------------------------------------------


def squares(picture: Tensor, side: int = 2, time: int = 2) -> Tensor:
    """The patches of a picture (3, H, W), square by square: (n, 3 x time x 4 x 4)."""
    rows, columns = picture.shape[1] // PATCH, picture.shape[2] // PATCH
    found = []
    for top in range(0, rows, side):
        for left in range(0, columns, side):
            for y in range(top, top + side):
                for x in range(left, left + side):
                    found.append(patch(picture, y, x)[:, None].repeat(1, time, 1, 1).flatten())
    return torch.stack(found)


def patch(picture: Tensor, y: int, x: int) -> Tensor:
    return picture[:, y * PATCH : (y + 1) * PATCH, x * PATCH : (x + 1) * PATCH]


def rows(picture: Tensor) -> Tensor:
    """The patches of a picture, row by row: (n, 3, 4, 4)."""
    height, width = picture.shape[1] // PATCH, picture.shape[2] // PATCH
    return torch.stack([patch(picture, y, x) for y in range(height) for x in range(width)])


def flat_rows(picture: Tensor) -> Tensor:
    return rows(picture).flatten(1)


def muse(picture: Tensor) -> Tensor:
    """Row by row, and time before channels: (n, 2 x 3 x 4 x 4)."""
    return torch.stack([one[None].repeat(2, 1, 1, 1).flatten() for one in rows(picture)])


def side_by_side(picture: Tensor) -> Tensor:
    """Row by row, one behind the other: (4 x n, 3, 4), to be `turned` once all are together."""
    return rows(picture).permute(0, 3, 1, 2).flatten(0, 1)


def turned(pixels: Tensor) -> Tensor:
    return pixels.permute(1, 2, 0)[None]


def single_frame(picture: Tensor) -> Tensor:
    return squares(picture, time=1)


def channels_last(picture: Tensor) -> Tensor:
    """Square by square, one frame: (n, 4 x 4 x 3)."""
    return single_frame(picture).view(-1, 3, PATCH**2).transpose(1, 2).flatten(1)


#: How processors cut pictures, where not as Qwen's does. Those of Kimi and Muse need torchvision,
#: which the tests do without.
CUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "ernie4_5_vl_moe": single_frame,
    "kimi_k25": rows,
    "hunyuan_vl": flat_rows,
    "nemotron_h_omni": flat_rows,
    "muse_glimmer": muse,
    "muse_spark": muse,
    "minicpmv4_6": side_by_side,
    "minicpmv4_7": side_by_side,
    "minicpm_ocr": side_by_side,
    "paddleocr_vl": rows,
    "cosmos3_edge": channels_last,
}


@pytest.mark.parametrize(
    ("kind", "cut", "side", "time"),
    [
        (Qwen2VLImageProcessorPil, squares, 2, 2),
        (Glm4vImageProcessorPil, squares, 2, 2),
        (Glm46VImageProcessorPil, squares, 2, 2),
        (CohereCompassImageProcessorPil, squares, 2, 2),
        (Ernie4_5_VLMoeImageProcessorPil, single_frame, 2, 1),
        (Cosmos3EdgeImageProcessorPil, channels_last, 2, 1),
        (VideoLlama3ImageProcessorPil, functools.partial(squares, side=1, time=1), 1, 1),
        (VideoLlama3ImageProcessorPil, single_frame, 2, 1),
        (PaddleOCRVLImageProcessorPil, rows, 2, 1),
        (HunYuanVLImageProcessorPil, flat_rows, 2, 1),
    ],
)
def test_pictures_are_cut_as_processors_cut_them(
    kind: Any, cut: Callable[[Tensor], Tensor], side: int, time: int
) -> None:
    values = np.random.default_rng(0).integers(0, 255, (16, 32, 3), dtype=np.uint8)
    options: Inputs = {"do_resize": False, "do_rescale": False, "do_normalize": False}
    processor = kind(patch_size=PATCH, merge_size=side, temporal_patch_size=time, **options)
    made = processor(Image.fromarray(values), return_tensors="pt")
    assert made["image_grid_thw"].tolist() == [[1, 4, 8]]
    picture = torch.tensor(values).permute(2, 0, 1).float()
    assert torch.equal(made["pixel_values"].float(), cut(picture))


def test_pictures_lie_side_by_side_as_minicpm_lays_them() -> None:
    values = np.random.default_rng(0).integers(0, 255, (16, 32, 3), dtype=np.uint8)
    options: Inputs = {"do_resize": False, "do_rescale": False, "do_normalize": False}
    processor: Any = MiniCPMV4_6ImageProcessorPil(patch_size=PATCH, slice_mode=False, **options)
    made = processor(Image.fromarray(values), return_tensors="pt")
    assert made["target_sizes"].tolist() == [[4, 8]]
    picture = torch.tensor(values).permute(2, 0, 1).float()
    assert torch.equal(made["pixel_values"].float(), turned(side_by_side(picture)))


# -- the oracle -----------------------------------------------------------------------------------


class Canvas:
    """Pictures of a family, and its inputs for them; `paint` changes one patch of each.

    Attributes:
        pictures: (3, H, W) each; of families with tiles, these.
    """

    def __init__(self, name: str, tower: Tower, tiny: TinyFamily) -> None:
        self.name, self.tower = name, tower
        self.inputs = vision_arguments(tiny.model, tiny.inputs(batch=2))
        (self.pixels,) = (key for key in self.inputs if "pixel_values" in key)
        generator = torch.Generator().manual_seed(3)
        times = max(1, tower.merge // 2)  # as many tokens where more patches make one
        self.sizes = [[height * times, width * times] for height, width in PICTURES]
        if tower.layout in ("patches", "sized", "placed"):
            self.pictures = [
                torch.randn(3, height * PATCH, width * PATCH, generator=generator)
                for height, width in self.sizes
            ]
            self._say_sizes()
        else:
            self.pictures = list(self.inputs[self.pixels].flatten(0, -4))

    def _say_sizes(self) -> None:
        """The sizes of the pictures, in the words of the family."""
        inputs, sizes = self.inputs, self.sizes
        if self.tower.grid in inputs:
            time = [1] * (inputs[self.tower.grid].shape[1] - 2)
            inputs[self.tower.grid] = torch.tensor([[*time, *size] for size in sizes])
        if "image_sizes" in inputs:
            inputs["image_sizes"] = torch.tensor(sizes) * PATCH
        if "image_merge_sizes" in inputs:
            inputs["image_merge_sizes"] = torch.tensor([1, 2])
        if "spatial_shapes" in inputs:
            inputs["spatial_shapes"] = torch.tensor(sizes)
            inputs["pixel_attention_mask"] = torch.ones(2, PADDED, dtype=torch.long)
            inputs["pixel_attention_mask"][:, 32:] = 0
        if "image_position_ids" in inputs:
            inputs["image_position_ids"] = torch.full((2, PADDED, 2), -1)
            for row, (height, width) in enumerate(sizes):
                spots = [[x, y] for y in range(height) for x in range(width)]
                inputs["image_position_ids"][row, : len(spots)] = torch.tensor(spots)

    def made(self, pictures: list[Tensor]) -> Inputs:
        if self.tower.layout == "sized":
            padded = torch.full((2, 3, 8 * PATCH, 8 * PATCH), 9.0)
            for row, picture in enumerate(pictures):
                padded[row, :, : picture.shape[1], : picture.shape[2]] = picture
            return {**self.inputs, "pixel_values": padded}
        if self.tower.layout == "placed":
            values = [rows(picture).flatten(1) for picture in pictures]
            padded = torch.zeros(2, PADDED, values[0].shape[1])
            for row, own in enumerate(values):
                padded[row, : len(own)] = own
            return {**self.inputs, "pixel_values": padded}
        if self.tower.layout == "patches":
            if "image_merge_sizes" in self.inputs:
                values = [squares(one, side, 1) for side, one in enumerate(pictures, 1)]
            else:
                values = [CUTS.get(self.name, squares)(one) for one in pictures]
            pixels = torch.cat(values)
            if self.name.startswith("minicpm"):
                pixels = turned(pixels)
            return {**self.inputs, "pixel_values": pixels}
        shape = self.inputs[self.pixels].shape
        return {**self.inputs, self.pixels: torch.stack(pictures).view(shape)}

    def painted(self, turn: int) -> tuple[Inputs, list[tuple[int, int]]]:
        """Inputs with one patch of each picture painted, and where; turns come by all of them."""
        pictures, spots = [], []
        for number, picture in enumerate(self.pictures):
            columns = picture.shape[2] // PATCH
            count = columns * (picture.shape[1] // PATCH)
            y, x = divmod((turn + 5 * number) % count, columns)
            changed = picture.clone()
            patch(changed, y, x)[:] += torch.linspace(-2, 3, PATCH)
            pictures.append(changed)
            spots.append((y, x))
        return self.made(pictures), spots

    def __len__(self) -> int:
        return max(one[0].numel() for one in self.pictures) // PATCH**2


@contextmanager
def without_attention(tower: Tower) -> Iterator[None]:
    def silence(module: Any, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (torch.zeros_like(output[0]), *output[1:])
        return torch.zeros_like(output)

    # LFM3 has convolutions in place of some attention.
    others = [one for one in tower.module.modules() if type(one).__name__.endswith("ShortConv")]
    handles = [one.register_forward_hook(silence) for one in (*tower.layers, *others)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def encoded(tiny: TinyFamily, recorder: VisionRecorder, inputs: Inputs) -> tuple[Tensor, Any]:
    """All visual tokens, (n, D), and what was recorded of their images."""
    with torch.no_grad():
        output = tiny.model.base_model.get_image_features(**inputs, return_dict=True)
    found = output.last_hidden_state if output.pooler_output is None else output.pooler_output
    features = torch.cat([part.flatten(0, -2) for part in found])
    return features, recorder.take()


def moved(one: Tensor, other: Tensor) -> list[int]:
    return ((one - other).abs().amax(-1) > 1e-5).nonzero().flatten().tolist()


def named(
    images: list[EncodedImage], spots: list[tuple[int, int]], pictures: list[Tensor]
) -> tuple[list[int], list[list[int]]]:
    """The visual tokens of the batch that spots are in, and per tile the place of its spot."""
    tokens: list[int] = []
    places = []
    number = first = 0
    for image in images:
        start = 0
        for tile in image.tiles:
            (y, x), picture = spots[number], pictures[number]
            height, width = picture.shape[1] // PATCH, picture.shape[2] // PATCH
            place = y * tile.rows // height * tile.columns + x * tile.columns // width
            found = (image.index == start + place).nonzero().flatten() + first
            tokens += found.tolist()
            places.append([place])
            start += tile.rows * tile.columns
            number += 1
        first += len(image.index)
    return sorted(tokens), places


@pytest.mark.parametrize("name", [*_FAMILIES, "mistral3_ministral", "mistral3_mistral4"])
def test_the_token_that_is_named_for_a_spot_is_the_one_that_moves(name: str) -> None:
    tiny = family(name)
    tower = describe_tower(tiny.model, describe_model(tiny.model))
    canvas = Canvas(name, tower, tiny)
    with without_attention(tower), VisionRecorder(tower, (0, 1)) as recorder:
        plain, before = encoded(tiny, recorder, canvas.made(canvas.pictures))
        assert sum(len(image.index) for image in before) == len(plain)
        for turn in range(len(canvas)):
            inputs, spots = canvas.painted(turn)
            features, after = encoded(tiny, recorder, inputs)
            tokens, places = named(before, spots, canvas.pictures)
            assert moved(features, plain) == tokens
            tiles = [(one, other) for a, b in zip(before, after, strict=True)
                     for one, other in zip(a.tiles, b.tiles, strict=True)]  # fmt: skip
            for layer in (0, 1):
                keys = [moved(a.received[layer].key, b.received[layer].key) for a, b in tiles]
                assert keys == places
    shapes = {(tile.rows, tile.columns) for image in before for tile in image.tiles}
    assert max(max(shape) for shape in shapes) > 1


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("gemma4", [(2, 4), (4, 2)]),
        ("lfm2_vl", [(2, 4), (4, 2)]),
        ("kimi_k25", [(2, 4), (4, 2)]),
        ("mistral3", [(2, 4), (4, 2)]),
        ("llava_pixtral", [(4, 8), (8, 4)]),
        ("video_llama_3", [(4, 8), (4, 2)]),
    ],
)
def test_shapes_of_images_before_they_are_encoded(name: str, shapes: list[Any]) -> None:
    tiny = family(name)
    tower = describe_tower(tiny.model, describe_model(tiny.model))
    canvas = Canvas(name, tower, tiny)
    inputs = canvas.made(canvas.pictures)
    assert grid_shapes(tower, inputs) == shapes
    with VisionRecorder(tower, (0,)) as recorder:
        _, images = encoded(tiny, recorder, inputs)
    assert [(image.tiles[0].rows, image.tiles[0].columns) for image in images] == shapes


def test_the_class_token_of_llama4_asks_from_behind_the_patches() -> None:
    tiny = build("llama4")
    tiny.model.set_attn_implementation("eager")
    tower = describe_tower(tiny.model, describe_model(tiny.model))
    seen: list[Tensor] = []
    tower.layers[1].register_forward_hook(lambda module, args, out: seen.append(out[1].mean(1)))
    with VisionRecorder(tower, (1,)) as recorder:
        _, images = encoded(tiny, recorder, vision_arguments(tiny.model, tiny.inputs(batch=2)))
    for image, weights in zip(images, seen[0], strict=True):
        (tile,) = image.tiles
        wanted = [weights.mean(0), weights[-1]]
        columns, asked = (one[:-1].view(2, 2, 2, 2).mean((1, 3)).flatten() for one in wanted)
        received = tile.received[1]
        assert received.cls is not None and tile.cls_output is None
        assert torch.allclose(received.column, columns) and torch.allclose(received.cls, asked)


def test_minicpm_leaves_its_inner_merger_out_where_its_configuration_says_so() -> None:
    tiny = build("minicpmv4_6")
    inputs = vision_arguments(tiny.model, tiny.inputs(batch=2))
    for mode, other, shape in (("16x", "4x", (2, 2)), ("4x", "16x", (4, 4))):
        tiny.model.config.downsample_mode = mode
        tower = describe_tower(tiny.model, describe_model(tiny.model))
        assert len(tower.layers) == 2 and tower.feature_layer == 1  # not the merger's attention
        with VisionRecorder(tower, (0, 1)) as recorder:
            _, images = encoded(tiny, recorder, inputs)
            assert [(one.tiles[0].rows, one.tiles[0].columns) for one in images] == [shape] * 2
            with pytest.raises(UnsupportedModel, match="visual tokens where the recorder counts"):
                encoded(tiny, recorder, {**inputs, "downsample_mode": other})


def test_layers_that_attend_to_the_whole_image() -> None:
    tiny = build("muse_glimmer")
    info = describe_model(tiny.model)
    tower: Any = tiny.model.get_encoder(modality="image")
    for kinds, full in ((["window_attention", "full_attention"], (1,)), (None, (0, 1))):
        tower.config.layer_types = kinds
        assert describe_tower(tiny.model, info).full_attention == full


def test_a_tower_without_attention_layers_is_refused() -> None:
    tiny = build("lfm3_vl")
    tower: Any = tiny.model.get_encoder(modality="image")
    del tower.layers[1:]  # what is left is a convolution
    with pytest.raises(UnsupportedModel, match="do not pass through a vision tower with attention"):
        describe_tower(tiny.model, describe_model(tiny.model))


def test_convolutions_do_not_count_as_layers() -> None:
    tiny = build("lfm3_vl")
    tower = describe_tower(tiny.model, describe_model(tiny.model))
    assert len(tower.layers) == 2
    assert (tower.full_attention, tower.feature_layer) == ((0, 1), 1)


def test_what_the_table_leaves_out_is_refused() -> None:
    reasons = {
        "dots3_note": "was never checked",
        "aria": "mix all patches",
        "deepseek_ocr2": "mix all patches",
        "deepseek_vl_hybrid": "convolutions behind SAM",
        "unlimited_ocr": "convolutions behind SAM",
        "step3p7": "ends in one",
        "perception_lm": "is timm's",
        "fuyu": "do not pass",
        "gemma4_unified": "do not pass",
    }
    for name, reason in reasons.items():
        tiny = family(name)
        with pytest.raises(UnsupportedModel, match=reason):
            describe_tower(tiny.model, describe_model(tiny.model))


@pytest.mark.parametrize("method", ["imba", "hiprune", "divprune"])
def test_a_tower_with_flash_attention_is_refused_by_wrap_and_doctor(method: str) -> None:
    tiny = build("llava")
    for layer in describe_tower(tiny.model, describe_model(tiny.model)).layers:
        layer.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(UnsupportedModel, match="flash_attention_2.*vision_config"):
        vlmfix.wrap(tiny.model, method)
    (row,) = (row for row in examine(tiny.model)["methods"] if row["name"] == method)
    assert not row["fits"] and "flash_attention_2" in row["why"]


def test_where_image_features_enter_last() -> None:
    found = {
        name: last_entry(family(name).model.config)
        for name in ("llava", "qwen3_vl", "granite4_vision", "fuyu", "emu3")
    }
    assert found == {"llava": 0, "qwen3_vl": 2, "granite4_vision": 3, "fuyu": 0, "emu3": 0}
