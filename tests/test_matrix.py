"""Methods x families x generation modes on tiny random models."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from matrix import CELLS, IDS, MODES, ROWS, Row, changed, family, logits, primitive, prompt
from pruning_oracle import cut_by_hand
from tiny import FAMILIES, build, generate_kwargs
from transformers import DynamicCache

import vlmfix
import vlmfix.engine.attention
from vlmfix.base.attention import AttentionMethod
from vlmfix.base.pruning import PruningMethod, TokenMethod

cells = pytest.mark.parametrize(("row", "name"), CELLS, ids=IDS)


#: Families whose images are bidirectional, which a prefill in chunks cuts.
NO_CHUNKS = ("gemma3", "paligemma")


def _cell(case: Mapping[str, Any]) -> Iterator[Hashable]:
    """What a case of a generation mode shows: a pair of method, family and mode."""
    row, name = case["row"], case["name"]
    mode = (case["test"], case.get("mode", case.get("chunk")))
    chunks, static = "chunk" in case, case.get("mode") == "static cache"
    if name not in row.families or (chunks and name in NO_CHUNKS):
        return  # it is skipped
    yield "method in mode", row.name, mode
    if (chunks and not row.chunks) or (static and not row.static):
        return  # it is refused, on every family alike
    yield "method on family", row.name, name
    yield "family in mode", name, mode


def _graph(case: Mapping[str, Any]) -> Iterator[Hashable]:
    """What a compiled case shows: a method on llava, what methods are made of on other families."""
    row, name = case["row"], case["name"]
    if row.static and name in row.families:  # else it is skipped
        yield row.name if name == "llava" else (primitive(row), name)


def _made_of(case: Mapping[str, Any]) -> Iterator[Hashable]:
    """What a case shows where methods that are made alike behave alike."""
    yield primitive(case["row"])


def _generate(model: Any, inputs: dict[str, Any], mode: str = "greedy") -> torch.Tensor:
    torch.manual_seed(7)  # sampling draws from the global generator
    with warnings.catch_warnings():
        # transformers warns of its own argument names when a mode is asked for by keyword.
        warnings.simplefilter("ignore", UserWarning)
        output: torch.Tensor = model.generate(**inputs, **generate_kwargs(**MODES[mode]))
    return output


@cells
def test_cell_is_not_empty(row: Row, name: str) -> None:
    tiny = family(name)
    inputs = prompt(tiny)
    plain = logits(tiny.model, inputs)
    with vlmfix.wrapped(tiny.model, row.strong):
        edited = logits(tiny.model, inputs)
        assert changed(tiny.model) > 0
        _generate(tiny.model, inputs)
        assert changed(tiny.model) > 0
        report = vlmfix.last_call(tiny.model)
    assert ((edited - plain).abs().amax(1) > 1e-3).any()
    assert report.new_tokens == report.passes == 6
    length = inputs["input_ids"].shape[1]
    shorter = isinstance(row.strong, TokenMethod)
    assert report.prompt_length < length if shorter else report.prompt_length == length


@cells
def test_identity_is_bit_identical(row: Row, name: str) -> None:
    tiny = family(name)
    inputs = prompt(tiny)
    plain, tokens = logits(tiny.model, inputs), _generate(tiny.model, inputs)
    with vlmfix.wrapped(tiny.model, row.identity):
        assert torch.equal(logits(tiny.model, inputs), plain)
        assert torch.equal(_generate(tiny.model, inputs), tokens)
        assert changed(tiny.model) == 0


@pytest.mark.rotated
@cells
def test_null_edit_runs_and_leaves_logits_alone(row: Row, name: str) -> None:
    """An argument of the model's attention that ours does not know shows here first."""
    tiny = family(name)
    inputs = prompt(tiny)
    plain, steps = logits(tiny.model, inputs), _steps(tiny.model, inputs)
    assert not row.null.neutral()
    # A pruning method that is asked to keep all has no edit to make small, and says that.
    pruning = isinstance(row.null, PruningMethod)
    said: AbstractContextManager[Any]
    said = pytest.warns(UserWarning, match="drops none") if pruning else nullcontext()
    with vlmfix.wrapped(tiny.model, row.null), said:
        # Contrastive methods may return log-probabilities: the same up to a constant per row.
        for base, edited in (
            (plain, logits(tiny.model, inputs)),
            (steps, _steps(tiny.model, inputs)),
        ):
            difference = edited.log_softmax(-1) - base.log_softmax(-1)
            assert difference.abs().max() < 2e-4 * base.abs().max().clamp_min(1)
        if row.name not in NOTHING_TO_COUNT and row not in PRUNING:
            assert changed(tiny.model) > 0


