"""HiPrune: the worked numbers and property tests of its specification."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, get_args

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
from torch import Tensor

from vlmfix.base.pruning import VisualTokens, share_budget
from vlmfix.errors import BadInput, UnsupportedModel
from vlmfix.families import describe_model
from vlmfix.families.tower import Received, Tile
from vlmfix.methods.hiprune import (
    HiPrune,
    Neighbors,
    choose_tokens,
    default_object_layer,
    neighbor_places,
)
from vlmfix.registry import build as build_method

OBJECT = torch.tensor(
    [[0.01, 0.02, 0.03, 0.30], [0.05, 0.04, 0.06, 0.02], [0.07, 0.08, 0.25, 0.03], [0.01] * 4],
    dtype=torch.float64,
).flatten()
DEEP = torch.tensor(
    [
        [0.10, 0.09, 0.01, 0.02],
        [0.03, 0.11, 0.04, 0.12],
        [0.05, 0.06, 0.07, 0.08],
        [0.02, 0.13, 0.03, 0.04],
    ],
    dtype=torch.float64,
).flatten()
GRID = torch.arange(16)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# -- the choice -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "alpha", "neighbors", "expected"),
    [
        (8, 0.7, "reference", [0, 1, 2, 3, 4, 5, 7, 13]),
        (8, 0.7, "strict", [0, 1, 2, 3, 5, 7, 11, 13]),
        (10, 1.0, "reference", [0, 2, 3, 4, 6, 7, 9, 10, 11, 14]),
        (10, 1.0, "strict", [2, 3, 5, 6, 7, 9, 10, 11, 13, 14]),
        (8, 0.3, "reference", [0, 1, 5, 7, 9, 10, 11, 13]),
        (8, 0.3, "strict", [0, 1, 5, 7, 9, 10, 11, 13]),
    ],
)
def test_worked_grid(budget: int, alpha: float, neighbors: Neighbors, expected: list[int]) -> None:
    chosen = choose_tokens(OBJECT, DEEP, GRID, (4, 4), budget, alpha, neighbors)
    assert chosen.tolist() == expected


@pytest.mark.parametrize(("budget", "anchors"), [(192, 4), (128, 3), (64, 1), (32, 1)])
def test_anchors_of_the_papers_budgets(budget: int, anchors: int) -> None:
    """With alpha 0.1. No register is near a peak, so what is kept there belongs to an anchor."""
    peaks = torch.tensor([53, 149, 245, 341, 437])
    near = (peaks[:, None] + torch.tensor([0, -1, 1, -24, 24])).flatten()
    seen, deep = torch.zeros(576), torch.ones(576)
    seen[peaks], deep[near] = 1.0, 0.0
    chosen = choose_tokens(seen, deep, torch.arange(576), (24, 24), budget, 0.1)
    assert torch.isin(near, chosen).nonzero().flatten().tolist() == list(range(5 * anchors))


def test_neighbors() -> None:
    def places(place: int, shape: tuple[int, int], neighbors: Neighbors) -> list[int]:
        return sorted(neighbor_places(torch.tensor([place]), shape, neighbors).tolist())

    assert places(4, (3, 4), "strict") == [0, 5, 8]
    assert places(4, (3, 4), "reference") == [0, 3, 5, 8]
    assert places(11, (3, 4), "strict") == [7, 10]
    assert places(11, (3, 4), "reference") == [7, 10, 11, 11]
    assert places(0, (3, 4), "reference") == [0, 0, 1, 4]
    assert places(6, (3, 4), "strict") == places(6, (3, 4), "reference") == [2, 5, 7, 10]
    assert places(0, (1, 1), "strict") == []


def by_hand(
    seen: list[float],
    deep: list[float],
    place: list[int],
    shape: tuple[int, int],
    budget: int,
    alpha: float,
    neighbors: Neighbors,
) -> list[int]:
    """The choice in words of the specification, on lists."""
    rows, columns = shape
    every = range(len(place))
    anchors = sorted(every, key=lambda i: (-seen[i], i))[: round(budget * alpha / 5)]
    around: set[int] = set()
    for anchor in anchors:
        row, column = divmod(place[anchor], columns)
        if neighbors == "strict":
            near = [(row, column - 1), (row, column + 1), (row - 1, column), (row + 1, column)]
            around |= {r * columns + c for r, c in near if 0 <= r < rows and 0 <= c < columns}
        else:
            for step in (-1, 1, -columns, columns):
                around.add(min(max(place[anchor] + step, 0), rows * columns - 1))
    buffers = [i for i in every if place[i] in around and i not in anchors]
    buffers = sorted(buffers, key=lambda i: (-deep[i], i))[: budget - len(anchors)]
    group = [*anchors, *buffers]
    others = sorted((i for i in every if i not in group), key=lambda i: (-deep[i], i))
    return sorted([*group, *others[: budget - len(group)]])


def test_two_hundred_random_grids() -> None:
    draw = torch.Generator().manual_seed(3)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=draw))

    overfull = 0
    for trial in range(200):
        shape = (number(1, 6), number(1, 6))
        size = shape[0] * shape[1]
        here = torch.randperm(size, generator=draw)[: number(max(1, size // 2), size)].sort().values
        # Few values, so that there are ties.
        seen, deep = (torch.randint(0, 5, (len(here),), generator=draw) / 7 for _ in range(2))
        budget, alpha = number(1, len(here)), number(0, 10) / 10
        for neighbors in get_args(Neighbors):
            chosen = choose_tokens(seen, deep, here, shape, budget, alpha, neighbors)
            assert len(chosen) == budget
            assert bool((chosen[1:] > chosen[:-1]).all())
            assert int(chosen[0]) >= 0 and int(chosen[-1]) < len(here)
            lists = (seen.tolist(), deep.tolist(), here.tolist())
            expected = by_hand(*lists, shape, budget, alpha, neighbors)
            assert chosen.tolist() == expected, trial
            overfull += 5 * round(budget * alpha / 5) > budget
    assert overfull >= 20


def test_equal_values_go_by_place() -> None:
    flat = torch.zeros(16)
    assert choose_tokens(flat, flat, GRID, (4, 4), 5, 0.0).tolist() == [0, 1, 2, 3, 4]
    assert choose_tokens(flat, flat, GRID, (4, 4), 5, 1.0).tolist() == [0, 1, 2, 3, 4]
    # The anchor is 0 with its neighbours 1 and 4; 2 and 3 are the first of what is left.
    assert choose_tokens(flat, flat, GRID, (4, 4), 4, 1.0).tolist() == [0, 1, 2, 4]
    # Four neighbours compete for one place.
    seen = torch.zeros(16)
    seen[5] = 1.0
    assert choose_tokens(seen, flat, GRID, (4, 4), 3, 1.0).tolist() == [1, 4, 5]


# -- images, tiles, the question ------------------------------------------------------------------


def visual_tokens(
    tiles: list[tuple[int, int, Tensor, Tensor]],
    place: Tensor | None = None,
    features: Tensor | None = None,
    question: Tensor | None = None,
) -> VisualTokens:
    """Tiles of (rows, columns, object attention, deep attention), read in layers 0 and 1."""
    made = tuple(
        Tile(
            rows,
            columns,
            {
                0: Received(seen.float(), None, torch.zeros(len(seen), 2)),
                1: Received(deep.float(), None, torch.zeros(len(deep), 2)),
            },
        )
        for rows, columns, seen, deep in tiles
    )
    if place is None:
        place = torch.arange(sum(rows * columns for rows, columns, *_ in tiles))
    return VisualTokens(
        features=torch.zeros(len(place), 2) if features is None else features,
        tiles=made,
        place=place,
        relevance=None,
        question=torch.zeros(0, 2) if question is None else question,
        number=0,
    )


METHOD = HiPrune(alpha=0.7, object_layer=0, deep_layer=1)


def test_one_tile() -> None:
    kept = METHOD.keep(visual_tokens([(4, 4, OBJECT, DEEP)]), 8)
    assert kept.weights is None
    assert kept.index.tolist() == [0, 1, 2, 3, 5, 7, 11, 13]
    reference = replace(METHOD, neighbors="reference")
    kept = reference.keep(visual_tokens([(4, 4, OBJECT, DEEP)]), 8)
    assert kept.index.tolist() == [0, 1, 2, 3, 4, 5, 7, 13]


def test_tiles_choose_apart_and_share_the_budget_by_size() -> None:
    seen, deep = noise(2, 8), noise(2, 8, seed=1)
    first, second = (2, 4, seen[0], deep[0]), (4, 2, seen[1], deep[1])
    # Tokens of the two tiles alternate in the prompt; two of the second tile are padding.
    place = torch.tensor([0, 1, 8, 9, 2, 3, 4, 11, 12, 5, 6, 13, 14, 7])
    tokens = visual_tokens([first, second], place)
    present = torch.tensor([0, 1, 3, 4, 5, 6])
    shares = share_budget([8, 6], 9)
    assert shares == [5, 4]
    expected = [
        choose_tokens(seen[0], deep[0], torch.arange(8), (2, 4), 5, 0.7),
        8 + present[choose_tokens(seen[1][present], deep[1][present], present, (4, 2), 4, 0.7)],
    ]
    kept = METHOD.keep(tokens, 9).index
    assert place[kept].sort().values.tolist() == torch.cat(expected).tolist()
    assert kept.tolist() == sorted(kept.tolist())
    # What the one tile sees does not matter to the other.
    other = visual_tokens([first, (4, 2, seen[0], deep[0])], place)
    mine = place < 8
    both = [tokens_kept[mine[tokens_kept]] for tokens_kept in (kept, METHOD.keep(other, 9).index)]
    assert both[0].tolist() == both[1].tolist()


def test_a_budget_smaller_than_the_tiles() -> None:
    tiles = [(1, 2, torch.tensor([0.1, 0.2]), torch.tensor([0.2, 0.1]))] * 3
    assert METHOD.keep(visual_tokens(tiles), 2).index.tolist() == [0, 2]


FEATURES = torch.tensor([[1.0, 0], [0, 5], [3, 3], [0.1, 0.2], [-1, 0], [2, -9]])
QUESTION = torch.tensor([[0.0, 2], [2, 2]])  # mean (1, 2): token 3 points there, then 1 or 2


def question_case(question: Tensor = QUESTION) -> VisualTokens:
    deep = torch.tensor([0.1, 0.3, 0.2, 0.0, 0.5, 0.4])
    return visual_tokens([(2, 3, deep.flip(0), deep)], features=FEATURES, question=question)


def test_tokens_chosen_by_the_question() -> None:
    # Cosines to (1, 2): .447 .894 .949 1 -.447 -.777. The order by deep attention: 4 5 1 2 0 3.
    plain = HiPrune(alpha=0.0, object_layer=0, deep_layer=1)
    assert plain.keep(question_case(), 4).index.tolist() == [1, 2, 4, 5]
    for share, expected in (
        (0.25, [1, 3, 4, 5]),
        (0.5, [2, 3, 4, 5]),
        (0.75, [1, 2, 3, 4]),
        (1.0, [0, 1, 2, 3]),
    ):
        method = replace(plain, text_share=share)
        assert method.keep(question_case(), 4).index.tolist() == expected
        # Cosines do not see the length of features or embeddings.
        longer = replace(question_case(QUESTION * 50), features=FEATURES * 7)
        assert method.keep(longer, 4).index.tolist() == expected
    # Of equal cosines the first.
    same = replace(question_case(), features=torch.ones(6, 2))
    assert replace(plain, text_share=0.5).keep(same, 4).index.tolist() == [0, 1, 4, 5]


def test_the_budget_with_the_question() -> None:
    inside = HiPrune(tokens=10, text_share=0.1)
    on_top = replace(inside, additive=True)
    assert inside.budget(100) == 10 and on_top.budget(100) == 11
    assert on_top.budget(10) == 10 and on_top.budget(8) == 8
    assert HiPrune(tokens=192, text_share=0.1, additive=True).budget(576) == 211
    method = HiPrune(
        tokens=2, alpha=0.0, object_layer=0, deep_layer=1, text_share=0.5, additive=True
    )
    assert method.budget(6) == 3
    assert method.keep(question_case(), 3).index.tolist() == [3, 4, 5]
    assert replace(method, text_share=0.0).keep(question_case(), 2).index.tolist() == [4, 5]


def test_no_question_to_compare_with() -> None:
    method = HiPrune(alpha=0.0, object_layer=0, deep_layer=1, text_share=0.5)
    with pytest.raises(BadInput, match="Put the question after the image"):
        method.keep(question_case(torch.zeros(0, 2)), 4)
    silent = replace(method, text_share=0.0)
    assert silent.keep(question_case(torch.zeros(0, 2)), 2).index.tolist() == [4, 5]


# -- layers and options ---------------------------------------------------------------------------


def test_object_layer() -> None:
    def layer(count: int, layout: str, full: tuple[int, ...] | None = None) -> int:
        every = tuple(range(count)) if full is None else full
        tower: Any = SimpleNamespace(layers=(None,) * count, layout=layout, full_attention=every)
        return default_object_layer(tower)

    assert layer(24, "tiles") == layer(24, "packed") == 8  # CLIP-L: the 9th
    assert layer(32, "patches", (7, 15, 23, 31)) == 15  # Qwen2.5-VL: the 16th
    assert layer(32, "patches") == 15 and layer(27, "tiles") == 9
    assert layer(32, "patches", (3, 11, 19, 27)) == 11  # as near as 19: the first
    assert layer(5, "tiles") == 1
    assert layer(1, "tiles") == layer(1, "patches") == layer(2, "patches") == 0


def test_prepared_fills_in_layers_and_alpha() -> None:
    layers = {}
    for name in FAMILIES:
        tiny = family(name)
        prepared = HiPrune().prepared(describe_model(tiny.model), tiny.model)
        assert prepared.alpha == 0.1
        assert build_method(prepared.spec()) == prepared
        layers[name] = prepared.encoder_layers(None)  # type: ignore[arg-type]  # not read
    # Two layers each: LLaVA's features come from the one before the last, windows are in 0.
    expected = dict.fromkeys(FAMILIES, (0, 1))
    assert layers == expected | {"llava": (0, 0), "llava_next": (0, 0), "qwen2_5_vl": (1, 1)}
    tiny = family("llava")
    info = describe_model(tiny.model)
    chosen = HiPrune(object_layer=1, deep_layer=1, alpha=0.4).prepared(info, tiny.model)
    assert (chosen.object_layer, chosen.deep_layer, chosen.alpha) == (1, 1, 0.4)


def test_the_bundled_model_has_a_preset() -> None:
    from vlmfix import emoji

    model, _ = emoji.load()
    prepared = HiPrune().prepared(describe_model(model), model)
    assert (prepared.alpha, prepared.object_layer, prepared.deep_layer) == (0.5, 1, 3)
    assert round(0.5 * prepared.budget(64) / 5) == 2 and round(0.1 * prepared.budget(64) / 5) == 0
    assert HiPrune(alpha=0.2).prepared(describe_model(model), model).alpha == 0.2


def test_options() -> None:
    for options in ({"alpha": -0.1}, {"alpha": 1.1}, {"text_share": 2.0}, {"text_share": -1.0}):
        with pytest.raises(BadInput, match="out of range"):
            HiPrune(**options)
    with pytest.raises(BadInput, match="must be one of strict, reference"):
        HiPrune(neighbors="wrapped")  # type: ignore[arg-type]  # a user's slip
    with pytest.raises(BadInput, match="two budgets"):
        HiPrune(tokens=3, ratio=0.5)
    assert build_method("hiprune:neighbors=reference;tokens=64;additive=true") == HiPrune(
        tokens=64, neighbors="reference", additive=True
    )
    tiny = family("qwen2_5_vl")
    info = describe_model(tiny.model)
    for name, layer in (("object_layer", 0), ("deep_layer", 0), ("deep_layer", 2)):
        with pytest.raises(BadInput, match=rf"hiprune: {name}={layer} .*Give one of 1\."):
            HiPrune(**{name: layer}).prepared(info, tiny.model)


@pytest.mark.parametrize("name", ["llava_onevision", "idefics2"])
def test_families_without_a_token_per_patch_are_refused(name: str) -> None:
    tiny = build(name)
    with pytest.raises(UnsupportedModel, match="^hiprune: .*cannot be read"):
        HiPrune().prepared(describe_model(tiny.model), tiny.model)


# -- on models ------------------------------------------------------------------------------------

STRONG = "hiprune:ratio=0.5;alpha=1"
WITH_TEXT = "hiprune:ratio=0.5;alpha=1;text_share=0.4"


def test_tokens_are_those_that_the_encoder_itself_attends_to() -> None:
    tiny = build("llava")
    inputs = tiny.inputs(3)
    found = answer(tiny, HiPrune(tokens=7, alpha=0.8, object_layer=0, deep_layer=1), inputs).kept
    tiny.model.set_attn_implementation("eager")
    encoder = tiny.model.get_encoder(modality="image")
    with torch.no_grad():
        weights = encoder(inputs["pixel_values"], output_attentions=True).attentions
    for image in range(3):
        seen, deep = (layer[image].mean((0, 1))[1:].tolist() for layer in weights)
        expected = by_hand(seen, deep, list(range(16)), (4, 4), 7, 0.8, "strict")
        assert found[image] == expected
    assert found[0] != found[1] != found[2]


def test_tiles_of_llava_next() -> None:
    """5 tiles of 4 x 4; the tiles' tokens come row by row of the whole, each with a newline."""
    tiny = family("llava_next")
    (kept,) = answer(tiny, HiPrune(tokens=20, alpha=1.0), tiny.inputs(1)).kept
    base = [at for at in kept if at < 16]
    newlines = [at for at in kept if at >= 16 and (at - 16) % 9 == 8]
    tokens = [divmod(at - 16, 9) for at in kept if at >= 16 and at not in newlines]
    tiles = [
        sum((row // 4, column // 4) == own for row, column in tokens)
        for own in ((0, 0), (0, 1), (1, 0), (1, 1))
    ]
    assert [len(base), *tiles] == [4] * 5
    assert {(at - 16) // 9 for at in newlines} == {row for row, _ in tokens}


def test_the_question_matters_with_text_share_alone() -> None:
    tiny = family("llava")
    inputs = tiny.inputs(1, lengths=[8])
    asked = dict(inputs)
    asked["input_ids"] = inputs["input_ids"].clone()
    asked["input_ids"][:, -8:] = torch.arange(30, 38)
    assert answer(tiny, STRONG, inputs).kept == answer(tiny, STRONG, asked).kept
    one, other = (answer(tiny, WITH_TEXT, prompt).kept for prompt in (inputs, asked))
    assert one != other and len(one[0]) == len(other[0]) == 8
    with torch.no_grad():
        features = tiny.model.get_image_features(inputs["pixel_values"], return_dict=True)
        words = tiny.model.get_input_embeddings()(inputs["input_ids"][0, -8:])
    likeness = torch.cosine_similarity(features.pooler_output[0], words.mean(0), dim=-1)
    (without,) = answer(tiny, "hiprune:tokens=5;alpha=1", inputs).kept
    left = sorted(set(range(16)) - set(without), key=lambda at: -float(likeness[at]))
    assert one[0] == sorted([*without, *left[:3]])
    more = answer(tiny, WITH_TEXT + ";additive=true", inputs).kept
    (eight,) = answer(tiny, STRONG, inputs).kept
    left = sorted(set(range(16)) - set(eight), key=lambda at: -float(likeness[at]))
    assert more[0] == sorted([*eight, *left[:3]])


@pytest.mark.parametrize("method", [STRONG, WITH_TEXT])
@pytest.mark.parametrize("name", FAMILIES)
def test_batch_equals_singles(name: str, method: str) -> None:
    check_batch_equals_singles(family(name), method)


@pytest.mark.parametrize("name", FAMILIES)
def test_keep_all_is_identity(name: str) -> None:
    check_keep_all_is_identity(family(name), ["hiprune:ratio=1", "hiprune:tokens=1000"])


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl"])
def test_text_only(name: str) -> None:
    check_text_only_is_untouched(family(name), WITH_TEXT)


def test_a_row_without_image() -> None:
    check_a_row_without_image(family("llava"), WITH_TEXT)


def test_the_same_again() -> None:
    tiny = family("llava_next")
    inputs = tiny.inputs(2)
    first = answer(tiny, WITH_TEXT, inputs)
    assert same_answer(first, answer(tiny, WITH_TEXT, inputs))
    assert first.kept == answer(tiny, WITH_TEXT, inputs).kept
    assert not same_answer(first, answer(tiny, None, inputs))


def test_window_order_of_the_specification() -> None:
    """A grid of 8 x 12 patches, 2 x 2 merged, windows of 2 x 2 tokens: back to rows by argsort."""
    from transformers.vision_utils import get_vision_window_index

    index, _ = get_vision_window_index(
        torch.tensor([[1, 8, 12]]), spatial_merge_size=2, window_size=16, patch_size=4
    )
    assert index[:16].tolist() == [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11, 12, 13, 18, 19]
    scores = noise(24)
    assert torch.equal(scores[index][torch.argsort(index)], scores)
