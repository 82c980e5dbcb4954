"""Gaussian noise on the pixels of a prompt, by the schedule of a diffusion model's forward process.

Contrastive methods (VCD, RBD) give a branch images whose content is lost in noise. The noise is
added to the values that the processor made, resized and normalised, as in VCD's code.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from vlmfix.base.contrast import Prompt, noise_generator
from vlmfix.errors import BadInput, UnsupportedModel
from vlmfix.families import ModelInfo, pixel_names, vision_names

__all__ = ["STEPS", "noise_weights", "noised", "require_pixels"]

#: Steps of the forward process; every step leaves less of the image.
STEPS = 1000

_CHANNELS = 3


@functools.cache
def _signal_power() -> torch.Tensor:
    """(STEPS,) float64: the share of the image's power that is left after each step."""
    variances = torch.sigmoid(torch.linspace(-6, 6, STEPS, dtype=torch.float64))
    return (1 - (variances * (5e-3 - 1e-5) + 1e-5)).cumprod(0)


def noise_weights(step: int) -> tuple[float, float]:
    """The weights of image and noise after `step`: x' = image * x + noise * eps, eps ~ N(0, 1).

    Ho et al.: "Denoising Diffusion Probabilistic Models", NeurIPS 2020, arXiv 2006.11239, section
    2, with the variances of VCD's code: 1e-5 to 5e-3, along a sigmoid from -6 to 6.

    Args:
        step: 0 (hardly any noise) to STEPS - 1.
    """
    power = _signal_power()[step].item()
    return math.sqrt(power), math.sqrt(1 - power)


#: Families whose pixels do not tell which of them make one image, by `model_type`.
_UNKNOWN = {
    "fuyu": "its processor hands over padded patches and does not say which are real",
    "inkling_mm_model": "its processor hands over the patches of all images without their sizes",
}

#: Families in whose patches a frame follows the other, each with its channels.
_TIME_FIRST = ("muse_glimmer", "muse_spark")

#: Pixels that belong to the images of `pixel_values`, which are their views as a whole.
_FURTHER_VIEWS = ("high_res_pixel_values", "pixel_values_local")


def require_pixels(name: str, info: ModelInfo, model: torch.nn.Module) -> None:
    """Refuse a model that takes no pixels, or in a form that noise cannot be added to.

    Args:
        name: of the method that adds noise.
        info: structure of the model.
        model: the model.

    Raises:
        UnsupportedModel: such a model.
    """
    reason = _UNKNOWN.get(info.model_type)
    if reason is None and not pixel_names(dict.fromkeys(vision_names(model), True)):
        reason = "it has no image encoder of its own that takes pixels (get_image_features)"
    if reason is not None:
        raise UnsupportedModel(
            f"{name} adds noise to pixels, which it cannot do on model type {info.model_type!r}: "
            f"{reason}. Contrast with something else (m3id, avc)."
        )


