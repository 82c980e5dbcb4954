"""The bundled model's tokenizer: byte-level BPE trained on the world's own sentences.

Any text encodes (every byte is a token); the words of the world are one token each.
"""

from __future__ import annotations

__all__ = ["ANSWERS", "CHAT_TEMPLATE", "IMAGE_TOKEN", "build_tokenizer"]

from random import Random
from typing import Any

from vlmfix.emoji import language
from vlmfix.emoji.catalogue import NAMES
from vlmfix.emoji.world import sample_scene

IMAGE_TOKEN = "<image>"
_PAD, _BOS, _EOS = "<pad>", "<s>", "</s>"
_VOCABULARY = 900
ANSWERS = {True: "Yes", False: "No"}

# LLaVA-1.5's form. A turn's images come before its text, wherever the caller put them.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ 'ASSISTANT: ' }}{% else %}"
    "{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '</s>' }}{% else %}{{ ' ' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def _corpus() -> list[str]:
    rng = Random(0)
    # A first turn starts on a new line, after the image; a later one after "USER: ".
    starts = ("USER: \n", "USER: ")
    prompts = [start + prompt for prompt in language.CAPTION_PROMPTS for start in starts]
    lines = [f"{prompt} ASSISTANT:" for prompt in prompts] * 20
    lines += [language.caption(rng, sample_scene(rng)) for _ in range(4000)]
    for name in NAMES:
        for style in language.QUESTION_STYLES.values():
            asked = [f"{start}{language.question(name)}{style}" for start in starts]
            lines += [f"{text} ASSISTANT: Yes" for text in asked] * 2
            lines += [f"ASSISTANT: No There is a {name}."] * 4
    return lines


def build_tokenizer() -> Any:
    """Train the tokenizer (a second of work, always the same result).

    Returns:
        A `PreTrainedTokenizerFast` with left padding; encoding a text puts <s> in front.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=[_PAD, _BOS, _EOS, IMAGE_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(_corpus(), trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{_BOS} $A", special_tokens=[(_BOS, backend.token_to_id(_BOS))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=_PAD,
        bos_token=_BOS,
        eos_token=_EOS,
        padding_side="left",
        model_max_length=1024,
        extra_special_tokens={"image_token": IMAGE_TOKEN},
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
