"""The committed evaluation split: COCO layout, true captions, visible objects, same bytes again."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlmfix.emoji import evaluation_split, example_images, language
from vlmfix.emoji.catalogue import CATEGORIES
from vlmfix.emoji.dataset import main, split_scenes, write_split
from vlmfix.emoji.draw import visible_shares
from vlmfix.emoji.world import SIZE
from vlmfix.errors import BadInput


@pytest.fixture(scope="module")
def archive() -> Iterator[zipfile.ZipFile]:
    with zipfile.ZipFile(evaluation_split()) as opened:
        yield opened


@pytest.fixture(scope="module")
def instances(archive: zipfile.ZipFile) -> dict[str, Any]:
    return json.loads(archive.read("annotations/instances.json"))


@pytest.fixture(scope="module")
def present(instances: dict[str, Any]) -> dict[int, set[str]]:
    names = {c["id"]: c["name"] for c in instances["categories"]}
    found: dict[int, set[str]] = {image["id"]: set() for image in instances["images"]}
    for row in instances["annotations"]:
        found[row["image_id"]].add(names[row["category_id"]])
    return found


def test_size_and_count(archive: zipfile.ZipFile, instances: dict[str, Any]) -> None:
    assert evaluation_split().stat().st_size < 5_000_000
    assert len(instances["images"]) >= 500
    files = {name for name in archive.namelist() if name.startswith("images/")}
    assert files == {"images/" + image["file_name"] for image in instances["images"]}
    assert "images/emoji_000000000001.png" in files


def test_categories_are_ours(instances: dict[str, Any]) -> None:
    assert [(c["id"], c["name"]) for c in instances["categories"]] == [
        (c.coco_id, c.name) for c in CATEGORIES
    ]


def test_every_image_has_three_categories(present: dict[int, set[str]]) -> None:
    assert min(map(len, present.values())) >= 3


def test_boxes_and_ids(instances: dict[str, Any]) -> None:
    rows = instances["annotations"]
    assert len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        x, y, width, height = row["bbox"]
        assert 0 <= x < x + width <= SIZE and 0 <= y < y + height <= SIZE
        assert row["area"] == width * height and row["iscrowd"] == 0
        assert row["segmentation"] == [[x, y, x + width, y, x + width, y + height, x, y + height]]


def test_images_are_rgb_of_the_stated_size(archive: zipfile.ZipFile) -> None:
    for _, picture in example_images(5):
        assert picture.mode == "RGB" and picture.size == (SIZE, SIZE)
    with pytest.raises(BadInput, match="must be 0 to"):
        example_images(100_000)


def test_captions_are_true(archive: zipfile.ZipFile, present: dict[int, set[str]]) -> None:
    rows = json.loads(archive.read("annotations/captions.json"))["annotations"]
    assert len(rows) == 5 * len(present)
    for row in rows:
        assert set(language.mentioned(row["caption"])) == present[row["image_id"]]


def test_objects_are_really_visible() -> None:
    for _, scene in split_scenes("evaluation", 60):
        assert min(visible_shares(scene)) >= 0.6


def test_a_prefix_rebuilds(
    tmp_path: Path, archive: zipfile.ZipFile, instances: dict[str, Any]
) -> None:
    for name in ("a.zip", "b.zip"):
        write_split(tmp_path / name, "evaluation", 20)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip") as small:
        again = json.loads(small.read("annotations/instances.json"))
        assert again["images"] == instances["images"][:20]
        number = len(again["annotations"])
        assert again["annotations"] == instances["annotations"][:number]
        name = "annotations/captions.json"
        told, stored_told = (
            json.loads(source.read(name))["annotations"] for source in (small, archive)
        )
        assert told == stored_told[: len(told)]
        for image in again["images"]:
            name = "images/" + image["file_name"]
            # Pixels, not bytes: another zlib packs the same picture differently, and another
            # Pillow rounds a few pixels of a scaled glyph to the next level.
            ours, stored = (
                np.asarray(Image.open(io.BytesIO(source.read(name))), dtype=int)
                for source in (small, archive)
            )
            assert np.abs(ours - stored).max() <= 4
            assert (ours != stored).any(-1).mean() <= 0.02


def test_tuning_split_differs(tmp_path: Path) -> None:
    tuning = [scene for _, scene in split_scenes("tuning", 20)]
    assert tuning != [scene for _, scene in split_scenes("evaluation", 20)]


def test_bad_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BadInput, match="no split 'test'"):
        list(split_scenes("test", 3))
    with pytest.raises(BadInput, match="does not exist"):
        write_split(tmp_path / "no" / "x.zip")
    assert main(["--output", str(tmp_path / "x.zip"), "--images", "0"]) == 2
    assert "at least 1 image" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # theirs
def test_pycocotools_loads_it(tmp_path: Path, archive: zipfile.ZipFile) -> None:
    coco_module = pytest.importorskip("pycocotools.coco")
    archive.extractall(tmp_path, ["annotations/instances.json", "annotations/captions.json"])
    coco = coco_module.COCO(str(tmp_path / "annotations/instances.json"))
    dogs = coco.getImgIds(catIds=coco.getCatIds(catNms=["dog"]))
    assert dogs and coco.annToMask(coco.loadAnns(coco.getAnnIds(imgIds=dogs[:1]))[0]).sum() > 0
    captions = coco_module.COCO(str(tmp_path / "annotations/captions.json"))
    assert len(captions.loadAnns(captions.getAnnIds(imgIds=[1]))) == 5
