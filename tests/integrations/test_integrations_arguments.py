"""Arguments and settings as frameworks write them."""

from __future__ import annotations

from typing import Any

import pytest

from vlmfix import loading
from vlmfix.errors import BadInput, UnknownMethod
from vlmfix.integrations.arguments import MAX_NEW_TOKENS, decoding, load_wrapped, method_spec
from vlmfix.registry import build_stack


@pytest.mark.parametrize(
    ("method", "options", "spec"),
    [
        (None, {}, None),
        ("", {}, None),
        ("var", {}, "var"),
        ("var", {"keep": 0.4}, "var:keep=0.4"),
        ("var:keep=0.4", {"rho": 0.6}, "var:keep=0.4;rho=0.6"),
        ("imba+vhr", {}, "imba+vhr"),
    ],
)
def test_a_method_and_its_options_become_one_text(
    method: str | None, options: dict[str, Any], spec: str | None
) -> None:
    assert method_spec(method, options) == spec
    build_stack(spec)


@pytest.mark.parametrize(
    ("method", "message"), [(None, "unknown argument: keep"), ("imba+vhr", "options of a stack")]
)
def test_options_without_one_method_are_refused(method: str | None, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        method_spec(method, {"keep": 0.4})


def test_a_wrong_option_is_found_before_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loading, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(UnknownMethod, match="no option 'kept'"):
        load_wrapped("emoji", "var", {"kept": 0.4}, None, None)


GREEDY = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False, "num_beams": 1}


@pytest.mark.parametrize(
    ("settings", "arguments"),
    [
        ({}, GREEDY),
        ({"temperature": 0, "top_p": 0, "top_k": None}, GREEDY),
        ({"temperature": 0.7, "do_sample": False}, GREEDY),
        ({"temperature": 0, "do_sample": True}, GREEDY),
        ({"max_new_tokens": 16, "num_beams": 5}, GREEDY | {"max_new_tokens": 16, "num_beams": 5}),
        (
            {"temperature": 0.7},
            GREEDY | {"do_sample": True, "temperature": 0.7, "top_p": 1.0, "top_k": 0},
        ),
        (
            {"do_sample": True, "top_p": 0.9},
            GREEDY | {"do_sample": True, "temperature": 1.0, "top_p": 0.9, "top_k": 0},
        ),
    ],
)
def test_settings_of_a_task_as_arguments_of_generate(
    settings: dict[str, Any], arguments: dict[str, Any]
) -> None:
    assert decoding(settings) == (arguments, [])


def test_settings_that_generate_does_not_know_are_named() -> None:
    settings = {"until": ["\n"], "image_aspect_ratio": "pad", "num_samples": 3}
    assert decoding(settings) == (GREEDY, ["image_aspect_ratio", "num_samples"])


@pytest.mark.parametrize(
    "settings",
    [{"max_new_tokens": 0}, {"max_new_tokens": "many"}, {"temperature": -1}, {"top_p": "x"}],
)
def test_settings_that_cannot_be_used(settings: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="generation settings"):
        decoding(settings)
