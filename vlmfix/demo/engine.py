"""The one model of the demo, and the questions that it can take. No page in here.

The model is wrapped once, without a method. Every answer runs under `vlmfix.using` in a thread of
its own, so that its method acts on no other answer, and in turns (turns.py).
"""

from __future__ import annotations

import gc
import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from PIL import Image

import vlmfix
from vlmfix.chat import chat_inputs
from vlmfix.demo.asking import MAX_CHARACTERS, Pane, Question, read_picture
from vlmfix.demo.turns import Turns
from vlmfix.demo.words import Word, split_words
from vlmfix.emoji import evaluation_split
from vlmfix.engine.session import SESSION
from vlmfix.errors import BadInput
from vlmfix.evals.chair.objects import ground_truth
from vlmfix.evals.inputs.coco import CocoData

__all__ = ["Engine"]


class Engine:
    """One model in memory, shared by all visitors.

    Args:
        name: "emoji", a local folder or a hub id.
        dtype: dtype of the model; default: the checkpoint's.
        device: device of the model; default: CUDA if there is one.

    Raises:
        VlmfixError: the model cannot be loaded or wrapped.
    """

    def __init__(self, name: str = "emoji", *, dtype: Any = None, device: Any = None) -> None:
        self._how = {"dtype": dtype, "device": device}
        self.turns = Turns()
        self._running = 0
        self._lock = threading.Lock()
        #: Counts the models that were loaded: answers of one are of no use with the next.
        self.number = 0
        self._take(name)

    def _take(self, name: str) -> None:
        model, processor = vlmfix.load(name, **self._how)
        self.model = vlmfix.wrap(model, None)
        self.processor, self.name = processor, name
        self.info = model.__dict__[SESSION].host.info
        self.number += 1

    def change_model(self, name: str) -> None:
        """Replace the model; the old one is freed before the new one is loaded.

        Raises:
            BadInput: answers are being written.
            VlmfixError: the model cannot be loaded; the old one is loaded again then.
        """
        if not name.strip():
            raise BadInput("no model: give 'emoji', a folder or a hub id.")
        before = self.name
        with self.in_use(alone=True), self.turns.turn():
            del self.model, self.processor, self.info
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            try:
                self._take(name.strip())
            except BaseException:
                self._take(before)
                raise

    @contextmanager
    def in_use(self, alone: bool = False) -> Iterator[None]:
        """Keep the model from being replaced within the block.

        Args:
            alone: whether to refuse while the model is in use.

        Raises:
            BadInput: `alone`, and the model is in use.
        """
        with self._lock:
            if alone and self._running:
                raise BadInput("answers are being written; change the model when they are done.")
            self._running += 1
        try:
            yield
        finally:
            with self._lock:
                self._running -= 1

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the model."""
        return getattr(self.processor, "tokenizer", self.processor)

    @property
    def layers(self) -> tuple[int, ...]:
        """Decoder layers with attention."""
        return tuple(sorted(self.info.attention))

    def question(
        self, picture: str | bytes | None, prompt: str | None, max_new_tokens: int = 96
    ) -> Question:
        """Check a question before the model sees any of it.

        Args:
            picture: path or bytes of an image file.
            prompt: the text of the question.
            max_new_tokens: longest answer.

        Raises:
            BadInput: no image, a file that is none, too many pixels, or no or too long a prompt.
        """
        text = (prompt or "").strip()
        if not text:
            raise BadInput("the prompt is empty: ask something about the picture.")
        if len(text) > MAX_CHARACTERS:
            raise BadInput(
                f"the prompt is too long: {len(text.split())} words, {len(text)} characters. The "
                f"demo takes up to {MAX_CHARACTERS} characters, because every pane reads the "
                "prompt and all visitors share one model. Ask something shorter."
            )
        if picture is None:
            raise BadInput("there is no picture: choose an example or upload one.")
        asked = Question(read_picture(picture), text, max_new_tokens)
        with self.turns.turn():  # a tokenizer is not safe for two threads at once
            self._check_length(asked)
        return asked

    def _check_length(self, asked: Question) -> None:
        """Refuse a question that does not fit into the positions of the model."""
        config = self.model.config.get_text_config(decoder=True)
        positions = getattr(config, "max_position_embeddings", None)
        ids = chat_inputs(self.model, self.processor, [asked.chat])["input_ids"]
        needed = ids.shape[1] + asked.max_new_tokens
        if positions is not None and needed > positions:
            visual = int(torch.isin(ids, ids.new_tensor(self.info.image_token_ids)).sum())
            raise BadInput(
                f"the prompt is too long for this model: {ids.shape[1]} tokens, {visual} of them "
                f"the picture's, and {asked.max_new_tokens} for the answer make {needed}, and the "
                f"model was trained on {positions}. Ask something shorter."
            )

    @cached_property
    def _known(self) -> tuple[dict[str, int], dict[int, frozenset[str]]]:
        data = CocoData(evaluation_split())
        digests = {_digest(data.image(name)): image for image, name in data.files.items()}
        return digests, ground_truth(data)

    def truth(self, picture: Image.Image) -> frozenset[str] | None:
        """The objects of an EmojiCOCO picture, recognised by its pixels; None for any other."""
        digests, truths = self._known
        image = digests.get(_digest(picture))
        return None if image is None else truths[image]

    def words(self, pane: Pane) -> list[Word]:
        """The words of an answer so far."""
        return split_words(list(pane.tokens), self.tokenizer)


def _digest(picture: Image.Image) -> str:
    return hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()
