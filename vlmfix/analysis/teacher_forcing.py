"""A model's own greedy answers, read again in one forward.

With the whole answer given, the effect of an edit on its tokens, or their attention, is measured
on all of them at once: in one forward instead of one per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vlmfix.chat import end_tokens
from vlmfix.engine.session import SESSION
from vlmfix.errors import UnsupportedModel
from vlmfix.families import describe_model, last_logits
from vlmfix.families.surgeon import TOKEN_TYPES, module_state

__all__ = ["ForcedAnswers", "answer_greedily"]

#: Inputs of a prompt with one entry per token, which the answer's tokens need as well.

#: The least share of its own answer that a model must predict. Rounding and a repetition penalty of
#: generate() change single tokens; a model that attends in both directions over its prompt differs
#: nearly everywhere.
_MINIMUM_AGREEMENT = 0.9


@dataclass(frozen=True)
class ForcedAnswers:
    """A batch of prompts (left-padded), each with its greedy answer (right-padded).

    Attributes:
        inputs: keyword arguments of the model's forward over prompts and answers.
        prompt_length: width of the prompts in `inputs`.
        answers: the ids of each answer, with the token that ended it if one did.
        log_probabilities: per answer (T,) float32, of its tokens by the plain model.
        agreement: share of the answers' tokens that the plain model predicts in this one forward.
    """

    inputs: dict[str, Any]
    prompt_length: int
    answers: list[list[int]]
    log_probabilities: list[torch.Tensor]
    agreement: float

    def read(self, model: Any) -> list[torch.Tensor]:
        """Log-probabilities (T,) float32 of the answers' tokens by the model as it is now."""
        scores = _scores(model, self.inputs, self.prompt_length, self.answers)
        return _chosen(scores, self.answers)


def _scores(
    model: Any, inputs: dict[str, Any], prompt_length: int, answers: list[list[int]]
) -> list[torch.Tensor]:
    """Per answer, log-probabilities (T, V) float32 over the vocabulary at its T tokens."""
    width = inputs["input_ids"].shape[1] - prompt_length
    more: dict[str, Any] = {"use_cache": False, **last_logits(model, width + 1)}
    if SESSION in model.__dict__:  # only a wrapped model knows this argument
        more["prompt_length"] = prompt_length
    with module_state(model), torch.no_grad():
        logits = model(**inputs, **more).logits[:, -width - 1 : -1]
    return [logits[at, : len(row)].float().log_softmax(-1) for at, row in enumerate(answers)]


def _chosen(scores: list[torch.Tensor], answers: list[list[int]]) -> list[torch.Tensor]:
    pairs = zip(scores, answers, strict=True)
    return [row.gather(1, row.new_tensor(ids).long()[:, None])[:, 0] for row, ids in pairs]


def answer_greedily(model: Any, prompt: Mapping[str, Any], max_new_tokens: int) -> ForcedAnswers:
    """Let a plain model answer prompts, and prepare to read prompts and answers in one forward.

    Args:
        model: a supported VLM, plain (not wrapped, or under `vlmfix.using(model, None)`).
        prompt: arguments of its generate() for a left-padded batch, see `chat.chat_inputs`.
        max_new_tokens: longest answer, at least 1.

    Raises:
        UnsupportedModel: the model does not predict its own answers when it reads them whole.
    """
    info = describe_model(model)
    # A placeholder in an answer would require the features of one more image.
    never = [*info.image_token_ids, *info.video_token_ids]
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "do_sample": False,
        "num_beams": 1,
        "suppress_tokens": [*(model.generation_config.suppress_tokens or ()), *never],
    }
    with torch.no_grad():
        sequences = model.generate(**prompt, **settings)
    length = prompt["input_ids"].shape[1]
    ends = end_tokens(model, settings)
    answers = [_until(row, ends) for row in sequences[:, length:].tolist()]
    width = max(map(len, answers))
    real = torch.tensor([[at < len(row) for at in range(width)] for row in answers])
    real = real.to(sequences.device)
    added = sequences[:, length : length + width].masked_fill(~real, 0)
    inputs = {**prompt, "input_ids": torch.cat((prompt["input_ids"], added), dim=1)}
    mask = prompt["attention_mask"]
    inputs["attention_mask"] = torch.cat((mask, real.to(mask.dtype)), dim=1)
    for name in TOKEN_TYPES:
        if name in inputs:
            inputs[name] = torch.nn.functional.pad(inputs[name], (0, width))
    scores = _scores(model, inputs, length, answers)
    agreement = _agreement(scores, answers, settings["suppress_tokens"])
    if agreement < _MINIMUM_AGREEMENT:
        raise UnsupportedModel(
            f"reading its answers in one forward, {type(model).__name__} predicts only "
            f"{agreement:.0%} of the tokens that it wrote one by one, so measurements on whole "
            "answers would not hold for its decoding. The cause is attention in both directions "
            "over the prompt, or a strong penalty in its generation_config: remove the penalty, or "
            "calibrate without answers (`vlmfix calibrate MODEL --only sinks,heads`)."
        )
    return ForcedAnswers(inputs, length, answers, _chosen(scores, answers), agreement)


def _agreement(scores: list[torch.Tensor], answers: list[list[int]], never: list[int]) -> float:
    """Share of the tokens that have the largest score (T, V) among allowed tokens."""
    allowed = [
        row.index_fill(1, torch.tensor(never, device=row.device), -torch.inf) for row in scores
    ]
    predicted = [token for row in allowed for token in row.argmax(-1).tolist()]
    written = [token for row in answers for token in row]
    right: list[bool] = [one == other for one, other in zip(predicted, written, strict=True)]
    return sum(right) / len(right)


def _until(row: list[int], ends: set[int]) -> list[int]:
    """The tokens up to the first one that ends an answer, with it."""
    stop = next((at for at, token in enumerate(row) if token in ends), None)
    return row if stop is None else row[: stop + 1]
