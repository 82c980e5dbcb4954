"""`vlmfix.generate`: answers chat messages with images, as text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from vlmfix.engine.session import SESSION, Session
from vlmfix.errors import BadInput, StateError
from vlmfix.families.inner import generating_module
from vlmfix.families.placement import computing_device
from vlmfix.families.template import render_chat
from vlmfix.images import one_line
from vlmfix.loading import load_image

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "Answer",
    "chat_inputs",
    "chat_text",
    "encode_chats",
    "end_tokens",
    "generate",
    "split_chat",
]

#: Longest answer where nothing sets one; transformers would stop at 20 tokens.
MAX_NEW_TOKENS = 512

Message = Mapping[str, Any]
Chat = Sequence[Message]


@dataclass(frozen=True)
class Answer:
    """One answer: its text, the lengths of prompt and answer in tokens, and why it ended."""

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

    Methods of a wrapped model that change images (CARVE) rewrite the chats first, in the order of
    the stack; the model answers the rewritten chats.

    Args:
        model: any supported VLM, wrapped or plain.
        processor: its processor.
        messages: one chat, a list of {"role", "content"}, or a list of chats. Content is a text,
            or a list of {"type": "text", "text": ...} and {"type": "image", "image": ...}, where
            the image is a PIL image, a path, bytes or a data URL. A last message of the assistant
            is the beginning of the answer: the model continues it, and the text returned does not
            repeat it.
        return_details: whether to return a list of `Answer` instead of text.
        generate_kwargs: arguments of model.generate(). Without a length among them, in a
            generation_config or in that of the checkpoint, an answer has at most 512 tokens.

    Returns:
        The answer's text; a list of texts for a batch; a list of `Answer` with details. With
        num_return_sequences, each chat's answers follow one another.

    Raises:
        BadInput: messages or an image that cannot be used.
    """
    if isinstance(messages, Mapping) or not isinstance(messages, Sequence | None):
        raise BadInput(f"pass one chat, a list of messages, or a list of chats, not {messages!r}.")
    single = bool(messages) and isinstance(messages[0], Mapping)
    chats: Any = [messages] if single else messages
    session: Session | None = model.__dict__.get(SESSION)
    block: Any = nullcontext()
    if session is not None:
        chats, block = session.before_chats(processor, chats)
        generate_kwargs["processor"] = processor  # only a wrapped model knows this argument
    if not _has_length(model, generate_kwargs):
        generate_kwargs["max_new_tokens"] = MAX_NEW_TOKENS
    with block:
        inputs = chat_inputs(model, processor, chats)
        output = model.generate(**inputs, **generate_kwargs)
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    answers = _answers(model, processor, inputs, sequences, generate_kwargs)
    if return_details:
        return answers
    return answers[0].text if single and len(answers) == 1 else [a.text for a in answers]


