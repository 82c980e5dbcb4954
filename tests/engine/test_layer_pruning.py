"""Visual tokens dropped between decoder layers, against a mask in the layers behind.

tests/pruning_oracle.py hides tokens from the layers of the plain model; tests/test_matrix.py runs
`fastv` in every mode on every family that it takes.
"""

from __future__ import annotations

import threading
import warnings
from typing import Any

import pytest
import torch
from contrast_oracle import attention_maps
from matrix import family
from pruning_oracle import PIXELS, hidden_from, one_prompt, prompts, whole_positions
from tiny import TinyFamily, build, generate_kwargs
from tiny_configs import IMAGE
from torch import Tensor
from transformers import DynamicCache

import vlmfix
from vlmfix.engine.layer_pruning import _cut_mask
from vlmfix.errors import BadInput, CompositionError, StateError, UnsupportedModel
from vlmfix.families.surgeon import TOKEN_TYPES
from vlmfix.methods.fastv import FastV
from vlmfix.methods.m3id import MutualInformationDecoding
from vlmfix.methods.pai import PayAttentionToImage
from vlmfix.methods.random_tokens import RandomTokens

Inputs = dict[str, Any]

NAMES = (
    "llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl",
)  # fmt: skip
FOUR = ("llava", "qwen2_5_vl", "qwen3_vl", "internvl")


def generate(model: Any, inputs: Inputs, **kwargs: Any) -> Any:
    """With logits and the cache."""
    torch.manual_seed(7)  # sampling draws from the global generator
    arguments = {"output_logits": True, "return_dict_in_generate": True, **kwargs}
    with warnings.catch_warnings():
        # transformers warns of its own argument names when a mode is asked for by keyword.
        warnings.simplefilter("ignore", UserWarning)
        return model.generate(**inputs, **generate_kwargs(**arguments))


def same(one: Any, other: Any, atol: float = 0.0) -> bool:
    """Whether two outputs of generate() have the same sequences and (nearly) the same logits."""
    logits = (torch.stack(one.logits), torch.stack(other.logits))
    return torch.equal(one.sequences, other.sequences) and torch.allclose(
        *logits, rtol=0, atol=atol
    )


def lengths(cache: Any) -> list[int]:
    return [layer.get_seq_length() for layer in cache.layers]


def half_by_attention(tiny: TinyFamily, inputs: Inputs, layer: int) -> Tensor:
    """(B, L) bool: the prompts without the half of their visual tokens that the last row heeds
    least in the layer before, as eager attention shows it, row by row."""
    seen = inputs["attention_mask"].bool()
    for row, ids in enumerate(inputs["input_ids"]):
        visual = (ids == IMAGE).nonzero().flatten()
        if not len(visual):
            continue
        maps = attention_maps(tiny.model, {**tiny_row(inputs, row)})
        padding = int((inputs["attention_mask"][row] == 0).sum())
        paid = maps[layer - 1][0, :, -1].mean(0)[visual - padding].tolist()
        order = sorted(range(len(visual)), key=lambda at: (-paid[at], at))
        for at in order[max(1, round(len(visual) / 2)) :]:
            seen[row, visual[at]] = False
    return seen


def tiny_row(inputs: Inputs, row: int) -> Inputs:
    """One row of a batch in which each has one image, alone."""
    return one_prompt(inputs, [1] * len(inputs["input_ids"]), row)


def masked_logits(
    tiny: TinyFamily, inputs: Inputs, seen: Tensor, layer: int, behind: Tensor
) -> Tensor:
    """(B, V) of the plain model on whole prompts and tokens behind, some hidden from `layer` on."""
    new = behind.shape[1]
    positions = whole_positions(tiny, inputs)
    following = positions.amax(dim=(0, -1) if positions.ndim == 3 else -1)[:, None]
    following = following + torch.arange(1, new + 1)
    if positions.ndim == 3:
        following = following.expand(3, *following.shape)
    pad = torch.nn.functional.pad
    types = [name for name in TOKEN_TYPES if name in inputs]
    longer: Inputs = {
        **{name: inputs[name] for name in PIXELS if name in inputs},
        **{name: pad(inputs[name], (0, new)) for name in types},
        "input_ids": torch.cat([inputs["input_ids"], behind], dim=1),
        "attention_mask": pad(inputs["attention_mask"], (0, new), value=1),
        "position_ids": torch.cat([positions, following], dim=-1),
    }
    visible = pad(seen, (0, new), value=True)
    with torch.no_grad(), hidden_from(tiny, layer, visible):
        logits: Tensor = tiny.model(**longer, use_cache=False).logits[:, -1]
    return logits


