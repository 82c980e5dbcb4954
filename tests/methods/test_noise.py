"""Noise on pixels: the schedule, and the same noise on a prompt in whatever batch it is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from matrix import FAMILIES, family, prompt
from PIL import Image
from tiny import PER_POSITION
from tiny_configs import IMAGE
from transformers import (
    Idefics3ImageProcessorPil,
    LlavaNextImageProcessorPil,
    PixtralImageProcessorPil,
    Qwen2VLImageProcessorPil,
    SmolVLMImageProcessorPil,
)

import vlmfix
from vlmfix.analysis.doctor import examine
from vlmfix.base.contrast import Prompt
from vlmfix.errors import BadInput, UnsupportedModel
from vlmfix.families import describe_model
from vlmfix.methods.noise import STEPS, noise_weights, noised

SIDE = {"height": 16, "width": 16}

#: Families whose processors hand pixels over in forms of their own.
FORMS = (
    "gemma4", "gemma4_unified", "lfm2_vl", "molmo2", "kimi_k25", "paddleocr_vl", "minicpmv4_6",
    "minicpm_ocr", "video_llava", "granite_docling", "inkling2", "nemotron_h_omni", "aria",
    "deepseek_vl_hybrid",
)  # fmt: skip


def made(vision: dict[str, Any], *tokens: int) -> Prompt:
    """Prompts with so many visual tokens each, in an order that the pixels need not follow."""
    counts = torch.tensor(tokens or (4,))
    visual = torch.arange(int(counts.max()) + 2).flip(0) < counts[:, None]
    info = describe_model(family("llava").model)
    return Prompt(info, visual.long(), torch.ones_like(visual), visual, vision)


def given(inputs: dict[str, Any]) -> Prompt:
    """The prompts that the engine makes of a tiny family's inputs."""
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    vision = {key: value for key, value in inputs.items() if key not in PER_POSITION}
    return Prompt(describe_model(family("llava").model), ids, real, ids == IMAGE, vision)


def drawn(before: Any, after: Any, step: int = 500) -> torch.Tensor:
    """The noise that was put on some pixels."""
    image, noise = noise_weights(step)
    result: torch.Tensor = (after - image * before) / noise
    return result


def picture(width: int, height: int) -> Image.Image:
    """An image without a patch of one colour."""
    values = np.random.default_rng(width).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


# -- the schedule ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "image", "noise"),
    [
        (100, 0.998293, 0.058406),  # 0.058408 in VCD's code, whose float32 cancels here
        (500, 0.863017, 0.505175),
        (700, 0.592677, 0.805440),
        (900, 0.364888, 0.931051),
        (999, 0.285043, 0.958515),
    ],
)
def test_worked_weights(step: int, image: float, noise: float) -> None:
    assert noise_weights(step) == pytest.approx((image, noise), abs=1e-6)


def test_weights_keep_the_power_and_the_image_fades() -> None:
    weights = torch.tensor([noise_weights(step) for step in range(STEPS)], dtype=torch.float64)
    assert torch.allclose(weights.square().sum(1), torch.ones(STEPS, dtype=torch.float64))
    assert (weights[1:, 0] < weights[:-1, 0]).all() and weights[0, 0] > 0.9999


def test_mean_and_deviation_of_the_noise() -> None:
    values = torch.zeros(1, 3, 200, 200)
    for step in (500, 900):
        after = noised(made({"pixel_values": values}), step, 0)["pixel_values"]
        assert abs(after.mean()) < 0.01 * noise_weights(step)[1]
        assert after.std() == pytest.approx(noise_weights(step)[1], rel=0.01)
    after = noised(made({"pixel_values": values + 2}), 500, 0)["pixel_values"]
    assert after.mean() == pytest.approx(2 * noise_weights(500)[0], rel=0.01)


# -- every family ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FAMILIES, *FORMS])
def test_a_row_is_noised_as_if_it_were_alone(name: str) -> None:
    tiny = family(name)
    inputs = prompt(tiny)
    together = noised(given(inputs), 500, 7)
    pixels = [key for key in inputs if "pixel_values" in key]
    assert pixels
    for row in range(3):
        single = tiny.single(inputs, row)
        alone = noised(given(single), 500, 7)
        part = tiny.single({**inputs, **together}, row)
        for key in pixels:
            assert torch.equal(alone[key], part[key])
            assert torch.isclose(alone[key], single[key]).float().mean() < 0.01


