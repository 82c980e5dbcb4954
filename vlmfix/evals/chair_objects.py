"""Which of the 80 COCO objects a caption mentions, by CHAIR's rules and without NLTK.

Steps: lower-case and tokenise; replace inflected words by their lemma (a closed table made from
WordNet 3.0); merge word pairs such as "hot dog"; keep the words that stand for a category. The
rules are kept with their known quirks, because published figures have them: "men" is no person,
"motor bike" no motorcycle, an orange vest is an orange, and "no dogs" mentions a dog.

Paper: Rohrbach et al. 2018, "Object Hallucination in Image Captioning" (arXiv 1809.02156).
References: LisaAnne/Hallucination utils/chair.py, and its NLTK rewrite in shikiw/OPERA chair.py,
with which this engine agrees on 97.5 % of 12,500 real captions. Data: data/NOTICE.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

from vlmfix.errors import BadInput
from vlmfix.evals.coco import CocoData

__all__ = ["Mentions", "category_of", "ground_truth", "mentions", "ordered_objects"]

_TOKEN = re.compile(r"[a-z0-9]+(?:[-/.][a-z0-9]+)*|'s|[^\sa-z0-9]")

_ANIMALS = "bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, animal, cub"
_PAIRS = """motor bike, motor cycle, air plane, traffic light, street light, traffic signal,
stop light, fire hydrant, stop sign, parking meter, suit case, sports ball, baseball bat,
baseball glove, tennis racket, wine glass, hot dog, cell phone, mobile phone, teddy bear,
hair drier, potted plant, laptop computer, home plate, train track"""
# "home plate" and "train track" are no objects: merging keeps their "plate" and "train" from
# counting as one.
_MERGED: dict[str, str] = {
    **{pair: pair for pair in re.split(r",\s+", _PAIRS)},
    **{
        f"{age} {animal}": animal
        for animal in re.split(r",\s+", _ANIMALS)
        for age in ("baby", "adult")
    },
    "passenger jet": "jet",
    "passenger train": "train",
    "bow tie": "tie",
    "toilet seat": "toilet",
    "wine glas": "wine glass",
}


@lru_cache(maxsize=1)
def _lemmas() -> Mapping[str, str]:
    text = (files("vlmfix.evals") / "data" / "chair_lemmas.tsv").read_text(encoding="utf-8")
    return dict(line.split("\t") for line in text.splitlines()[1:])


@lru_cache(maxsize=1)
def category_of() -> Mapping[str, str]:
    """Category by the word that stands for it, the category's own name included."""
    text = (files("vlmfix.evals") / "data" / "chair_words.json").read_text(encoding="utf-8")
    categories: dict[str, list[str]] = json.loads(text)["categories"]
    return {word: name for name, words in categories.items() for word in (name, *words)}


@dataclass(frozen=True)
class Mentions:
    """What one caption names.

    Args:
        words: the words as written (lemma, pairs merged) that stand for an object, in order.
        objects: their categories, in the same order, repeats kept.
        tokens: length of the caption after merging, punctuation included.
        spans: (start, stop) of each word in the lower-cased caption, in characters.
    """

    words: tuple[str, ...]
    objects: tuple[str, ...]
    tokens: int
    spans: tuple[tuple[int, int], ...]


def mentions(caption: str | None) -> Mentions:
    """The objects that a caption mentions; None reads as an empty caption."""
    lemmas = _lemmas()
    found = list(_TOKEN.finditer((caption or "").lower()))
    tokens = [lemmas.get(token[0], token[0]) for token in found]
    merged: list[tuple[str, tuple[int, int]]] = []
    position = 0
    while position < len(tokens):
        pair = " ".join(tokens[position : position + 2])
        last = position + (pair in _MERGED)
        word = _MERGED.get(pair, tokens[position])
        merged.append((word, (found[position].start(), found[last].end())))
        position = last + 1
    if {"toilet", "seat"} <= {word for word, _ in merged}:
        # The seat of a toilet is no chair.
        merged = [(word, span) for word, span in merged if word != "seat"]
    categories = category_of()
    named = [(word, span) for word, span in merged if word in categories]
    words, spans = tuple(word for word, _ in named), tuple(span for _, span in named)
    return Mentions(words, tuple(categories[word] for word in words), len(merged), spans)


def ground_truth(data: CocoData) -> dict[int, frozenset[str]]:
    """The objects of every image: annotated categories, and what its captions mention.

    Crowds and tiny boxes count. A category outside COCO's 80 stays under its own name; no caption
    can be found to mention it.

    Raises:
        BadInput: no category of the data is one of COCO's 80.
    """
    known = category_of()
    if not set(data.categories.values()) & set(known):
        raise BadInput(
            f"CHAIR knows COCO's 80 categories, and {data.source} has none of them "
            f"(but {', '.join(list(data.categories.values())[:5])}, ...): evaluate it with pope"
        )
    return {
        image: frozenset(
            [known.get(name, name) for name in names]
            + [o for caption in data.captions.get(image, ()) for o in mentions(caption).objects]
        )
        for image, names in data.objects.items()
    }


def ordered_objects(data: CocoData, with_captions: bool | None = None) -> dict[int, list[str]]:
    """The objects of every image for POPE: annotated ones first, then those only captions name.

    Args:
        data: COCO-format data.
        with_captions: use the captions; None uses them where the data has some and all of its
            categories are COCO's, since the extraction knows no others.
    """
    known = category_of()
    if with_captions is None:
        with_captions = bool(data.captions) and set(data.categories.values()) <= set(known)
    result: dict[int, list[str]] = {}
    for image, names in data.objects.items():
        captions: Sequence[str] = data.captions.get(image, ()) if with_captions else ()
        named = [o for caption in captions for o in mentions(caption).objects]
        result[image] = list(dict.fromkeys([*names, *named]))
    return result
