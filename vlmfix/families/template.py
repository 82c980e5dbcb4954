"""Write a chat as text: by the checkpoint's chat template, or without one as its processor wants.

Templates disagree on what a message's content is. Some take a list of parts, some a string, some a
string from the system only, and many do not say so: they print the list into the prompt, or leave
the text out. So vlmfix fills the template with words of its own first, and keeps the form in which
every word, and no list, comes out.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

from vlmfix.errors import BadInput
from vlmfix.images import one_line

__all__ = ["has_template", "render_chat"]

#: Processors of models that were taught requests, not chats, by class: what they want in front of
#: the text for each image. Some put the placeholders of their one image there themselves.
_REQUESTS = {
    "PaliGemmaProcessor": "<image>",
    "ChameleonProcessor": "<image>",
    "Blip2Processor": "",
    "InstructBlipProcessor": "",
    "Kosmos2Processor": "",
}
_PLACEHOLDERS = ("image_token", "boi_token", "video_token", "audio_token")

Plain = Sequence[dict[str, Any]]


def render_chat(processor: Any, chat: Plain) -> str:
    """Write a chat as the text of a prompt, up to the first token that the model answers.

    Args:
        processor: the model's processor or tokenizer. Its chat template is used, else that of its
            tokenizer.
        chat: messages {"role", "content"} whose content is a list of {"type": "text", "text": ...}
            and {"type": "image"}, as `chat.split_chat` returns them. A last message of the
            assistant begins the answer.

    Raises:
        BadInput: no chat template, or one that does not write this chat; a text that holds a
            placeholder.
    """
    _refuse_placeholders(processor, chat)
    template = _template(processor)
    if template is None:
        return _request(processor, chat)
    begun = bool(chat) and chat[-1]["role"] == "assistant"
    return _fill(processor, template, _shaped(processor, template, chat, begun), begun)


def has_template(processor: Any) -> bool:
    """Whether the processor or its tokenizer has a chat template."""
    return _template(processor) is not None


def _template(processor: Any) -> dict[str, Any] | None:
    """What makes `apply_chat_template` use the checkpoint's template; None: there is none."""
    if getattr(processor, "chat_template", None):
        return {}
    tokenizer = getattr(processor, "tokenizer", processor)
    if getattr(tokenizer, "chat_template", None):
        return {"chat_template": tokenizer.get_chat_template()}
    return None


def _fill(processor: Any, template: dict[str, Any], chat: Plain, begun: bool) -> str:
    try:
        text: str = processor.apply_chat_template(
            list(chat),
            add_generation_prompt=not begun,
            continue_final_message=begun,
            tokenize=False,
            **template,
        )
    except Exception as error:  # a template is a program: it may raise anything
        raise BadInput(
            f"the chat template of {type(processor).__name__} does not take this chat: "
            f"{one_line(error)}. Leave out or join the messages that it has no place for."
        ) from error
    return text


# -- what a template takes -------------------------------------------------------------------------


def _shaped(processor: Any, template: dict[str, Any], chat: Plain, begun: bool) -> Plain:
    """The chat with contents as the template takes them: parts where it can, else strings."""
    words: list[list[str]] = []
    probe = []
    for at, message in enumerate(chat):
        parts = [dict(part) for part in message["content"]]
        said = [part for part in parts if part["type"] == "text"]
        for number, part in enumerate(said):
            part["text"] = f"message{at}part{number}end"
        words.append([part["text"] for part in said])
        probe.append({**message, "content": parts})
    problem: BadInput | None = None
    # A role's contents with and without images may have different forms.
    kinds = list(dict.fromkeys(_kind(message) for message in chat))
    without = [kind for kind in kinds if not kind[1]]
    choices = sorted(product((False, True), repeat=len(without)), key=sum)
    for choice in choices:
        strings = {kind for kind, chosen in zip(without, choice, strict=True) if chosen}
        try:
            text = _fill(processor, template, _with_strings(probe, strings), begun)
        except BadInput as error:
            problem = problem or error
            continue
        lost = next((at for at, own in enumerate(words) if not _written(own, text)), None)
        if lost is None:
            return _with_strings(chat, strings)
        role = chat[lost]["role"]
        problem = problem or BadInput(
            f"the chat template of {type(processor).__name__} does not write the text of the "
            f"{role}'s message in any form that vlmfix knows: leave that message out, or say it "
            "in the user's message."
        )
    assert problem is not None  # there is always the choice of no string
    raise problem


def _kind(message: dict[str, Any]) -> tuple[str, bool]:
    """Messages of a kind have contents of the same form: role, and whether there is an image."""
    return message["role"], any(part["type"] != "text" for part in message["content"])


def _with_strings(chat: Plain, strings: set[tuple[str, bool]]) -> Plain:
    return [
        {**message, "content": "".join(part["text"] for part in message["content"])}
        if _kind(message) in strings
        else message
        for message in chat
    ]


def _written(words: Sequence[str], text: str) -> bool:
    """Whether the text holds all words, and none of them in quotes, as a printed list would."""
    return all(word in text and f"'{word}" not in text and f'"{word}' not in text for word in words)


# -- without a template ----------------------------------------------------------------------------


def _request(processor: Any, chat: Plain) -> str:
    """Images, then text, for the processor of a model that takes one request."""
    kinds = [kind.__name__ for kind in type(processor).__mro__]
    mark = next((_REQUESTS[kind] for kind in kinds if kind in _REQUESTS), None)
    if mark is None:
        raise BadInput(
            f"neither the {kinds[0]} nor its tokenizer has a chat template, so how this checkpoint "
            "wants a chat written is unknown. Set processor.chat_template to the template of the "
            "checkpoint that it was made from (chat_template.jinja or chat_template.json there)."
        )
    if [message["role"] for message in chat] != ["user"]:
        raise BadInput(
            f"the model of a {kinds[0]} takes one request about images and has no chat template: "
            "pass one message of the user, without system message, earlier turns or the beginning "
            "of an answer."
        )
    texts = [part["text"] for part in chat[0]["content"] if part["type"] == "text"]
    images = len(chat[0]["content"]) - len(texts)
    if not mark and images != 1:
        raise BadInput(
            f"{kinds[0]} takes no such prompt: its model looks at one image, and this request has "
            f"{images}."
        )
    return mark * images + "".join(texts)


def _refuse_placeholders(processor: Any, chat: Plain) -> None:
    """Refuse text that the processor would take for one more image, video or sound."""
    places = (processor, getattr(processor, "tokenizer", None))
    found = {str(getattr(place, name, None) or "") for place in places for name in _PLACEHOLDERS}
    for message in chat:
        for part in message["content"]:
            for mark in found - {""}:
                if mark in part.get("text", ""):
                    raise BadInput(
                        f"the {message['role']}'s text holds {mark!r}, which this model reads as "
                        "the place of an image, a video or a sound, not as text: write it in "
                        "another way."
                    )
