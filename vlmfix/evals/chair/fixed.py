"""CHAIR's known misreadings, repaired: opt-in, and comparable with no published figure.

What is repaired: "men" is a person, "motor bike" a motorcycle, "cheesecake" a cake, "iphone" a cell
phone (entries of the word list that the original matching cannot reach); orange the colour is no
orange; and what a caption says is not there ("no dogs", "without a cup") is not mentioned.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol, TypeVar

__all__ = ["repaired"]

_UNREACHED = {
    "men": "man",
    "motor bike": "motorbike",
    "cheesecake": "cake",
    "iphone": "cellphone",
}
_COLOURS = {"black", "white", "red", "blue", "green", "yellow", "brown", "grey", "gray", "purple"}
#: The builtin tokeniser leaves "t" of "isn't", NLTK's "n't".
_NEGATIONS = {"no", "not", "without", "never", "nor", "neither", "n't", "t"}
#: What may stand between a negation and what it denies.
_BETWEEN = {"a", "an", "any", "the", "be", "is", "are", "other", "visible", "single", "or"}
#: Words after "orange" that make it a thing. Any other word makes it the colour of that word.
_AFTER_A_THING = re.findall(
    r"\w+",
    """and or on in at of to from with by near beside between behind under over above
below next is are was were be has have sit lie lay stand rest hang that which who while as for
but also there visible inside outside along around among slice juice tree""",
)


class Token(Protocol):
    """A token as written, and its lemma."""

    @property
    def text(self) -> str: ...

    @property
    def lemma(self) -> str: ...


T = TypeVar("T", bound=Token)


def repaired(tokens: Sequence[T]) -> list[tuple[str, T]]:
    """The word that each token of a caption stands for, without what it does not mention.

    Args:
        tokens: of one caption, pairs merged.
    """
    return [
        (_UNREACHED.get(token.lemma, token.lemma), token)
        for position, token in enumerate(tokens)
        if not _is_colour(tokens, position) and not _is_denied(tokens, position)
    ]


def _is_colour(tokens: Sequence[Token], position: int) -> bool:
    if tokens[position].text != "orange":
        return False
    after = [token.lemma for token in tokens[position + 1 : position + 3]]
    if len(after) == 2 and after[0] in ("and", "or") and after[1] in _COLOURS:
        return True
    return bool(after) and after[0].isalpha() and after[0] not in _AFTER_A_THING


def _is_denied(tokens: Sequence[Token], position: int) -> bool:
    for token in reversed(tokens[:position]):
        if token.lemma in _NEGATIONS or token.text in _NEGATIONS:
            return True
        if token.lemma not in _BETWEEN:
            return False
    return False
