"""A model of VLMEvalKit that answers through `vlmfix.generate`.

Interface: open-compass/VLMEvalKit vlmeval/vlm/base.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlmeval.vlm.base import BaseModel

import vlmfix
from vlmfix.errors import BadInput
from vlmfix.integrations.arguments import MAX_NEW_TOKENS, load_wrapped

__all__ = ["VLMFix"]


class VLMFix(BaseModel):  # type: ignore[misc]  # VLMEvalKit is untyped
    """One model wrapped with methods, greedy, with the data set's own prompts.

    Args:
        pretrained: a hub id, a local folder, or "emoji" for the bundled model.
        method: a method, or a stack such as "imba+vhr"; None: the plain model.
        max_new_tokens: longest answer.
        dtype: bfloat16, float16 or float32; default: the checkpoint's own.
        device: device of the model; default: a CUDA device if there is one.
        options: options of a single method.

    Raises:
        VlmfixError: the errors of `arguments.load_wrapped`.
    """

    INTERLEAVE = True
    allowed_types = ["text", "image"]

    def __init__(
        self,
        pretrained: str = "emoji",
        method: str | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        dtype: str | None = None,
        device: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if max_new_tokens < 1:
            raise BadInput(f"max_new_tokens={max_new_tokens}: must be 1 or more")
        self._max_new_tokens = max_new_tokens
        self._model, self._processor = load_wrapped(pretrained, method, options, dtype, device)

    def generate_inner(
        self, message: Sequence[Mapping[str, Any]], dataset: str | None = None
    ) -> str:
        """Answer one message, a list of {type: image|text, value, maybe role}."""
        chat: list[dict[str, Any]] = []
        for part in message:
            role = part.get("role", "user")
            if not chat or chat[-1]["role"] != role:
                chat.append({"role": role, "content": []})
            chat[-1]["content"].append(_content(part))
        return self._answer(chat)

    def chat_inner(self, message: Sequence[Mapping[str, Any]], dataset: str | None = None) -> str:
        """Answer the last turn of a chat, a list of {role, content: list as above}."""
        return self._answer(
            [
                {"role": turn["role"], "content": [_content(part) for part in turn["content"]]}
                for turn in message
            ]
        )

    def _answer(self, chat: list[dict[str, Any]]) -> str:
        answer: str = vlmfix.generate(
            self._model,
            self._processor,
            chat,
            max_new_tokens=self._max_new_tokens,
            do_sample=False,
            num_beams=1,
        )
        return answer


def _content(part: Mapping[str, Any]) -> dict[str, Any]:
    key = "image" if part["type"] == "image" else "text"
    return {"type": part["type"], key: part["value"]}
