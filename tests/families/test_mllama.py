"""Mllama, whose images enter through cross-attention: branches, and what is refused."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from contrast_oracle import Oracle
from matrix import ROWS, family, logits
from prompts import observed, state
from tiny import build
from transformers import DynamicCache, LogitsProcessorList, SuppressTokensLogitsProcessor

import vlmfix
from vlmfix.analysis.doctor import examine
from vlmfix.base.contrast import ContrastMethod
from vlmfix.engine.observe import LastRow
from vlmfix.errors import BadInput, UnsupportedModel
from vlmfix.families import describe_model
from vlmfix.methods.m3id import MutualInformationDecoding
from vlmfix.methods.vcd import VisualContrastiveDecoding

METHODS: dict[str, Any] = {row.name: row for row in ROWS}
CONTRASTS = ("m3id", "pai_guidance", "vcd")
STATIC = {"cache_implementation": "static", "disable_compile": True}
MODES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "greedy": ({}, {}),
    "sampling twice": ({"do_sample": True, "num_return_sequences": 2}, {}),
    "beams": ({"num_beams": 3}, {}),
    "static": ({}, STATIC),
    "static beams": ({"num_beams": 3}, STATIC),
    "no cache": ({"num_beams": 3}, {"use_cache": False}),
}
NEVER = [2, *range(90, 100)]


def _inputs() -> dict[str, Any]:
    inputs = family("mllama").inputs(3, seed=3)
    assert (inputs["attention_mask"] == 0).any()
    return inputs


def _generate(model: Any, inputs: dict[str, Any], **kwargs: Any) -> Any:
    torch.manual_seed(5)
    arguments = {
        "max_new_tokens": 5,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": 2,
        "suppress_tokens": NEVER,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        **kwargs,
    }
    return model.generate(**inputs, **arguments)


@cache
def _oracle(contrast: str) -> Oracle:
    tiny, inputs = family("mllama"), _inputs()
    method = METHODS[contrast].strong.prepared(describe_model(tiny.model), tiny.model)
    assert isinstance(method, ContrastMethod)
    return Oracle(tiny, [tiny.single(inputs, row) for row in range(3)], method)


def _close(one: torch.Tensor, other: torch.Tensor) -> None:
    one, other = one.log_softmax(-1), other.log_softmax(-1)
    likely = other > -1e3
    assert torch.equal(one > -1e3, likely)
    assert torch.allclose(one[likely], other[likely], rtol=0, atol=1e-4)


@pytest.mark.rotated
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("contrast", CONTRASTS)
def test_branches_equal_the_oracle(contrast: str, mode: str) -> None:
    """Without the image no cross-attention layer runs, in the same batch as rows where they do."""
    tiny, inputs = family("mllama"), _inputs()
    choice, forwards = MODES[mode]
    plain = _generate(tiny.model, inputs, **choice, **forwards)
    before = state(tiny.model)
    with vlmfix.wrapped(tiny.model, METHODS[contrast].strong):
        got = _generate(tiny.model, inputs, **choice, **forwards)
        assert vlmfix.last_call(tiny.model).streams == 2
    assert state(tiny.model) == before
    assert (got.logits[0] - plain.logits[0]).abs().max() > 0.1
    suppress = SuppressTokensLogitsProcessor(NEVER)
    processors = LogitsProcessorList([_oracle(contrast).processor(), suppress])
    wanted = _generate(
        tiny.model, inputs, **choice, use_cache=False, logits_processor=processors,
        suppress_tokens=None,
    )  # fmt: skip
    assert torch.equal(got.sequences, wanted.sequences)
    for one, other in zip(got.scores, wanted.scores, strict=True):
        _close(one, other)


@pytest.mark.parametrize("contrast", CONTRASTS)
def test_forwards_behind_each_other(contrast: str) -> None:
    tiny, inputs, oracle = family("mllama"), _inputs(), _oracle(contrast)
    cache = DynamicCache(config=tiny.model.config.get_text_config())
    mask, cross = inputs["attention_mask"], inputs["cross_attention_mask"][:, -1:]
    with vlmfix.wrapped(tiny.model, METHODS[contrast].strong):
        got = {0: logits(tiny.model, inputs, past_key_values=cache)}
        for tokens in ([11], [12, 13]):
            ids = torch.tensor([tokens]).expand(3, -1)
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
            step = {"input_ids": ids, "attention_mask": mask}
            step["cross_attention_mask"] = cross.expand(-1, len(tokens), -1, -1)
            got[tokens[-1] - 10] = logits(tiny.model, step, past_key_values=cache)
    for length, one in got.items():
        answer = torch.arange(11, 11 + length)
        _close(one, torch.stack([oracle.logits(row, answer) for row in range(3)]))


@pytest.mark.parametrize("contrast", CONTRASTS)
def test_identity_and_a_contrast_of_nearly_nothing(contrast: str) -> None:
    tiny, inputs = family("mllama"), _inputs()
    plain = _generate(tiny.model, inputs)
    with vlmfix.wrapped(tiny.model, METHODS[contrast].identity):
        got = _generate(tiny.model, inputs)
    assert all(map(torch.equal, got.logits, plain.logits))
    if contrast != "pai_guidance":
        nearly = {
            "m3id": MutualInformationDecoding(decay=1e-6, beta=0.0),
            "vcd": VisualContrastiveDecoding(alpha=1e-6, beta=0.0, seed=0),
        }
        with vlmfix.wrapped(tiny.model, nearly[contrast]):
            got = _generate(tiny.model, inputs)
            assert vlmfix.last_call(tiny.model).streams == 2
        for one, other in zip(got.logits, plain.logits, strict=True):
            _close(one, other)


def test_steering_runs() -> None:
    tiny, inputs = family("mllama"), _inputs()
    plain = logits(tiny.model, inputs)
    with vlmfix.wrapped(tiny.model, METHODS["steer"].strong):
        batch = logits(tiny.model, inputs)
        alone = torch.cat([logits(tiny.model, tiny.single(inputs, row)) for row in range(3)])
    assert torch.allclose(batch, alone, rtol=0, atol=1e-5)
    assert (batch - plain).abs().max() > 0.1
    assert torch.equal(logits(tiny.model, inputs), plain)


# -- refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {*CONTRASTS, "steer"}))
def test_what_needs_visual_tokens_in_the_prompt_is_refused_with_this_reason(name: str) -> None:
    tiny = family("mllama")
    with pytest.raises(UnsupportedModel, match=f"^{name} .*cross-attention .layers 1, 3") as found:
        vlmfix.wrap(tiny.model, METHODS[name].strong)
    told = {row["name"]: row for row in examine(tiny.model)["methods"]}
    assert not told[name]["fits"] and told[name]["why"] == str(found.value)


def test_doctor_says_what_fits() -> None:
    report = examine(family("mllama").model)
    assert report["supported"] and report["attention_layers"] == 2
    fits = {row["name"] for row in report["methods"] if row["fits"]}
    assert fits >= set(CONTRASTS)


def test_looking_at_the_attention_to_visual_tokens_is_refused() -> None:
    tiny = family("mllama")
    with pytest.raises(UnsupportedModel, match="looks at attention needs visual tokens"):
        observed(tiny.model, tiny.inputs(1), LastRow((0,)))
    with pytest.raises(UnsupportedModel, match="fill no placeholders"):
        vlmfix.attention_map(tiny.model, tiny.inputs(1))


def test_the_cross_attention_mask_is_asked_for() -> None:
    tiny = build("mllama")
    inputs = tiny.inputs(1)
    inputs.pop("cross_attention_mask")
    with (
        vlmfix.wrapped(tiny.model, METHODS["m3id"].strong),
        pytest.raises(BadInput, match="m3id needs cross_attention_mask"),
    ):
        _generate(tiny.model, inputs)
