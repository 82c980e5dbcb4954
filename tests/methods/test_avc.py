"""AVC: the worked numbers and property tests of its specification."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from contrast_oracle import attention_maps
from matrix import family, logits
from matrix import prompt as padded_prompt
from tiny import FAMILIES, generate_kwargs

import vlmfix
from vlmfix.base.contrast import Branch, Prompt
from vlmfix.errors import BadInput
from vlmfix.families import describe_model
from vlmfix.methods.avc import AttentionalVisionCalibration, choose_layers, not_blind
from vlmfix.registry import build, find

ATTENTION = torch.tensor(
    [
        [0.02, 0.02, 0.02, 0.10, 0.02, 0.02],
        [0.03, 0.01, 0.01, 0.09, 0.02, 0.01],
        [0.05, 0.02, 0.03, 0.15, 0.12, 0.02],
        [0.01] * 6,
    ],
    dtype=torch.float64,
)
BASE = torch.tensor([2.0, 1.5, 0.0, -1.0], dtype=torch.float64).view(1, 1, 4)
BLIND = torch.tensor([2.2, 0.5, 0.1, -3.0], dtype=torch.float64).view(1, 1, 4)
TOKEN = torch.tensor([1])


def contrast(method: AttentionalVisionCalibration) -> torch.Tensor:
    branches = [BLIND] if method.streams() else []
    return method.contrast(BASE, branches, TOKEN)[0, 0]


def prompt(rows: list[torch.Tensor], width: int | None = None, dtype: Any = None) -> Prompt:
    """Prompts of one start token, (layers, N) attention to N image tokens, and one text token."""
    info = describe_model(family("llava").model)
    length = width or max(row.shape[1] for row in rows) + 2
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    visual, real = ids != 0, ids != 0
    seen = torch.zeros(4, len(rows), length, dtype=dtype or torch.float32)
    for index, row in enumerate(rows):
        start = length - row.shape[1] - 1
        visual[index, start:-1] = True
        real[index, start - 1 :] = True
        # Attention to text is large, and must not enter any mean.
        seen[:, index, start - 1] = seen[:, index, -1] = 0.3
        seen[:, index, start:-1] = row.to(seen.dtype)
    layers = {layer: seen[layer] for layer in reversed(range(4))}
    return Prompt(info, ids, real, visual, {}, layers)


def masked(branch: Branch) -> torch.Tensor:
    tokens = branch.hidden if branch.filled is None else branch.filled
    assert tokens is not None
    return tokens


def test_worked_layers() -> None:
    share = ATTENTION.sum(1) / ATTENTION.sum()
    wanted = torch.tensor([0.243902, 0.207317, 0.475610, 0.073171], dtype=torch.float64)
    assert torch.allclose(share, wanted, rtol=0, atol=1e-6)
    for gamma, layers in ((0.5, [2, 0]), (0.0, [2]), (0.8, [2, 0, 1]), (1.0, [2, 0, 1, 3])):
        assert choose_layers(ATTENTION, gamma).tolist() == layers


def test_a_sum_of_shares_that_rounds_below_one_asks_for_no_further_layer() -> None:
    attention = torch.rand(37, 5, generator=torch.Generator().manual_seed(3))
    for layers in range(1, 38):
        assert len(choose_layers(attention[:layers], 1.0)) <= layers


def test_shares_that_reach_gamma_exactly_are_enough() -> None:
    attention = torch.tensor([[0.25, 0.25], [0.5, 0.0], [0.0, 0.0]])
    assert choose_layers(attention, 0.5).tolist() == [0]


def test_a_token_at_the_threshold_is_blind() -> None:
    attention = torch.tensor([[1.0, 2.0, 3.0]])
    assert not_blind(attention, 0.5, 0.0).tolist() == [True, False, False]


def test_worked_selection() -> None:
    mean = ATTENTION[[2, 0]].mean(0)
    wanted = torch.tensor([0.035, 0.02, 0.025, 0.125, 0.07, 0.02], dtype=torch.float64)
    assert torch.allclose(mean, wanted, rtol=0, atol=1e-9)
    assert float(mean.mean()) == pytest.approx(0.049167, abs=1e-6)
    assert float(mean.std()) == pytest.approx(0.041643, abs=1e-6)
    for deviations, blind in ((1.0, [3]), (0.0, [3, 4]), (2.0, [])):
        assert (~not_blind(ATTENTION, 0.5, deviations)).nonzero().flatten().tolist() == blind


def test_the_deviation_is_unbiased() -> None:
    """0.125 lies 1.8210 unbiased and 1.9948 biased standard deviations above the mean."""
    assert not not_blind(ATTENTION, 0.5, 1.81)[3]
    assert not_blind(ATTENTION, 0.5, 1.9)[3]


def test_other_layers_choose_other_tokens() -> None:
    """With all four layers, the fifth token falls behind."""
    assert (~not_blind(ATTENTION, 0.5, 0.3)).nonzero().flatten().tolist() == [3, 4]
    assert (~not_blind(ATTENTION, 1.0, 0.4)).nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.01, 0.1, 1 / 3, 0.0])
def test_equal_attention_masks_nothing(value: float, dtype: torch.dtype) -> None:
    for count in (0, 1, 2, 7, 576):
        attention = torch.full((3, count), value, dtype=dtype)
        for deviations in (-1.0, 0.0, 1.0, 100.0):
            assert not not_blind(attention, 0.5, deviations).any()


def test_a_threshold_above_every_token_masks_them_all() -> None:
    """No token of N lies more than (N - 1) / sqrt(N) above the mean."""
    attention = torch.zeros(2, 576)
    attention[:, 5] = 0.5
    assert not_blind(attention, 0.5, 23.9).sum() == 575
    assert not_blind(attention, 0.5, 24.0).all()


@pytest.mark.parametrize(
    ("alpha", "logits", "probabilities"),
    [
        (1.0, [1.8, 2.5, -0.1], [0.316123, 0.636594, 0.047282, 0.0]),
        (2.5, [1.5, 4.0, -0.25], [0.074871, 0.912118, 0.013011, 0.0]),
        (0.0, [2.0, 1.5, 0.0], [0.574097, 0.348207, 0.077696, 0.0]),
    ],
)
def test_worked_contrast(alpha: float, logits: list[float], probabilities: list[float]) -> None:
    got = contrast(AttentionalVisionCalibration(alpha=alpha))
    assert torch.allclose(got[:3], torch.tensor(logits).double(), rtol=0, atol=1e-6)
    wanted = torch.tensor(probabilities, dtype=torch.float64)
    assert torch.allclose(got.softmax(-1), wanted, rtol=0, atol=1e-6)
    assert got.softmax(-1)[3] == 0


def test_equal_streams_are_the_identity() -> None:
    base = torch.randn(2, 3, 100, generator=torch.Generator().manual_seed(0))
    for alpha in (0.3, 1.0, 2.5, 7.0):
        free = AttentionalVisionCalibration(alpha=alpha, beta=0.0)
        assert torch.equal(free.contrast(base, [base.clone()], torch.arange(3)), base)
        kept = AttentionalVisionCalibration(alpha=alpha).contrast(base, [base], torch.arange(3))
        plausible = kept == base
        assert (plausible == (base >= base.amax(-1, keepdim=True) + torch.tensor(0.1).log())).all()


def test_beta_one_keeps_the_best_token_of_the_base() -> None:
    for alpha in (0.0, 1.0, 9.0):
        row = contrast(AttentionalVisionCalibration(alpha=alpha, beta=1.0)).softmax(-1)
        assert row.tolist() == [1.0, 0.0, 0.0, 0.0]


def test_what_runs_a_branch() -> None:
    mask = AttentionalVisionCalibration(alpha=0.0)
    assert mask.streams() == 0 and not mask.neutral()
    nothing = AttentionalVisionCalibration(alpha=0.0, beta=0.0)
    assert nothing.streams() == 0 and nothing.neutral()
    assert torch.equal(contrast(nothing), BASE.flatten())
    for on in (AttentionalVisionCalibration(), AttentionalVisionCalibration(alpha=1.0, beta=0.0)):
        assert on.streams() == 1 and not on.neutral()


def test_every_layer_with_attention_is_watched() -> None:
    info = describe_model(family("gemma3").model)
    watched = AttentionalVisionCalibration().watched(info)
    assert list(watched) == list(range(info.num_layers))


def test_branch_masks_what_is_not_blind() -> None:
    method = AttentionalVisionCalibration(alpha=1.0)
    (branch,) = method.branches(prompt([ATTENTION]))
    assert masked(branch).tolist() == [[False, True, True, True, False, True, True, False]]
    assert branch.fill == 0.0 and branch.hidden is None and branch.image
    (branch,) = replace(method, scheme="ones").branches(prompt([ATTENTION]))
    assert branch.fill == 1.0 and masked(branch).sum() == 5
    (branch,) = replace(method, scheme="drop").branches(prompt([ATTENTION]))
    assert branch.filled is None and masked(branch).sum() == 5
    (branch,) = replace(method, deviations=0.0).branches(prompt([ATTENTION]))
    assert masked(branch).sum() == 4
    # The layer that looks most is the first, and counts as any other.
    (branch,) = replace(method, deviations=0.0).branches(prompt([ATTENTION[[2, 0, 1, 3]]]))
    assert masked(branch).tolist() == [[False, True, True, True, False, False, True, False]]


def test_rows_do_not_depend_on_the_batch() -> None:
    """Prompts of other lengths beside it, padding, a row without an image: all the same sets."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.rand(4, count, generator=generator) / 50 for count in (6, 33, 0, 12, 576)]
    for scheme in ("zeros", "noise"):
        method = AttentionalVisionCalibration(alpha=1.0, scheme=scheme, seed=3)
        (batch,) = method.branches(prompt(rows))
        for index, row in enumerate(rows):
            (alone,) = method.branches(prompt([row]))
            length = row.shape[1] + 2
            assert torch.equal(masked(batch)[index, -length:], masked(alone)[0])
            assert not masked(batch)[index, :-length].any()
            if scheme == "noise":
                assert isinstance(batch.fill, torch.Tensor) and isinstance(alone.fill, torch.Tensor)
                assert torch.equal(batch.fill[index, -length:], alone.fill[0])
        assert masked(batch)[4].any() and not masked(batch)[2].any()


