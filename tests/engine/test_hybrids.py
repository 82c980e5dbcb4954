"""Branches on decoders whose KV cache keeps more than keys and values per token.

Linear attention and convolutions keep states per row, sparse attention keys of its own; the states
of branches are put beside those of the prompts, and every step is one forward all the same.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import pytest
import torch
from contrast_oracle import Oracle
from matrix import ROWS, family, logits
from tiny import build
from transformers import (
    CompileConfig,
    DynamicCache,
    LogitsProcessorList,
    SuppressTokensLogitsProcessor,
)

import vlmfix
from vlmfix.analysis.doctor import examine
from vlmfix.base.contrast import Branch, ContrastMethod, Prompt
from vlmfix.errors import CompositionError, StateError, UnsupportedModel
from vlmfix.families import describe_model

PUBLISHED: dict[str, Any] = {row.name: row.strong for row in ROWS}
#: Gated delta rule (Qwen 3.5) with sparse attention next to it (Qwen 4), short convolutions (LFM),
#: Mamba with layers that keep nothing (Nemotron), and relatives.
FAMILIES = (
    "qwen3_5", "qwen3_5_moe", "qwen4_exp", "lfm2_vl", "lfm3_vl", "minicpmv4_6", "minicpmv4_7",
    "nemotron_h_omni",
)  # fmt: skip

STATIC = {"cache_implementation": "static", "disable_compile": True}
LOOKUP = {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}
MODES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "greedy": ({}, {}),
    "sampling twice": ({"do_sample": True, "num_return_sequences": 2}, {}),
    "beams": ({"num_beams": 3}, {}),
    "static": ({}, STATIC),
    "static beams": ({"num_beams": 3}, STATIC),
    "no cache": ({"num_beams": 3}, {"use_cache": False}),
    "chunks": ({"num_beams": 3}, {"prefill_chunk_size": 5}),
}
NEVER = [2, *range(90, 100)]


@dataclass(frozen=True)
class Overwritten(ContrastMethod):
    """Every other visual token becomes a vector of its own, in one of its branches."""

    name: ClassVar[str] = "overwritten"

    def streams(self) -> int:
        return 1

    def neutral(self) -> bool:
        return False

    def branches(self, prompt: Prompt) -> Sequence[Branch]:
        place = prompt.visual.cumsum(1)
        fill = (place[..., None] * torch.arange(1, 1 + prompt.info.hidden_size)).sin()
        return [Branch(filled=prompt.visual & (place % 2 == 1), fill=fill)]

    def contrast(
        self, base: torch.Tensor, branches: Sequence[torch.Tensor], token: torch.Tensor
    ) -> torch.Tensor:
        return base + (1 + 0.2 * token[:, None]) * (base - branches[0])


METHODS = (PUBLISHED["m3id"], PUBLISHED["vcd"], Overwritten())


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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return model.generate(**inputs, **arguments)


@cache
def _oracle(name: str, method: ContrastMethod) -> Oracle:
    tiny = family(name)
    inputs = tiny.inputs(3, seed=3)
    prepared = method.prepared(describe_model(tiny.model), tiny.model)
    assert isinstance(prepared, ContrastMethod)
    return Oracle(tiny, [tiny.single(inputs, row) for row in range(3)], prepared)


def _close(one: torch.Tensor, other: torch.Tensor) -> None:
    """A recurrence passes its rounding on, and the weights of a contrast enlarge it."""
    one, other = one.log_softmax(-1), other.log_softmax(-1)
    likely = other > -1e3
    assert torch.equal(one > -1e3, likely)
    assert torch.allclose(one[likely], other[likely], rtol=0, atol=1e-3)


def _wanted(name: str, method: ContrastMethod, choice: dict[str, Any], rows: Sequence[int]) -> Any:
    tiny = family(name)
    inputs = tiny.inputs(3, seed=3)
    if len(rows) == 1:
        inputs = tiny.single(inputs, rows[0])
    suppress = SuppressTokensLogitsProcessor(NEVER)
    processors = LogitsProcessorList([_oracle(name, method).processor(*rows), suppress])
    return _generate(
        tiny.model, inputs, **choice, use_cache=False, logits_processor=processors,
        suppress_tokens=None,
    )  # fmt: skip


@pytest.mark.rotated
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("name", FAMILIES)
def test_equals_the_oracle(name: str, method: ContrastMethod, mode: str) -> None:
    if name == "qwen4_exp" and mode.startswith("static"):
        pytest.skip("refused, see below")
    tiny = family(name)
    inputs = tiny.inputs(3, seed=3)
    assert (inputs["attention_mask"] == 0).any()
    choice, forwards = MODES[mode]
    wanted = _wanted(name, method, choice, (0, 1, 2))
    plain = logits(tiny.model, inputs)
    with vlmfix.wrapped(tiny.model, method):
        got = _generate(tiny.model, inputs, **choice, **forwards)
        report = vlmfix.last_call(tiny.model)
    assert torch.equal(logits(tiny.model, inputs), plain)
    assert report.streams == 2 and report.contrasted_rows > 0
    assert torch.equal(got.sequences, wanted.sequences)
    for one, other in zip(got.scores, wanted.scores, strict=True):
        _close(one, other)


@pytest.mark.parametrize("method", [METHODS[0], METHODS[2]], ids=lambda method: method.name)
def test_drafts_are_undone_in_the_convolutions_of_branches_too(method: ContrastMethod) -> None:
    tiny = family("lfm2_vl")
    inputs = tiny.single(tiny.inputs(3, seed=3), 2)
    queries = []
    with vlmfix.wrapped(tiny.model, method):
        hook = tiny.model.register_forward_pre_hook(
            lambda module, args, kwargs: queries.append(kwargs["input_ids"].shape[1]),
            with_kwargs=True,
        )
        got = _generate(tiny.model, inputs, **LOOKUP, max_new_tokens=16)
        hook.remove()
    assert max(queries[2:]) > 1  # behind the prompt and its branch
    oracle = _oracle("lfm2_vl", method)
    length = inputs["input_ids"].shape[1]
    for step, raw in enumerate(got.logits):
        _close(raw[0], oracle.logits(2, got.sequences[0, length : length + step]))


@pytest.mark.rotated
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("name", FAMILIES)
def test_forwards_behind_each_other_and_several_tokens_at_once(
    name: str, method: ContrastMethod
) -> None:
    tiny, oracle = family(name), _oracle(name, method)
    inputs = tiny.inputs(3, seed=3)
    cache, mask = DynamicCache(config=tiny.model.config.get_text_config()), inputs["attention_mask"]
    with vlmfix.wrapped(tiny.model, method):
        got = {0: logits(tiny.model, inputs, past_key_values=cache)}
        for tokens in ([11], [12, 13, 14], [15]):
            ids = torch.tensor([tokens]).expand(3, -1)
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
            step = {"input_ids": ids, "attention_mask": mask}
            got[tokens[-1] - 10] = logits(tiny.model, step, past_key_values=cache)
    for length, one in got.items():
        answer = torch.arange(11, 11 + length)
        _close(one, torch.stack([oracle.logits(row, answer) for row in range(3)]))


@pytest.mark.parametrize("name", ["qwen3_5", "lfm2_vl"])
def test_a_second_prompt_in_a_cache_that_was_reset(name: str) -> None:
    tiny = family(name)
    cache = DynamicCache(config=tiny.model.config.get_text_config())
    first, second = tiny.inputs(3, seed=1), tiny.inputs(2, seed=2)
    with vlmfix.wrapped(tiny.model, PUBLISHED["m3id"]):
        wanted = _generate(tiny.model, second)
        _generate(tiny.model, first, past_key_values=cache)
        cache.reset()
        got = _generate(tiny.model, second, past_key_values=cache)
    assert torch.equal(got.sequences, wanted.sequences)
    for one, other in zip(got.logits, wanted.logits, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["qwen3_5", "nemotron_h_omni"])
def test_the_plain_model_cannot_go_on_from_the_cache_and_the_method_can(name: str) -> None:
    tiny = family(name)
    inputs = tiny.single(tiny.inputs(1), 0)
    with vlmfix.wrapped(tiny.model, PUBLISHED["m3id"]):
        turn = _generate(tiny.model, inputs)
        ids = torch.cat([turn.sequences, torch.tensor([[11, 12]])], 1)
        later = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        spare = copy.deepcopy(turn.past_key_values)
        refused = pytest.raises(StateError, match="holds 2 rows, 1 of prompts")
        with refused, vlmfix.using(tiny.model, None):
            _generate(tiny.model, later, past_key_values=spare)
        got = _generate(tiny.model, later, past_key_values=turn.past_key_values)
    earlier = ids[0, inputs["input_ids"].shape[1] :]
    method = PUBLISHED["m3id"].prepared(describe_model(tiny.model), tiny.model)
    oracle = Oracle(tiny, [inputs], method, earlier=earlier)
    for step, raw in enumerate(got.logits):
        _close(raw[0], oracle.logits(0, got.sequences[0, ids.shape[1] : ids.shape[1] + step]))


@pytest.mark.parametrize("name", ["qwen3_5", "lfm2_vl"])
def test_beams_reorder_the_states_of_branches(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle sees where they are not: then those of the base alone are."""
    from transformers.cache_utils import LinearAttentionLayer

    method = PUBLISHED["m3id"]
    wanted = _wanted(name, method, {"num_beams": 3}, (0, 1, 2))
    reorder = LinearAttentionLayer.reorder_cache

    def base_alone(self: Any, beams: torch.Tensor) -> None:
        own = beams.clone()
        if len(own) == 2 * 9:
            own[9:] = torch.arange(9, 18)
        reorder(self, own)

    tiny = family(name)
    inputs = tiny.inputs(3, seed=3)
    with vlmfix.wrapped(tiny.model, method):
        right = _generate(tiny.model, inputs, num_beams=3)
        monkeypatch.setattr(LinearAttentionLayer, "reorder_cache", base_alone)
        spoiled = _generate(tiny.model, inputs, num_beams=3)
    assert torch.equal(right.sequences, wanted.sequences)
    differences = [
        (one - other).abs().max() for one, other in zip(spoiled.logits, right.logits, strict=True)
    ]
    assert max(differences) > 0.1