@pytest.mark.parametrize("name", FAMILIES)
def test_only_a_copy_of_the_pixels_changes(name: str) -> None:
    inputs = prompt(family(name))
    before = {key: value.clone() for key, value in inputs.items()}
    asked = given(inputs)
    state = torch.get_rng_state()
    after = noised(asked, 999, 1)
    assert torch.equal(torch.get_rng_state(), state)
    assert after.keys() == asked.vision.keys()
    for key, value in before.items():
        assert torch.equal(value, inputs[key])
        assert key not in after or key == "pixel_values" or after[key] is inputs[key]
    assert after["pixel_values"].dtype == torch.float32


def test_seeds() -> None:
    asked = made({"pixel_values": torch.zeros(1, 3, 4, 4)})

    def with_seed(seed: int | None) -> torch.Tensor:
        values: torch.Tensor = noised(asked, 500, seed)["pixel_values"]
        return values

    assert torch.equal(with_seed(3), with_seed(3))
    assert not torch.isclose(with_seed(3), with_seed(4)).any()
    torch.manual_seed(11)
    torch.rand(5)  # what was drawn since does not count
    assert torch.equal(with_seed(None), with_seed(11))
    torch.manual_seed(-1)  # torch.initial_seed() is 2^64 - 1 then
    assert with_seed(None).isfinite().all()


@pytest.mark.parametrize("seed", [3, None])
def test_noise_is_not_made_of_the_numbers_that_tokens_are_drawn_from(seed: int | None) -> None:
    values = torch.zeros(1, 3, 8, 8)
    torch.manual_seed(3)
    noise = drawn(values, noised(made({"pixel_values": values}), 500, seed)["pixel_values"])
    torch.manual_seed(3)  # as before a generate() that samples
    tokens = torch.randn(noise.shape)
    assert (noise * tokens).mean().abs() < 0.5 < (noise * noise).mean()


def test_half_precision_rounds_once() -> None:
    values = torch.randn(1, 3, 8, 8).bfloat16()
    half = noised(made({"pixel_values": values}), 500, 0)["pixel_values"]
    full = noised(made({"pixel_values": values.float()}), 500, 0)["pixel_values"]
    assert half.dtype == torch.bfloat16 and torch.equal(half, full.bfloat16())


# -- tiles -----------------------------------------------------------------------------------------


def test_tiles_of_a_prompt_differ_and_another_prompt_does_not_shift_them() -> None:
    """InternVL: nothing but the visual tokens tells whose tiles they are."""
    values = torch.randn(6, 3, 8, 8)
    together = noised(made({"pixel_values": values}, 12, 4, 8), 500, 0)["pixel_values"]
    alone = [
        noised(made({"pixel_values": part}, 4 * len(part)), 500, 0)["pixel_values"]
        for part in values.split([3, 1, 2])
    ]
    assert torch.equal(together, torch.cat(alone))
    noise = drawn(values, together)
    for one, other in ((0, 1), (1, 2), (0, 2), (4, 5)):
        assert not torch.isclose(noise[one], noise[other], atol=1e-3).all()
    for place, same in ((0, 3), (0, 4), (1, 5)):
        assert torch.allclose(noise[place], noise[same], atol=1e-5)


def test_a_prompt_without_an_image_among_others() -> None:
    values = torch.randn(2, 3, 8, 8)
    together = noised(made({"pixel_values": values}, 4, 0, 4), 500, 0)["pixel_values"]
    alone = noised(made({"pixel_values": values[1:]}, 4), 500, 0)["pixel_values"]
    assert torch.equal(together[1:], alone)


@pytest.mark.parametrize(("tiles", "tokens"), [(2, (4, 5)), (2, (3, 1)), (2, (0, 0)), (3, (2, 2))])
def test_tiles_that_cannot_be_told_apart(tiles: int, tokens: tuple[int, ...]) -> None:
    with pytest.raises(BadInput, match="one call of the model's processor"):
        noised(made({"pixel_values": torch.ones(tiles, 3, 8, 8)}, *tokens), 500, 0)


