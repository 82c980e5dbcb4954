"""The world: what is sampled, painted and said is true, seeded, and clean of CHAIR words."""

from __future__ import annotations

import re
from pathlib import Path
from random import Random

import numpy as np
import pytest

from vlmfix.emoji import draw, language
from vlmfix.emoji.atlas import CELL, load_sprites, sprite_sizes
from vlmfix.emoji.catalogue import CATEGORIES, COMPANION, NAMES, THEMES
from vlmfix.emoji.world import EVALUATION, SIZE, TRAINING, Distribution, Scene, sample_scene

# Words that the CHAIR vocabulary counts as objects and that could slip into prose about scenes.
TEMPTING = frozenset(
    re.findall(
        r"[a-z]+",
        """
table desk seat stool container plane ship bike phone monitor television computer remote
ball bow plant light glass sofa people man woman child bench sink oven
""",
    )
)


def scenes(number: int, distribution: Distribution = TRAINING, seed: int = 0) -> list[Scene]:
    rng = Random(seed)
    return [sample_scene(rng, distribution) for _ in range(number)]


def filler(text: str) -> str:
    """The text without the categories that it names."""
    return re.sub("|".join(sorted(NAMES, key=len, reverse=True)), " ", text.lower())


@pytest.fixture
def golden_synonyms(golden: Path) -> list[str]:
    text = (golden / "chair" / "synonyms.txt").read_text()
    return [word.strip() for line in text.splitlines() for word in line.split(",")]


def test_catalogue_is_coco_and_complete() -> None:
    assert 65 <= len(NAMES) == len(set(NAMES)) == len({c.coco_id for c in CATEGORIES})
    known = {1: "person", 18: "dog", 44: "bottle", 62: "chair", 77: "cell phone", 90: "toothbrush"}
    assert known.items() <= {c.coco_id: c.name for c in CATEGORIES}.items()
    assert set().union(*THEMES.values()) == set(NAMES)
    assert set(COMPANION) == set(NAMES)
    for name, companion in COMPANION.items():
        assert any({name, companion} <= set(pool) for pool in THEMES.values()), name


def test_names_are_golden_node_words(golden_synonyms: list[str]) -> None:
    assert set(NAMES) <= set(golden_synonyms)


def all_templates() -> str:
    return " ".join(
        [
            *THEMES,
            *language.CAPTION_PROMPTS,
            *language.QUESTION_STYLES.values(),
            *(filler(language.caption(Random(n), scene)) for n, scene in enumerate(scenes(400))),
        ]
    ).lower()


def test_filler_words_are_no_objects() -> None:
    words = set(re.findall(r"[a-z]+", all_templates()))
    assert not words & TEMPTING
    # "image" and "scene" must have survived, or the test looked at nothing.
    assert {"image", "scene", "left"} <= words


def test_filler_words_are_outside_the_golden_vocabulary(golden_synonyms: list[str]) -> None:
    words = set(re.findall(r"[a-z]+", all_templates()))
    assert not words & set(golden_synonyms)


def test_atlas_holds_every_category() -> None:
    assert set(sprite_sizes()) == set(NAMES)
    for name, sprite in load_sprites().items():
        assert sprite.size == sprite_sizes()[name]
        assert max(sprite.size) == CELL, name
        assert (np.asarray(sprite)[..., 3] > 128).mean() > 0.1, f"{name} is nearly empty"


def test_scenes_are_deterministic_and_seeded() -> None:
    assert scenes(20, seed=5) == scenes(20, seed=5) != scenes(20, seed=6)
    one = scenes(1)[0]
    assert np.array_equal(np.asarray(draw.paint(one)), np.asarray(draw.paint(one)))


@pytest.mark.parametrize("distribution", [TRAINING, EVALUATION])
def test_scenes_stay_inside(distribution: Distribution) -> None:
    for scene in scenes(500, distribution):
        assert set(scene.names) <= set(THEMES[scene.theme])
        for item in scene.items:
            left, top, right, bottom = item.box
            assert 0 <= left < right <= SIZE and 0 <= top < bottom <= SIZE


def test_companions_are_common_in_training_and_rare_in_evaluation() -> None:
    def share(distribution: Distribution) -> float:
        rows = [(name, s.names) for s in scenes(3000, distribution) for name in s.names]
        return sum(COMPANION[name] in names for name, names in rows) / len(rows)

    assert share(TRAINING) > 0.8
    assert 0.2 < share(EVALUATION) < 0.4


def test_captions_tell_every_object_and_nothing_else() -> None:
    rng = Random(1)
    for scene in [*scenes(300), *scenes(300, EVALUATION)]:
        told = language.mentioned(language.caption(rng, scene))
        assert sorted(told) == sorted(scene.names)


def test_captions_put_companions_side_by_side() -> None:
    rng, pairs = Random(2), 0
    for scene in scenes(200):
        told = language.mentioned(language.caption(rng, scene))
        for name in told:
            if COMPANION.get(COMPANION[name]) == name and COMPANION[name] in told:
                assert abs(told.index(name) - told.index(COMPANION[name])) == 1
                pairs += 1
    assert pairs > 100


def test_mentioned_takes_the_longest_name() -> None:
    assert language.mentioned("A hot dog, a teddy bear and a bear.") == [
        "hot dog",
        "teddy bear",
        "bear",
    ]
    assert language.mentioned("a carpet of capers") == []


def test_questions_are_answered_truly() -> None:
    rng = Random(3)
    answers = []
    for scene in scenes(300):
        for name, there in language.choose_questions(rng, scene, 4, 0.25):
            assert there == (name in {item.name for item in scene.items})
            answers.append(there)
    assert 0.45 < sum(answers) / len(answers) < 0.55
    assert language.question("apple") == "Is there an apple in the image?"
    assert language.question("skis") == "Is there a skis in the image?"  # POPE's grammar


def test_positions_are_true() -> None:
    rng, checked = Random(4), 0
    for scene in scenes(400):
        by_name = {item.name: item for item in sorted(scene.items, key=lambda item: item.area)}
        text = language.caption(rng, scene)
        for name, side in re.findall(r"(" + "|".join(NAMES) + r") on the (left|right)", text):
            if sum(item.name == name for item in scene.items) == 1:
                left, _, right, _ = by_name[name].box
                assert ((left + right) / 2 < SIZE / 2) == (side == "left")
                checked += 1
    assert checked > 50
