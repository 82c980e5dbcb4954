"""Forwards outside of generate(): the usual loops, forwards inside a generate(), interrupts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from matrix import ROWS, family, prompt
from tiny import TinyFamily, build, generate_kwargs
from tiny_configs import IMAGE
from transformers import DynamicCache
from transformers.cache_utils import StaticLayer

import vlmfix
from vlmfix.errors import BadInput, CompositionError, StateError
from vlmfix.methods.uniform import UniformGrid

STRONG = {row.name: row.strong for row in ROWS}
KWARGS = generate_kwargs(suppress_tokens=None, min_new_tokens=None, eos_token_id=None)
NEW = 6


def _loop(model: Any, inputs: dict[str, Any], mask: bool, **first: Any) -> torch.Tensor:
    """Tokens of the loop that everybody writes: a prompt, then token by token."""
    whole, tokens = inputs["attention_mask"], []
    with torch.no_grad():
        output = model(**inputs, use_cache=True, **first)
        for _ in range(NEW):
            tokens.append(output.logits[:, -1:].argmax(-1))
            whole = torch.cat([whole, whole.new_ones(len(whole), 1)], dim=1)
            cache = output.past_key_values
            more = {"attention_mask": whole} if mask else {}
            output = model(input_ids=tokens[-1], past_key_values=cache, use_cache=True, **more)
    return torch.cat(tokens, 1)


def _generated(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    return model.generate(**inputs, **KWARGS)[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("method", [None, *STRONG])
def test_a_loop_over_the_cache_that_a_forward_returns_equals_generate(method: str | None) -> None:
    tiny = family("llava")
    inputs = prompt(tiny, 1)
    with vlmfix.wrapped(tiny.model, STRONG[method] if method else None):
        wanted = _generated(tiny.model, inputs)
        for mask in (False, True):
            assert torch.equal(_loop(tiny.model, inputs, mask), wanted)


def test_a_returned_cache_that_cannot_go_on_is_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vlmfix.engine.layer_pruning.DynamicLayer", StaticLayer)
    tiny = family("llava")
    step = {"input_ids": torch.tensor([[7]])}
    with vlmfix.wrapped(tiny.model, STRONG["fastv"]), torch.no_grad():
        output = tiny.model(**tiny.inputs(1))
        for _ in range(2):
            with pytest.raises(CompositionError, match="leaves layers with fewer keys"):
                tiny.model(**step, past_key_values=output.past_key_values)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl", "glm4v"])
def test_gift_looks_at_a_bare_prompt_with_a_cache(name: str) -> None:
    """These models count positions by mask and ids, which fit the whole prompt alone."""
    tiny = family(name)
    inputs = tiny.inputs(1)
    config = tiny.model.config.get_text_config(decoder=True)
    with vlmfix.wrapped(tiny.model, STRONG["gift"]), torch.no_grad():
        alone = tiny.model(**inputs, use_cache=False).logits[:, -1]
        held = tiny.model(**inputs, past_key_values=DynamicCache(config=config)).logits[:, -1]
    assert torch.allclose(alone, held, rtol=0, atol=1e-4)


# -- loops behind pruned prompts -------------------------------------------------------------------


def _ragged(tiny: TinyFamily) -> dict[str, Any]:
    """A row that loses nothing, and one that loses visual tokens and is padded for it."""
    inputs = tiny.inputs(2, lengths=[2, 9])
    ids = inputs["input_ids"].clone()
    ids[0] = torch.where(ids[0] == IMAGE, torch.tensor(33), ids[0])
    return {**inputs, "input_ids": ids, "pixel_values": inputs["pixel_values"][1:]}


@pytest.mark.parametrize("positions", ["contiguous", "original"])
@pytest.mark.parametrize("mask", [False, True])
def test_a_loop_counts_pruned_prompts_whole(positions: str, mask: bool) -> None:
    tiny = family("llava")
    inputs = _ragged(tiny)
    method = UniformGrid(ratio=0.5, positions=positions)
    if not mask:  # without one nothing is padded
        inputs = {k: v[1:] if k != "pixel_values" else v for k, v in inputs.items()}
    with vlmfix.wrapped(tiny.model, method):
        assert torch.equal(_loop(tiny.model, inputs, mask), _generated(tiny.model, inputs))


def test_positions_behind_pruned_prompts() -> None:
    tiny = family("llava")
    inputs = _ragged(tiny)
    mask, ids = inputs["attention_mask"], torch.tensor([[7], [8]])
    longer = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
    counted = (longer.cumsum(1) - 1).clamp(min=0)
    with vlmfix.wrapped(tiny.model, UniformGrid(ratio=0.5)), torch.no_grad():
        first = tiny.model(**inputs).past_key_values
        again = copy.deepcopy(tiny.model(**inputs)).past_key_values
        second = tiny.model(**inputs, position_ids=counted[:, :-1]).past_key_values
        one = tiny.model(input_ids=ids, past_key_values=first, attention_mask=longer)
        given = {"attention_mask": longer, "position_ids": counted[:, -1:]}
        other = tiny.model(input_ids=ids, past_key_values=second, **given)
        assert torch.allclose(one.logits, other.logits, rtol=0, atol=1e-5)
        with pytest.raises(BadInput, match="fits neither"):
            tiny.model(input_ids=ids, past_key_values=first, attention_mask=longer)
        with pytest.raises(StateError, match="no method has seen"):
            tiny.model(input_ids=ids, past_key_values=again)


def test_pruning_takes_masks_and_positions_that_it_can_close_up() -> None:
    tiny = family("llava")
    inputs = tiny.inputs(2, lengths=[3, 8])
    counted = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    length = counted.shape[1]
    pairs = torch.ones(2, 1, length, length, dtype=torch.bool).tril()
    pairs &= inputs["attention_mask"].bool()[:, None, None]
    pairs[:, :, -1, -3] = False  # one token that another does not see
    with vlmfix.wrapped(tiny.model, STRONG["divprune"]), torch.no_grad():
        wanted = tiny.model(**inputs).logits[:, -1]
        for given in (counted, torch.arange(length)[None]):
            got = tiny.model(**inputs, position_ids=given).logits[:, -1]
            assert torch.allclose(got, wanted, rtol=0, atol=1e-5)
            for run in (tiny.model, tiny.model.generate):
                with pytest.raises(BadInput, match="not counted one by one"):
                    run(**inputs, position_ids=2 * given)
        for run in (tiny.model, tiny.model.generate):
            with pytest.raises(BadInput, match="for pairs of tokens"):
                run(**{**inputs, "attention_mask": pairs})


# -- inside of generate() --------------------------------------------------------------------------


@pytest.mark.parametrize("length", [3, 20])
@pytest.mark.parametrize("method", ["pai", "vcd", "vhr", "gift", "fastv", "steer", "divprune"])
def test_what_is_asked_inside_a_generate_is_a_prompt_of_its_own(method: str, length: int) -> None:
    tiny = family("llava")
    model, outer = tiny.model, tiny.inputs(1, lengths=[8])
    inner, seen = tiny.inputs(1, seed=5, lengths=[length]), []

    def ask(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(model(**inner).logits[0, -1])
        return scores

    with vlmfix.wrapped(model, STRONG[method]), torch.no_grad():
        alone = model(**inner).logits[0, -1]
        wanted = model.generate(**outer, **KWARGS)
        got = model.generate(**outer, **KWARGS, logits_processor=[ask])
        assert vlmfix.last_call(model).new_tokens == NEW
    assert len(seen) == NEW and torch.equal(got, wanted)
    assert all(torch.equal(one, alone) for one in seen)


@pytest.mark.parametrize("method", ["pai", "var", "vcd", "uniform"])
def test_classifier_free_guidance_runs_beside_a_method(method: str) -> None:
    """Its second prompt is the last token alone, which no method has anything to edit of."""
    tiny = family("llava")
    model, inputs = tiny.model, tiny.inputs(1)
    kwargs = {**KWARGS, "return_dict_in_generate": True, "output_logits": True}
    with vlmfix.wrapped(model, STRONG[method]):
        output = model.generate(**inputs, **kwargs, guidance_scale=1.5, output_scores=True)
    start = inputs["input_ids"].shape[1] - 1
    with torch.no_grad():
        plain = model(input_ids=output.sequences[:, start:-1]).logits[0].log_softmax(-1)
    for step, (own, score) in enumerate(zip(output.logits, output.scores, strict=True)):
        wanted = 1.5 * (own[0].log_softmax(-1) - plain[step]) + plain[step]
        assert torch.allclose(score[0], wanted, rtol=0, atol=2e-2)


@pytest.mark.parametrize("how", ["taken", "class"])
@pytest.mark.parametrize("cached", [True, False])
def test_a_generate_from_before_wrap_is_refused(how: str, cached: bool) -> None:
    tiny = build("llava")
    model, inputs = tiny.model, tiny.inputs(1)
    early = model.generate if how == "taken" else type(model).generate.__get__(model)
    plain = early(**inputs, **KWARGS)
    with vlmfix.wrapped(model, STRONG["pai"]):
        with pytest.raises(StateError, match="taken from the model before"):
            early(**inputs, **KWARGS, use_cache=cached)
        with vlmfix.suspended(model):
            assert torch.equal(early(**inputs, **KWARGS), plain)
        model.prepare_inputs_for_generation(inputs["input_ids"])  # of use in loops, too


def test_an_early_generate_of_a_model_that_generates_from_embeddings_is_refused() -> None:
    tiny = build("instructblip")
    early, inputs = tiny.model.generate, tiny.inputs(1)
    with vlmfix.wrapped(tiny.model, STRONG["pai"]):
        with pytest.raises(StateError, match="taken from the model before"):
            early(**inputs, **KWARGS)
        tiny.model.generate(**inputs, **KWARGS)
        assert vlmfix.last_call(tiny.model).edited_rows


# -- in and out of forwards ------------------------------------------------------------------------


@pytest.mark.parametrize("bare", [True, False])
def test_an_interrupt_leaves_no_frame(bare: bool) -> None:
    tiny, same = build("llava"), family("llava")
    model, inputs = tiny.model, tiny.inputs(1)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    vlmfix.wrap(model, STRONG["pai"])
    handle = model.model.language_model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**inputs) if bare else model.generate(**inputs, **KWARGS)
    handle.remove()
    with torch.no_grad():
        inner, wanted = (x.model(**inputs).last_hidden_state for x in (model, same.model))
    assert torch.equal(inner, wanted)


def test_an_interrupt_behind_a_forward_leaves_no_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = build("llava")

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vlmfix.engine.contrast.prefill_branch", interrupt)
    with vlmfix.wrapped(tiny.model, STRONG["vcd"]):
        with pytest.raises(KeyboardInterrupt):
            tiny.model(**tiny.inputs(1))
        assert tiny.model.__dict__["_vlmfix_session"].host.state.frame is None


def test_a_forward_by_its_name_runs_the_method() -> None:
    tiny = family("llava")
    inputs = tiny.inputs(1)
    with vlmfix.wrapped(tiny.model, STRONG["pai"]), torch.no_grad():
        wanted = tiny.model(**inputs).logits
        assert torch.equal(tiny.model.forward(**inputs).logits, wanted)
        with vlmfix.suspended(tiny.model):
            assert not torch.equal(tiny.model.forward(**inputs).logits, wanted)


def test_a_model_back_in_training_mode_is_refused() -> None:
    tiny = build("llava")
    inputs = tiny.inputs(1)
    vlmfix.wrap(tiny.model, STRONG["pai"])
    tiny.model.train()
    for run, kwargs in ((tiny.model, {}), (tiny.model.generate, KWARGS)):
        with pytest.raises(StateError, match=r"model\.eval\(\)"):
            run(**inputs, **kwargs)
        with vlmfix.suspended(tiny.model):
            run(**inputs, **kwargs)
    tiny.model.eval()
    tiny.model(**inputs)
    assert vlmfix.last_call(tiny.model).edited_rows