@pytest.mark.parametrize("name", ["qwen3_5", "nemotron_h_omni", "lfm2_vl"])
def test_what_stands_at_hidden_tokens_does_not_matter(name: str) -> None:
    """Linear attention takes them for padding."""

    @dataclass(frozen=True)
    class Hidden(Overwritten):
        fill: float = 0.0

        def branches(self, prompt: Prompt) -> Sequence[Branch]:
            hidden = prompt.visual & (prompt.visual.cumsum(1) % 2 == 1)
            return [Branch(hidden=hidden, filled=hidden, fill=self.fill)]

    tiny = family(name)
    inputs = tiny.inputs(2, seed=3)
    found = []
    for fill in (0.0, 5.0):
        with vlmfix.wrapped(tiny.model, Hidden(fill)):
            found.append(torch.stack(_generate(tiny.model, inputs).logits))
            alone = logits(tiny.model, tiny.single(inputs, 0))
            assert torch.allclose(alone, found[-1][0, :1], rtol=0, atol=1e-3)
    assert torch.allclose(*found, rtol=0, atol=1e-5)
    plain = torch.stack(_generate(tiny.model, inputs).logits)
    assert (plain - found[0]).abs().max() > 0.1


def test_a_compiled_hybrid_equals_eager() -> None:
    tiny = build("qwen3_5")
    inputs = tiny.inputs(3, seed=3)
    config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    config._compile_all_devices = True
    torch.compiler.reset()
    with vlmfix.wrapped(tiny.model, [PUBLISHED["pai"], PUBLISHED["m3id"]]):
        wanted = _generate(tiny.model, inputs)
        got = _generate(tiny.model, inputs, cache_implementation="static", compile_config=config)
    assert torch.equal(got.sequences, wanted.sequences)
    for one, other in zip(got.logits, wanted.logits, strict=True):
        _close(one, other)


