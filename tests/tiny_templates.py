"""Chat templates in the shape of published ones, and tokenizers of the classes that go with them.

What matters of a shape: which forms of content it takes, what it does with the others, and which of
its words are special tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import AddedToken, GemmaTokenizer, LlamaTokenizer, Qwen2Tokenizer

VISUAL = "<visual>"
"""The placeholder of one visual token."""

_TEXT = """
    Is there a red bicycle next to the dog in this picture ? What is shown Describe the image . Use
    two sentences Answer briefly Yes USER ASSISTANT User Assistant System system user assistant
    model
    """
_WORDS = _TEXT.split()
_ENDS = ("?\n", ".\n", "?\n\n", ".\n\n", "\n\n")


@dataclass(frozen=True)
class Shape:
    """A template and its tokens.

    Attributes:
        template: as Jinja.
        kind: "bytes" (byte-level), "pieces" (SentencePiece) or "gemma", which also adds newlines.
        special: special tokens of the vocabulary.
        image: what the template writes for an image.
        expanded: what the processor makes of it.
        bos: the first token; "" for none.
    """

    template: str
    kind: str
    special: tuple[str, ...]
    image: str
    expanded: str
    bos: str = ""

    def tokenizer(self) -> Any:
        made = _tokenizer(self.kind, self.special, self.bos)
        made.chat_template = self.template
        return made


def _parts(image: str, text: str = "part['text']") -> str:
    """A loop over the parts of a message."""
    return (
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '"
        + image
        + "' }}{% else %}{{ "
        + text
        + " }}{% endif %}{% endfor %}"
    )


def _either(image: str) -> str:
    """Content as text or as parts."""
    return (
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        + _parts(image)
        + "{% endif %}"
    )


_EACH, _END = "{% for message in messages %}", "{% endfor %}"
_PROMPT = "{% if add_generation_prompt %}{{ 'BEGIN' }}{% endif %}"
_CHATML = (
    _EACH
    + "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    + "BODY{{ '<|im_end|>\\n' }}"
    + _END
    + _PROMPT.replace("BEGIN", "<|im_start|>assistant\\n")
)

SHAPES = {
    # Qwen2.5-VL: a system message of its own; marks on both sides of an image.
    "chatml": Shape(
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nAnswer briefly."
        "<|im_end|>\\n' }}{% endif %}"
        + _CHATML.replace("BODY", _either("<|vision_start|><|image_pad|><|vision_end|>")),
        "bytes",
        ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"),
        "<|image_pad|>",
        VISUAL * 4,
    ),
    # InternVL: a newline after the image's closing token.
    "newline": Shape(
        _CHATML.replace("BODY", _either("<context>\\n")),
        "bytes",
        ("<|im_start|>", "<|im_end|>", "<context>", "<img>", "</img>"),
        "<context>",
        "<img>" + VISUAL * 4 + "</img>",
    ),
    # LLaVA-1.5: reads parts alone, leaves a string's text out; roles are plain words.
    "llava": Shape(
        _EACH
        + "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
        + "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}"
        + "{{ '<image>\\n' }}{% endfor %}"
        + "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
        + "{{ part['text'] + ' ' }}{% endfor %}"
        + _END
        + _PROMPT.replace("BEGIN", "ASSISTANT:"),
        "pieces",
        ("<image>",),
        "<image>",
        VISUAL * 4,
        "<s>",
    ),
    # Pixtral: the system's content must be a string, and goes into the last turn.
    "system string": Shape(
        "{% if messages[0]['role'] == 'system' %}{% set told = messages[0]['content'] %}"
        "{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}"
        "{{ bos_token }}{% for message in rest %}{% if message['role'] == 'user' %}"
        "{{ '[INST]' + (told + '\\n\\n' if loop.last and told is defined else '') }}{% endif %}"
        + _either("[IMG]")
        + "{{ '[/INST]' if message['role'] == 'user' else eos_token }}{% endfor %}",
        "bytes",
        ("<s>", "</s>", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"),
        "[IMG]",
        VISUAL * 2 + "[IMG_BREAK]" + VISUAL * 2 + "[IMG_END]",
        "<s>",
    ),
    # GLM-4.1V: prints what it is given for the system and the assistant.
    "prints lists": Shape(
        "{{ '[gMASK]<sop>' }}"
        + _EACH
        + "{{ '<|' + message['role'] + '|>\\n' }}{% if message['role'] == 'user' %}"
        + _either("<|begin_of_image|><|image|><|end_of_image|>")
        + "{% else %}{{ message['content'] }}{% endif %}"
        + _END
        + _PROMPT.replace("BEGIN", "<|assistant|>\\n"),
        "bytes",
        (
            *("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"),
            *("<|begin_of_image|>", "<|image|>", "<|end_of_image|>"),
        ),
        "<|image|>",
        VISUAL * 4,
    ),
    # Gemma 3: trims; newlines are added tokens, but not special; a system text joins the user's.
    "gemma": Shape(
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
        "{% set told = messages[0]['content'][0]['text'] + '\\n\\n' %}"
        "{% set rest = messages[1:] %}{% else %}{% set told = '' %}{% set rest = messages %}"
        "{% endif %}{% for message in rest %}{{ '<start_of_turn>' + ('model' if message['role'] == "
        "'assistant' else 'user') + '\\n' + (told if loop.first else '') }}"
        + _parts("<start_of_image>", "part['text'] | trim")
        + "{{ '<end_of_turn>\\n' }}{% endfor %}"
        + _PROMPT.replace("BEGIN", "<start_of_turn>model\\n"),
        "gemma",
        ("<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>"),
        "<start_of_image>",
        "\n\n<start_of_image>" + VISUAL * 4 + "<end_of_image>\n\n",
        "<bos>",
    ),
    # Qwen3.5: the prompt opens a thought that no message has. Plain text closes the image here.
    "thinking": Shape(
        _CHATML.replace("BODY", _either("<image></image>\\n")).replace(
            "assistant\\n' }}{% endif", "assistant\\n<think>\\n' }}{% endif"
        ),
        "bytes",
        ("<|im_start|>", "<|im_end|>", "<image>"),
        "<image>",
        VISUAL * 4,
    ),
    # Idefics 3: parts alone, by the first of which it tells an image; roles are plain words.
    "idefics": Shape(
        "{{ '<|begin|>' }}"
        + _EACH
        + "{{ message['role'] | capitalize + (':' if message['content'][0]['type'] == 'image' "
        + "else ': ') }}"
        + _parts("<image>")
        + "{{ '<end_of_utterance>\\n' }}"
        + _END
        + _PROMPT.replace("BEGIN", "Assistant:"),
        "bytes",
        ("<|begin|>", "<image>", "<end_of_utterance>", "<fake>"),
        "<image>",
        "<fake>" + VISUAL * 4 + "<fake>",
    ),
}


def _merged(pieces: tuple[str, ...]) -> list[tuple[str, str]]:
    """What joins letters to each of the pieces, from the left."""
    steps = [(piece[:at], piece[at]) for piece in pieces for at in range(1, len(piece))]
    return list(dict.fromkeys(steps))


def _tokenizer(kind: str, special: tuple[str, ...], bos: str) -> Any:
    gap = "Ġ" if kind == "bytes" else "▁"
    words = tuple(gap * spaced + word for word in _WORDS for spaced in (0, 1))
    ends = tuple(end.replace("\n", "Ċ") for end in _ENDS) if kind == "bytes" else ()
    merges = _merged((*words, *ends))
    if kind == "bytes":
        letters = [*map(chr, range(0x21, 0x7F)), *map(chr, range(0xA1, 0x144))]
    else:
        letters = [*map(chr, range(0x21, 0x7F)), gap, *(f"<0x{byte:02X}>" for byte in range(256))]
    first = ["<unk>", "<s>", "</s>"] if kind == "pieces" else ["<pad>", "<eos>", "<bos>", "<unk>"]
    pieces = dict.fromkeys([*first, *letters, *(one + two for one, two in merges)])
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    if kind == "bytes":
        made: Any = Qwen2Tokenizer(
            vocabulary, merges, eos_token="</s>", pad_token="<pad>", bos_token=bos or None
        )
    elif kind == "pieces":
        made = LlamaTokenizer(vocabulary, merges, pad_token="<pad>")
    else:
        made = GemmaTokenizer({**vocabulary, "<mask>": len(vocabulary)}, merges)
        made.add_tokens(
            [AddedToken(text, special=False, normalized=False) for text in ("\n", "\n\n")]
        )
    # By its flag alone: a role's token is in no list of special tokens.
    made.add_tokens(
        [AddedToken(text, special=True, normalized=False) for text in (*special, VISUAL)]
    )
    return made
