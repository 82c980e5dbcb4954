"""Answers from shared beginnings, against every prompt run whole and alone."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from matrix import FAMILIES, family
from prompts import ask, picture, state, tiny_model
from tiny import generate_kwargs
from tiny_configs import IMAGE, VIDEO
from tiny_processor import TinyProcessor

import vlmfix
from vlmfix import attention_map
from vlmfix.analysis.passes import Look, look
from vlmfix.chat import chat_inputs
from vlmfix.errors import BadInput

OTHERS = ("qwen2_vl", "glm4v", "idefics3", "aya_vision")
LAYERS = (0, 1, 2)


#: Three images, one of them wide, one asked about three times; prompts of many lengths, one twice.
CHATS = [
    ask(picture(1), "is there a dog ?"),
    ask(picture(2), "w3"),
    ask(picture(1), "w7 w8 w9 w10 w11 w12 w13"),
    ask(picture(3, 40), "is there a dog in the image ? w20 w21 w22"),
    ask(picture(2), "w3"),
    ask(picture(1), "w3"),
]


def alone(model: Any, processor: Any, chat: Any, tokens: int = 6) -> Look:
    """A chat by itself: plain generate(), then the maps of its answer."""
    inputs = chat_inputs(model, processor, [chat])
    with vlmfix.using(model, None):
        generated = model.generate(
            **inputs, max_new_tokens=tokens, do_sample=False, suppress_tokens=[IMAGE, VIDEO]
        )
        (maps,) = attention_map(model, inputs, rows="answer", generated=generated)
    answer = generated[0, inputs["input_ids"].shape[1] :].tolist()
    return Look(answer[: len(maps[0].rows)], maps, shared=False)


def same(one: Look, other: Look) -> None:
    assert one.tokens == other.tokens
    for a, b in zip(one.maps, other.maps, strict=True):
        assert a.weights.shape == b.weights.shape
        assert torch.allclose(a.weights, b.weights, atol=1e-5)
        assert (a.layers, a.heads) == (b.layers, b.heads)
        assert all(torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True))


@pytest.mark.parametrize("name", (*FAMILIES, *OTHERS))
def test_shared_beginnings_equal_prompts_run_whole_and_alone(name: str) -> None:
    model, processor = tiny_model(name), TinyProcessor(family(name))
    with vlmfix.wrapped(model, None):
        looks = look(model, processor, CHATS, LAYERS, 6)
        for chat, seen in zip(CHATS, looks, strict=True):
            same(seen, alone(model, processor, chat))
    # Prefix language models, and sliding windows, which count padding.
    whole = name in ("paligemma", "gemma3", "aya_vision")
    assert [seen.shared for seen in looks] == [not whole] * len(CHATS)
    assert looks[1] is looks[4]
    # Flat rows, or the same ones everywhere, would prove nothing.
    first = [seen.maps[0].weights[:, 0, 0] for seen in looks]
    assert first[0].std() > 1e-3
    assert all((first[0] - first[at]).abs().max() > 1e-4 for at in (1, 2, 5))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_in_float64_shared_beginnings_are_exact(name: str) -> None:
    model, processor = tiny_model(name).double(), TinyProcessor(family(name))
    with vlmfix.wrapped(model, None):
        for chat, seen in zip(CHATS, look(model, processor, CHATS, LAYERS, 4), strict=True):
            other = alone(model, processor, chat, 4)
            assert seen.tokens == other.tokens
            # Softmax rows come in float32.
            assert torch.allclose(seen.maps[0].weights, other.maps[0].weights, atol=2e-7)


def test_what_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each image is encoded once, and no prompt is run twice."""
    model, processor = tiny_model("llava"), TinyProcessor(family("llava"))
    forwards: list[tuple[int, int]] = []
    encoded: list[int] = []
    with vlmfix.wrapped(model, None):
        handles = [
            model.register_forward_pre_hook(
                lambda m, a, k: forwards.append(tuple(k["input_ids"].shape)), with_kwargs=True
            ),
            model.model.vision_tower.register_forward_pre_hook(
                lambda m, a, k: encoded.append(len(a[0] if a else k["pixel_values"])),
                with_kwargs=True,
            ),
        ]
        looks = look(model, processor, CHATS, LAYERS, 6)
        for handle in handles:
            handle.remove()
    assert encoded == [3]
    steps = max(len(seen.tokens) for seen in looks)
    start, write, *more, watch = forwards
    assert start[0] == 3 and write[0] == 5
    assert more == [(5, 1)] * (steps - 1)
    assert watch == (5, steps + 1)


