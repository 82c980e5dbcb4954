"""Tiny models saved to folders, as a user has them on disk."""

from __future__ import annotations

from pathlib import Path

import tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

CHAT = (
    "{% for m in messages %}{{ m['role'] }} {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }} {% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
)
WORDS = ("user", "assistant", "is", "there", "a", "dog", "in", "the", "image", "?", "yes", "no")


def tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of 100 ids, in which `<image>` has the tiny models' image id."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "<image>": tiny.IMAGE}
    free = (number for number in range(100) if number not in vocabulary.values())
    for word, number in zip((*WORDS, *(f"w{i}" for i in range(100))), free, strict=False):
        vocabulary[word] = number
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side="left",
    )


def processor() -> LlavaProcessor:
    """A processor of 16 x 16 images for the tiny LLaVA; it needs no torchvision."""
    side = {"height": 16, "width": 16}
    return LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=side),
        tokenizer(),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    )


def save(name: str, folder: Path, with_processor: bool = False) -> Path:
    """Save the tiny model `name`, and for LLaVA its processor on request."""
    tiny.build(name).model.save_pretrained(folder)
    if with_processor:
        processor().save_pretrained(folder)
    return folder
