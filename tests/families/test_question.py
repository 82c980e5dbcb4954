"""Which tokens of a prompt are the user's question."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_templates import SHAPES
from tiny_templates import VISUAL as PLACEHOLDER
from tokenizers import Tokenizer, decoders, models
from transformers import AddedToken, PreTrainedTokenizerFast, Qwen2Tokenizer

from vlmfix.families import ModelInfo, describe_model
from vlmfix.families.question import STOP_WORDS, _content, _Reader, find_question
from vlmfix.families.template import render_chat
from vlmfix.loading import load

VISUAL = 64  # visual tokens of an image of the bundled model


@pytest.fixture(scope="module")
def bundled() -> tuple[Any, ModelInfo]:
    model, processor = load("emoji")
    return processor, describe_model(model)


def _ids(processor: Any, text: str) -> list[int]:
    expanded = text.replace("<image>", "<image>" * VISUAL)
    return list(processor.tokenizer(expanded, add_special_tokens=True)["input_ids"])


def _prompt(processor: Any, *turns: str, images: int = 1) -> list[int]:
    chat = []
    for index, turn in enumerate(turns):
        image = [{"type": "image"}] * (images if index == 0 else 0)
        chat.append({"role": "user", "content": [*image, {"type": "text", "text": turn}]})
    text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    return _ids(processor, text)


def _found(bundled: tuple[Any, ModelInfo], ids: list[int]) -> tuple[str, list[str]]:
    processor, info = bundled
    row = torch.tensor([ids])
    question, content = find_question(processor, info, row)
    assert question.shape == content.shape == row.shape
    assert not (content & ~question).any()
    decode = getattr(processor, "tokenizer", processor).decode
    return decode(row[question]), [decode([token]).strip() for token in row[content].tolist()]


def test_the_template_is_left_out_and_stop_words_carry_no_content(bundled: Any) -> None:
    processor, _ = bundled
    text, content = _found(bundled, _prompt(processor, "Is there a dog in the image?"))
    assert text == "Is there a dog in the image?"
    assert content == ["dog", "image"]
    assert {"is", "there", "a", "in", "the"} <= STOP_WORDS and "image" not in STOP_WORDS


def test_padding_on_either_side_and_rows_without_an_image(bundled: Any) -> None:
    processor, info = bundled
    one = _prompt(processor, "Describe the image.")
    pad = processor.tokenizer.pad_token_id
    text_only = _ids(processor, "USER: Describe the dog. ASSISTANT:")
    text_only = [pad] * (len(one) + 3 - len(text_only)) + text_only
    batch = torch.tensor([[pad] * 3 + one, one + [pad] * 3, text_only])
    question, content = find_question(processor, info, batch)
    assert torch.equal(question[0, 3:], question[1, :-3]) and question[0].sum() == 4
    assert torch.equal(content[0, 3:], content[1, :-3]) and content[0].sum() == 2
    assert not question[2].any() and not content[2].any()


def test_only_stop_words_count_as_content_together(bundled: Any) -> None:
    processor, _ = bundled
    text, content = _found(bundled, _prompt(processor, "Is there a?"))
    assert text == "Is there a?" and len(content) == 4


def test_another_prompt_style_keeps_all_text_after_the_last_image(bundled: Any) -> None:
    processor, _ = bundled
    text, content = _found(bundled, _ids(processor, "USER: <image> a dog <image> the cat"))
    assert text.strip() == "the cat" and content == ["cat"]


def test_a_processor_without_a_template(bundled: Any) -> None:
    processor, info = bundled
    ids = _ids(processor, "USER: <image>\nthe cat ASSISTANT:")
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.chat_template = None
    text, _ = _found((tokenizer, info), ids)
    assert text.strip() == "the cat ASSISTANT:"


def test_pieces_of_a_word_share_its_fate() -> None:
    pieces = ("▁The", "▁zeb", "ra", "▁is", "▁he", "re", "▁it", "em", "?")
    words = Tokenizer(models.WordLevel({piece: at for at, piece in enumerate(pieces)}, "?"))
    words.decoder = decoders.Metaspace()
    units = _Reader(PreTrainedTokenizerFast(tokenizer_object=words)).read(list(range(9)))
    expected = [False, True, True, False, False, False, True, True, False]
    assert [at in _content(units) for at in range(9)] == expected


# -- templates in the shape of published ones ------------------------------------------------------

QUESTION = "Is there a red bicycle next to the dog in this picture?"
CONTENT = "redbicyclenextdogpicture"  # some words are several tokens
IMAGE = {"type": "image"}


def _said(role: str, *parts: Any) -> dict[str, Any]:
    texts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"role": role, "content": texts}


ANSWERED = [_said("user", IMAGE, "What is shown?"), _said("assistant", "A red dog.")]
CHATS = {
    "one": [_said("user", IMAGE, QUESTION)],
    "system": [_said("system", "Answer briefly."), _said("user", IMAGE, QUESTION)],
    "second turn": [*ANSWERED, _said("user", QUESTION)],
    "third turn": [*ANSWERED, *ANSWERED, _said("user", QUESTION)],
    "new image": [*ANSWERED, _said("user", IMAGE, QUESTION)],
    "begun": [_said("user", IMAGE, QUESTION), _said("assistant", "Yes, there is a")],
    "text first": [_said("user", QUESTION, IMAGE)],
    "text first, again": [*ANSWERED, _said("user", QUESTION, IMAGE)],
}


def _marked(shape: str, chat: Any) -> tuple[str, list[str]]:
    """The question, and the content words' tokens, in a prompt as the processor expands it."""
    tokenizer = SHAPES[shape].tokenizer()
    text = render_chat(tokenizer, chat).replace(SHAPES[shape].image, SHAPES[shape].expanded)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    visual = tokenizer.convert_tokens_to_ids(PLACEHOLDER)
    info = SimpleNamespace(image_token_ids=(visual,), video_token_ids=())
    row = torch.tensor([ids])
    question, content = find_question(tokenizer, info, row)
    words = [tokenizer.decode([token]).strip() for token in row[content].tolist()]
    return tokenizer.decode(row[question]), words


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chat", CHATS)
def test_the_last_turn_of_the_user_is_the_question(shape: str, chat: str) -> None:
    question, content = _marked(shape, CHATS[chat])
    assert question.strip() == QUESTION  # "?\n\n" may be one token
    assert "".join(content) == CONTENT