def test_noise_is_standard_normal_and_comes_from_a_generator_of_its_own() -> None:
    made = prompt([torch.rand(4, 576, generator=torch.Generator().manual_seed(0)), ATTENTION])
    method = AttentionalVisionCalibration(alpha=1.0, scheme="noise")

    def fill(**options: Any) -> torch.Tensor:
        (branch,) = replace(method, **options).branches(made)
        assert isinstance(branch.fill, torch.Tensor)
        return branch.fill

    noise = fill(seed=1)
    assert noise.shape == (*made.ids.shape, made.info.hidden_size)
    assert noise.dtype == torch.float32
    values = noise[made.visual]
    assert values.mean().abs() < 0.02 and (values.std() - 1).abs() < 0.02
    assert torch.equal(fill(seed=1), noise) and not torch.equal(fill(seed=2), noise)

    torch.manual_seed(11)
    state = torch.get_rng_state()
    first = fill()
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert torch.equal(fill(), first)
    torch.manual_seed(12)
    assert not torch.equal(fill(), first)


class Recording(AttentionalVisionCalibration):
    """Keeps the prompts that it is asked about, and what it answers."""

    prompts: ClassVar[list[Prompt]] = []
    answers: ClassVar[list[Branch]] = []

    def branches(self, prompt: Prompt) -> Sequence[Branch]:
        made = super().branches(prompt)
        self.prompts.append(prompt)
        self.answers.extend(made)
        return made


