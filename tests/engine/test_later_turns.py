"""Later turns over a KV cache: what of it is known, when it was cut, and when it cannot go on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from matrix import ROWS, family
from tiny import TinyFamily, build, generate_kwargs
from tiny_configs import IMAGE
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import eager_mask

import vlmfix
from vlmfix.engine.plans import AttentionNotes
from vlmfix.errors import StateError
from vlmfix.methods.pai import PayAttentionToImage
from vlmfix.methods.vhr import VisionAwareHeadReinforcement

STRONG: dict[str, Any] = {row.name: row.strong for row in ROWS}
# Every head, and visual tokens on both sides of tau, so that each turn has rows to edit.
STRONG["var"] = replace(STRONG["var"], rho=0.0, minimum_visual_mass=0.0, tau=2.2)
KWARGS = generate_kwargs(return_dict_in_generate=True, output_logits=True)
#: Methods whose rows do not depend on which of them were written by the model.
SAME_ROWS = ("head_pursuit", "vaf", "var")
TOLERANCE = 2e-5

Inputs = dict[str, Any]


def _inputs(tiny: TinyFamily, ids: list[int], pixels: Inputs) -> Inputs:
    prompt = torch.tensor([ids])
    extra = tiny.layout.extra(prompt) if tiny.layout.extra is not None else {}
    return {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), **extra, **pixels}


def _image(tiny: TinyFamily) -> list[int]:
    return [*tiny.layout.before, *[IMAGE] * tiny.image_tokens, *tiny.layout.after]


def _pixels(tiny: TinyFamily, count: int) -> Inputs:
    return tiny.layout.pixels(count, torch.Generator().manual_seed(3))


def _one(pixels: Inputs, at: int) -> Inputs:
    return {name: value.chunk(2)[at] for name, value in pixels.items()}


def _raw(output: Any) -> torch.Tensor:
    return torch.stack(output.logits)[:, 0]


def _two_turns(
    tiny: TinyFamily, first: list[int], second: list[int], pixels: list[Inputs]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of the second turn over the cache of the first, and of the whole; and its ids."""
    model = tiny.model
    turn = model.generate(**_inputs(tiny, first, pixels[0]), **KWARGS)
    ids = [*turn.sequences[0].tolist(), *second]
    cache = turn.past_key_values
    got = model.generate(**_inputs(tiny, ids, pixels[1]), past_key_values=cache, **KWARGS)
    whole = model.generate(**_inputs(tiny, ids, pixels[2]), **KWARGS)
    return _raw(got), _raw(whole), torch.tensor([ids])


def _two_images(tiny: TinyFamily) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    both = _pixels(tiny, 2)
    first = [1, 11, *_image(tiny), 12, 13, 14]
    second = [15, *_image(tiny), 16, 17]
    return _two_turns(tiny, first, second, [_one(both, 0), _one(both, 1), both])


@pytest.mark.parametrize("name", ["llava", "internvl", "gemma3", "idefics2"])
@pytest.mark.parametrize("method", SAME_ROWS)
def test_a_new_image_in_a_later_turn_equals_the_whole_conversation(name: str, method: str) -> None:
    tiny = family(name)
    with vlmfix.wrapped(tiny.model, STRONG[method]):
        got, whole, _ = _two_images(tiny)
        assert vlmfix.last_call(tiny.model).edited_rows
    assert torch.allclose(got, whole, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["llava", "internvl"])
@pytest.mark.parametrize("method", ["ad_hh", "head_pursuit", "imba", "pai", "spin", "vaf", "var"])
def test_the_first_image_in_a_later_turn_equals_the_whole_conversation(
    name: str, method: str
) -> None:
    """The answer before it is text of the prompt, and its tokens can be sinks like others."""
    tiny = family(name)
    pixels = _pixels(tiny, 1)
    second = [15, *_image(tiny), 16, 17]
    with vlmfix.wrapped(tiny.model, STRONG[method]):
        got, whole, _ = _two_turns(tiny, [1, 11, 12, 13], second, [{}, pixels, pixels])
    assert torch.allclose(got, whole, rtol=0, atol=TOLERANCE)


