"""Chats as the templates of checkpoints write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_folders
from tiny_templates import SHAPES

import vlmfix
from vlmfix.errors import BadInput
from vlmfix.families.template import render_chat

IMAGE = {"type": "image"}


def said(role: str, *texts: str, images: int = 0) -> dict[str, Any]:
    parts = [{"type": "text", "text": text} for text in texts]
    return {"role": role, "content": [IMAGE] * images + parts}


SYSTEM = said("system", "Answer briefly.")
ASKED = said("user", "What is shown?", images=1)
ANSWERED = said("assistant", "A dog.")
AGAIN = said("user", "Is it red?")


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (
            "prints lists",
            "[gMASK]<sop><|system|>\nAnswer briefly.<|user|>\n"
            "<|begin_of_image|><|image|><|end_of_image|>What is shown?<|assistant|>\nA dog."
            "<|user|>\nIs it red?<|assistant|>\n",
        ),
        (
            "system string",
            "<s>[INST][IMG]What is shown?[/INST]A dog.</s>[INST]Answer briefly.\n\nIs it red?"
            "[/INST]",
        ),
        (
            "llava",
            "Answer briefly. USER: <image>\nWhat is shown? ASSISTANT: A dog. USER: Is it red? "
            "ASSISTANT:",
        ),
        (
            "gemma",
            "<bos><start_of_turn>user\nAnswer briefly.\n\n<start_of_image>What is shown?"
            "<end_of_turn>\n<start_of_turn>model\nA dog.<end_of_turn>\n<start_of_turn>user\n"
            "Is it red?<end_of_turn>\n<start_of_turn>model\n",
        ),
        (
            "idefics",
            "<|begin|>System: Answer briefly.<end_of_utterance>\nUser:<image>What is shown?"
            "<end_of_utterance>\nAssistant: A dog.<end_of_utterance>\nUser: Is it red?"
            "<end_of_utterance>\nAssistant:",
        ),
        (
            "chatml",
            "<|im_start|>system\nAnswer briefly.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
            "<|image_pad|><|vision_end|>What is shown?<|im_end|>\n<|im_start|>assistant\nA dog."
            "<|im_end|>\n<|im_start|>user\nIs it red?<|im_end|>\n<|im_start|>assistant\n",
        ),
    ],
)
def test_system_message_and_turns_as_each_template_takes_them(shape: str, expected: str) -> None:
    tokenizer = SHAPES[shape].tokenizer()
    assert render_chat(tokenizer, [SYSTEM, ASKED, ANSWERED, AGAIN]) == expected


@pytest.mark.parametrize("shape", SHAPES)
def test_an_answer_that_is_begun_ends_the_prompt(shape: str) -> None:
    tokenizer = SHAPES[shape].tokenizer()
    text = render_chat(tokenizer, [ASKED, said("assistant", "It is ", "a dog")])
    # LLaVA's template adds a space to each part, Gemma's trims it.
    assert "".join(text.split()).endswith("Itisadog") and text.endswith("a dog")
    assert "'type'" not in text and text.count("What is shown?") == 1


def test_a_word_of_the_user_that_looks_like_a_list_stays() -> None:
    tokenizer = SHAPES["prints lists"].tokenizer()
    odd = "[{'type': 'text', 'text': 'message0part0end'}]"
    assert f"<|user|>\n{odd}<|assistant|>" in render_chat(tokenizer, [said("user", odd)])


def test_text_that_no_form_brings_into_the_prompt_is_refused() -> None:
    tokenizer = SHAPES["llava"].tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages if m['role'] == 'user' %}{{ m['content'][0]['text'] }}{% endfor %}"
    )
    assert render_chat(tokenizer, [said("user", "Why?")]) == "Why?"
    with pytest.raises(BadInput, match="does not write the text of the system's message"):
        render_chat(tokenizer, [SYSTEM, said("user", "Why?")])
    tokenizer.chat_template = "{{ raise_exception('no system here') }}"
    with pytest.raises(BadInput, match="does not take this chat: no system here"):
        render_chat(tokenizer, [SYSTEM, ASKED])


def test_a_template_that_only_the_tokenizer_has() -> None:
    processor = tiny_folders.processor()
    expected = render_chat(processor, [ASKED])
    processor.tokenizer.chat_template, processor.chat_template = processor.chat_template, None
    assert render_chat(processor, [ASKED]) == expected
    processor.tokenizer.chat_template = None
    with pytest.raises(BadInput, match="LlavaProcessor nor its tokenizer has a chat template"):
        render_chat(processor, [ASKED])


@pytest.mark.parametrize("role", ["user", "system"])
def test_a_placeholder_in_a_text_is_refused(role: str) -> None:
    processor = tiny_folders.processor()
    with pytest.raises(BadInput, match=f"the {role}'s text holds '<image>'"):
        render_chat(processor, [said(role, "what does <image> mean ?"), ASKED])


class PaliGemmaProcessor:
    """Stands for the class of that name, and has no template either."""

    chat_template = None
    tokenizer = None


class InstructBlipProcessor(PaliGemmaProcessor):
    pass


class Fork(InstructBlipProcessor):
    pass


@pytest.mark.parametrize(("kind", "mark"), [(PaliGemmaProcessor, "<image>"), (Fork, "")])
def test_models_that_take_one_request(kind: Any, mark: str) -> None:
    assert render_chat(kind(), [ASKED]) == f"{mark}What is shown?"
    late = {"role": "user", "content": [{"type": "text", "text": "What?"}, IMAGE]}
    assert render_chat(kind(), [late]) == f"{mark}What?"
    for count in (0, 2):
        request = [said("user", "What?", images=count)]
        if mark:
            assert render_chat(kind(), request) == mark * count + "What?"
        else:
            with pytest.raises(
                BadInput, match=f"no such prompt: .* one image, and this request has {count}"
            ):
                render_chat(kind(), request)
    for chat in ([SYSTEM, ASKED], [ASKED, ANSWERED, AGAIN], [ASKED, ANSWERED], []):
        with pytest.raises(BadInput, match="takes one request"):
            render_chat(kind(), chat)


def test_every_prompt_is_written_in_one_place() -> None:
    package = Path(vlmfix.__file__).parent
    calls = [
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if "apply_chat_template(" in path.read_text() and "training" not in path.parts
    ]
    assert calls == ["families/template.py"]
