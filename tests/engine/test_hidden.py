"""Edits of hidden states: against edits by hand, their rows, and who stacks with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from matrix import VECTORS, family, logits, prompt
from tiny import FAMILIES, build, generate_kwargs
from transformers import CompileConfig, DynamicCache

import vlmfix
from vlmfix.base.contrast import Branch, ContrastMethod, Prompt
from vlmfix.base.hidden import Direction, HiddenMethod
from vlmfix.base.observer import Rows
from vlmfix.errors import CompositionError, StateError, UnsupportedModel
from vlmfix.families import ModelInfo, describe_model
from vlmfix.methods.steer import Steer

LAYERS = (0, 2)
HALVES = (slice(0, 1), slice(1, None))


def steer(**options: Any) -> Steer:
    return Steer(vectors=VECTORS, **{"strength": 4.0, **options})


def _module(model: Any, layer: int, site: str) -> torch.nn.Module:
    """The module whose output is added to the residual stream, by the names of the families."""
    block = describe_model(model).layers[layer]
    if site == "layer":
        return block
    last = getattr(block, "post_feedforward_layernorm", None)
    found: torch.nn.Module = last if last is not None else block.mlp
    return found


def _by_hand(model: Any, inputs: dict[str, Any], site: str, change: Any) -> torch.Tensor:
    """Next-token logits of the plain model with hooks of our own."""

    def hook(layer: int) -> Any:
        def edit(module: Any, args: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            edited = change(hidden, VECTORS[layer])
            return (edited, *output[1:]) if isinstance(output, tuple) else edited

        return edit

    handles = [_module(model, layer, site).register_forward_hook(hook(layer)) for layer in LAYERS]
    try:
        return logits(model, inputs)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("site", ["layer", "mlp"])
@pytest.mark.parametrize("name", FAMILIES)
def test_all_rows_equal_an_edit_by_hand(name: str, site: str) -> None:
    tiny = family(name)
    inputs = prompt(tiny)
    real = inputs["attention_mask"].bool()[..., None]
    expected = _by_hand(
        tiny.model, inputs, site, lambda hidden, v: torch.where(real, hidden + 4 * v, hidden)
    )
    with vlmfix.wrapped(tiny.model, steer(site=site, edited="all")):
        got = logits(tiny.model, inputs)
        counted = vlmfix.last_call(tiny.model).rows_by_layer
    assert torch.allclose(got, expected, atol=1e-5)
    assert (got - logits(tiny.model, inputs)).abs().max() > 1e-2
    assert counted == dict.fromkeys(LAYERS, int(real.sum()))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_the_row_that_predicts_equals_an_edit_by_hand(name: str) -> None:
    tiny = family(name)
    inputs = prompt(tiny)

    def last(hidden: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        edited = hidden.clone()
        edited[:, -1] += 4 * vector
        return edited

    with vlmfix.wrapped(tiny.model, steer()):
        got = logits(tiny.model, inputs)
    assert torch.allclose(got, _by_hand(tiny.model, inputs, "layer", last), atol=1e-5)


def test_only_rows_that_predict_leave_the_prompts_cache_alone() -> None:
    tiny = family("llava")
    inputs = prompt(tiny)
    caches = []
    for stack in (None, steer()):
        cache = DynamicCache(config=tiny.model.config.get_text_config())
        with vlmfix.wrapped(tiny.model, stack), torch.no_grad():
            tiny.model(**inputs, past_key_values=cache)
        caches.append(cache)
    for plain, edited in zip(caches[0].layers, caches[1].layers, strict=True):
        assert torch.equal(plain.keys[:, :, :-1], edited.keys[:, :, :-1])
        assert torch.equal(plain.values[:, :, :-1], edited.values[:, :, :-1])
    assert not torch.equal(caches[0].layers[2].keys, caches[1].layers[2].keys)


def test_rules_choose_their_rows() -> None:
    tiny = family("llava")
    inputs = prompt(tiny)
    new = 3 * 5  # of six tokens the last is never read
    rules: dict[Rows, int] = {
        "generated": new,
        "predicting": new + 3,
        "text": new + sum(len(row) for row in _behind(inputs)),
        "all": new + int(inputs["attention_mask"].sum()),
    }
    for rule, count in rules.items():
        with vlmfix.wrapped(tiny.model, steer(edited=rule)):
            tiny.model.generate(**inputs, **generate_kwargs())
            assert vlmfix.last_call(tiny.model).rows_by_layer == dict.fromkeys(LAYERS, count)


def _behind(inputs: dict[str, Any]) -> list[torch.Tensor]:
    """The positions behind the image of each prompt."""
    ids = inputs["input_ids"]
    return [row[int((row == 90).nonzero().max()) + 1 :] for row in ids]


def test_prompts_without_an_image_can_be_left_alone() -> None:
    tiny = family("llava")
    inputs = {k: v for k, v in prompt(tiny).items() if k != "pixel_values"}
    inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == 90, 7)
    plain = logits(tiny.model, inputs)
    with vlmfix.wrapped(tiny.model, steer(only_with_image=True)):
        assert torch.equal(logits(tiny.model, inputs), plain)
        assert vlmfix.last_call(tiny.model).edited_rows == 0
    with vlmfix.wrapped(tiny.model, steer()):
        assert not torch.equal(logits(tiny.model, inputs), plain)


def test_an_image_that_comes_in_a_later_chunk_counts() -> None:
    tiny = family("llava")
    inputs = prompt(tiny)
    plain = tiny.model.generate(**inputs, **generate_kwargs())
    with vlmfix.wrapped(tiny.model, steer(only_with_image=True, edited="all")):
        whole = tiny.model.generate(**inputs, **generate_kwargs())
        chunks = generate_kwargs(prefill_chunk_size=2)
        assert torch.equal(tiny.model.generate(**inputs, **chunks)[:, -5:], whole[:, -5:])
    assert not torch.equal(whole, plain)


def test_a_prompt_that_comes_in_two_forwards() -> None:
    """Without generate() nothing says that an image will come: its own forward does."""
    tiny = family("llava")
    inputs = tiny.inputs(1)
    parts = [{k: v[:, cut] for k, v in inputs.items() if v.ndim == 2} for cut in HALVES]
    parts[1] |= {"pixel_values": inputs["pixel_values"], "attention_mask": inputs["attention_mask"]}
    counts = []
    for rows in ("all", "predicting"):
        cache = DynamicCache(config=tiny.model.config.get_text_config())
        length = inputs["input_ids"].shape[1]
        stack = steer(only_with_image=True, edited=rows)
        with vlmfix.wrapped(tiny.model, stack), torch.no_grad():
            tiny.model(**parts[0], past_key_values=cache, prompt_length=length)
            tiny.model(**parts[1], past_key_values=cache)
            counts.append(vlmfix.last_call(tiny.model).rows_by_layer[0])
    assert counts == [length - 1, 1]


def test_a_later_turn_over_a_cache_still_has_its_image() -> None:
    tiny = family("llava")
    inputs = tiny.inputs(1)
    cache = DynamicCache(config=tiny.model.config.get_text_config())
    with vlmfix.wrapped(tiny.model, steer(only_with_image=True)):
        first = tiny.model.generate(**inputs, past_key_values=cache, **generate_kwargs())
        turn = torch.cat([first, torch.tensor([[5, 6, 7]])], dim=1)
        mask = torch.ones_like(turn)
        tiny.model.generate(
            input_ids=turn, attention_mask=mask, past_key_values=cache, **generate_kwargs()
        )
        assert vlmfix.last_call(tiny.model).rows_by_layer == dict.fromkeys(LAYERS, 6)


def test_a_layer_is_hooked_once_however_often_it_is_asked_for() -> None:
    tiny = family("llava")
    inputs = prompt(tiny)
    with vlmfix.wrapped(tiny.model, steer()):
        once = logits(tiny.model, inputs)
        with vlmfix.using(tiny.model, steer()), vlmfix.using(tiny.model, steer()):
            assert torch.equal(logits(tiny.model, inputs), once)
        assert torch.equal(logits(tiny.model, inputs), once)
    assert not torch.equal(once, logits(tiny.model, inputs))


def test_a_null_edit_goes_the_whole_way_and_changes_nothing() -> None:
    tiny = family("llava")
    inputs = prompt(tiny)
    plain = logits(tiny.model, inputs)
    for options in ({}, {"keep_norm": True, "relative": True}, {"site": "mlp", "edited": "all"}):
        with vlmfix.wrapped(tiny.model, steer(strength=1e-6, **options)):
            assert torch.allclose(logits(tiny.model, inputs), plain, atol=1e-5)
            assert vlmfix.last_call(tiny.model).edited_rows > 0


@dataclass(frozen=True)
class Gated(HiddenMethod):
    """Adds 2 v to rows whose first entry is positive."""

    name: ClassVar[str] = "gated"

    def layers(self, info: ModelInfo) -> Sequence[int]:
        return LAYERS

    def edited_rows(self) -> Rows:
        return "all"

    def direction(self, layer: int, has_image: torch.Tensor) -> Direction:
        return Direction("add", VECTORS[layer][None], 2.0 * torch.ones(len(has_image)))

    def gate(self, hidden: torch.Tensor, direction: Direction) -> torch.Tensor:
        return (hidden[..., 0] > 0).float()


def test_a_gate_decides_row_by_row() -> None:
    tiny = family("llava")
    inputs = prompt(tiny)
    real = inputs["attention_mask"].bool()[..., None]
    rows = []

    def change(hidden: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        chosen = real & (hidden[..., :1] > 0)
        rows.append(int(chosen.sum()))
        return torch.where(chosen, hidden + 2 * vector, hidden)

    with vlmfix.wrapped(tiny.model, Gated()):
        got = logits(tiny.model, inputs)
        counted = vlmfix.last_call(tiny.model).rows_by_layer
    assert torch.allclose(got, _by_hand(tiny.model, inputs, "layer", change), atol=1e-5)
    assert list(counted.values()) == rows and 0 < rows[0] < int(real.sum())


# -- stacks ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Keeps(ContrastMethod):
    """Leaves the logits alone and keeps those of its branch, the prompt as it is."""

    kept: list[torch.Tensor] = field(default_factory=list, hash=False, compare=False)

    name: ClassVar[str] = "keeps"

    def streams(self) -> int:
        return 1

    def branches(self, prompt: Prompt) -> Sequence[Branch]:
        return [Branch()]

    def contrast(
        self, base: torch.Tensor, branches: Sequence[torch.Tensor], token: torch.Tensor
    ) -> torch.Tensor:
        self.kept.append(branches[0])
        return base


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_rows_of_branches_are_not_edited(name: str) -> None:
    """Decoding, too: both rows read the tokens of the steered answer."""
    tiny = family(name)
    inputs = prompt(tiny)
    kwargs = generate_kwargs(output_logits=True, return_dict_in_generate=True)
    with vlmfix.wrapped(tiny.model, steer(edited="all")):
        steered = tiny.model.generate(**inputs, **kwargs)
    both = Keeps()
    with vlmfix.wrapped(tiny.model, [steer(edited="all"), both]):
        together = tiny.model.generate(**inputs, **kwargs)
    assert torch.equal(together.sequences, steered.sequences)
    full = {**inputs, "input_ids": steered.sequences}
    new = steered.sequences.shape[1] - inputs["input_ids"].shape[1]
    for key in ("attention_mask", "token_type_ids", "mm_token_type_ids"):
        if key in inputs:
            value = int(key == "attention_mask")
            full[key] = torch.nn.functional.pad(inputs[key], (0, new), value=value)
    with torch.no_grad():
        plain = tiny.model(**full).logits[:, -new - 1 : -1]
    got = torch.cat(both.kept, dim=1)
    assert torch.allclose(got, plain, atol=1e-4)
    assert (torch.stack(steered.logits, dim=1) - plain).abs().max() > 1e-2


def test_layer_pruning_refuses_hidden_states_that_are_edited() -> None:
    with pytest.raises(CompositionError, match="hidden states"):
        vlmfix.wrap(family("llava").model, [steer(), "fastv"])


def test_a_cache_that_was_filled_without_the_edit_is_refused() -> None:
    tiny = family("llava")
    inputs = prompt(tiny)
    cache = DynamicCache(config=tiny.model.config.get_text_config())
    with vlmfix.wrapped(tiny.model, "pai:alpha=0.5;start_layer=0"), torch.no_grad():
        tiny.model(**inputs, past_key_values=cache)
        with vlmfix.using(tiny.model, steer()), pytest.raises(StateError, match="steer was off"):
            tiny.model(input_ids=inputs["input_ids"][:, -1:], past_key_values=cache)


def test_an_mlp_that_has_another_name_is_refused() -> None:
    tiny = build("llava")
    block: Any = describe_model(tiny.model).layers[0]
    block.other, block.mlp = block.mlp, None
    del block.mlp
    with pytest.raises(UnsupportedModel, match="site=layer"):
        vlmfix.wrap(tiny.model, steer(site="mlp"))
    assert "_vlmfix_session" not in tiny.model.__dict__


@pytest.mark.parametrize("stack", [["steer"], ["steer", "m3id:decay=0.3", "pai:alpha=0.5"]])
def test_a_compiled_step_is_one_graph(stack: list[str]) -> None:
    tiny = build("llava")
    inputs = prompt(tiny)
    methods = [steer(edited="all") if name == "steer" else name for name in stack]
    config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    config._compile_all_devices = True
    torch.compiler.reset()
    reports, tokens = [], []
    for how in ({"disable_compile": True}, {"compile_config": config}):
        with vlmfix.wrapped(tiny.model, methods):
            kwargs = generate_kwargs(cache_implementation="static", **how)
            tokens.append(tiny.model.generate(**inputs, **kwargs))
            reports.append(vlmfix.last_call(tiny.model).rows_by_layer)
    assert torch.equal(*tokens) and reports[0] == reports[1]
    assert not torch.equal(tokens[0], tiny.model.generate(**inputs, **generate_kwargs()))
