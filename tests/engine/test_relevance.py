"""A look at the prompt before it is cut: what the question attends to in one decoder layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from matrix import family
from prompts import Probe
from tiny import FAMILIES, build, generate_kwargs
from tiny_configs import IMAGE
from torch import Tensor

import vlmfix
import vlmfix.engine.attention
from vlmfix.engine.pruning import shorten
from vlmfix.engine.session import SESSION
from vlmfix.errors import BadInput

Inputs = dict[str, Any]


def told(model: Any, inputs: Inputs, layer: int, **options: Any) -> list[Tensor]:
    probe = Probe(layer=layer, ratio=0.5, **options)
    with vlmfix.wrapped(model, probe), torch.no_grad():
        model(**inputs)
    found = [visual.relevance for visual in probe.told]
    assert all(each is not None and each.dtype == torch.float32 for each in found)
    return [each for each in found if each is not None]


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_relevance_is_what_the_question_attends_to(name: str, layer: int) -> None:
    """Of a left-padded batch: the largest of the question's rows, of their means over heads."""
    tiny = build(name)
    inputs = tiny.inputs(batch=3)
    found = told(tiny.model, inputs, layer)
    tiny.model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = tiny.model(**inputs, output_attentions=True).attentions[layer].mean(1)
    for row, relevance in enumerate(found):
        visual = (inputs["input_ids"][row] == IMAGE).nonzero().flatten()
        # Qwen's span ends with a token of its own, which is text like any other.
        rows = weights[row, int(visual[-1]) + 1 :]
        assert len(rows) == 6 + 2 * row + (name == "qwen2_5_vl")
        expected = rows[:, visual].amax(0)
        assert torch.allclose(relevance, expected, atol=1e-6)
        assert not torch.allclose(relevance, rows[:, visual].mean(0), atol=1e-3)
        assert float(relevance.std()) > 1e-3


