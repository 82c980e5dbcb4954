"""The primitives of the attention function, on tensors and inside a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import pytest
import torch
from matrix import ROWS, family, logits, prompt
from prompts import observed
from tiny import build, generate_kwargs

import vlmfix
import vlmfix.engine.attention
import vlmfix.engine.attention_stage
import vlmfix.engine.probe
import vlmfix.engine.session
from vlmfix.base.attention import AttentionMethod, Keys, Plan, ProbePass
from vlmfix.base.observer import Observer, Rows, SeenRows
from vlmfix.families import ModelInfo, describe_model
from vlmfix.families.tower import Received, Tower
from vlmfix.kernels import reference


def _exact(q: Any, k: Any, v: Any, mask: Any, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention as the textbook writes it, in float64, key heads repeated."""
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double(), v.double()
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = scaling * q @ k.mT
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1)
    return weights, weights @ v


@pytest.mark.parametrize(("heads", "key_heads"), [(8, 8), (8, 2), (7, 1)])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_path_against_float64(heads: int, key_heads: int, rows: int, dtype: Any) -> None:
    generator = torch.Generator().manual_seed(heads + rows)
    batch, keys, width = 2, 77, 20
    q = torch.randn(batch, rows, heads, width, generator=generator).to(dtype).transpose(1, 2)
    k, v = (torch.randn(batch, key_heads, 2 * keys, width, generator=generator) for _ in "kv")
    k, v = k.to(dtype)[:, :, :keys], v.to(dtype)[:, :, :keys]  # views of a larger cache
    mask = torch.rand(batch, 1, rows, keys, generator=generator) > 0.3
    weights, expected = _exact(q, k, v, mask, 0.21)
    scores = reference.row_scores(q, k, 0.21)
    got_weights = reference.mask_scores(scores, mask).softmax(-1)
    got = reference.attend(got_weights, v)
    assert got.shape == expected.shape and got.dtype == dtype
    tolerance = 2e-6 if dtype == torch.float32 else 3e-2
    assert (got_weights - weights).abs().max() < tolerance
    assert (got - expected).abs().max() < tolerance
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    assert torch.equal(reference.mask_scores(scores, additive).softmax(-1) == 0, got_weights == 0)


def test_softcap() -> None:
    q, k = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 9, 8)
    plain = reference.row_scores(q, k, 3.0)
    assert torch.allclose(reference.row_scores(q, k, 3.0, 5.0), 5 * torch.tanh(plain / 5))


# -- inside a model --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Everywhere(AttentionMethod):
    """Base of the test methods: all layers, all samples, nothing prepared."""

    name: ClassVar[str] = "everywhere"

    def layers(self, info: ModelInfo) -> Sequence[int]:
        return range(info.num_layers)

    def plan(self, keys: Keys) -> Plan | None:
        return Plan({}, [True] * keys.kinds.shape[0])


@dataclass(frozen=True, eq=False)
class Both(Observer):
    """Sees rows and head outputs."""

    weights: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    heads: dict[int, list[torch.Tensor]] = field(default_factory=dict)

    def see_weights(self, rows: SeenRows) -> None:
        self.weights.setdefault(rows.layer, []).append(rows.weights)

    def see_heads(self, layer: int, outputs: torch.Tensor) -> None:
        self.heads.setdefault(layer, []).append(outputs)