@contextmanager
def _lifted(model: Any, rows: torch.Tensor, keys: torch.Tensor, alpha: float) -> Iterator[None]:
    """The model with attention of our own: scores of `keys` lifted in `rows`, both (P,) bool."""

    def attention(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        scores = query @ key.transpose(2, 3) * kwargs["scaling"]
        lift = rows[:, None] & keys[None]
        scores = scores + alpha * lift * scores.abs() + attention_mask
        return (scores.softmax(-1) @ value).transpose(1, 2), None

    AttentionInterface.register("test_lifted", attention)
    AttentionMaskInterface.register("test_lifted", eager_mask)
    model.set_attn_implementation({"text_config": "test_lifted"})
    try:
        yield
    finally:
        model.set_attn_implementation({"text_config": "sdpa"})


@pytest.mark.parametrize("name", ["llava", "internvl"])
def test_rows_of_an_earlier_answer_stay_as_they_were_written(name: str) -> None:
    """PAI lifts the rows that predict: of both turns, each with the images that it sees."""
    tiny = build(name)
    with vlmfix.wrapped(tiny.model, PayAttentionToImage(alpha=0.7, start_layer=0)):
        got, whole, ids = _two_images(tiny)
    length, new = ids.shape[1], 6
    answer = 1 + 1 + len(_image(tiny)) + 3
    rows = torch.zeros(length, dtype=torch.bool)
    rows[[*range(answer - 1, answer + new - 1), length - 1]] = True
    inputs = _inputs(tiny, ids[0].tolist(), _pixels(tiny, 2))
    with _lifted(tiny.model, rows, ids[0] == IMAGE, 0.7), torch.no_grad():
        wanted = tiny.model(**inputs).logits[0, -1]
    assert torch.allclose(got[0], wanted, rtol=0, atol=TOLERANCE)
    assert (whole[0] - wanted).abs().max() > 0.01  # where those rows were never written


@pytest.mark.parametrize("spec", [STRONG["vhr"], STRONG["gift"], "knockout"])
def test_what_looks_at_a_whole_prompt_refuses_a_new_image(spec: Any) -> None:
    tiny = family("llava")
    if spec == "knockout":
        spec = VisionAwareHeadReinforcement(alpha=3.0, vhd_source="knockout")
    with (
        vlmfix.wrapped(tiny.model, spec),
        pytest.raises(StateError, match="with all of its images.*without past_key_values"),
    ):
        _two_images(tiny)


def test_an_answer_that_was_not_looked_at_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As behind compiled steps: whether its tokens are sinks is not known."""
    tiny = family("llava")
    first = _inputs(tiny, [1, 11, *_image(tiny), 12, 13], _pixels(tiny, 1))
    flag = AttentionNotes.flag

    def of_prompts(notes: Any, method: Any, layer: int, frame: Any, flags: torch.Tensor) -> None:
        if not frame.decoding:
            flag(notes, method, layer, frame, flags)

    with vlmfix.wrapped(tiny.model, STRONG["var"]), monkeypatch.context() as patch:
        patch.setattr(AttentionNotes, "flag", of_prompts)
        turn = tiny.model.generate(**first, **KWARGS)
        later = _inputs(tiny, [*turn.sequences[0].tolist(), 14], {})
        with pytest.raises(StateError, match="disable_compile=True"):
            tiny.model.generate(**later, past_key_values=turn.past_key_values, **KWARGS)


# -- caches that were cut --------------------------------------------------------------------------


def _rolled_back(
    tiny: TinyFamily, longer: list[int], images: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A turn over a cache that was cut to a prefix: of a prompt like it, and of a longer one."""
    prefix = [1, 11, *_image(tiny), 12, 13]
    turn = _inputs(tiny, [*prefix, 14, 15, 16], {})
    both, found = _pixels(tiny, 2), []
    for ids, pixels in ((prefix, _one(both, 0)), (longer, both if images == 2 else _one(both, 0))):
        cache = DynamicCache(config=tiny.model.config.get_text_config(decoder=True))
        short = {**KWARGS, "max_new_tokens": 1, "min_new_tokens": 1}
        tiny.model.generate(**_inputs(tiny, ids, pixels), past_key_values=cache, **short)
        cache.crop(len(prefix) - 1 - cache.get_seq_length())
        found.append(_raw(tiny.model.generate(**turn, past_key_values=cache, **KWARGS)))
    return found[0], found[1]


@pytest.mark.parametrize("method", ["ad_hh", "imba", "pai", "spin", "vaf", "var", "steer"])
@pytest.mark.parametrize("images", [1, 2])
def test_a_cut_cache_forgets_the_kinds_of_what_was_cut(method: str, images: int) -> None:
    tiny = family("llava")
    more = _image(tiny) if images == 2 else list(range(30, 60))
    longer = [1, 11, *_image(tiny), 12, 13, *more, 14]
    with vlmfix.wrapped(tiny.model, STRONG[method]):
        one, other = _rolled_back(tiny, longer, images)
    assert torch.allclose(one, other, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("vhr", "looks at a whole prompt"),
        ("gift", "looks at a whole prompt"),
        ("vcd", "cut inside a"),
    ],
)
def test_a_cut_cache_is_refused_by_what_holds_for_its_whole_prompt(
    method: str, message: str
) -> None:
    tiny = family("llava")
    longer = [1, 11, *_image(tiny), 12, 13, *_image(tiny), 14]
    with vlmfix.wrapped(tiny.model, STRONG[method]), pytest.raises(StateError, match=message):
        _rolled_back(tiny, longer, 2)


