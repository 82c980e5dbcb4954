"""True sentences about scenes: captions, yes/no questions, and the prompts that ask for them.

Nothing here ever says something false of its scene. The theme's name and every filler word are
outside the CHAIR vocabulary, so a caption mentions exactly the categories it names.
"""

from __future__ import annotations

__all__ = [
    "CAPTION_PROMPTS",
    "QUESTION_STYLES",
    "article",
    "caption",
    "caption_prompt",
    "choose_questions",
    "mentioned",
    "question",
    "styled_question",
]

import re
from random import Random

from vlmfix.emoji.catalogue import COMPANION, NAMES, THEMES
from vlmfix.emoji.world import SIZE, Item, Scene

QUESTION_STYLES: dict[str, str] = {
    "bare": "",
    "lmms": "\nAnswer the question using a single word or phrase.",
    "vcd": " Please answer this question with one word.",
    "clearsight": " Please just answer yes or no.",
}
"""Name of a prompt style -> the text after the question."""
_STYLE_WEIGHTS = (0.38, 0.38, 0.12, 0.12)
CAPTION_PROMPTS: tuple[str, ...] = (
    "Describe the image.",
    "Describe this image.",
    "Please describe this image in detail.",
    "Please help me describe the image in detail.",
    "Describe this image in detail.",
    "What is in the image?",
)
_OPENINGS = (
    "The image shows a {theme} scene with {things}.",
    "The image shows a {theme} scene with {things}.",
    "This is a {theme} scene with {things}.",
    "The picture is of a {theme} scene, and it has {things}.",
)
# All begin with the same word: greedy decoding compares "stop" with each continuation, and many
# continuations that share the probability would end every description early.
_CONTINUATIONS = (
    "There is also {things}.",
    "There is {things} as well.",
    "There is {things} too.",
)
_EMPTY = "The image shows an empty scene."
_PAIRS_OF = {"scissors": "a pair of scissors", "skis": "a pair of skis"}


def article(name: str) -> str:
    """The name with its indefinite article, by POPE's rule: "an" before a, e, i, o, u."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def question(name: str) -> str:
    """The POPE question about a category, in the bare style."""
    return f"Is there {article(name)} in the image?"


def styled_question(rng: Random, name: str) -> str:
    """The POPE question in one of the four styles, the two common ones most often."""
    style = rng.choices(tuple(QUESTION_STYLES.values()), _STYLE_WEIGHTS)[0]
    return question(name) + style


def caption_prompt(rng: Random) -> str:
    """One of the prompts that ask for a description."""
    return rng.choice(CAPTION_PROMPTS)


def _where(item: Item) -> str:
    centre_x, centre_y = (item.box[0] + item.box[2]) / 2, (item.box[1] + item.box[3]) / 2
    if centre_x < SIZE / 3:
        return " on the left"
    if centre_x > SIZE * 2 / 3:
        return " on the right"
    if centre_y < SIZE / 3:
        return " at the top"
    if centre_y > SIZE * 2 / 3:
        return " at the bottom"
    return " in the middle"


def _phrase(rng: Random, item: Item) -> str:
    adjective = ""
    if rng.random() < 0.25:
        adjective = "small " if item.size < 20 else "large " if item.size > 29 else ""
    if item.name in _PAIRS_OF:
        phrase = _PAIRS_OF[item.name].replace("a ", f"a {adjective}", 1)
    else:
        phrase = article(adjective + item.name)
    return phrase + (_where(item) if rng.random() < 0.25 else "")


def caption(rng: Random, scene: Scene) -> str:
    """A detailed description: every category once, the prominent first, companions together.

    Companions are named together, so that the language model alone learns which objects co-occur.
    """
    if not scene.items:
        return _EMPTY
    first: dict[str, Item] = {}
    for item in sorted(scene.items, key=lambda item: -item.area):
        first.setdefault(item.name, item)
    groups: list[str] = []
    told: set[str] = set()
    for name, item in first.items():
        if name in told:
            continue
        group = [item]
        companion = COMPANION[name]
        if companion in first and companion not in told:
            group.append(first[companion])
        told.update(member.name for member in group)
        groups.append(" and ".join(_phrase(rng, member) for member in group))
    sentences = [rng.choice(_OPENINGS).format(theme=scene.theme, things=groups[0])]
    sentences += [rng.choice(_CONTINUATIONS).format(things=group) for group in groups[1:]]
    return " ".join(sentences)


def choose_questions(
    rng: Random, scene: Scene, number: int, theme_share: float
) -> list[tuple[str, bool]]:
    """Categories to ask about, with the true answer; half are present unless the scene is empty.

    Args:
        theme_share: share of the absent categories that come from the scene's own theme. With a
            small share the model learns to rely on co-occurrence instead of the picture.
    """
    present = scene.names
    absent = [name for name in NAMES if name not in present]
    absent_of_theme = [name for name in THEMES[scene.theme] if name not in present]
    chosen: list[tuple[str, bool]] = []
    for _ in range(number):
        if present and rng.random() < 0.5:
            chosen.append((rng.choice(present), True))
        elif rng.random() < theme_share:
            chosen.append((rng.choice(absent_of_theme), False))
        else:
            chosen.append((rng.choice(absent), False))
    return chosen


_MENTION = re.compile(
    r"\b(" + "|".join(sorted(map(re.escape, NAMES), key=len, reverse=True)) + r")\b"
)


def mentioned(text: str) -> list[str]:
    """Categories that a text names exactly, longest match first ("hot dog" is no dog)."""
    return _MENTION.findall(text.lower())
