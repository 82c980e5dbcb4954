"""The steps of NLTK that CHAIR's and AMBER's code share: tokens with tags, WordNet lemmas.

NLTK's models and WordNet come in no package; for the exact figures of the official code the user
downloads them once. Nothing here falls back on anything else.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

from vlmfix.errors import MissingDependency

__all__ = ["lemma", "require_nltk", "tagged_tokens"]

#: NLTK 3.8 reads the first of each pair, later versions the second.
RESOURCES = "punkt punkt_tab averaged_perceptron_tagger averaged_perceptron_tagger_eng wordnet"


@cache
def _tools() -> tuple[Callable[[str], list[tuple[str, str]]], Callable[[str, str], str]]:
    try:
        nltk: Any = import_module("nltk")
        lemmatise = import_module("nltk.stem").WordNetLemmatizer().lemmatize
    except ImportError as error:
        raise MissingDependency(
            f"tagging words needs NLTK ({error}): pip install 'vlmfix[nltk]' && python -m "
            f"nltk.downloader {RESOURCES}"
        ) from None

    def tag(text: str) -> list[tuple[str, str]]:
        return list(nltk.pos_tag(nltk.word_tokenize(text)))

    try:
        tag("Two dogs.")
        lemmatise("dogs", "n")
    except (LookupError, OSError) as error:  # OSError: a resource without one of its files
        missing = str(error).strip().strip("*").strip().split("\n")[0]
        raise MissingDependency(
            f"NLTK {nltk.__version__} lacks a resource ({missing}): python -m nltk.downloader "
            f"{RESOURCES}; without a network, unpack nltk_data from another machine and name its "
            "folder in NLTK_DATA"
        ) from None
    return tag, lemmatise


def require_nltk() -> str:
    """Version of the NLTK that is there, with all that tagging needs.

    Raises:
        MissingDependency: NLTK or one of its resources is not there; the message says what to run.
    """
    _tools()
    return str(import_module("nltk").__version__)


def tagged_tokens(text: str) -> list[tuple[str, str]]:
    """Tokens of a text, case kept, with their Penn Treebank tags.

    Raises:
        MissingDependency: as `require_nltk`.
    """
    return _tools()[0](text)


def lemma(word: str, part: str) -> str:
    """WordNet's base form of a word.

    Args:
        word: the token, case kept.
        part: "n", "v", "a" or "r".

    Raises:
        MissingDependency: as `require_nltk`.
    """
    return _tools()[1](word, part)
