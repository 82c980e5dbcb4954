"""PAI's guidance part: the worked numbers of its specification."""

from __future__ import annotations

import pytest
import torch
from matrix import family, logits, prompt

import vlmfix
from vlmfix.base.contrast import Branch, Prompt
from vlmfix.errors import BadInput
from vlmfix.families import describe_model
from vlmfix.families.surgeon import module_state, prompt_without_images
from vlmfix.methods.pai_guidance import ImageGuidance
from vlmfix.registry import build, build_stack


def row(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).view(1, 1, -1)


BASE, BLIND = row(2.0, 1.5, 0.0, -1.0), row(2.2, 0.5, 0.1, -3.0)
TOKEN = torch.tensor([1])


def guided(method: ImageGuidance, base: torch.Tensor, blind: torch.Tensor) -> torch.Tensor:
    return method.contrast(base, [blind], TOKEN)[0, 0]


def test_worked_guidance() -> None:
    got = guided(ImageGuidance(), row(2, 1, 0, -3), row(1, 2, 0, 0))
    wanted = row(-0.303905, -1.503905, -2.403905).flatten()
    assert torch.allclose(got[:3], wanted, rtol=0, atol=1e-6)
    assert got.softmax(-1)[3] == 0


@pytest.mark.parametrize(
    ("gamma", "wanted"),
    [(2.0, [0.316123, 0.636594, 0.047282, 0.0]), (1.1, [0.549282, 0.375633, 0.075084, 0.0])],
)
def test_worked_probabilities(gamma: float, wanted: list[float]) -> None:
    got = guided(ImageGuidance(gamma=gamma), BASE, BLIND).softmax(-1)
    assert torch.allclose(got, row(*wanted).flatten(), rtol=0, atol=1e-6)
    assert got[3] == 0


def test_is_the_published_form() -> None:
    """gamma (c - u) + u, and in probabilities a contrast of logits with alpha = gamma - 1."""
    generator = torch.Generator().manual_seed(0)
    base, blind = (torch.randn(2, 3, 50, generator=generator).double() for _ in range(2))
    got = ImageGuidance(gamma=1.7, beta=0.0).contrast(base, [blind], torch.arange(3))
    with_image, without = base.log_softmax(-1), blind.log_softmax(-1)
    assert torch.allclose(got, 1.7 * (with_image - without) + without)
    contrast = (base + 0.7 * (base - blind)).softmax(-1)
    assert torch.allclose(got.softmax(-1), contrast)


def test_gamma_one_changes_nothing_and_rules_out_nothing() -> None:
    assert ImageGuidance(gamma=1.0).neutral() and ImageGuidance(gamma=1.0).streams() == 0
    assert not ImageGuidance().neutral() and ImageGuidance().streams() == 1
    assert ImageGuidance(beta=0.0).streams() == 1 and not ImageGuidance(beta=0.0).neutral()


def test_equal_streams_and_beta_one() -> None:
    same = guided(ImageGuidance(gamma=5.0, beta=0.0), BASE, BASE)
    assert torch.equal(same, BASE.log_softmax(-1).flatten())
    only = guided(ImageGuidance(gamma=5.0, beta=1.0), BASE, BLIND).softmax(-1)
    assert only.tolist() == [1.0, 0.0, 0.0, 0.0]
    free = guided(ImageGuidance(gamma=2.0, beta=0.0), BASE, BLIND).softmax(-1)
    assert free[3] > 0


def test_the_weight_does_not_grow() -> None:
    tokens = torch.tensor([1, 500])
    got = ImageGuidance().contrast(BASE.expand(1, 2, 4), [BLIND.expand(1, 2, 4)], tokens)
    assert torch.equal(got[:, 0], got[:, 1])


def test_the_branch_is_the_prompt_without_its_images() -> None:
    info = describe_model(family("llava").model)
    ids = torch.zeros(1, 3, dtype=torch.long)
    asked = Prompt(info, ids, ids == 0, ids == 1, {})
    assert ImageGuidance().branches(asked) == [Branch(image=False)]


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3"])
def test_with_the_attention_part_it_is_the_whole_of_pai(name: str) -> None:
    """The boost acts on the prompt as it is and not on the text alone."""
    tiny = family(name)
    inputs, method = prompt(tiny), ImageGuidance(gamma=1.5, beta=0.0)
    text = prompt_without_images(tiny.model, describe_model(tiny.model), inputs)
    with module_state(tiny.model):
        blind = logits(tiny.model, text)
    with vlmfix.wrapped(tiny.model, "pai:alpha=0.5;start_layer=0"):
        boosted = logits(tiny.model, inputs)
    with vlmfix.wrapped(tiny.model, ["pai:alpha=0.5;start_layer=0", method]):
        both = logits(tiny.model, inputs)
    wanted = method.contrast(boosted[:, None], [blind[:, None]], TOKEN)[:, 0]
    assert torch.allclose(both, wanted, rtol=0, atol=1e-4)
    with vlmfix.wrapped(tiny.model, method):
        assert not torch.allclose(logits(tiny.model, inputs), wanted, rtol=0, atol=1e-2)


def test_options() -> None:
    assert build("pai_guidance:gamma=2;beta=0.2") == ImageGuidance(2.0, 0.2)
    assert [method.name for method in build_stack("pai+pai_guidance")] == ["pai", "pai_guidance"]
    for options in ({"gamma": 0.9}, {"beta": -0.1}):
        with pytest.raises(BadInput, match="out of range"):
            ImageGuidance(**options)