def test_llava_next_pads_images_with_tiles() -> None:
    processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": 16},
        crop_size=SIDE,
        image_grid_pinpoints=[[16, 32], [32, 16], [32, 32], [16, 48]],
    )
    pictures = [picture(64, 24), picture(40, 30), picture(64, 24)]
    vision = dict(processor(pictures, return_tensors="pt"))
    values = vision["pixel_values"]
    padding = ~values.flatten(2).any(-1)
    assert padding.tolist() == [[False] * 4 + [True], [False] * 5, [False] * 4 + [True]]
    after = noised(made(vision), 500, 0)["pixel_values"]
    assert not after[padding].any()
    assert not torch.isclose(after[~padding], values[~padding]).all((1, 2, 3)).any()
    for place, one in enumerate(pictures):
        alone = dict(processor([one], return_tensors="pt"))
        wanted = noised(made(alone), 500, 0)["pixel_values"][0]
        assert torch.equal(after[place, : len(wanted)], wanted)
    assert torch.equal(after[0], after[2])
    noise = drawn(values, after)
    assert not torch.isclose(noise[1, 0], noise[1, 1], atol=1e-3).all()


@pytest.mark.parametrize("processor", [SmolVLMImageProcessorPil, Idefics3ImageProcessorPil])
def test_prompts_of_one_and_of_several_images(processor: Any) -> None:
    made_with = processor(size={"longest_edge": 64}, max_image_size={"longest_edge": 16})
    rows = [[picture(64, 24)], [picture(40, 30), picture(64, 24)]]
    vision = dict(made_with(rows, return_tensors="pt"))
    values, real = vision["pixel_values"], vision["pixel_attention_mask"].flatten(2).any(-1)
    assert 1 < real[0].sum() < real[1].sum()
    after = noised(made(vision, 4, 4), 500, 0)["pixel_values"]
    assert not after[~real].any()
    assert not torch.isclose(after[real], values[real]).all((1, 2, 3)).any()
    for row, images in enumerate(rows):
        alone = dict(made_with([images], return_tensors="pt"))
        wanted = noised(made(alone), 500, 0)["pixel_values"][0]
        assert torch.equal(after[row, : len(wanted)], wanted)


def test_a_padding_tile_in_the_middle_draws_nothing() -> None:
    tiles = torch.randn(1, 3, 3, 4, 4)
    tiles[0, 1] = 0
    after = noised(made({"pixel_values": tiles}), 500, 0)["pixel_values"]
    compact = noised(made({"pixel_values": tiles[:, [0, 2]]}), 500, 0)["pixel_values"]
    assert not after[0, 1].any() and torch.equal(after[:, [0, 2]], compact)


def test_padding_of_an_image_within_its_tile_stays() -> None:
    """Idefics without splitting pads all images of a batch to one size, SmolVLM's mask says so."""
    values = torch.randn(1, 2, 3, 8, 8)
    mask = torch.zeros(1, 2, 8, 8, dtype=torch.long)
    mask[0, 0, :6, :4] = 1
    mask[0, 1] = 1
    vision = {"pixel_values": values, "pixel_attention_mask": mask}
    after = noised(made(vision), 500, 0)["pixel_values"]
    touched = ~torch.isclose(after, values)
    assert torch.equal(touched.any(2), mask.bool()) and touched.all(2).sum() > 80
    wider = {
        "pixel_values": torch.nn.functional.pad(values, (0, 5, 0, 3), value=1.0),
        "pixel_attention_mask": torch.nn.functional.pad(mask, (0, 5, 0, 3)),
    }
    grown = noised(made(wider), 500, 0)["pixel_values"]
    assert torch.equal(grown[..., :8, :8], after) and (grown[..., 8:, :] == 1).all()