WAYS: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "no cache": {"use_cache": False},
    "beams": {"num_beams": 3},
    "chunks": {"prefill_chunk_size": 5},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_attention_seen_is_the_models_and_rows_do_not_depend_on_the_batch(
    name: str, way: str
) -> None:
    """Padding, grouped queries, sliding windows; against transformers' own attention maps."""
    if way == "chunks" and name in ("gemma3", "paligemma"):
        pytest.skip("plain transformers gives other logits: chunks cut its bidirectional image")
    tiny = family(name)
    inputs = padded_prompt(tiny)
    alone = [tiny.single(inputs, row) for row in range(3)]
    method = Recording(alpha=1.0, deviations=0.3)
    batches: list[tuple[Prompt, Branch]] = []
    for given in (inputs, *alone):
        method.prompts.clear()
        method.answers.clear()
        with vlmfix.wrapped(tiny.model, method), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            tiny.model.generate(**given, **generate_kwargs(max_new_tokens=2, **WAYS[way]))
        assert len(method.prompts) == 1, "asked once per prompt"
        batches.append((method.prompts[0], method.answers[0]))
    (seen, branch), *singles = batches
    assert torch.equal(seen.ids, inputs["input_ids"])
    assert sorted(seen.seen) == list(range(seen.info.num_layers))
    for row, (one, other) in enumerate(singles):
        width = alone[row]["input_ids"].shape[1]
        assert masked(other).any() and (one.visual & ~masked(other)).any()
        assert torch.equal(masked(branch)[row, -width:], masked(other)[0])
        assert torch.equal(seen.visual[row, -width:], one.visual[0])
        assert torch.equal(seen.real[row], inputs["attention_mask"][row].bool())
        for layer, attention in enumerate(attention_maps(tiny.model, alone[row])):
            wanted = attention[0, :, -1].mean(0)
            assert torch.allclose(seen.seen[layer][row, -width:], wanted, rtol=0, atol=1e-5)
            assert torch.allclose(one.seen[layer][0], wanted, rtol=0, atol=1e-5)
            assert not seen.seen[layer][row, :-width].any()