@pytest.mark.parametrize("shape", SHAPES)
def test_newlines_and_marks_are_no_content_and_separate_words(shape: str) -> None:
    text = "Is it red?\nDescribe the image.\n\nIs there a dög?"
    question, content = _marked(shape, [_said("user", IMAGE, text)])
    assert question.strip() == text
    assert "".join(content).replace("\ufffd", "") in ("redDescribeimagedg", "redDescribeimagedög")


@pytest.mark.parametrize("shape", SHAPES)
def test_a_turn_without_text_has_no_question(shape: str) -> None:
    chat = [_said("user", IMAGE, "What is shown?"), _said("assistant", "Yes"), _said("user", IMAGE)]
    assert _marked(shape, chat) == ("", [])


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("What's the dog's colour?", "dog's colour"),
        ("Don't describe, isn't it red?", "describe red"),
        ("Is it 3 p.m.?", "3 p m"),
    ],
)
def test_words_with_apostrophes(bundled: Any, text: str, content: str) -> None:
    processor, _ = bundled
    units = _Reader(processor.tokenizer).read(_ids(processor, text)[1:])
    tokens = set(_content(units))
    found = "".join(unit.text if unit.first in tokens else " " for unit in units)
    assert " ".join(found.split()) == content


# -- published templates and vocabularies, where they are at hand ----------------------------------

#: File of a template, what it writes for an image, what the processor makes of that.
PUBLISHED = {
    "qwen2_5_vl/chat_template.json": ("<|image_pad|>", PLACEHOLDER * 4),
    "idefics3/chat_template.json": ("<image>", f"<fake>{PLACEHOLDER}<fake>"),
    "llava_next_mistral/chat_template.json": ("<image>", PLACEHOLDER * 4),
    "granite_docling/chat_template.jinja": ("<image>", f"<fake>{PLACEHOLDER}<fake>"),
    "mistral/mistral-small-3.1.jinja": ("[IMG]", f"{PLACEHOLDER}[IMG_BREAK]{PLACEHOLDER}[IMG_END]"),
}


@pytest.fixture(scope="module")
def published(golden: Path) -> dict[str, Any]:
    """Byte-level vocabularies of 150,000 and 100,000 tokens."""
    found = {}
    for name in ("qwen2_5_vl", "granite_docling"):
        words = json.loads((golden / "twins" / name / "vocab.json").read_text("utf-8"))
        merges = (golden / "twins" / name / "merges.txt").read_text("utf-8").splitlines()
        pairs = [tuple(line.split()) for line in merges if line and not line.startswith("#v")]
        found[name] = Qwen2Tokenizer(words, pairs, bos_token="<s>", eos_token="</s>")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("file", PUBLISHED)
@pytest.mark.parametrize("vocabulary", ["qwen2_5_vl", "granite_docling"])
def test_published_templates(
    golden: Path, published: dict[str, Any], vocabulary: str, file: str
) -> None:
    text = (golden / "twins" / file).read_text("utf-8")
    tokenizer = copy.deepcopy(published[vocabulary])
    tokenizer.chat_template = json.loads(text)["chat_template"] if "json" in file else text
    image, expanded = PUBLISHED[file]
    special = {PLACEHOLDER, *re.findall(r"<[|a-z_]+>|\[/?[A-Z_]+\]|</s>", text + expanded)}
    tokenizer.add_tokens([AddedToken(one, special=True, normalized=False) for one in special])
    info = SimpleNamespace(
        image_token_ids=(tokenizer.convert_tokens_to_ids(PLACEHOLDER),), video_token_ids=()
    )
    for chat in CHATS.values():
        prompt = render_chat(tokenizer, chat).replace(image, expanded)
        row = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
        question, content = find_question(tokenizer, info, row)
        assert tokenizer.decode(row[question]).strip() == QUESTION
        assert tokenizer.decode(row[content]).split() == [
            "red",
            "bicycle",
            "next",
            "dog",
            "picture",
        ]
