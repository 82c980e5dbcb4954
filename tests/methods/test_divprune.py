"""DivPrune: the worked picks of its specification, and what holds for every set of tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from matrix import family
from pruned import (
    answer,
    check_a_row_without_image,
    check_batch_equals_singles,
    check_keep_all_is_identity,
    check_text_only_is_untouched,
    same_answer,
)
from pruning_oracle import cut_by_hand
from tiny import FAMILIES, build

import vlmfix
from vlmfix.base.pruning import VisualTokens
from vlmfix.errors import BadInput
from vlmfix.methods.divprune import DivPrune, most_diverse
from vlmfix.registry import build as build_method

EXAMPLE = [[1, 0], [0.99, 0.14], [0, 1], [-1, 0], [0.7, 0.7]]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_hand(vectors: list[list[float]], count: int) -> list[int]:
    """Max-min diversity, pick by pick, in plain Python."""

    def distance(a: list[float], b: list[float]) -> float:
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return 1 - dot / (sum(x * x for x in a) * sum(y * y for y in b)) ** 0.5

    others = range(len(vectors))
    picks: list[int] = []
    while len(picks) < count:
        best, score = -1, -9.0
        for at in others:
            if at in picks:
                continue
            against = picks or [other for other in others if other != at]
            nearest = min(distance(vectors[at], vectors[other]) for other in against)
            if nearest > score + 1e-9:
                best, score = at, nearest
        picks.append(best)
    return picks


@pytest.mark.parametrize("scale", [1.0, 7.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_worked_picks(dtype: torch.dtype, scale: float) -> None:
    vectors = torch.tensor(EXAMPLE, dtype=dtype) * scale
    assert most_diverse(vectors, 3).tolist() == [3, 0, 2]
    assert DivPrune(tokens=3).keep(tokens_of(vectors), 3).index.tolist() == [0, 2, 3]


def tokens_of(features: torch.Tensor) -> VisualTokens:
    return VisualTokens(features, (), None, None, torch.zeros(0, features.shape[1]), 0)


@pytest.mark.parametrize("seed", range(5))
def test_picks_of_random_tokens(seed: int) -> None:
    vectors = noise(14, 5, seed=seed).double()
    picks = most_diverse(vectors, 14).tolist()
    assert picks == by_hand(vectors.tolist(), 14)
    for count in range(1, 14):  # greedy: a smaller budget is a prefix
        assert most_diverse(vectors, count).tolist() == picks[:count]


def test_length_does_not_count() -> None:
    vectors = noise(12, 6)
    lengths = torch.linspace(0.1, 9, 12)[:, None]
    assert torch.equal(most_diverse(vectors, 6), most_diverse(vectors * lengths, 6))


def test_duplicates_come_last_and_lower_indices_first() -> None:
    vectors = torch.tensor([[0.0, 1], [1, 0], [1, 0], [0, 1], [1, 0]])
    assert most_diverse(vectors, 5).tolist() == [0, 1, 2, 3, 4]
    # The first has a duplicate, so the third is farthest from all others; then ties, in order.
    vectors = torch.tensor([[1.0, 0], [1, 0], [-1, 0], [1, 0]])
    assert most_diverse(vectors, 4).tolist() == [2, 0, 1, 3]
    # A zero vector has no direction; it is at distance 1 from all.
    assert most_diverse(torch.tensor([[1.0, 0], [1, 0.01], [0, 0]]), 2).tolist() == [2, 0]


def test_options() -> None:
    assert build_method("divprune:ratio=0.098") == DivPrune(ratio=0.098)
    assert DivPrune(ratio=0.098).budget(576) == 56
    assert DivPrune().budget(576) == 192
    with pytest.raises(BadInput, match="two budgets"):
        DivPrune(tokens=3, ratio=0.5)


# -- on models ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FAMILIES, "llava_onevision", "mistral3"])
def test_the_tokens_of_a_model_are_those_picked(name: str) -> None:
    tiny = family(name) if name in FAMILIES else build(name)
    inputs = tiny.inputs(1)
    names = ("pixel_values", "image_sizes", "image_grid_thw")
    pixels = {key: inputs[key] for key in names if key in inputs}
    with torch.no_grad():
        features = tiny.model.get_image_features(**pixels, return_dict=True).pooler_output[0]
    if name == "llava_next":  # newlines are no tokens: they follow the rows that they end
        real = [at for at in range(88) if at < 16 or (at - 16) % 9 != 8]
        chosen = [real[at] for at in most_diverse(features[real], 20).tolist()]
        ends = {16 + (at - 16) // 9 * 9 + 8 for at in chosen if at >= 16}
        expected, method = sorted({*chosen, *ends}), DivPrune(tokens=20)
    else:
        count = len(features) // 2
        expected, method = most_diverse(features, count).sort().values.tolist(), DivPrune(ratio=0.5)
    assert answer(tiny, method, inputs).kept == [expected]


def test_newlines_inside_the_budget_are_tokens_like_any_other() -> None:
    tiny = family("llava_next")
    inputs = tiny.inputs(2)
    pixels = {name: inputs[name] for name in ("pixel_values", "image_sizes")}
    with torch.no_grad():
        features = tiny.model.get_image_features(**pixels, return_dict=True).pooler_output
    expected = [most_diverse(one, 20).sort().values.tolist() for one in features]
    ends = set(range(24, 88, 9))
    assert all(0 < len(ends & set(own)) < 8 for own in expected)
    inside = DivPrune(tokens=20, newlines="inside")
    assert answer(tiny, inside, inputs).kept == expected
    with vlmfix.wrapped(tiny.model, inside):
        tiny.model.generate(**inputs, max_new_tokens=1, do_sample=False)
        assert vlmfix.last_call(tiny.model).visual_tokens == ((20, 88), (20, 88))
    (shown,), _ = vlmfix.visual_tokens(tiny.model, inputs, inside)
    assert (len(shown.index), shown.budget) == (20 - len(ends & set(expected[0])), 20)
    check_batch_equals_singles(tiny, "divprune:ratio=0.5;newlines=inside")
    # Without newlines there is nothing to count.
    plain = family("llava")
    specs = ("divprune", "divprune:newlines=inside")
    both = [answer(plain, spec, plain.inputs(1)) for spec in specs]
    assert same_answer(*both)


@pytest.mark.parametrize("name", FAMILIES)
def test_batch_equals_singles(name: str) -> None:
    check_batch_equals_singles(family(name), "divprune:ratio=0.5")


@pytest.mark.parametrize("name", ["llama4", "fuyu", "video_llava", "ernie4_5_vl_moe", "hunyuan_vl"])
def test_features_by_another_name_or_way(name: str) -> None:
    """Projected behind the encoder, not pooled, other pixels, experts' types, four axes."""
    tiny = family(name)
    inputs = tiny.inputs(2)
    pruned = answer(tiny, DivPrune(ratio=0.5, newlines="inside"), inputs)  # HunYuan has some
    assert [len(kept) for kept in pruned.kept] == [tiny.image_tokens // 2] * 2
    with torch.no_grad():
        by_hand = tiny.model(**cut_by_hand(tiny, inputs, pruned.kept)).logits[:, -1]
    assert torch.allclose(pruned.logits[0], by_hand, atol=1e-5)
    assert (pruned.logits[0] - answer(tiny, None, inputs).logits[0]).abs().max() > 1e-2


def test_features_of_llama4_are_compared_as_its_language_model_gets_them() -> None:
    tiny = family("llama4")
    inputs = tiny.inputs(1)
    model: Any = tiny.model
    with torch.no_grad():
        hidden = model.get_image_features(inputs["pixel_values"], return_dict=True)[0]
        features = model.multi_modal_projector(hidden)[0]
    expected = most_diverse(features, 2).sort().values.tolist()
    assert answer(tiny, DivPrune(ratio=0.5), inputs).kept == [expected]


def test_tokens_that_come_one_by_one_are_images_again() -> None:
    """Inkling's encoder returns one image per token; a run of placeholders is one image."""
    tiny = family("inkling")
    check_batch_equals_singles(tiny, "divprune:ratio=0.5")
    kept = answer(tiny, "divprune:ratio=0.5", tiny.inputs(2)).kept
    assert [len(own) for own in kept] == [2, 2]


@pytest.mark.parametrize("name", FAMILIES)
def test_keep_all_is_identity(name: str) -> None:
    check_keep_all_is_identity(family(name), ["divprune:ratio=1", "divprune:tokens=1000"])


def test_text_only_and_rows_without_image() -> None:
    check_text_only_is_untouched(family("llava"), "divprune")
    check_a_row_without_image(family("llava"), "divprune")


def test_the_same_again() -> None:
    tiny = family("llava_next")
    inputs = tiny.inputs(2)
    first = answer(tiny, "divprune", inputs)
    assert same_answer(first, answer(tiny, "divprune", inputs))
    assert not same_answer(first, answer(tiny, None, inputs))
