"""Prompts with fewer visual tokens, against the same prompts masked, and cut by hand.

tests/pruning_oracle.py does both without the engine; tests/test_matrix.py runs `random` in every
mode on every family.
"""

from __future__ import annotations

import copy
import functools
import threading
import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from matrix import family
from pruning_oracle import (
    PIXELS,
    FixedTokens,
    MergedPairs,
    cut_by_hand,
    encoded,
    masked_logits,
    one_prompt,
    pairs,
    prompts,
    whole_positions,
)
from tiny import build, generate_kwargs
from tiny_configs import IMAGE, VIDEO, VISION_END, VISION_START
from torch import Tensor
from transformers import CompileConfig, DynamicCache, GenerationConfig
from transformers.generation.streamers import BaseStreamer

import vlmfix
from vlmfix.analysis.doctor import examine
from vlmfix.analysis.maps import attention_map
from vlmfix.base.attention import AttentionMethod, Keys, Plan, lift_scores
from vlmfix.base.contrast import Branch, ContrastMethod, Prompt
from vlmfix.base.pruning import Kept, TokenMethod, VisualTokens
from vlmfix.engine.encoded import CallImages, Reduction
from vlmfix.engine.recorder import VisionRecorder
from vlmfix.engine.session import SESSION
from vlmfix.errors import BadInput, CompositionError, StateError, UnsupportedModel
from vlmfix.families import ModelInfo, describe_model
from vlmfix.families.tower import describe_tower
from vlmfix.methods.avc import AttentionalVisionCalibration
from vlmfix.methods.imba import PayAttentionToInformedTokens
from vlmfix.methods.m3id import MutualInformationDecoding
from vlmfix.methods.pai import PayAttentionToImage
from vlmfix.methods.random_tokens import RandomTokens
from vlmfix.methods.rbd import ReBalancingContrastiveDecoding
from vlmfix.methods.var import VisualAttentionRedistribution
from vlmfix.methods.vcd import VisualContrastiveDecoding
from vlmfix.methods.vhr import VisionAwareHeadReinforcement

Inputs = dict[str, Any]

ONE_AXIS = ("llava", "llava_next", "llava_onevision", "internvl")
M_ROPE = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
NAMES = (*ONE_AXIS, *M_ROPE)
FOUR = ("llava", "qwen2_5_vl", "qwen3_vl", "internvl")

#: What is kept of the one image of each of three prompts, of 16, 88 or 4 placeholders: of
#: LLaVA-NeXT's two whole rows and a part of each of two more, with the newlines of these.
KEPT: dict[str, list[int]] = {
    "llava": [0, 3, 4, 9, 15],
    "llava_next": [2, 7, 16, 19, 24, 61, 63, 68, 69],
    "llava_onevision": [2, 7, 16, 19, 24, 61, 87],
}
#: The same as indices of visual tokens, where newlines are not among them.
CHOSEN: dict[str, list[int]] = {"llava_next": [2, 7, 16, 19, 56, 58, 63]}


def kept_of(name: str) -> list[int]:
    return KEPT.get(name, [0, 2, 3])


def fixed(name: str, **more: Any) -> FixedTokens:
    return FixedTokens(index=(tuple(CHOSEN.get(name, kept_of(name))),), **more)


def generate(model: Any, inputs: Inputs, **kwargs: Any) -> Any:
    """With logits and the cache."""
    torch.manual_seed(7)  # sampling draws from the global generator
    arguments = {"output_logits": True, "return_dict_in_generate": True, **kwargs}
    with warnings.catch_warnings():
        # transformers warns of its own argument names when a mode is asked for by keyword.
        warnings.simplefilter("ignore", UserWarning)
        return model.generate(**inputs, **generate_kwargs(**arguments))


def same(one: Any, other: Any) -> bool:
    """Whether two outputs of generate() have the same logits and new tokens, bit for bit."""
    new = len(one.logits)
    return (
        len(other.logits) == new
        and torch.equal(one.sequences[:, -new:], other.sequences[:, -new:])
        and torch.equal(torch.stack(one.logits), torch.stack(other.logits))
    )


def lengths(cache: Any) -> list[int]:
    return [layer.get_seq_length() for layer in cache.layers]


# -- every token kept ------------------------------------------------------------------------------


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_keeping_all_tokens_is_bit_identical(name: str, beams: int) -> None:
    tiny = family(name)
    inputs = tiny.inputs(batch=3)
    plain = generate(tiny.model, inputs, num_beams=beams)
    assert (inputs["attention_mask"] == 0).any()
    # ratio=1 asks nobody; a budget that no image exceeds finds out when the images are encoded.
    for method in (RandomTokens(ratio=1.0), RandomTokens(tokens=88)):
        with vlmfix.wrapped(tiny.model, method):
            kept = generate(tiny.model, inputs, num_beams=beams)
        assert torch.equal(kept.sequences, plain.sequences)
        assert same(kept, plain)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_keeping_all_tokens_leaves_padding_where_it_is(name: str) -> None:
    tiny = family(name)
    inputs = tiny.inputs(batch=2, lengths=[4, 7])
    for key in ("input_ids", "attention_mask", "mm_token_type_ids"):
        if key in inputs:
            inputs[key][0] = inputs[key][0].roll(-3)
    assert inputs["attention_mask"][0, -3:].tolist() == [0] * 3
    with torch.no_grad():
        plain = tiny.model(**inputs).logits
        with vlmfix.wrapped(tiny.model, RandomTokens(tokens=88)):
            assert torch.equal(tiny.model(**inputs).logits, plain)


def test_a_ratio_of_one_asks_nobody() -> None:
    """What is refused where a prompt is cut is not refused here, and images are encoded once."""
    tiny = build("llava")
    inputs = tiny.inputs()
    runs: list[int] = []
    tiny.model.model.vision_tower.register_forward_hook(lambda *_: runs.append(1))
    with torch.no_grad():
        plain = tiny.model(**inputs, labels=inputs["input_ids"]).loss
        runs.clear()
        with vlmfix.wrapped(tiny.model, RandomTokens(ratio=1.0)):
            assert torch.equal(tiny.model(**inputs, labels=inputs["input_ids"]).loss, plain)
    assert len(runs) == 1


