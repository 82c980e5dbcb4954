"""A transformers model as the harness sees it: plain or wrapped, with its passes counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from vlmfix.errors import UnsupportedModel
from vlmfix.evals.running.arms import plain
from vlmfix.evals.running.decoding import neutral, split_config
from vlmfix.evals.running.runner import Answerer, Request, Turn
from vlmfix.evals.tasks import Answer

__all__ = ["FirstToken", "PassCounter", "TransformersModel", "count_passes", "yes_no_tokens"]


class PassCounter:
    """Forward passes of the language model, counted in rows.

    Counting rows instead of calls makes a method visible that runs a second stream inside the same
    batch: its calls carry twice the rows.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.rows = 0

    def reset(self) -> None:
        """Start again from zero."""
        self.calls = self.rows = 0

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Forward pre-hook."""
        inputs = [kwargs.get("inputs_embeds"), kwargs.get("input_ids"), *args]
        first = next((x for x in inputs if hasattr(x, "shape")), None)
        self.calls += 1
        self.rows += int(first.shape[0]) if first is not None else 1


@contextmanager
def count_passes(model: Any) -> Iterator[PassCounter]:
    """Count the forward passes of the model's decoder while the context lasts."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    counter = PassCounter()
    handle = decoder.register_forward_pre_hook(counter, with_kwargs=True)
    try:
        yield counter
    finally:
        handle.remove()


