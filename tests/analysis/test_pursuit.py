"""Matching pursuit over words: worked numbers, least squares, and heads of tiny models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from matrix import family, logits, prompt
from tiny import FAMILIES, build

import vlmfix
from vlmfix.analysis.head_list import head_names
from vlmfix.analysis.pursuit import concept_tokens, head_contributions, pursue, rank_heads
from vlmfix.errors import BadInput, StateError, UnsupportedModel
from vlmfix.families import describe_model


def test_worked_pursuit() -> None:
    heads = torch.tensor([[3, 0], [1, 0.5]], dtype=torch.float64)
    found = pursue(heads, torch.eye(2, dtype=torch.float64))
    assert found.atoms.tolist() == [0, 1]
    assert found.explained.tolist() == pytest.approx([0.975610, 1.0], abs=1e-6)


def test_correlations_are_summed_without_squares() -> None:
    """Columns 3 and 2 + 2: the second wins a sum, the first would win a sum of squares."""
    heads = torch.tensor([[3.0, 0], [0, 2], [0, -2]])
    assert pursue(heads, torch.eye(2)).atoms.tolist() == [1, 0]


def test_atoms_have_unit_norm_and_samples_are_not_centred() -> None:
    heads = torch.tensor([[2.0, 0.5], [2.0, 0.5]])
    found = pursue(heads, torch.tensor([[0.01, 0], [0, 100]]), 1)
    assert found.atoms.tolist() == [0]
    assert found.explained.tolist() == pytest.approx([4 / 4.25])
    # A centred explained variance would have nothing left to explain.


def test_every_step_is_a_least_squares_fit_on_the_best_atom() -> None:
    generator = torch.Generator().manual_seed(0)
    heads = torch.randn(3, 12, 20, generator=generator, dtype=torch.float64)
    words = torch.randn(9, 20, generator=generator, dtype=torch.float64)
    words[4] = words[2] + 1e-3 * words[4]  # nearly parallel
    unit = words / words.norm(dim=-1, keepdim=True)
    found = pursue(heads, words, 30)
    assert found.atoms.shape == found.explained.shape == (3, 9)
    for head in range(3):
        residual = heads[head]
        assert sorted(found.atoms[head].tolist()) == list(range(9))
        for step in range(9):
            correlation = (residual @ unit.mT).abs().sum(0)
            assert found.atoms[head, step] == correlation.argmax()
            support = unit[found.atoms[head, : step + 1]]
            fit = torch.linalg.lstsq(support.mT, heads[head].mT).solution
            residual = heads[head] - fit.mT @ support
            share = 1 - residual.square().sum() / heads[head].square().sum()
            assert found.explained[head, step] == pytest.approx(float(share), abs=1e-9)
    assert (found.explained.diff(dim=-1) >= -1e-12).all()


def test_words_that_lie_close_together_are_fitted_exactly_in_float32() -> None:
    """Spellings of a word point in nearly one direction; float64 is the ruler."""
    generator = torch.Generator().manual_seed(0)
    stems = torch.randn(3, 64, generator=generator)
    words = stems.repeat(8, 1) + 1e-4 * torch.randn(24, 64, generator=generator)
    heads = torch.randn(200, 64, generator=generator)
    exact = pursue(heads.double(), words.double()).explained
    assert torch.allclose(pursue(heads, words).explained.double(), exact, atol=1e-5)


def test_a_word_given_twice_and_a_silent_head() -> None:
    words = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 1, 0]])
    heads = torch.tensor([[[3.0, 1, 2]], [[0, 0, 0]]])
    found = pursue(heads, words)
    assert sorted(found.atoms[0].tolist()) == [0, 1, 2]
    assert found.explained[0].tolist() == pytest.approx([9 / 14, 10 / 14, 10 / 14])
    assert found.explained[1].tolist() == [0, 0, 0]
    assert found.explained.isfinite().all()


@pytest.mark.parametrize(
    ("words", "steps"),
    [(torch.zeros(0, 4), 1), (torch.ones(2, 4), 0), (torch.ones(2, 3), 1)],
)
def test_pursuits_without_sense(words: torch.Tensor, steps: int) -> None:
    with pytest.raises(BadInput, match="at least one word of the same width"):
        pursue(torch.ones(2, 4), words, steps)


class Pieces:
    """A tokenizer of words, in which a leading space may become a piece of its own."""

    names = ("", " ", "red", " red", "blue", "dark", "ish")

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        split = {"darkish": ["dark", "ish"], " darkish": [" ", "dark", "ish"]}
        split |= {" blue": [" ", "blue"], "": [], " ": [" "]}
        return {"input_ids": [self.names.index(piece) for piece in split.get(text, [text])]}

    def decode(self, ids: list[int]) -> str:
        return "".join(self.names[index] for index in ids)


def test_concept_tokens_are_first_pieces_that_are_not_blank() -> None:
    assert concept_tokens(Pieces(), ["red", "darkish", " blue "]) == (2, 3, 4, 5)

    class Processor:
        tokenizer = Pieces()

    assert concept_tokens(Processor(), ["red"]) == (2, 3)
    for nothing in ([], [" "]):
        with pytest.raises(BadInput, match="no token"):
            concept_tokens(Pieces(), nothing)


# -- inside a model --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_contributions_are_the_columns_of_the_projection(name: str) -> None:
    tiny = family(name)
    inputs = prompt(tiny, 2)
    info = describe_model(tiny.model)
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    handles = []
    for layer, attention in info.attention.items():
        module: Any = attention

        def keep(_: Any, args: Any, output: torch.Tensor, layer: int = layer) -> None:
            seen[layer] = (args[0], output)

        handles.append(module.o_proj.register_forward_hook(keep))
    logits(tiny.model, inputs)
    for handle in handles:
        handle.remove()
    written = head_contributions(tiny.model, inputs)
    assert written.keys() == info.attention.keys()
    visual = inputs["input_ids"] == 90
    for layer, heads in written.items():
        projection: Any = info.attention[layer]
        columns = projection.o_proj.weight.unflatten(1, (info.num_heads, -1))
        outputs, result = seen[layer]
        for row in range(2):
            mean = outputs[row, visual[row]].mean(0).unflatten(0, (info.num_heads, -1))
            expected = torch.einsum("hd,mhd->hm", mean, columns)
            assert torch.allclose(heads[row], expected, atol=1e-5)
            total = result[row, visual[row]].mean(0)
            bias = projection.o_proj.bias
            total = total if bias is None else total - bias
            assert torch.allclose(heads[row].sum(0), total, atol=1e-5)


def test_bias_is_left_out() -> None:
    tiny = build("llava")
    inputs = prompt(tiny)
    expected = head_contributions(tiny.model, inputs)
    last: Any = describe_model(tiny.model).attention[2]
    last.o_proj.bias = torch.nn.Parameter(torch.full((64,), 3.0))
    assert torch.allclose(head_contributions(tiny.model, inputs)[2], expected[2], atol=1e-5)


def test_methods_of_a_wrapped_model_are_off_meanwhile() -> None:
    tiny = family("llava")
    inputs = prompt(tiny)
    expected = head_contributions(tiny.model, inputs)
    with vlmfix.wrapped(tiny.model, "head_pursuit:heads=0.1/1.2;alpha=5"):
        got = head_contributions(tiny.model, inputs)
    assert all(torch.equal(got[layer], expected[layer]) for layer in expected)


def test_inputs_and_models_that_cannot_be_read() -> None:
    tiny = build("llava")
    inputs = tiny.inputs(1)
    with pytest.raises(BadInput, match="give each sample an image"):
        head_contributions(tiny.model, {"input_ids": torch.tensor([[1, 7, 8]])})
    with pytest.raises(BadInput, match="needs input_ids"):
        head_contributions(tiny.model, {"pixel_values": inputs["pixel_values"]})
    with pytest.raises(BadInput, match="got no inputs"):
        rank_heads(tiny.model, Pieces(), [], ["red"])
    tiny.model.train()
    with pytest.raises(StateError, match=r"model\.eval"):
        head_contributions(tiny.model, inputs)
    tiny.model.eval()
    module: Any = describe_model(tiny.model).attention[1]
    module.mixer = module.o_proj
    del module.o_proj
    with pytest.raises(UnsupportedModel, match="no output projection"):
        head_contributions(tiny.model, inputs)


def test_a_head_that_writes_a_word_is_ranked_first() -> None:
    """Head 2 of layer 1 is made to write along the unembedding of "red" alone."""
    tiny = build("llava")
    info = describe_model(tiny.model)
    tokens = concept_tokens(Pieces(), ["red"])
    directions = tiny.model.get_output_embeddings().weight[list(tokens)].detach()
    module: Any = info.attention[1]
    columns = module.o_proj.weight.data.view(64, 4, -1)
    columns[:, 2] = directions.mean(0)[:, None] * columns[:, 2].norm(dim=0)
    batches = [tiny.inputs(2, seed=seed) for seed in (1, 2)]
    ranking = rank_heads(tiny.model, Pieces(), batches, ["red"])
    assert len(ranking) == len(set(ranking)) == 12
    assert [head.explained for head in ranking] == sorted(
        (head.explained for head in ranking), reverse=True
    )
    assert (ranking[0].layer, ranking[0].head) == (1, 2)
    assert ranking[0].explained == pytest.approx(1, abs=1e-4) and ranking[1].explained < 0.5
    joined = torch.cat([head_contributions(tiny.model, batch)[0] for batch in batches])
    expected = pursue(joined[:, 3], directions).explained[-1]
    got = next(head.explained for head in ranking if head[:2] == (0, 3))
    assert got == pytest.approx(float(expected), abs=1e-5)
    heads = head_names((head.layer, head.head) for head in ranking[:1])
    assert heads == ("1.2",)
