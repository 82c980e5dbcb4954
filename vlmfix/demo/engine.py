"""What the demo does with its one model, and what it refuses. No page in here.

The model is wrapped once, without a method. Every answer is written in a thread of its own under
`vlmfix.using`, so its methods are nobody else's, and in turns of one token (turns.py).
"""

from __future__ import annotations

import gc
import hashlib
import io
import logging
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from queue import Empty, SimpleQueue
from string import punctuation
from typing import Any

import torch
from PIL import Image
from transformers.generation.streamers import BaseStreamer

import vlmfix
from vlmfix.call import CallReport
from vlmfix.chat import chat_inputs, end_tokens
from vlmfix.demo.turns import Turns
from vlmfix.demo.words import Word, split_words
from vlmfix.emoji import evaluation_split
from vlmfix.errors import BadInput, VlmfixError
from vlmfix.evals.chair_objects import ground_truth
from vlmfix.evals.coco import CocoData
from vlmfix.evals.models import PassCounter, count_passes
from vlmfix.method import Method
from vlmfix.places import Box, piece_places
from vlmfix.session import SESSION
from vlmfix.surgeon import module_state
from vlmfix.tap import describe_tower

__all__ = [
    "MAX_CHARACTERS",
    "MAX_PANES",
    "MAX_PIXELS",
    "Engine",
    "Look",
    "Pane",
    "Part",
    "Question",
    "message",
    "read_picture",
]

MAX_PIXELS = 25_000_000
MAX_CHARACTERS = 4_000
MAX_PANES = 4
#: Requests that a batch of Measure holds; the others wait for so long.
_BATCH = 8
#: Seconds between two looks at answers that are being written.
_PAUSE = 0.05


@dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
        picture: upright, in RGB.
        prompt: the text beside it.
        max_new_tokens: longest answer.
    """

    picture: Image.Image
    prompt: str
    max_new_tokens: int = 96

    @property
    def chat(self) -> list[dict[str, Any]]:
        """As `vlmfix.generate` takes it."""
        content = [{"type": "image", "image": self.picture}, {"type": "text", "text": self.prompt}]
        return [{"role": "user", "content": content}]


@dataclass
class Pane:
    """One answer, while it is written and after.

    Attributes:
        method: None is the plain model.
        tokens: of the answer so far, the one that ended it included.
        seconds: that the model worked on it; time spent waiting for others is not in it.
        passes: rows that went through the decoder, as in `vlmfix eval`: a second stream in the same
            batch counts as a second pass.
        done: whether it is finished, or has failed.
        finish: "eos" or "length".
        report: what `vlmfix.last_call` says; None for the plain model.
        note: why the method can change nothing here.
        error: what went wrong, as a message.
    """

    method: Method | None
    tokens: list[int] = field(default_factory=list)
    seconds: float = 0.0
    passes: int = 0
    done: bool = False
    finish: str | None = None
    report: CallReport | None = None
    note: str | None = None
    error: str | None = None

    @property
    def name(self) -> str:
        """What the pane is called."""
        return "base" if self.method is None else self.method.spec()


@dataclass(frozen=True, eq=False)
class Part:
    """A part of the picture that the vision tower got as one, and what lies over it.

    Attributes:
        box: left, top, right, bottom in pixels of the picture.
        grids: {arm: (L, H, rows, columns)} float32, mean over the rows that wrote the word.
    """

    box: Box
    grids: dict[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Look:
    """Where the rows that wrote one word looked, plain and under a method.

    Attributes:
        word: without punctuation around it.
        layers: the L layers.
        heads: H.
        parts: of the picture, a LLaVA-NeXT image has two.
        note: what to know about it.
    """

    word: str
    layers: tuple[int, ...]
    heads: int
    parts: list[Part]
    note: str | None = None


class _Stopped(Exception):
    """Nobody waits for the answer any more."""


class _Streamer(BaseStreamer):  # type: ignore[misc]
    """Takes the tokens of one answer, and passes the model on after each."""

    def __init__(
        self, engine: Engine, pane: Pane, passes: PassCounter, stop: threading.Event
    ) -> None:
        self._engine, self._pane, self._passes, self._stop = engine, pane, passes, stop
        self._begun = False
        self._since = time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        """The prompt, then one token at a time."""
        if not self._begun:
            self._begun = True
            return
        self._pane.tokens.append(int(value))
        self.end()
        if self._stop.is_set():
            raise _Stopped
        # Some families keep the positions of the last prompt on a module.
        with module_state(self._engine.model):
            self._engine.turns.pass_on()
        self._since = time.perf_counter()
        self._passes.rows = self._pane.passes  # the hook saw the passes of the others, too

    def end(self) -> None:
        """Count what was done since the turn began."""
        now = time.perf_counter()
        self._pane.seconds += now - self._since
        self._since = now
        self._pane.passes = self._passes.rows


class Engine:
    """One model in memory, and what a visitor can ask of it.

    Args:
        name: "emoji", a local folder or a hub id.
        dtype: of the model; what the checkpoint says if absent.
        device: of the model; CUDA if there is one.

    Raises:
        VlmfixError: the model cannot be loaded or wrapped.
    """

    def __init__(self, name: str = "emoji", *, dtype: Any = None, device: Any = None) -> None:
        self._how = {"dtype": dtype, "device": device}
        self.turns = Turns()
        self._running = 0
        self._lock = threading.Lock()
        #: Counts the models: what was made with one is of no use with the next.
        self.number = 0
        self._take(name)

    def _take(self, name: str) -> None:
        model, processor = vlmfix.load(name, **self._how)
        self.model = vlmfix.wrap(model, None)
        self.processor, self.name = processor, name
        self.info = model.__dict__[SESSION].info
        self.number += 1

    def change_model(self, name: str) -> None:
        """Put another model in the place of this one, which leaves the memory first.

        Raises:
            BadInput: answers are being written.
            VlmfixError: the model cannot be loaded; the one before is back then.
        """
        if not name.strip():
            raise BadInput("no model: give 'emoji', a folder or a hub id.")
        with self._lock:
            if self._running:
                raise BadInput("answers are being written; change the model when they are done.")
            self._running += 1
        before = self.name
        try:
            with self.turns.turn():
                del self.model, self.processor, self.info
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                try:
                    self._take(name.strip())
                except BaseException:
                    self._take(before)
                    raise
        finally:
            with self._lock:
                self._running -= 1

    @property
    def tokenizer(self) -> Any:
        """Of the model."""
        return getattr(self.processor, "tokenizer", self.processor)

    @property
    def layers(self) -> tuple[int, ...]:
        """Decoder layers with attention."""
        return tuple(sorted(self.info.attention))

    # -- what is asked ----------------------------------------------------------------------------

    def question(
        self, picture: str | bytes | None, prompt: str | None, max_new_tokens: int = 96
    ) -> Question:
        """Check what is asked before the model sees any of it.

        Args:
            picture: path or bytes of an image file.
            prompt: the text beside it.
            max_new_tokens: longest answer.

        Raises:
            BadInput: no image or not one, too many pixels, no prompt, or one that is too long.
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
        with self.turns.turn():  # a tokenizer has room for one writer at a time
            self._check_length(asked)
        return asked

    def _check_length(self, asked: Question) -> None:
        """Refuse what does not fit into the positions of the model."""
        config = self.model.config.get_text_config(decoder=True)
        positions = getattr(config, "max_position_embeddings", None)
        ids = chat_inputs(self.model, self.processor, [asked.chat])["input_ids"]
        needed = ids.shape[1] + asked.max_new_tokens
        if positions is not None and needed > positions:
            visual = int(torch.isin(ids, ids.new_tensor(self.info.image_token_ids)).sum())
            raise BadInput(
                f"the prompt is too long for this model: {ids.shape[1]} tokens, {visual} of them "
                f"the picture's, and {asked.max_new_tokens} for the answer make {needed}, and it "
                f"was trained to read {positions}. Ask something shorter."
            )

    @cached_property
    def _known(self) -> tuple[dict[str, int], dict[int, frozenset[str]]]:
        data = CocoData(evaluation_split())
        digests = {_digest(data.image(name)): image for image, name in data.files.items()}
        return digests, ground_truth(data)

    def truth(self, picture: Image.Image) -> frozenset[str] | None:
        """The objects of an EmojiCOCO picture, told by its pixels; None for any other."""
        digests, truths = self._known
        image = digests.get(_digest(picture))
        return None if image is None else truths[image]

    def words(self, pane: Pane) -> list[Word]:
        """The words of an answer so far."""
        return split_words(list(pane.tokens), self.tokenizer)

    # -- answers ----------------------------------------------------------------------------------

    def answer(
        self,
        asked: Question,
        methods: Sequence[Method | None],
        stop: threading.Event | None = None,
    ) -> Iterator[list[Pane]]:
        """Write the answers side by side, greedily.

        Args:
            asked: what is asked.
            methods: of the panes; None is the plain model.
            stop: once set, the answers end where they are.

        Yields:
            The panes, the same objects every time, whenever something is new, and at the end. An
            error in one of them is its `error`; the others go on.

        Raises:
            BadInput: too many panes.
        """
        if not 1 <= len(methods) <= MAX_PANES:
            raise BadInput(f"{len(methods)} panes: the demo shows 1 to {MAX_PANES}.")
        panes = [Pane(method) for method in methods]
        stop = stop or threading.Event()
        threads = [
            threading.Thread(target=self._write, args=(pane, asked, stop), daemon=True)
            for pane in panes
        ]
        with self._lock:
            self._running += 1
        try:
            for thread in threads:
                thread.start()
            seen = -1
            while not all(pane.done for pane in panes):
                now = sum(len(pane.tokens) + pane.done for pane in panes)
                if now != seen:
                    seen = now
                    yield panes
                time.sleep(_PAUSE)
            yield panes
        finally:  # also when the visitor has gone
            stop.set()
            for thread in threads:
                thread.join()
            with self._lock:
                self._running -= 1

    def _write(self, pane: Pane, asked: Question, stop: threading.Event) -> None:
        """One answer, in a thread of its own."""
        try:
            with (
                self.turns.turn(),
                vlmfix.using(self.model, pane.method),
                count_passes(self.model) as passes,
            ):
                if pane.method is not None:
                    pane.note = pane.method.prepared(self.info, self.model).idle()
                vlmfix.generate(
                    self.model,
                    self.processor,
                    asked.chat,
                    max_new_tokens=asked.max_new_tokens,
                    do_sample=False,
                    num_beams=1,
                    streamer=_Streamer(self, pane, passes, stop),
                )
                if pane.method is not None:
                    pane.report = vlmfix.last_call(self.model)
                ended = pane.tokens[-1:] and pane.tokens[-1] in end_tokens(self.model, {})
                pane.finish = "eos" if ended else "length"
        except _Stopped:
            pane.error = "stopped."
        except Exception as error:
            pane.error = message(error)
        finally:
            pane.done = True

    # -- looks ------------------------------------------------------------------------------------

    def look(self, asked: Question, pane: Pane, number: int, method: Method | None) -> Look:
        """Where the rows that wrote a word looked, in the plain model and under a method.

        Both read the same answer, the pane's, so that what differs is the method's doing.

        Args:
            asked: what was asked.
            pane: whose answer is read.
            number: of the word.
            method: whose map stands beside that of the plain model.

        Raises:
            BadInput: no such word, or a method whose answer is not about this picture.
            UnsupportedModel: a family whose visual tokens cannot be traced to places.
        """
        words = self.words(pane)
        if not 0 <= number < len(words):
            raise BadInput("there is no such word in the answer: click one of its words.")
        word = words[number]
        if method is not None and method.stage == "pixels":
            raise BadInput(
                f"{method.name} answers about an image that it has changed, so there is no map of "
                "its answer over this picture. Choose another method."
            )
        arms: dict[str, Method | None] = {"base": None}
        if method is not None:
            arms[method.spec()] = method
        maps = {}
        with self.turns.turn():
            inputs = chat_inputs(self.model, self.processor, [asked.chat])
            ids = inputs["input_ids"]
            written = ids.new_tensor([pane.tokens])
            rows = [ids.shape[1] - 1 + token for token in word.tokens]
            for arm, one in arms.items():
                with vlmfix.using(self.model, one):
                    (maps[arm],) = vlmfix.attention_map(
                        self.model,
                        inputs,
                        rows=rows,
                        heads="all",
                        generated=torch.cat((ids, written), dim=1),
                        processor=self.processor,
                    )
            boxes = self._boxes(asked.picture, len(maps["base"]))
        parts = []
        for image, box in enumerate(boxes):
            for view in range(len(maps["base"][image].views)):
                grids = {arm: own[image].grids()[view].mean(2) for arm, own in maps.items()}
                parts.append(Part(box, grids))
        first = maps["base"][0]
        return Look(
            word.text.strip(punctuation), first.layers, self.info.num_heads, parts, _note(method)
        )

    def _boxes(self, picture: Image.Image, images: int) -> list[Box]:
        """Where in the picture lies what the vision tower gets as one image."""
        if describe_tower(self.model, self.info).layout == "tiles":
            return piece_places(self.processor, *picture.size)
        return [(0, 0, *picture.size)] * images

    def kept(self, asked: Question, method: Method) -> list[tuple[Box, torch.Tensor]]:
        """Which visual tokens a pruning method keeps.

        Returns:
            Parts of the picture, each with (rows, columns) bool, True where a token stays.

        Raises:
            BadInput: a method that does not prune.
            UnsupportedModel: a family whose visual tokens cannot be traced to places.
        """
        with self.turns.turn():
            inputs = chat_inputs(self.model, self.processor, [asked.chat])
            (found,) = vlmfix.visual_tokens(self.model, inputs, method, processor=self.processor)
            masks = [mask for kept in found for mask in kept.masks()]
            boxes = self._boxes(asked.picture, len(masks))
        if len(boxes) != len(masks):  # two views of one image
            boxes = boxes[:1] * len(masks)
        return list(zip(boxes, masks, strict=True))

    # -- measuring --------------------------------------------------------------------------------

    def measure(
        self, methods: Sequence[Method], images: int, stop: threading.Event | None = None
    ) -> Iterator[tuple[int, int, str] | dict[str, Any]]:
        """POPE on the first bundled images, base and methods, by `vlmfix.evals.evaluate`.

        Args:
            methods: one arm each, beside the base.
            images: how many, each with six questions in each of three splits.
            stop: once set, the run ends after its batch, without results.

        Yields:
            (requests done, requests in all, what is running), and at last the results.

        Raises:
            VlmfixError: methods that cannot run here.
        """
        from vlmfix.evals import evaluate

        events: SimpleQueue[Any] = SimpleQueue()
        stop = stop or threading.Event()

        def progress(done: int, steps: int, label: str) -> None:
            events.put((done, steps, label))
            if stop.is_set():
                raise BadInput("stopped; there are no results.")
            with module_state(self.model):
                self.turns.pass_on()

        def work() -> None:
            try:
                with tempfile.TemporaryDirectory() as folder, self.turns.turn():
                    results = evaluate(
                        ["pope"],
                        (self.model, self.processor),
                        list(methods),
                        limit=images,
                        batch_size=_BATCH,
                        output=folder,
                        quiet=True,
                        progress=progress,
                    )
                results["config"]["model"] = self.name
                events.put(results)
            except Exception as error:
                events.put(error)

        thread = threading.Thread(target=work, daemon=True)
        with self._lock:
            self._running += 1
        try:
            thread.start()
            while True:
                try:
                    event = events.get(timeout=1)
                except Empty:
                    continue
                if isinstance(event, Exception):
                    raise event
                yield event
                if isinstance(event, dict):
                    return
        finally:
            stop.set()
            thread.join()
            with self._lock:
                self._running -= 1


