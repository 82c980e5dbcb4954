"""Which picture a name means, and that it is read as `vlmfix.generate` reads it."""

from __future__ import annotations

import json
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evals_worlds import FakeModel
from PIL import Image

import vlmfix.evals
from vlmfix.errors import BadInput
from vlmfix.evals.inputs.coco import CocoData
from vlmfix.images import load_image

RED, GREEN, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 0)


def png(colour: tuple[int, int, int]) -> bytes:
    return encoded(Image.new("RGB", (8, 8), colour))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def data(folder: Path, names: list[str], pictures: dict[str, bytes], packed: bool) -> CocoData:
    """COCO-format data whose images have these `file_name`s, as a folder or a .zip."""
    images = [{"id": n, "file_name": name} for n, name in enumerate(names, start=1)]
    kinds = [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}, {"id": 3, "name": "cup"}]
    boxes = [
        {"id": 3 * image["id"] + kind, "image_id": image["id"], "category_id": kind}
        for image in images
        for kind in (1, 2, 3)
    ]
    content = json.dumps({"images": images, "annotations": boxes, "categories": kinds}).encode()
    files = {"annotations/instances.json": content, **pictures}
    if packed:
        with zipfile.ZipFile(folder / "d.zip", "w") as archive:
            for name, file in files.items():
                archive.writestr(name, file)
        return CocoData(folder / "d.zip")
    for name, file in files.items():
        path = folder / "d" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file)
    return CocoData(folder / "d")


def colour(source: CocoData, name: str) -> Any:
    return source.image(name).getpixel((4, 4))


@pytest.mark.parametrize("packed", [True, False])
def test_the_whole_name_chooses_the_picture(tmp_path: Path, packed: bool) -> None:
    two = {"images/a/1.png": png(RED), "images/b/1.png": png(GREEN)}
    source = data(tmp_path, ["a/1.png", "b/1.png", "c/1.png"], two, packed)
    assert (colour(source, "a/1.png"), colour(source, "b/1.png")) == (RED, GREEN)
    # A picture of that last name in another folder is another picture.
    with pytest.raises(BadInput, match="lacks 1 of 1 images, first c/1.png"):
        source.require_images(["c/1.png"])


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", ["9" * 400, "", ".", "..", "/etc/hostname", "\0.png", "../d.zip"])
def test_a_name_that_is_no_name_names_nothing(tmp_path: Path, packed: bool, name: str) -> None:
    source = data(tmp_path, ["1.png"], {"images/1.png": png(RED)}, packed)
    with pytest.raises(BadInput, match="lacks 1 of 1 images"):
        source.require_images([name])


@pytest.mark.parametrize("packed", [True, False])
def test_a_name_that_fits_several_pictures_is_refused(tmp_path: Path, packed: bool) -> None:
    both = {"images/1.png": png(RED), "depth/1.png": png(BLACK)}
    source = data(tmp_path, ["1.png", "images/1.png"], both, packed)
    with pytest.raises(BadInput, match=r"2 different pictures called 1\.png: .*depth/1\.png"):
        source.require_images(["1.png"])
    assert colour(source, "images/1.png") == RED  # the full path is no question


@pytest.mark.parametrize("packed", [True, False])
def test_copies_of_a_picture_and_the_full_path_are_no_doubt(tmp_path: Path, packed: bool) -> None:
    copies = {"images/1.png": png(RED), "val/1.png": png(RED), "2.png": png(GREEN)}
    source = data(tmp_path, ["1.png", "2.png"], {**copies, "depth/2.png": png(BLACK)}, packed)
    assert (colour(source, "1.png"), colour(source, "2.png")) == (RED, GREEN)


def turned() -> bytes:
    """A picture of 8 x 4, red on its left; upright it is 4 x 8."""
    image = Image.new("RGB", (8, 4), GREEN)
    image.paste(RED, (0, 0, 4, 4))
    exif = image.getexif()
    exif[0x0112] = 6
    return encoded(image, exif=exif)


ODD = {
    "16-bit grey": encoded(Image.fromarray(np.full((8, 8), 1000, dtype=np.uint16))),
    "float": encoded(Image.fromarray(np.full((8, 8), 0.5, dtype=np.float32)), "TIFF"),
    "large": encoded(Image.new("RGB", (40, 40))),
    "turned": turned(),
    "palette": encoded(Image.new("P", (8, 8), 3)),
}


@pytest.mark.parametrize("kind", ODD)
def test_eval_reads_a_picture_as_generate_does(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    source = data(tmp_path, ["1.png"], {"images/1.png": ODD[kind]}, packed=False)
    outcomes = []
    for read in (lambda: load_image(ODD[kind]), lambda: source.image("1.png")):
        try:
            image = read()
            outcomes.append((image.mode, image.size, image.tobytes()))
        except BadInput:
            outcomes.append("refused")
    assert outcomes[0] == outcomes[1]
    assert (outcomes[0] == "refused") == (kind in ("16-bit grey", "float", "large"))
    if kind == "turned":
        assert outcomes[0][1] == (4, 8)


def test_a_picture_without_pixels_is_refused() -> None:
    with pytest.raises(BadInput, match="0 x 5"):
        load_image(Image.new("RGB", (0, 5)))


@pytest.mark.parametrize("packed", [True, False])
def test_a_damaged_picture_fails_alone(tmp_path: Path, packed: bool) -> None:
    pictures = {f"images/{n}.png": png((n, 0, 0)) for n in range(1, 9)}
    pictures["images/3.png"] = b"no picture"
    source = data(tmp_path, [f"{n}.png" for n in range(1, 9)], pictures, packed)
    settings: dict[str, Any] = {"n_images": 8, "batch_size": 100, "quiet": True}
    out = tmp_path / "out"
    for resume in (False, True):
        model = FakeModel(lambda method, sample: "Yes")
        results = vlmfix.evals.evaluate(
            ["chair"], model, data=source, output=out, resume=resume, **settings
        )
        assert results["errors"] == 1
        lines = (out / "samples_chair_base.jsonl").read_text().splitlines()
        failed = [row for row in map(json.loads, lines) if row["error"]]
        assert [row["image"] for row in failed] == ["3.png"] and len(lines) == 8
        assert "3.png is not a readable image" in failed[0]["error"]