@dataclass(frozen=True)
class NoOp(Everywhere):
    """A row edit that changes nothing, on every text row: the row path against the model's own."""

    rows: ClassVar[Literal["predicting", "text"]] = "text"

    def edit_weights(
        self, weights: torch.Tensor, **plan: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return weights, torch.ones_like(weights[..., 0], dtype=torch.bool)


@dataclass(frozen=True)
class Scale(Everywhere):
    """Head scale: doubles the first head, decided from the head outputs."""

    factor: float = 2.0

    def head_scale(self, outputs: torch.Tensor, **plan: torch.Tensor) -> torch.Tensor:
        scale = torch.ones_like(outputs[..., 0])
        scale[:, 0] = self.factor
        return scale


@dataclass(frozen=True)
class ScaleStep(Scale):
    head_scale_from: ClassVar[Literal["prompt", "step"]] = "step"


@dataclass(frozen=True)
class ScaleWithImage(Scale):
    """Scales the heads of rows with an image; plans other rows as nothing to edit."""

    def plan(self, keys: Keys) -> Plan | None:
        return Plan({}, keys.visual.any(1).tolist())


FAMILIES = ("llava", "qwen2_5_vl", "gemma3", "paligemma")


@pytest.mark.parametrize("name", FAMILIES)
def test_row_path_equals_the_models_own_attention(name: str) -> None:
    tiny = family(name)
    inputs = prompt(tiny)
    plain, tokens = logits(tiny.model, inputs), tiny.model.generate(**inputs, **generate_kwargs())
    with vlmfix.wrapped(tiny.model, NoOp()):
        assert torch.allclose(logits(tiny.model, inputs), plain, atol=1e-4)
        assert vlmfix.last_call(tiny.model).edited_rows > 0
        assert torch.equal(tiny.model.generate(**inputs, **generate_kwargs()), tokens)


def test_rows_of_text_are_those_after_the_image() -> None:
    tiny = family("llava")
    inputs = prompt(tiny)
    info = describe_model(tiny.model)
    with vlmfix.wrapped(tiny.model, NoOp()):
        logits(tiny.model, inputs)
        report = vlmfix.last_call(tiny.model)
    after = (inputs["input_ids"] == 90).flip(1).int().argmax(1)  # text tokens behind the image
    assert report.edited_rows == int(after.sum()) * info.num_heads * info.num_layers
    assert (inputs["input_ids"][:, 0] != 90).all()  # there is text before it, too


def test_each_method_of_a_stack_edits_its_own_rows_only() -> None:
    """The window of a stack is the union of its rows; PAI must not spread to VAR's rows."""
    tiny = family("llava")
    inputs = prompt(tiny)
    valid = inputs["attention_mask"][:, :-1].bool()
    outputs = []
    for stack in ([NoOp()], [NoOp(), "pai:alpha=0.5;start_layer=0"]):
        with vlmfix.wrapped(tiny.model, stack), torch.no_grad():
            outputs.append(tiny.model(**inputs).logits)
    assert torch.equal(outputs[0][:, :-1][valid], outputs[1][:, :-1][valid])
    assert (outputs[0][:, -1] - outputs[1][:, -1]).abs().max() > 1e-3


def test_rows_are_edited_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = family("llava")
    inputs = prompt(tiny)
    strong = next(row.strong for row in ROWS if row.name == "var")
    with vlmfix.wrapped(tiny.model, strong):
        whole = logits(tiny.model, inputs)
        rows = vlmfix.last_call(tiny.model).edited_rows
        row_bytes = 4 * 3 * 4 * inputs["input_ids"].shape[1]
        monkeypatch.setattr(vlmfix.engine.attention, "_CHUNK_BYTES", 2 * row_bytes)
        assert torch.allclose(logits(tiny.model, inputs), whole, atol=1e-6)
        assert vlmfix.last_call(tiny.model).edited_rows == rows > 0


@pytest.mark.parametrize("name", FAMILIES)
def test_row_probe_gives_the_attention_that_eager_gives(name: str) -> None:
    tiny = family(name)
    inputs = prompt(tiny)
    keep = inputs["attention_mask"].bool()
    probe = Both(range(describe_model(tiny.model).num_layers))
    assert torch.equal(observed(tiny.model, inputs, probe), logits(tiny.model, inputs))
    text = tiny.model.config.get_text_config()
    before = text._attn_implementation
    tiny.model.set_attn_implementation({"text_config": "eager"})
    with torch.no_grad():
        eager = tiny.model(**inputs, output_attentions=True).attentions
    tiny.model.set_attn_implementation({"text_config": before})
    assert sorted(probe.weights) == list(range(len(eager)))
    for layer, rows in probe.weights.items():
        got, expected = rows[0][:, :, -1], eager[layer][:, :, -1]
        assert torch.allclose(got.sum(-1), torch.ones(()), atol=1e-5)
        valid = keep[:, None].expand_as(got)
        assert torch.allclose(got[valid], expected[valid], atol=1e-5)


def test_head_probe_sees_what_enters_o_proj() -> None:
    tiny = family("llava")
    inputs = prompt(tiny)
    info = describe_model(tiny.model)
    entered: dict[int, torch.Tensor] = {}
    handles = []
    for layer, module in info.attention.items():
        o_proj: Any = module.o_proj
        handles.append(
            o_proj.register_forward_pre_hook(
                lambda m, args, layer=layer: entered.update({layer: args[0][:, -1]})
            )
        )
    probe = Both(range(info.num_layers))
    observed(tiny.model, inputs, probe)
    for handle in handles:
        handle.remove()
    for layer, outputs in probe.heads.items():
        assert outputs[0].shape == (3, info.num_heads, 1, info.head_dim)
        assert torch.equal(outputs[0].flatten(1), entered[layer])
    assert len(probe.heads) == info.num_layers


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_head_scale_equals_scaled_columns_of_o_proj(name: str, use_cache: bool) -> None:
    """o_proj(scale * heads) = heads through o_proj whose columns of that head are scaled."""
    tiny = family(name)
    inputs = prompt(tiny)
    info = describe_model(tiny.model)
    kwargs = generate_kwargs(use_cache=use_cache)
    plain = logits(tiny.model, inputs)
    with vlmfix.wrapped(tiny.model, Scale()):
        got, tokens = logits(tiny.model, inputs), tiny.model.generate(**inputs, **kwargs)
        report = vlmfix.last_call(tiny.model)
    weights = [module.o_proj.weight for module in info.attention.values()]
    with torch.no_grad():
        for weight in weights:
            weight[:, : info.head_dim] *= 2
        expected = logits(tiny.model, inputs)
        expected_tokens = tiny.model.generate(**inputs, **kwargs)
        for weight in weights:
            weight[:, : info.head_dim] /= 2
    assert torch.allclose(got, expected, atol=1e-4)
    assert torch.equal(tokens, expected_tokens) and (got - plain).abs().max() > 1e-3
    assert report.edited_rows > 0


def test_head_scale_per_step_touches_predicting_rows_only() -> None:
    tiny = family("llava")
    inputs = prompt(tiny)
    with vlmfix.wrapped(tiny.model, ScaleStep()), torch.no_grad():
        scaled = tiny.model(**inputs).logits
        batch = tiny.model.generate(**inputs, **generate_kwargs())
        uncached = tiny.model.generate(**inputs, **generate_kwargs(use_cache=False))
    with torch.no_grad():
        plain = tiny.model(**inputs).logits
    valid = inputs["attention_mask"][:, :-1].bool()
    assert torch.equal(scaled[:, :-1][valid], plain[:, :-1][valid])
    assert (scaled[:, -1] - plain[:, -1]).abs().max() > 1e-3
    assert torch.equal(batch, uncached)


def test_head_scale_from_the_prompt_refuses_a_prefill_in_chunks() -> None:
    tiny = family("llava")
    with (
        vlmfix.wrapped(tiny.model, Scale()),
        pytest.raises(vlmfix.CompositionError, match="prefill_chunk_size"),
    ):
        tiny.model.generate(**prompt(tiny), prefill_chunk_size=5, **generate_kwargs())


# -- preludes --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TextRows(Observer):
    """Keeps the text rows of the layers that it watches, and where the pieces began."""

    starts: list[int] = field(default_factory=list)

    rows: ClassVar[Rows] = "text"

    def see_weights(self, rows: SeenRows) -> None:
        layer, weights, position = rows.layer, rows.weights, rows.position
        new = weights if layer not in self.seen else weights[:, :, 1:]
        self.starts.append(position)
        before = self.seen.get(layer, new[:, :, :0])
        self.seen[layer] = torch.cat([before, new], dim=2)


@dataclass(frozen=True)
class WithPrelude(Everywhere):
    """Looks at the prompt, or at its text alone, and edits nothing."""

    prompt: Literal["whole", "text"] = "whole"
    made: list[TextRows] = field(default_factory=list, hash=False, compare=False)
    plans: list[dict[int, torch.Tensor]] = field(default_factory=list, hash=False, compare=False)

    def probe_pass(self, info: ModelInfo) -> ProbePass | None:
        self.made.append(TextRows(watched=(1,)))
        return ProbePass(self.prompt, self.made[-1])

    def plan(self, keys: Keys) -> Plan | None:
        self.plans.append(dict(keys.seen))
        return None


@dataclass(frozen=True)
class Boost(Everywhere):
    """Doubles the scores of keys that the watched row of its prelude looked at most."""

    def probe_pass(self, info: ModelInfo) -> ProbePass | None:
        return ProbePass("whole", TextRows(watched=(1,)))

    def plan(self, keys: Keys) -> Plan | None:
        row = keys.seen[1][:, 0, -1]
        wide = torch.nn.functional.pad(row, (0, keys.kinds.shape[1] - row.shape[1]))
        return Plan({"wide": wide}, [True] * len(wide))

    def edit_scores(self, scores: torch.Tensor, *, wide: torch.Tensor) -> torch.Tensor:
        return scores + 20 * wide[:, None, None, :]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("mode", [{}, {"use_cache": False}, {"num_beams": 3}])
def test_a_prelude_runs_once_per_prompt_and_changes_nothing(
    name: str, mode: dict[str, Any]
) -> None:
    tiny = family(name)
    inputs = prompt(tiny)
    plain = tiny.model.generate(**inputs, **generate_kwargs(**mode))
    method = WithPrelude()
    with vlmfix.wrapped(tiny.model, method):
        assert torch.equal(tiny.model.generate(**inputs, **generate_kwargs(**mode)), plain)
        report = vlmfix.last_call(tiny.model)
    assert report.passes == report.new_tokens == 6 and report.extra_passes == 1
    assert sum(bool(rows.seen) for rows in method.made) == 1
    assert method.plans and all(plan.keys() == {1} for plan in method.plans)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_prelude_sees_every_text_row_beside_the_one_before(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = family(name)
    inputs = prompt(tiny)
    method = WithPrelude()
    seen = []
    for pieces in (False, True):
        if pieces:
            row_bytes = 4 * 3 * 4 * inputs["input_ids"].shape[1]
            monkeypatch.setattr(vlmfix.engine.attention, "_CHUNK_BYTES", 3 * row_bytes)
        with vlmfix.wrapped(tiny.model, method):
            logits(tiny.model, inputs)
        seen.append(method.made[-1])
    whole, cut = seen
    image = inputs["input_ids"] == 90
    last_visual = image.shape[1] - 1 - image.flip(1).int().argmax(1)
    assert whole.starts == [int(last_visual.min())]  # the row before the first text row
    assert len(cut.starts) > 2
    assert torch.allclose(whole.seen[1], cut.seen[1], atol=1e-6)
    length = inputs["input_ids"].shape[1]
    tiny.model.set_attn_implementation({"text_config": "eager"})
    with torch.no_grad():
        eager = tiny.model(**inputs, output_attentions=True).attentions[1]
    tiny.model.set_attn_implementation({"text_config": "sdpa"})
    rows = eager[:, :, whole.starts[0] :]
    valid = inputs["attention_mask"].bool()[:, whole.starts[0] :]
    assert whole.seen[1].shape == (3, 4, length - whole.starts[0], length)
    got = whole.seen[1].transpose(1, 2)[valid]
    assert torch.allclose(got, rows.transpose(1, 2)[valid], atol=1e-5)


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_rerun_of_the_last_token_equals_a_prefill_of_its_own(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Crop by one and rerun: same logits and same cache as two whole prefills."""
    tiny = family(name)
    inputs = prompt(tiny)
    reruns: list[str] = []
    original = vlmfix.engine.attention_stage.run_last_token

    def spy(*args: Any) -> Any:
        reruns.append(name)
        return original(*args)

    monkeypatch.setattr(vlmfix.engine.attention_stage, "run_last_token", spy)
    kwargs = generate_kwargs(output_logits=True, return_dict_in_generate=True)
    results = []
    for rerun in (True, False):
        if not rerun:
            monkeypatch.setattr(vlmfix.engine.probe, "can_rerun", lambda *args: False)
        with vlmfix.wrapped(tiny.model, Boost()):
            results.append(tiny.model.generate(**inputs, **kwargs))
            assert vlmfix.last_call(tiny.model).passes == 6
            assert vlmfix.last_call(tiny.model).extra_passes == 1
    assert reruns == [name]
    with_rerun, apart = results
    assert torch.equal(with_rerun.sequences, apart.sequences)
    for one, other in zip(with_rerun.logits, apart.logits, strict=True):
        assert torch.allclose(one, other, atol=1e-4)
    pairs = zip(with_rerun.past_key_values.layers, apart.past_key_values.layers, strict=True)
    for one, other in pairs:
        assert torch.allclose(one.keys, other.keys, atol=1e-4)
        assert torch.allclose(one.values, other.values, atol=1e-4)
    plain = tiny.model.generate(**inputs, **kwargs)
    assert (plain.logits[0] - with_rerun.logits[0]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name", "stack", "kwargs"),
    [
        ("llava", 1, {}),
        ("paligemma", 1, {}),  # its prompt sees the last token
        ("gemma3", 1, {}),  # its sliding caches cannot be cut
        ("llava", 2, {}),  # the other method would edit what is watched
        ("llava", 1, {"cache_implementation": "static", "disable_compile": True}),
        ("llava", 1, {"use_cache": False}),
        ("llava", 1, {"output_hidden_states": True, "return_dict_in_generate": True}),
    ],
)
def test_no_rerun_where_it_is_not_exact(
    name: str, stack: int, kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = family(name)
    reruns: list[str] = []
    original = vlmfix.engine.attention_stage.run_last_token

    def spy(*args: Any) -> Any:
        reruns.append(name)
        return original(*args)

    monkeypatch.setattr(vlmfix.engine.attention_stage, "run_last_token", spy)
    with vlmfix.wrapped(tiny.model, [Boost(), "pai"][:stack]):
        tiny.model.generate(**prompt(tiny), **generate_kwargs(**kwargs))
        assert vlmfix.last_call(tiny.model).extra_passes == 1
    assert bool(reruns) == (name == "llava" and stack == 1 and not kwargs)


def test_no_rerun_with_padding_on_the_right(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import DynamicCache

    tiny = family("llava")
    left = tiny.inputs(2)
    count = int((left["attention_mask"][0] == 0).sum())
    right = {name: left[name].clone() for name in left}
    for name in ("input_ids", "attention_mask"):
        right[name][0] = left[name][0].roll(-count)
    assert count and not right["attention_mask"][0, -1]
    monkeypatch.setattr(
        vlmfix.engine.attention_stage, "run_last_token", lambda *args: pytest.fail("rerun")
    )
    cache = DynamicCache(config=tiny.model.config.get_text_config())
    with vlmfix.wrapped(tiny.model, Boost()):
        logits(tiny.model, right, past_key_values=cache)
        assert vlmfix.last_call(tiny.model).extra_passes == 1


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_prelude_knows_the_question(use_cache: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to look first: with a rerun, and by a forward of its own."""
    tiny = family("llava")
    inputs = tiny.inputs(1)
    content = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    content[:, -3] = True
    question = torch.zeros_like(content)
    question[:, -5:] = True
    monkeypatch.setattr(vlmfix.engine.session, "find_question", lambda *args: (question, content))
    monkeypatch.setattr(Boost, "reads_question", True)
    told: list[SeenRows] = []
    see = TextRows.see_weights

    def keep(self: TextRows, rows: SeenRows) -> None:
        told.append(rows)
        see(self, rows)

    monkeypatch.setattr(TextRows, "see_weights", keep)
    with vlmfix.wrapped(tiny.model, Boost()):
        kwargs = generate_kwargs(use_cache=use_cache)
        tiny.model.generate(**inputs, processor=object(), **kwargs)
    assert len(told) == 1
    assert torch.equal(told[0].content[:, : content.shape[1]], content)
    assert torch.equal(told[0].question[:, : content.shape[1]], question)


def test_the_question_of_every_beam_is_that_of_its_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = family("llava")
    inputs = tiny.inputs(2, lengths=(6, 6))
    question = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    question[0, -3], question[1, -5] = True, True
    monkeypatch.setattr(vlmfix.engine.session, "find_question", lambda *args: (question, question))
    monkeypatch.setattr(Boost, "reads_question", True)
    told: list[Keys] = []
    plan = Boost.plan

    def keep(self: Boost, keys: Keys) -> Plan | None:
        told.append(keys)
        return plan(self, keys)

    monkeypatch.setattr(Boost, "plan", keep)
    with vlmfix.wrapped(tiny.model, Boost()):
        kwargs = generate_kwargs(num_beams=3, max_new_tokens=2, min_new_tokens=2)
        tiny.model.generate(**inputs, processor=object(), **kwargs)
    expected = question.repeat_interleave(3, 0)
    assert told and all(torch.equal(k.question[:, : question.shape[1]], expected) for k in told)


def test_a_prelude_on_the_text_sees_no_image() -> None:
    tiny = family("llava")
    inputs = prompt(tiny)
    method = WithPrelude(prompt="text")
    with vlmfix.wrapped(tiny.model, method):
        logits(tiny.model, inputs)
        assert vlmfix.last_call(tiny.model).extra_passes == 1
    assert not method.made[-1].seen  # no row of a text-only prompt comes after an image


def test_no_image_no_prelude() -> None:
    tiny = family("llava")
    ids = torch.randint(5, 80, (2, 9))
    with vlmfix.wrapped(tiny.model, WithPrelude()):
        logits(tiny.model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        assert vlmfix.last_call(tiny.model).extra_passes == 0


def test_a_report_keeps_its_counts_when_the_next_call_is_compiled() -> None:
    from transformers import CompileConfig

    tiny = build("llava")
    config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    config._compile_all_devices = True
    torch.compiler.reset()
    kwargs = generate_kwargs(cache_implementation="static", compile_config=config)
    with vlmfix.wrapped(tiny.model, "pai:alpha=0.5;start_layer=0"):
        tiny.model.generate(**prompt(tiny), **kwargs)
        call = tiny.model.__dict__[vlmfix.engine.session.SESSION].last_call()
        rows = call.report().edited_rows
        short = {**kwargs, "max_new_tokens": 3, "min_new_tokens": 3}
        tiny.model.generate(**prompt(tiny), **short)
        assert call.report().edited_rows == rows > 0


def test_compiled_head_scale_of_a_prompt_that_had_nothing_to_scale() -> None:
    from transformers import CompileConfig

    tiny = build("llava")
    config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    config._compile_all_devices = True
    torch.compiler.reset()
    kwargs = generate_kwargs(cache_implementation="static", compile_config=config)
    ids = torch.tensor([[1, 5, 9, 20, 31]])
    plain = tiny.model.generate(input_ids=ids, **generate_kwargs())
    with vlmfix.wrapped(tiny.model, ScaleWithImage()):
        assert torch.equal(tiny.model.generate(input_ids=ids, **kwargs), plain)
        assert vlmfix.last_call(tiny.model).edited_rows == 0


# -- the vision tower ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Looks(Everywhere):
    """Lifts visual tokens by what they receive in one layer of the tower."""

    tower_layer: int = 0

    def encoder_layers(self, tower: Tower) -> tuple[int, ...]:
        return (self.tower_layer,)

    def image_values(self, received: Sequence[Received]) -> torch.Tensor:
        return received[0].column

    def plan(self, keys: Keys) -> Plan | None:
        assert keys.image_values is not None
        return Plan({"values": keys.image_values}, keys.visual.any(1).tolist())

    def edit_scores(self, scores: torch.Tensor, *, values: torch.Tensor) -> torch.Tensor:
        return scores + 10 * values[:, None, None, :]


def test_methods_that_read_other_layers_of_the_tower_take_turns() -> None:
    tiny = family("llava")
    inputs = prompt(tiny)
    alone = []
    for layer in (0, 1):
        with vlmfix.wrapped(tiny.model, Looks(tower_layer=layer)):
            alone.append(logits(tiny.model, inputs))
    assert (alone[0] - alone[1]).abs().max() > 1e-4
    with vlmfix.wrapped(tiny.model, Looks(tower_layer=0)):
        with vlmfix.using(tiny.model, Looks(tower_layer=1)):
            assert torch.equal(logits(tiny.model, inputs), alone[1])
        assert torch.equal(logits(tiny.model, inputs), alone[0])


@pytest.mark.slow
def test_compiled_prefill_in_chunks() -> None:
    """generate() compiles chunks of a prompt, too; those are no decode steps."""
    from transformers import CompileConfig

    tiny = build("llava")
    inputs = prompt(tiny)
    config = CompileConfig(fullgraph=False, backend="eager", mode=None)
    config._compile_all_devices = True
    kwargs = generate_kwargs(
        cache_implementation="static", compile_config=config, prefill_chunk_size=7
    )
    plain = tiny.model.generate(**inputs, **generate_kwargs())
    with vlmfix.wrapped(tiny.model, "pai:alpha=0.5;start_layer=0"):
        expected = tiny.model.generate(**inputs, **generate_kwargs())
        assert torch.equal(tiny.model.generate(**inputs, **kwargs), expected)
    assert not torch.equal(plain, expected)
