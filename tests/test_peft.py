"""PEFT models are served through the model inside them; modules around a model are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from matrix import ROWS, family
from tiny import build, generate_kwargs

import vlmfix
from vlmfix.errors import StateError, UnsupportedModel
from vlmfix.families import describe_model

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
STRONG = {row.name: row.strong for row in ROWS}


def _lora(**options: Any) -> Any:
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **options
    )
    model = peft.get_peft_model(build("llava").model, config)
    model.eval()
    return model


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
@pytest.mark.parametrize("method", ["pai", "vcd", "vhr", "hiprune"])
def test_a_lora_model_runs_the_method_and_comes_back(task: str | None, method: str) -> None:
    """Its answers are those of the merged weights under the same method."""
    model, inputs = _lora(task_type=task), family("llava").inputs(1)
    base = model.get_base_model()
    with torch.no_grad():
        plain, plain_logits = model.generate(**inputs, **generate_kwargs()), model(**inputs).logits
    before = {name: sorted(module.__dict__) for name, module in model.named_modules()}
    assert vlmfix.wrap(model, STRONG[method]) is model
    with pytest.raises(StateError, match="already wrapped"):
        vlmfix.wrap(base, STRONG[method])
    with torch.no_grad():
        got, logits = model.generate(**inputs, **generate_kwargs()), model(**inputs).logits
    assert vlmfix.last_call(model) == vlmfix.last_call(base)
    with vlmfix.suspended(model):
        assert torch.equal(model.generate(**inputs, **generate_kwargs()), plain)
    assert vlmfix.unwrap(model) is model
    assert {name: sorted(module.__dict__) for name, module in model.named_modules()} == before
    assert torch.equal(model(**inputs).logits, plain_logits)
    merged = model.merge_and_unload()
    with vlmfix.wrapped(merged, STRONG[method]), torch.no_grad():
        wanted = merged.generate(**inputs, **generate_kwargs())
        assert torch.allclose(logits, merged(**inputs).logits, rtol=0, atol=3e-3)
    assert torch.equal(got, wanted) and not torch.allclose(logits[:, -1], plain_logits[:, -1])


def test_the_model_inside_may_be_wrapped_instead() -> None:
    model, inputs = _lora(), family("llava").inputs(1)
    vlmfix.wrap(model.get_base_model(), STRONG["pai"])
    model.generate(**inputs, **generate_kwargs())
    assert vlmfix.last_call(model).edited_rows
    vlmfix.unwrap(model)
    with pytest.raises(StateError, match="not wrapped"):
        vlmfix.last_call(model.get_base_model())


class _Prompted(torch.nn.Module):
    """What vlmfix reads of a PEFT model; the real one asks its model for attributes of text."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        tuning = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        self.peft_config = {"default": tuning}

    def get_base_model(self) -> Any:
        return self.model


def test_adapters_that_lead_the_prompt_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="before the prompt"):
        vlmfix.wrap(_Prompted(build("llava").model), "pai")


class _Around(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.generate(*args, **kwargs)


def test_a_module_around_a_model_is_refused() -> None:
    model = _lora()
    for outer in (model.base_model, _Around(build("llava").model)):
        for act in (describe_model, lambda x: vlmfix.wrap(x, "pai")):
            with pytest.raises(UnsupportedModel, match="is a module around a Llava"):
                act(outer)


def test_a_compiled_model_is_refused_and_the_one_inside_runs_the_method() -> None:
    inputs = family("llava").inputs(1)
    compiled = torch.compile(build("llava").model, backend="eager")
    with pytest.raises(UnsupportedModel, match=r"vlmfix\.wrap\(model\._orig_mod"):
        vlmfix.wrap(compiled, "pai")
    with vlmfix.wrapped(compiled._orig_mod, STRONG["pai"]) as inside:
        compiled.generate(**inputs, **generate_kwargs())
        assert vlmfix.last_call(inside).edited_rows
