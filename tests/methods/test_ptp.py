"""PTP-style pruning: the worked numbers and the property tests of its specification."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from matrix import family
from prompts import internvl_prompt
from pruned import (
    answer,
    check_a_row_without_image,
    check_batch_equals_singles,
    check_keep_all_is_identity,
    check_text_only_is_untouched,
    same_answer,
)
from tiny import FAMILIES, build
from tiny_configs import IMAGE

import vlmfix
from vlmfix.base.observer import SeenRows
from vlmfix.base.pruning import VisualTokens, largest
from vlmfix.engine.kept import _QuestionRows
from vlmfix.errors import BadInput, UnsupportedModel
from vlmfix.families import describe_model
from vlmfix.families.tower import Received, Tile
from vlmfix.methods.ptp import (
    PyramidTokenPruning,
    fuse,
    region_saliency,
    stretched,
    tile_budgets,
)
from vlmfix.registry import build as build_method

TILES = torch.tensor([[1.0, 0, 0], [0.8, 0.6, 0], [0, 1, 0], [0, 0, 1]])
WHOLE = torch.tensor([1.0, 0.5, 0])
LITERAL = [0.3183, 0.3481, 0.2035, 0.1301]
SHARP = [0.3809, 0.5448, 0.0637, 0.0106]


def seen(weights: torch.Tensor, position: int) -> SeenRows:
    """Rows (B, H, R, K) from a position."""
    none = torch.zeros(len(weights), weights.shape[3], dtype=torch.bool)
    return SeenRows(0, weights, position, 0, none, none, none)


# -- worked numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize(("temperature", "expected"), [(1.0, LITERAL), (0.25, SHARP)])
def test_worked_regions(temperature: float, expected: list[float]) -> None:
    cosines = torch.cosine_similarity(TILES, WHOLE[None], dim=1)
    assert torch.allclose(cosines, torch.tensor([0.8944, 0.9839, 0.4472, 0.0]), atol=1e-4)
    saliency = region_saliency(TILES, WHOLE, temperature)
    assert torch.allclose(saliency, torch.tensor(expected), atol=1e-4)
    assert float(saliency.sum()) == pytest.approx(1)
    lengths = torch.tensor([[3.0], [0.2], [1], [9]])
    assert torch.allclose(region_saliency(TILES * lengths, WHOLE * 4, temperature), saliency)


@pytest.mark.parametrize(
    ("budget", "temperature", "expected"),
    [
        (32, 1.0, [10, 11, 7, 4]),
        (32, 0.25, [12, 16, 3, 1]),
        (52, 1.0, [16, 16, 12, 8]),
        (52, 0.25, [16, 16, 16, 4]),
        (64, 1.0, [16, 16, 16, 16]),
        (64, 0.25, [16, 16, 16, 16]),
    ],
)
def test_worked_budgets(budget: int, temperature: float, expected: list[int]) -> None:
    saliency = region_saliency(TILES, WHOLE, temperature).tolist()
    assert tile_budgets([16] * 4, budget, saliency, None, "uniform") == expected


@pytest.mark.parametrize(
    ("alpha", "expected", "kept"),
    [
        (0.0, [0, 0.625, 0.125, 1], [1, 3]),
        (0.5, [0.5, 0.375, 0.4375, 0.5], [0, 3]),
        (1.0, [1, 0.125, 0.75, 0], [0, 2]),
    ],
)
def test_worked_fusion(alpha: float, expected: list[float], kept: list[int]) -> None:
    saliency = torch.tensor([0.05, 0.30, 0.10, 0.45], dtype=torch.float64)
    relevance = torch.tensor([0.9, 0.2, 0.7, 0.1], dtype=torch.float64)
    fused = fuse(stretched(saliency), stretched(relevance), alpha)
    assert torch.allclose(fused, torch.tensor(expected).double(), atol=1e-9)
    assert largest(fused, 2).tolist() == kept
    visual = one_tile(saliency.float(), relevance.float())
    method = PyramidTokenPruning(alpha=alpha, saliency_layer=5)
    assert method.keep(visual, 2).index.tolist() == kept


def test_worked_text_reduction() -> None:
    """Rows of two question tokens, in two forwards or in one: the larger of each key."""
    rows = torch.tensor([[0.10, 0.05, 0.20], [0.02, 0.30, 0.08]])
    heads = torch.stack([rows + 0.01, rows - 0.01])[None]  # their mean over heads counts
    question = torch.tensor([[True, True]])
    for pieces in ([(0, 2)], [(0, 1), (1, 2)]):
        observer = _QuestionRows((0,), question=question, rows_end=9, stop=False)
        for first, last in pieces:
            observer.see_weights(seen(heads[:, :, first:last], first))
        expected = torch.tensor([[0.10, 0.30, 0.20]])
        assert torch.allclose(observer.seen[0], expected, atol=1e-6)
    other = _QuestionRows((0,), question=torch.tensor([[False, True]]), rows_end=9, stop=False)
    other.see_weights(seen(heads, 0))
    assert torch.allclose(other.seen[0], rows[1:], atol=1e-6)


def test_mean_received_attention_tells_no_tiles_apart() -> None:
    """Why regions are not weighed by it: within a tile it sums to 1, whatever the tile shows."""
    weights = torch.softmax(torch.randn(5, 16, 16) * 3, dim=-1)
    means = weights.mean(1).mean(1)
    assert torch.allclose(means, torch.full((5,), 1 / 16))


# -- parts ----------------------------------------------------------------------------------------


def test_constant_values_are_nothing() -> None:
    assert stretched(torch.full((4,), 0.3)).tolist() == [0.0] * 4
    assert stretched(torch.tensor([0.3])).tolist() == [0.0]
    assert stretched(torch.tensor([2.0, 4, 3])).tolist() == [0.0, 1.0, 0.5]


@pytest.mark.parametrize("whole", [0, 2, 4])
def test_budget_of_the_thumbnail(whole: int) -> None:
    saliency = [0.1, 0.2, 0.3, 0.4]

    def split(budget: int, thumbnail: Any) -> tuple[int, list[int]]:
        found = tile_budgets([16] * 5, budget, saliency, whole, thumbnail)
        own = found.pop(whole)
        assert own + sum(found) == budget
        return own, found

    assert split(40, "uniform") == (8, [4, 7, 9, 12])
    assert split(40, "keep") == (16, [3, 5, 7, 9])
    assert split(40, "pool") == (11, [3, 6, 9, 11])
    # "keep" leaves each tile one token, and takes one itself.
    assert split(12, "keep") == (8, [1, 1, 1, 1])
    assert split(3, "keep")[0] == 1
    # All but one: the thumbnail takes what the tiles have no room for.
    for thumbnail in ("uniform", "keep", "pool"):
        own, rest = split(79, thumbnail)
        assert own in (15, 16) and sorted(rest)[1:] == [16] * 3


def test_budgets_always_sum() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(500):
        tiles = int(torch.randint(2, 8, (1,), generator=generator))
        counts = torch.randint(0, 20, (tiles,), generator=generator).tolist()
        whole = int(torch.randint(tiles, (1,), generator=generator))
        counts[whole] += 1
        saliency = torch.rand(tiles - 1, generator=generator).tolist()
        budget = int(torch.randint(1, sum(counts) + 1, (1,), generator=generator))
        for thumbnail in ("uniform", "keep", "pool"):
            found = tile_budgets(counts, budget, saliency, whole, thumbnail)
            assert sum(found) == budget
            assert all(0 <= share <= count for share, count in zip(found, counts, strict=True))


def test_equal_tiles_get_equal_budgets() -> None:
    same = region_saliency(WHOLE.repeat(4, 1), WHOLE, 0.25).tolist()
    for budget in range(4, 65):
        shares = tile_budgets([16] * 4, budget, same, None, "uniform")
        assert max(shares) - min(shares) <= 1


def tile_of(saliency: torch.Tensor, cls_output: torch.Tensor | None = None) -> Tile:
    count = len(saliency)
    side = int(count**0.5)
    received = Received(torch.zeros(count), saliency, torch.zeros(count, 1))
    return Tile(side, count // side, {5: received}, cls_output)


def one_tile(saliency: torch.Tensor, relevance: torch.Tensor | None) -> VisualTokens:
    count = len(saliency)
    features = torch.zeros(count, 2)
    place = torch.arange(count)
    return VisualTokens(features, (tile_of(saliency),), place, relevance, torch.zeros(0, 2), 0)


def picture(seed: int = 0, whole: int | None = 0) -> VisualTokens:
    """Five tiles of 16 tokens, of which one is the thumbnail."""
    generator = torch.Generator().manual_seed(seed)
    classes = [*TILES]
    if whole is not None:
        classes.insert(whole, WHOLE)
    tiles = tuple(tile_of(torch.rand(16, generator=generator), each) for each in classes)
    count = 16 * len(tiles)
    relevance = torch.rand(count, generator=generator)
    place = torch.arange(count)
    return VisualTokens(torch.zeros(count, 2), tiles, place, relevance, torch.zeros(0, 2), 0, whole)


def by_hand(visual: VisualTokens, budgets: list[int], alpha: float) -> list[int]:
    assert visual.relevance is not None
    relevance = visual.relevance.tolist()
    low, high = min(relevance), max(relevance)
    kept = []
    for at, (tile, budget) in enumerate(zip(visual.tiles, budgets, strict=True)):
        cls = tile.received[5].cls
        assert cls is not None
        values = cls.tolist()
        least, most = min(values), max(values)
        scores = {
            16 * at + i: (1 - alpha) * (value - least) / (most - least)
            + alpha * (relevance[16 * at + i] - low) / (high - low)
            for i, value in enumerate(values)
        }
        kept += sorted(scores, key=lambda i: -scores[i])[:budget]
    return sorted(kept)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("whole", [0, 4])
def test_a_picture_by_hand(whole: int, alpha: float) -> None:
    visual = picture(whole=whole)
    method = PyramidTokenPruning(alpha=alpha, temperature=0.25, saliency_layer=5)
    budgets = [12, 16, 3, 1]
    budgets.insert(whole, 8)
    assert method.keep(visual, 40).index.tolist() == by_hand(visual, budgets, alpha)
    flat = PyramidTokenPruning(alpha=alpha, region="uniform", saliency_layer=5)
    assert flat.keep(visual, 40).index.tolist() == by_hand(visual, [8] * 5, alpha)
    kept = PyramidTokenPruning(
        alpha=alpha, region="uniform", thumbnail="keep", saliency_layer=5
    ).keep(visual, 40)
    budgets = [6] * 4
    budgets.insert(whole, 16)
    assert kept.index.tolist() == by_hand(visual, budgets, alpha)


def test_without_instruction_and_region_it_is_the_class_tokens_choice_per_tile() -> None:
    visual = picture(seed=3)
    method = PyramidTokenPruning(alpha=0.0, region="uniform", saliency_layer=5)
    found = method.keep(visual, 30).index
    saliency = visual.received(5, "cls").view(5, 16)
    expected = [16 * at + i for at in range(5) for i in largest(saliency[at], 6).tolist()]
    assert found.tolist() == expected


def test_a_picture_of_one_tile_has_no_region_stage() -> None:
    generator = torch.Generator().manual_seed(0)
    saliency, relevance = torch.rand(2, 16, generator=generator)
    visual = one_tile(saliency, relevance)
    fused = fuse(stretched(saliency), stretched(relevance), 0.5)
    for region in ("cls_cosine", "uniform"):
        method = PyramidTokenPruning(region=region, saliency_layer=5)
        assert torch.equal(method.keep(visual, 5).index, largest(fused, 5))
    alone = PyramidTokenPruning(alpha=0.0, saliency_layer=5)
    assert torch.equal(alone.keep(one_tile(saliency, None), 5).index, largest(saliency, 5))


def test_a_tile_that_is_all_padding_gets_nothing() -> None:
    plain = picture()
    assert plain.place is not None and plain.relevance is not None
    real = plain.place[plain.place // 16 != 3]
    visual = replace(
        plain, features=plain.features[real], place=real, relevance=plain.relevance[real]
    )
    index = PyramidTokenPruning(saliency_layer=5).keep(visual, 20).index
    assert len(index) == 20
    sizes = [int((real[index] // 16 == at).sum()) for at in range(5)]
    assert sizes[3] == 0 and min(sizes[:3] + sizes[4:]) > 0


def test_equal_scores_go_to_the_first() -> None:
    visual = one_tile(torch.full((16,), 0.1), torch.full((16,), 0.2))
    method = PyramidTokenPruning(saliency_layer=5)
    assert method.keep(visual, 6).index.tolist() == list(range(6))


def test_options() -> None:
    assert build_method("ptp:alpha=0;temperature=0.25;region=uniform") == PyramidTokenPruning(
        alpha=0.0, temperature=0.25, region="uniform"
    )
    options: dict[str, Any]
    for options in ({"alpha": 1.1}, {"alpha": -0.1}, {"temperature": 0.0}):
        with pytest.raises(BadInput, match="out of range"):
            PyramidTokenPruning(**options)
    for options in ({"region": "cls"}, {"thumbnail": "drop"}):
        with pytest.raises(BadInput, match="must be"):
            PyramidTokenPruning(**options)
    tiny = family("qwen2_5_vl")
    info = describe_model(tiny.model)
    known = PyramidTokenPruning().prepared(info, tiny.model)
    assert (known.instruction_layer, known.saliency_layer) == (2, 1)
    assert known.relevance_layer(info) == 2
    assert build_method("ptp:alpha=0").prepared(info, tiny.model).relevance_layer(info) is None
    for layer in (-1, 3):
        with pytest.raises(BadInput, match=rf"instruction_layer={layer} .*\[0, 1, 2\]"):
            PyramidTokenPruning(instruction_layer=layer).prepared(info, tiny.model)
    with pytest.raises(BadInput, match=r"ptp: saliency_layer=0 .*Give one of 1\."):
        PyramidTokenPruning(saliency_layer=0).prepared(info, tiny.model)


def test_tiles_without_class_tokens_are_refused_unless_all_count_alike() -> None:
    import transformers as hf
    from tiny_configs import TILINGS, config, decoder, tower

    torch.manual_seed(0)
    model: Any = hf.LlavaNextForConditionalGeneration(
        config(
            "llava_next",
            vision_config=tower("siglip_vision_model", vision_use_head=False),
            text_config=decoder("mistral", sliding_window=None),
            image_token_index=IMAGE,
            image_grid_pinpoints=TILINGS,
            vision_feature_select_strategy="full",
        )
    ).eval()
    with pytest.raises(UnsupportedModel, match="ptp: .* has none. Use region=uniform"):
        vlmfix.wrap(model, "ptp")
    inputs = family("llava_next").inputs(2)
    with vlmfix.wrapped(model, "ptp:region=uniform;tokens=40"), torch.no_grad():
        model(**inputs)
        assert vlmfix.last_call(model).visual_tokens == ((40, 80), (40, 80))


@pytest.mark.parametrize("name", ["llava_onevision", "idefics2"])
def test_families_without_a_token_per_patch_are_refused(name: str) -> None:
    tiny = build(name)
    with pytest.raises(UnsupportedModel, match="^ptp: .*cannot be read"):
        vlmfix.wrap(tiny.model, "ptp")


# -- on models ------------------------------------------------------------------------------------

STRONG = "ptp:ratio=0.5;temperature=0.05"


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_tokens_follow_the_models_own_attention(alpha: float) -> None:
    tiny = build("llava")
    inputs = tiny.inputs(3)
    method = PyramidTokenPruning(tokens=6, alpha=alpha, instruction_layer=1)
    found = answer(tiny, method, inputs).kept
    tiny.model.set_attn_implementation("eager")
    encoder = tiny.model.get_encoder(modality="image")
    with torch.no_grad():
        seen = encoder(inputs["pixel_values"], output_attentions=True).attentions[-1]
        weights = tiny.model(**inputs, output_attentions=True).attentions[1].mean(1)
    for row in range(3):
        visual = (inputs["input_ids"][row] == IMAGE).nonzero().flatten()
        relevance = weights[row, int(visual[-1]) + 1 :][:, visual].amax(0)
        saliency = seen[row].mean(0)[0, 1:]
        fused = fuse(stretched(saliency), stretched(relevance), alpha)
        assert found[row] == largest(fused, 6).tolist()


@pytest.mark.parametrize("name", ["internvl", "llava_next"])
def test_regions_on_models(name: str) -> None:
    """Budgets of tiles follow the class tokens that the vision tower makes."""
    tiny = family(name)
    inputs = internvl_prompt([[4]]) if name == "internvl" else tiny.inputs(1)
    size = 4 if name == "internvl" else 16
    outputs: list[torch.Tensor] = []
    tower: Any = tiny.model.get_encoder(modality="image")
    hook = tower.register_forward_hook(lambda *args: outputs.append(args[-1].last_hidden_state))
    method = f"ptp:ratio=0.5;temperature=0.004;thumbnail={'uniform' if size == 4 else 'keep'}"
    (kept,) = answer(tiny, method, inputs).kept
    hook.remove()
    classes = outputs[0][:, 0]
    if name == "internvl":
        saliency = torch.softmax(
            torch.cosine_similarity(classes[:3], classes[3:]) / 0.004, dim=0
        ).tolist()
        expected = tile_budgets([4] * 4, 8, saliency, 3, "uniform")
        found = [sum(4 * at <= token < 4 * at + 4 for token in kept) for at in range(4)]
    else:
        saliency = torch.softmax(
            torch.cosine_similarity(classes[1:], classes[:1]) / 0.004, dim=0
        ).tolist()
        expected = tile_budgets([16] * 5, 40, saliency, 0, "keep")
        places = [divmod(token - 16, 9) for token in kept if token >= 16]
        tiles = [row // 4 * 2 + column // 4 for row, column in places if column < 8]
        found = [sum(token < 16 for token in kept), *(tiles.count(at) for at in range(4))]
    assert found == expected and len(set(expected)) > 2


def test_pictures_of_internvl_have_one_budget() -> None:
    tiny = family("internvl")
    inputs = internvl_prompt([[4, 1], [3]])
    with vlmfix.wrapped(tiny.model, STRONG):
        tiny.model.generate(**inputs, max_new_tokens=2, do_sample=False, pad_token_id=0)
        assert vlmfix.last_call(tiny.model).visual_tokens == ((8, 16), (2, 4), (6, 12))


def test_the_question_matters() -> None:
    tiny = family("llava")
    inputs = tiny.inputs(1, lengths=[8])
    asked = {**inputs, "input_ids": inputs["input_ids"].clone()}
    asked["input_ids"][:, -8:] = torch.arange(30, 38)
    one, other = (answer(tiny, STRONG, prompt).kept for prompt in (inputs, asked))
    assert one != other
    blind = STRONG + ";alpha=0"
    assert answer(tiny, blind, inputs).kept == answer(tiny, blind, asked).kept


@pytest.mark.parametrize("name", FAMILIES)
def test_batch_equals_singles(name: str) -> None:
    check_batch_equals_singles(family(name), STRONG)


@pytest.mark.parametrize("name", FAMILIES)
def test_keep_all_is_identity(name: str) -> None:
    check_keep_all_is_identity(family(name), ["ptp:ratio=1", "ptp:tokens=1000"])


def test_text_only_and_rows_without_image() -> None:
    check_text_only_is_untouched(family("llava"), STRONG)
    check_a_row_without_image(family("llava"), STRONG)


def test_the_same_again() -> None:
    tiny = family("llava_next")
    inputs = tiny.inputs(2)
    first = answer(tiny, STRONG, inputs)
    assert same_answer(first, answer(tiny, STRONG, inputs))
    assert not same_answer(first, answer(tiny, None, inputs))