def test_pixtral_pads_images_to_one_size() -> None:
    processor = PixtralImageProcessorPil(
        size={"longest_edge": 48}, patch_size={"height": 4, "width": 4}
    )
    pictures = [picture(40, 30), picture(64, 24)]
    vision = dict(processor(pictures, return_tensors="pt"))
    assert vision["image_sizes"].tolist() == [[32, 40], [20, 48]]
    # A list of sizes, and more visual tokens than two images share evenly, are no hindrance.
    vision["image_sizes"] = [tuple(size) for size in vision["image_sizes"].tolist()]
    after = noised(made(vision, 5, 6), 500, 0)["pixel_values"]
    for place, (height, width) in enumerate(vision["image_sizes"]):
        alone = dict(processor([pictures[place]], return_tensors="pt"))
        wanted = noised(made(alone, 5), 500, 0)["pixel_values"][0]
        assert torch.equal(after[place, :, :height, :width], wanted)
        outside = torch.ones(after.shape[-2:], dtype=torch.bool)
        outside[:height, :width] = False
        assert torch.equal(after[place][:, outside], vision["pixel_values"][place][:, outside])


# -- patches ---------------------------------------------------------------------------------------


def test_patches_of_a_still_image_repeat_their_noise_over_time() -> None:
    processor = Qwen2VLImageProcessorPil(patch_size=4, min_pixels=64, max_pixels=1024)
    pictures = [picture(64, 24), picture(40, 30), picture(64, 24)]
    vision = dict(processor(pictures, return_tensors="pt"))
    values, sizes = vision["pixel_values"], vision["image_grid_thw"].prod(1).tolist()
    assert len(set(sizes)) == 1 and len({tuple(g) for g in vision["image_grid_thw"].tolist()}) == 2
    after = noised(made(vision), 500, 0)["pixel_values"]
    noise = drawn(values, after).view(-1, 3, 2, 4, 4)
    assert torch.allclose(noise[:, :, 0], noise[:, :, 1], atol=1e-5)
    assert noise.std() == pytest.approx(1, rel=0.05)
    for one, other in ((noise[0], noise[1]), (noise[:, 0], noise[:, 1])):
        assert not torch.isclose(one, other, atol=1e-3).all()
    first, _, last = after.split(sizes)
    assert torch.equal(first, last)


def test_patches_of_another_image_shift_nothing() -> None:
    grids = torch.tensor([[1, 4, 4], [1, 2, 6], [1, 4, 4]])
    values = torch.randn(44, 96)
    together = noised(made({"pixel_values": values, "image_grid_thw": grids}), 500, 0)
    for grid, part, got in zip(
        grids, values.split([16, 12, 16]), together["pixel_values"].split([16, 12, 16]), strict=True
    ):
        alone = noised(made({"pixel_values": part, "image_grid_thw": grid[None]}), 500, 0)
        assert torch.equal(alone["pixel_values"], got)


def test_frames_of_a_video_have_noise_of_their_own() -> None:
    vision = {
        "pixel_values_videos": torch.zeros(2 * 16, 3 * 2 * 4 * 4),
        "video_grid_thw": torch.tensor([[2, 4, 4]]),
        "pixel_values": torch.zeros(16, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }
    after = noised(made(vision), 500, 0)
    frames = after["pixel_values_videos"].view(2, 16, 3, 2, 4, 4)
    for one, other in ((frames[..., 0, :, :], frames[..., 1, :, :]), (frames[0], frames[1])):
        assert not torch.isclose(one, other, atol=1e-3).flatten(1).all(1).any()
        pair = torch.stack([one.flatten(), other.flatten()])
        assert abs(torch.corrcoef(pair)[0, 1]) < 0.1
    assert not torch.isclose(after["pixel_values"], torch.zeros(16, 96)).any()


def test_frames_that_come_before_channels() -> None:
    """Muse repeats a still image too, and its patches are 2 x 3 x side x side."""
    vision = {
        "pixel_values": torch.zeros(16, 2 * 3 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }
    asked = replace(made(vision), info=describe_model(family("muse_glimmer").model))
    first, second = noised(asked, 500, 0)["pixel_values"].view(16, 2, 48).unbind(1)
    assert torch.equal(first, second) and correlation(first[:, :16], first[:, 16:32]) < 0.3


def test_patches_of_one_frame() -> None:
    """Families without time hand over 3 x side x side."""
    vision = {
        "pixel_values": torch.zeros(4, 3 * 14 * 14),
        "image_grid_thw": torch.tensor([[1, 2, 2]]),
    }
    assert noised(made(vision), 500, 0)["pixel_values"].std() == pytest.approx(0.505175, rel=0.05)


def correlation(one: torch.Tensor, other: torch.Tensor) -> float:
    return abs(float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]))


