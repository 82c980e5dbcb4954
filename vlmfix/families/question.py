"""Which tokens of a prompt are the user's question, and which of them carry content.

Token ids alone do not say where the chat template ends and the question begins. The template does:
filled with words that are known, it shows what it writes around each of them. That is looked up in
the prompt character by character and without white space, because tokens join the template's
characters with the question's, and templates trim what they are given.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from vlmfix.errors import BadInput
from vlmfix.families import ModelInfo
from vlmfix.families.template import has_template, render_chat

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

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def find_question(
    processor: Any, info: ModelInfo, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mark the question of every prompt: what the user says in the last turn, behind the images.

    What the processor's chat template writes around a question is left out where the prompt has
    it, and so are earlier turns and the beginning of an answer. Where nothing follows the images
    of that turn, what precedes them is the question. Content words are told by a list of English
    stop words; where a question has none, the whole question counts as content.

    Args:
        processor: the model's processor or tokenizer.
        info: the model's structure.
        ids: (B, L) token ids of the prompts, padded on either side.

    Returns:
        question, content: (B, L) bool. Rows without an image have neither, nor have those whose
        last turn has no text.
    """
    visual = {*info.image_token_ids, *info.video_token_ids}
    reader = _Reader(getattr(processor, "tokenizer", processor), visual)
    wording = _wording(processor, reader)
    question = torch.zeros(ids.shape, dtype=torch.bool)
    content = torch.zeros(ids.shape, dtype=torch.bool)
    for index, row in enumerate(ids.tolist()):
        places = [at for at, token in enumerate(row) if token in visual]
        if not places:
            continue
        units = reader.read(row)
        words = _asked([unit for unit in units if not unit.text.isspace()], wording, places)
        if not words:
            continue
        span = range(words[0].first, words[-1].last + 1)
        question[index, [at for at in span if row[at] not in reader.special]] = True
        content[index, _content([unit for unit in units if unit.first in span])] = True
    content &= question
    empty = ~content.any(1, keepdim=True)
    return question.to(ids.device), (content | (question & empty)).to(ids.device)


# -- tokens as characters --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Unit:
    """A character of a prompt, a token that was added to the vocabulary, or a run of visual ones.

    Attributes:
        text: the character, or the added token's text; "" for visual tokens.
        first, last: the tokens that it is made of.
        special: whether it is a special token, or visual.
    """

    text: str
    first: int
    last: int
    special: bool = False


class _Reader:
    """Reads the tokens of a prompt as units.

    Attributes:
        visual: ids of placeholders.
        special: ids that are no text, `visual` among them. A role's token may be special by its own
            flag alone.
        marks: the texts of those that were added to the vocabulary.
    """

    def __init__(self, tokenizer: Any, visual: Collection[int] = ()) -> None:
        self._tokenizer = tokenizer
        self.visual = visual
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self._added = {token: str(entry.content) for token, entry in added.items()}
        self.special = {token for token, entry in added.items() if entry.special}
        self.special |= {*tokenizer.all_special_ids, tokenizer.pad_token_id, *visual}
        self.marks = {self._added[token] for token in self.special if token in self._added}
        backend = getattr(tokenizer, "backend_tokenizer", None)
        decoder = getattr(backend, "decoder", None)
        self._byte_level = "ByteLevel" in str(decoder)
        self._spaced = backend is not None and decoder is None  # then tokens are whole words

    def read(self, ids: Sequence[int]) -> list[_Unit]:
        """The units of a prompt, white space among them."""
        known = sorted({*ids} - {*self.visual})  # of visual tokens there are thousands
        pieces = dict(zip(known, self._tokenizer.convert_ids_to_tokens(known), strict=True))
        units: list[_Unit] = []
        buffer: bytearray = bytearray()
        owners: list[int] = []
        for at, token in enumerate(ids):
            if token in self.visual and at and ids[at - 1] in self.visual:
                continue
            if token in self._added or token in self.special:
                units += _characters(buffer, owners)
                buffer, owners = bytearray(), []
                text = "" if token in self.visual else self._added.get(token) or pieces[token]
                units.append(_Unit(text, at, at, token in self.special))
                continue
            own = self._bytes(pieces[token])
            buffer += own
            owners += [at] * len(own)
        return units + _characters(buffer, owners)

    def _bytes(self, piece: str) -> bytes:
        if self._byte_level:
            return bytes(_ALIASES[letter] for letter in piece if letter in _ALIASES)
        if byte := _BYTE.fullmatch(piece):
            return bytes([int(byte[1], 16)])
        return (" " * self._spaced + piece.replace("▁", " ")).encode()

    def split(self, text: str) -> list[str]:
        """The units of a text that was not tokenised, without white space."""
        whole = sorted({own for own in self._added.values() if own in text}, key=len, reverse=True)
        found = re.findall("|".join([*map(re.escape, whole), r"\S"]), text)
        return [unit for unit in found if not unit.isspace()]