# -- caches that the plain model added to ----------------------------------------------------------


def _methods_off_in_the_middle(tiny: TinyFamily, cut: bool) -> None:
    model, pixels = tiny.model, _pixels(tiny, 2)
    first = [1, 11, *_image(tiny), 12, 13]
    turn = model.generate(**_inputs(tiny, first, _one(pixels, 0)), **KWARGS)
    cache, held = turn.past_key_values, turn.past_key_values.get_seq_length()
    ids = [*turn.sequences[0].tolist(), *_image(tiny), 14, 15]
    with vlmfix.suspended(model):
        between = model.generate(
            **_inputs(tiny, ids, _one(pixels, 1)), past_key_values=cache, **KWARGS
        )
    sequence = between.sequences[0].tolist()
    if cut:
        cache.crop(held - cache.get_seq_length())
        sequence = turn.sequences[0].tolist()
    last = _inputs(tiny, [*sequence, 16, 17], {})
    model.generate(**last, past_key_values=cache, **KWARGS)


@pytest.mark.parametrize("method", ["pai", "var", "steer", "fastv"])
def test_a_turn_of_the_plain_model_in_between_is_refused(method: str) -> None:
    tiny = family("llava")
    message = "which a method has dropped" if method == "fastv" else "no method has seen"
    with vlmfix.wrapped(tiny.model, STRONG[method]), pytest.raises(StateError, match=message):
        _methods_off_in_the_middle(tiny, cut=False)


def test_a_turn_of_the_plain_model_that_was_cut_away_leaves_nothing() -> None:
    tiny = family("llava")
    with vlmfix.wrapped(tiny.model, STRONG["pai"]):
        _methods_off_in_the_middle(tiny, cut=True)
        assert vlmfix.last_call(tiny.model).edited_rows


def test_the_plain_model_cuts_and_refills_a_cache() -> None:
    """Its length alone would not tell."""
    tiny = family("llava")
    first = _inputs(tiny, [1, 11, *_image(tiny), 12, 13, 14, 15], _pixels(tiny, 1))
    with vlmfix.wrapped(tiny.model, STRONG["pai"]), torch.no_grad():
        cache = tiny.model(**first, use_cache=True).past_key_values
        cache.crop(-3)
        with vlmfix.suspended(tiny.model):
            tiny.model(input_ids=torch.tensor([[16, 17, 18]]), past_key_values=cache)
        with pytest.raises(StateError, match="3 of which no method has seen"):
            tiny.model(input_ids=torch.tensor([[19]]), past_key_values=cache)


