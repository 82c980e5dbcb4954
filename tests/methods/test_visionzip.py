"""VisionZip: the worked numbers and property tests of its specification."""

from __future__ import annotations

from dataclasses import replace
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
from tiny import FAMILIES, build
from torch import Tensor

from vlmfix.base.pruning import VisualTokens, largest, share_budget
from vlmfix.errors import BadInput, UnsupportedModel
from vlmfix.families import describe_model
from vlmfix.families.tower import Received, Tile
from vlmfix.methods.visionzip import VisionZip, merge_tokens
from vlmfix.registry import build as build_method

CLS = torch.tensor([0.05, 0.30, 0.02, 0.20, 0.08, 0.03, 0.25, 0.07]).double()
KEYS = torch.tensor(
    [[1, 0], [9, 9], [0.9, 0.1], [9, 9], [0, 1], [0.1, 0.9], [9, 9], [0.8, 0.2]]
).double()


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# -- the choice and the merging -------------------------------------------------------------------


def test_worked_example() -> None:
    index, weights = merge_tokens(CLS, KEYS, 3, 2)
    assert index.tolist() == [0, 1, 3, 4, 6]
    hidden = torch.arange(8.0)[:, None].expand(8, 2)
    assert torch.allclose(weights @ hidden, torch.tensor([4.5, 1, 3, 9, 6])[:, None], atol=1e-6)
    expected = torch.eye(8)[index]
    expected[0, [2, 7]] = 0.5
    expected[3, 5] = 1.0
    assert torch.equal(weights, expected)


def by_hand(cls: list[float], keys: Tensor, dominant: int, contextual: int) -> dict[int, list[int]]:
    """What goes into each kept token, the token itself first."""
    every = range(len(cls))
    chosen = sorted(every, key=lambda i: (-cls[i], i))[:dominant]
    rest = [i for i in every if i not in chosen]
    step = max(1, len(rest) // contextual) if contextual else 1
    targets = [rest[at] for at in range(0, len(rest), step)][:contextual]
    groups = {i: [i] for i in (*chosen, *targets)}
    for i in rest:
        if targets and i not in targets:
            unit = keys / keys.norm(dim=1, keepdim=True)
            likeness = [float(unit[i] @ unit[target]) for target in targets]
            groups[targets[likeness.index(max(likeness))]].append(i)
    return groups


def test_against_plain_loops() -> None:
    draw = torch.Generator().manual_seed(2)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=draw))

    alone = 0
    for _ in range(100):
        count = number(1, 30)
        dominant = number(0, count)
        contextual = number(0, count - dominant)
        cls = torch.randint(0, 9, (count,), generator=draw).double()  # with ties
        keys = torch.randn(count, 3, generator=draw, dtype=torch.float64)
        groups = by_hand(cls.tolist(), keys, dominant, contextual)
        index, weights = merge_tokens(cls, keys, dominant, contextual)
        assert index.tolist() == sorted(groups) and len(index) == dominant + contextual
        expected = torch.zeros(len(index), count)
        for row, token in enumerate(sorted(groups)):
            expected[row, token] = 1.0
            for other in groups[token][1:]:
                expected[row, other] = 1 / (len(groups[token]) - 1)
        assert torch.allclose(weights, expected, atol=1e-6)
        alone += contextual > sum(len(group) > 1 for group in groups.values())
    assert alone > 10


def test_every_token_is_used_once() -> None:
    """A contextual token is a sum, target plus mean, and not a mean over its group."""
    index, weights = merge_tokens(noise(50), noise(50, 4, seed=1), 20, 6)
    assert ((weights > 0).sum(0) == 1).all()
    sums = weights.sum(1)
    assert torch.allclose(sums, sums.round(), atol=1e-6) and set(sums.round().tolist()) == {1, 2}
    dominant = torch.isin(index, largest(noise(50), 20))
    assert (sums[dominant] == 1).all() and dominant.sum() == 20


def test_limits() -> None:
    keys = noise(12, 4, seed=1)
    scores = noise(12)
    index, weights = merge_tokens(scores, keys, 5, 0)  # the class token's favourites, no more
    assert torch.equal(index, largest(scores, 5)) and torch.equal(weights, torch.eye(12)[index])
    index, weights = merge_tokens(scores, keys, 8, 4)  # everything is kept
    assert torch.equal(index, torch.arange(12)) and torch.equal(weights, torch.eye(12))
    index, weights = merge_tokens(scores, keys, 0, 1)  # one token of all
    assert index.tolist() == [0] and torch.allclose(weights[0, 1:], torch.full((11,), 1 / 11))
    # 7 are left; a step of 7 // 4 = 1 takes the first four of them.
    rest = sorted(set(range(12)) - set(largest(scores, 5).tolist()))
    index, _ = merge_tokens(scores, keys, 5, 4)
    assert sorted(set(index.tolist()) - set(largest(scores, 5).tolist())) == rest[:4]