# -- what is dropped -------------------------------------------------------------------------------


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_keeping_all_tokens_is_bit_identical(name: str, beams: int) -> None:
    tiny = family(name)
    inputs = tiny.inputs(batch=3)
    plain = generate(tiny.model, inputs, num_beams=beams)
    # ratio=1 hooks nothing; a budget that no prompt exceeds finds out at the layer.
    for method in (FastV(ratio=1.0), FastV(tokens=88)):
        with vlmfix.wrapped(tiny.model, method):
            assert same(generate(tiny.model, inputs, num_beams=beams), plain)


def test_a_ratio_of_one_refuses_no_cache() -> None:
    tiny = family("llava")
    inputs = tiny.inputs(batch=2)
    static = {"cache_implementation": "static", "disable_compile": True}
    plain = generate(tiny.model, inputs, **static)
    with vlmfix.wrapped(tiny.model, FastV(ratio=1.0)):
        assert same(generate(tiny.model, inputs, **static), plain)


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_dropping_equals_masking_from_the_layer_on(name: str, layer: int, eager: bool) -> None:
    """The prefill and four steps of a padded batch; the masks of eager attention are additive."""
    if name == "qwen3_vl" and layer == 1:
        pytest.skip("image features enter its first two layers")
    tiny = family(name)
    inputs = tiny.inputs(batch=3)
    length = inputs["input_ids"].shape[1]
    seen = half_by_attention(tiny, inputs, layer)
    model = tiny.model
    if eager:
        model = build(name).model
        model.set_attn_implementation({"text_config": "eager"})
    with vlmfix.wrapped(model, FastV(layer=layer)):
        output = generate(model, inputs)
        report = vlmfix.last_call(model)
    assert report.visual_tokens == ((tiny.image_tokens // 2, tiny.image_tokens),) * 3
    assert report.prompt_length == length and report.new_tokens == report.passes == 6
    kept = length - tiny.image_tokens // 2
    expected = [length + 5] * layer + [kept + 5] * (3 - layer)
    assert lengths(output.past_key_values) == expected
    plain = generate(tiny.model, inputs)
    assert (plain.logits[0] - output.logits[0]).abs().max() > 1e-2
    for step in range(5):
        behind = output.sequences[:, length : length + step]
        masked = masked_logits(tiny, inputs, seen, layer, behind)
        assert torch.allclose(output.logits[step], masked, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["ernie4_5_vl_moe", "fuyu", "emu3"])
def test_dropping_equals_masking_where_the_configuration_or_the_layers_differ(name: str) -> None:
    """Types of tokens that experts read, configurations without a vision tower."""
    tiny = family(name)
    inputs = tiny.inputs(batch=2)
    seen = half_by_attention(tiny, inputs, 2)
    nothing = torch.empty(2, 0, dtype=torch.long)
    with vlmfix.wrapped(tiny.model, FastV(layer=2)) as model, torch.no_grad():
        output = model(**inputs, use_cache=False).logits[:, -1]
    assert torch.allclose(output, masked_logits(tiny, inputs, seen, 2, nothing), rtol=0, atol=1e-5)


def test_image_features_that_enter_behind_its_layer_are_refused() -> None:
    with pytest.raises(BadInput, match="layer=2 must be below 4, .* and at least 3: image"):
        vlmfix.wrap(build("granite4_vision").model, FastV(layer=2))


def test_attention_that_is_never_reached_is_named() -> None:
    tiny = build("llava")
    layer: Any = tiny.model.get_decoder().layers[1]
    layer.self_attn.forward = lambda hidden_states, **kwargs: (hidden_states, None)
    with (
        vlmfix.wrapped(tiny.model, FastV(layer=2)) as model,
        pytest.raises(UnsupportedModel, match="layer 1, .* never reached vlmfix"),
        torch.no_grad(),
    ):
        model(**tiny.inputs())


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl", "internvl"])
def test_rows_with_different_numbers_of_images(name: str, layer: int) -> None:
    """No image, two and one: a budget per prompt, over its images; short rows are filled up."""
    tiny = family(name)
    images = (0, 2, 1)
    inputs = prompts(tiny, images)
    length = inputs["input_ids"].shape[1]
    count = tiny.image_tokens
    for method in (FastV(layer=layer), FastV(layer=layer, tokens=3)):
        with vlmfix.wrapped(tiny.model, method):
            together = generate(tiny.model, inputs)
            sizes = vlmfix.last_call(tiny.model).visual_tokens
            kept = (count, count // 2) if method.tokens is None else (3, 3)
            assert sizes == ((kept[0], 2 * count), (kept[1], count))
            widths = lengths(together.past_key_values)
            assert widths[:layer] == [length + 5] * layer
            text = inputs["attention_mask"].sum(1) - torch.tensor([0, 2 * count, count])
            left = int((text + torch.tensor([0, *kept])).max())
            assert widths[layer:] == [left + 5] * (3 - layer)
            for row in range(3):
                alone = generate(tiny.model, one_prompt(inputs, images, row))
                assert torch.equal(together.sequences[row, length:], alone.sequences[0, -6:])
                for batch, single in zip(together.logits, alone.logits, strict=True):
                    assert torch.allclose(batch[row], single[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("name", ["llava", "internvl"])
def test_rows_of_equal_length_that_keep_different_numbers(
    name: str, layer: int, cached: bool
) -> None:
    """Without padding transformers leaves the mask out, and the shorter row still needs one."""
    tiny = family(name)
    inputs = tiny.inputs(batch=2, lengths=[6, 6])
    text = inputs["input_ids"][1]
    text[text == IMAGE] = 33
    inputs["pixel_values"] = inputs["pixel_values"][:1]
    length = len(text)
    with vlmfix.wrapped(tiny.model, FastV(layer=layer, tokens=1)):
        together = generate(tiny.model, inputs, use_cache=cached)
        for row in range(2):
            alone = generate(tiny.model, one_prompt(inputs, (1, 0), row), use_cache=cached)
            assert torch.equal(together.sequences[row, length:], alone.sequences[0, length:])
            for batch, single in zip(together.logits, alone.logits, strict=True):
                assert torch.allclose(batch[row], single[0], rtol=0, atol=1e-5)


_BEAMS = {"num_beams": 3}
_LOOKUP = {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}
MODES: dict[str, tuple[Inputs, Inputs]] = {
    "no cache": ({}, {"use_cache": False}),
    "beams without a cache": (_BEAMS, {**_BEAMS, "use_cache": False}),
    "returns without a cache": (
        {**_BEAMS, "num_return_sequences": 2},
        {**_BEAMS, "num_return_sequences": 2, "use_cache": False},
    ),
    "lookup": ({"max_new_tokens": 12}, {**_LOOKUP, "max_new_tokens": 12}),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FOUR)
def test_ways_of_generating_agree(name: str, mode: str) -> None:
    tiny = family(name)
    inputs = tiny.inputs(batch=3)
    one, other = MODES[mode]
    if mode == "lookup":
        inputs = tiny.single(inputs, 1)
    with vlmfix.wrapped(tiny.model, FastV(tokens=1)):
        first, second = (generate(tiny.model, inputs, **kwargs) for kwargs in (one, other))
        sizes = vlmfix.last_call(tiny.model).visual_tokens
    assert torch.equal(first.sequences, second.sequences)
    assert sizes == ((1, tiny.image_tokens),) * len(inputs["input_ids"])
    assert not torch.equal(
        first.sequences, generate(tiny.model, inputs, **one).sequences
    ) or not torch.allclose(first.logits[0], generate(tiny.model, inputs, **one).logits[0])


def test_lookup_takes_back_drafts_in_every_layer() -> None:
    tiny = family("llava")
    inputs = tiny.single(tiny.inputs(batch=3), 1)
    kwargs = {**_LOOKUP, "max_new_tokens": 12, "min_new_tokens": 12}
    queries: list[int] = []
    with vlmfix.wrapped(tiny.model, FastV()):
        hook = tiny.model.register_forward_pre_hook(
            lambda module, args, kwargs: queries.append(kwargs["input_ids"].shape[1]),
            with_kwargs=True,
        )
        output = generate(tiny.model, inputs, **kwargs)
        hook.remove()
    assert sum(queries[1:]) > 11  # drafts were made, and some were wrong
    whole, *_, pruned = lengths(output.past_key_values)
    assert whole - pruned == 8


def test_a_bare_forward_and_decoding_on_its_cache() -> None:
    tiny = family("llava")
    inputs = tiny.inputs(batch=2)
    with vlmfix.wrapped(tiny.model, FastV()), torch.no_grad():
        expected = generate(tiny.model, inputs, suppress_tokens=None)
        cache = DynamicCache(config=tiny.model.config.get_text_config())
        output, mask = tiny.model(**inputs, past_key_values=cache), inputs["attention_mask"]
        for step in range(5):
            logits = output.logits[:, -1]
            assert torch.allclose(logits, expected.logits[step], rtol=0, atol=1e-5)
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            token = expected.sequences[:, -6 + step, None]
            output = tiny.model(input_ids=token, attention_mask=mask, past_key_values=cache)
        assert vlmfix.last_call(tiny.model).passes == 6
        # The layers before hold the whole prompt, those behind what was kept of it.
        assert lengths(cache) == lengths(expected.past_key_values)


def test_layers_that_are_called_by_keyword() -> None:
    tiny = build("llava")
    inputs = tiny.inputs(batch=2)
    with vlmfix.wrapped(tiny.model, FastV(layer=2)):
        expected = generate(tiny.model, inputs)
    widths: list[set[int]] = []

    def by_keyword(module: Any, args: Any, kwargs: Inputs) -> tuple[Any, Inputs]:
        return (), {"hidden_states": args[0], **kwargs}

    def record(module: Any, args: Any, kwargs: Inputs) -> None:
        cosine, sine = kwargs["position_embeddings"]
        parts = (kwargs["hidden_states"], kwargs["position_ids"], cosine, sine)
        widths.append({part.shape[1] for part in parts})

    layer = tiny.model.get_decoder().layers[2]
    layer.register_forward_pre_hook(by_keyword, with_kwargs=True)
    with vlmfix.wrapped(tiny.model, FastV(layer=2)):
        layer.register_forward_pre_hook(record, with_kwargs=True)
        assert same(generate(tiny.model, inputs), expected)
    assert widths == [{inputs["input_ids"].shape[1] - 8}, *[{1}] * 5]


def test_answers_behind_a_prompt_are_read_as_they_were_written() -> None:
    """A bare forward over prompt and answer that is told where the prompt ends."""
    tiny = family("llava")
    inputs = tiny.inputs(batch=2)
    length = inputs["input_ids"].shape[1]
    with vlmfix.wrapped(tiny.model, FastV()), torch.no_grad():
        output = generate(tiny.model, inputs, suppress_tokens=None)
        ids = output.sequences
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 6), value=1)
        longer = {**inputs, "input_ids": ids, "attention_mask": mask}
        logits = tiny.model(**longer, prompt_length=length, use_cache=False).logits
    for step in range(6):
        assert torch.allclose(logits[:, step - 7], output.logits[step], rtol=0, atol=1e-5)


# -- what passes through, what is refused ----------------------------------------------------------


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_prompts_without_an_image_are_untouched(name: str, static: bool) -> None:
    tiny = family(name)
    ids = torch.tensor([[0, 1, 20, 21, 22], [1, 30, 31, 32, 33]])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    kwargs = {"cache_implementation": "static", "disable_compile": True} if static else {}
    plain = generate(tiny.model, inputs, **kwargs)
    with torch.no_grad():
        logits = tiny.model(**inputs).logits
        with vlmfix.wrapped(tiny.model, FastV(layer=2)):
            assert same(generate(tiny.model, inputs, **kwargs), plain)
            assert torch.equal(tiny.model(**inputs).logits, logits)
            assert vlmfix.last_call(tiny.model).visual_tokens == ()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"cache_implementation": "static", "disable_compile": True}, "StaticLayer cannot hold"),
        ({"past_key_values": "offloaded"}, "an offloaded cache cannot hold"),
        ({"prefill_chunk_size": 5}, "holds 5 of its 28 tokens"),
    ],
    ids=["static", "offloaded", "chunks"],
)
def test_caches_and_prefills_that_are_refused(kwargs: Inputs, message: str) -> None:
    tiny = family("llava")
    if "past_key_values" in kwargs:
        cache = DynamicCache(config=tiny.model.config.get_text_config())
        cache.offloading = True  # made as one, it would ask for an accelerator
        kwargs = {"past_key_values": cache}
    with (
        vlmfix.wrapped(tiny.model, FastV()),
        pytest.raises(CompositionError, match=message),
    ):
        generate(tiny.model, tiny.inputs(batch=3), **kwargs)


