"""Cluster and aggregate: the worked numbers and the property tests of its specification."""

from __future__ import annotations

from collections import Counter

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

import vlmfix
from vlmfix.base.pruning import Kept, VisualTokens
from vlmfix.errors import BadInput
from vlmfix.methods.cluster import (
    ClusterAggregation,
    _assign,
    averages,
    k_means,
    medoids,
    spread_seeds,
)
from vlmfix.registry import build as build_method

EXAMPLE = torch.tensor([[0.0, 0], [0, 1], [10, 10], [10, 11], [20, 0], [0, 2]])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed))


def tokens_of(features: torch.Tensor, number: int = 0) -> VisualTokens:
    return VisualTokens(features, (), None, None, torch.zeros(0, features.shape[1]), number)


def aggregated(features: torch.Tensor, budget: int, **options: object) -> tuple[Kept, torch.Tensor]:
    kept = ClusterAggregation(**options).keep(tokens_of(features), budget)
    assert kept.weights is not None
    return kept, kept.weights.double() @ features.double()


def inertia(points: torch.Tensor, clusters: torch.Tensor) -> float:
    means = averages(clusters, int(clusters.max()) + 1).double() @ points.double()
    return float((points.double() - means[clusters]).square().sum())


# -- worked numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_worked_clusters(dtype: torch.dtype) -> None:
    kept, means = aggregated(EXAMPLE.to(dtype), 3)
    assert kept.index.tolist() == [1, 2, 4]
    assert torch.allclose(means, torch.tensor([[0, 1], [10, 10.5], [20, 0]]).double(), atol=1e-6)
    assert kept.weights is not None and kept.weights.dtype == torch.float32
    third = 1 / 3
    expected = [[third, third, 0, 0, 0, third], [0, 0, 0.5, 0.5, 0, 0], [0, 0, 0, 0, 1, 0]]
    assert torch.allclose(kept.weights, torch.tensor(expected), atol=1e-6)


@pytest.mark.parametrize("seeds", [[0, 2, 4], [4, 3, 5], [2, 4, 1], [0, 5, 4]])
def test_worked_inertia(seeds: list[int]) -> None:
    clusters = k_means(EXAMPLE, seeds, 10)
    labels = clusters.tolist()
    assert [{at for at in range(6) if labels[at] == own} for own in labels] == [
        {0, 1, 5}, {0, 1, 5}, {2, 3}, {2, 3}, {4}, {0, 1, 5},
    ]  # fmt: skip
    assert inertia(EXAMPLE, clusters) == pytest.approx(2.5, abs=1e-6)
    assert sorted(medoids(EXAMPLE, clusters, 3).tolist()) == [1, 2, 4]


def test_worked_chances_of_the_second_seed() -> None:
    """First seed token 0: by squared distance, [0, 0.0012, 0.2421, 0.2676, 0.4843, 0.0048]."""
    squares = EXAMPLE.square().sum(1)
    chances = squares / squares.sum()
    expected = torch.tensor([0, 0.0012, 0.2421, 0.2676, 0.4843, 0.0048])
    assert torch.allclose(chances, expected, atol=1e-4)
    drawn: Counter[int] = Counter()
    total = 0
    for seed in range(6000):
        first, second = spread_seeds(EXAMPLE, 2, generator(seed))
        if first == 0:
            drawn[second] += 1
            total += 1
    assert drawn[0] == 0 and 850 < total < 1150  # the first is any of six
    for at in range(1, 6):
        chance = float(chances[at])
        assert abs(drawn[at] - total * chance) < 5 * (total * chance * (1 - chance)) ** 0.5 + 1


def test_the_third_seed_is_drawn_by_the_nearest_of_two() -> None:
    """Between 0 and 10 a point at 1 is near; one at 5 has 25 of 26 chances."""
    line = torch.tensor([[0.0], [1.0], [5.0], [10.0]])
    thirds: Counter[int] = Counter()
    for seed in range(4000):
        first, second, third = spread_seeds(line, 3, generator(seed))
        if {first, second} == {0, 3}:
            thirds[third] += 1
    total = sum(thirds.values())
    assert total > 700 and set(thirds) == {1, 2}
    assert abs(thirds[1] - total / 26) < 5 * (total * 25 / 26**2) ** 0.5


# -- properties -----------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 2, 7, 30, 59])
def test_mass_is_conserved(budget: int) -> None:
    features = noise(60, 16) + 3
    kept, means = aggregated(features, budget)
    assert kept.weights is not None
    sizes = (kept.weights > 0).sum(1)
    assert int(sizes.sum()) == 60 and bool(((kept.weights > 0).sum(0) == 1).all())
    total = (sizes[:, None] * means).sum(0)
    assert torch.allclose(total, features.double().sum(0), rtol=1e-5)
    assert torch.allclose(kept.weights.sum(1), torch.ones(budget))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("budget", [1, 2, 7, 30, 59])
