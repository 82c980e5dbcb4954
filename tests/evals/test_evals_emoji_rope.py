"""ROPE on the bundled images: five objects apart, boxes in the picture, and the task on it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from evals_worlds import write_world

from vlmfix.emoji import evaluation_split
from vlmfix.errors import BadInput
from vlmfix.evals.inputs.coco import CocoData
from vlmfix.evals.rope.emoji import SCALE, EmojiRope
from vlmfix.evals.rope.task import Rope, RopeSingle, RopeStudent, RopeTeacher, score_answers
from vlmfix.evals.tasks import DataSource, Options


@pytest.fixture(scope="module")
def emoji() -> EmojiRope:
    return EmojiRope()


def test_the_five_largest_objects_that_stand_apart(emoji: EmojiRope) -> None:
    data = CocoData(evaluation_split())
    assert Counter(e.split for e in emoji.entries) == {
        "emoji_heterogenous": 202,
        "emoji_mixed": 151,
    }
    ids = {name: image for image, name in data.files.items()}
    for entry in emoji.entries:
        boxes = data.boxes[ids[entry.picture]]
        corners = {(b.left, b.top, b.left + b.width, b.top + b.height): b.name for b in boxes}
        chosen = [tuple(side / SCALE for side in thing.box) for thing in entry.objects]
        assert [corners[box] for box in chosen] == [t.name for t in entry.objects]
        assert len(set(chosen)) == 5
        assert (len({t.name for t in entry.objects}) == 5) == (entry.split == "emoji_heterogenous")
        smallest = min((b[2] - b[0]) * (b[3] - b[1]) for b in chosen)
        # Whoever is larger and was not chosen overlaps with a chosen one.
        for box in set(corners) - set(chosen):
            if (box[2] - box[0]) * (box[3] - box[1]) > smallest:
                assert any(
                    min(box[2], c[2]) > max(box[0], c[0]) and min(box[3], c[3]) > max(box[1], c[1])
                    for c in chosen
                )
    largest_first = sum(
        max(range(5), key=lambda k, e=entry: _area(e.objects[k].box)) == 0
        for entry in emoji.entries
    )
    assert 0.12 < largest_first / len(emoji.entries) < 0.28, "the order tells the size"


def _area(box: tuple[float, float, float, float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def test_boxes_are_drawn_where_the_objects_are(emoji: EmojiRope) -> None:
    entry = emoji.entries[0]
    picture = emoji.image(entry.image)
    assert picture.size == (112 * SCALE, 112 * SCALE)
    for thing in entry.objects:
        left, _, _, bottom = (int(side) for side in thing.box)
        assert picture.getpixel((left, bottom - 4)) == (255, 0, 0), thing
    assert EmojiRope().entries == emoji.entries


@pytest.mark.parametrize("task_type", [Rope, RopeSingle, RopeStudent, RopeTeacher])
def test_the_tasks_take_them_where_no_folder_is_named(task_type: type[Rope]) -> None:
    opened = task_type.open(None)
    assert isinstance(opened, EmojiRope) and isinstance(opened, DataSource)
    task = task_type(opened, Options(limit=2))
    assert task.partial and {s.split for s in task.samples} == {"emoji_heterogenous", "emoji_mixed"}
    opened.require_images([s.image for s in task.samples if s.image])
    assert "teddy bear" in task.samples[0].prompt


def test_true_answers_score_one(emoji: EmojiRope) -> None:
    task = Rope(emoji, Options())
    rows = [
        {
            "sample_id": sample.sample_id,
            "image": sample.image,
            "response": ", ".join(
                f"obj{n}: {thing.name}" for n, thing in enumerate(entry.objects, start=1)
            ),
        }
        for sample, entry in zip(task.samples, emoji.entries, strict=True)
    ]
    scored = score_answers(emoji, rows)
    assert scored["scores"]["pooled"]["accuracy"]["value"] == 1.0


def test_images_without_five_objects_are_refused(tmp_path: Path) -> None:
    world = write_world(tmp_path / "w", 3)
    path = world / "annotations" / "instances.json"
    path.write_text(path.read_text().replace('"image_id"', '"bbox": [1, 2, 3, 4], "image_id"'))
    with pytest.raises(BadInput, match="no image of .* has 5 objects apart"):
        EmojiRope(CocoData(world))