def test_keys_count_by_direction_and_ties_by_place() -> None:
    keys = noise(20, 4, seed=1)
    scale = noise(20, 1, seed=2) + 0.1
    one, other = (merge_tokens(noise(20), each, 6, 3) for each in (keys, keys * scale))
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    index, weights = merge_tokens(torch.zeros(6), torch.ones(6, 2), 2, 2)
    assert index.tolist() == [0, 1, 2, 4]
    assert torch.equal(weights[2], torch.tensor([0, 0, 1, 0.5, 0, 0.5]))
    assert torch.equal(weights[3], torch.tensor([0, 0, 0, 0, 1.0, 0]))


# -- images and tiles -----------------------------------------------------------------------------


def visual_tokens(
    tiles: list[tuple[int, int, Received]], place: Tensor | None = None
) -> VisualTokens:
    """Tiles of (rows, columns, what they receive), read in layer 0."""
    if place is None:
        place = torch.arange(sum(rows * columns for rows, columns, _ in tiles))
    return VisualTokens(
        features=torch.zeros(len(place), 2),
        tiles=tuple(Tile(rows, columns, {0: received}) for rows, columns, received in tiles),
        place=place,
        relevance=None,
        question=torch.zeros(0, 2),
        number=0,
    )


def test_class_token_where_there_is_one_and_all_patches_elsewhere() -> None:
    column, cls = CLS.flip(0).float(), CLS.float()
    method = VisionZip(contextual_share=0.0, layer=0)
    for received, expected in (
        (Received(column, cls, KEYS.float()), [1, 3, 6]),
        (Received(column, None, KEYS.float()), [1, 4, 6]),
    ):
        kept = method.keep(visual_tokens([(2, 4, received)]), 3)
        assert kept.index.tolist() == expected and kept.weights is None
    merged = replace(method, contextual_share=0.4).keep(
        visual_tokens([(2, 4, Received(column, cls, KEYS.float()))]), 5
    )
    index, weights = merge_tokens(CLS, KEYS, 3, 2)
    assert torch.equal(merged.index, index) and merged.weights is not None
    assert torch.equal(merged.weights, weights)


@pytest.mark.parametrize(
    ("budget", "contextual"), [(64, 10), (128, 20), (192, 30), (1, 0), (3, 0), (4, 1)]
)
def test_split_of_the_budget(budget: int, contextual: int) -> None:
    received = Received(noise(576), noise(576, seed=1), noise(576, 8, seed=2))
    kept = VisionZip(layer=0).keep(visual_tokens([(24, 24, received)]), budget)
    assert received.cls is not None and len(kept.index) == budget and kept.weights is not None
    dominant = torch.isin(kept.index, largest(received.cls, budget - contextual))
    assert dominant.sum() == budget - contextual
    assert (kept.weights[dominant] > 0).sum() == budget - contextual
    used = (kept.weights > 0).any(0).sum()
    assert used == (576 if contextual else budget)