def _aliases() -> dict[str, int]:
    """The byte of each letter in a byte-level vocabulary: its own, or from 256 on for the rest."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + at): b for at, b in enumerate(rest)}


_ALIASES = _aliases()


def _characters(buffer: bytearray, owners: Sequence[int]) -> list[_Unit]:
    """The characters of UTF-8, each with the tokens that its bytes come from."""
    units, at = [], 0
    for letter in buffer.decode("utf-8", "surrogateescape"):
        end = at + len(letter.encode("utf-8", "surrogateescape"))
        units.append(_Unit(letter, owners[at], owners[end - 1]))
        at = end
    return units


# -- what the template writes ----------------------------------------------------------------------


@dataclass(frozen=True)
class _Wording:
    """What a chat template writes around the user's text, as units.

    Attributes:
        opening: what every message of the user begins with.
        closing: what follows every message of the user.
        lead: what stands between an image and the text after it.
    """

    opening: list[str]
    closing: list[str]
    lead: list[str]


def _wording(processor: Any, reader: _Reader) -> _Wording:
    """Read the wording off the template, filled with known words."""
    if not has_template(processor):
        return _Wording([], [], [])

    def around(*messages: Any) -> list[list[str]]:
        """What stands before, between and after the texts, in this order."""
        chat, texts = [], []
        for at, parts in enumerate(messages):
            texts.append(f"known{at}text")
            content = [*parts, {"type": "text", "text": texts[-1]}]
            chat.append({"role": "assistant" if at % 2 else "user", "content": content})
        chat_text = render_chat(processor, chat)
        return [reader.split(part) for part in re.split("|".join(texts), chat_text)]

    before, after = around(())
    opening, closing = before, after
    try:
        _, answering, asking, _ = around((), (), ())
    except BadInput:  # a template for one turn
        pass
    else:
        opening = _shared(before[::-1], asking[::-1])[::-1]
        closing = _shared(after, answering)
    lead: list[str] = []
    for unit in reversed(around([{"type": "image"}])[0]):
        if unit in reader.marks:  # of the image, or of what closes it
            break
        lead.insert(0, unit)
    return _Wording(opening, closing, lead)


def _shared(one: list[str], two: list[str]) -> list[str]:
    """The common beginning of two lists."""
    pairs = enumerate(zip(one, two, strict=False))
    return one[: next((at for at, (a, b) in pairs if a != b), min(len(one), len(two)))]


def _asked(units: Sequence[_Unit], wording: _Wording, visual: list[int]) -> Sequence[_Unit]:
    """The user's text in the last turn: after the last visual token, or where none is, before."""
    last = visual[-1]
    texts = [unit.text for unit in units]
    found = _last(texts, wording.opening)
    start = 0 if found is None else found + len(wording.opening)
    found = _last(texts[start:], wording.closing)
    turn = units[start : None if found is None else start + found]
    with_image = bool(turn) and turn[0].first <= last
    behind = [unit for unit in turn if unit.first > last and not unit.special]
    lead = len(wording.lead)
    if with_image and [unit.text for unit in behind[:lead]] == wording.lead:
        behind = behind[lead:]
    return behind or _before([unit for unit in turn if unit.first <= last], set(visual))


def _before(turn: Sequence[_Unit], visual: Collection[int]) -> Sequence[_Unit]:
    """The user's text of a turn that its images end.

    Letters between a special token and an image are the processor's: Idefics 3 has no token for
    the place of a tile, and writes it out.
    """
    runs = [list(run) for _, run in groupby(turn, key=lambda unit: unit.special)]
    said: list[_Unit] = []
    for left, run, right in zip([[], *runs], runs, [*runs[1:], []], strict=False):
        opened = bool(left) and left[-1].first not in visual
        is_place = opened and bool(right) and right[0].first in visual
        if not run[0].special and not is_place:
            said += run
    return said


def _last(texts: list[str], wanted: list[str]) -> int | None:
    """Where a list holds another for the last time; None: nowhere, or there is nothing to find."""
    places = range(len(texts) - len(wanted), -1, -1) if wanted else ()
    return next((at for at in places if texts[at : at + len(wanted)] == wanted), None)


# -- what the words mean ---------------------------------------------------------------------------


def _content(units: Sequence[_Unit]) -> list[int]:
    """The tokens of content words; the pieces of a word share its fate."""
    text = "".join(unit.text if len(unit.text) == 1 else " " for unit in units)
    tokens: set[int] = set()
    for word in _WORD.finditer(text):
        if not _is_stop_word(word[0].lower().replace("’", "'")):
            for unit in units[word.start() : word.end()]:
                tokens.update(range(unit.first, unit.last + 1))
    return sorted(tokens)


def _is_stop_word(word: str) -> bool:
    return word.endswith("n't") or word.partition("'")[0] in STOP_WORDS