# AD-HH has no strength: where its trigger does not fire, nothing is edited. FastV drops nothing.
NOTHING_TO_COUNT = ("ad_hh", "fastv")

PRUNING = [row for row in ROWS if isinstance(row.strong, TokenMethod)]
SHORTER = [(row, name) for row, name in CELLS if row in PRUNING]


@pytest.mark.parametrize(("row", "name"), SHORTER, ids=[f"{row.name}-{of}" for row, of in SHORTER])
def test_every_layer_caches_the_shorter_prompt(row: Row, name: str) -> None:
    tiny = family(name)
    inputs = prompt(tiny)
    with vlmfix.wrapped(tiny.model, row.strong):
        kwargs = generate_kwargs(return_dict_in_generate=True)
        cache = tiny.model.generate(**inputs, **kwargs).past_key_values
        report = vlmfix.last_call(tiny.model)
    count = {"llava_next": 80}.get(name, tiny.image_tokens)
    assert report.visual_tokens == ((count // 2, count),) * 3
    # Of LLaVA-NeXT's newlines those go, too, of whose rows nothing is kept.
    newlines = 8 if name == "llava_next" else 0
    lost = inputs["input_ids"].shape[1] - report.prompt_length
    assert 0 <= lost - (count - count // 2) <= newlines
    # The last token that was written is not in the cache.
    assert {layer.get_seq_length() for layer in cache.layers} == {report.prompt_length + 5}


@pytest.mark.rotated(shows=_cell)
@cells
@pytest.mark.parametrize("mode", ["greedy", "beam"])
def test_left_padded_batch_equals_singles(row: Row, name: str, mode: str) -> None:
    tiny = family(name)
    inputs = prompt(tiny)
    assert (inputs["attention_mask"] == 0).any()
    length = inputs["input_ids"].shape[1]
    with vlmfix.wrapped(tiny.model, row.strong):
        batch = _generate(tiny.model, inputs, mode)[:, length:]
        together = logits(tiny.model, inputs)
        for index in range(len(batch)):
            alone = tiny.single(inputs, index)
            tokens = _generate(tiny.model, alone, mode)[0, alone["input_ids"].shape[1] :]
            assert torch.equal(batch[index], tokens)
            assert torch.allclose(together[index], logits(tiny.model, alone)[0], atol=1e-4)


@pytest.mark.rotated(shows=_cell)
@cells
@pytest.mark.parametrize("mode", ["no cache", "static cache"])
def test_other_caches_equal_the_dynamic_cache(row: Row, name: str, mode: str) -> None:
    tiny = family(name)
    inputs = prompt(tiny)
    with vlmfix.wrapped(tiny.model, row.strong):
        if mode == "static cache" and not row.static:
            with pytest.raises(vlmfix.CompositionError, match="Generate with a dynamic cache"):
                _generate(tiny.model, inputs, mode)
            return
        assert torch.equal(_generate(tiny.model, inputs), _generate(tiny.model, inputs, mode))


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_prompts_do_not_share_state(row: Row) -> None:
    tiny = family("llava")
    first, second = tiny.inputs(1, seed=1), tiny.inputs(1, seed=2)
    with vlmfix.wrapped(tiny.model, row.strong):
        alone = _steps(tiny.model, second)
    with vlmfix.wrapped(tiny.model, row.strong):
        assert not torch.allclose(_steps(tiny.model, first), alone, atol=1e-2)
        assert torch.equal(_steps(tiny.model, second), alone)


ATTENTION = [row for row in ROWS if isinstance(row.strong, AttentionMethod)]
PREDICTING = [r for r in ATTENTION if r.strong.rows == "predicting" and r.strong.edits_rows()]


@pytest.mark.parametrize("row", PREDICTING, ids=[row.name for row in PREDICTING])
def test_an_edit_of_predicting_rows_leaves_earlier_cache_entries_alone(row: Row) -> None:
    tiny = family("llava")
    inputs = prompt(tiny)
    caches = []
    for stack in (None, row.strong):
        cache = DynamicCache(config=tiny.model.config.get_text_config())
        with vlmfix.wrapped(tiny.model, stack):
            logits(tiny.model, inputs, past_key_values=cache)
        caches.append([entry for layer in cache.layers for entry in (layer.keys, layer.values)])
    for plain, edited in zip(*caches, strict=True):
        assert torch.equal(plain[:, :, :-1], edited[:, :, :-1])
    assert not torch.equal(caches[0][-1][:, :, -1], caches[1][-1][:, :, -1])


# Without the pixels, which a prompt that is cut by hand has not, these can do nothing.
_SEE_PIXELS = ("imba", "rbd", "vcd")
BESIDE = [
    row for row in ROWS if not isinstance(row.strong, PruningMethod) and row.name not in _SEE_PIXELS
]


@pytest.mark.rotated
@pytest.mark.parametrize("row", BESIDE, ids=[row.name for row in BESIDE])
@pytest.mark.parametrize("pruning", ["hiprune", "ptp", "visionzip"])
def test_methods_beside_pruning_see_the_shorter_prompt(pruning: str, row: Row) -> None:
    """tests/engine/test_prompt_pruning.py has more families and modes."""
    tiny = family("llava")
    inputs = prompt(tiny)
    (method,) = [other.strong for other in PRUNING if other.name == pruning]
    told = [image for own in vlmfix.visual_tokens(tiny.model, inputs, method) for image in own]
    weights = None if told[0].weights is None else [image.weights for image in told]
    by_hand = cut_by_hand(tiny, inputs, [image.index.tolist() for image in told], weights=weights)
    plain = _steps(tiny.model, by_hand)
    with vlmfix.wrapped(tiny.model, row.strong):
        expected = _steps(tiny.model, by_hand)
    for stack in ([method, row.strong], [row.strong, method]):
        with vlmfix.wrapped(tiny.model, stack):
            assert torch.allclose(_steps(tiny.model, inputs), expected, rtol=0, atol=1e-5)
    assert not torch.allclose(expected, plain, atol=1e-3)


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_a_model_loaded_with_eager_attention(row: Row) -> None:
    """Its masks are additive floats, of the cache's capacity where that is static."""
    tiny = build(row.families[0])
    inputs = prompt(tiny)
    with vlmfix.wrapped(tiny.model, row.strong):
        expected = _steps(tiny.model, inputs)
    tiny.model.set_attn_implementation({"text_config": "eager"})
    static = {"cache_implementation": "static", "disable_compile": True}
    with vlmfix.wrapped(tiny.model, row.strong):
        for kwargs in ({}, static) if row.static else ({},):
            assert torch.allclose(_steps(tiny.model, inputs, **kwargs), expected, atol=1e-4)
            assert changed(tiny.model) > 0


@pytest.mark.rotated(shows=_cell)
@cells
@pytest.mark.parametrize("mode", ["sampling", "returns"])
def test_modes_equal_without_cache(row: Row, name: str, mode: str) -> None:
    """Rows that a mode copies and reorders see the same edits as a full recomputation."""
    tiny = family(name)
    inputs = prompt(tiny)
    with vlmfix.wrapped(tiny.model, row.strong):
        cached = _generate(tiny.model, inputs, mode)
        torch.manual_seed(7)
        kwargs = generate_kwargs(**MODES[mode], use_cache=False)
        assert torch.equal(cached, tiny.model.generate(**inputs, **kwargs))


@pytest.mark.rotated(shows=_cell)
@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "internvl", "gemma3"])
def test_streaming_and_prompt_lookup_equal_greedy(row: Row, name: str) -> None:
    from transformers.generation.streamers import BaseStreamer

    class Collect(BaseStreamer):
        def __init__(self) -> None:
            self.ids: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.ids += value.flatten().tolist()

        def end(self) -> None:
            pass

    if name not in row.families:
        pytest.skip(f"{row.name} does not run on {name}")
    tiny = family(name)
    inputs = tiny.single(prompt(tiny), 1)
    with vlmfix.wrapped(tiny.model, row.strong):
        greedy = _generate(tiny.model, inputs)
        collect = Collect()
        tiny.model.generate(**inputs, streamer=collect, **generate_kwargs())
        drafted = tiny.model.generate(
            **inputs, prompt_lookup_num_tokens=3, **generate_kwargs(max_new_tokens=6)
        )
    assert collect.ids[-6:] == greedy[0, -6:].tolist()
    if not isinstance(row.strong, TokenMethod):  # else it gets the prompt that the model runs
        assert collect.ids == greedy[0].tolist()
    assert torch.equal(drafted, greedy)


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_drafts_in_the_first_forward_are_no_part_of_the_prompt(row: Row, name: str) -> None:
    tiny = family(name)
    inputs = tiny.single(prompt(tiny), 2)
    inputs["input_ids"][0, -1] = inputs["input_ids"][0, -3]  # what came before is drafted again
    queries: list[int] = []
    handle = (
        tiny.model.get_decoder()
        .layers[-1]
        .register_forward_pre_hook(lambda module, args: queries.append(args[0].shape[1]))
    )
    lookup = {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}
    try:
        with vlmfix.wrapped(tiny.model, row.strong):
            greedy = _generate(tiny.model, inputs)
            plain = max(queries)
            queries.clear()
            drafted = tiny.model.generate(**inputs, **lookup, **generate_kwargs())
            assert max(queries) > plain
    finally:
        handle.remove()
    assert torch.equal(drafted, greedy)


@pytest.mark.rotated(shows=_cell)
@cells
@pytest.mark.parametrize("chunk", [1, 5])
def test_chunked_prefill_equals_one_prefill(row: Row, name: str, chunk: int) -> None:
    if name in NO_CHUNKS:
        pytest.skip("plain transformers gives other logits: chunks cut its bidirectional image")
    tiny = family(name)
    inputs = prompt(tiny)
    if not row.chunks:
        message = "Generate without prefill_chunk_size"
        with (
            vlmfix.wrapped(tiny.model, row.strong),
            pytest.raises(vlmfix.CompositionError, match=message),
        ):
            tiny.model.generate(**inputs, prefill_chunk_size=chunk, **generate_kwargs())
        return
    plain = tiny.model.generate(**inputs, prefill_chunk_size=chunk, **generate_kwargs())
    if not torch.equal(plain, _generate(tiny.model, inputs)):
        pytest.skip("this transformers does not prefill images in chunks")
    with vlmfix.wrapped(tiny.model, row.strong):
        whole = _generate(tiny.model, inputs)
        chunked = tiny.model.generate(**inputs, prefill_chunk_size=chunk, **generate_kwargs())
    assert torch.equal(chunked, whole)


# A method that cuts prompts is done before a step is compiled: `random` stands for these, and `ptp`
# for those that look at the prompt in the decoder first.
COMPILED = [
    row for row in ROWS if not isinstance(row.strong, TokenMethod) or row.name in ("ptp", "random")
]


@pytest.mark.rotated(shows=_graph)
@pytest.mark.parametrize("row", COMPILED, ids=[row.name for row in COMPILED])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_compiled_static_decoding_is_one_graph_and_equals_greedy(row: Row, name: str) -> None:
    """No graph break, no new graph for another prompt, and nothing is stale after unwrap."""
    from torch._dynamo.utils import counters
    from transformers import CompileConfig

    if name not in row.families or not row.static:
        pytest.skip(f"{row.name} does not run on {name} or not with a static cache")
    tiny = build(name)
    inputs, other = prompt(tiny), prompt(tiny, seed=5)
    config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    config._compile_all_devices = True
    compiled = {"cache_implementation": "static", "compile_config": config}
    plain = _steps(tiny.model, inputs)
    torch.compiler.reset()
    with vlmfix.wrapped(tiny.model, row.strong):
        edited = _steps(tiny.model, inputs)
        rows = changed(tiny.model)
        assert torch.allclose(_steps(tiny.model, inputs, **compiled), edited, atol=1e-4)
        assert changed(tiny.model) == rows > 0
        graphs = counters["stats"]["unique_graphs"]
        again = _steps(tiny.model, other, **compiled)
        rows = changed(tiny.model)
        assert counters["stats"]["unique_graphs"] == graphs > 0
        assert torch.allclose(again, _steps(tiny.model, other), atol=1e-4)
        assert changed(tiny.model) == rows  # counted anew in each call
    assert torch.allclose(_steps(tiny.model, inputs, **compiled), plain, atol=1e-4)
    assert (plain - edited)[1:].abs().max() > 1e-3


@pytest.mark.rotated(shows=_made_of)
@pytest.mark.parametrize("row", COMPILED, ids=[row.name for row in COMPILED])
def test_compiled_step_of_a_prompt_without_an_image_changes_nothing(row: Row) -> None:
    """A compiled step runs every planned layer; with nothing to edit it must edit nothing."""
    from transformers import CompileConfig

    if row.name == "head_pursuit":
        pytest.skip("its edit does not depend on an image")
    tiny = build("llava")
    ids = torch.tensor([[0, 0, 1, 5, 9, 20, 31], [1, 7, 11, 30, 41, 52, 63]])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    config._compile_all_devices = True
    compiled = {"cache_implementation": "static", "compile_config": config}
    plain = _steps(tiny.model, inputs)
    torch.compiler.reset()
    with vlmfix.wrapped(tiny.model, row.text_only or row.strong):
        assert torch.allclose(_steps(tiny.model, inputs, **compiled), plain, atol=1e-4)
        assert changed(tiny.model) == 0


FUSED = [row for row in ROWS if getattr(row.strong, "has_fused_form", False)]


@pytest.mark.rotated
@pytest.mark.parametrize("row", FUSED, ids=[row.name for row in FUSED])
@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_fused_kernel_decodes_what_the_row_path_decodes(row: Row, name: str) -> None:
    """impl="triton", here in Triton's interpreter: eager, and as an operator of one graph."""
    pytest.importorskip("triton")
    from transformers import CompileConfig

    tiny = build(name)
    inputs = prompt(tiny)
    config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    config._compile_all_devices = True
    short = {"max_new_tokens": 2, "min_new_tokens": 2}  # the interpreter takes its time
    torch.compiler.reset()
    compiled = {"cache_implementation": "static", "compile_config": config}
    with vlmfix.wrapped(tiny.model, row.strong, impl="torch"):
        expected = _steps(tiny.model, inputs, **short)
        rows = changed(tiny.model)
    with vlmfix.wrapped(tiny.model, row.strong, impl="triton"):
        for kwargs in ({}, compiled):
            fused = _steps(tiny.model, inputs, **short, **kwargs)
            assert torch.allclose(fused, expected, atol=1e-4)
            assert not torch.equal(fused[1:], expected[1:])  # another implementation did run
            assert changed(tiny.model) == rows


def test_auto_takes_the_kernel_on_a_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = family("llava")

    def refuse(*args: Any, **kwargs: Any) -> None:
        pytest.fail("the kernel ran")

    monkeypatch.setattr(vlmfix.engine.attention.ops, "attend_rows", refuse)
    with vlmfix.wrapped(tiny.model, "pai:alpha=0.5", impl="auto"):
        _generate(tiny.model, prompt(tiny))
        assert changed(tiny.model) > 0


def test_fused_kernel_refuses_what_it_has_no_form_for() -> None:
    tiny = family("llava")
    both = [row.strong for row in FUSED[:2]]
    with pytest.raises(vlmfix.CompositionError, match="one edit per layer"):
        vlmfix.wrap(tiny.model, both, impl="triton")
    without = [row.strong for row in ATTENTION if row not in FUSED and row.strong.edits_rows()]
    for method in without:
        with pytest.raises(vlmfix.CompositionError, match="no fused form"):
            vlmfix.wrap(tiny.model, method, impl="triton")


def _steps(model: Any, inputs: dict[str, Any], **kwargs: Any) -> torch.Tensor:
    """Logits (steps, B, V) of a greedy generate()."""
    out = model.generate(
        **inputs, **generate_kwargs(output_logits=True, return_dict_in_generate=True, **kwargs)
    )
    return torch.stack(out.logits)


@pytest.mark.parametrize("name", FAMILIES)
def test_stack_of_all_differs_from_each(name: str) -> None:
    tiny = family(name)
    inputs = prompt(tiny)
    strong = [row.strong for row in ATTENTION if name in row.families]
    outputs = []
    for stack in (*strong, strong):
        with vlmfix.wrapped(tiny.model, stack):
            outputs.append(logits(tiny.model, inputs))
    both = outputs.pop()
    assert all((both - single).abs().max() > 1e-3 for single in outputs)
