"""A transformers model as the harness sees it: plain or wrapped, with its passes counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from vlmfix.evals.arms import plain
from vlmfix.evals.runner import Answerer
from vlmfix.evals.tasks import Answer, Sample

__all__ = ["PassCounter", "TransformersModel", "count_passes"]


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
        """Model id, class, dtype, device and attention implementation."""
        config = getattr(self._model, "config", None)
        return {
            "model": str(self._name),
            "model_class": type(self._model).__name__,
            "dtype": str(getattr(self._model, "dtype", "")).removeprefix("torch."),
            "device": str(getattr(self._model, "device", "")),
            "attention": getattr(config, "_attn_implementation", None),
        }

    def check(self, methods: Sequence[Any]) -> None:
        """Wrap and unwrap once per method, so that what cannot work fails before any answer."""
        for method in methods:
            with self._under(method):
                pass

    def _under(self, method: Any | None) -> AbstractContextManager[Any]:
        """The model with a method, or plain; a wrapped model in this thread only."""
        import vlmfix
        from vlmfix.session import SESSION

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
        self, method: Any | None, gen_kwargs: Mapping[str, Any], image: Callable[[str], Any]
    ) -> Iterator[Answerer]:
        """See `runner.ModelUnderTest.arm`."""
        import vlmfix

        with self._under(method), count_passes(self._model) as counter:

            def answer(batch: Sequence[Sample], noise: int) -> list[Answer]:
                counter.reset()
                chats = [_chat(image(sample.image), sample.prompt) for sample in batch]
                with _seeded(noise):
                    details = vlmfix.generate(
                        self._model, self._processor, chats, return_details=True, **gen_kwargs
                    )
                passes = counter.rows / len(batch)
                return [
                    Answer(d.text, d.prompt_tokens, d.new_tokens, d.finish, passes) for d in details
                ]

            yield answer


@contextmanager
def _seeded(noise: int) -> Iterator[None]:
    """Let torch draw from this seed, then go on where its generators were."""
    import torch

    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(noise)
        yield


def _chat(picture: Any, prompt: str) -> list[dict[str, Any]]:
    content = [{"type": "image", "image": picture}, {"type": "text", "text": prompt}]
    return [{"role": "user", "content": content}]
