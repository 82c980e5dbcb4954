"""Steering with given vectors: worked numbers of the edits, files, bad input."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from matrix import VECTORS, family, logits, prompt
from safetensors.torch import save_file

import vlmfix
from vlmfix.base.hidden import Direction
from vlmfix.errors import BadInput, CalibrationNeeded
from vlmfix.methods.steer import Steer, SteeringVectors

ROWS = torch.tensor([[[3.0, 4, 0], [0, 0, 2], [-1, -1, 1]]])
VECTOR = torch.tensor([[1.0, 2, 2]])


def direction(operation: Any, vectors: torch.Tensor, strength: float, **more: bool) -> Direction:
    return Direction(operation, vectors, torch.tensor([strength]), **more)


@pytest.mark.parametrize(
    ("strength", "expected"),
    [
        (0.17, [[2.904089, 4.039189, 0.501213], [0.101143, 0.202287, 1.987171]]),
        (0.10, [[2.944410, 4.029192, 0.309938], [0.062348, 0.124696, 1.995135]]),
        (0.08, [[2.955799, 4.024919, 0.251557], [0.050552, 0.101104, 1.996803]]),
    ],
)
def test_turning_by_worked_numbers(strength: float, expected: list[list[float]]) -> None:
    """Relative and with the norm kept: the form of VISTA (0.17, 0.10) and of VTI (0.08)."""
    turned = direction("add", VECTOR, strength, keep_norm=True, relative=True).apply(ROWS, None)
    assert torch.allclose(turned[0, :2], torch.tensor(expected), atol=2e-6)
    assert torch.allclose(turned.norm(dim=-1), ROWS.norm(dim=-1), rtol=1e-6)


def test_a_gate_is_a_factor_per_row() -> None:
    gate = torch.tensor([[1.0, 1.0, 1.19245]])  # VISTA's for the third row
    turned = direction("add", VECTOR, 0.17, keep_norm=True, relative=True).apply(ROWS, gate)
    assert torch.allclose(turned[0, 2], torch.tensor([-0.899732, -0.780471, 1.257516]), atol=2e-6)
    plain = direction("add", VECTOR, 2.0).apply(ROWS, gate)
    assert torch.allclose(plain, ROWS + 2 * gate[..., None] * VECTOR)


def test_adding_in_lengths_of_the_row() -> None:
    longer = direction("add", VECTOR, 0.5, relative=True).apply(ROWS, None)
    assert torch.allclose(longer[0, 0], torch.tensor([3.0, 4, 0]) + 2.5 * VECTOR[0] / 3)


def test_projection_by_worked_numbers() -> None:
    """Nullu's pairs: the difference of true and hallucinated means, by singular vectors."""
    true = torch.tensor([[1.0, 0, 2], [2, 1, 0], [0, 2, 1], [1, 1, 1]]).double()
    false = torch.tensor([[0.0, 1, 2], [2, 0, 1], [1, 2, 3], [0, 1, 0]]).double()
    basis = torch.linalg.svd((true - false) / 2).Vh.float()
    row = torch.tensor([[[3.0, 4, 0]]])
    one, two = (direction("project", basis[:k], 1.0).apply(row, None)[0, 0] for k in (1, 2))
    assert torch.allclose(one, torch.tensor([2.639620, 4.150949, -0.569810]), atol=2e-6)
    assert torch.allclose(two, torch.tensor([3.333333, 1.666667, -1.666667]), atol=2e-6)
    twice = direction("project", basis[:2], 1.0).apply(two[None, None], None)[0, 0]
    assert torch.allclose(twice, two, atol=1e-6) and (basis[:2] @ two).abs().max() < 1e-6


def test_a_row_of_zeros_stays_one() -> None:
    zeros = torch.zeros(1, 1, 3)
    assert not direction("add", VECTOR, 1.0, keep_norm=True).apply(zeros, None).any()


def write(path: Path, **tensors: torch.Tensor) -> str:
    save_file({name.replace("_", "."): tensor for name, tensor in tensors.items()}, path)
    return str(path)


def test_a_file_steers_as_its_vectors_do(tmp_path: Path) -> None:
    tiny = family("llava")
    inputs = prompt(tiny)
    path = write(tmp_path / "v.safetensors", layer_0=VECTORS[0], layer_2=VECTORS[2])
    plain = logits(tiny.model, inputs)
    with vlmfix.wrapped(tiny.model, f"steer:vectors={path};strength=4"):
        by_file = logits(tiny.model, inputs)
        assert vlmfix.last_call(tiny.model).methods == (f"steer:vectors={path};strength=4.0",)
    with vlmfix.wrapped(tiny.model, Steer(vectors=dict(VECTORS), strength=4.0)):
        assert torch.equal(logits(tiny.model, inputs), by_file)
    assert (by_file - plain).abs().max() > 1e-2


def test_bad_vectors(tmp_path: Path) -> None:
    model = family("llava").model
    eye = torch.eye(64)
    text = tmp_path / "text.safetensors"
    text.write_text("no tensors")
    with pytest.raises(CalibrationNeeded, match="vectors=FILE"):
        vlmfix.wrap(model, Steer())
    cases: list[tuple[dict[str, Any], str]] = [
        ({"vectors": str(tmp_path / "absent")}, "no file"),
        ({"vectors": str(text)}, "is no safetensors file"),
        ({"vectors": write(tmp_path / "a", weight=eye[0])}, r"named?.*layer\.12"),
        ({"vectors": {3: eye[0]}}, "the decoder layers 0 to 2"),
        ({"vectors": {1: eye[0, :32]}}, r"shape \(32,\).*D = 64"),
        ({"vectors": {1: eye[:2]}}, r"operation=add.*\(D,\)"),
        ({"vectors": {1: eye[0]}, "operation": "project"}, r"needs \(k, D\)"),
        ({"vectors": {1: 2 * eye[:2]}, "operation": "project"}, "not orthonormal"),
        ({"vectors": {1: eye[0] * math.nan}}, "not finite"),
    ]
    for fields, message in cases:
        with pytest.raises(BadInput, match=message):
            vlmfix.wrap(model, Steer(**fields))
        assert "_vlmfix_session" not in model.__dict__
    with pytest.raises(BadInput, match="strength"):
        Steer(vectors=VECTORS, strength=1e4)
    assert isinstance(Steer(vectors={0: eye[0]}).vectors, SteeringVectors)
