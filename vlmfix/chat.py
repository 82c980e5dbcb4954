"""`vlmfix.generate`: the front door that takes chat messages with images and gives text back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from vlmfix.errors import BadInput
from vlmfix.loading import load_image
from vlmfix.session import SESSION

__all__ = ["Answer", "chat_inputs", "end_tokens", "generate"]

Message = Mapping[str, Any]
Chat = Sequence[Message]


@dataclass(frozen=True)
class Answer:
    """One answer: its text, its prompt's and its own length in tokens, and why it ended."""

    text: str
    prompt_tokens: int
    new_tokens: int
    finish: Literal["eos", "length"]


def generate(
    model: Any,
    processor: Any,
    messages: Chat | Sequence[Chat],
    *,
    return_details: bool = False,
    **generate_kwargs: Any,
) -> Any:
    """Answer one chat, or a batch of chats (left-padded), about images.

    Args:
        model: any supported VLM, wrapped or plain.
        processor: its processor.
        messages: one chat, a list of {"role", "content"}, or a list of chats. Content is a text,
            or a list of {"type": "text", "text": ...} and {"type": "image", "image": ...}, where
            the image is a PIL image, a path, bytes or a data URL.
        return_details: give a list of `Answer` instead of text.
        generate_kwargs: anything model.generate() takes.

    Returns:
        The answer's text; a list of texts for a batch; a list of `Answer` with details. With
        num_return_sequences, each chat's answers follow one another.

    Raises:
        BadInput: messages or an image that cannot be used.
    """
    single = bool(messages) and isinstance(messages[0], Mapping)
    chats: Any = [messages] if single else messages
    inputs = chat_inputs(model, processor, chats)
    if SESSION in model.__dict__:  # only a wrapped model knows this argument
        generate_kwargs["processor"] = processor
    output = model.generate(**inputs, **generate_kwargs)
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    answers = _answers(model, processor, inputs, sequences, generate_kwargs)
    if return_details:
        return answers
    return answers[0].text if single and len(answers) == 1 else [a.text for a in answers]


def chat_inputs(model: Any, processor: Any, chats: Sequence[Chat]) -> Any:
    """Arguments of the model's forward for a batch of chats as `generate` takes them, left-padded.

    Raises:
        BadInput: no chats, or messages or an image that cannot be used.
    """
    if not chats:
        raise BadInput("no messages were given; pass one chat or a list of chats.")
    images, plain = zip(*(_split(chat) for chat in chats), strict=True)
    prompts = [
        processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        for chat in plain
    ]
    tokenizer = getattr(processor, "tokenizer", processor)
    start = getattr(tokenizer, "bos_token", None)
    # A template that writes the first token itself must not get a second one.
    special = not (start and prompts[0].startswith(start))
    inputs = processor(
        text=prompts,
        images=[list(row) for row in images] if any(images) else None,
        padding=True,
        padding_side="left",
        add_special_tokens=special,
        return_tensors="pt",
    )
    inputs = inputs.to(model.device)
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            inputs[name] = value.to(model.dtype)
    return inputs


def end_tokens(model: Any, generate_kwargs: Mapping[str, Any]) -> set[int]:
    """The ids that end an answer of the model under these arguments of generate()."""
    ends = generate_kwargs.get("eos_token_id", model.generation_config.eos_token_id)
    return {ends} if isinstance(ends, int) else set(ends or ())


def _split(chat: Chat) -> tuple[list[Any], list[dict[str, Any]]]:
    """The images of a chat, read, and the chat with bare image markers in their places."""
    images, plain = [], []
    for message in chat:
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise BadInput(
                f"a message must be a mapping with 'role' and 'content', not {message!r}."
            )
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        kept = []
        for part in parts:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind == "image":
                source: Any = next((part[k] for k in ("image", "path", "url") if k in part), None)
                images.append(load_image(source))
                kept.append({"type": "image"})
            elif kind == "text":
                kept.append({"type": "text", "text": str(part["text"])})
            else:
                raise BadInput(f"a content part must be of type 'image' or 'text', not {part!r}.")
        plain.append({"role": message["role"], "content": kept})
    return images, plain


def _answers(
    model: Any, processor: Any, inputs: Any, sequences: torch.Tensor, kwargs: dict[str, Any]
) -> list[Answer]:
    length = inputs["input_ids"].shape[1]
    ends = end_tokens(model, kwargs)
    copies = sequences.shape[0] // inputs["input_ids"].shape[0]
    prompt_tokens = inputs["attention_mask"].sum(1).tolist()
    rows = sequences[:, length:].tolist()
    texts = processor.batch_decode(sequences[:, length:], skip_special_tokens=True)
    answers = []
    for index, (row, text) in enumerate(zip(rows, texts, strict=True)):
        stop = next((i for i, token in enumerate(row) if token in ends), None)
        answers.append(
            Answer(
                text=text.strip(),
                prompt_tokens=int(prompt_tokens[index // copies]),
                new_tokens=len(row) if stop is None else stop + 1,
                finish="length" if stop is None else "eos",
            )
        )
    return answers