def test_an_end_token_ends_an_answer_and_others_go_on() -> None:
    model, processor = tiny_model("llava"), TinyProcessor(family("llava"))
    with vlmfix.wrapped(model, None):
        free = look(model, processor, CHATS, LAYERS, 6)
        first, long = free[0].tokens, free[3].tokens
        stop = next(token for token in first if token not in long)
        model.generation_config.eos_token_id = [2, stop]
        looks = look(model, processor, CHATS, LAYERS, 6)
        cut = first.index(stop) + 1
        assert looks[0].tokens == first[:cut] and looks[3].tokens == long
        assert looks[0].maps[0].weights.shape[2] == cut
        assert torch.allclose(
            looks[0].maps[0].weights, free[0].maps[0].weights[:, :, :cut], atol=1e-6
        )
        # Where only the first chat's answer matters, the others stop with it.
        short = look(model, processor, CHATS, LAYERS, 6, complete=[0])
        assert short[0].tokens == first[:cut]
        assert short[3].tokens == long[:cut]
        assert look(model, processor, CHATS, LAYERS, 6, complete=[3])[3].tokens == long


@pytest.mark.parametrize("name", ["llava", "paligemma"])
def test_no_answer_asks_for_one_more_image(name: str) -> None:
    model, processor = tiny_model(name), TinyProcessor(family(name))
    handle = model.get_output_embeddings().register_forward_hook(
        lambda module, args, logits: logits.index_fill(-1, torch.tensor([IMAGE]), 1e4)
    )
    with vlmfix.wrapped(model, None):
        looks = look(model, processor, CHATS[:3], (1,), 4)
    handle.remove()
    assert all(len(seen.tokens) == 4 and IMAGE not in seen.tokens for seen in looks)


def test_penalties_of_the_configuration_play_no_part() -> None:
    for name in ("llava", "gemma3"):
        model, processor = tiny_model(name), TinyProcessor(family(name))
        with vlmfix.wrapped(model, None):
            plain = look(model, processor, CHATS, LAYERS, 6)
            config = model.generation_config
            config.repetition_penalty, config.no_repeat_ngram_size = 5.0, 1
            config.do_sample, config.temperature = True, 5.0
            for one, other in zip(look(model, processor, CHATS, LAYERS, 6), plain, strict=True):
                same(one, other)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_no_method_runs_and_nothing_is_left_behind(name: str) -> None:
    model, processor = tiny_model(name), TinyProcessor(family(name))
    with vlmfix.wrapped(model, None):
        plain = look(model, processor, CHATS[:3], (1,), 4)
    untouched = state(model)
    with vlmfix.wrapped(model, "pai:alpha=2;start_layer=0"):
        model.generate(**chat_inputs(model, processor, CHATS[:2]), **generate_kwargs())
        report = vlmfix.last_call(model)
        before = {id(m): dict(vars(m)) for m in model.modules() if hasattr(m, "rope_deltas")}
        for one, other in zip(look(model, processor, CHATS[:3], (1,), 4), plain, strict=True):
            same(one, other)
        assert vlmfix.last_call(model) == report
        for module in model.modules():
            if id(module) in before:
                assert vars(module)["rope_deltas"] is before[id(module)]["rope_deltas"]
    assert _without_deltas(state(model)) == _without_deltas(untouched)


def _without_deltas(found: list[Any]) -> list[Any]:
    """What generate() itself leaves on M-RoPE models."""
    return [(at, {k: v for k, v in named.items() if k != "rope_deltas"}) for at, named in found]


def test_positions_behind_an_image_must_be_known() -> None:
    model, processor = tiny_model("qwen2_5_vl"), TinyProcessor(family("qwen2_5_vl"))
    with vlmfix.wrapped(model, None):
        model.generate(**chat_inputs(model, processor, CHATS[:1]), **generate_kwargs())
        processor.layout = replace(processor.layout, extra=None)
        with pytest.raises(BadInput, match="mm_token_type_ids"):
            look(model, processor, CHATS[:1], LAYERS, 3)


def test_a_prompt_that_ends_with_its_image_is_refused() -> None:
    model, processor = tiny_model("llava"), TinyProcessor(family("llava"))
    processor.chat_template = (
        "{% for m in messages %}{{ m['content'][-1]['text'] }} <image>{% endfor %}"
    )
    processor.apply_chat_template = partial(
        processor.tokenizer.apply_chat_template, chat_template=processor.chat_template
    )
    with vlmfix.wrapped(model, None), pytest.raises(BadInput, match="ends with its image"):
        look(model, processor, CHATS[:1], LAYERS, 3)
