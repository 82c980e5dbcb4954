"""The specification itself: worked numbers, and agreement with the methods it stands for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from kernels_cases import Case, make

from vlmfix.errors import BadInput
from vlmfix.kernels.reference import FusedEdit, attend_rows
from vlmfix.methods.pai import lift_scores
from vlmfix.methods.var import redistribute, rules


def one_row(
    weights: list[float], values: list[list[float]], edit: FusedEdit, scale: bool = False
) -> tuple[list[float], Any]:
    """Output and `RowsOutput` of one head whose softmax row is `weights` before any edit."""
    scores = torch.tensor(weights, dtype=torch.float64)
    key = (scores if scale else scores.log())[None, None, :, None]
    value = torch.tensor(values, dtype=torch.float64)[None, None]
    query = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    output = attend_rows(query, key, value, edit, scaling=1.0)
    return output.out.flatten().tolist(), output


def ids(*groups: int) -> torch.Tensor:
    return torch.tensor([groups], dtype=torch.uint8)


VALUES = [[1.0, 0.0], [0.0, 1.0], [2.0, 2.0], [-1.0, 1.0], [0.0, 3.0]]


@pytest.mark.parametrize(
    ("keep", "expected"), [(0.6, (0.64, 1.726667)), (1.0, (0.6, 1.5))], ids=str
)
def test_var_row(keep: float, expected: tuple[float, float]) -> None:
    # Begin (text sink), a visual sink, two visual tokens, text.
    edit = FusedEdit(
        ids(1, 2, 3, 3, 0), epilogue="var", keep=keep, rho=0.5, minimum_visual_mass=0.2
    )
    found, output = one_row([0.3, 0.1, 0.2, 0.1, 0.3], VALUES, edit)
    assert found == pytest.approx(expected, abs=1e-6)
    assert output.masses.flatten().tolist() == pytest.approx([0.3, 0.3, 0.1, 0.3])
    assert output.edited.item()


@pytest.mark.parametrize("change", [{}, {"minimum_visual_mass": 0.4, "rho": 0.2}], ids=str)
def test_var_leaves_rows_that_fail_a_rule(change: dict[str, float]) -> None:
    # 0.25 of the visual mass of 0.35 is on the sink.
    options: dict[str, Any] = {"keep": 0.6, "rho": 0.5, "minimum_visual_mass": 0.2, **change}
    edit = FusedEdit(ids(1, 2, 3, 3, 0), epilogue="var", **options)
    found, output = one_row([0.4, 0.25, 0.05, 0.05, 0.25], VALUES, edit)
    plain, _ = one_row([0.4, 0.25, 0.05, 0.05, 0.25], VALUES, FusedEdit())
    assert found == plain and not output.edited.item()


def test_adhh_row() -> None:
    options: dict[str, Any] = {"groups": ids(0, 1, 1, 2), "epilogue": "drop"}
    listed, other = torch.tensor([True]), torch.tensor([False])
    row, values = [0.2, 0.2, 0.1, 0.5], VALUES[:4]
    found, output = one_row(row, values, FusedEdit(**options, threshold=0.4, heads=listed))
    assert found == pytest.approx([0.4, 0.4]) and output.edited.item()
    assert output.masses.flatten().tolist() == pytest.approx([0.2, 0.3, 0.5, 0.0])
    for kept in ({"threshold": 0.6, "heads": listed}, {"threshold": 0.4, "heads": other}):
        found, output = one_row(row, values, FusedEdit(**options, **kept))
        assert found == pytest.approx([-0.1, 0.9]) and not output.edited.item()


def test_vaf_row() -> None:
    # System keys times 0.95, image keys times 1.15, whatever the sign of the score.
    gain = torch.tensor([[1.0, 1.0], [0.95, 0.95], [1.15, 1.15], [1.0, 1.0]])
    edit = FusedEdit(ids(1, 2, 2, 0), gain=gain)
    identity = torch.eye(4).tolist()
    found, _ = one_row([1.0, 0.5, -2.0, 0.0], identity, edit, scale=True)
    assert found == pytest.approx([0.473305, 0.325297, 0.018352, 0.183046], abs=1e-6)


@pytest.mark.parametrize("queries", [1, 3])
def test_var_is_the_rule_of_the_method(queries: int) -> None:
    call = make(Case(("var",), key_heads=2, shared=4, queries=queries, mask="full"))
    clean = call.clean(torch.float64)
    found = attend_rows(*clean.arguments(), **clean.options)
    edit, mask = clean.edit, clean.options["mask"]
    assert edit.groups is not None
    key, value = (t.repeat_interleave(4, 1) for t in (clean.key, clean.value))
    scores = clean.query @ key.mT * clean.options["scaling"]
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    member = torch.nn.functional.one_hot(edit.groups[:, : key.shape[2]].long(), 4)[..., 1:]
    sums = rules(member.double(), edit.keep, edit.rho, edit.minimum_visual_mass)
    moved, selected = redistribute(weights, *sums)
    assert torch.equal(found.edited, selected) and selected.any() and not selected.all()
    assert torch.allclose(found.out, moved @ value, atol=1e-12)
    assert (found.out - weights @ value).abs().max() > 1e-2


def test_a_gain_is_the_lift_of_the_method() -> None:
    call = make(Case(("gain",), shared=4, mask="padded"))
    clean, alpha = call.clean(torch.float64), 0.5
    groups = torch.randint(2, (2, 65), generator=torch.Generator().manual_seed(3))
    gain = torch.tensor([[1, 1], [1 + alpha, 1 - alpha], [1, 1], [1, 1]])
    edit = FusedEdit(groups.to(torch.uint8), gain=gain)
    found = attend_rows(*clean.arguments()[:3], edit, **clean.options)
    scores = clean.query @ clean.key.mT * clean.options["scaling"]
    lifted = lift_scores(scores, groups * alpha).masked_fill(~clean.options["mask"], -torch.inf)
    assert torch.allclose(found.out, lifted.softmax(-1) @ clean.value, atol=1e-12)


@pytest.mark.parametrize("edits", [("gain", "log_weight"), ("var",), ("drop",)], ids="+".join)
def test_zero_groups_mean_plain_attention(edits: tuple[str, ...]) -> None:
    clean = make(Case((*edits, "groups"), mask="padded")).clean(torch.float32)
    assert clean.edit.groups is not None
    neutral = replace(clean.edit, groups=torch.zeros_like(clean.edit.groups))
    found = attend_rows(*clean.arguments()[:3], neutral, **clean.options)
    plain = attend_rows(*clean.arguments()[:3], FusedEdit(), **clean.options)
    assert torch.equal(found.out, plain.out) and not found.edited.any()
    assert not torch.equal(attend_rows(*clean.arguments(), **clean.options).out, plain.out)


@pytest.mark.parametrize(
    ("epilogue", "groups"), [("var", (0, 1)), ("var", (0, 2)), ("drop", (0, 1))], ids=str
)
def test_rows_with_nothing_to_take_or_to_give_stay(epilogue: str, groups: tuple[int, int]) -> None:
    clean = make(Case((epilogue,))).clean(torch.float32)
    assert clean.edit.groups is not None
    ids = torch.tensor(groups, dtype=torch.uint8)[clean.edit.groups.long() % 2]
    open_rules = {"rho": 0.0, "minimum_visual_mass": 0.0, "threshold": 0.0}
    edit = replace(clean.edit, groups=ids, **open_rules)
    found = attend_rows(*clean.arguments()[:3], edit, **clean.options)
    plain = attend_rows(*clean.arguments()[:3], FusedEdit(), **clean.options)
    assert torch.equal(found.out, plain.out) and not found.edited.any()


def test_rows_that_may_not_be_edited_equal_plain_attention() -> None:
    edits = ("var", "gain", "log_weight", "head_scale", "rows")
    clean = make(Case(edits, queries=3, mask="full")).clean(torch.float32)
    found = attend_rows(*clean.arguments(), **clean.options)
    plain = attend_rows(*clean.arguments()[:3], FusedEdit(), **clean.options)
    chosen = clean.options["rows"][:, None].expand(found.edited.shape)
    assert torch.equal(found.out[~chosen], plain.out[~chosen])
    assert not found.edited[~chosen].any()
    assert ((found.out - plain.out)[chosen].abs().amax(-1) > 1e-3).all()


def test_softcap_comes_before_the_gain() -> None:
    clean = make(Case(("gain", "softcap"))).clean(torch.float64)
    assert clean.edit.groups is not None
    gain = torch.tensor([[1.0, 1], [3, 3], [3, 3], [3, 3]])
    ones = replace(clean.edit, gain=gain, groups=torch.ones_like(clean.edit.groups))
    found = attend_rows(*clean.arguments()[:3], ones, **clean.options)
    capped = 2 * torch.tanh(clean.query @ clean.key.mT * clean.options["scaling"] / 2)
    assert torch.allclose(found.out, (3 * capped).softmax(-1) @ clean.value, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_layout_and_dtypes(dtype: torch.dtype) -> None:
    clean = make(Case(("var",), shared=4, queries=3, value_width=16)).clean(dtype)
    out, masses, edited = attend_rows(*clean.arguments(), **clean.options)
    assert out.shape == (2, 4, 3, 16) and out.transpose(1, 2).is_contiguous()
    assert out.dtype == dtype and edited.dtype == torch.bool
    assert masses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_a_row_that_sees_nothing_gives_zeros() -> None:
    clean = make(Case(("var",), mask="padded")).clean(torch.float64)
    mask = clean.options["mask"].clone()
    mask[1] = False
    found = attend_rows(*clean.arguments(), **{**clean.options, "mask": mask})
    assert not found.out[1].any() and not found.masses[1].any() and not found.edited[1].any()
    assert found.masses[0].sum(-1).allclose(torch.ones(()).double())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epilogue": "vra"}, "use 'plain', 'var' or 'drop'"),
        ({"epilogue": "var"}, "give groups"),
        ({"gain": torch.ones(4, 2)}, "give groups"),
        ({"groups": ids(0), "epilogue": "drop"}, "heads"),
        ({"heads": torch.ones(2, dtype=torch.bool)}, "heads"),
        ({"groups": torch.zeros(1, 3, dtype=torch.int64)}, "needs 2 dimension.s. of torch.uint8"),
        ({"groups": ids(0), "gain": torch.ones(2, 2)}, r"needs \(4, 2\)"),
        ({"log_weight": torch.zeros(3)}, "log_weight"),
        ({"groups": ids(0), "epilogue": "var", "keep": float("nan")}, "not finite"),
    ],
    ids=str,
)
def test_fields_that_make_no_sense_together(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        FusedEdit(**fields)
