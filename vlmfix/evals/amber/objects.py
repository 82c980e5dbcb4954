"""AMBER's reading of a description: which nouns are objects, and which of those are imagined.

Reference: junyangwang0410/AMBER, inference.py, generative part. Its rules, with what surprises:

- Nouns keep their case, and so "Dog" at the start of a sentence is not the object "dog".
- A safe word is never imagined, but counts as a noun.
- A noun that stands for several true objects covers the first one only, and an object that is
  annotated twice can be covered once.
- Words associated with an object come before the objects themselves, so "boat" may cover the ship
  that lists it before it covers a boat.
- A noun on the list of likely hallucinations may still be excused by its similarity to a true
  object; the hallucination stays marked.

The official code measures similarity with spaCy's en_core_web_lg, which no package index ships.
Equal words are the default here and say so; similarity can only excuse more nouns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import import_module
from typing import Any

from vlmfix.errors import BadInput, MissingDependency
from vlmfix.evals.amber.data import Lexicon
from vlmfix.evals.inputs.nltk_tools import lemma, tagged_tokens

__all__ = ["Objects", "Similarity", "get_similarity", "nouns", "read_objects"]

Similarity = Callable[[str, str], float]
"""How alike two words are; above 0.8 they are the same to AMBER."""

THRESHOLD = 0.8
OFFICIAL_VECTORS = "en_core_web_lg"


@dataclass(frozen=True)
class Objects:
    """What a description names.

    Args:
        named: nouns of the closed vocabulary, in order, with repeats.
        imagined: those of them that the picture does not show.
        covered: indices of the true objects that are named.
        expected: indices of the annotated hallucinations that are named.
    """

    named: tuple[str, ...]
    imagined: tuple[str, ...]
    covered: frozenset[int]
    expected: frozenset[int]


def nouns(text: str) -> list[str]:
    """The nouns of a text, as NLTK tags them, in WordNet's base form.

    Raises:
        MissingDependency: NLTK or its data is not there.
    """
    return [lemma(word, "n") for word, tag in tagged_tokens(text) if tag.startswith("NN")]


def read_objects(
    words: Sequence[str],
    truth: Sequence[str],
    hallucinations: Sequence[str],
    lexicon: Lexicon,
    similarity: Similarity | None = None,
) -> Objects:
    """Sort the nouns of one description.

    Args:
        words: its nouns in base form, case kept, as `nouns` gives them.
        truth: the annotated objects.
        hallucinations: the annotated objects that people would imagine.
        lexicon: associations and safe words.
        similarity: None: words are alike if they are equal.
    """
    named = tuple(word for word in words if word in lexicon.vocabulary)
    true_names, false_names = _names(truth, lexicon), _names(hallucinations, lexicon)
    imagined: list[str] = []
    covered: set[int] = set()
    expected: set[int] = set()
    for word in named:
        if word in lexicon.safe:
            continue
        owner = _equal(word, true_names)
        if owner is not None:
            covered.add(owner)
            continue
        for found in (_equal(word, false_names), _alike(word, false_names, similarity)):
            if found is not None:
                expected.add(found)
        owner = _alike(word, true_names, similarity)
        if owner is not None:
            covered.add(owner)
        else:
            imagined.append(word)
    return Objects(named, tuple(imagined), frozenset(covered), frozenset(expected))


def _names(objects: Sequence[str], lexicon: Lexicon) -> list[tuple[str, int]]:
    """(word, index of the object that it stands for), the associated words first."""
    associated = [(w, i) for i, name in enumerate(objects) for w in lexicon.associations[name]]
    return [*associated, *((name, i) for i, name in enumerate(objects))]


def _equal(word: str, names: Sequence[tuple[str, int]]) -> int | None:
    return next((owner for name, owner in names if name == word), None)


def _alike(
    word: str, names: Sequence[tuple[str, int]], similarity: Similarity | None
) -> int | None:
    if similarity is None:
        return None
    return next((owner for name, owner in names if similarity(word, name) > THRESHOLD), None)


def get_similarity(option: str | Similarity) -> Similarity | None:
    """What an option asks for.

    Args:
        option: "exact" (equal words only), "spacy" (vectors of en_core_web_lg, as the official
            code), "spacy:NAME" (another installed model, or a folder), or a function.

    Raises:
        BadInput: an unknown option, or a model without word vectors, whose similarities mean
            nothing.
        MissingDependency: spaCy or its model is not installed.
    """
    if not isinstance(option, str):
        return option
    if option == "exact":
        return None
    kind, _, name = option.partition(":")
    if kind != "spacy":
        raise BadInput(
            f"no similarity {option!r}: choose 'exact', 'spacy', 'spacy:MODEL', or pass a function "
            "of two words"
        )
    return _spacy(name or OFFICIAL_VECTORS)


def _spacy(name: str) -> Similarity:
    try:
        model: Any = import_module("spacy").load(name)
    except (ImportError, OSError) as error:
        raise MissingDependency(
            f"similarity by spaCy needs the model {name} ({error}): pip install spacy && python -m "
            f"spacy download {OFFICIAL_VECTORS}; or score with similarity='exact'"
        ) from None
    if not len(model.vocab.vectors):
        raise BadInput(
            f"the spaCy model {name} has no word vectors: use {OFFICIAL_VECTORS}, or 'exact'"
        )
    read = lru_cache(maxsize=None)(model)

    @cache
    def similarity(first: str, second: str) -> float:
        one, other = read(first), read(second)
        # Of a word without a vector spaCy warns, and says 0.
        if not (one.vector_norm and other.vector_norm):
            return 1.0 if first == second else 0.0
        return float(one.similarity(other))

    return similarity