# -- half of the tokens ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_budget_is_kept_exactly(name: str) -> None:
    tiny = family(name)
    inputs = tiny.inputs(batch=3)
    length = inputs["input_ids"].shape[1]
    count = {"llava": 16, "llava_next": 80, "llava_onevision": 88}.get(name, 4)
    for method, kept in ((RandomTokens(ratio=0.5), count // 2), (RandomTokens(tokens=1), 1)):
        with vlmfix.wrapped(tiny.model, method):
            output = generate(tiny.model, inputs)
            report = vlmfix.last_call(tiny.model)
            reductions = tiny.model.__dict__[SESSION].last_call().of(CallImages).reductions
        assert report.visual_tokens == ((kept, count),) * 3
        newlines = [len(one.positions) - kept for one in reductions]
        assert newlines == [newlines[0]] * 3 and (newlines[0] > 0) == (name == "llava_next")
        shorter = length - (tiny.image_tokens - kept - newlines[0])
        assert report.prompt_length == shorter and report.new_tokens == 6
        # The last token that was written is not in the cache.
        assert lengths(output.past_key_values) == [shorter + 5] * len(reductions)
        assert torch.equal(output.sequences[:, :length], inputs["input_ids"])


@pytest.mark.parametrize("name", NAMES)
def test_dropping_equals_masking(name: str) -> None:
    """The prefill and four steps; without M-RoPE where positions keep their gaps."""
    tiny = family(name)
    inputs = tiny.inputs(batch=3)
    length = inputs["input_ids"].shape[1]
    with vlmfix.wrapped(tiny.model, fixed(name, positions="original")):
        output = generate(tiny.model, inputs)
    kept = [kept_of(name)] * 3
    plain = generate(tiny.model, inputs)
    assert (plain.logits[0] - output.logits[0]).abs().max() > 1e-2
    for step in range(5):
        behind = output.sequences[:, length : length + step]
        masked = masked_logits(tiny, inputs, kept, behind)
        assert torch.allclose(output.logits[step], masked, rtol=0, atol=1e-5)
        if step == 0:
            fewer = [kept_of(name)[:-1]] * 3  # the oracle would see one token
            other = masked_logits(tiny, inputs, fewer, behind)
            assert not torch.allclose(output.logits[0], other, rtol=0, atol=1e-3)


_STATIC = {"cache_implementation": "static", "disable_compile": True}
MODES: dict[str, Inputs] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "returns": {"num_beams": 3, "num_return_sequences": 2},
    "samples": {"do_sample": True, "num_return_sequences": 2},
    "static": _STATIC,
    "static beams": {**_STATIC, "num_beams": 3},
    "no cache": {"use_cache": False},
    "chunks": {"prefill_chunk_size": 5},
    "lookup": {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FOUR)
def test_generate_equals_the_plain_model_on_prompts_cut_by_hand(name: str, mode: str) -> None:
    """Bit for bit: nothing but the prompt is touched."""
    tiny = family(name)
    inputs = tiny.inputs(batch=3)
    if mode in ("lookup", "no cache"):  # positions with gaps would read as several prompts
        inputs = tiny.single(inputs, 1)
    batch, length = inputs["input_ids"].shape
    by_hand = cut_by_hand(tiny, inputs, [kept_of(name)] * batch)
    expected = generate(tiny.model, by_hand, **MODES[mode])
    with vlmfix.wrapped(tiny.model, fixed(name)):
        output = generate(tiny.model, inputs, **MODES[mode])
    assert same(output, expected)
    copies = MODES[mode].get("num_return_sequences", 1)
    whole = inputs["input_ids"].repeat_interleave(copies, 0)
    assert torch.equal(output.sequences[:, :length], whole)
    assert output.sequences.shape == (batch * copies, length + len(output.logits))


@pytest.mark.parametrize("name", NAMES)
def test_positions_of_what_is_left(name: str) -> None:
    """Closed up by default; kept if asked for; and M-RoPE keeps them whatever is asked."""
    tiny = family(name)
    inputs = tiny.inputs(batch=3)
    found = {}
    for positions in ("contiguous", "original"):
        by_hand = cut_by_hand(tiny, inputs, [kept_of(name)] * 3, gaps=positions == "original")
        with vlmfix.wrapped(tiny.model, fixed(name, positions=positions)):
            found[positions] = generate(tiny.model, inputs)
        assert same(found[positions], generate(tiny.model, by_hand))
    assert same(*found.values()) == (name in M_ROPE)


@pytest.mark.parametrize("name", ["llava", "internvl"])
def test_positions_of_the_callers_are_cut_or_closed_up_as_the_method_says(name: str) -> None:
    tiny = family(name)
    inputs = tiny.inputs(batch=3)
    given = whole_positions(tiny, inputs)
    found = {}
    for positions in ("original", "contiguous"):
        with vlmfix.wrapped(tiny.model, fixed(name, positions=positions)):
            found[positions] = generate(tiny.model, inputs)
            told = generate(tiny.model, {**inputs, "position_ids": given})
            assert same(told, found[positions])
    assert not same(found["original"], found["contiguous"])


@pytest.mark.parametrize("axes", [1, 3, 4])
@pytest.mark.parametrize("name", M_ROPE)
def test_positions_of_the_callers_are_cut_on_every_axis(name: str, axes: int) -> None:
    """Three axes; four with one that counts tokens, as generate() makes them; one for all three."""
    tiny = family(name)
    inputs = tiny.inputs(batch=3)
    kept = [kept_of(name)] * 3
    text = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    given = whole_positions(tiny, inputs)
    by_hand = cut_by_hand(tiny, inputs, kept)
    if axes == 1:
        given = 2 * text
        stays = cut_by_hand(tiny, {**inputs, "token_type_ids": given}, kept)["token_type_ids"]
        by_hand["position_ids"] = torch.stack([by_hand["position_ids"][0], *[stays] * 3])
    elif axes == 4:
        given = torch.cat([text[None], given])
    with vlmfix.wrapped(tiny.model, fixed(name)), torch.no_grad():
        bare = tiny.model(**inputs, position_ids=given).logits
        output = generate(tiny.model, {**inputs, "position_ids": given})
    with torch.no_grad():
        assert torch.equal(bare, tiny.model(**copy.copy(by_hand)).logits)
    assert same(output, generate(tiny.model, by_hand))


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_masks_over_queries_and_keys(name: str, additive: bool) -> None:
    tiny = family(name)
    inputs = tiny.inputs(batch=2)
    real = inputs["attention_mask"].bool()
    length = real.shape[1]
    mask = real[:, None, None] & torch.ones(length, length, dtype=torch.bool).tril()
    assert not mask.diagonal(dim1=2, dim2=3).all()
    if additive:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    with vlmfix.wrapped(tiny.model, fixed(name)), torch.no_grad():
        expected = tiny.model(**inputs).logits
        assert torch.equal(tiny.model(**{**inputs, "attention_mask": mask}).logits, expected)


@pytest.mark.parametrize("name", ["qwen3_vl", "internvl"])
def test_compiled_steps_are_one_graph(name: str) -> None:
    """tests/test_matrix.py compiles others."""
    from torch._dynamo.utils import counters

    tiny = build(name)
    inputs, other = tiny.inputs(batch=2), tiny.inputs(batch=2, seed=5)
    config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    config._compile_all_devices = True
    compiled = {"cache_implementation": "static", "compile_config": config}
    torch.compiler.reset()
    with vlmfix.wrapped(tiny.model, fixed(name)):
        eager, again = generate(tiny.model, inputs), generate(tiny.model, other)
        output = generate(tiny.model, inputs, **compiled)
        graphs = counters["stats"]["unique_graphs"]
        later = generate(tiny.model, other, **compiled)
        assert counters["stats"]["unique_graphs"] == graphs > 0
    for one, two in ((output, eager), (later, again)):
        assert torch.equal(one.sequences, two.sequences)
        assert torch.allclose(torch.stack(one.logits), torch.stack(two.logits), atol=1e-4)


def test_a_streamer_gets_the_tokens_as_they_come() -> None:
    class Collect(BaseStreamer):
        def __init__(self) -> None:
            self.puts: list[list[int]] = []

        def put(self, value: Tensor) -> None:
            self.puts.append(value.flatten().tolist())

        def end(self) -> None:
            pass

    tiny = family("llava")
    inputs = tiny.inputs()
    collect = Collect()
    with vlmfix.wrapped(tiny.model, fixed("llava")):
        output = tiny.model.generate(**inputs, streamer=collect, **generate_kwargs())
    prompt, *tokens = collect.puts
    assert tokens == [[token] for token in output[0, -6:].tolist()]
    assert prompt == cut_by_hand(tiny, inputs, [kept_of("llava")])["input_ids"][0].tolist()


# -- what is kept of an image ----------------------------------------------------------------------


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", [*NAMES, "gemma3", "paligemma"])
def test_rows_with_different_numbers_of_images_equal_singles(name: str, beams: int) -> None:
    """No image, two and one; the first image of a prompt keeps more than the second."""
    tiny = family(name)
    images = (0, 2, 1)
    inputs = prompts(tiny, images)
    length = inputs["input_ids"].shape[1]
    method = FixedTokens(index=((0, 1, 3), (2,)), positions="original")
    with vlmfix.wrapped(tiny.model, method):
        together = generate(tiny.model, inputs, num_beams=beams)
        sizes = vlmfix.last_call(tiny.model).visual_tokens
        assert [kept for kept, _ in sizes] == [3 if n == 0 else 1 for k in images for n in range(k)]
        for row in range(len(images)):
            alone = generate(tiny.model, one_prompt(inputs, images, row), num_beams=beams)
            assert torch.equal(together.sequences[row, length:], alone.sequences[0, -6:])
            for batch, single in zip(together.logits, alone.logits, strict=True):
                own = batch[row * beams : (row + 1) * beams]
                assert torch.allclose(own, single, rtol=0, atol=1e-5)
    if beams == 1 and name in ("llava", "llava_next", "internvl"):
        # Newlines of LLaVA-NeXT: none, these tokens lie in the view of the whole.
        kept = [[0, 1, 3], [2], [0, 1, 3]]
        masked = masked_logits(tiny, inputs, kept, together.sequences[:, length : length + 2])
        assert torch.allclose(together.logits[2], masked, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "chosen", "kept"),
    [
        # 16 tokens of the whole view; then 8 lines of 8 tokens and a newline.
        ((32, 32), (3, 15), [3, 15]),
        ((32, 32), (16, 23, 31), [16, 23, 24, 32, 33]),
        ((32, 32), (0, 40, 79), [0, 43, 51, 86, 87]),
        ((32, 32), tuple(range(16, 80, 8)), [x for at in range(16, 88, 9) for x in (at, at + 8)]),
        # Unpadded: 8 lines of 4 tokens and a newline.
        ((30, 12), (15, 16, 19, 47), [15, 16, 19, 20, 54, 55]),
    ],
)
def test_newlines_stay_with_the_rows_of_which_something_is_kept(
    size: tuple[int, int], chosen: tuple[int, ...], kept: list[int]
) -> None:
    tiny = family("llava_next")
    count = 88 if size == (32, 32) else 56
    ids = torch.tensor([[1, 5, *[IMAGE] * count, 20, 21, 22]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(1, 5, 3, 16, 16, generator=torch.Generator().manual_seed(2)),
        "image_sizes": torch.tensor([size]),
    }
    expected = generate(tiny.model, cut_by_hand(tiny, inputs, [kept]))
    with vlmfix.wrapped(tiny.model, FixedTokens(index=(chosen,))):
        assert same(generate(tiny.model, inputs), expected)
        newlines = count // 11 if size == (32, 32) else 8
        assert vlmfix.last_call(tiny.model).visual_tokens == ((len(chosen), count - newlines),)


@pytest.mark.parametrize(
    ("chosen", "kept"),
    [((1,), [0, 2, 5, 11]), ((4, 7), [0, 6, 9, 10, 11]), ((0, 6), [0, 1, 5, 8, 10, 11])],
)
def test_marks_around_an_image_stay(chosen: tuple[int, ...], kept: list[int]) -> None:
    """HunYuan: a mark, 2 lines of 4 tokens and a newline, and a mark."""
    tiny = family("hunyuan_vl")
    ids = torch.tensor([[1, 5, 96, *[IMAGE] * 12, 97, 20, 21, 22]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE).long(),
        "pixel_values": torch.randn(32, 48, generator=torch.Generator().manual_seed(2)),
        "image_grid_thw": torch.tensor([[1, 4, 8]]),
    }
    (image,) = attention_map(tiny.model, inputs)[0]
    assert image.views[0].tolist() == [[1, 2, 3, 4], [6, 7, 8, 9]]
    expected = generate(tiny.model, cut_by_hand(tiny, inputs, [kept]))
    with vlmfix.wrapped(tiny.model, FixedTokens(index=(chosen,))):
        assert same(generate(tiny.model, inputs), expected)
        assert vlmfix.last_call(tiny.model).visual_tokens == ((len(chosen), 8),)


def test_features_are_mixed_in_float32() -> None:
    features = (torch.rand(8, 4, generator=torch.Generator().manual_seed(1)) + 300).bfloat16()
    half = Reduction(torch.arange(0, 8, 2), 8, pairs(4, 8), None, (4, 8))
    expected = (0.75 * features[::2].double() + 0.25 * features[1::2].double()).bfloat16()
    assert half.apply(features).dtype == torch.bfloat16
    assert torch.equal(half.apply(features), expected)


@pytest.mark.parametrize("name", NAMES)
def test_merged_tokens(name: str) -> None:
    """Features, and those that enter deeper layers, are mixed; newlines stay what they are."""
    tiny = family(name)
    inputs = tiny.inputs(batch=2)
    count = tiny.image_tokens
    if name == "llava_next":
        base, packed = list(range(0, 16, 2)), [16 + 9 * y + x for y in range(8) for x in (0, 2, 4)]
        kept = base + sorted(packed + [16 + 9 * y + x for y in range(8) for x in (6, 8)])
        weights = torch.zeros(len(kept), count)
        for row, at in enumerate(kept):
            newline = at >= 16 and (at - 16) % 9 == 8
            weights[row, at] = 1.0 if newline else 0.75
            if not newline:
                weights[row, at + 1] = 0.25
    else:
        kept, weights = list(range(0, count, 2)), pairs(count // 2, count)
    expected = generate(tiny.model, cut_by_hand(tiny, inputs, [kept] * 2, weights=[weights] * 2))
    with vlmfix.wrapped(tiny.model, MergedPairs()):
        assert same(generate(tiny.model, inputs), expected)
    unmixed = generate(tiny.model, cut_by_hand(tiny, inputs, [kept] * 2))
    assert not same(unmixed, expected)


@dataclass(frozen=True)
class Recording(FixedTokens):
    """Keeps what it is told, and what it was shown."""

    seen: list[VisualTokens] = field(default_factory=list, compare=False)

    name: ClassVar[str] = "recording"
    reads_question: ClassVar[bool] = True

    def keep(self, visual: VisualTokens, budget: int) -> Kept:
        self.seen.append(visual)
        return super().keep(visual, budget)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_method_is_shown(name: str) -> None:
    """tests/engine/test_relevance.py has what it may ask for besides."""
    tiny = family(name)
    inputs = prompts(tiny, (2, 0, 1))
    method = Recording(index=((0,), (0,)))
    with vlmfix.wrapped(tiny.model, method):
        generate(tiny.model, inputs)
    assert [visual.number for visual in method.seen] == [0, 1, 0]
    real = [at for at in range(tiny.image_tokens) if name != "llava_next" or not newline(at)]
    embed = tiny.model.get_input_embeddings()
    output = encoded(tiny, inputs)
    for visual, features, row in zip(method.seen, output.pooler_output, (0, 0, 2), strict=True):
        assert torch.equal(visual.features, features[real])
        assert len(visual) == len(real)
        ids = inputs["input_ids"][row]
        behind = ids[int((ids == IMAGE).nonzero()[-1]) + 1 :]
        assert torch.equal(visual.question, embed(behind))


def newline(place: int) -> bool:
    """Whether a placeholder of the tiny LLaVA-NeXT is one."""
    return place >= 16 and (place - 16) % 9 == 8


# -- what generate() is told -----------------------------------------------------------------------


@pytest.mark.parametrize("where", ["argument", "config", "second argument", "model"])
def test_lengths_count_the_prompt_that_the_caller_gave(where: str) -> None:
    tiny = build("llava")
    inputs = tiny.inputs(batch=2)
    ids = inputs.pop("input_ids")
    settings = {"max_length": ids.shape[1] + 9, "min_length": ids.shape[1] + 5}
    plain = {"do_sample": False, "pad_token_id": 0, "suppress_tokens": [IMAGE, VIDEO]}
    config = GenerationConfig(**settings, **plain, eos_token_id=list(range(3, 90)))

    def count(model: Any) -> int:
        if where == "argument":
            output = model.generate(ids, **inputs, **config.to_diff_dict())
        elif where == "config":
            output = model.generate(ids, **inputs, generation_config=config)
        elif where == "second argument":
            output = model.generate(ids, config, **inputs)
        else:
            model.generation_config = config
            output = model.generate(ids, **inputs)
        assert torch.equal(output[:, : ids.shape[1]], ids)
        return int(output.shape[1] - ids.shape[1])

    before = config.to_dict()
    assert count(tiny.model) == 6  # the first that may end does
    with vlmfix.wrapped(tiny.model, fixed("llava")):
        assert count(tiny.model) == 6
        config.eos_token_id = 2
        assert count(tiny.model) == 9
        config.min_length = 3  # fewer than go
        assert count(tiny.model) == 9
        config.min_length = before["min_length"]
    config.eos_token_id = before["eos_token_id"]
    assert config.to_dict() == before


def test_positional_ids_and_other_names_for_them() -> None:
    tiny = family("llava")
    inputs = tiny.inputs(batch=2)
    with vlmfix.wrapped(tiny.model, fixed("llava")):
        expected = tiny.model.generate(**inputs, **generate_kwargs())
        ids = inputs.pop("input_ids")
        assert torch.equal(tiny.model.generate(ids, **inputs, **generate_kwargs()), expected)
        got = tiny.model.generate(inputs=ids, **inputs, **generate_kwargs())
        assert torch.equal(got, expected)


@pytest.mark.parametrize("name", FOUR)
def test_inputs_are_not_changed(name: str) -> None:
    tiny = family(name)
    inputs = tiny.inputs(batch=2)
    copies = {key: value.clone() for key, value in inputs.items()}
    with vlmfix.wrapped(tiny.model, fixed(name)):
        generate(tiny.model, inputs)
    assert inputs.keys() == copies.keys()
    assert all(torch.equal(inputs[key], copies[key]) for key in copies)


def test_what_an_encoder_returned_is_not_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be somebody's own, who encodes an image once; here no attention in it is read."""
    tiny = build("llava_onevision")
    inputs = tiny.inputs(batch=2)
    output = encoded(tiny, inputs)
    with vlmfix.wrapped(tiny.model, fixed(tiny.name)):
        expected = generate(tiny.model, inputs, num_beams=3)
    encode = tiny.model.base_model.get_image_features
    shared = functools.wraps(encode)(lambda *args, **kwargs: output)
    monkeypatch.setattr(tiny.model.base_model, "get_image_features", shared)
    with vlmfix.wrapped(tiny.model, fixed(tiny.name)):
        for _ in range(2):
            assert same(generate(tiny.model, inputs, num_beams=3), expected)


# -- a forward outside of generate() ---------------------------------------------------------------


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_a_bare_forward_runs_the_shorter_prompt(name: str, named: bool) -> None:
    tiny = family(name)
    inputs = tiny.inputs(batch=3)
    by_hand = cut_by_hand(tiny, inputs, [kept_of(name)] * 3)
    with torch.no_grad():
        expected = tiny.model(**by_hand).logits
        with vlmfix.wrapped(tiny.model, fixed(name)):
            first = generate(tiny.model, inputs).logits[0]
            if named:
                output = tiny.model(**inputs)
            else:
                ids, pixels = inputs.pop("input_ids"), inputs.pop("pixel_values")
                if name in M_ROPE:
                    output = tiny.model(ids, pixel_values=pixels, **inputs)
                else:
                    output = tiny.model(ids, pixels, **inputs)
            sizes = vlmfix.last_call(tiny.model).visual_tokens
    assert torch.equal(output.logits, expected)
    assert torch.allclose(output.logits[:, -1], first, rtol=0, atol=1e-5)
    assert [kept for kept, _ in sizes] == [len(CHOSEN.get(name, kept_of(name)))] * 3


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_decoding_by_hand_on_its_cache_equals_generate(name: str, batch: int) -> None:
    if name in M_ROPE and batch > 1:
        pytest.skip("plain transformers cannot do it: its positions of padded rows are wrong")
    tiny = family(name)
    inputs = tiny.inputs(batch=batch)
    with vlmfix.wrapped(tiny.model, fixed(name)), torch.no_grad():
        expected = generate(tiny.model, inputs, suppress_tokens=None)
        cache = DynamicCache(config=tiny.model.config.get_text_config())
        output = tiny.model(**inputs, past_key_values=cache)
        mask = cut_by_hand(tiny, inputs, [kept_of(name)] * batch)["attention_mask"]
        for step in range(5):
            logits = output.logits[:, -1]
            assert torch.allclose(logits, expected.logits[step], rtol=0, atol=1e-5)
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            output = tiny.model(
                input_ids=expected.sequences[:, -6 + step, None],
                attention_mask=mask if batch > 1 else None,
                past_key_values=cache,
            )
        assert vlmfix.last_call(tiny.model).passes == 6


@pytest.mark.parametrize("name", FOUR)
def test_an_answer_behind_the_prompt_is_no_part_of_the_question(name: str) -> None:
    tiny = family(name)
    inputs = prompts(tiny, (1, 1))
    length = inputs["input_ids"].shape[1]
    pad = torch.nn.functional.pad
    answers = {"input_ids": 7, "attention_mask": 1, "mm_token_type_ids": 0}
    longer = {
        key: pad(value, (0, 4), value=answers[key]) if key in answers else value
        for key, value in inputs.items()
    }
    shown = {}
    for prompt_length in (length, None):
        method = Recording(index=((0,),))
        with vlmfix.wrapped(tiny.model, method), torch.no_grad():
            output = tiny.model(**longer, prompt_length=prompt_length)
            call = vlmfix.last_call(tiny.model)
            generate(tiny.model, inputs)
            assert vlmfix.last_call(tiny.model).prompt_length == output.logits.shape[1] - 4
        assert call.prompt_length == output.logits.shape[1] - (4 if prompt_length else 0)
        shown[prompt_length] = [len(visual.question) for visual in method.seen]
    asked = [5 + len(tiny.layout.after) + 1, 6 + len(tiny.layout.after) + 1]
    assert shown == {length: asked * 2, None: [n + 4 for n in asked] + asked}


@pytest.mark.parametrize("name", M_ROPE)
def test_worked_positions_of_m_rope(name: str) -> None:
    """Two tokens, an image of 2 x 3, and a token; the second and fifth of the six are kept."""
    tiny = family(name)
    ids = torch.tensor([[1, 20, VISION_START, *[IMAGE] * 6, VISION_END, 21]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE).long(),
        "pixel_values": torch.randn(24, 96, generator=torch.Generator().manual_seed(3)),
        "image_grid_thw": torch.tensor([[1, 4, 6]]),
    }
    seen: list[Tensor] = []
    hook = tiny.model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    with vlmfix.wrapped(tiny.model, FixedTokens(index=((1, 4),))):
        generate(tiny.model, inputs)
    hook.remove()
    assert seen[0][:, 0].tolist() == [
        [0, 1, 2, 3, 4, 5, 6],
        [0, 1, 2, 3, 3, 6, 7],
        [0, 1, 2, 3, 4, 6, 7],
        [0, 1, 2, 4, 4, 6, 7],
    ]
    assert seen[1][:, 0].tolist() == [[7], [8], [8], [8]]
    assert tiny.model.model.rope_deltas.tolist() == [[1]]


@pytest.mark.parametrize("name", M_ROPE)
def test_what_a_model_remembers_of_positions(name: str) -> None:
    tiny = family(name)
    inputs = tiny.inputs(batch=3)
    whole = whole_positions(tiny, inputs).amax(dim=(0, 2))
    left = cut_by_hand(tiny, inputs, [kept_of(name)] * 3)["attention_mask"].sum(1)
    with vlmfix.wrapped(tiny.model, fixed(name)):
        generate(tiny.model, inputs)
        assert tiny.model.model.rope_deltas.flatten().tolist() == (whole + 1 - left).tolist()
        pruned = generate(tiny.model, inputs)
    plain = generate(tiny.model, inputs)  # anew, from the whole prompt
    everything = inputs["attention_mask"].sum(1)
    assert tiny.model.model.rope_deltas.flatten().tolist() == (whole + 1 - everything).tolist()
    with vlmfix.wrapped(tiny.model, None):
        assert same(generate(tiny.model, inputs), plain)
        with vlmfix.using(tiny.model, fixed(name)):
            assert same(generate(tiny.model, inputs), pruned)


# -- what passes through, what is refused ----------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_prompts_without_an_image_are_untouched(name: str) -> None:
    tiny = family(name)
    ids = torch.tensor([[0, 1, 20, 21, 22], [1, 30, 31, 32, 33]])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    plain = generate(tiny.model, inputs)
    with torch.no_grad():
        logits = tiny.model(**inputs).logits
        with vlmfix.wrapped(tiny.model, RandomTokens(ratio=0.5)):
            assert same(generate(tiny.model, inputs), plain)
            assert torch.equal(tiny.model(**inputs).logits, logits)
            assert vlmfix.last_call(tiny.model).visual_tokens == ()


@pytest.mark.parametrize("name", FOUR)
def test_features_given_beforehand_pass_through(name: str) -> None:
    tiny = family(name)
    inputs = tiny.inputs(batch=2)
    everything = [range(tiny.image_tokens)] * 2
    plain = generate(tiny.model, inputs)
    features = cut_by_hand(tiny, inputs, everything)
    warned = "random drops no visual token here: these images are features"
    with vlmfix.wrapped(tiny.model, RandomTokens(ratio=0.5)):
        with pytest.warns(UserWarning, match=warned):
            given = tiny.model.generate(
                **features,
                **generate_kwargs(output_logits=True, return_dict_in_generate=True),
            )
        with pytest.warns(UserWarning, match=warned), torch.no_grad():
            tiny.model(**cut_by_hand(tiny, inputs, everything))
    assert torch.equal(given.sequences, plain.sequences)
    assert torch.allclose(torch.stack(given.logits), torch.stack(plain.logits), atol=1e-6)


@pytest.mark.parametrize("name", M_ROPE)
@pytest.mark.parametrize("beside_an_image", [True, False])
def test_videos_are_refused(name: str, beside_an_image: bool) -> None:
    tiny = build(name)
    inputs = tiny.inputs(batch=2)
    seconds = inputs["input_ids"][1:] if beside_an_image else inputs["input_ids"]
    seconds[seconds == IMAGE] = VIDEO
    inputs["pixel_values_videos"] = inputs["pixel_values"]
    inputs["video_grid_thw"] = inputs["image_grid_thw"]
    if beside_an_image:
        half = len(inputs["pixel_values"]) // 2
        for key, cut in (("pixel_values", half), ("image_grid_thw", 1)):
            inputs[key] = inputs[key][:cut]
        inputs["pixel_values_videos"] = inputs["pixel_values_videos"][half:]
        inputs["video_grid_thw"] = inputs["video_grid_thw"][1:]
    else:
        del inputs["pixel_values"], inputs["image_grid_thw"]
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE) + 2 * (
        inputs["input_ids"] == VIDEO
    )
    with vlmfix.wrapped(tiny.model, RandomTokens(ratio=0.5)):
        with pytest.raises(BadInput, match="random prunes images, and this prompt holds a video"):
            generate(tiny.model, inputs)
        with pytest.raises(BadInput, match="holds a video"):
            tiny.model(**inputs)
        with vlmfix.using(tiny.model, None):
            generate(tiny.model, inputs)


def test_a_cache_that_is_filled_is_refused() -> None:
    tiny = build("llava")
    inputs = tiny.inputs()
    with vlmfix.wrapped(tiny.model, RandomTokens(ratio=0.5)), torch.no_grad():
        first = generate(tiny.model, inputs)
        later = torch.cat([first.sequences, torch.tensor([[5, 6, 7]])], dim=1)
        turn = {"input_ids": later, "attention_mask": torch.ones_like(later)}
        with pytest.raises(StateError, match="goes on from a KV cache"):
            generate(tiny.model, turn, past_key_values=first.past_key_values)
        with pytest.raises(StateError, match="KV cache"):
            tiny.model(**inputs, past_key_values=first.past_key_values)
        # An empty one is as good as none.
        empty = DynamicCache(config=tiny.model.config.get_text_config())
        assert same(generate(tiny.model, inputs, past_key_values=empty), first)
        assert empty.get_seq_length() == first.past_key_values.get_seq_length()


@pytest.mark.parametrize("where", ["argument", "config", "model"])
def test_gaps_in_positions_need_a_cache(where: str) -> None:
    tiny = build("llava")
    inputs = tiny.inputs()
    kwargs: Inputs = {}
    if where == "argument":
        kwargs = {"use_cache": False, "max_new_tokens": 2}
    elif where == "config":
        kwargs = {"generation_config": GenerationConfig(use_cache=False, max_new_tokens=2)}
    else:
        tiny.model.generation_config.use_cache = False
    if where == "model":
        kwargs = {"max_new_tokens": 2}
    with vlmfix.wrapped(tiny.model, RandomTokens(ratio=0.5, positions="original")):
        with pytest.raises(BadInput, match="positions=original leaves gaps"):
            tiny.model.generate(**inputs, **kwargs)
        with torch.no_grad():  # a bare forward has a mask, which says that it is one prompt
            without = tiny.model(**inputs, use_cache=False).logits
            assert torch.allclose(without, tiny.model(**inputs).logits, rtol=0, atol=1e-5)
        with vlmfix.using(tiny.model, RandomTokens(ratio=0.5)):
            tiny.model.generate(**inputs, **kwargs)


def test_labels_are_refused() -> None:
    tiny = family("llava")
    inputs = tiny.inputs()
    with (
        vlmfix.wrapped(tiny.model, RandomTokens(ratio=0.5)),
        pytest.raises(BadInput, match="labels would no longer fit"),
    ):
        tiny.model(**inputs, labels=inputs["input_ids"])


def test_a_model_that_takes_no_features_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = build("llava")

    def forward(input_ids: Any = None, pixel_values: Any = None, **kwargs: Any) -> Any:
        pytest.fail("the model ran")

    monkeypatch.setattr(tiny.model, "forward", forward)
    with pytest.raises(UnsupportedModel, match=r"transformers 5\.21"):
        vlmfix.wrap(tiny.model, RandomTokens(ratio=0.5))


def test_a_model_whose_features_enter_at_many_layers_is_refused_by_wrap_and_doctor() -> None:
    tiny = build("granite4_vision")
    with pytest.raises(UnsupportedModel, match="divprune .* enter at many decoder layers"):
        vlmfix.wrap(tiny.model, "divprune")
    fits = {row["name"]: row for row in examine(tiny.model)["methods"]}
    assert "enter at many decoder layers" in fits["divprune"]["why"]
    assert not fits["divprune"]["fits"] and fits["pai"]["fits"]


def test_positions_that_are_numbers_of_keys_cannot_be_kept() -> None:
    model = build("minimax_m3_vl").model
    with pytest.raises(UnsupportedModel, match="positions=original .* numbers of keys"):
        vlmfix.wrap(model, "divprune:positions=original")
    with vlmfix.wrapped(model, "divprune"):
        pass


def test_a_share_that_drops_nothing_says_so() -> None:
    """A ratio that rounds to the whole image; a number of tokens means at most so many."""
    tiny = family("qwen2_5_vl")
    inputs = tiny.inputs(batch=2)
    for method, share in (("random", 0.9), ("fastv", 0.95)):
        with (
            vlmfix.wrapped(tiny.model, f"{method}:ratio={share}"),
            pytest.warns(UserWarning, match=f"{method} drops none of the 8 visual tokens"),
            torch.no_grad(),
        ):
            tiny.model(**inputs)
    for spec in ("random:tokens=9", "fastv:tokens=9", "random:ratio=1"):
        with vlmfix.wrapped(tiny.model, spec), torch.no_grad():
            tiny.model(**inputs)  # a warning would be an error


@pytest.mark.parametrize("name", FOUR)
def test_placeholders_that_the_images_do_not_fill(name: str) -> None:
    tiny = family(name)
    inputs = tiny.inputs(batch=2)
    first = int((inputs["input_ids"][1] == IMAGE).nonzero()[0])
    inputs["input_ids"][1, first] = 30
    count = 2 * tiny.image_tokens
    with (
        vlmfix.wrapped(tiny.model, RandomTokens(ratio=0.5)),
        pytest.raises(BadInput, match=f"{count - 1} image placeholders .* {count} visual tokens"),
    ):
        generate(tiny.model, inputs)
    # As many as there should be, but not in one prompt.
    inputs["input_ids"][0, -1] = IMAGE
    with (
        vlmfix.wrapped(tiny.model, RandomTokens(ratio=0.5)),
        pytest.raises(BadInput, match="do not fit the placeholders of one prompt"),
    ):
        generate(tiny.model, inputs)


@pytest.mark.parametrize("index", [(), (3, 1), (1, 1), (-1, 2), (2, 16), (0, 1, 2, 3)], ids=str)
def test_a_choice_that_is_none_is_refused(index: tuple[int, ...]) -> None:
    @dataclass(frozen=True)
    class Wrong(TokenMethod):
        name: ClassVar[str] = "wrong"

        def keep(self, visual: VisualTokens, budget: int) -> Kept:
            return Kept(torch.tensor(index, dtype=torch.long))

    tiny = family("llava")
    with (
        vlmfix.wrapped(tiny.model, Wrong(tokens=3)),
        pytest.raises(BadInput, match=f"wrong returned {len(index)} of 16 .* budget of 3"),
    ):
        generate(tiny.model, tiny.inputs())


@pytest.mark.parametrize("name", FOUR)
def test_an_error_in_a_method_leaves_the_model_usable(name: str) -> None:
    @dataclass(frozen=True)
    class Failing(FixedTokens):
        name: ClassVar[str] = "failing"
        broken: list[bool] = field(default_factory=lambda: [True], compare=False)

        def keep(self, visual: VisualTokens, budget: int) -> Kept:
            if self.broken[0]:
                raise RuntimeError("boom")
            return super().keep(visual, budget)

    tiny = build(name)
    inputs = tiny.inputs(batch=2)
    plain = generate(tiny.model, inputs)
    attributes = {module: set(vars(part)) for module, part in tiny.model.named_modules()}
    method = Failing(index=(tuple(kept_of(name)),))
    vlmfix.wrap(tiny.model, method)
    for run in (lambda: generate(tiny.model, inputs), lambda: tiny.model(**inputs)):
        with pytest.raises(RuntimeError, match="boom"):
            run()
    with vlmfix.using(tiny.model, None):
        assert same(generate(tiny.model, inputs), plain)
    method.broken[0] = False
    by_hand = cut_by_hand(tiny, inputs, [kept_of(name)] * 2)
    pruned = generate(tiny.model, inputs)
    vlmfix.unwrap(tiny.model)
    assert same(pruned, generate(tiny.model, by_hand))
    assert same(generate(tiny.model, inputs), plain)
    assert attributes == {module: set(vars(part)) for module, part in tiny.model.named_modules()}


def test_threads_do_not_mix_their_prompts() -> None:
    tiny = family("llava_next")
    work = [(tiny.inputs(batch=2, seed=seed), RandomTokens(tokens=3 + seed)) for seed in range(3)]
    results: dict[int, list[Any]] = {number: [] for number in range(3)}
    with vlmfix.wrapped(tiny.model, None):
        alone = []
        for inputs, method in work:
            with vlmfix.using(tiny.model, method):
                alone.append(generate(tiny.model, inputs))

        def run(number: int) -> None:
            inputs, method = work[number]
            with vlmfix.using(tiny.model, method):
                for _ in range(3):
                    results[number].append(
                        tiny.model.generate(
                            **inputs,
                            **generate_kwargs(output_logits=True, return_dict_in_generate=True),
                        )
                    )
                    results[number].append(vlmfix.last_call(tiny.model).visual_tokens)

        threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number, found in results.items():
        assert len(found) == 6
        for output, sizes in zip(found[::2], found[1::2], strict=True):
            assert same(output, alone[number])
            assert sizes == ((3 + number, 80),) * 2


# -- with other methods ----------------------------------------------------------------------------


ATTENTION = {
    "var": VisualAttentionRedistribution(
        keep=0.1, sink_channels=tuple(range(8)), tau=2.0, rho=0.2, minimum_visual_mass=0.02,
        last_layer="official",
    ),
    "pai": PayAttentionToImage(alpha=0.5, start_layer=0),
    "vhr": VisionAwareHeadReinforcement(alpha=3.0),
}  # fmt: skip


@pytest.mark.rotated
@pytest.mark.parametrize("mode", ["greedy", "beams"])
@pytest.mark.parametrize("other", ATTENTION)
@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_methods_that_edit_attention_see_the_shorter_prompt(
    name: str, other: str, mode: str
) -> None:
    tiny = family(name)
    inputs = tiny.inputs(batch=2)
    kept = [kept_of(name)] * 2
    plain = generate(tiny.model, cut_by_hand(tiny, inputs, kept), **MODES[mode])
    by_hand = cut_by_hand(tiny, inputs, kept)  # generate() copies features for beams in place
    with vlmfix.wrapped(tiny.model, ATTENTION[other]):
        expected = generate(tiny.model, by_hand, **MODES[mode])
        rows = vlmfix.last_call(tiny.model).edited_rows
    # In either order: pruning comes first, whatever the stack says.
    for stack in ([fixed(name), ATTENTION[other]], [ATTENTION[other], fixed(name)]):
        with vlmfix.wrapped(tiny.model, stack):
            assert same(generate(tiny.model, inputs, **MODES[mode]), expected)
            assert vlmfix.last_call(tiny.model).edited_rows == rows > 0
    assert not same(expected, plain)


@dataclass(frozen=True)
class Lift(AttentionMethod):
    """IMBA's edit by lifts that are given, (B, n): one per visual token, row by row."""

    lifts: tuple[tuple[float, ...], ...] = ()

    name: ClassVar[str] = "lift"

    def layers(self, info: ModelInfo) -> range:
        return range(info.num_layers)

    def plan(self, keys: Keys) -> Plan:
        lift = torch.zeros(keys.kinds.shape)
        lift[keys.visual] = torch.tensor(self.lifts).flatten()
        return Plan({"lift": lift}, [True] * len(lift))

    def edit_scores(self, scores: Tensor, *, lift: Tensor) -> Tensor:
        return lift_scores(scores, lift)


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_values_from_the_vision_tower_go_to_the_tokens_that_are_left(name: str, bare: bool) -> None:
    tiny = family(name)
    inputs = tiny.inputs(batch=2)
    imba = PayAttentionToInformedTokens(alpha=2.0, beta=1.0, local_ratio=0.5, start_layer=0)
    by_hand = cut_by_hand(tiny, inputs, [kept_of(name)] * 2)
    tower = describe_tower(tiny.model, describe_model(tiny.model))
    layers = imba.encoder_layers(tower)
    with VisionRecorder(tower, layers) as tap:
        encoded(tiny, inputs)
        images = tap.take()
    lifts = []
    for image in images:
        groups = [imba.image_values([tile.received[x] for x in layers]) for tile in image.tiles]
        values = image.to_visual_tokens(groups).nan_to_num(0)[kept_of(name)]
        lifts.append(tuple(torch.tensor([0.0, 2.0, 1.0])[values.long()].tolist()))
    assert len(set(lifts[0])) > 1  # or it could not be seen which token has which

    def run(arguments: Inputs) -> Tensor:
        if not bare:
            return torch.stack(generate(tiny.model, arguments).logits)
        with torch.no_grad():
            logits: Tensor = tiny.model(**arguments).logits[:, -1]
        return logits

    with vlmfix.wrapped(tiny.model, Lift(lifts=tuple(lifts))):
        expected = run(by_hand)
    with vlmfix.wrapped(tiny.model, [fixed(name), imba]):
        assert torch.allclose(run(inputs), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("spec", ["hiprune:ratio=0.5;alpha=1", "ptp:ratio=0.5;instruction_layer=1"])
@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl"])
def test_one_look_into_the_vision_tower_serves_two_methods(name: str, spec: str) -> None:
    tiny = family(name)
    inputs = tiny.inputs()
    imba = PayAttentionToInformedTokens(alpha=2.0, beta=1.0, local_ratio=0.5, start_layer=0)
    ((told,),) = vlmfix.visual_tokens(tiny.model, inputs, spec)
    with vlmfix.wrapped(tiny.model, [FixedTokens(index=(tuple(told.index.tolist()),)), imba]):
        expected = generate(tiny.model, inputs)
    for stack in ([spec, imba], [imba, spec]):
        with vlmfix.wrapped(tiny.model, stack):
            assert same(generate(tiny.model, inputs), expected)
    with vlmfix.wrapped(tiny.model, spec):
        assert not same(generate(tiny.model, inputs), expected)


@dataclass(frozen=True)
class GivenNoise(VisualContrastiveDecoding):
    """VCD with the features of a noised image that were encoded beforehand."""

    features: Any = field(default=None, compare=False)

    def branches(self, prompt: Prompt) -> list[Branch]:
        return [Branch(vision={"mm_encoder_outputs": {"image": copy.copy(self.features)}})]


_VCD: Inputs = {"alpha": 1.0, "beta": 0.0, "noise_step": 999, "seed": 0}
CONTRASTS = {
    "vcd": VisualContrastiveDecoding(**_VCD),
    "m3id": MutualInformationDecoding(decay=0.3, beta=0.0),
    "avc": AttentionalVisionCalibration(alpha=2.5, beta=0.0, deviations=0.3),
}


@pytest.mark.rotated
@pytest.mark.parametrize("mode", ["greedy", "beams", "static beams", "no cache"])
@pytest.mark.parametrize("contrast", CONTRASTS)
@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_base_and_branches_of_a_contrast_are_both_pruned(
    name: str, contrast: str, mode: str
) -> None:
    tiny = family(name)
    inputs = tiny.inputs(batch=2)
    kept = [kept_of(name)] * 2
    method: ContrastMethod = CONTRASTS[contrast]
    if contrast == "vcd":
        ids, vision = inputs["input_ids"], {key: inputs[key] for key in PIXELS if key in inputs}
        real = inputs["attention_mask"].bool()
        (branch,) = method.branches(
            Prompt(describe_model(tiny.model), ids, real, ids == IMAGE, vision)
        )
        assert branch.vision is not None
        noised = cut_by_hand(tiny, {**inputs, **branch.vision}, kept)["mm_encoder_outputs"]
        method = GivenNoise(**_VCD, features=noised["image"])
    with vlmfix.wrapped(tiny.model, method), torch.no_grad():
        expected = generate(tiny.model, cut_by_hand(tiny, inputs, kept), **MODES[mode])
        bare = tiny.model(**cut_by_hand(tiny, inputs, kept)).logits[:, -1]
    plain = generate(tiny.model, cut_by_hand(tiny, inputs, kept), **MODES[mode])
    assert not torch.allclose(expected.logits[0], plain.logits[0], atol=1e-2)
    for stack in ([fixed(name), CONTRASTS[contrast]], [CONTRASTS[contrast], fixed(name)]):
        with vlmfix.wrapped(tiny.model, stack), torch.no_grad():
            output = generate(tiny.model, inputs, **MODES[mode])
            assert vlmfix.last_call(tiny.model).streams == 2
            assert same(output, expected)
            assert torch.equal(tiny.model(**inputs).logits[:, -1], bare)


@pytest.mark.parametrize(
    "contrast",
    [CONTRASTS["vcd"], ReBalancingContrastiveDecoding(1.0, 1.0, 0.0, noise_step=999, seed=0)],
    ids=lambda method: method.name,
)
@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "internvl"])
def test_noised_images_are_cut_as_their_originals(name: str, contrast: ContrastMethod) -> None:
    """Two images and one, of which each keeps others: beside the same prompts alone."""
    tiny = family(name)
    images = (2, 1)
    inputs = prompts(tiny, images)
    length = inputs["input_ids"].shape[1]
    stack = [FixedTokens(index=((0, 1, 3), (2,))), contrast]
    with vlmfix.wrapped(tiny.model, stack):
        together = generate(tiny.model, inputs)
        for row in range(2):
            alone = generate(tiny.model, one_prompt(inputs, images, row))
            assert torch.equal(together.sequences[row, length:], alone.sequences[0, -6:])
            for batch, single in zip(together.logits, alone.logits, strict=True):
                assert torch.allclose(batch[row], single[0], rtol=0, atol=1e-4)


def test_two_methods_that_prune_are_refused() -> None:
    tiny = family("llava")
    with pytest.raises(CompositionError, match="random and fixed both prune visual tokens"):
        vlmfix.wrap(tiny.model, [RandomTokens(ratio=0.5), fixed("llava")])