def test_tiles_merge_apart_and_share_the_budget_by_size() -> None:
    first = Received(noise(8), noise(8, seed=1), noise(8, 3, seed=2))
    second = Received(noise(8, seed=3), noise(8, seed=4), noise(8, 3, seed=5))
    # Tokens of the two tiles alternate in the prompt; two of the second tile are padding.
    place = torch.tensor([0, 1, 8, 9, 2, 3, 4, 11, 12, 5, 6, 13, 14, 7])
    shares = share_budget([8, 6], 9)
    assert shares == [5, 4]
    kept = VisionZip(layer=0, contextual_share=0.5).keep(
        visual_tokens([(2, 4, first), (4, 2, second)], place), 9
    )
    assert kept.index.tolist() == sorted(kept.index.tolist()) and kept.weights is not None
    hidden = noise(14, 5, seed=6)
    merged = kept.weights @ hidden
    assert first.cls is not None and second.cls is not None
    for tile, received, dominant, contextual in ((0, first, 3, 2), (1, second, 2, 2)):
        own = (place // 8 == tile).nonzero().flatten()
        inside = place[own] % 8
        assert received.cls is not None
        index, weights = merge_tokens(
            received.cls[inside], received.key[inside], dominant, contextual
        )
        mine = torch.isin(kept.index, own)
        assert torch.equal(kept.index[mine], own[index])
        assert torch.allclose(merged[mine], weights @ hidden[own], atol=1e-6)


# -- layers and options ---------------------------------------------------------------------------


def test_layer_and_options() -> None:
    found = {}
    for name in FAMILIES:
        tiny = family(name)
        prepared = VisionZip().prepared(describe_model(tiny.model), tiny.model)
        assert build_method(prepared.spec()) == prepared
        found[name] = prepared.encoder_layers(None)  # type: ignore[arg-type]  # not read
    # LLaVA's features come from the layer before the last.
    assert found == dict.fromkeys(FAMILIES, (1,)) | {"llava": (0,), "llava_next": (0,)}
    tiny = family("qwen2_5_vl")
    with pytest.raises(BadInput, match=r"visionzip: layer=0 .*Give one of 1\."):
        VisionZip(layer=0).prepared(describe_model(tiny.model), tiny.model)
    for share in (-0.1, 1.1):
        with pytest.raises(BadInput, match="out of range"):
            VisionZip(contextual_share=share)
    assert build_method("visionzip:tokens=64;contextual_share=0.2") == VisionZip(
        tokens=64, contextual_share=0.2
    )


@pytest.mark.parametrize("name", ["llava_onevision", "idefics2"])
def test_families_without_a_token_per_patch_are_refused(name: str) -> None:
    tiny = build(name)
    with pytest.raises(UnsupportedModel, match="^visionzip: .*cannot be read"):
        VisionZip().prepared(describe_model(tiny.model), tiny.model)


# -- on models ------------------------------------------------------------------------------------

STRONG = "visionzip:ratio=0.5;contextual_share=0.5"


def test_the_model_gets_the_encoders_favourites_and_merged_features() -> None:
    """The whole way by hand, on one layer that is not the default."""
    tiny = build("llava")
    inputs = tiny.inputs(1)
    method = VisionZip(tokens=7, contextual_share=0.4, layer=1)
    pruned = answer(tiny, method, inputs)
    tiny.model.set_attn_implementation("eager")
    encoder = tiny.model.get_encoder(modality="image")
    keys: list[Tensor] = []
    module: Any = encoder.encoder.layers[1].self_attn.k_proj
    handle = module.register_forward_hook(lambda *args: keys.append(args[-1]))
    with torch.no_grad():
        weights = encoder(inputs["pixel_values"], output_attentions=True).attentions[1]
        handle.remove()
        output = tiny.model.get_image_features(inputs["pixel_values"], return_dict=True)
    tiny.model.set_attn_implementation("sdpa")
    features = output.pooler_output[0]
    groups = by_hand(
        weights[0, :, 0, 1:].mean(0).tolist(), keys[0][0, 1:].view(16, 2, 16).mean(1), 4, 3
    )
    assert pruned.kept == [sorted(groups)]
    rows = []
    for token in sorted(groups):
        others = groups[token][1:]
        rows.append(features[token] + (features[others].mean(0) if others else 0))
    output.pooler_output = [torch.stack(rows)]
    assert len(rows) == 7 and any(len(group) > 2 for group in groups.values())
    keep = torch.ones_like(inputs["input_ids"][0], dtype=torch.bool)
    places = (inputs["input_ids"][0] == tiny.image_token_id).nonzero().flatten()
    keep[places[[at for at in range(16) if at not in groups]]] = False
    with torch.no_grad():
        expected = tiny.model(
            input_ids=inputs["input_ids"][:, keep], mm_encoder_outputs={"image": output}
        ).logits[:, -1]
        plain = tiny.model(**inputs).logits[:, -1]
    assert torch.allclose(pruned.logits[0], expected, atol=1e-5)
    assert not torch.allclose(plain, expected, atol=1e-2)


@pytest.mark.parametrize("name", FAMILIES)
def test_batch_equals_singles(name: str) -> None:
    check_batch_equals_singles(family(name), STRONG)


@pytest.mark.parametrize("name", FAMILIES)
def test_keep_all_is_identity(name: str) -> None:
    check_keep_all_is_identity(family(name), ["visionzip:ratio=1", "visionzip:tokens=1000"])


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl"])
def test_text_only(name: str) -> None:
    check_text_only_is_untouched(family(name), STRONG)


def test_a_row_without_image() -> None:
    check_a_row_without_image(family("llava"), STRONG)


def test_the_same_again_and_merging_matters() -> None:
    tiny = family("qwen3_vl")
    inputs = tiny.inputs(2)
    first = answer(tiny, STRONG, inputs)
    assert same_answer(first, answer(tiny, STRONG, inputs))
    assert [len(kept) for kept in first.kept] == [2, 2]
    without = VisionZip(tokens=2, contextual_share=0.0)
    assert not same_answer(first, answer(tiny, without, inputs), exactly=False)


def test_heads_may_be_permuted() -> None:
    tiny = build("llava")
    inputs = tiny.inputs(2)
    first = answer(tiny, STRONG, inputs)
    attention = tiny.model.get_encoder(modality="image").encoder.layers[0].self_attn
    with torch.no_grad():  # two heads of 16 channels each
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            projection.weight.copy_(projection.weight.view(2, 16, 32).flip(0).reshape(32, 32))
            projection.bias.copy_(projection.bias.view(2, 16).flip(0).flatten())
        weight = attention.out_proj.weight
        weight.copy_(weight.view(32, 2, 16).flip(1).reshape(32, 32))
    again = answer(tiny, STRONG, inputs)
    assert again.kept == first.kept and same_answer(first, again, exactly=False)
