"""Where the pieces of an image lie, for the processors that cut, squeeze or tile."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from transformers import (
    BatchFeature,
    CLIPImageProcessorPil,
    Gemma3ImageProcessorPil,
    GotOcr2ImageProcessorPil,
    Idefics3ImageProcessorPil,
    SiglipImageProcessorPil,
)

import vlmfix
from vlmfix.analysis.geometry import piece_places
from vlmfix.errors import UnsupportedModel


class OfImages:
    """The half of a processor that cuts images."""

    chat_template = "an image, then its text"

    def __init__(self, cut: Any) -> None:
        self.cut = cut

    def apply_chat_template(self, chat: Any, **kwargs: Any) -> str:
        parts = [part for message in chat for part in message["content"]]
        return " ".join(part.get("text", "<image>") for part in parts)

    def __call__(self, images: Any, **kwargs: Any) -> BatchFeature:
        return BatchFeature({"pixel_values": self.cut(images)})


def of(processor: Any, **kwargs: Any) -> OfImages:
    def cut(images: Any) -> torch.Tensor:
        pixels: torch.Tensor = processor(images, return_tensors="pt", **kwargs)["pixel_values"]
        return pixels

    return OfImages(cut)


SQUARE = {"height": 28, "width": 28}


@pytest.mark.parametrize("size", [(28, 28), (640, 480), (33, 100), (5, 5), (2, 3), (1, 1)])
def test_squeezed_images_are_whole(size: tuple[int, int]) -> None:
    _, processor = vlmfix.load("emoji")
    assert piece_places(processor, *size) == [(0, 0, *size)]
    assert piece_places(of(SiglipImageProcessorPil(size=SQUARE)), *size) == [(0, 0, *size)]


def test_the_middle_of_llava() -> None:
    processor = of(CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=336))
    assert piece_places(processor, 500, 500) == [(0, 0, 500, 500)]
    ((left, top, right, bottom),) = piece_places(processor, 640, 480)
    # The processor takes pixels 56 to 392 of 448 x 336.
    assert (top, bottom) == (0, 480)
    assert (left, right) == (pytest.approx(80, abs=1), pytest.approx(560, abs=1))
    ((left, top, right, bottom),) = piece_places(processor, 300, 1200)
    assert (left, right) == (0, 300)
    assert (top, bottom) == (pytest.approx(450, abs=2), pytest.approx(750, abs=2))


def near(found: list[Any], expected: list[Any], slack: float) -> None:
    assert len(found) == len(expected)
    for box, other in zip(found, expected, strict=True):
        assert box == pytest.approx(other, abs=slack)


def test_tiles_and_thumbnail_of_internvl() -> None:
    cut = GotOcr2ImageProcessorPil(size={"height": 56, "width": 56}, crop_to_patches=True)
    found = piece_places(of(cut, min_patches=1, max_patches=6), 900, 600)
    thirds = [(300 * x, 300 * y, 300 * x + 300, 300 * y + 300) for y in (0, 1) for x in (0, 1, 2)]
    near(found, [*thirds, (0, 0, 900, 600)], 4)
    assert found[-1] == (0, 0, 900, 600)
    assert found[0][:2] == (0, 0) and found[5][2:] == (900, 600)


def test_tiles_and_whole_of_idefics3() -> None:
    cut = Idefics3ImageProcessorPil(
        size={"longest_edge": 112}, max_image_size={"longest_edge": 56}, do_image_splitting=True
    )
    found = piece_places(of(cut), 800, 800)
    tiles = [(400 * x, 400 * y, 400 * x + 400, 400 * y + 400) for y in (0, 1) for x in (0, 1)]
    near(found, [*tiles, (0, 0, 800, 800)], 6)


def test_crops_of_gemma3() -> None:
    cut = Gemma3ImageProcessorPil(size={"height": 56, "width": 56})
    found = piece_places(
        of(cut, do_pan_and_scan=True, pan_and_scan_min_crop_size=10,
           pan_and_scan_max_num_crops=4, pan_and_scan_min_ratio_to_activate=1.2),
        800, 400,
    )  # fmt: skip
    near(found, [(0, 0, 800, 400), (0, 0, 400, 400), (400, 0, 800, 400)], 4)
    assert piece_places(of(cut), 800, 400) == [(0, 0, 800, 400)]


def as_pixels(image: Image.Image) -> torch.Tensor:
    values = torch.from_numpy(np.asarray(image.resize((56, 56))).copy()).permute(2, 0, 1)
    return values.float()[None] / 255


@pytest.mark.parametrize(
    "change",
    [
        ImageOps.mirror,
        lambda image: image.rotate(90),
        lambda image: image.rotate(20),
        lambda image: ImageOps.pad(image, (60, 60)),
        lambda image: ImageOps.solarize(image),
    ],
    ids=["mirrored", "turned", "slanted", "padded", "bent"],
)
def test_what_is_no_upright_rectangle_is_refused(change: Any) -> None:
    processor = OfImages(lambda images: as_pixels(change(images[0][0])))
    with pytest.raises(UnsupportedModel, match="place of a visual token"):
        piece_places(processor, 60, 40)


def test_any_upright_rectangle_is_found() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        width, height = rng.integers(60, 900, 2).tolist()
        left, right = sorted(rng.integers(0, width + 1, 2).tolist())
        top, bottom = sorted(rng.integers(0, height + 1, 2).tolist())
        if right - left < 20 or bottom - top < 20:
            continue
        box = (left, top, right, bottom)

        def cut(images: Any, box: Any = box, size: Any = (width, height)) -> torch.Tensor:
            image = images[0][0]
            return as_pixels(image.crop(box) if image.size == size else image)

        (found,) = piece_places(OfImages(cut), width, height)
        assert found == pytest.approx(box, abs=max(width, height) / 60)
