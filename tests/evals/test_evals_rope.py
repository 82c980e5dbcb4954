"""ROPE: its files, boxes, the four settings, scores, and the slips of the authors' code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from evals_scripted import Scripted
from PIL import Image

from vlmfix.errors import BadInput
from vlmfix.evals.rope.data import RopeData, draw_boxes
from vlmfix.evals.rope.official import official_figures
from vlmfix.evals.rope.task import (
    Rope,
    RopeSingle,
    RopeStudent,
    RopeTeacher,
    read_classes,
    score_answers,
)
from vlmfix.evals.tasks import Answer, Options

TRUTH = {"a": ["dog", "dog", "dog", "dog", "cat"], "b": ["cup", "cell phone", "tie", "bus", "dog"]}
RED, GREY = (255, 0, 0), (128, 128, 128)


def entry(name: str, classes: list[str], **changes: Any) -> dict[str, Any]:
    objects = [
        {
            "name": word.title(),
            "bbox_number": k + 1,
            "bndbox": {"xmin": 40 * k + 5, "ymin": 60, "xmax": 40 * k + 35, "ymax": 90},
        }
        for k, word in enumerate(classes)
    ]
    return {"folder": f"pictures/{name}.jpg", "data_source": "COCO", "objects": objects, **changes}


def write(folder: Path, entries: list[dict[str, Any]] | None = None, drawn: bool = False) -> Path:
    (folder / "validation").mkdir(parents=True)
    (folder / "pictures").mkdir()
    entries = [entry(*pair) for pair in TRUTH.items()] if entries is None else entries
    (folder / "validation" / "merged_mixed_data.json").write_text(json.dumps(entries))
    for name in TRUTH:
        suffix = "png" if drawn else "jpg"
        Image.new("RGB", (200, 100), GREY).save(
            folder / "pictures" / f"{name}.{suffix}", quality=100
        )
    return folder


def line(classes: list[str]) -> str:
    return ", ".join(f"obj{k}: {word}" for k, word in enumerate(classes, start=1))


def close_to(pixel: Any, colour: tuple[int, int, int]) -> bool:
    return all(abs(a - b) < 40 for a, b in zip(pixel, colour, strict=True))


def test_boxes_are_drawn_on_raw_pictures(tmp_path: Path) -> None:
    data = RopeData.open(write(tmp_path))
    assert [one.image for one in data.entries] == [
        "unseen_mixed/pictures/a.jpg",
        "unseen_mixed/pictures/b.jpg",
    ]
    data.require_images([one.image for one in data.entries])
    picture = data.image("unseen_mixed/pictures/a.jpg")
    for k in range(5):
        left = 40 * k + 5
        assert picture.getpixel((left, 75)) == RED == picture.getpixel((left + 30, 75))
        assert picture.getpixel((left + 15, 90)) == RED
        assert close_to(picture.getpixel((left + 15, 75)), GREY)
        # The label stands on the box, and nothing is drawn above it.
        shades = [colour for _, colour in picture.crop((left, 45, left + 25, 60)).getcolors()]
        assert min(shades) < (30, 30, 30) and max(shades) > (200, 200, 200)
    assert close_to(picture.getpixel((20, 20)), GREY)


def test_pictures_of_the_authors_have_their_boxes(tmp_path: Path) -> None:
    data = RopeData.open(write(tmp_path, drawn=True))
    picture = data.image("unseen_mixed/pictures/a.jpg")
    assert picture.getcolors() == [(200 * 100, GREY)]
    with pytest.raises(BadInput, match="lacks 1 of 1 images, first nothing.jpg"):
        data.require_images(["nothing.jpg"])


def test_a_label_without_room_above_stands_inside() -> None:
    grey = Image.new("RGB", (400, 200), GREY)
    drawn = draw_boxes(grey, [(350, 0, 399, 60)])
    assert grey.getcolors() == [(400 * 200, GREY)]  # the given picture is left alone
    inside = {colour for _, colour in drawn.crop((350, 0, 400, 14)).getcolors()}
    assert {(255, 255, 255), (0, 0, 0)} <= inside
    assert drawn.getpixel((350, 40)) == RED == drawn.getpixel((351, 40))  # 0.5 % of 400: 2 pixels
    assert drawn.getpixel((352, 40)) == GREY


@pytest.mark.parametrize(
    ("answer", "classes"),
    [
        ("obj1: dog, obj2: Cat, obj3: cell phone, obj4: tie, obj5: bus.",
         ["dog", "cat", "cell phone", "tie", "bus"]),
        ("obj1: dog, obj2 cat, obj3: tie", ["dog", "", "tie", "", ""]),
        ("obj1: dog,obj2: cat", ["dog", "cat", "", "", ""]),
        ("dog, cat", [""] * 5),
        ("", [""] * 5),
        (line(list("abcdefg")), list("abcde")),
    ],
)  # fmt: skip
def test_all_objects_in_one_answer(answer: str, classes: list[str]) -> None:
    assert read_classes(answer, "default") == classes


@pytest.mark.parametrize(
    ("answer", "name"),
    [
        ("Dog, obj3: cat", "dog"),
        ("Dog,cat", "dog"),
        ("obj2: dog", "dog"),
        ("dog.\nobj3: cat", "dog"),
        ("'cell phone'", "cell phone"),
        ("", ""),
    ],
)
def test_one_object_of_a_line(answer: str, name: str) -> None:
    assert read_classes(answer, "student") == read_classes(answer, "teacher") == [name]


def test_accuracy_positions_and_averages(tmp_path: Path) -> None:
    data = RopeData.open(write(tmp_path))
    said = {"a": ["dog", "dog", "cat", "dog", "cat"], "b": ["cup", "zebra", "", "bus", "dog"]}
    answers = [
        {"sample_id": f"unseen_mixed/pictures/{name}.jpg", "answer": line(classes)}
        for name, classes in said.items()
    ]
    scored = score_answers(data, answers[::-1])
    values = {name: score["value"] for name, score in scored["scores"]["unseen_mixed"].items()}
    assert values["accuracy"] == 7 / 10
    assert [values[f"obj{k}"] for k in range(1, 6)] == [1, 1 / 2, 0, 1, 1]
    # Six classes are true: dog 5 (said 4, right 4), cat 1 (2, 1), cup 1 (1, 1), bus 1 (1, 1), and
    # cell phone and tie 1 (0, 0). "zebra" is true of nothing.
    assert values["macro_precision"] == pytest.approx((1 + 1 / 2 + 1 + 1) / 6)
    assert values["macro_recall"] == pytest.approx((4 / 5 + 1 + 1 + 1) / 6)
    assert values["macro_f1"] == pytest.approx((8 / 9 + 2 / 3 + 1 + 1) / 6)
    assert values["weighted_precision"] == pytest.approx((5 + 1 / 2 + 1 + 1) / 10)
    assert values["weighted_f1"] == pytest.approx((5 * 8 / 9 + 2 / 3 + 1 + 1) / 10)
    assert scored["n_unparsed"] == 1
    low, high = scored["scores"]["unseen_mixed"]["macro_f1"]["ci"]
    assert low <= values["macro_f1"] <= high and low < high


def test_intervals_of_averages_are_those_of_resampled_images(tmp_path: Path) -> None:
    """Two images: a resample holds the first twice, both, or the second twice."""
    data = RopeData.open(write(tmp_path))
    answers = [
        {"sample_id": f"unseen_mixed/pictures/{name}.jpg", "answer": line(classes)}
        for name, classes in {"a": TRUTH["a"], "b": ["x"] * 5}.items()
    ]
    score = score_answers(data, answers)["scores"]["unseen_mixed"]
    # All of a right, nothing of b: 2 of 6 classes are ever named, dog 4 of 5 times.
    assert score["macro_recall"]["value"] == pytest.approx((4 / 5 + 1) / 6)
    assert score["macro_recall"]["ci"] == [0, 1] == score["weighted_f1"]["ci"]


# What the authors' code gives for these answers, by hand: two images of five objects.
@pytest.mark.parametrize(
    ("setting", "answers", "accuracy", "hits", "images"),
    [
        ("default", [[line(TRUTH["a"])], [line(TRUTH["b"])]], 100, [2] * 5, 2),
        # Unreadable: 10 objects for the image, and letters for classes.
        ("default", [[line(TRUTH["a"])], ["dctbp"]], 100 * 5 / 15, [1] * 5, 3),
        # Too short: the rest is neither right nor wrong, but counted.
        ("default", [[line(TRUTH["a"])], ["obj1: cup"]], 60, [2, 1, 1, 1, 1], 2),
        # The third answer cannot be read: 3 objects are added, and then 5 again.
        ("student", [TRUTH["a"], ["cup", "cell phone", "tie, or not", "bus", "dog"]],
         100 * 7 / 13, [2, 2, 1, 1, 1], 2),
        ("teacher", [TRUTH["a"], ["Cup", "x", "tie, obj4: bus", "", "dog"]],
         80, [2, 1, 2, 1, 2], 2),
        ("single", [TRUTH["a"], ["Cup", "cell phone.", "tie", "bus", "dog"]],
         90, [2, 1, 2, 2, 2], 2),
    ],
)  # fmt: skip
def test_slips_of_the_reference(
    setting: str, answers: list[list[str]], accuracy: float, hits: list[int], images: int
) -> None:
    found = official_figures(answers, list(TRUTH.values()), setting)
    assert found["accuracy"] == pytest.approx(accuracy)
    assert found["acc_list"] == hits
    assert found["num_processed_data"] == images


def test_averages_of_the_reference() -> None:
    found = official_figures([["dog", "cat", "x", "dog", "cat"]], [TRUTH["a"]], "single")
    # Said: dog 2 of 2 right, cat 1 of 2, x 0 of 1; true: dog 2 of 4, cat 1 of 1.
    assert found["precision_macro"] == pytest.approx(100 * (1 + 1 / 2) / 3)
    assert found["recall_macro"] == pytest.approx(100 * (1 / 2 + 1) / 2)
    assert found["f1_macro"] == pytest.approx(100 * 2 * 0.5 * 0.75 / 1.25)
    assert found["precision_micro"] == found["recall_micro"] == pytest.approx(60)
    assert found["precision_weighted"] == pytest.approx(100 * (4 * 1 + 1 / 2) / 5)
    assert found["recall_weighted"] == pytest.approx(60)


def test_the_reference_compares_letters_where_it_cannot_read() -> None:
    found = official_figures([[line(TRUTH["a"])], ["Dog"]], list(TRUTH.values()), "default")
    # Said: dog 4 of 4, cat 1 of 1, and d, o, g, which are true of nothing.
    assert found["precision_macro"] == pytest.approx(100 * 2 / 5)
    assert found["precision_micro"] == pytest.approx(100 * 5 / 8)


def test_the_default_setting_asks_once_per_image(tmp_path: Path) -> None:
    task = Rope(RopeData.open(write(tmp_path)), Options())
    first, _ = task.samples
    assert (first.prefix, first.follows, first.target) == ("", None, TRUTH["a"])
    assert "zebra, donut, traffic light" in first.prompt  # the classes, in the authors' order
    assert task.parse(first, Answer(line(TRUTH["a"]))) == (TRUTH["a"], True)
    assert task.facts == {"setting": "default", "prompt": "vlmfix"}


def test_teacher_forcing_gives_the_truth(tmp_path: Path) -> None:
    model = Scripted(lambda method, request: request.sample.target)
    result = model.run("rope_teacher", write(tmp_path / "data"), tmp_path / "out")
    prefixes = [r.prefix for r in model.requests if r.sample.image_id == "pictures/b.jpg"][:5]
    assert prefixes[0] == "obj1:"
    assert prefixes[2] == "obj1: cup, obj2: cell phone, obj3:"
    assert prefixes[4] == "obj1: cup, obj2: cell phone, obj3: tie, obj4: bus, obj5:"
    assert result["arms"]["base"]["scores"]["unseen_mixed"]["accuracy"]["value"] == 1
    assert all(sample.follows is None for sample in RopeTeacher(RopeData.open(tmp_path / "data"),
                                                                Options()).samples)  # fmt: skip


def test_student_forcing_gives_its_own_answers(tmp_path: Path) -> None:
    def reply(method: Any, request: Any) -> str:
        # The base goes astray at the third object, and writes on after every answer.
        number = int(request.sample.sample_id[-1])
        slips = method is None and number == 3
        return ("kite" if slips else request.sample.target) + ", obj9: sheep"

    model = Scripted(reply)
    result = model.run("rope_student", write(tmp_path / "data"), tmp_path / "out")
    base = [r for r in model.requests if r.sample.image_id == "pictures/b.jpg"][:5]
    assert base[4].prefix == "obj1: cup, obj2: cell phone, obj3: kite, obj4: bus, obj5:"
    assert all(request.turns == () for request in base)
    arms = result["arms"]
    place = arms["base"]["scores"]["unseen_mixed"]
    assert (place["accuracy"]["value"], place["obj3"]["value"]) == (8 / 10, 0)
    assert arms["var"]["delta"]["unseen_mixed"]["accuracy"]["value"] == pytest.approx(2 / 10)
    assert arms["var"]["delta"]["unseen_mixed"]["macro_f1"]["value"] > 0
    assert arms["var"]["compat"]["unseen_mixed"]["accuracy"] == pytest.approx(100)


def test_single_asks_about_each_object(tmp_path: Path) -> None:
    task = RopeSingle(RopeData.open(write(tmp_path)), Options(limit=1))
    assert task.partial and len(task.samples) == 5
    assert "labelled obj4 belong" in task.samples[3].prompt
    assert task.parse(task.samples[3], Answer("Dog.")) == ("dog", True)
    scored = task.score(task.samples, {"base": [Answer("dog")] * 5})["base"]
    assert scored["scores"]["unseen_mixed"]["accuracy"]["value"] == 4 / 5


def test_prompts_of_the_data_are_taken(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "rope_prompts.json"
    path.write_text(json.dumps({"multi": "{five} of {classes}!", "single": "{object}? {classes}"}))
    data = RopeData.open(tmp_path)
    assert Rope(data, Options()).samples[0].prompt.startswith("{five} of dining table, cow")
    assert RopeSingle(data, Options()).samples[1].prompt.startswith("obj2? dining table")
    assert Rope(data, Options()).facts["prompt"] == "of the data"
    path.write_text(json.dumps({"multi": "Name them.", "single": "{object}? {classes}"}))
    with pytest.raises(BadInput, match=r"'multi' must be a text with \{classes\} in it"):
        RopeData.open(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objects": [1, 2]}, r"`objects` is \[1, 2\], not a list of 5"),
        ({"objects": [{"name": "dog"}] * 5}, "object 1 has no usable 'bndbox'"),
        ({"data_source": "VG"}, "data_source 'VG' is none of COCO, ADE"),
        ({"folder": 3}, "`folder` is 3"),
    ],
)
def test_broken_entries_name_file_and_place(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    write(tmp_path, [entry("a", TRUTH["a"]), entry("b", TRUTH["b"], **changes)])
    with pytest.raises(BadInput, match=rf"merged_mixed_data\.json, item 2.*{message}"):
        RopeData.open(tmp_path)


def test_an_empty_box_is_refused(tmp_path: Path) -> None:
    broken = entry("a", TRUTH["a"])
    broken["objects"][4]["bndbox"]["xmax"] = 0
    with pytest.raises(BadInput, match="object 5: the box .* is empty"):
        RopeData.open(write(tmp_path, [broken]))


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="holds none of the files. It needs train/ or validation/"):
        RopeData.open(tmp_path)
    twice = write(tmp_path, [entry("a", TRUTH["a"])] * 2)
    with pytest.raises(BadInput, match="1 repeated: unseen_mixed/pictures/a.jpg"):
        RopeData.open(twice)


def test_answers_that_do_not_fit(tmp_path: Path) -> None:
    data = RopeData.open(write(tmp_path))
    ids = [f"unseen_mixed/pictures/{name}.jpg#{k}" for name in "ab" for k in range(1, 6)]
    answers = [{"sample_id": one, "response": "dog"} for one in ids]
    scored = score_answers(data, answers, setting="single")
    assert scored["scores"]["unseen_mixed"]["accuracy"]["value"] == 5 / 10
    with pytest.raises(BadInput, match="1 of 10 questions have no answer: .*b.jpg#5"):
        score_answers(data, answers[:-1], setting="teacher")


def test_seeds_have_figures_of_their_own(tmp_path: Path) -> None:
    task = RopeStudent(RopeData.open(write(tmp_path)), Options())
    n = len(task.samples)
    answers = [Answer(str(s.target)) for s in task.samples] + [Answer("")] * n
    scored = task.score(task.samples * 2, {"base": answers}, [0] * n + [1] * n)["base"]
    assert scored["scores"]["unseen_mixed"]["accuracy"]["by_seed"] == [1, 0]
    assert scored["scores"]["unseen_mixed"]["macro_f1"]["by_seed"] == [1, 0]
    assert [one["unseen_mixed"]["accuracy"] for one in scored["compat"]] == [100, 0]


def test_an_image_without_all_answers_is_none_to_the_reference(tmp_path: Path) -> None:
    task = RopeStudent(RopeData.open(write(tmp_path)), Options())
    samples = task.samples[:-1]
    scored = task.score(samples, {"base": [Answer(str(s.target)) for s in samples]})["base"]
    assert scored["counts"]["unseen_mixed"]["n"] == 9
    assert scored["compat"]["unseen_mixed"]["num_processed_data"] == 1


def test_nothing_answered_is_nothing_scored(tmp_path: Path) -> None:
    task = RopeStudent(RopeData.open(write(tmp_path)), Options())
    scored = task.score([], {"base": [], "var": []}, [])
    assert (scored["var"]["scores"], scored["var"]["compat"]) == ({}, {})
