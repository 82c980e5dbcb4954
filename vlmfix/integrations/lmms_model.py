"""Models of lmms-eval that answer through `vlmfix.generate`.

Interface: EvolvingLMMs-Lab/lmms-eval 0.7.3, api/model.py (lmms), api/task.py (the arguments of a
request) and evaluator.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from tqdm import tqdm

import vlmfix
from vlmfix.errors import BadInput
from vlmfix.integrations.arguments import decoding, load_wrapped

__all__ = ["GivenModel", "PretrainedModel", "SimpleModel"]

Messages = list[dict[str, Any]]


class GivenModel(lmms):  # type: ignore[misc]  # lmms-eval is untyped
    """A model that the caller has loaded, behind lmms-eval's chat interface.

    Args:
        model: a vision-language model, plain or wrapped.
        processor: its processor.
        batch_size: chats per call of generate().

    Raises:
        BadInput: a batch size that is not 1 or more.
    """

    is_simple = False

    def __init__(self, model: Any, processor: Any, batch_size: int | str = 1) -> None:
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise BadInput(f"batch_size={batch_size!r}: give a number, 1 or more")
        self.batch_size = int(batch_size)
        self._model, self._processor = model, processor

    @property
    def device(self) -> Any:
        """The device of the model, on which lmms-eval gathers counts of requests."""
        return self._model.device

    def clean(self) -> None:
        """Keep the model, which belongs to the caller; lmms-eval calls this after the answers."""

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """Answer requests, in their order, as texts with their lengths in tokens."""
        results: list[Any] = [None] * len(requests)
        for batch, settings in self._batches(requests):
            messages = [self._messages(requests[index]) for index in batch]
            for index, result in zip(batch, self._answer(messages, settings), strict=True):
                results[index] = result
                asked = (requests[index].args[0], settings)
                self.cache_hook.add_partial("generate_until", asked, result.text)
        return results

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """Answer requests of several rounds, and return the texts of each request's rounds.

        The task makes each round from the answers so far.
        """
        results: list[list[str]] = [[] for _ in requests]
        for batch, settings in self._batches(requests):
            facts: dict[int, Any] = {}
            while batch:
                chats: dict[int, Messages] = {}
                for index in batch:
                    messages, facts[index] = self._round(
                        requests[index], results[index], facts.get(index)
                    )
                    if messages is not None:
                        chats[index] = messages
                batch = list(chats)
                answers = self._answer(list(chats.values()), settings) if chats else []
                for index, result in zip(batch, answers, strict=True):
                    results[index].append(result.text)
        return results

    def loglikelihood(self, requests: Sequence[Any]) -> Any:
        """Refuse: the methods act on what a model writes.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "vlmfix answers by generating, and not every method defines the likelihood of a given "
            "text. Choose the form of the task whose output_type is generate_until."
        )

    def _batches(self, requests: Sequence[Any]) -> Iterator[tuple[list[int], Mapping[str, Any]]]:
        """Indices of requests to answer in one call, and their settings.

        All settings are checked before the first batch.
        """
        groups: list[tuple[Mapping[str, Any], list[int]]] = []
        for index, request in enumerate(requests):
            settings = _settings(request)
            for known, members in groups:
                if known == settings:
                    members.append(index)
                    break
            else:
                decoding(settings)
                groups.append((settings, [index]))
        total = len(requests)
        with tqdm(total=total, disable=self.rank != 0, desc="vlmfix") as progress:
            for settings, members in groups:
                for start in range(0, len(members), self.batch_size):
                    batch = members[start : start + self.batch_size]
                    yield batch, settings
                    progress.update(len(batch))

    def _answer(self, chats: Sequence[Messages], settings: Mapping[str, Any]) -> list[Any]:
        arguments, left_out = decoding(settings)
        if left_out:
            warnings.warn(
                f"vlmfix ignores the task's settings {', '.join(left_out)}: generate() has no "
                "such argument for every model",
                stacklevel=2,
            )
        until = settings.get("until") or []
        stops = [text for text in ([until] if isinstance(until, str) else until) if text]
        if stops:
            tokenizer = getattr(self._processor, "tokenizer", self._processor)
            arguments |= {"stop_strings": stops, "tokenizer": tokenizer}
        answers = vlmfix.generate(
            self._model, self._processor, chats, return_details=True, **arguments
        )
        return [
            GenerationResult(
                _before(answer.text, stops),
                TokenCounts(input_tokens=answer.prompt_tokens, output_tokens=answer.new_tokens),
            )
            for answer in answers
        ]

    def _doc(self, request: Any) -> Any:
        doc_id, task, split = request.args[3:6]
        return self.task_dict[task][split][doc_id]

    def _messages(self, request: Any) -> Messages:
        if _is_chat(request):
            messages: Messages = request.args[1](self._doc(request))
            return messages
        text, _, doc_to_visual = request.args[:3]
        pictures = (doc_to_visual(self._doc(request)) or []) if doc_to_visual else []
        content: Messages = [{"type": "image", "image": picture} for picture in pictures]
        # Some tasks mark the places of pictures in the way of one model family.
        content.append({"type": "text", "text": text.replace("<image>", "").strip()})
        return [{"role": "user", "content": content}]

    def _round(self, request: Any, answers: list[str], facts: Any) -> tuple[Messages | None, Any]:
        """The chat of a request's next round, None after its last, and the task's own state."""
        if not _is_chat(request):
            raise NotImplementedError(
                "tasks of several rounds need lmms-eval's chat interface: run --model vlmfix "
                "without --force_simple, with vlmfix installed (pip), not as a legacy plug-in"
            )
        if not answers:
            return self._messages(request), None
        messages, terminal, _, facts = request.args[1](
            self._doc(request),
            round_idx=len(answers),
            previous_output=list(answers),
            previous_round_info=facts,
        )
        return (None if terminal else messages), facts


