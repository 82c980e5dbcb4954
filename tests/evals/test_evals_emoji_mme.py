"""The MME-like questions about the bundled images: what they say is true, and they are fair."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

import pytest
from evals_worlds import write_world

from vlmfix.emoji import evaluation_split
from vlmfix.emoji.atlas import load_sprites
from vlmfix.emoji.catalogue import NAMES
from vlmfix.emoji.colours import COLOURS, absent_colours, colours_of_sprites
from vlmfix.errors import BadInput
from vlmfix.evals.inputs.coco import CocoData
from vlmfix.evals.mme.emoji import IMAGES_PER_SUBSET, EmojiMme
from vlmfix.evals.mme.task import SUBSETS, Mme, MmeQuestion, score_answers
from vlmfix.evals.tasks import DataSource, Options

ENDING = " Please answer yes or no."
PLURALS = {"person": "people", "knife": "knives", "sheep": "sheep", "mouse": "mice"}


@pytest.fixture(scope="module")
def data() -> CocoData:
    return CocoData(evaluation_split())


@pytest.fixture(scope="module")
def emoji(data: CocoData) -> EmojiMme:
    return EmojiMme(data)


def test_thirty_images_a_subset_with_a_true_and_a_false_question_each(emoji: EmojiMme) -> None:
    by_image: dict[str, list[MmeQuestion]] = defaultdict(list)
    for question in emoji.questions:
        by_image[question.image].append(question)
    assert all([q.label for q in pair] == ["yes", "no"] for pair in by_image.values())
    subsets = Counter(image.partition("/")[0] for image in by_image)
    assert subsets == dict.fromkeys(SUBSETS, IMAGES_PER_SUBSET)
    # No image is asked about in two subsets: 120 pictures are 120 clusters.
    assert len({image.rpartition("/")[2] for image in by_image}) == 4 * IMAGES_PER_SUBSET


def plural_of(text: str) -> str:
    names = {PLURALS.get(name, name): name for name in NAMES}
    for name in (text, text.removesuffix("s"), text.removesuffix("es")):
        if name in names:
            return names[name]
    raise AssertionError(text)


def is_true(question: MmeQuestion, data: CocoData) -> bool:
    """The answer, worked out again from the annotations alone."""
    file = question.image.rpartition("/")[2]
    image = next(i for i, name in data.files.items() if name == file)
    boxes = data.boxes[image]
    counts = Counter(box.name for box in boxes)
    text = question.text.removesuffix(ENDING).removesuffix("?")
    if question.subset == "position":
        text = text.removeprefix("Is the ")
        side = "left" if " on the left side of the " in text else "right"
        first, second = text.split(f" on the {side} side of the ")
        (a,), (b,) = ([x for x in boxes if x.name == name] for name in (first, second))
        if side == "left":
            return a.left + a.width <= b.left
        return b.left + b.width <= a.left
    text = text.removesuffix(" in this image")
    if text.startswith("Are there two "):
        return counts[plural_of(text.removeprefix("Are there two "))] == 2
    if text.startswith("Is there only one "):
        return counts[text.removeprefix("Is there only one ")] == 1
    what = text.removeprefix("Is there ").partition(" ")[2]
    if question.subset == "existence":
        return counts[what] > 0
    colour, _, name = what.partition(" ")
    (box,) = [x for x in boxes if x.name == name]
    assert not box.row["faint"]
    assert colour == colours_of_sprites()[name] or colour in absent_colours(name)
    return colour == colours_of_sprites()[name]


def test_every_question_says_what_the_annotations_say(emoji: EmojiMme, data: CocoData) -> None:
    assert all(q.text.endswith("?" + ENDING) for q in emoji.questions)
    wrong = [q for q in emoji.questions if is_true(q, data) != (q.label == "yes")]
    assert wrong == []


def test_no_wording_gives_the_answer_away(emoji: EmojiMme) -> None:
    """A model that looks at the words alone scores no more than one that always says yes."""
    for subset, wordings in (("count", ("only one", "two ")), ("position", ("left", "right"))):
        for wording in wordings:
            labels = Counter(
                q.label for q in emoji.questions if q.subset == subset and wording in q.text
            )
            assert labels == {"yes": 15, "no": 15}, (subset, wording)
    yes = [{"image": q.image, "question": q.text, "answer": "Yes"} for q in emoji.questions]
    scored = score_answers(emoji, yes)
    assert scored["scores"]["total"]["score"]["value"] == 4 * 50
    right = [{**row, "answer": q.label} for row, q in zip(yes, emoji.questions, strict=True)]
    assert score_answers(emoji, right)["scores"]["total"]["score"]["value"] == 800


def test_the_questions_are_the_same_in_every_run(emoji: EmojiMme) -> None:
    assert EmojiMme().questions == emoji.questions
    first = emoji.questions[0]
    assert (first.image, first.text) == (
        "existence/emoji_000000000144.png",
        "Is there a bicycle in this image? Please answer yes or no.",
    )


def test_the_task_takes_them_where_no_folder_is_named(emoji: EmojiMme) -> None:
    opened = Mme.open(None)
    assert isinstance(opened, EmojiMme) and isinstance(opened, DataSource)
    task = Mme(opened, Options(prompt_style="bare"))
    assert len(task.samples) == 240 and task.samples[0].prompt == emoji.questions[0].text
    opened.require_images([s.image for s in task.samples if s.image])
    assert opened.image("existence/emoji_000000000144.png").size == (112, 112)
    assert opened.sha256 == CocoData(evaluation_split()).sha256


def test_too_few_images_are_refused(tmp_path: Path) -> None:
    world = write_world(tmp_path / "w", 12)
    path = world / "annotations" / "instances.json"
    path.write_text(path.read_text().replace('"image_id"', '"bbox": [1, 2, 3, 4], "image_id"'))
    with pytest.raises(BadInput, match="has 12 images to ask about existence, and 30 are needed"):
        _ = EmojiMme(CocoData(world)).questions


def test_colours_are_those_that_nobody_would_dispute() -> None:
    """Checked by eye against the atlas."""
    assert colours_of_sprites() == {
        "stop sign": "red",
        "bird": "blue",
        "sheep": "white",
        "backpack": "red",
        "suitcase": "blue",
        "frisbee": "blue",
        "snowboard": "purple",
        "orange": "orange",
        "broccoli": "green",
        "couch": "blue",
        "potted plant": "green",
        "mouse": "white",
        "refrigerator": "white",
        "teddy bear": "brown",
    }
    for name, colour in colours_of_sprites().items():
        assert colour not in absent_colours(name) and absent_colours(name)
    assert set(COLOURS) >= set(colours_of_sprites().values())
    assert set(colours_of_sprites()) <= set(load_sprites())
