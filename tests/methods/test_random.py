"""Random tokens: as many as asked, each as likely as the other, the same in any batch."""

from __future__ import annotations

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
from tiny import FAMILIES, build

from vlmfix.base.pruning import VisualTokens
from vlmfix.errors import BadInput
from vlmfix.methods.random_tokens import RandomTokens
from vlmfix.registry import build as build_method


def drawn(count: int, budget: int, seed: int = 0, number: int = 0) -> list[int]:
    visual = VisualTokens(torch.zeros(count, 2), (), None, None, torch.zeros(0, 2), number)
    index: list[int] = RandomTokens(seed=seed).keep(visual, budget).index.tolist()
    return index


@pytest.mark.parametrize(("count", "budget"), [(576, 192), (576, 1), (2, 1), (16, 15)])
def test_as_many_as_asked_in_order_without_repeats(count: int, budget: int) -> None:
    for seed in range(20):
        index = drawn(count, budget, seed)
        assert len(set(index)) == budget and index == sorted(index)
        assert min(index) >= 0 and max(index) < count


def test_every_token_has_the_same_chance() -> None:
    """8000 draws of 5 of 20: each token in a quarter of them, within 5 standard deviations."""
    counts = torch.zeros(20)
    for seed in range(8000):
        counts[drawn(20, 5, seed)] += 1
    assert counts.sum() == 40000
    assert float((counts - 2000).abs().max()) < 5 * (8000 * 0.25 * 0.75) ** 0.5


def test_seeds_and_images_draw_apart_and_the_global_generator_plays_no_part() -> None:
    torch.manual_seed(1)
    first = drawn(576, 64)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert drawn(576, 64) == first
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert drawn(576, 64, seed=1) != first and drawn(576, 64, number=1) != first


def test_options() -> None:
    assert build_method("random:tokens=64;seed=7") == RandomTokens(tokens=64, seed=7)
    for options in ({"seed": -1}, {"seed": 2**63}, {"tokens": 0}, {"ratio": 1.5}):
        with pytest.raises(BadInput, match="out of range"):
            RandomTokens(**options)  # type: ignore[arg-type]  # int and float options


# -- on models ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_batch_equals_singles(name: str) -> None:
    check_batch_equals_singles(family(name), "random:ratio=0.5")


@pytest.mark.parametrize("name", FAMILIES)
def test_keep_all_is_identity(name: str) -> None:
    check_keep_all_is_identity(family(name), ["random:ratio=1", "random:tokens=1000"])


@pytest.mark.parametrize("name", ["llava_onevision", "mistral3"])
def test_families_without_places(name: str) -> None:
    """Nothing is asked of the vision tower, so every family with placeholders will do."""
    tiny = build(name)
    inputs = tiny.inputs(2)
    (one, other) = answer(tiny, "random:ratio=0.5", inputs).kept
    assert one == other and len(one) == tiny.image_tokens // 2


def test_text_only_and_rows_without_image() -> None:
    check_text_only_is_untouched(family("llava"), "random")
    check_a_row_without_image(family("llava"), "random")


def test_the_seed_decides() -> None:
    tiny = family("llava")
    inputs = tiny.inputs(2)
    first = answer(tiny, "random", inputs)
    torch.manual_seed(99)
    assert same_answer(first, answer(tiny, "random", inputs))
    assert first.kept[0] == first.kept[1] == drawn(16, 5)
    assert answer(tiny, "random:seed=3", inputs).kept[0] == drawn(16, 5, seed=3)
    assert not same_answer(first, answer(tiny, "random:seed=3", inputs))
