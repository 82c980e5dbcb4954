"""Gaussian noise on the pixels of a prompt, by the schedule of a diffusion model's forward process.

Contrastive methods (VCD, RBD) give a branch images whose content is lost in noise. The noise is
added to the values that the processor made, resized and normalised, as in VCD's code.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch

from vlmfix.base.contrast import Prompt, noise_generator
from vlmfix.errors import BadInput

__all__ = ["STEPS", "noise_weights", "noised"]

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


def noised(prompt: Prompt, step: int, seed: int | None = None) -> dict[str, Any]:
    """Copy `Prompt.vision` and add noise to all images and videos.

    The noise is sampled in float32 on the CPU by generators of its own: the global state of torch
    is neither read nor changed, and all devices get the same numbers.

    A prompt gets the same noise in any batch, because the generator restarts from the same seed
    with every image that the processor keeps separate (LLaVA-NeXT; Qwen and others with a grid per
    image or video), else with every prompt. Images of the same size therefore share their noise
    across prompts, and with the former families within a prompt as well. Tiles of an image and
    frames of a video never share noise. The frame that Qwen's processor repeats along the time axis
    of a still image does, because the tower's average over time would otherwise halve the noise;
    the frame that it repeats to make the number of a video's frames even counts as a frame.

    Padding stays as it is: tiles of zeros, where tiles are padded to a common number, and what
    `pixel_attention_mask` or `image_sizes` leave out of a padded image.

    Args:
        prompt: its `vision` holds the pixels, in one of the forms that processors return:
            (tiles, 3, height, width), of all prompts one after the other;
            (prompts or images, tiles, 3, height, width), with padding tiles;
            (patches, 3 x time x side x side) with `image_grid_thw` or `video_grid_thw`, time 1 or
            2, of all images one after the other.
        step: step of the noise schedule, see `noise_weights`.
        seed: random seed; None: `torch.initial_seed()`, so that `torch.manual_seed` decides.

    Raises:
        BadInput: there are no pixels, or they are in none of these forms.
    """
    names = [n for n in ("pixel_values", "pixel_values_videos") if prompt.vision.get(n) is not None]
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
        copy[name] = prompt.vision[name].clone()
        for parts in _images(prompt, name, copy[name]):
            generator = noise_generator(seed)
            for part, shape in parts:
                noise = torch.randn(shape, generator=generator).to(part.device)
                part.copy_(image_weight * part.float() + noise_weight * noise)
    return copy


#: A view of pixels, and the shape of the noise that is added to it.
_Part = tuple[torch.Tensor, tuple[int, ...]]


def _images(prompt: Prompt, name: str, values: torch.Tensor) -> Iterator[list[_Part]]:
    """The parts of all images, independent of the rest of the batch."""
    if values.ndim == 2:
        return _patches(prompt, name, values)
    if values.ndim == 4:
        return _tiles(prompt, values)
    if values.ndim == 5:
        return _padded_tiles(prompt, values)
    raise _unknown_form(name, values)


def _patches(prompt: Prompt, name: str, values: torch.Tensor) -> Iterator[list[_Part]]:
    """(patches, 3 x time x side x side) and a grid per image or video."""
    video = name == "pixel_values_videos"
    grids = prompt.vision.get("video_grid_thw" if video else "image_grid_thw")
    if grids is None or int(grids.prod(1).sum()) != len(values):
        raise _unknown_form(name, values)
    # No width fits both times: 3 n^2 = 6 m^2 has no solution in whole numbers.
    for time in (1, 2):
        side = math.isqrt(values.shape[1] // (_CHANNELS * time))
        if _CHANNELS * time * side**2 == values.shape[1]:
            break
    else:
        raise _unknown_form(name, values)
    for image in torch.split(values, grids.prod(1).tolist()):
        sampled = time if video else 1
        part = image.view(-1, _CHANNELS, time, side, side)
        yield [(part, (len(image), _CHANNELS, sampled, side, side))]


def _tiles(prompt: Prompt, values: torch.Tensor) -> Iterator[list[_Part]]:
    """(tiles, 3, height, width): only the visual tokens tell which prompt a tile belongs to."""
    sizes = prompt.vision.get("image_sizes")
    if sizes is not None and len(sizes) == len(values):  # Pixtral: images padded to one size
        for image, (height, width) in zip(values, torch.as_tensor(sizes).tolist(), strict=True):
            yield [_whole(image[:, :height, :width])]
        return
    made = prompt.visual.sum(1).tolist() if prompt.placeholders is None else prompt.placeholders
    tokens = torch.tensor(made)
    each, rest = divmod(int(tokens.sum()), len(values))
    if not each or rest or bool((tokens % each).any()):
        raise BadInput(
            f"{len(values)} tiles cannot be assigned to the prompts, which have {tokens.tolist()} "
            "visual tokens. Pass images and prompts as one call of the model's processor returns "
            "them; for a family whose tiles differ in tokens, pass one prompt at a time."
        )
    for tiles in torch.split(values, (tokens // each).tolist()):
        yield [_whole(tile) for tile in tiles]


def _padded_tiles(prompt: Prompt, values: torch.Tensor) -> Iterator[list[_Part]]:
    """(prompts or images, tiles, 3, height, width) with tiles of zeros as padding."""
    masks = prompt.vision.get("pixel_attention_mask")
    for index, tiles in enumerate(values):
        parts = []
        for place, tile in enumerate(tiles):
            if (
                not tile.any()
            ):  # as SmolVLM and Idefics mark padding; LLaVA-NeXT pads with zeros too
                continue
            if masks is not None:  # 1 in the upper left corner, where the image is
                real = masks[index, place].bool()
                tile = tile[:, : int(real.any(1).sum()), : int(real.any(0).sum())]
            parts.append(_whole(tile))
        yield parts


def _whole(tile: torch.Tensor) -> _Part:
    return tile, tuple(tile.shape)


def _unknown_form(name: str, values: torch.Tensor) -> BadInput:
    return BadInput(
        f"{name} of shape {tuple(values.shape)} is in no form that noise can be added to: tiles "
        "(N, 3, height, width) or (B, T, 3, height, width), or patches (N, 3 x time x side x side) "
        "with a grid per image or video. Pass what the model's processor returns; for another "
        "family, add its form to vlmfix/methods/noise.py."
    )
