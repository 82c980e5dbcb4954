"""Which tokens of an answer write the words for objects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlmfix.evals.chair.objects import mentions

__all__ = ["Mention", "find_mentions", "token_spans"]


@dataclass(frozen=True)
class Mention:
    """One object named in one answer.

    Attributes:
        answer: index of the answer.
        name: the object's category.
        hallucinated: whether the image lacks it.
        tokens: indices of the answer's tokens that write the word.
    """

    answer: int
    name: str
    hallucinated: bool
    tokens: tuple[int, ...]


def token_spans(ids: Sequence[int], tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """The lower-cased text of some tokens, and the (start, stop) that each writes of it.

    Told by decoding ever longer beginnings, which every tokenizer can do; spaces belong to the
    token that brings them, special tokens write nothing.
    """
    settings = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    texts = [tokenizer.decode(ids[:end], **settings).lower() for end in range(len(ids) + 1)]
    ends = [len(text) for text in texts]
    for at in reversed(range(len(ids))):
        # A character of several tokens shows as placeholders, maybe more, until it is whole.
        ends[at] = min(ends[at], ends[at + 1])
    return texts[-1], list(zip(ends[:-1], ends[1:], strict=True))


def find_mentions(
    answers: Sequence[Sequence[int]], truths: Sequence[frozenset[str]], tokenizer: Any
) -> list[Mention]:
    """Every object that the answers name, by CHAIR's rules, and the tokens that write it.

    Args:
        answers: token ids of each.
        truths: the objects of each answer's image.
        tokenizer: that of the model.
    """
    found = []
    for index, (ids, truth) in enumerate(zip(answers, truths, strict=True)):
        text, spans = token_spans(ids, tokenizer)
        named = mentions(text)
        for name, (start, stop) in zip(named.objects, named.spans, strict=True):
            tokens = [at for at, (low, high) in enumerate(spans) if low < stop and high > start]
            found.append(Mention(index, name, name not in truth, tuple(tokens)))
    return found
