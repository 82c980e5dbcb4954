"""Which tokens of a prompt are the user's question."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from vlmfix.families import ModelInfo, describe_model
from vlmfix.families.question import STOP_WORDS, find_question
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
    from vlmfix.families.question import _content

    class Pieces:
        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return [("▁The", "▁zeb", "ra", "▁is", "▁he", "re", "▁it", "em", "?")[i] for i in ids]

    expected = [False, True, True, False, False, False, True, True, False]
    assert _content(list(range(9)), Pieces()) == expected
