"""The stages there are, in the order in which they run, and the stack that they make of methods."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vlmfix.base.attention import AttentionMethod
from vlmfix.base.method import Method
from vlmfix.engine.attention_stage import AttentionStage
from vlmfix.engine.contrast import ContrastStage
from vlmfix.engine.hidden import HiddenStage
from vlmfix.engine.layer_pruning import LayerPruningStage
from vlmfix.engine.pixels import PixelStage
from vlmfix.engine.pruning import PruningStage
from vlmfix.engine.stack import Stack
from vlmfix.engine.stage import Stage
from vlmfix.engine.state import Implementation
from vlmfix.errors import CompositionError
from vlmfix.families import ModelInfo, require_visual_tokens
from vlmfix.registry import MethodSpec, build_stack

__all__ = ["STAGES", "fitted_stack", "idle", "make_stack"]

STAGES: tuple[type[Stage], ...] = (
    PixelStage,
    PruningStage,
    AttentionStage,
    LayerPruningStage,
    HiddenStage,
    ContrastStage,
)


def make_stack(methods: Sequence[Method], info: ModelInfo, impl: Implementation = "auto") -> Stack:
    """The stack of prepared methods on a model of this structure.

    Raises:
        CompositionError: a method is given twice, methods exclude each other, or impl="triton"
            and a method has no fused form.
    """
    names = [method.name for method in methods]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise CompositionError(
            f"the stack {names} holds {', '.join(twice)} more than once. Give each method once, "
            "with the options you want."
        )
    for kind in STAGES:
        kind.check(methods, info, impl)
    live = [method for method in methods if not method.neutral()]
    made = (kind.of(live, info) for kind in STAGES)
    return Stack(tuple(methods), tuple(stage for stage in made if stage is not None))


def fitted_stack(
    model: torch.nn.Module, info: ModelInfo, methods: MethodSpec, impl: Implementation = "auto"
) -> Stack:
    """The stack of these methods for one model, after every check that the model decides.

    `wrap`, `using` and `doctor` all call it, so that they agree. It changes and runs nothing.

    Raises:
        UnknownMethod, BadInput: a method, or an option of one, that cannot be used on this model.
        UnsupportedModel: a method or a stage cannot run on this model.
        CalibrationNeeded: constants that are unknown for this model.
        CompositionError: see `make_stack`.
    """
    given = build_stack(methods)
    for method in given:
        if method.reads_visual_tokens:
            require_visual_tokens(info, method.name)
    prepared = [method.prepared(info, model) for method in given]
    stack = make_stack(prepared, info, impl)
    for stage in stack.stages:
        stage.examine(model, info)
    return stack


def idle(method: Method, info: ModelInfo) -> str | None:
    """Why a prepared method can change nothing on a model; None if it can."""
    reason = method.idle()
    if reason is None and isinstance(method, AttentionMethod):
        layers = set(method.layers(info))
        if layers and not layers & set(info.attention):
            reason = f"none of its layers {sorted(layers)} has softmax attention in this model"
    return reason