def test_a_later_turn_over_the_same_cache_is_refused() -> None:
    tiny = build("llava")
    inputs = tiny.inputs()
    with vlmfix.wrapped(tiny.model, FastV()):
        first = generate(tiny.model, inputs)
        later = torch.cat([first.sequences, torch.tensor([[5, 6, 7]])], dim=1)
        turn = {"input_ids": later, "attention_mask": torch.ones_like(later)}
        with pytest.raises(CompositionError, match="later turn"):
            generate(tiny.model, turn, past_key_values=first.past_key_values)


def test_a_cache_that_layers_were_dropped_from_needs_its_method() -> None:
    tiny = build("llava")
    cache = DynamicCache(config=tiny.model.config.get_text_config())
    with vlmfix.wrapped(tiny.model, FastV()), torch.no_grad():
        tiny.model(**tiny.inputs(), past_key_values=cache)
        step = {"input_ids": torch.tensor([[7]]), "past_key_values": cache}
        with (
            vlmfix.using(tiny.model, PayAttentionToImage(alpha=0.5)),
            pytest.raises(StateError, match="later layers of this KV cache hold fewer tokens"),
        ):
            tiny.model(**step)
        tiny.model(**step)


def test_a_cache_that_nothing_was_dropped_from_goes_on_without_its_method() -> None:
    tiny = build("llava")
    cache = DynamicCache(config=tiny.model.config.get_text_config())
    with vlmfix.wrapped(tiny.model, FastV(tokens=16)), torch.no_grad():
        tiny.model(**tiny.inputs(), past_key_values=cache)
        with vlmfix.using(tiny.model, PayAttentionToImage(alpha=0.5)):
            tiny.model(input_ids=torch.tensor([[7]]), past_key_values=cache)
            assert vlmfix.last_call(tiny.model).edited_rows > 0