def _has_length(model: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether the caller or the checkpoint says how long an answer may be."""
    return any(
        _setting(model, kwargs, name) is not None for name in ("max_new_tokens", "max_length")
    )


def _setting(model: Any, kwargs: Mapping[str, Any], name: str) -> Any:
    """An option of generate(): as an argument, by the configuration given, by the model's own."""
    if kwargs.get(name) is not None:
        return kwargs[name]
    configs = (kwargs.get("generation_config"), generating_module(model).generation_config)
    found = (getattr(config, name, None) for config in configs)
    return next((value for value in found if value is not None), None)


def chat_inputs(model: Any, processor: Any, chats: Sequence[Chat]) -> Any:
    """Arguments of the model's forward for a batch of chats as `generate` takes them, left-padded.

    Raises:
        BadInput: no chats, or messages or an image that cannot be used.
        StateError: the model has no weights.
    """
    place = computing_device(model.get_input_embeddings())
    if place.type == "meta":
        raise StateError(
            "the model has no weights (it is on the meta device), so it cannot answer: load it "
            "with its weights."
        )
    inputs = encode_chats(processor, chats).to(place)
    image_token = getattr(model.config, "image_token_id", None)
    pixels = any(name.startswith("pixel_values") for name in inputs)
    if pixels and image_token is not None and not (inputs["input_ids"] == image_token).any():
        raise BadInput(
            f"no token of the prompt stands for the image: image_token_id of the model's "
            f"config.json is {image_token}, which {type(processor).__name__} has not written. Load "
            "model and processor from the same checkpoint, or correct image_token_id."
        )
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            inputs[name] = value.to(model.dtype)
    return inputs


def encode_chats(processor: Any, chats: Sequence[Chat]) -> Any:
    """The `chat_inputs` as the processor returns them: on the CPU, pixels in float32."""
    if not chats:
        raise BadInput("no messages were given; pass one chat or a list of chats.")
    images, plain = zip(*(split_chat(chat) for chat in chats), strict=True)
    prompts = [chat_text(processor, chat) for chat in plain]
    if getattr(processor, "patch_size", 0) is None:
        raise BadInput(
            f"this {type(processor).__name__} does not know its patch_size: it comes from an old "
            "folder without processor_config.json. vlmfix.load(NAME) reads it off config.json."
        )
    tokenizer = getattr(processor, "tokenizer", processor)
    start = getattr(tokenizer, "bos_token", None)
    # A template that writes the first token itself must not get a second one.
    special = not (start and prompts[0].startswith(start))
    try:
        inputs = processor(
            text=prompts,
            images=[list(row) for row in images] if any(images) else None,
            padding=True,
            padding_side="left",
            add_special_tokens=special,
            return_tensors="pt",
        )
    except ValueError as error:
        sizes = ", ".join(f"{image.width} x {image.height}" for row in images for image in row)
        raise BadInput(
            f"{type(processor).__name__} takes no such prompt (images: {sizes or 'none'}): "
            f"{one_line(error)}."
        ) from error
    inputs.pop("labels", None)  # PaliGemma's processor returns them; they are for training
    mask = inputs.get("qformer_attention_mask")
    if mask is not None:  # a Q-Former numbers positions from the first column: pad on its right
        order = mask.argsort(dim=1, descending=True, stable=True)
        for name in ("qformer_input_ids", "qformer_attention_mask"):
            inputs[name] = inputs[name].gather(1, order)
    return inputs


def chat_text(processor: Any, plain: list[dict[str, Any]]) -> str:
    """A chat without its images (see `split_chat`) as text, up to the first token of the model."""
    begun = bool(plain) and plain[-1]["role"] == "assistant"
    if begun and not any(part.get("text") for part in plain[-1]["content"]):
        raise BadInput("the answer that the chat begins is empty: leave the last message out.")
    return render_chat(processor, plain)


def end_tokens(model: Any, generate_kwargs: Mapping[str, Any]) -> set[int]:
    """The ids that end an answer of the model under these arguments of generate()."""
    ends = _setting(model, generate_kwargs, "eos_token_id")
    return {ends} if isinstance(ends, int) else set(ends or ())


def split_chat(chat: Chat) -> tuple[list[Image], list[dict[str, Any]]]:
    """Read the images of a chat, and replace them in the chat by bare image markers.

    Raises:
        BadInput: messages or an image that cannot be used.
    """
    images, plain = [], []
    for message in chat:
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise BadInput(
                f"a message must be a mapping with 'role' and 'content', not {message!r}."
            )
        role, content = message["role"], message["content"]
        if not isinstance(role, str) or not isinstance(content, Iterable):
            raise BadInput(
                f"a message needs a role, and a text or a list of parts as its content, not "
                f"{role!r} and {content!r}."
            )
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        kept = []
        for part in parts:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind == "image":
                source: Any = next((part[k] for k in ("image", "path", "url") if k in part), None)
                images.append(load_image(source))
                kept.append({"type": "image"})
            elif kind == "text" and part.get("text") is not None:
                text = str(part["text"])
                if any("\ud800" <= sign <= "\udfff" for sign in text):
                    raise BadInput(
                        f"a text holds half a surrogate pair, which no tokenizer takes: {text!a}."
                    )
                kept.append({"type": "text", "text": text})
            else:
                raise BadInput(
                    f"a content part must be of type 'image' or 'text' with a text, not {part!r}."
                )
        plain.append({"role": role, "content": kept})
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