def read_picture(source: str | bytes) -> Image.Image:
    """An uploaded picture, upright and in RGB; its size is read before its pixels are.

    Args:
        source: path or bytes of an image file.

    Raises:
        BadInput: not an image, a damaged one, or more than `MAX_PIXELS`.
    """
    if isinstance(source, str):
        with open(source, "rb") as file:  # a message must not tell the server's paths
            source = file.read()
    try:
        with Image.open(io.BytesIO(source)) as header:
            width, height = header.size
    except Exception:
        width = height = 0  # load_image says what is wrong
    if width * height > MAX_PIXELS:
        raise BadInput(
            f"the picture is too large: {width} x {height} pixels are "
            f"{width * height / 1e6:.0f} megapixels, and the demo takes up to "
            f"{MAX_PIXELS // 10**6}, because models look at far fewer and all visitors share "
            "the memory. Scale it down."
        )
    return vlmfix.load_image(source)


def message(error: Exception) -> str:
    """What a visitor is told. What nobody foresaw goes to the log of the server in full."""
    if isinstance(error, VlmfixError):
        return str(error)
    logging.getLogger(__name__).error("the demo failed", exc_info=error)
    return f"something went wrong ({type(error).__name__}); the log of the server has the details."


def _digest(picture: Image.Image) -> str:
    return hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()


def _note(method: Method | None) -> str | None:
    """What a map of a method does not show."""
    if method is not None and method.stage == "tokens":
        return f"The map shows the whole prompt; {method.name} answered about a shorter one."
    if method is not None and method.stage == "logits":
        return f"{method.name} acts on logits and changes no attention: the maps are the same."
    return None