@pytest.mark.parametrize("kind", [None, torch.bool, torch.float32])
def test_columns_that_fill_up_are_hidden_and_see_themselves(kind: torch.dtype | None) -> None:
    """Two rows of 6 columns, of which 4 and 2 stay; two columns fill up the second row."""
    places = torch.tensor([[0, 2, 3, 5], [0, 1, 2, 5]])
    filler = torch.tensor([[False] * 4, [True, True, False, False]])
    mask = None
    if kind is not None:
        mask = torch.ones(6, 6, dtype=torch.bool).tril().expand(2, 1, 6, 6)
        if kind == torch.float32:
            mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(kind).min)
    cut = _cut_mask(mask, places, places, filler)
    assert cut is not None
    visible = (cut if cut.dtype == torch.bool else cut == 0)[:, 0].int()
    assert visible.tolist() == [
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]],
        [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]],
    ]
    step = _cut_mask(None if mask is None else mask[:, :, -1:], places, None, filler)
    assert step is not None
    visible = (step if step.dtype == torch.bool else step == 0)[:, 0, 0].int()
    assert visible.tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]


def test_padding_on_the_right_is_refused() -> None:
    tiny = family("llava")
    inputs = tiny.inputs(batch=2, lengths=[4, 7])
    for name in ("input_ids", "attention_mask"):
        inputs[name][0] = inputs[name][0].roll(-3)
    with (
        vlmfix.wrapped(tiny.model, FastV()),
        torch.no_grad(),
        pytest.raises(BadInput, match="Pad on the left"),
    ):
        tiny.model(**inputs)