def noised(prompt: Prompt, step: int, seed: int | None = None) -> dict[str, Any]:
    """Copy `Prompt.vision` and add noise to all images and videos.

    The noise is sampled in float32 on the CPU by generators of its own: the global state of torch
    is neither read nor changed, and all devices get the same numbers.

    A prompt gets the same noise in any batch, because the generator restarts from the same seed
    with every image that the processor keeps separate (LLaVA-NeXT; Qwen and others with a grid per
    image or video; Gemma 4), else with every prompt. Images of the same size therefore share their
    noise across prompts, and with the former families within a prompt as well. Tiles of an image
    and frames of a video never share noise. The frame that Qwen's processor repeats along the time
    axis of a still image does, because the tower's average over time would otherwise halve the
    noise; the frame that it repeats to make the number of a video's frames even counts as a frame.

    Padding stays as it is: tiles of zeros, where tiles are padded to a common number, patches that
    positions or a mask mark, and what `pixel_attention_mask`, `pixel_mask` or `image_sizes` leave
    out of a padded image.

    Args:
        prompt: its `vision` holds the pixels (every name with "pixel_values" in it), in one of the
            forms that processors return:
            (tiles, 3, height, width), of all prompts one after the other;
            (prompts or images, tiles, 3, height, width), with padding tiles (Mllama: one axis
            more, for the images of a prompt);
            (patches, ...) with a grid per image or video, of all images one after the other; of
            two axes, each patch is 3 x time x side x side, time 1 or 2;
            (images, tiles or frames, patches, channels x side x side), with padding patches;
            (1, 3, side, patches x side) with `target_sizes`, of all tiles side by side.
        step: step of the noise schedule, see `noise_weights`.
        seed: random seed; None: `torch.initial_seed()`, so that `torch.manual_seed` decides.

    Raises:
        BadInput: there are no pixels, they are in none of these forms, or all are padding.
    """
    names = pixel_names(prompt.vision)
    if not names:
        given = ", ".join(prompt.vision) or "none"
        raise BadInput(
            "noise is added to pixels, and this prompt has no pixel_values (its image inputs: "
            f"{given}). Pass what the model's processor returns, not features that were encoded "
            "before."
        )
    image_weight, noise_weight = noise_weights(step)
    copy = dict(prompt.vision)
    for name in names:
        if not isinstance(copy[name], torch.Tensor):
            raise BadInput(
                f"{name} is a {type(copy[name]).__name__}, and noise is added to a tensor. Pass "
                'what the model\'s processor returns with return_tensors="pt".'
            )
        copy[name] = copy[name].clone()
    for name in names:
        if name in _FURTHER_VIEWS:
            continue  # they come with the views of the whole
        for parts in _images(prompt, name, copy):
            generator = noise_generator(seed)
            for part, shape in parts:
                noise = torch.randn(shape, generator=generator).to(part.device)
                part.copy_(image_weight * part.float() + noise_weight * noise)
    for name in names:
        if torch.equal(copy[name], prompt.vision[name]):
            raise BadInput(
                f"noise reached nothing in {name} of shape {tuple(copy[name].shape)}, which is "
                "all padding, so that a noised branch would be the prompt itself. Pass the images "
                "that the model's processor returns."
            )
    return copy


#: A view of pixels, and the shape of the noise that is added to it.
_Part = tuple[torch.Tensor, tuple[int, ...]]


def _images(prompt: Prompt, name: str, vision: Mapping[str, Any]) -> Iterator[list[_Part]]:
    """The parts of all images, independent of the rest of the batch."""
    values = vision[name]
    grids = _grids(name, vision)
    if grids is not None and values.ndim != 3:
        return _patches(prompt, name, values, grids)
    if values.ndim == 3:
        return _padded_patches(prompt, name, vision)
    if "target_sizes" in vision and values.ndim == 4 and len(values) == 1:
        return _side_by_side(prompt, name, vision)
    if values.ndim == 4 and values.shape[1] == _CHANNELS:
        return _tiles(prompt, name, vision)
    if values.ndim == 5 and values.shape[2] == _CHANNELS:
        return _padded_tiles(prompt, name, vision)
    if values.ndim == 6 and values.shape[3] == _CHANNELS:
        return _padded_tiles(prompt, name, {**vision, name: values.flatten(1, 2)})
    raise _unknown_form(name, values)


def _is_video(name: str) -> bool:
    return name.endswith("videos")


def _grids(name: str, vision: Mapping[str, Any]) -> torch.Tensor | None:
    """(images or videos, 2 or 3), patches on each axis; None: the family has none."""
    names = ("video_grid_thw",) if _is_video(name) else ("image_grid_thw", "image_grid_hw")
    return next((vision[grid] for grid in names if vision.get(grid) is not None), None)


