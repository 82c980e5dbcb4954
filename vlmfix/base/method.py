"""The base classes that a method file derives from.

A method states its maths on plain tensors; the engine (attention.py) decides how to run it. A
method overrides only the functions it needs, and the engine runs only what was overridden.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from vlmfix.errors import BadInput
from vlmfix.families import ModelInfo

__all__ = [
    "Method",
    "Preset",
    "StageName",
    "check_range",
    "find_preset",
    "layer_range",
]


#: Where a method takes part, in the order in which its kinds run.
StageName = Literal["pixels", "tokens", "attention", "hidden", "logits"]


@dataclass(frozen=True)
class Method:
    """One published method, as a frozen dataclass whose fields are the paper's knobs."""

    name: ClassVar[str]
    stage: ClassVar[StageName]

    def prepared(self, info: ModelInfo, model: torch.nn.Module) -> Method:
        """This method with every model-dependent default filled in.

        Raises:
            BadInput: an option that this model cannot take.
            CalibrationNeeded: constants that nobody has measured for this model.
        """
        return self

    def idle(self) -> str | None:
        """Why this prepared method can change nothing on its model; None if it can."""
        return None

    def neutral(self) -> bool:
        """Whether these settings leave everything as it is, so that nothing has to run."""
        return False

    def spec(self) -> str:
        """The method and the options that differ from the defaults, e.g. "var:keep=0.4"."""
        changed = [
            f"{item.name}={_text(getattr(self, item.name))}"
            for item in dataclasses.fields(self)
            if getattr(self, item.name) != item.default
        ]
        return self.name + (":" + ";".join(changed) if changed else "")


def _text(value: Any) -> str:
    return ("/".join(map(str, value)) or "()") if isinstance(value, tuple) else str(value)


@dataclass(frozen=True)
class Preset:
    """Published constants of one model, recognised by its structure and never by its name.

    `vocabulary` bounds the vocabulary size where structure alone would confuse two models.
    """

    model: str
    model_type: str
    text_type: str
    hidden_size: int
    num_layers: int
    values: dict[str, Any]
    source: str
    vocabulary: tuple[int, int] | None = None

    def fits(self, info: ModelInfo) -> bool:
        """Whether the model has this preset's structure."""
        low, high = self.vocabulary or (0, info.vocab_size)
        return (
            self.model_type == info.model_type
            and self.text_type == info.text_type
            and self.hidden_size == info.hidden_size
            and self.num_layers == info.num_layers
            and low <= info.vocab_size <= high
        )


def find_preset(presets: Sequence[Preset], info: ModelInfo) -> Preset | None:
    """The first preset that fits the model, if any."""
    return next((preset for preset in presets if preset.fits(info)), None)


def check_range(
    method: Method, name: str, low: float, high: float, *, high_open: bool = False
) -> None:
    """Raise BadInput unless the option lies in [low, high] (or [low, high) if high_open)."""
    value = getattr(method, name)
    if value is None:
        return
    good = low <= value < high if high_open else low <= value <= high
    if not good:
        bracket = ")" if high_open else "]"
        raise BadInput(
            f"{method.name}: option {name}={value!r} is out of range; give a number in "
            f"[{low:g}, {high:g}{bracket}. `vlmfix methods {method.name}` explains it."
        )


def layer_range(
    method: Method, info: ModelInfo, start: int | None, end: int | None, default: tuple[int, int]
) -> tuple[int, int]:
    """The options start_layer and end_layer of a method, with the defaults filled in.

    Raises:
        BadInput: they name no layer, or layers that the model does not have.
    """
    first = default[0] if start is None else start
    stop = default[1] if end is None else end
    if not 0 <= first < stop <= info.num_layers:
        raise BadInput(
            f"{method.name}: layers [{first}, {stop}) do not lie in a model of {info.num_layers} "
            "layers; give start_layer < end_layer within it."
        )
    return first, stop