def test_index_ascends_and_stands_for_its_own_cluster(budget: int, seed: int) -> None:
    features = noise(60, 16, seed=seed)
    kept, means = aggregated(features, budget, seed=seed)
    assert kept.index.tolist() == sorted(set(kept.index.tolist())) and len(kept.index) == budget
    assert kept.weights is not None
    for at, row, mean in zip(kept.index.tolist(), kept.weights, means, strict=True):
        members = row.nonzero().flatten().tolist()
        distances = {i: float((features[i].double() - mean).square().sum()) for i in members}
        assert at in members and distances[at] == pytest.approx(min(distances.values()), abs=1e-5)
    # Every token is with the nearest mean, unless the iterations ran out before they settled.
    settled, means = aggregated(features, budget, seed=seed, iterations=1000)
    assert settled.weights is not None
    nearest = torch.cdist(features.double(), means).argmin(1)
    assert torch.equal(nearest, (settled.weights > 0).float().argmax(0))


def test_inertia_never_rises() -> None:
    points = noise(200, 8)
    for seed in range(5):
        seeds = spread_seeds(points, 12, generator(seed))
        steps = [inertia(points, k_means(points, seeds, count)) for count in range(1, 30)]
        assert all(b <= a + 1e-6 for a, b in zip(steps, steps[1:], strict=False))
        assert steps[-1] < steps[0]
        assert steps[-1] == steps[-2]  # it has settled


@pytest.mark.parametrize("budget", [3, 4, 5, 9])
def test_duplicates_give_what_differs_and_never_the_same_twice(budget: int) -> None:
    """40 tokens of 4 kinds: at most 4 come out, exactly those, whatever the budget."""
    kinds = noise(4, 32) * 5
    which = torch.randint(4, (40,), generator=generator())
    which[:4] = torch.arange(4)
    for seed in range(6):
        kept, means = aggregated(kinds[which], budget, seed=seed)
        if budget == 3:
            assert len(kept.index) == 3
            continue
        assert sorted(which[kept.index].tolist()) == [0, 1, 2, 3]
        assert torch.allclose(means, kinds[which[kept.index]].double(), atol=1e-5)
        assert kept.weights is not None
        assert inertia(kinds[which], (kept.weights > 0).float().argmax(0)) < 1e-8
        # Of equal tokens the first stands for all.
        assert kept.index.tolist() == sorted(which.tolist().index(kind) for kind in range(4))


def test_equal_tokens_become_one() -> None:
    kept, means = aggregated(torch.ones(9, 4) * 0.1, 5)
    assert kept.index.tolist() == [0] and torch.allclose(means, torch.full((1, 4), 0.1).double())


def test_an_empty_cluster_gets_the_farthest_point() -> None:
    points = torch.tensor([[0.0], [1.0], [9.0], [4.0]])
    # The third centre is nobody's nearest; the farthest from its centre is the third point.
    assert _assign(points, torch.tensor([[0.0], [5.0], [100.0]])).tolist() == [0, 0, 2, 1]
    # A point alone in its cluster stays there, however far from the centre it is.
    lone = torch.tensor([[0.0], [0.2], [50.0]])
    assert _assign(lone, torch.tensor([[0.0], [30.0], [-90.0]])).tolist() == [0, 2, 1]
    # Two empty ones.
    found = _assign(torch.tensor([[0.0], [1], [2], [3]]), torch.tensor([[0.0], [70], [80]]))
    assert found.tolist() == [0, 0, 2, 1]


def test_one_cluster_is_the_mean() -> None:
    features = noise(25, 6)
    kept, means = aggregated(features, 1)
    assert torch.allclose(means[0], features.double().mean(0), atol=1e-6)
    nearest = (features - features.mean(0)).square().sum(1).argmin()
    assert kept.index.tolist() == [int(nearest)]


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_the_first_of_two_is_their_medoid(offset: float) -> None:
    """Both are equally far from their mean, whatever the last digits of the features are."""
    for seed in range(100):
        features = noise(5, 48, seed=seed) + offset
        pairs = torch.tensor([1, 0, 2, 1, 0])  # tokens 1 and 4, 0 and 3; token 2 is alone
        assert medoids(features, pairs, 3).tolist() == [1, 0, 2]


def test_medoids_are_a_choice_without_means() -> None:
    features = noise(30, 5)
    mean = ClusterAggregation().keep(tokens_of(features), 6)
    medoid = ClusterAggregation(representative="medoid").keep(tokens_of(features), 6)
    assert torch.equal(mean.index, medoid.index) and medoid.weights is None


