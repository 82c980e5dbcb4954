"""From a text to a method: names, aliases, options, stacks and alternatives."""

from __future__ import annotations

import pytest
from matrix import family

import vlmfix
from vlmfix.errors import BadInput, UnknownMethod
from vlmfix.methods.pai import PayAttentionToImage
from vlmfix.methods.table import NOT_OFFERED
from vlmfix.methods.var import VisualAttentionRedistribution
from vlmfix.registry import (
    build,
    build_stack,
    describe,
    find,
    list_methods,
    load_class,
    parse_spec,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("var", [["var"]]),
        ("var,pai", [["var"], ["pai"]]),
        ("var:keep=0.4,rho=0.6,pai", [["var:keep=0.4;rho=0.6"], ["pai"]]),
        ("var:keep=0.4;rho=0.6 , pai:alpha=1", [["var:keep=0.4;rho=0.6"], ["pai:alpha=1"]]),
        ("var+pai:alpha=0.3,pai", [["var", "pai:alpha=0.3"], ["pai"]]),
        ("var:tau=1e+1", [["var:tau=1e+1"]]),
    ],
)
def test_parse_spec(text: str, expected: list[list[str]]) -> None:
    assert parse_spec(text) == expected


@pytest.mark.parametrize("text", ["", " ", ",", "var,", "var++pai"])
def test_parse_spec_refuses_gaps(text: str) -> None:
    with pytest.raises(BadInput, match="a name is missing"):
        parse_spec(text)


def test_build_coerces_by_the_type_of_the_field() -> None:
    built = build("var:keep=0.4;sink_channels=7/31;variant=paper;video=false;tau=none")
    assert built == VisualAttentionRedistribution(
        keep=0.4, sink_channels=(7, 31), variant="paper", video=False
    )
    assert build("pai:start_layer=2") == PayAttentionToImage(start_layer=2)
    assert build("VisAttnSink") == VisualAttentionRedistribution()
    assert build_stack([["var"], "pai"]) == (build("var"), build("pai"))
    assert build_stack(None) == ()


def test_spec_round_trip() -> None:
    method = build("var:keep=0.4;sink_channels=7/31;video=false")
    assert build(method.spec()) == method
    assert build("var").spec() == "var"


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("vat", UnknownMethod, "Did you mean 'var'"),
        ("nothing", UnknownMethod, r"There are: .*\bpai, .*\bvar\b"),
        ("var:nope=1", UnknownMethod, "It has: keep, rho"),
        ("var:keep", BadInput, "no value"),
        ("var:video=perhaps", BadInput, "not of the type"),
        ("var:sink_channels=a/b", BadInput, "not of the type"),
        ("pai:start_layer=1.5", BadInput, "not of the type"),
    ],
)
def test_bad_specs(text: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        build(text)


def test_every_row_is_complete() -> None:
    rows = list_methods()
    assert [row.name for row in rows] == sorted(row.name for row in rows)
    names = [name for row in rows for name in (row.name, *row.aliases)]
    assert len(names) == len(set(names))
    for row in rows:
        cls = load_class(row)
        assert cls.name == row.name == find(row.name).name and cls.stage == row.stage
        facts = describe(row.name)
        assert facts["doc"] and all(option["help"] for option in facts["options"])
        assert "arXiv" in facts["paper"] or "OpenReview" in facts["paper"]


@pytest.mark.parametrize("name", NOT_OFFERED)
def test_a_method_that_is_not_offered_says_why(name: str) -> None:
    assert name not in {row.name for row in list_methods()}
    for spelled in (name, name.replace("_", "-").upper(), f"{name}:rate=0.5"):
        with pytest.raises(UnknownMethod) as raised:
            build(spelled)
        assert NOT_OFFERED[name] in str(raised.value)
        assert "arXiv" in str(raised.value)


def test_wrap_explains_a_method_that_is_not_offered() -> None:
    model = family("llava").model
    with pytest.raises(UnknownMethod, match="use kvpress"):
        vlmfix.wrap(model, "a_vl")
    with pytest.raises(UnknownMethod, match="formulas of VisFlow"):
        vlmfix.wrap(model, "pai+visflow")
    assert "_vlmfix_session" not in model.__dict__
