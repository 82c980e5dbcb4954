"""Tokenizers of the twins: the class, the special tokens and the order of ids of the real ones.

The text part is trained here, on a page of our own, so that no published vocabulary is kept. Real
ids reach 262,144; here the ids after the text follow it at once, in their real order (`Ids`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from string import ascii_lowercase
from typing import Any

from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

TEXT = """Is there a red bicycle next to the dog in this picture? Yes, there is a red bicycle.
Describe the image. Use two sentences. What is shown? A dog is shown. Why? Answer briefly.
Is there a dog in the image? No, there is no dog. Say hello. Answer with one word, please.
You are an assistant that looks at pictures. user assistant system User Assistant System model
A man rides a horse on the beach, and the sun sets behind a small house with two windows.
How many chairs stand around the table? Three chairs and one stool. Is it day or night?
Please describe this image in detail. Write a general description of the picture.
Answer the question using a single word or phrase. Is there a red circle in the image?
"""
"""What the tokenizers are trained on: the words of the tests, and some more."""

_BYTES = tuple(f"<0x{number:02X}>" for number in range(256))
_SENTENCE_ENDS = ("?\n", ".\n", "?\n\n", ".\n\n", "\n\n")
_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Token:
    """A token outside of the text: its real id, and whether the tokenizer calls it special."""

    number: int
    text: str
    special: bool = True


@dataclass(frozen=True)
class Ids:
    """Real ids and those of the twin.

    Ids that stand before the text stay. All others follow the text in their order, with no gap.
    """

    tokens: tuple[Token, ...]
    text: tuple[str, ...]
    """The pieces of text, in the order of their ids."""

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Every piece and token by its id in the twin."""
        low = {token.text: token.number for token in self.tokens if token.number < 256}
        found, taken = dict(low), set(low.values())
        at = 0
        for piece in self.text:
            if piece in found:
                continue
            while at in taken:
                at += 1
            found[piece] = at
            taken.add(at)
        for token in sorted(self.tokens, key=lambda token: token.number):
            if token.number >= 256:
                found[token.text] = max(taken) + 1
                taken.add(found[token.text])
        return found

    def twin(self, number: int) -> int:
        """The id in the twin of a real id."""
        texts = {token.number: token.text for token in self.tokens}
        return self.vocabulary[texts[number]] if number in texts else number

    def size(self, real: int) -> int:
        """The rows of the twin's embedding: as many more, or less, than tokens as in the real one.

        Real tables have up to hundreds of rows that no token uses; a few show the same.
        """
        spare = real - 1 - max(token.number for token in self.tokens)
        return max(self.vocabulary.values()) + 1 + max(-1, min(spare, 24))


@cache
def byte_pieces(split: str = _PIECES) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """Pieces and merges of a byte-level BPE, as Qwen, GPT and Llama 3 have them."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # A mark and the newline behind it are one piece in these vocabularies, as are two newlines.
    return _train(trained, alphabet, [TEXT, "".join(f"so{end}{end}" for end in _SENTENCE_ENDS)])


@cache
def word_pieces() -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """Pieces and merges of a BPE with word marks, as Llama and Gemma have them; without bytes."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True),
            pre_tokenizers.Split(Regex(r"[\p{L}▁]+|[^\p{L}▁]"), "isolated"),
        ]
    )
    return _train(trained, [], TEXT.split("\n"))


def _train(
    tokenizer: Tokenizer, alphabet: Iterable[str], text: list[str]
) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    alphabet = list(alphabet)
    trainer = trainers.BpeTrainer(
        vocab_size=4096, min_frequency=1, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(text, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return tuple(pieces), tuple((left, right) for left, right in model["merges"])


def byte_level(tokens: Iterable[Token]) -> tuple[Ids, Tokenizer]:
    """Qwen2, GPT-2, Llama 3, Tekken, GLM: bytes, and special tokens before or after the text."""
    tokens = tuple(tokens)
    pieces, merges = byte_pieces()
    ids = Ids(tokens, pieces)
    made = Tokenizer(models.BPE(vocab=ids.vocabulary, merges=list(merges)))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    return ids, made


def llama(tokens: Iterable[Token]) -> tuple[Ids, Tokenizer]:
    """Llama 2, Mistral 7B: three special tokens, all bytes, then pieces with word marks."""
    pieces, merges = word_pieces()
    ids = Ids(tuple(tokens), (*_BYTES, *pieces))
    made = Tokenizer(
        models.BPE(
            vocab=ids.vocabulary,
            merges=list(merges),
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    made.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement="▁", prepend_scheme="first", split=False
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    return ids, made


def gemma(tokens: Iterable[Token]) -> tuple[Ids, Tokenizer]:
    """Gemma: special tokens, newlines as tokens of their own, pieces with word marks, bytes."""
    pieces, merges = word_pieces()
    ids = Ids(tuple(tokens), (*_BYTES, *pieces))
    made = Tokenizer(
        models.BPE(
            vocab=ids.vocabulary,
            merges=list(merges),
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return ids, made


def row(token: Token) -> dict[str, Any]:
    """How tokenizer_config.json writes a token."""
    return {
        "content": token.text,
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": token.special,
    }


def files(
    ids: Ids, made: Tokenizer, config: Mapping[str, Any], post: Mapping[str, Any] | None = None
) -> dict[str, dict[str, Any]]:
    """tokenizer.json and tokenizer_config.json as a folder of the hub has them."""
    written = json.loads(made.to_str())
    rows = {ids.vocabulary[token.text]: row(token) for token in ids.tokens}
    written["added_tokens"] = [{"id": number, **rows[number]} for number in sorted(rows)]
    if post is not None:
        written["post_processor"] = post
    decoder = {str(number): rows[number] for number in sorted(rows)}
    return {
        "tokenizer.json": written,
        "tokenizer_config.json": {"added_tokens_decoder": decoder, **config},
    }


def starts_with(ids: Ids, text: str) -> dict[str, Any]:
    """The post-processor that writes one token before every text."""
    first = {"SpecialToken": {"id": text, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [
            first,
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": text, "type_id": 1}},
            {"Sequence": {"id": "B", "type_id": 1}},
        ],
        "special_tokens": {
            text: {"id": text, "ids": [ids.vocabulary[text]], "tokens": [text]},
        },
    }


def bert_files(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The files of a BERT tokenizer, such as a Q-Former's: words in small letters."""
    special = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "[DEC]": 5}
    words = sorted(set(re.findall(r"\w+|[^\w\s]", TEXT.lower())))
    letters = [f"{mark}{letter}" for mark in ("", "##") for letter in ascii_lowercase]
    pieces = list(dict.fromkeys((*words, *letters)))
    vocabulary = {**special, **{piece: at for at, piece in enumerate(pieces, len(special))}}
    made = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    made.decoder = decoders.WordPiece()
    written = json.loads(made.to_str())
    rows = {number: row(Token(number, text)) for text, number in special.items()}
    written["added_tokens"] = [{"id": number, **rows[number]} for number in sorted(rows)]
    named = ("pad", "unk", "cls", "sep", "mask")
    return {
        "tokenizer.json": written,
        "tokenizer_config.json": {
            "added_tokens_decoder": {str(number): rows[number] for number in sorted(rows)},
            **{f"{name}_token": f"[{name.upper()}]" for name in named},
            "tokenizer_class": "BertTokenizer",
            **config,
        },
    }