def test_patches_behind_an_image_stay() -> None:
    """Gemma 4 marks them by places of -1, LFM2 by a mask."""
    values = torch.randn(2, 16, 48)
    places = torch.zeros(2, 16, 2, dtype=torch.long)
    places[1, 12:] = -1
    gemma = {"pixel_values": values, "image_position_ids": places}
    lfm = {
        "pixel_values": values,
        "pixel_attention_mask": (places[..., 0] == 0).long(),
        "spatial_shapes": torch.tensor([[4, 4], [2, 6]]),
    }
    for vision, tokens in ((gemma, (4, 3)), (lfm, (4, 3))):
        after = noised(made(vision, *tokens), 500, 0)["pixel_values"]
        assert torch.equal(after[1, 12:], values[1, 12:])
        assert not torch.isclose(after[0], values[0]).any()
        assert not torch.isclose(after[1, :12], values[1, :12]).any()
        # Each image, and each prompt, has the same numbers.
        assert torch.equal(drawn(values, after)[0, :12].sign(), drawn(values, after)[1, :12].sign())


def test_tiles_of_unlike_size_go_to_their_prompts() -> None:
    """LFM2, MiniCPM-V: visual tokens are in proportion to patches."""
    vision = {
        "pixel_values": torch.zeros(3, 16, 48),
        "pixel_attention_mask": torch.ones(3, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4], [2, 4], [4, 4]]),
    }
    vision["pixel_attention_mask"][1, 8:] = 0
    after = noised(made(vision, 6, 4), 500, 0)["pixel_values"]
    assert torch.equal(after[0], after[2])  # the second prompt begins as the first
    assert correlation(after[0, :8], after[1, :8]) < 0.1  # tiles of an image do not
    with pytest.raises(BadInput, match=r"3 tiles cannot be assigned .* \[5, 5\] visual tokens"):
        noised(made(vision, 5, 5), 500, 0)
    packed = {
        "pixel_values": torch.zeros(1, 3, 4, 40 * 4),
        "target_sizes": torch.tensor([[4, 4], [2, 4], [4, 4]]),
    }
    after = noised(made(packed, 6, 4), 500, 0)["pixel_values"]
    assert torch.equal(after[..., :64], after[..., 96:])
    assert correlation(after[..., :32], after[..., 64:96]) < 0.1


def test_views_of_one_image_have_noise_of_their_own() -> None:
    """DeepSeek-VL's second view, and crops that come in an input of their own."""
    both = {
        "pixel_values": torch.zeros(2, 3, 8, 8),
        "high_res_pixel_values": torch.zeros(2, 3, 32, 32),
    }
    after = noised(made(both, 4, 4), 500, 0)
    low, high = after["pixel_values"], after["high_res_pixel_values"]
    assert torch.equal(low[0], low[1]) and torch.equal(high[0], high[1])
    assert correlation(low[0], high[0].flatten()[: low[0].numel()]) < 0.2
    crops = {
        "pixel_values": torch.zeros(2, 3, 8, 8),
        "pixel_values_local": torch.zeros(3, 3, 8, 8),
        "num_local_patches": [1, 2],
    }
    after = noised(made(crops, 8, 12), 500, 0)
    whole, local = after["pixel_values"], after["pixel_values_local"]
    assert torch.equal(whole[0], whole[1]) and torch.equal(local[0], local[1])
    for one, other in ((whole[0], local[0]), (local[1], local[2])):
        assert correlation(one, other) < 0.2