class PretrainedModel(GivenModel):
    """`--model vlmfix --model_args pretrained=...,method=var,keep=0.4`.

    Args:
        pretrained: a hub id, a local folder, or "emoji" for the bundled model.
        method: a method, or a stack such as "imba+vhr"; None: the plain model.
        batch_size: chats per call of generate().
        device: device of the model. With several processes each takes the device that accelerate
            assigns, unless one is named by number.
        dtype: bfloat16, float16 or float32; default: the checkpoint's own.
        max_batch_size: not used; lmms-eval passes it with batch_size=auto, which is refused.
        options: options of a single method.

    Raises:
        VlmfixError: the errors of `arguments.load_wrapped`.
    """

    def __init__(
        self,
        pretrained: str = "emoji",
        method: str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str | None = None,
        max_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        self.accelerator = Accelerator()
        shared = self.accelerator.num_processes > 1
        place = self.accelerator.device if shared and device in (None, "cuda") else device
        super().__init__(*load_wrapped(pretrained, method, options, dtype, place), batch_size)
        self._rank, self._world_size = (
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )

    def clean(self) -> None:
        """Free the model; lmms-eval calls this after the last answer."""
        lmms.clean(self)


class SimpleModel(PretrainedModel):
    """The same for lmms-eval's older interface, which passes pictures and one text."""

    is_simple = True


def _is_chat(request: Any) -> bool:
    """Whether the arguments are (context, doc_to_messages, settings, doc_id, task, split).

    Those of the older interface are (context, settings, doc_to_visual, doc_id, task, split). The
    task chooses the form, not the model: a task in Python has one form.
    """
    return callable(request.args[1])


def _settings(request: Any) -> Mapping[str, Any]:
    settings: Mapping[str, Any] = request.args[2 if _is_chat(request) else 1] or {}
    return settings


def _before(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.split(stop, 1)[0]
    return text.strip()
