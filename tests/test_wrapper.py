"""wrap, unwrap, using and last_call: what they promise about the model."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from matrix import ROWS, changed, family, logits, prompt
from tiny import FAMILIES, build, generate_kwargs
from transformers import DynamicCache

import vlmfix
import vlmfix.engine.ledger
from vlmfix.base.attention import AttentionMethod
from vlmfix.base.contrast import ContrastMethod
from vlmfix.base.pruning import PruningMethod
from vlmfix.errors import (
    BadInput,
    CompositionError,
    StateError,
    UnknownMethod,
    UnsupportedModel,
    VlmfixError,
)
from vlmfix.families import REFUSED
from vlmfix.methods.pai import PayAttentionToImage

STRONG = {row.name: row.strong for row in ROWS}
#: All that edit attention, one that contrasts logits, one that prunes: a stack takes no more.
STACK = [method for method in STRONG.values() if isinstance(method, AttentionMethod)]
STACK += [STRONG["avc"], STRONG["random"]]


def _fingerprint(model: Any) -> dict[str, Any]:
    """Everything that wrap could have touched, by identity where identity matters."""
    modules = dict(model.named_modules())
    return {
        "attributes": {name: sorted(module.__dict__) for name, module in modules.items()},
        "configs": {
            name: (id(module.config), module.config._attn_implementation)
            for name, module in modules.items()
            if hasattr(module, "config")
        },
        "hooks": {
            name: [len(getattr(module, kind)) for kind in _HOOKS]
            for name, module in modules.items()
        },
        "generate": model.generate,
        "forward": model.forward,
        "saved": model.config.to_json_string(),
        "weights": {
            name: (id(t), t.clone()) for name, t in model.state_dict(keep_vars=True).items()
        },
    }


_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_forward_hooks_always_called", "_backward_hooks")


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    one_w, other_w = one.pop("weights"), other.pop("weights")
    weights = one_w.keys() == other_w.keys() and all(
        one_w[name][0] == other_w[name][0] and torch.equal(one_w[name][1], other_w[name][1])
        for name in one_w
    )
    return weights and one == other


@pytest.fixture
def tiny() -> Iterator[Any]:
    """A fresh llava, so that a test that fails halfway cannot spoil the next."""
    yield build("llava")


@pytest.mark.rotated
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("stack", ["var", "pai", "vcd", "all"])
def test_unwrap_restores_everything(name: str, stack: str) -> None:
    model = build(name).model
    inputs = prompt(family(name))
    methods = STACK if stack == "all" else STRONG[stack]
    # transformers hooks some modules for itself on the first run, so that run comes first.
    plain, tokens = logits(model, inputs), model.generate(**inputs, **generate_kwargs())
    before = _fingerprint(model)
    assert vlmfix.wrap(model, methods) is model
    assert not _same(_fingerprint(model), dict(before))
    assert not torch.equal(logits(model, inputs), plain)
    with vlmfix.using(model, "pai:alpha=0.3;start_layer=0"):
        model.generate(**inputs, **generate_kwargs())
    assert vlmfix.unwrap(model) is model
    assert _same(_fingerprint(model), before)
    assert torch.equal(logits(model, inputs), plain)
    assert torch.equal(model.generate(**inputs, **generate_kwargs()), tokens)


def test_unwrap_restores_after_exceptions_inside_generate_and_forward(tiny: Any) -> None:
    inputs = tiny.inputs(2)
    plain = logits(tiny.model, inputs)
    before = _fingerprint(tiny.model)

    def explode(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"), vlmfix.wrapped(tiny.model, STRONG["pai"]):
        tiny.model.generate(**inputs, logits_processor=[explode], **generate_kwargs())
    assert _same(_fingerprint(tiny.model), dict(before))

    vlmfix.wrap(tiny.model, STRONG["pai"])
    short = {**inputs, **{k: inputs[k][:, :12] for k in ("input_ids", "attention_mask")}}
    with pytest.raises(ValueError, match="image"):  # fewer placeholders than image features
        tiny.model(**short)
    edited = logits(tiny.model, inputs)
    assert not torch.equal(edited, plain)
    with pytest.raises(RuntimeError, match="boom"), vlmfix.using(tiny.model, None):
        tiny.model.generate(**inputs, logits_processor=[explode], **generate_kwargs())
    assert torch.equal(logits(tiny.model, inputs), edited)
    vlmfix.unwrap(tiny.model)
    assert _same(_fingerprint(tiny.model), before)
    assert torch.equal(logits(tiny.model, inputs), plain)


def test_foreign_generate_override_is_chained_and_kept(tiny: Any) -> None:
    seen: list[str] = []
    original = tiny.model.generate

    def outer(*args: Any, **kwargs: Any) -> Any:
        seen.append("outer")
        return original(*args, **kwargs)

    tiny.model.generate = outer
    with vlmfix.wrapped(tiny.model, STRONG["pai"]):
        tiny.model.generate(**tiny.inputs(1), **generate_kwargs())
        assert vlmfix.last_call(tiny.model).edited_rows
    assert seen == ["outer"] and tiny.model.generate is outer


def test_using_nests_and_none_is_the_plain_model(tiny: Any) -> None:
    inputs = tiny.inputs(2)
    plain = logits(tiny.model, inputs)
    with vlmfix.wrapped(tiny.model, None):
        assert torch.equal(logits(tiny.model, inputs), plain)
        with vlmfix.using(tiny.model, STRONG["pai"]):
            pai = logits(tiny.model, inputs)
            with vlmfix.using(tiny.model, STRONG["var"]):
                var = logits(tiny.model, inputs)
                with vlmfix.suspended(tiny.model):
                    assert torch.equal(logits(tiny.model, inputs), plain)
            assert torch.equal(logits(tiny.model, inputs), pai)
    assert len({float(t.sum()) for t in (plain, pai, var)}) == 3


def test_threads_with_different_stacks_do_not_mix(tiny: Any) -> None:
    stacks = {"plain": None, "var": STRONG["var"], "pai": STRONG["pai"]}
    inputs = {name: tiny.inputs(2, seed=index) for index, name in enumerate(stacks)}
    vlmfix.wrap(tiny.model, None)
    expected = {}
    for name, stack in stacks.items():
        with vlmfix.using(tiny.model, stack):
            expected[name] = tiny.model.generate(**inputs[name], **generate_kwargs())
    got: dict[str, list[torch.Tensor]] = {name: [] for name in stacks}
    reports: dict[str, Any] = {}
    barrier = threading.Barrier(len(stacks))

    def run(name: str) -> None:
        with vlmfix.using(tiny.model, stacks[name]):
            for _ in range(5):
                barrier.wait(30)
                got[name].append(tiny.model.generate(**inputs[name], **generate_kwargs()))
            if stacks[name] is not None:
                reports[name] = vlmfix.last_call(tiny.model)

    threads = [threading.Thread(target=run, args=(name,)) for name in stacks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for name in stacks:
        assert len(got[name]) == 5
        assert all(torch.equal(out, expected[name]) for out in got[name])
    assert reports["var"].methods[0].startswith("var") and reports["pai"].methods[0].startswith(
        "pai"
    )


def test_unwrap_while_generating_is_refused(tiny: Any) -> None:
    problems: list[Exception] = []

    def interrupt(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        try:
            vlmfix.unwrap(tiny.model)
        except StateError as error:
            problems.append(error)
        return scores

    with vlmfix.wrapped(tiny.model, STRONG["pai"]):
        tiny.model.generate(**tiny.inputs(1), logits_processor=[interrupt], **generate_kwargs())
    assert len(problems) == 6 and "running" in str(problems[0])


def test_manual_decoding_loop_equals_generate(tiny: Any) -> None:
    inputs = tiny.inputs(1)
    for row in ROWS:
        with vlmfix.wrapped(tiny.model, row.strong), torch.no_grad():
            expected = tiny.model.generate(**inputs, **generate_kwargs(suppress_tokens=None))
            cache = DynamicCache(config=tiny.model.config.get_text_config())
            step, tokens = {**inputs, "past_key_values": cache}, inputs["input_ids"]
            for _ in range(6):
                out = tiny.model(**step)
                scores = out.logits[:, -1]
                scores[:, 2] = -torch.inf  # as min_new_tokens does
                tokens = torch.cat([tokens, scores.argmax(-1, keepdim=True)], 1)
                step = {"input_ids": tokens[:, -1:], "past_key_values": cache}
            report = vlmfix.last_call(tiny.model)
            assert changed(tiny.model) > 0
        assert torch.equal(tokens, expected)
        assert report.passes == 6 and report.seconds is None


def test_second_turn_on_the_same_cache_equals_one_without(tiny: Any) -> None:
    inputs = tiny.inputs(1)
    for row in ROWS:
        if isinstance(row.strong, PruningMethod):
            continue  # refused, see engine/test_prompt_pruning.py and test_layer_pruning.py
        with vlmfix.wrapped(tiny.model, row.strong):
            cache = DynamicCache(config=tiny.model.config.get_text_config())
            first = tiny.model.generate(**inputs, past_key_values=cache, **generate_kwargs())
            turn = torch.cat([first, torch.tensor([[5, 6, 7]])], 1)
            mask = torch.ones_like(turn)
            again = tiny.model.generate(
                input_ids=turn, attention_mask=mask, past_key_values=cache, **generate_kwargs()
            )
            report = vlmfix.last_call(tiny.model)
            assert changed(tiny.model) > 0
        assert again.shape[1] == turn.shape[1] + 6
        assert report.prompt_length == turn.shape[1]


def test_reset_cache_starts_a_new_prompt(tiny: Any) -> None:
    first, second = tiny.inputs(1, seed=1), tiny.inputs(1, seed=2, lengths=[12])
    for row in ROWS:
        with vlmfix.wrapped(tiny.model, row.strong):
            expected = logits(tiny.model, second)
            cache = DynamicCache(config=tiny.model.config.get_text_config())
            logits(tiny.model, first, past_key_values=cache)
            cache.reset()
            again = logits(tiny.model, second, past_key_values=cache)
            assert torch.allclose(again, expected, atol=1e-4)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_ledger_grows_with_a_long_answer_and_covers_a_static_cache(
    tiny: Any, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = tiny.inputs(2)
    kwargs = generate_kwargs(cache_implementation=cache, disable_compile=True)
    for row in ROWS:
        if cache == "static" and not row.static:
            continue
        with vlmfix.wrapped(tiny.model, row.strong):
            expected = tiny.model.generate(**inputs, **kwargs)
            monkeypatch.setattr(vlmfix.engine.ledger, "_GROWTH", 1)
            assert torch.equal(tiny.model.generate(**inputs, **kwargs), expected)
            monkeypatch.undo()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # flex on CPU
@pytest.mark.parametrize(
    "implementation", ["eager", pytest.param("flex_attention", marks=pytest.mark.slow)]
)
def test_other_attention_implementations(implementation: str) -> None:
    tiny = build("llava")
    inputs = tiny.inputs(2)
    tiny.model.set_attn_implementation({"text_config": implementation})
    logits(tiny.model, inputs)
    before = _fingerprint(tiny.model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with vlmfix.wrapped(tiny.model, STRONG["pai"]):
            edited = logits(tiny.model, inputs)
    told = any("runs 'flex_attention' attention" in str(entry.message) for entry in caught)
    assert told == (implementation == "flex_attention")
    assert _same(_fingerprint(tiny.model), before)
    with vlmfix.wrapped(family("llava").model, STRONG["pai"]):
        assert torch.allclose(edited, logits(family("llava").model, inputs), atol=1e-4)


def test_eager_identity_is_bit_identical() -> None:
    tiny = build("llava")
    tiny.model.set_attn_implementation({"text_config": "eager"})
    inputs = tiny.inputs(2)
    plain = logits(tiny.model, inputs)
    with vlmfix.wrapped(tiny.model, PayAttentionToImage(alpha=0.0, start_layer=0)):
        assert torch.equal(logits(tiny.model, inputs), plain)


def test_ledgers_do_not_outlive_their_cache(tiny: Any) -> None:
    import gc

    with vlmfix.wrapped(tiny.model, STRONG["var"]):
        tiny.model.generate(**tiny.inputs(1), **generate_kwargs())
        session = tiny.model.__dict__["_vlmfix_session"]
        gc.collect()
        assert len(session.caches) == 0 and session.host.state.frame is None


def test_wrapped_model_is_not_copied_or_pickled(tiny: Any) -> None:
    for method in STRONG.values():
        with vlmfix.wrapped(tiny.model, method):
            for act in (copy.deepcopy, pickle.dumps):
                with pytest.raises(StateError, match="unwrap"):
                    act(tiny.model)
    copy.deepcopy(tiny.model)


def test_saved_model_never_names_vlmfix(tiny: Any, tmp_path: Any) -> None:
    with vlmfix.wrapped(tiny.model, STRONG["pai"]):
        tiny.model.save_pretrained(tmp_path)
    assert "vlmfix" not in "".join(path.read_text() for path in tmp_path.glob("*.json"))
    again = type(tiny.model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again, tiny.inputs(1)), logits(tiny.model, tiny.inputs(1)))


def test_bad_calls_leave_the_model_untouched(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    before = _fingerprint(tiny.model)
    bad: list[tuple[Any, dict[str, Any], type[VlmfixError], str]] = [
        ("varr", {}, UnknownMethod, "Did you mean 'var'"),
        ("var:kep=1", {}, UnknownMethod, "has no option 'kep'"),
        ("var:keep=2", {}, BadInput, "out of range"),
        ("var:keep=much", {}, BadInput, "not of the type"),
        ("var:variant=mine", {}, BadInput, "must be one of code, paper"),
        ("var", {}, VlmfixError, "vlmfix calibrate"),
        ("var,pai", {}, BadInput, "alternatives"),
        ("", {}, BadInput, "a name is missing"),
        (3, {}, BadInput, "not a method"),
        (["pai", "pai:alpha=1"], {}, CompositionError, "more than once"),
        ("pai", {"impl": "triton"}, BadInput, "CUDA"),
        ("pai", {"impl": "cuda"}, BadInput, "must be"),
    ]
    for methods, kwargs, kind, message in bad:
        if message == "CUDA" and torch.cuda.is_available():
            continue
        with pytest.raises(kind, match=message):
            vlmfix.wrap(tiny.model, methods, **kwargs)
    assert _same(_fingerprint(tiny.model), before)


def test_wrong_states(tiny: Any) -> None:
    with pytest.raises(StateError, match="not wrapped"):
        vlmfix.unwrap(tiny.model)
    with pytest.raises(StateError, match="not wrapped"), vlmfix.using(tiny.model, "pai"):
        pass
    with pytest.raises(StateError, match="not wrapped"):
        vlmfix.last_call(tiny.model)
    vlmfix.wrap(tiny.model, STRONG["pai"])
    with pytest.raises(StateError, match="already wrapped"):
        vlmfix.wrap(tiny.model, STRONG["pai"])
    with pytest.raises(StateError, match="no call has run"):
        vlmfix.last_call(tiny.model)
    vlmfix.unwrap(tiny.model)
    tiny.model.train()
    with pytest.raises(StateError, match=r"model\.eval\(\)"):
        vlmfix.wrap(tiny.model, STRONG["pai"])


@pytest.mark.parametrize("name", ["llama", "kosmos2"])
def test_models_that_are_refused_by_name(name: str) -> None:
    model = build(name).model
    with pytest.raises(UnsupportedModel, match="text-only" if name == "llama" else "not supported"):
        vlmfix.wrap(model, "pai")
    assert "_vlmfix_session" not in model.__dict__
    assert name == "llama" or model.config.model_type in REFUSED
    with pytest.raises(UnsupportedModel, match="AutoModelForImageTextToText"):
        vlmfix.wrap(torch.nn.Linear(2, 2), "pai")


@pytest.mark.parametrize(
    "name", ["llava_onevision", "qwen2_vl", "mistral3", "idefics3", "aya_vision", "glm4v"]
)
def test_other_families_work_through_the_generic_rule(name: str) -> None:
    tiny = family(name)
    # aya_vision attends through a window of 8 keys, which must still hold the image.
    inputs = tiny.inputs(3, lengths=(1, 2, 3) if name == "aya_vision" else None)
    plain = logits(tiny.model, inputs)
    for row in ROWS:
        reads_tower = row.name == "imba" or getattr(row.strong, "needs_tiles", False)
        if reads_tower and name == "llava_onevision":
            with pytest.raises(UnsupportedModel, match="vision tower"):
                vlmfix.wrap(tiny.model, row.strong)
            continue
        if row.name == "fastv" and name == "aya_vision":
            with pytest.raises(UnsupportedModel, match="sliding"):
                vlmfix.wrap(tiny.model, row.strong)
            continue
        with vlmfix.wrapped(tiny.model, row.strong):
            assert (logits(tiny.model, inputs) - plain).abs().max() > 1e-3
    assert torch.equal(logits(tiny.model, inputs), plain)


def test_inputs_that_hide_the_image_are_refused(tiny: Any) -> None:
    inputs = tiny.inputs(1)
    embeds = tiny.model.get_input_embeddings()(inputs["input_ids"])
    with vlmfix.wrapped(tiny.model, STRONG["pai"]):
        with pytest.raises(BadInput, match="input_ids"):
            tiny.model.generate(inputs_embeds=embeds, **generate_kwargs())
        with pytest.raises(BadInput, match="input_ids"):
            tiny.model(inputs_embeds=embeds)
        with pytest.raises(BadInput, match="no image token"):
            tiny.model(**{**inputs, "input_ids": inputs["input_ids"].clamp(max=80)})
        with vlmfix.using(tiny.model, None):
            tiny.model(inputs_embeds=embeds)


def test_cache_filled_without_the_method_is_refused(tiny: Any) -> None:
    inputs = tiny.inputs(1)
    step = {"input_ids": torch.tensor([[7]]), "attention_mask": None}
    with vlmfix.wrapped(tiny.model, STRONG["var"]), torch.no_grad():
        cache = DynamicCache(config=tiny.model.config.get_text_config())
        with vlmfix.using(tiny.model, None):
            tiny.model(**inputs, past_key_values=cache)
        with pytest.raises(StateError, match="no method has seen"):
            tiny.model(**step, past_key_values=cache)
        longer = torch.nn.functional.pad(inputs["input_ids"], (0, 3), value=7)
        with pytest.raises(StateError, match="no method has seen"):
            tiny.model.generate(
                input_ids=longer, attention_mask=torch.ones_like(longer), past_key_values=cache,
                **generate_kwargs(),
            )  # fmt: skip
        cache = DynamicCache(config=tiny.model.config.get_text_config())
        with vlmfix.using(tiny.model, STRONG["pai"]):
            tiny.model(**inputs, past_key_values=cache)
        with pytest.raises(StateError, match="was off"):
            tiny.model(**step, past_key_values=cache)


def test_layer_that_bypasses_the_interface_is_reported(tiny: Any) -> None:
    """A modeling file that calls its attention directly must not look as if it were edited."""
    attention = tiny.model.model.language_model.layers[1].self_attn
    with vlmfix.wrapped(tiny.model, STRONG["pai"]):
        kept = attention.config
        attention.config = copy.copy(kept)
        attention.config._attn_implementation_internal = "sdpa"
        with pytest.raises(UnsupportedModel, match=r"layers \[1\]"):
            tiny.model(**tiny.inputs(1))
        attention.config = kept


def test_text_only_rows_and_prompts_pass_through(tiny: Any) -> None:
    text = torch.tensor([[1, 5, 9, 20, 31]])
    plain = logits(tiny.model, {"input_ids": text})
    for row in ROWS:
        if row.name == "head_pursuit":
            continue  # its edit does not depend on an image
        with vlmfix.wrapped(tiny.model, row.text_only or row.strong):
            assert torch.equal(logits(tiny.model, {"input_ids": text}), plain)
            assert vlmfix.last_call(tiny.model).edited_rows == 0


def test_bfloat16_runs_and_stays_close() -> None:
    """Close where an edit is smooth; a method that chooses heads may choose others by rounding."""
    smooth = ("pai", "vaf", "var", "imba")
    tiny = build("llava")
    inputs = tiny.inputs(2)
    half = build("llava").model.to(torch.bfloat16)
    inputs16 = {**inputs, "pixel_values": inputs["pixel_values"].to(torch.bfloat16)}
    plain_error = (logits(half, inputs16).float() - logits(tiny.model, inputs)).abs().max()
    for row in ROWS:
        with vlmfix.wrapped(tiny.model, row.strong):
            exact = logits(tiny.model, inputs)
        with vlmfix.wrapped(half, row.strong):
            got = logits(half, inputs16)
            assert changed(half) > 0
        combined = isinstance(row.strong, ContrastMethod)
        assert got.dtype == (torch.float32 if combined else torch.bfloat16)
        assert got.isfinite().all()
        if row.name in smooth:
            assert (got.float() - exact).abs().max() <= 3 * plain_error + 0.05
