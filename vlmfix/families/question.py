"""Which tokens of a prompt are the user's question, and which of them carry content.

Token ids alone do not say where the chat template ends and the question begins. A processor does:
its template, filled with two different questions, differs just there.
"""

from __future__ import annotations

from typing import Any

import torch

from vlmfix.families import ModelInfo

__all__ = ["STOP_WORDS", "find_question"]

#: Words that carry no content of their own: articles, pronouns, prepositions, conjunctions,
#: auxiliaries, question words, politeness.
_WORDS = """
    a about above after again all also am among an and another any are around as at be because been
    before being below between both but by can could did do does doing done down during each either
    else ever every few for from further had has have having he her here hers him his how i if in
    into is it its itself just let lets may me might mine more most much must my myself neither no
    nor not of off on once one only onto or other our ours out over own per please shall she should
    since so some such than that the their theirs them then there these they this those through to
    too under until up upon us very was we were what when where whether which while who whom whose
    why will with within without would yes yet you your yours
    """
STOP_WORDS = frozenset(_WORDS.split())

_PROBES = ("apple", "seven")  # any two words that share neither their first nor their last token
_WORD_STARTS = ("▁", "Ġ", " ")  # how tokenizers mark that a word begins


def find_question(
    processor: Any, info: ModelInfo, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mark the question of every prompt: what the user says after the last image.

    What the processor's chat template writes around a question is left out where the prompt has
    it. Content words are told by a list of English stop words; where a question has none, the
    whole question counts as content.

    Args:
        processor: the model's processor or tokenizer.
        info: the model's structure.
        ids: (B, L) token ids of the prompts, padded on either side.

    Returns:
        question, content: (B, L) bool. Rows without an image have neither.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    head, tail = _template(processor, tokenizer, info)
    special = set(tokenizer.all_special_ids) - set(info.image_token_ids)
    visual = {*info.image_token_ids, *info.video_token_ids}
    question = torch.zeros(ids.shape, dtype=torch.bool)
    content = torch.zeros(ids.shape, dtype=torch.bool)
    for index, row in enumerate(ids.tolist()):
        last = max((at for at, token in enumerate(row) if token in visual), default=None)
        if last is None:
            continue
        first, stop = last + 1, len(row)
        while stop > first and row[stop - 1] == getattr(tokenizer, "pad_token_id", None):
            stop -= 1
        if tail and row[max(first, stop - len(tail)) : stop] == tail:
            stop -= len(tail)
        if head and row[first : min(stop, first + len(head))] == head:
            first += len(head)
        keep = [at for at in range(first, stop) if row[at] not in special]
        question[index, keep] = True
        meaning = _content([row[at] for at in keep], tokenizer)
        content[index, [at for at, is_content in zip(keep, meaning, strict=True) if is_content]] = (
            True
        )
    empty = ~content.any(1, keepdim=True)
    return question.to(ids.device), (content | (question & empty)).to(ids.device)


def _template(processor: Any, tokenizer: Any, info: ModelInfo) -> tuple[list[int], list[int]]:
    """What the chat template writes between image and question, and after the question, as ids."""
    if not getattr(processor, "chat_template", None):
        return [], []
    filled = []
    for word in _PROBES:
        parts = [{"type": "image"}, {"type": "text", "text": word}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=False
        )
        filled.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    one, two = filled
    shared = _shared(one, two)
    image = max((at for at, token in enumerate(one) if token in info.image_token_ids), default=-1)
    return one[image + 1 : shared], one[len(one) - _shared(one[::-1], two[::-1]) :]


def _shared(one: list[int], two: list[int]) -> int:
    """Length of the common beginning of two lists."""
    pairs = enumerate(zip(one, two, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(two)))


def _content(ids: list[int], tokenizer: Any) -> list[bool]:
    """Which tokens belong to a content word; the pieces of a word share its fate."""
    pieces = tokenizer.convert_ids_to_tokens(ids)
    marked = any(piece.startswith(_WORD_STARTS) for piece in pieces)
    words: list[list[int]] = []
    for at, piece in enumerate(pieces):
        begins = not marked or piece.startswith(_WORD_STARTS) or not piece[:1].isalnum()
        if begins or not words:
            words.append([])
        words[-1].append(at)
    result = [False] * len(ids)
    for word in words:
        text = "".join(pieces[at] for at in word).lstrip("".join(_WORD_STARTS)).lower()
        meaningful = any(letter.isalnum() for letter in text) and text not in STOP_WORDS
        for at in word:
            result[at] = meaningful
    return result