def test_labels_are_refused() -> None:
    tiny = family("llava")
    inputs = tiny.inputs(1)
    with vlmfix.wrapped(tiny.model, FastV()), torch.no_grad():
        with pytest.raises(BadInput, match="labels would not fit"):
            tiny.model(**inputs, labels=inputs["input_ids"])
        tiny.model.generate(**inputs, labels=inputs["input_ids"], max_new_tokens=1)


@pytest.mark.parametrize(
    ("name", "layer", "message"),
    [
        ("llava", 3, "layer=3 must be below 3"),
        ("qwen3_vl", 1, "at least 2: image features enter"),
        ("llava", 0, "leaves no layer to choose by"),
    ],
)
def test_layers_that_cannot_be(name: str, layer: int, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        vlmfix.wrap(family(name).model, FastV(layer=layer))


def test_sliding_layers_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="sliding or recurrent"):
        vlmfix.wrap(family("gemma3").model, FastV(layer=1))


@pytest.mark.parametrize(
    "other", [PayAttentionToImage(alpha=0.5), MutualInformationDecoding()], ids=lambda m: m.name
)
def test_methods_that_reckon_with_all_keys_are_refused(other: Any) -> None:
    tiny = build("llava")
    message = "fastv leaves some layers fewer keys than others"
    for stack in ([FastV(), other], [other, FastV()]):
        with pytest.raises(CompositionError, match=message):
            vlmfix.wrap(tiny.model, stack)
    with pytest.raises(CompositionError, match="fastv and random both prune"):
        vlmfix.wrap(tiny.model, [FastV(), RandomTokens()])
    with vlmfix.wrapped(tiny.model, other), pytest.raises(CompositionError, match=message):
        vlmfix.using(tiny.model, [FastV(), other]).__enter__()