def yes_no_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that say yes, and those that say no: in lower case, capitals or capitalised, with
    and without a space before.

    A tokenizer that has a word in none of these spellings gets the first tokens of the spellings;
    both lists are empty where yes and no then begin alike.
    """
    vocabulary = tokenizer.get_vocab()
    ids: list[set[int]] = []
    for word in ("yes", "no"):
        spellings = (word, word.title(), word.upper())
        # How tokenizers write the space before a word.
        marked = [mark + spelling for mark in ("", " ", "▁", "Ġ") for spelling in spellings]
        found = {vocabulary[text] for text in marked if text in vocabulary}
        if not found:
            pieces = [
                tokenizer(space + spelling, add_special_tokens=False)["input_ids"]
                for space in ("", " ")
                for spelling in spellings
            ]
            found = {piece[0] for piece in pieces if piece}
        ids.append(found)
    yes, no = ids
    return ([], []) if yes & no else (sorted(yes), sorted(no))


class FirstToken:
    """Logits processor that keeps P(yes) / (P(yes) + P(no)) of the first token and changes nothing.

    generate() calls it with the logits that it decodes from: those of all streams combined under a
    contrastive method, those of the shortened prompt under a pruning one. Temperature, which comes
    later, is not in them.

    Args:
        yes, no: token ids, from `yes_no_tokens`.
    """

    def __init__(self, yes: Sequence[int], no: Sequence[int]) -> None:
        self._yes, self._no = list(yes), list(no)
        #: By row; None where neither can be said.
        self.p_yes: list[float | None] | None = None

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """See transformers.LogitsProcessor: (B, L) ids and (B, vocabulary) logits."""
        if self.p_yes is None:
            if not self._yes:
                self.p_yes = [None] * len(scores)
                return scores
            yes, no = (scores[:, ids].double().logsumexp(1) for ids in (self._yes, self._no))
            # Both can be ruled out, by a plausibility mask for one: -inf - -inf is nan.
            values = (yes - no).sigmoid().tolist()
            self.p_yes = [value if value == value else None for value in values]
        return scores


class TransformersModel:
    """A loaded model and its processor; methods are applied by `vlmfix.wrapped`.

    A model that is wrapped already stays so: methods are applied by `vlmfix.using`.

    Args:
        model: a vision-language model.
        processor: its processor.
        name: how the results call it.
    """

    def __init__(self, model: Any, processor: Any, name: str | None = None) -> None:
        self._model, self._processor = model, processor
        self._name = name or getattr(model, "name_or_path", "") or type(model).__name__

    @property
    def facts(self) -> dict[str, Any]:
        """Model id, revision, class, dtype, device, attention implementation, generation config.

        "generation_config" has the checkpoint's settings that hold ("kept") and those that are
        undone ("neutralised"), so that answers are greedy, or sampled from the model's own
        probabilities.
        """
        config = getattr(self._model, "config", None)
        kept, undone = split_config(self._model)
        return {
            "model": str(self._name),
            "revision": getattr(config, "_commit_hash", None),
            "model_class": type(self._model).__name__,
            "dtype": str(getattr(self._model, "dtype", "")).removeprefix("torch."),
            "device": str(getattr(self._model, "device", "")),
            "attention": getattr(config, "_attn_implementation", None),
            "generation_config": {"kept": kept, "neutralised": undone},
        }

    def visual_tokens(self, picture: Any) -> int | None:
        """How many visual tokens a PIL image becomes; None for a model that vlmfix cannot hook."""
        from vlmfix.chat import encode_chats
        from vlmfix.families import describe_model

        try:
            info = describe_model(self._model)
        except UnsupportedModel:
            return None
        content = [{"type": "image", "image": picture}, {"type": "text", "text": "?"}]
        inputs = encode_chats(self._processor, [[{"role": "user", "content": content}]])
        ids = inputs["input_ids"][0].tolist()
        return sum(token in info.image_token_ids for token in ids)

    def check(self, methods: Sequence[Any]) -> None:
        """Wrap and unwrap once per method, so that what cannot work fails before any answer."""
        for method in methods:
            with self._under(method):
                pass

    def _under(self, method: Any | None) -> AbstractContextManager[Any]:
        """The model with a method, or plain; a wrapped model in this thread only."""
        import vlmfix
        from vlmfix.engine.session import SESSION

        if SESSION in self._model.__dict__:
            return vlmfix.using(self._model, method)
        return nullcontext() if method is None else vlmfix.wrapped(self._model, method)

    def describe(self, method: Any | None) -> Any:
        """The methods of a stack with all options as they run here; None for the plain model."""
        from vlmfix.families import describe_model
        from vlmfix.registry import build_stack

        stack = build_stack(method)
        if not stack:
            return None
        info = describe_model(self._model)
        return [plain(part.prepared(info, self._model)) for part in stack]

    @contextmanager
    def arm(
        self,
        method: Any | None,
        gen_kwargs: Mapping[str, Any],
        image: Callable[[str], Any],
        wants_p_yes: bool = False,
    ) -> Iterator[Answerer]:
        """See `runner.ModelUnderTest.arm`."""
        import vlmfix

        yes_no = None
        if wants_p_yes:
            yes_no = yes_no_tokens(getattr(self._processor, "tokenizer", self._processor))
        settings = {**neutral(self._model), **gen_kwargs}
        with self._under(method), count_passes(self._model) as counter:

            def answer(batch: Sequence[Request], noise: int) -> list[Answer]:
                counter.reset()
                chats = [_chat(request, image) for request in batch]
                first = None if yes_no is None else FirstToken(*yes_no)
                watched = {} if first is None else {"logits_processor": [first]}
                with _seeded(noise):
                    details = vlmfix.generate(
                        self._model,
                        self._processor,
                        chats,
                        return_details=True,
                        **settings,
                        **watched,
                    )
                passes = counter.rows / len(batch)
                p_yes = (first and first.p_yes) or [None] * len(batch)
                return [
                    Answer(d.text, d.prompt_tokens, d.new_tokens, d.finish, passes, p_yes=p)
                    for d, p in zip(details, p_yes, strict=True)
                ]

            yield answer


@contextmanager
def _seeded(noise: int) -> Iterator[None]:
    """Let torch draw from this seed, then go on where its generators were."""
    import torch

    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(noise)
        yield


def _chat(request: Request, image: Callable[[str], Any]) -> list[dict[str, Any]]:
    """The chat as `vlmfix.generate` takes it; a picture stands where it first comes up."""
    sample = request.sample
    chat: list[dict[str, Any]] = []
    shown: set[str] = set()
    for turn in (*request.turns, Turn(sample.image, sample.prompt, request.prefix)):
        content: list[dict[str, Any]] = []
        if turn.image is not None and turn.image not in shown:
            shown.add(turn.image)
            content.append({"type": "image", "image": image(turn.image)})
        content.append({"type": "text", "text": turn.prompt})
        chat.append({"role": "user", "content": content})
        chat.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
    # What the model has not said at all, it is to begin.
    return chat if request.prefix else chat[:-1]
