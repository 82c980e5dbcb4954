"""The tiny models themselves, so that a failure here is not blamed on vlmfix."""

from __future__ import annotations

import pytest
import tiny
import torch

NAMES = (*tiny.FAMILIES, *tiny.OTHERS)


@pytest.fixture(scope="module", params=NAMES)
def family(request: pytest.FixtureRequest) -> tiny.TinyFamily:
    return tiny.build(request.param)


def test_rows_of_a_padded_batch_equal_singles(
    family: tiny.TinyFamily, request: pytest.FixtureRequest
) -> None:
    if family.name == "kosmos2":
        reason = "transformers counts padding in Kosmos-2's decode positions"
        request.applymarker(pytest.mark.xfail(strict=True, reason=reason))
    inputs = family.inputs(batch=3)
    with torch.no_grad():
        together = family.model.generate(**inputs, **tiny.generate_kwargs())
        for row in range(3):
            alone = family.model.generate(**family.single(inputs, row), **tiny.generate_kwargs())
            assert together[row, -6:].tolist() == alone[0, -6:].tolist()


def test_single_carries_no_padding(family: tiny.TinyFamily) -> None:
    inputs = family.inputs(batch=3, lengths=[4, 9, 5])
    ids = inputs["input_ids"]
    assert (ids[0] == 0).sum() == 5
    alone = family.single(inputs, 0)
    assert alone["input_ids"].shape == (1, ids.shape[1] - 5)
    assert bool(alone["attention_mask"].all())


def test_image_fills_the_stated_positions(family: tiny.TinyFamily) -> None:
    if family.image_token_id is None:
        pytest.skip(f"{family.name} names no image id")
    ids = family.inputs(batch=2)["input_ids"]
    assert (ids == family.image_token_id).sum(1).tolist() == [family.image_tokens] * 2


@pytest.mark.parametrize("name", [n for n in NAMES if n != "llama"])
def test_the_output_depends_on_the_image(name: str) -> None:
    family = tiny.build(name)
    inputs = family.inputs()
    changed = {**inputs, "pixel_values": -inputs["pixel_values"]}
    with torch.no_grad():
        one, other = (_last_logits(family, x) for x in (inputs, changed))
    assert (one - other).abs().max() > 1e-3


def test_same_seed_same_model() -> None:
    one, same, other = tiny.build("llava"), tiny.build("llava"), tiny.build("llava", seed=1)
    inputs = one.inputs(seed=3)
    assert torch.equal(inputs["pixel_values"], same.inputs(seed=3)["pixel_values"])
    with torch.no_grad():
        logits = [f.model(**inputs).logits for f in (one, same, other)]
    assert torch.equal(logits[0], logits[1])
    assert not torch.allclose(logits[0], logits[2])


def _last_logits(family: tiny.TinyFamily, inputs: tiny.Inputs) -> torch.Tensor:
    scores = family.model.generate(
        **inputs,
        **tiny.generate_kwargs(max_new_tokens=1, min_new_tokens=1),
        return_dict_in_generate=True,
        output_logits=True,
    )
    logits: torch.Tensor = scores.logits[0]
    return logits
