"""Heads as options: from "16.29/26.9" to pairs and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
from matrix import family

from vlmfix import registry
from vlmfix.analysis.head_list import head_list, head_names
from vlmfix.base.method import Method
from vlmfix.errors import BadInput
from vlmfix.families import describe_model
from vlmfix.methods import table


@dataclass(frozen=True)
class Listed(Method):
    name: ClassVar[str] = "listed"

    heads: tuple[str, ...] | None = None
    layers: tuple[int, ...] = (3,)


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A method with a list of heads, in the registry."""
    row = registry.MethodInfo("listed", f"{__name__}:Listed", "", "attention", "", "")
    monkeypatch.setattr(table, "METHODS", (*table.METHODS, row))


@pytest.mark.parametrize(
    ("text", "built"),
    [
        ("listed:heads=16.29/26.9", Listed(heads=("16.29", "26.9"))),
        ("listed:heads=0.1;layers=1/2", Listed(heads=("0.1",), layers=(1, 2))),
        ("listed:heads=();layers=()", Listed(heads=(), layers=())),
        ("listed:heads=none", Listed()),
    ],
)
@pytest.mark.usefixtures("listed")
def test_tuples_go_through_text_and_back(text: str, built: Listed) -> None:
    assert registry.build(text) == built
    assert registry.build(built.spec()) == built


def test_names_become_sorted_pairs() -> None:
    info = describe_model(family("llava").model)
    pairs = head_list(("2.0", "1.3", "1.1", "2.0"), info, "listed")
    assert pairs == ((1, 1), (1, 3), (2, 0))
    assert head_list(head_names(pairs), info, "listed") == pairs
    assert head_list((), info, "listed") == ()


@pytest.mark.parametrize("name", ["", "1", "1.2.0", "1,2", "-1.0", "a.b", " 1.2", "1.²"])
def test_what_is_no_head(name: str) -> None:
    info = describe_model(family("llava").model)
    with pytest.raises(BadInput, match=r"listed: head .* is not of the form layer\.head"):
        head_list((name,), info, "listed")


@pytest.mark.parametrize("name", ["3.0", "0.4", "99.99"])
def test_heads_that_the_model_does_not_have(name: str) -> None:
    info = describe_model(family("llava").model)
    with pytest.raises(BadInput, match=r"0 to 2, with heads 0 to 3"):
        head_list((name,), info, "listed")