def test_relevance_reads_the_question_that_it_is_told() -> None:
    tiny = build("llava")
    inputs = tiny.inputs(batch=2)
    asked = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    asked[0, -4:-2] = True
    asked[1, -1] = True
    probe = Probe(layer=1, ratio=0.5)
    with vlmfix.wrapped(tiny.model, probe), torch.no_grad():
        shorten(tiny.model.__dict__[SESSION].host, probe, inputs, (asked, asked))
    tiny.model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = tiny.model(**inputs, output_attentions=True).attentions[1].mean(1)
    for row, visual in enumerate(probe.told):
        keys = inputs["input_ids"][row] == IMAGE
        assert visual.relevance is not None
        expected = weights[row, asked[row]][:, keys].amax(0)
        assert torch.allclose(visual.relevance, expected, atol=1e-6)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_relevance_at_positions_of_the_callers(name: str) -> None:
    tiny = build(name)
    inputs = tiny.inputs(batch=2)
    usual = told(tiny.model, inputs, 1)
    inputs["position_ids"] = 3 * (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    if name == "qwen2_5_vl":
        inputs["position_ids"] = inputs["position_ids"].expand(3, -1, -1)
    found = told(tiny.model, inputs, 1, positions="original")
    tiny.model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = tiny.model(**inputs, output_attentions=True).attentions[1].mean(1)
    for row, relevance in enumerate(found):
        visual = (inputs["input_ids"][row] == IMAGE).nonzero().flatten()
        expected = weights[row, int(visual[-1]) + 1 :][:, visual].amax(0)
        assert torch.allclose(relevance, expected, atol=1e-6)
        assert not torch.allclose(relevance, usual[row], atol=1e-3)


@pytest.mark.parametrize("layer", [0, 2])
def test_relevance_of_rows_that_come_in_pieces(layer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = family("llava")
    inputs = tiny.inputs(batch=3)
    expected = told(tiny.model, inputs, layer)
    monkeypatch.setattr(vlmfix.engine.attention, "_CHUNK_BYTES", 1)
    found = told(tiny.model, inputs, layer)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_relevance_of_a_batch_equals_singles(name: str) -> None:
    tiny = family(name)
    inputs = tiny.inputs(batch=3)
    together = told(tiny.model, inputs, 1)
    alone = [found for row in range(3) for found in told(tiny.model, tiny.single(inputs, row), 1)]
    assert len(together) == len(alone) == 3
    for one, other in zip(together, alone, strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    assert not torch.allclose(together[0], together[1], atol=1e-4)


@pytest.mark.parametrize("generate", [False, True])
@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_look_ends_with_its_layer(name: str, layer: int, generate: bool) -> None:
    """The layers behind do not run; the one that is watched ends at its attention."""
    tiny = build(name)
    inputs = tiny.inputs(batch=2)
    entered, left = [0] * 3, [0] * 3
    for index, module in enumerate(tiny.model.get_decoder().layers):

        def enter(*_: Any, index: int = index) -> None:
            entered[index] += 1

        def leave(*_: Any, index: int = index) -> None:
            left[index] += 1

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)
    with vlmfix.wrapped(tiny.model, Probe(layer=layer, ratio=0.5)), torch.no_grad():
        if generate:
            tiny.model.generate(**inputs, **generate_kwargs(max_new_tokens=1, min_new_tokens=1))
        else:
            tiny.model(**inputs)
        report = vlmfix.last_call(tiny.model)
    assert entered == [1 + (index <= layer) for index in range(3)]
    assert left == [1 + (index < layer) for index in range(3)]
    assert report.passes == 1


def test_a_look_runs_through_where_accelerate_moves_weights() -> None:
    """Its hooks take weights away again behind each module; a look must not stop in between."""
    from accelerate import cpu_offload

    tiny = build("llava")
    inputs = tiny.inputs(batch=2)
    expected = told(tiny.model, inputs, 0)
    cpu_offload(tiny.model, execution_device=torch.device("cpu"))
    runs = []
    tiny.model.get_decoder().layers[2].register_forward_hook(lambda *_: runs.append(1))
    found = told(tiny.model, inputs, 0)
    assert len(runs) == 2
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert {parameter.device.type for parameter in tiny.model.parameters()} == {"meta"}


def test_a_look_leaves_the_model_as_it_was() -> None:
    tiny = build("qwen2_5_vl")
    other, inputs = tiny.inputs(batch=1, lengths=[9]), tiny.inputs(batch=2)
    with torch.no_grad():
        tiny.model(**other)
    before = tiny.model.model.rope_deltas.clone()
    probe = Probe(layer=1, ratio=0.5)
    with vlmfix.wrapped(tiny.model, probe), torch.no_grad():
        session = tiny.model.__dict__[SESSION]
        cut = shorten(session.host, probe, inputs)
        state = session.host.state
        assert cut is not None and state.frame is None and state.last is None
        assert session.stack.methods == (probe,)
        given = cut.kwargs["mm_encoder_outputs"]["image"].pooler_output
    assert [len(part) for part in given] == [2, 2]
    # What it leaves is what the shorter prompts need, not what the look or the prompt before had.
    count = cut.kwargs["attention_mask"].sum(1)
    deltas = tiny.model.model.rope_deltas
    assert torch.equal(deltas[:, 0], cut.kwargs["position_ids"][1:].amax(dim=(0, 2)) + 1 - count)
    assert deltas.shape != before.shape


def test_a_prompt_that_asks_nothing_behind_its_image() -> None:
    tiny = family("llava")
    inputs = tiny.inputs(batch=2, lengths=[0, 4])
    with (
        vlmfix.wrapped(tiny.model, Probe(layer=1)),
        torch.no_grad(),
        pytest.raises(BadInput, match="probe weighs .* no text behind its image"),
    ):
        tiny.model(**inputs)


def test_a_question_before_its_image_sees_none_of_it() -> None:
    tiny = family("llava")
    inputs = tiny.inputs(batch=1)
    before = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    before[:, 1] = True
    assert (inputs["input_ids"] == IMAGE).nonzero()[0, 1] > 1
    probe = Probe(layer=1)
    with (
        vlmfix.wrapped(tiny.model, probe),
        pytest.raises(BadInput, match="probe weighs .* no text behind its image"),
    ):
        shorten(tiny.model.__dict__[SESSION].host, probe, inputs, (before, before))
