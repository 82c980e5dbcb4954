"""The published formulation, which the benchmark compares against, computes the published thing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from kernels_cases import Case, make
from safetensors import safe_open

from vlmfix.bench.per_head import amplify_image, attend_materialised, redistribute_per_head
from vlmfix.kernels import reference
from vlmfix.kernels.reference import FusedEdit


@pytest.mark.parametrize("number", [0, 1, 2])
def test_rows_equal_the_authors_code(golden: Path, number: int) -> None:
    with safe_open(golden / "var" / f"var_{number}.safetensors", "pt") as file:
        facts = file.metadata()
        data = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    start, length = int(facts["image_start"]), int(facts["image_length"])
    sinks = torch.zeros(data["hidden_states"].shape[1] + 8, dtype=torch.bool)
    sinks[data["sink_indices"]] = True
    visual = torch.zeros_like(sinks)
    visual[start : start + length] = True
    groups = (3 * (visual & ~sinks) + 2 * (visual & sinks) + 1 * (sinks & ~visual))[None]

    first = start + length  # rows before the end of the image stay
    pairs = [(data["prefill_attention"][:, :, first:], data["prefill_expected"][:, :, first:])]
    pairs += [(data[f"decode{i}_attention"], data[f"decode{i}_expected"]) for i in range(3)]
    for rows, expected in pairs:
        edited = redistribute_per_head(
            rows,
            groups[:, : rows.shape[-1]],
            keep=float(facts["p"]),
            rho=1 - float(facts["rho"]),  # the code bounds the complement
            minimum_visual_mass=float(facts["minimum_visual_mass"]),
        )
        assert torch.allclose(edited, expected, atol=1e-5)
        assert (edited - rows).abs().max() > 1e-3


@pytest.mark.parametrize("queries", [1, 3])
def test_it_computes_what_the_specification_says(queries: int) -> None:
    call = make(Case(("var",), key_heads=2, shared=4, queries=queries, mask="full"))
    clean, exact = call.clean(torch.float64), call.exact()
    edit, groups = clean.edit, clean.edit.groups
    assert groups is not None and exact.edited.any() and not exact.edited.all()
    found = attend_materialised(
        *clean.arguments()[:3],
        scaling=clean.options["scaling"],
        mask=clean.options["mask"],
        edit=lambda weights: redistribute_per_head(
            weights,
            groups[:, : weights.shape[-1]],
            keep=edit.keep,
            rho=edit.rho,
            minimum_visual_mass=edit.minimum_visual_mass,
        ),
    )
    assert torch.allclose(found, exact.out, atol=1e-12)
    assert found.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("queries", [1, 3])
def test_pai_is_what_the_specification_says(queries: int) -> None:
    clean = make(Case(("gain",), key_heads=2, shared=4, queries=queries, mask="full")).clean(
        torch.float64
    )
    query, key, value, edit = clean.arguments()
    groups = edit.groups
    assert groups is not None and len(groups[:, : key.shape[2]].unique()) == 4
    gain = torch.tensor([[9.0, 9], [1, 1], [1.25, 0.75], [1.25, 0.75]])  # row 0 is not read
    options = {name: clean.options[name] for name in ("scaling", "mask")}
    exact = reference.attend_rows(query, key, value, FusedEdit(groups, gain=gain), **options)
    plain = attend_materialised(query, key, value, **options)
    found = attend_materialised(
        query, key, value, **options,
        edit_scores=lambda scores: amplify_image(scores, groups[:, : key.shape[2]], alpha=0.25),
    )  # fmt: skip
    assert torch.allclose(found, exact.out, atol=1e-12)
    assert (found - plain).abs().max() > 1e-2


def test_a_sample_without_visual_sinks_is_left_alone() -> None:
    weights = torch.rand(2, 2, 1, 6).softmax(-1)
    groups = torch.tensor([[1, 3, 3, 3, 0, 0], [1, 2, 3, 3, 0, 0]])
    edited = redistribute_per_head(weights, groups, keep=0.5, rho=0.0, minimum_visual_mass=0.0)
    assert torch.equal(edited[0], weights[0])
    assert (edited[1] - weights[1]).abs().max() > 1e-2
