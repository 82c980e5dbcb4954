"""What every method has: options that are checked, a stage, and presets of published models."""

from __future__ import annotations

import dataclasses
import math
import typing
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch

from vlmfix.errors import BadInput
from vlmfix.families import ModelInfo

__all__ = ["LayerRange", "Method", "Preset", "StageName", "Structure", "option"]


def option(
    default: Any,
    help: str,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    high_open: bool = False,
) -> Any:
    """A field of a method: its default, its help text, and the range of a number.

    The range is [low, high], or [low, high) if `high_open`. `Method` checks it whenever a method
    is made, and checks that an option of type `Literal` is one of its values.
    """
    metadata = {"help": help, "range": (low, high, high_open)}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Structure:
    """What tells one published model from others: its structure, never its name.

    `vocabulary` bounds the vocabulary size where shapes alone would confuse two models.
    """

    model: str
    model_type: str
    text_type: str
    hidden_size: int
    num_layers: int
    vocabulary: tuple[int, int] | None = None

    def fits(self, info: ModelInfo) -> bool:
        """Whether the model has this structure."""
        low, high = self.vocabulary or (0, info.vocab_size)
        return (
            self.model_type == info.model_type
            and self.text_type == info.text_type
            and self.hidden_size == info.hidden_size
            and self.num_layers == info.num_layers
            and low <= info.vocab_size <= high
        )


@dataclass(frozen=True)
class Preset:
    """Published option values for one model, and where they were published."""

    structure: Structure
    values: dict[str, Any]
    source: str


#: Where a method takes part, in the order in which its kinds run.
StageName = Literal["pixels", "tokens", "attention", "hidden", "logits"]


@dataclass(frozen=True)
class Method:
    """One published method, as a frozen dataclass whose fields are the paper's options."""

    name: ClassVar[str]
    stage: ClassVar[StageName]
    #: Published values, for the models that have any.
    PRESETS: ClassVar[tuple[Preset, ...]] = ()
    #: Whether it is about visual tokens among those of the prompt, which not every model has.
    reads_visual_tokens: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check every option that `option` declared.

        Raises:
            BadInput: a number out of its range, or a word that is none of the choices.
        """
        declared = [item for item in dataclasses.fields(self) if "range" in item.metadata]
        hints = typing.get_type_hints(type(self)) if declared else {}
        for item in declared:
            low, high, high_open = item.metadata["range"]
            _check_range(self, item.name, low, high, high_open=high_open)
            _check_choice(self, item.name, hints[item.name])

    def prepared(self, info: ModelInfo, model: torch.nn.Module) -> Method:
        """This method with every model-dependent default filled in.

        Raises:
            BadInput: an option that this model cannot take.
            CalibrationNeeded: constants that were never measured for this model.
            UnsupportedModel: something of the model because of which no call could run.
        """
        return self

    def published(self, info: ModelInfo) -> dict[str, Any]:
        """The values of the preset that fits the model; empty if none does."""
        fitting = (preset.values for preset in self.PRESETS if preset.structure.fits(info))
        return next(fitting, {})

    def with_defaults(self, info: ModelInfo, **defaults: Any) -> Self:
        """This method with options that are None set: to the published values, else to `defaults`.

        Raises:
            BadInput: an option that this model cannot take.
        """
        values = {**defaults, **self.published(info)}
        return dataclasses.replace(
            self, **{name: value for name, value in values.items() if getattr(self, name) is None}
        )

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


class LayerRange(Method):
    """A mixin for methods that act on the decoder layers [start_layer, end_layer).

    A method declares both options itself, because their help texts name its defaults.
    """

    start_layer: int | None
    end_layer: int | None

    def with_defaults(self, info: ModelInfo, **defaults: Any) -> Self:
        """As `Method.with_defaults`; without other defaults the range is all layers.

        Raises:
            BadInput: the range is empty or leaves the model.
        """
        ready = super().with_defaults(
            info, **{"start_layer": 0, "end_layer": info.num_layers, **defaults}
        )
        layers = ready.layers(info)
        if not layers or layers.start < 0 or layers.stop > info.num_layers:
            raise BadInput(
                f"{self.name}: layers [{layers.start}, {layers.stop}) do not lie in a model of "
                f"{info.num_layers} layers; give start_layer < end_layer within it."
            )
        return ready

    def layers(self, info: ModelInfo) -> range:
        """The decoder layers that a prepared method acts on."""
        assert self.start_layer is not None and self.end_layer is not None  # set by prepared()
        return range(self.start_layer, self.end_layer)


def _check_choice(method: Method, name: str, hint: Any) -> None:
    """Raise BadInput if the option is a `Literal` and its value is none of the words."""
    kinds = [kind for kind in (hint, *typing.get_args(hint)) if typing.get_origin(kind) is Literal]
    choices = [choice for kind in kinds for choice in typing.get_args(kind)]
    value = getattr(method, name)
    if choices and value is not None and value not in choices:
        raise BadInput(
            f"{method.name}: option {name}={value!r} must be one of {', '.join(choices)}."
        )


def _check_range(
    method: Method, name: str, low: float, high: float, *, high_open: bool = False
) -> None:
    """Raise BadInput unless the option is None or in [low, high] (or [low, high) if high_open)."""
    value = getattr(method, name)
    if value is None or low == -math.inf:
        return
    good = low <= value < high if high_open else low <= value <= high
    if not good:
        bracket = ")" if high_open else "]"
        raise BadInput(
            f"{method.name}: option {name}={value!r} is out of range; give a number in "
            f"[{low:g}, {high:g}{bracket}. `vlmfix methods {method.name}` explains it."
        )
