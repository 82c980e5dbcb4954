"""The stage of methods that edit hidden states, behind a decoder layer or behind its MLP."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from vlmfix.base.hidden import Direction, HiddenMethod, Site
from vlmfix.base.method import Method
from vlmfix.engine.counters import lend
from vlmfix.engine.dispatch import in_python
from vlmfix.engine.frame import Frame, Window
from vlmfix.engine.hooks import Host
from vlmfix.engine.ledger import Memory
from vlmfix.engine.stage import DecodeStep, Forward, Generation, Stage
from vlmfix.engine.state import State
from vlmfix.errors import StateError, UnsupportedModel
from vlmfix.families import ModelInfo
from vlmfix.families.kinds import IMAGE, VIDEO
from vlmfix.families.prompt import prompt_kinds

__all__ = ["HiddenStage"]

#: A decoder layer, and the site in it.
_Place = tuple[int, Site]

#: What the output of a layer's MLP passes last, before it is added to the residual stream.
_MLP = ("post_feedforward_layernorm", "post_mlp_layernorm", "mlp", "feed_forward")


@dataclass(frozen=True)
class _Planned:
    """One method at one place of one prompt; `counter` takes edited rows inside a graph."""

    method: HiddenMethod
    direction: Direction
    counter: torch.Tensor | None = None


@dataclass(eq=False)
class _Notes(Memory):
    """What was planned for the prompts of one ledger, by stage and place."""

    plans: dict[tuple[object, _Place], tuple[_Planned, ...]] = field(default_factory=dict)

    def changed(self) -> None:
        self.plans.clear()


@dataclass(frozen=True)
class _WithImage:
    """Of one generate() call: (rows,) bool, the prompts with an image; chunks may hold a part."""

    prompts: torch.Tensor


@dataclass(frozen=True)
class _Edits:
    """Of one forward: the stage whose hooks act."""

    stage: HiddenStage


@dataclass(frozen=True, eq=False)
class HiddenStage(Stage):
    """Edits what hooked modules return, row by row."""

    by_place: Mapping[_Place, tuple[HiddenMethod, ...]]

    name: ClassVar[str] = "hidden"

    @classmethod
    def of(cls, methods: Sequence[Method], info: ModelInfo) -> HiddenStage | None:
        by_place: dict[_Place, tuple[HiddenMethod, ...]] = {}
        for method in methods:
            if isinstance(method, HiddenMethod):
                for layer in method.layers(info):
                    place = (layer, method.edited_site())
                    by_place[place] = (*by_place.get(place, ()), method)
        return cls(by_place) if by_place else None

    def examine(self, model: torch.nn.Module, info: ModelInfo) -> None:
        for place, methods in self.by_place.items():
            if place[1] == "layer" and info.streams > 1:
                raise UnsupportedModel(
                    f"{methods[0].name} edits the residual stream behind a layer, and the layers "
                    f"of this {info.model_type} model hand on {info.streams} streams. Edit "
                    "site=mlp instead."
                )
            _module(info, place)

    def reach(self, host: Host) -> None:
        for place in self.by_place:
            module = _module(host.info, place)
            host.add_hook((self.name, place), module, _hook(host.state, place))

    def before_generate(self, generation: Generation) -> None:
        info, given = generation.host.info, dict(generation.given)
        kinds = prompt_kinds(info, generation.ids, 0, given)
        generation.call.keep(_WithImage(((kinds == IMAGE) | (kinds == VIDEO)).any(1)))

    def before_forward(self, forward: Forward) -> None:
        frame = forward.frame
        if frame.decoding and frame.ledger.get(_Notes) is None:
            names = ", ".join(sorted({m.name for own in self.by_place.values() for m in own}))
            raise StateError(
                f"this KV cache was filled while {names} was off, so its prompt is not edited. "
                "Start from the prompt, without this cache."
            )
        frame.ledger.of(_Notes)
        frame.keep(_Edits(self))

    def planned(self, frame: Frame, place: _Place, device: torch.device) -> tuple[_Planned, ...]:
        """What is done at a place, planned once per prompt."""
        plans = frame.ledger.of(_Notes).plans
        if (self, place) not in plans:
            has_image, call = frame.ledger.visual().any(1), frame.call.get(_WithImage)
            if call is not None:  # in a later turn the cache alone knows of the image
                copies = len(has_image) // len(call.prompts)
                has_image = has_image | call.prompts.repeat_interleave(copies)
            has_image = has_image.to(device)
            found = (
                (method, method.direction(place[0], has_image))
                for method in self.by_place.get(place, ())
            )
            plans[self, place] = tuple(
                _Planned(method, direction) for method, direction in found if direction is not None
            )
        return plans[self, place]

    def before_step(self, step: DecodeStep) -> None:
        for place in self.by_place:
            device = step.host.device(place[0])
            counter = lend(step.host, step.frame.call, place[0], device)
            step.prepared[self.name, place] = tuple(
                _Planned(one.method, one.direction, counter)
                for one in self.planned(step.frame, place, device)
            )


def _module(info: ModelInfo, place: _Place) -> torch.nn.Module:
    """The module whose output is edited."""
    layer, site = place
    module = info.layers[layer]
    if site == "layer":
        return module
    found = (getattr(module, name) for name in _MLP if hasattr(module, name))
    mlp: torch.nn.Module | None = next(found, None)
    if mlp is None:
        raise UnsupportedModel(
            f"decoder layer {layer} ({type(module).__name__}) names no MLP that vlmfix knows "
            f"({', '.join(_MLP)}), so its output cannot be edited. Edit site=layer instead."
        )
    return mlp


def _hook(state: State, place: _Place) -> Callable[..., Any]:
    """A forward hook of a module at a place. Outside of compiled steps it runs in Python."""

    def hook(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        prepared = state.prepared
        if prepared is None:
            return edit(output)
        planned = prepared.get(("hidden", place))
        return _replaced(output, _step(_hidden(output), planned)) if planned else None

    @in_python
    def edit(output: Any) -> Any:
        frame = state.frame
        edits = None if frame is None else frame.get(_Edits)
        if frame is None or edits is None:
            return None
        hidden = _hidden(output)
        planned = edits.stage.planned(frame, place, hidden.device)
        for one in planned:
            window = frame.window(one.method.edited_rows(), hidden.shape[1])
            if window is not None:
                hidden, rows = _edit_rows(hidden, one, window)
                frame.call.count(place[0], rows)
        return _replaced(output, hidden) if planned else None

    return hook


def _hidden(output: Any) -> torch.Tensor:
    """What a module returns first: (B, Q, D)."""
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _replaced(output: Any, hidden: torch.Tensor) -> Any:
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def _step(hidden: torch.Tensor, planned: Sequence[_Planned]) -> torch.Tensor:
    """Every row of a compiled decode step, edited; the step's counter takes their number."""
    for one in planned:
        hidden, rows = _edit_rows(hidden, one, Window(0, None))
        if one.counter is not None:
            one.counter.add_(rows.sum())
    return hidden


def _edit_rows(
    hidden: torch.Tensor, planned: _Planned, window: Window
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states (B, Q, D) with the rows of a window edited, and (B, Q') bool which were.

    Rows of branches stand behind those of the prompts, and stay as they are.
    """
    direction, method = planned.direction, planned.method
    prompts = len(direction.strength)
    rows = hidden[:prompts, window.start :]
    gate = method.gate(rows, direction) if method.gates else None
    live = (direction.strength != 0)[:, None]
    live = live if gate is None else live & (gate != 0)
    chosen = live.expand(rows.shape[:2])
    if window.chosen is not None:
        chosen = chosen & window.chosen.to(rows.device)
    edited = torch.where(chosen[..., None], direction.apply(rows, gate).to(rows.dtype), rows)
    base = torch.cat([hidden[:prompts, : window.start], edited], dim=1) if window.start else edited
    return torch.cat([base, hidden[prompts:]]) if len(hidden) > prompts else base, chosen
