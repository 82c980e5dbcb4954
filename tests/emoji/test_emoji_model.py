"""The bundled model: loads without network or torchvision, sees, and depends on the picture."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from PIL import Image

import vlmfix.emoji
from vlmfix.emoji import dataset, draw, language
from vlmfix.emoji.training.quick_eval import pope_questions
from vlmfix.errors import BadInput


@pytest.fixture(scope="module")
def bundled() -> Any:
    return vlmfix.emoji.load()


def ask(bundled: Any, text: str, *pictures: Any, tokens: int = 4) -> str:
    model, processor = bundled
    content = [{"type": "image", "image": picture} for picture in pictures]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_import_is_light() -> None:
    code = (
        "import sys, vlmfix.emoji\n"
        "heavy = {'torch', 'transformers', 'PIL', 'numpy', 'tokenizers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert sorted(vlmfix.emoji.__all__) == vlmfix.emoji.__all__\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_weights_are_small_and_plain(bundled: Any) -> None:
    size = sum(file.stat().st_size for file in vlmfix.emoji.model_path().iterdir())
    assert size <= 40_000_000
    model, processor = bundled
    assert type(model).__name__ == "LlavaForConditionalGeneration" and not model.training
    assert model.dtype == torch.float32
    assert processor.tokenizer.padding_side == "left"
    text = model.config.text_config
    assert text.num_attention_heads == 2 * text.num_key_value_heads


@pytest.mark.slow
def test_loads_by_the_usual_calls_without_torchvision() -> None:
    code = (
        "import sys\n"
        "sys.modules['torchvision'] = None\n"
        "from transformers import AutoProcessor, LlavaForConditionalGeneration\n"
        f"folder = {str(vlmfix.emoji.model_path())!r}\n"
        "processor = AutoProcessor.from_pretrained(folder)\n"
        "assert processor.chat_template and type(processor).__name__ == 'LlavaProcessor'\n"
        "LlavaForConditionalGeneration.from_pretrained(folder)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_dtype(dtype: str | torch.dtype) -> None:
    assert vlmfix.emoji.load(dtype)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["int64", "float31", None])
def test_bad_dtype(dtype: str | None) -> None:
    with pytest.raises(BadInput, match="floating point"):
        vlmfix.emoji.load(dtype)


def test_it_answers_better_than_chance(bundled: Any) -> None:
    scenes = [scene for _, scene in dataset.split_scenes("evaluation", 8)]
    rows = pope_questions([scene.names for scene in scenes])["random"]
    right = 0
    for number, name, there in rows:
        text = language.question(name) + language.QUESTION_STYLES["lmms"]
        answer = ask(bundled, text, draw.paint(scenes[number])).strip(" .")
        assert answer in ("Yes", "No")
        right += answer == ("Yes" if there else "No")
    assert right / len(rows) >= 0.8


def test_captions_name_what_is_there(bundled: Any) -> None:
    found = total = 0
    for _, scene in dataset.split_scenes("evaluation", 6):
        text = ask(bundled, "Describe the image.", draw.paint(scene), tokens=110)
        found += len(set(language.mentioned(text)) & set(scene.names))
        total += len(scene.names)
    assert found / total >= 0.6


def test_answers_depend_on_the_picture(bundled: Any) -> None:
    _, scene = next(iter(dataset.split_scenes("evaluation", 1)))
    picture = draw.paint(scene)
    blank = Image.new("RGB", picture.size, "white")
    text = "Please describe this image in detail."
    seen, unseen = (ask(bundled, text, image, tokens=60) for image in (picture, blank))
    assert seen != unseen != ask(bundled, text, tokens=60)


def test_any_size_and_mode_of_picture_works(bundled: Any) -> None:
    _, picture = vlmfix.emoji.example_images(1)[0]
    for mode, size in (("RGBA", (300, 40)), ("L", (7, 9)), ("P", (500, 500))):
        odd = picture.resize(size).convert(mode)
        answer = ask(bundled, "Is there a dog in the image?", odd)
        assert answer.strip(" .") in ("Yes", "No")


def test_left_padded_batch_equals_singles(bundled: Any) -> None:
    model, processor = bundled
    pictures = [picture for _, picture in vlmfix.emoji.example_images(2)]
    texts = ["Is there a dog in the image?", "Please help me describe the image in detail."]
    prompts = [f"USER: <image>\n{text} ASSISTANT:" for text in texts]
    together = processor(images=pictures, text=prompts, padding=True, return_tensors="pt")
    out = model.generate(**together, max_new_tokens=20, do_sample=False)
    start = together["input_ids"].shape[1]
    answers = [processor.decode(row[start:], skip_special_tokens=True) for row in out]
    assert answers == [
        ask(bundled, text, picture, tokens=20)
        for text, picture in zip(texts, pictures, strict=True)
    ]


def test_several_turns_keep_one_bos(bundled: Any) -> None:
    _, processor = bundled
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Yes"}]},
        {"role": "user", "content": "And?"},
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text == "USER: <image>\nHi ASSISTANT: Yes</s>USER: And? ASSISTANT:"
    ids = processor(images=Image.new("RGB", (20, 20)), text=text)["input_ids"][0]
    assert list(ids).count(processor.tokenizer.bos_token_id) == 1
