"""Answers read in one forward: the same log-probabilities as token by token, on every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from matrix import family, prompt
from tiny import FAMILIES, build, generate_kwargs

import vlmfix
from vlmfix.analysis.teacher_forcing import answer_greedily
from vlmfix.errors import UnsupportedModel

# PaliGemma attends to a whole prompt in both directions, and to what it wrote in one only.
CAUSAL = [name for name in FAMILIES if name != "paligemma"]


def _stepwise(model: Any, inputs: dict[str, Any], tokens: int) -> tuple[list[int], list[float]]:
    """A greedy answer and the log-probabilities of its tokens, one cached step each."""
    output = model.generate(
        **inputs,
        **generate_kwargs(max_new_tokens=tokens, min_new_tokens=0),
        return_dict_in_generate=True,
        output_logits=True,
    )
    answer = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    steps = zip(answer, output.logits, strict=True)
    return answer, [float(row[0].float().log_softmax(-1)[token]) for token, row in steps]


@pytest.mark.parametrize("name", CAUSAL)
def test_reads_what_the_model_wrote(name: str) -> None:
    tiny = family(name)
    inputs = prompt(tiny)
    forced = answer_greedily(tiny.model, inputs, 5)
    assert forced.agreement == 1.0
    assert forced.prompt_length == inputs["input_ids"].shape[1]
    for row, answer in enumerate(forced.answers):
        assert 1 <= len(answer) <= 5
        assert not set(answer) & {tiny.image_token_id}
        written, alone = _stepwise(tiny.model, tiny.single(inputs, row), 5)
        assert answer == written
        assert forced.log_probabilities[row].tolist() == pytest.approx(alone, abs=2e-4)


def test_a_method_changes_what_is_read_and_the_prompt_stays_prompt() -> None:
    tiny = family("llava")
    inputs = prompt(tiny)
    forced = answer_greedily(tiny.model, inputs, 5)
    with vlmfix.wrapped(tiny.model, "pai:alpha=0;start_layer=0"):
        same = forced.read(tiny.model)
    assert all(map(torch.equal, same, forced.log_probabilities))
    with vlmfix.wrapped(tiny.model, "pai:alpha=0.5;start_layer=0"):
        edited = forced.read(tiny.model)
        # PAI edits the last row of the prompt, which predicts the first token, and all after it.
    assert not any(map(torch.equal, edited, forced.log_probabilities))


def test_an_answer_ends_with_the_token_that_ends_it() -> None:
    tiny = build("llava")
    inputs = tiny.inputs(2)
    free = answer_greedily(tiny.model, inputs, 6).answers
    tiny.model.generation_config.eos_token_id = end = free[0][0]
    forced = answer_greedily(tiny.model, inputs, 6)
    assert forced.answers[0] == [end]
    assert end not in free[1] and forced.answers[1] == free[1]
    assert [len(row) for row in forced.log_probabilities] == [len(row) for row in forced.answers]
    mask = forced.inputs["attention_mask"][:, forced.prompt_length :]
    assert mask.sum(1).tolist() == [len(row) for row in forced.answers]


def test_a_model_that_attends_in_both_directions_is_refused() -> None:
    tiny = family("paligemma")
    with pytest.raises(UnsupportedModel, match="attention in both directions"):
        answer_greedily(tiny.model, prompt(tiny), 8)


def test_answers_that_the_model_does_not_predict_are_refused() -> None:
    tiny = build("llava")
    tiny.model.generation_config.repetition_penalty = 50.0
    with pytest.raises(UnsupportedModel, match="--only sinks,heads"):
        answer_greedily(tiny.model, tiny.inputs(2), 24)
