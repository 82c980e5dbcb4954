"""CHAIR: extraction, scoring and the control for length."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from evals_worlds import write_world

from vlmfix.errors import BadInput
from vlmfix.evals.chair.objects import category_of, ground_truth, mentions, named_objects
from vlmfix.evals.chair.task import Chair, first_words, score_captions, whole_sentences
from vlmfix.evals.inputs.coco import CocoData
from vlmfix.evals.tasks import Answer, Options


@pytest.mark.parametrize(
    ("caption", "objects"),
    [
        ("Two hot dogs and a dog.", ["hot dog", "dog"]),
        ("Home plate by the train tracks.", []),
        ("A baby elephant and an adult zebra.", ["elephant", "zebra"]),
        ("A passenger train, a passenger jet.", ["train", "airplane"]),
        ("Wine glasses, a bow tie", ["wine glass", "tie"]),
        ("The toilet seat near a toilet and a seat", ["toilet", "toilet"]),
        ("A seat.", ["chair"]),
        ("Three men and a man.", ["person"]),
        ("A motor bike and a cheesecake.", []),
        ("No dogs, an orange vest.", ["dog", "orange"]),
        ("Dogs dogs DOGS", ["dog", "dog", "dog"]),
        ("", []),
        (None, []),
    ],
)
def test_mentions(caption: str | None, objects: list[str]) -> None:
    assert list(mentions(caption).objects) == objects


def test_counts_and_metrics() -> None:
    truth = {1: {"dog", "cup"}, 2: {"car"}, 3: set()}
    captions = [(1, "A dog, a dog and a cat."), (2, "A car."), (3, "A kite."), (1, None)]
    scored = score_captions(captions, truth)
    values = {name: score["value"] for name, score in scored["scores"]["caption"].items()}
    assert values["chair_s"] == pytest.approx(2 / 4)
    assert values["chair_i"] == pytest.approx(2 / 5)
    assert values["recall"] == pytest.approx(2 / 5)
    assert values["precision"] == pytest.approx(2 / 4)
    assert values["f1"] == pytest.approx(2 * 0.5 * 0.4 / 0.9)
    assert scored["counts"]["caption"]["empty"] == 1
    assert scored["flags"] == []


def test_captions_without_objects_are_flagged() -> None:
    scored = score_captions([(1, "Nothing."), (1, "")], {1: {"dog"}})
    assert scored["scores"]["caption"]["chair_i"]["value"] == 0.0
    assert scored["flags"] == [
        f"caption.{metric}: zero denominator" for metric in ("chair_i", "precision", "f1")
    ]


def test_unknown_images_are_listed() -> None:
    with pytest.raises(BadInput, match=r"no ground truth for 2 images: \[7, 9\]"):
        score_captions([(1, ""), (9, ""), (7, "")], {1: {"dog"}})


def test_ground_truth_is_instances_and_captions(tmp_path: Path) -> None:
    world = write_world(tmp_path / "w")
    captions = world / "annotations" / "captions.json"
    captions.write_text(json.dumps({"annotations": [{"image_id": 1, "caption": "Two zebras."}]}))
    data = CocoData(world)
    assert ground_truth(data)[1] == set(data.objects[1]) | {"zebra"}
    instances = world / "annotations" / "instances.json"
    content = json.loads(instances.read_text())
    for category in content["categories"]:
        category["name"] = f"part {category['id']}"
    instances.write_text(json.dumps(content))
    with pytest.raises(BadInput, match="has none of them"):
        ground_truth(CocoData(world))


def test_sentences() -> None:
    assert whole_sentences("A dog. A cat. And a") == "A dog. A cat."
    assert whole_sentences("A dog. A cat.") == "A dog. A cat."
    assert whole_sentences("A dog and a") == "A dog and a"
    assert whole_sentences("") == ""
    text = "One two three. Four five. Six."
    assert first_words(text, 6) == text
    assert first_words(text, 5) == "One two three. Four five."
    assert first_words(text, 4) == "One two three."
    assert first_words(text, 1) == "One two three."


def test_cut_sentence_is_dropped_only_on_request_and_only_if_cut(tmp_path: Path) -> None:
    data = CocoData(write_world(tmp_path / "w"))
    answer = Answer("A zebra. And a giraffe", finish="length")
    for truncate, finish, named in [
        ("none", "length", ["zebra", "giraffe"]),
        ("sentence", "length", ["zebra"]),
        ("sentence", "eos", ["zebra", "giraffe"]),
    ]:
        task = Chair(data, Options(n_images=None, truncate=truncate))
        reply = Answer(answer.text, finish=finish)
        assert task.parse(task.samples[0], reply)[0]["objects"] == named


def test_equal_length_takes_away_what_brevity_won(tmp_path: Path) -> None:
    """A method that stops early beats base on CHAIRs, and ties with it at equal length."""
    task = Chair(CocoData(write_world(tmp_path / "w")), Options(n_images=None))
    good = [f"There is a {sample.target[0]}." for sample in task.samples]
    arms = {
        "base": [Answer(text + " There is a zebra too.") for text in good],
        "short": [Answer(text) for text in good],
    }
    scored = task.score(task.samples, arms)
    assert scored["short"]["delta"]["caption"]["chair_s"]["value"] == -1
    matched = scored["short"]["matched_length"]
    assert matched["delta"]["caption"]["chair_s"]["value"] == 0
    assert matched["base"]["caption"]["words"]["value"] == 4
    assert scored["short"]["delta"]["caption"]["mcnemar"]["better"] == len(task.samples)


def test_selection(tmp_path: Path) -> None:
    data = CocoData(write_world(tmp_path / "w"))
    whole, some = (Chair(data, Options(n_images=8, limit=k, seed=2)) for k in (None, 3))
    assert len(whole.samples) == 8 and not whole.partial
    assert some.samples == whole.samples[:3] and some.partial
    with pytest.raises(BadInput, match="500 images wanted, but .* has 12"):
        Chair(data, Options())
    with pytest.raises(BadInput, match="'none' or 'sentence'"):
        Chair(data, Options(n_images=None, truncate="words"))


def test_the_seat_of_a_toilet_counts_as_a_token() -> None:
    """The official code takes the length of a caption before it drops the seat."""
    with_toilet, without = "A seat near a toilet", "A seat near a table"
    assert mentions(with_toilet).objects == ("toilet",)
    assert mentions(with_toilet).tokens == mentions(without).tokens == 5
    assert mentions("The toilet seat").tokens == 2  # a pair is one token


def test_the_quick_way_names_the_same_objects() -> None:
    """Words of all categories and halves of pairs in any order."""
    words = sorted({*category_of(), "seats", "baby", "adults", "passenger", "hot", "home", "track"})
    chance = random.Random(0)
    for _ in range(300):
        caption = " ".join(chance.choices([*words, "the", "toilet", "dogs", "birds", ","], k=30))
        found = mentions(caption)
        assert named_objects(caption) == (found.objects, found.tokens), caption
        found = mentions(caption, mode="fixed")
        assert named_objects(caption, mode="fixed") == (found.objects, found.tokens)