def test_frames_and_crops_of_patches() -> None:
    """Gemma 4 hands over the frames of all videos, Molmo 2 the crops of all images."""
    frames = {
        "pixel_values_videos": torch.zeros(3, 16, 48),
        "video_position_ids": torch.zeros(3, 16, 2, dtype=torch.long),
        "num_frames_per_video": torch.tensor([2, 1]),
    }
    after = noised(made(frames), 500, 0)["pixel_values_videos"]
    assert torch.equal(after[0], after[2]) and correlation(after[0], after[1]) < 0.1
    crops = {
        "pixel_values": torch.zeros(3, 4, 48),
        "image_token_pooling": torch.tensor([[0, 1], [4, 7], [8, -1]]),
        "image_grids": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
    }
    after = noised(made(crops), 500, 0)["pixel_values"]
    assert torch.equal(after[0], after[2]) and correlation(after[0], after[1]) < 0.2


def test_a_mask_of_tiles_and_a_mask_of_pixels() -> None:
    tiles = {
        "pixel_values": torch.ones(1, 2, 3, 8, 8),
        "pixel_attention_mask": torch.tensor([[True, False]]),
    }
    after = noised(made(tiles), 500, 0)["pixel_values"]
    assert torch.equal(after[0, 1], torch.ones(3, 8, 8))
    assert not torch.isclose(after[0, 0], torch.ones(3, 8, 8)).all()
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[0, :4, :6] = True
    after = noised(made({"pixel_values": torch.ones(1, 3, 8, 8), "pixel_mask": mask}), 500, 0)
    changed = (after["pixel_values"] != 1).all(1)
    assert torch.equal(changed, mask)


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        ({"pixel_values": torch.zeros(1, 2, 3, 8, 8)}, r"pixel_values\[0\] is zero throughout"),
        (
            {
                "pixel_values": torch.ones(1, 4, 48),
                "image_position_ids": torch.full((1, 4, 2), -1),
            },
            r"noise reached nothing in pixel_values of shape \(1, 4, 48\)",
        ),
    ],
)
def test_noise_that_reaches_no_pixel_is_refused(vision: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        noised(made(vision), 500, 0)


@pytest.mark.parametrize("name", ["vcd", "rbd"])
def test_models_whose_pixels_cannot_take_noise_are_refused_at_once(name: str) -> None:
    for model, reason in (("inkling", "without their sizes"), ("fuyu", "which are real")):
        tiny = family(model)
        with pytest.raises(UnsupportedModel, match=f"{name} adds noise .* {reason}"):
            vlmfix.wrap(tiny.model, name)
        (row,) = (row for row in examine(tiny.model)["methods"] if row["name"] == name)
        assert not row["fits"] and reason in row["why"]
    vlmfix.wrap(tiny.model, "vcd:alpha=0")  # without a branch there is nothing to add noise to
    vlmfix.unwrap(tiny.model)


def test_pixels_as_a_list() -> None:
    with pytest.raises(BadInput, match='pixel_values is a list.*return_tensors="pt"'):
        noised(made({"pixel_values": [torch.zeros(1, 3, 8, 8)]}), 500, 0)


@pytest.mark.parametrize(
    "vision", [{}, {"pixel_values": None}, {"image_embeds": torch.zeros(1, 4, 8)}]
)
def test_without_pixels(vision: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="has no pixel_values .*processor returns, not features"):
        noised(made(vision), 500, 0)


@pytest.mark.parametrize(
    "vision",
    [
        {"pixel_values": torch.zeros(16, 96)},
        {"pixel_values": torch.zeros(16, 96), "video_grid_thw": torch.tensor([[1, 4, 4]])},
        {"pixel_values": torch.zeros(16, 96), "image_grid_thw": torch.tensor([[1, 4, 5]])},
        {"pixel_values": torch.zeros(16, 97), "image_grid_thw": torch.tensor([[1, 4, 4]])},
        {"pixel_values": torch.zeros(2, 64, 768)},
        {"pixel_values": torch.zeros(8, 2, 8, 8, 3)},
        {"pixel_values": torch.zeros(8, 8, 8, 3)},
        {"pixel_values": torch.zeros(1, 3, 4, 32), "target_sizes": torch.tensor([[2, 2]])},
        {
            "pixel_values": torch.zeros(2, 4, 48),
            "pixel_attention_mask": torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]]),
        },
    ],
)
def test_pixels_in_a_form_that_nobody_knows(vision: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=r"shape \(\d+, .*add its form to vlmfix/methods/noise.py"):
        noised(made(vision), 500, 0)