@pytest.mark.parametrize("name", FOUR)
def test_an_error_on_the_way_leaves_the_model_usable(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = build(name)
    inputs = tiny.inputs(batch=2)
    plain = generate(tiny.model, inputs)

    def hooks() -> list[int]:
        return [len(module._forward_pre_hooks) for module in tiny.model.modules()]

    def fail(*args: Any) -> Any:
        raise RuntimeError("boom")

    before = hooks()
    vlmfix.wrap(tiny.model, FastV(layer=2))
    pruned = generate(tiny.model, inputs)
    with monkeypatch.context() as patch:
        patch.setattr(FastV, "keep", fail)
        for run in (lambda: generate(tiny.model, inputs), lambda: tiny.model(**inputs)):
            with pytest.raises(RuntimeError, match="boom"):
                run()
    assert same(generate(tiny.model, inputs), pruned)
    with vlmfix.using(tiny.model, None):
        assert same(generate(tiny.model, inputs), plain)
    vlmfix.unwrap(tiny.model)
    assert same(generate(tiny.model, inputs), plain) and hooks() == before


def test_threads_do_not_mix_their_prompts() -> None:
    tiny = family("llava")
    work = [(tiny.inputs(batch=2, seed=seed), FastV(tokens=2 + seed)) for seed in range(3)]
    found: dict[int, list[Any]] = {number: [] for number in range(3)}
    kwargs = generate_kwargs(output_logits=True, return_dict_in_generate=True)
    with vlmfix.wrapped(tiny.model, None):

        def run(number: int) -> None:
            inputs, method = work[number]
            with vlmfix.using(tiny.model, method):
                for _ in range(3):
                    found[number].append(tiny.model.generate(**inputs, **kwargs))

        alone = []
        for number in range(3):
            run(number)
            alone.append(found[number].pop())
            found[number].clear()
        threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(len(own) == 3 for own in found.values())
    assert all(same(one, alone[number]) for number, own in found.items() for one in own)