def test_a_turn_that_failed_leaves_the_cache_as_it_was() -> None:
    """What VHR chose in the first turn holds on, and the tokens that failed are not there."""
    tiny = family("llava")
    first = _inputs(tiny, [1, 11, *_image(tiny), 12, 13], _pixels(tiny, 1))
    with vlmfix.wrapped(tiny.model, STRONG["vhr"]):
        found = []
        for fails in (False, True):
            turn = tiny.model.generate(**first, **KWARGS)
            ids, cache = turn.sequences[0].tolist(), turn.past_key_values
            if fails:
                more = _inputs(tiny, [*ids, *_image(tiny), 14], _pixels(tiny, 1))
                with pytest.raises(StateError, match="with all of its images"):
                    tiny.model.generate(**more, past_key_values=cache, **KWARGS)
            later = _inputs(tiny, [*ids, 15, 16], {})
            found.append(tiny.model.generate(**later, past_key_values=cache, **KWARGS))
        assert vlmfix.last_call(tiny.model).edited_rows
    assert torch.equal(_raw(found[0]), _raw(found[1]))


def test_inference_mode_may_end_between_turns() -> None:
    tiny = family("llava")
    first = _inputs(tiny, [1, 11, *_image(tiny), 12, 13], _pixels(tiny, 1))
    for method in ("pai", "var", "imba", "vhr", "steer"):
        with vlmfix.wrapped(tiny.model, STRONG[method]):
            with torch.inference_mode():
                turn = tiny.model.generate(**first, **KWARGS)
            ids = [*turn.sequences[0].tolist(), 14, 15]
            later = _inputs(tiny, ids, {})
            tiny.model.generate(**later, past_key_values=turn.past_key_values, **KWARGS)
            assert vlmfix.last_call(tiny.model).edited_rows


# -- rows that changed places ----------------------------------------------------------------------


def _reorder(cache: Any) -> torch.Tensor:
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    return torch.tensor([2, 0, 1])


def _select(cache: Any) -> torch.Tensor:
    cache.batch_select_indices(torch.tensor([2, 0]))
    return torch.tensor([2, 0])


def _repeat(cache: Any) -> torch.Tensor:
    cache.batch_repeat_interleave(2)
    return torch.tensor([0, 0, 1, 1, 2, 2])


def _next_step(tiny: TinyFamily, inputs: Inputs, change: Any) -> torch.Tensor:
    """Logits of one more token per row, after rows of the cache were changed."""
    mask = inputs["attention_mask"]
    with torch.no_grad():
        cache = tiny.model(**inputs).past_key_values
        rows = change(cache)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)[rows]
        ids = torch.full((len(rows), 1), 7)
        logits: torch.Tensor = tiny.model(
            input_ids=ids, attention_mask=mask, past_key_values=cache
        ).logits
    return logits


@pytest.mark.parametrize("method", ["pai", "var", "vhr", "imba", "vcd", "fastv", "uniform"])
@pytest.mark.parametrize("change", [_reorder, _select, _repeat])
def test_rows_that_changed_places_are_refused(method: str, change: Any) -> None:
    tiny = family("llava")
    inputs = tiny.inputs(3, lengths=[2, 6, 10])
    message = "rows of this KV cache were reordered"
    with vlmfix.wrapped(tiny.model, STRONG[method]), pytest.raises(StateError, match=message):
        _next_step(tiny, inputs, change)


@pytest.mark.parametrize("method", ["pai", "var", "vhr", "steer"])
def test_rows_of_one_prompt_may_change_places(method: str) -> None:
    """As in a beam search of the caller's own; and a cut alone moves no row."""
    tiny = family("llava")
    one = tiny.inputs(1)
    inputs = {name: value.repeat(3, *[1] * (value.ndim - 1)) for name, value in one.items()}

    def stay(cache: Any) -> torch.Tensor:
        cache.crop(0)
        return torch.arange(3)

    with vlmfix.wrapped(tiny.model, STRONG[method]):
        wanted = _next_step(tiny, inputs, stay)
        got = _next_step(tiny, inputs, _reorder)
        ragged = tiny.inputs(3, lengths=[2, 6, 10])
        _next_step(tiny, ragged, stay)
    assert torch.allclose(got, wanted, rtol=0, atol=TOLERANCE)