def test_the_seed_and_the_number_of_the_image_decide() -> None:
    features = noise(80, 6)
    method = ClusterAggregation()
    torch.manual_seed(1)
    first = method.keep(tokens_of(features), 9).index
    torch.manual_seed(2)
    assert torch.equal(method.keep(tokens_of(features), 9).index, first)
    assert not torch.equal(method.keep(tokens_of(features, number=1), 9).index, first)
    shifted = ClusterAggregation(seed=1).keep(tokens_of(features), 9).index
    assert torch.equal(method.keep(tokens_of(features, number=1), 9).index, shifted)


def test_a_large_offset_does_not_blur_distances() -> None:
    """|c|^2 - 2 x c would lose the differences in 1e6, were the mean not taken out first."""
    features = noise(60, 16) * 0.01 + 30
    seeds = spread_seeds(features, 8, generator())
    exact = features.double()
    first = torch.cdist(exact, exact[seeds]).argmin(1)
    means = torch.stack([exact[first == cluster].mean(0) for cluster in range(8)])
    second = torch.cdist(exact, means).argmin(1)
    assert torch.equal(k_means(features, seeds, 1), second) and not torch.equal(first, second)


def test_options() -> None:
    assert build_method("kmeans:representative=medoid;seed=3;tokens=64") == ClusterAggregation(
        tokens=64, representative="medoid", seed=3
    )
    with pytest.raises(BadInput, match="must be one of mean, medoid"):
        ClusterAggregation(representative="first")  # type: ignore[arg-type]  # a user's slip
    for options in ({"iterations": 0}, {"seed": -1}, {"seed": 2**63}):
        with pytest.raises(BadInput, match="out of range"):
            ClusterAggregation(**options)  # type: ignore[arg-type]  # int options


# -- on models ------------------------------------------------------------------------------------


def test_the_model_gets_the_means_at_the_medoids_places() -> None:
    tiny = family("llava")
    inputs = tiny.inputs(1)
    with torch.no_grad():
        features = tiny.model.get_image_features(inputs["pixel_values"]).pooler_output[0]
    kept, means = aggregated(features, 5)
    seen = []

    def record(module: object, args: object, kwargs: dict[str, torch.Tensor]) -> None:
        seen.append(kwargs["inputs_embeds"])

    hook = tiny.model.get_decoder().register_forward_pre_hook(record, with_kwargs=True)
    with vlmfix.wrapped(tiny.model, "cluster:tokens=5"), torch.no_grad():
        tiny.model(**inputs)
    hook.remove()
    assert torch.allclose(seen[0][0, 2:7].double(), means, atol=1e-5)
    assert answer(tiny, "cluster:tokens=5", inputs).kept == [kept.index.tolist()]


@pytest.mark.parametrize("method", ["cluster:ratio=0.5", "cluster:ratio=0.5;representative=medoid"])
@pytest.mark.parametrize("name", FAMILIES)
def test_batch_equals_singles(name: str, method: str) -> None:
    check_batch_equals_singles(family(name), method)


@pytest.mark.parametrize("name", FAMILIES)
def test_keep_all_is_identity(name: str) -> None:
    check_keep_all_is_identity(family(name), ["cluster:ratio=1", "cluster:tokens=1000"])


def test_text_only_and_rows_without_image() -> None:
    check_text_only_is_untouched(family("llava"), "cluster")
    check_a_row_without_image(family("llava"), "cluster")


def test_the_same_again() -> None:
    tiny = family("llava_next")
    inputs = tiny.inputs(2)
    first = answer(tiny, "cluster", inputs)
    torch.manual_seed(99)
    assert same_answer(first, answer(tiny, "cluster", inputs))
    assert not same_answer(first, answer(tiny, "cluster:representative=medoid", inputs))


def test_an_image_of_one_colour_needs_few_tokens() -> None:
    """Fewer tokens than the budget where no more differ: placeholders shrink with them."""
    tiny = build("llava")
    inputs = tiny.inputs(2)
    inputs["pixel_values"][0] = 0.3
    with torch.no_grad():  # else patches of one colour differ by where they are
        tiny.model.model.vision_tower.embeddings.position_embedding.weight.zero_()
    one, other = answer(tiny, "cluster:tokens=6", inputs).kept
    assert len(one) < len(other) == 6
    told = [
        image
        for own in vlmfix.visual_tokens(tiny.model, inputs, "cluster:tokens=6")
        for image in own
    ]
    assert [(len(image.index), image.budget) for image in told] == [(len(one), 6), (6, 6)]