# -- refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("unlimited_ocr", "UnlimitedOcrDynamicReferenceSlidingWindowLayer"),
        ("minimax_m3_vl", "MiniMaxM3VLSparseCacheLayer"),
    ],
)
def test_caches_whose_rows_cannot_be_joined_are_refused_at_once(name: str, layer: str) -> None:
    model = build(name).model
    rows = {row["name"]: row for row in examine(model)["methods"]}
    for method in ("vcd", "m3id", "avc"):
        with pytest.raises(UnsupportedModel, match=f"{layer}.*cannot be joined") as refusal:
            vlmfix.wrap(model, method)
        assert not rows[method]["fits"] and rows[method]["why"] == str(refusal.value)
    with vlmfix.wrapped(model, PUBLISHED["vcd"].__class__(alpha=0.0)):
        pass  # the control without a contrast runs no branch


@pytest.mark.parametrize("name", ["dots3_note", "glm5_next", "mistral_large4"])
def test_attention_that_chooses_keys_by_the_batch_is_refused(name: str) -> None:
    model = build(name).model
    rows = {row["name"]: row for row in examine(model)["methods"]}
    for method in ("vcd", "m3id", "avc"):
        with pytest.raises(UnsupportedModel, match="chooses other keys in a batch") as refusal:
            vlmfix.wrap(model, method)
        assert not rows[method]["fits"] and rows[method]["why"] == str(refusal.value)


def test_attention_that_cannot_be_read_is_refused_where_a_contrast_reads_it() -> None:
    model = build("inkling").model
    with pytest.raises(UnsupportedModel, match="hands position_bias"):
        vlmfix.wrap(model, "avc")
    with vlmfix.wrapped(model, "m3id"):
        pass


def test_a_static_cache_of_sparse_attention_is_refused_with_the_way_out() -> None:
    tiny = family("qwen4_exp")
    refused = pytest.raises(CompositionError, match=r"StaticIndexedLayer.*with a dynamic cache")
    with vlmfix.wrapped(tiny.model, PUBLISHED["m3id"]), refused:
        _generate(tiny.model, tiny.inputs(1), **STATIC)
