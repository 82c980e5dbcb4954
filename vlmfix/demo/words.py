"""Answers as words: tokens of each word, differences between answers, and absent objects.

Pure: no model and no page.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from vlmfix.evals.chair.objects import mentions
from vlmfix.evals.chair.tokens import token_spans

__all__ = ["Word", "differing", "split_words"]

_BARE = re.compile(r"[^\w]+")


@dataclass(frozen=True)
class Word:
    """One word of an answer.

    Attributes:
        text: as written, punctuation included.
        tokens: indices of the answer's tokens that write it, without punctuation around it.
        objects: COCO objects that it names, alone or with its neighbours, by CHAIR's rules.
    """

    text: str
    tokens: tuple[int, ...]
    objects: tuple[str, ...] = ()

    @property
    def bare(self) -> str:
        """The word without punctuation, in lower case."""
        return _BARE.sub("", self.text).casefold()


def split_words(ids: Sequence[int], tokenizer: Any) -> list[Word]:
    """The words of an answer.

    Args:
        ids: tokens of the answer; special ones write nothing.
        tokenizer: the tokenizer of the model.
    """
    lower, spans = token_spans(ids, tokenizer)
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if len(text) != len(lower):  # a few letters get longer in lower case, and spans count those
        text = lower
    named = mentions(lower)
    words = []
    for found in re.finditer(r"\S+", text):
        core = re.search(r"\w(.*\w)?", found[0])
        start, stop = found.span()
        if core:
            start, stop = start + core.start(), start + core.end()
        tokens = [at for at, (low, high) in enumerate(spans) if low < stop and high > start]
        objects = [
            name
            for name, (low, high) in zip(named.objects, named.spans, strict=True)
            if low < stop and high > start
        ]
        words.append(Word(found[0], tuple(tokens), tuple(objects)))
    return words


def differing(base: Sequence[Word], words: Sequence[Word], base_done: bool = True) -> set[int]:
    """Indices of the words that the base does not have at that place; punctuation is ignored.

    While the base is still being written, words beyond its end do not count as different.
    """
    old, new = [word.bare for word in base], [word.bare for word in words]
    found: set[int] = set()
    for what, _, end, start, stop in SequenceMatcher(a=old, b=new, autojunk=False).get_opcodes():
        if what != "equal" and (base_done or end < len(old)):
            found.update(range(start, stop))
    return found