def _patches(
    prompt: Prompt, name: str, values: torch.Tensor, grids: torch.Tensor
) -> Iterator[list[_Part]]:
    """(patches, ...) and a grid per image or video."""
    counts = grids.prod(1).tolist()
    if sum(counts) != len(values):
        raise _unknown_form(name, values)
    if values.ndim > 2:
        for image in torch.split(values, counts):
            yield [_whole(image)]
        return
    # No width fits both times: 3 n^2 = 6 m^2 has no solution in whole numbers.
    for time in (1, 2):
        side = math.isqrt(values.shape[1] // (_CHANNELS * time))
        if _CHANNELS * time * side**2 == values.shape[1]:
            break
    else:
        raise _unknown_form(name, values)
    for image in torch.split(values, counts):
        sampled = time if _is_video(name) else 1
        if prompt.info.model_type in _TIME_FIRST:
            part = image.view(-1, time, _CHANNELS, side, side)
            yield [(part, (len(image), sampled, _CHANNELS, side, side))]
            continue
        part = image.view(-1, _CHANNELS, time, side, side)
        yield [(part, (len(image), _CHANNELS, sampled, side, side))]


def _padded_patches(prompt: Prompt, name: str, vision: Mapping[str, Any]) -> Iterator[list[_Part]]:
    """(images, tiles or frames, patches, width), padded behind their real patches."""
    values = vision[name]
    places = vision.get("video_position_ids" if _is_video(name) else "image_position_ids")
    mask = vision.get("pixel_attention_mask") if places is None else (places != -1).all(-1)
    pooled = vision.get("video_token_pooling" if _is_video(name) else "image_token_pooling")
    if mask is None and pooled is None:
        raise _unknown_form(name, values)
    counts = [values.shape[1]] * len(values)
    if mask is not None:
        if mask.shape != values.shape[:2] or bool((mask.int().diff(dim=1) > 0).any()):
            raise _unknown_form(name, values)
        counts = mask.sum(1).tolist()
    parts = [_whole(tile[:count]) for tile, count in zip(values, counts, strict=True)]
    shapes = vision.get("spatial_shapes")
    frames = vision.get("num_frames_per_video") if _is_video(name) else None
    if frames is not None:  # Gemma 4
        return _runs(parts, frames.tolist())
    if pooled is not None:  # Molmo 2
        return _crops(prompt, name, vision, pooled, parts)
    if shapes is not None:  # LFM2: tiles of all prompts
        return _by_prompt(prompt, parts, shapes.prod(1).tolist())
    return iter([[part] for part in parts])


def _crops(
    prompt: Prompt, name: str, vision: Mapping[str, Any], pooled: torch.Tensor, parts: list[_Part]
) -> Iterator[list[_Part]]:
    """The crops of each image: those whose patches its tokens are pooled from."""
    if _is_video(name):  # frames, rows and columns
        tokens = vision["video_grids"].prod(1)
    else:  # rows and columns of the whole view, and of its crops
        grids = vision["image_grids"]
        tokens = grids[:, 0] * grids[:, 1] + grids[:, 2] * grids[:, 3]
    for own in torch.split(pooled, tokens.tolist()):
        numbers = (own[own >= 0] // vision[name].shape[1]).unique()
        yield [parts[number] for number in numbers.tolist()]


def _side_by_side(prompt: Prompt, name: str, vision: Mapping[str, Any]) -> Iterator[list[_Part]]:
    """(1, 3, side, patches x side): the patches of all tiles of all prompts (MiniCPM-V)."""
    values, sizes = vision[name], vision["target_sizes"].prod(1).tolist()
    side = values.shape[2]
    if _is_video(name) or sum(sizes) * side != values.shape[3]:
        raise _unknown_form(name, values)
    tiles = torch.split(values, [size * side for size in sizes], dim=3)
    return _by_prompt(prompt, [_whole(tile) for tile in tiles], sizes)


def _tiles(prompt: Prompt, name: str, vision: Mapping[str, Any]) -> Iterator[list[_Part]]:
    """(tiles, 3, height, width): only the visual tokens tell which prompt a tile belongs to."""
    values, sizes, masks = vision[name], vision.get("image_sizes"), vision.get("pixel_mask")
    if sizes is not None and len(sizes) == len(values):  # Pixtral: images padded to one size
        for image, (height, width) in zip(values, torch.as_tensor(sizes).tolist(), strict=True):
            yield [_whole(image[:, :height, :width])]
        return
    views = [
        [_whole(tile if masks is None else _real_corner(tile, masks[place]))]
        for place, tile in enumerate(values)
    ]
    high = vision.get("high_res_pixel_values")
    if high is not None:  # DeepSeek-VL: each image twice
        for own, other in zip(views, high, strict=True):
            own.append(_whole(other))
    crops = vision.get("pixel_values_local")
    if crops is not None:  # the images with crops make more tokens, and stand for themselves
        behind = _runs(
            list(map(_whole, crops)), torch.as_tensor(vision["num_local_patches"]).tolist()
        )
        for own, parts in zip(views, behind, strict=True):
            yield own + parts
        return
    for together in _by_prompt(prompt, views, [1] * len(views)):
        yield list(itertools.chain.from_iterable(together))


def _by_prompt(prompt: Prompt, tiles: list[Any], weights: Sequence[int]) -> Iterator[list[Any]]:
    """The tiles of each prompt, by its visual tokens, which are in proportion to weights."""
    made = prompt.visual.sum(1).tolist() if prompt.placeholders is None else prompt.placeholders
    total, weight = sum(made), sum(weights)
    ends = {end: place for place, end in enumerate(itertools.accumulate(weights, initial=0))}
    start = 0
    for stop in itertools.accumulate(made):
        end = ends.get(stop * weight // total) if total and not stop * weight % total else None
        if end is None:
            raise BadInput(
                f"{len(tiles)} tiles cannot be assigned to the prompts, which have {list(made)} "
                "visual tokens. Pass images and prompts as one call of the model's processor "
                "returns them; for a family whose tiles differ in tokens, pass one prompt at a "
                "time."
            )
        if end > start:
            yield tiles[start:end]
        start = end


def _runs(parts: list[_Part], counts: Sequence[int]) -> Iterator[list[_Part]]:
    """The first parts, the ones behind them, and so on."""
    left = iter(parts)
    for count in counts:
        yield list(itertools.islice(left, count))


def _padded_tiles(prompt: Prompt, name: str, vision: Mapping[str, Any]) -> Iterator[list[_Part]]:
    """(prompts or images, tiles, 3, height, width) with tiles of zeros as padding."""
    values, masks = vision[name], vision.get("pixel_attention_mask")
    for index, tiles in enumerate(values):
        parts = []
        for place, tile in enumerate(tiles):
            mask = None if masks is None else masks[index, place].bool()
            # SmolVLM and Idefics mark padding by zeros, and LLaVA-NeXT pads with them.
            if not tile.any() or (mask is not None and not mask.any()):
                continue
            parts.append(_whole(tile if mask is None else _real_corner(tile, mask)))
        # Rows may be prompts, of which one has no image.
        if not parts and (len(values) != len(prompt.visual) or bool(prompt.visual[index].any())):
            raise BadInput(
                f"{name}[{index}] is zero throughout, which marks padding, so that noise would "
                "reach nothing of this image. Pass the images that the model's processor returns."
            )
        yield parts


def _real_corner(tile: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The upper left corner, where a mask (height, width) is 1; a mask of one value: all of it."""
    if not mask.ndim:
        return tile
    return tile[:, : int(mask.bool().any(1).sum()), : int(mask.bool().any(0).sum())]


def _whole(tile: torch.Tensor) -> _Part:
    return tile, tuple(tile.shape)


def _unknown_form(name: str, values: torch.Tensor) -> BadInput:
    return BadInput(
        f"{name} of shape {tuple(values.shape)} is in no form that noise can be added to: tiles "
        "(N, 3, height, width) or (B, T, 3, height, width), patches with a grid per image or "
        "video, or (N, patches, width) "
        "with a mask or positions. Pass what the model's processor returns; for another "
        "family, add its form to vlmfix/methods/noise.py."
    )