@pytest.mark.parametrize("name", [*FAMILIES, "ernie4_5_vl_moe"])
def test_if_nothing_is_masked_nothing_changes(name: str) -> None:
    """The second stream is then the prompt itself, so that only rounding is contrasted."""
    tiny = family(name)
    inputs = padded_prompt(tiny)
    plain = logits(tiny.model, inputs)
    tokens = tiny.model.generate(**inputs, **generate_kwargs())
    method = AttentionalVisionCalibration(alpha=2.5, beta=0.0, deviations=-1000.0)
    warned = pytest.warns(UserWarning, match="avc finds all visual tokens of these prompts blind")
    with vlmfix.wrapped(tiny.model, method), warned:
        assert torch.allclose(logits(tiny.model, inputs), plain, rtol=0, atol=1e-4)
        assert torch.equal(tiny.model.generate(**inputs, **generate_kwargs()), tokens)
        assert vlmfix.last_call(tiny.model).streams == 2


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "granite4_vision", "granite_docling"])
def test_a_branch_without_any_visual_token_does_not_depend_on_the_pixels(name: str) -> None:
    """Features that enter deeper layers are masked with the embeddings."""
    tiny = family(name)
    method = AttentionalVisionCalibration(alpha=1.0, beta=0.0, deviations=1000.0)
    branches = []
    for sign in (1, -1):
        inputs = tiny.inputs(batch=2)
        inputs["pixel_values"] = sign * inputs["pixel_values"]
        plain = logits(tiny.model, inputs)
        with vlmfix.wrapped(tiny.model, method):
            branches.append(2 * plain - logits(tiny.model, inputs))
    assert torch.allclose(*branches, rtol=0, atol=1e-4)
    assert (branches[0] - plain).abs().max() > 0.05


def test_schemes_are_different_methods() -> None:
    tiny = family("llava")
    inputs = padded_prompt(tiny)
    made = [logits(tiny.model, inputs)]
    for scheme in ("zeros", "ones", "noise", "drop"):
        with vlmfix.wrapped(tiny.model, f"avc:deviations=0.3;beta=0;scheme={scheme}"):
            made.append(logits(tiny.model, inputs))
    for one, other in itertools.combinations(made, 2):
        assert (one - other).abs().max() > 0.1


def test_the_rule_alone_runs_no_second_stream() -> None:
    tiny = family("llava")
    inputs = padded_prompt(tiny)
    plain = logits(tiny.model, inputs)
    with vlmfix.wrapped(tiny.model, "avc:alpha=0"):
        kept = logits(tiny.model, inputs)
        report = vlmfix.last_call(tiny.model)
    assert report.streams == 1 and report.extra_passes == 0 and report.contrasted_rows == 3
    plausible = plain >= plain.amax(-1, keepdim=True) + torch.tensor(0.1).log()
    assert torch.equal(kept[plausible], plain[plausible])
    assert not kept.softmax(-1)[~plausible].any()


def test_presets_and_options() -> None:
    tiny = family("llava")
    info = describe_model(tiny.model)
    method = AttentionalVisionCalibration()
    assert method.prepared(info, tiny.model) == replace(method, alpha=1.0)
    large = replace(
        info,
        model_type="llava",
        text_type="llama",
        hidden_size=4096,
        num_layers=32,
        vocab_size=32064,
    )
    assert method.prepared(large, tiny.model) == replace(method, alpha=2.5)
    mine = AttentionalVisionCalibration(alpha=0.5)
    assert mine.prepared(large, tiny.model) == mine
    assert method.prepared(replace(large, vocab_size=128000), tiny.model).alpha == 1.0
    assert find("avisc").name == "avc"
    built = build("AvisC:alpha=2;deviations=0.99;scheme=drop;seed=4")
    assert built == AttentionalVisionCalibration(alpha=2.0, deviations=0.99, scheme="drop", seed=4)
    for options in (
        {"alpha": -1.0},
        {"beta": 2.0},
        {"gamma": 1.5},
        {"deviations": 1e6},
        {"seed": -1},
    ):
        with pytest.raises(BadInput, match="out of range"):
            AttentionalVisionCalibration(**options)
    with pytest.raises(BadInput, match="must be one of zeros, ones, noise, drop"):
        AttentionalVisionCalibration(scheme="black")
