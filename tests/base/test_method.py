"""Options that check themselves, presets by structure, ranges of layers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import pytest
from matrix import family

from vlmfix.base.attention import AttentionMethod
from vlmfix.base.method import LayerRange, Preset, Structure, option
from vlmfix.errors import BadInput
from vlmfix.families import describe_model
from vlmfix.registry import list_methods, load_class

SHAPE = Structure("Example", "llava", "llama", 64, 8, (100, 200))


@dataclass(frozen=True)
class Example(LayerRange, AttentionMethod):
    alpha: float | None = option(None, "strength", 0.0, 1.0)
    seed: int = option(0, "random seed", 0, 10, high_open=True)
    mode: Literal["fast", "slow"] | None = option(None, "fast or slow")
    start_layer: int | None = option(None, "first edited layer")
    end_layer: int | None = option(None, "layer after the last edited one")

    name: ClassVar[str] = "example"
    PRESETS: ClassVar[tuple[Preset, ...]] = (Preset(SHAPE, {"alpha": 0.7}, "nowhere"),)


def _info(**fields: Any) -> Any:
    info = describe_model(family("llava").model)
    shape = {"text_type": "llama", "hidden_size": 64, "num_layers": 8, "vocab_size": 150}
    return replace(info, **{**shape, **fields})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, r"example: option alpha=1.5 is out of range; .* \[0, 1\]"),
        ({"seed": 10}, r"example: option seed=10 is out of range; .* \[0, 10\)"),
        ({"mode": "mine"}, "example: option mode='mine' must be one of fast, slow"),
    ],
)
def test_an_option_outside_of_its_range_or_choices_is_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        Example(**options)
    assert Example(alpha=1.0, seed=9, mode="slow").spec() == "example:alpha=1.0;seed=9;mode=slow"


@pytest.mark.parametrize(
    "options",
    [
        "var:variant", "var:last_layer", "spin:score", "vhr:vhd_source", "carve:preset",
        "carve:steps", "carve:background", "carve:final", "avc:scheme", "cluster:representative",
        "hiprune:neighbors", "m3id:rule", "ptp:region", "ptp:thumbnail", "uniform:positions",
    ],
)  # fmt: skip
def test_every_choice_of_a_word_is_checked(options: str) -> None:
    method, _, name = options.partition(":")
    (row,) = (row for row in list_methods() if row.name == method)
    with pytest.raises(BadInput, match=f"{name}='mine' must be"):
        load_class(row)(**{name: "mine"})


@pytest.mark.parametrize(
    ("structure", "alpha"),
    [
        ({}, 0.7),
        ({"vocab_size": 201}, 0.2),
        ({"vocab_size": 99}, 0.2),
        ({"hidden_size": 65}, 0.2),
        ({"num_layers": 9}, 0.2),
        ({"text_type": "qwen2"}, 0.2),
        ({"model_type": "llava_next"}, 0.2),
    ],
)
def test_published_values_are_for_their_structure_alone(
    structure: dict[str, Any], alpha: float
) -> None:
    info = _info(**structure)
    assert Example().with_defaults(info, alpha=0.2).alpha == alpha
    assert Example(alpha=0.0).with_defaults(info, alpha=0.2).alpha == 0.0


def test_layers_are_checked_against_the_model() -> None:
    ready = Example().with_defaults(_info())
    assert ready.layers(_info()) == range(8)
    assert Example(start_layer=3).with_defaults(_info(), end_layer=5).layers(_info()) == range(3, 5)
    for wrong in ({"start_layer": 8}, {"end_layer": 9}, {"start_layer": -1}, {"end_layer": 0}):
        with pytest.raises(BadInput, match="do not lie in a model of 8 layers"):
            Example(**wrong).with_defaults(_info())
