"""CHAIR: caption files of any project, lists of images, repaired rules, captions cut to length."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from evals_worlds import write_world

from vlmfix.errors import BadInput
from vlmfix.evals.chair.files import choose_captions, image_id_of, read_image_ids
from vlmfix.evals.chair.objects import mentions
from vlmfix.evals.chair.task import LENGTH_CAPS, Chair, score_answers
from vlmfix.evals.inputs.coco import CocoData
from vlmfix.evals.inputs.rows import read_rows
from vlmfix.evals.score import score
from vlmfix.evals.tasks import Answer, Options

TRUTH = {1: frozenset({"dog"}), 2: frozenset({"cup"}), 391895: frozenset({"person"})}


@pytest.mark.parametrize(
    "row",
    [
        {"image_id": 391895, "caption": "A man."},  # OPERA, PAI
        {"image": "COCO_val2014_000000391895.jpg", "text": "A man."},
        {"image": "val2014/COCO_val2014_000000391895.jpg", "response": "A man."},
        {"image_id": "391895", "answer": "A man.", "error": None},
    ],
)
def test_captions_under_any_names(tmp_path: Path, row: dict[str, Any]) -> None:
    path = tmp_path / "captions.jsonl"
    path.write_text(json.dumps(row))
    rows = read_rows(path, "CHAIR captions")
    assert choose_captions(rows) == [(391895, "A man.")]
    scored = score_answers(TRUTH, rows)
    assert (scored["counts"]["caption"]["recalled"], scored["n_images"]) == (1, 1)


def test_the_id_of_an_image_is_the_last_twelve_digits_of_its_name() -> None:
    """OPERA takes six, which is the same for COCO and not for larger sets."""
    assert image_id_of("v3_7000123456789.jpg", "here") == 123456789
    assert image_id_of("images/000000000007.png", "here") == image_id_of(7, "here") == 7


def test_of_repeated_captions_the_last_counts_and_a_warning_says_so() -> None:
    rows = [
        {"image_id": 1, "caption": "A cat."},
        {"image_id": 2, "caption": "A cup."},
        {"image_id": 1, "caption": "A dog."},
    ]
    with pytest.warns(UserWarning, match=r"3 captions of 2 images.*\(images 1\)"):
        last = score_answers(TRUTH, rows)
    assert last["counts"]["caption"]["n"] == 2 and last["repeated"] == 1
    assert last["counts"]["caption"]["hallucinated"] == 0
    everything = score_answers(TRUTH, rows, repeats="all")
    assert everything["counts"]["caption"]["n"] == 3 and everything["repeated"] == 0
    assert everything["counts"]["caption"]["hallucinated"] == 1
    with pytest.raises(BadInput, match="choose 'last' or 'all'"):
        score_answers(TRUTH, rows, repeats="first")


def test_images_that_must_have_captions(tmp_path: Path) -> None:
    ids = tmp_path / "ids.txt"
    ids.write_text("1\n391895\n")
    rows = [{"image_id": image, "caption": ""} for image in (2, 391895, 1)]
    assert score_answers(TRUTH, rows, image_ids=ids)["n_images"] == 2
    with pytest.raises(BadInput, match=r"1 of 2 images have no caption: \[391895\]"):
        score_answers(TRUTH, [rows[0], rows[2]], image_ids=ids)


def test_captions_of_strange_images_are_listed(tmp_path: Path) -> None:
    data = CocoData(write_world(tmp_path / "w", 3))
    with pytest.raises(BadInput, match=r"no ground truth for 1 images: \[77\]"):
        score_answers(data, [{"image_id": i, "caption": "A dog."} for i in (1, 77)])


@pytest.mark.parametrize(
    "content",
    [
        "3\n1\n2\n",
        "[3, 1, 2]",
        "COCO_val2014_000000000003.jpg\nCOCO_val2014_000000000001.jpg\r\n2",
        '["w_000000000003.png", "w_000000000001.png", "w_000000000002.png"]',
        '{"image_id": 3, "caption": "x"}\n{"image_id": 1, "caption": ""}\n{"image": "2.png"}',
        "3,1,2",
    ],
)
def test_lists_of_images_in_any_form_keep_their_order(tmp_path: Path, content: str) -> None:
    path = tmp_path / "ids"
    path.write_text(content)
    assert read_image_ids(path) == [3, 1, 2]
    world = CocoData(write_world(tmp_path / "w", 5))
    task = Chair(world, Options(image_ids=path))
    assert [s.image_id for s in task.samples] == [3, 1, 2]
    assert not task.partial and Chair(world, Options(image_ids=path, limit=2)).partial


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "names no image"),
        ("1\n2\n1\n", "image ids: 1 repeated: 1"),
        ("1\ncat.jpg\n", "ids, entry 2: the image is 'cat.jpg'"),
        ("1\n\ntrue", "ids, entry 3: the image is 'true'"),
        ("{}", "line 1: the image is None"),
    ],
)
def test_broken_lists_of_images_say_where(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "ids"
    path.write_text(content)
    with pytest.raises(BadInput) as caught:
        read_image_ids(path)
    assert message in str(caught.value)


def test_images_that_the_data_does_not_list(tmp_path: Path) -> None:
    (tmp_path / "ids").write_text("1\n9\n")
    with pytest.raises(BadInput, match=r"ids names 1 images that .* does not list: \[9\]"):
        Chair(CocoData(write_world(tmp_path / "w", 3)), Options(image_ids=tmp_path / "ids"))


@pytest.mark.parametrize(
    ("caption", "compat", "fixed"),
    [
        ("Two men on a motor bike.", [], ["person", "motorcycle"]),
        ("A cheesecake and an iPhone.", [], ["cake", "cell phone"]),
        ("An orange vest, an orange cat.", ["orange", "orange", "cat"], ["cat"]),
        ("An orange and white kite.", ["orange", "kite"], ["kite"]),
        ("An orange and a banana, three oranges sit.", ["orange", "banana", "orange"], None),
        ("It is an orange.", ["orange"], None),
        ("There are no dogs.", ["dog"], []),
        ("There isn't a dog, but a cat.", ["dog", "cat"], ["cat"]),
        ("A table without any cups.", ["dining table", "cup"], ["dining table"]),
        ("Not only a dog.", ["dog"], None),
        ("No one holds a dog.", ["dog"], None),
    ],
)
def test_repaired_rules(caption: str, compat: list[str], fixed: list[str] | None) -> None:
    assert list(mentions(caption).objects) == compat
    found = mentions(caption, mode="fixed")
    assert list(found.objects) == (compat if fixed is None else fixed)
    assert found.tokens == mentions(caption).tokens


def test_the_mode_reads_the_ground_truth_too_and_is_named(tmp_path: Path) -> None:
    world = write_world(tmp_path / "w", 1)
    captions = world / "annotations" / "captions.json"
    captions.write_text('{"annotations": [{"image_id": 1, "caption": "Two men, no zebra."}]}')
    tasks = {
        mode: Chair(CocoData(world), Options(n_images=None, chair_mode=mode))
        for mode in ("compat", "fixed")
    }
    assert "zebra" in tasks["compat"].samples[0].target
    assert "zebra" not in tasks["fixed"].samples[0].target
    assert {"person"} <= set(tasks["fixed"].samples[0].target)
    assert tasks["fixed"].facts["mode"] == "fixed"
    answer = Answer("An orange vest.")
    for mode, mentioned in (("compat", ["orange"]), ("fixed", [])):
        task = tasks[mode]
        assert task.parse(task.samples[0], answer)[0]["objects"] == mentioned
        scored = task.score(task.samples, {"base": [answer]})["base"]
        assert scored["counts"]["caption"]["mentions"] == len(mentioned)


def test_length_caps_show_what_short_captions_would_score(tmp_path: Path) -> None:
    task = Chair(CocoData(write_world(tmp_path / "w", 2)), Options(n_images=None))
    present = task.samples[0].target[0]
    filler = "Here is one sentence of ten words and no object. " * 6  # 60 words
    long = Answer(f"There is a {present}. {filler}There is a broccoli. {filler}{filler}A zebra.")
    short = Answer("Nothing.")
    assert LENGTH_CAPS == (64, 128)
    entry = task.score(task.samples, {"base": [long, short], "var": [short, short]})
    caps = entry["base"]["length_caps"]
    assert [caps[cap]["caption"]["chair_i"]["value"] for cap in ("64", "128")] == [0.0, 0.5]
    assert entry["base"]["scores"]["caption"]["chair_i"]["value"] == pytest.approx(2 / 3)
    assert "64" in entry["var"]["length_caps"]
    # Nothing to cut, nothing to show.
    assert "length_caps" not in task.score(task.samples, {"base": [short, short]})["base"]


def test_captions_of_several_seeds_all_count(tmp_path: Path) -> None:
    """Records of a sampled run describe an image once per seed."""
    world = write_world(tmp_path / "w", 4)
    rows = [
        {"image_id": image, "sampling_seed": seed, "caption": f"A {name}."}
        for seed, name in enumerate(["zebra", "person", "giraffe"])
        for image in range(1, 5)
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    entry = score("chair", {"": path}, annotations=world)["tasks"]["chair"]["arms"]["answers"]
    assert entry["counts"]["caption"]["n"] == 12
    assert len(entry["scores"]["caption"]["chair_s"]["by_seed"]) == 3
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[-1]]))
    with pytest.warns(UserWarning, match=r"13 captions of 4 images: only the last .*\(images 4\)"):
        score("chair", {"": path}, annotations=world)
    path.write_text(json.dumps({**rows[0], "sampling_seed": [1]}) + "\n")
    with pytest.raises(BadInput, match=r"line 1: `sampling_seed` is \[1\], no whole number"):
        score("chair", {"": path}, annotations=world)
