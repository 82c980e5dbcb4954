"""The stages there are, in the order in which they run, and the stack that they make of methods."""

from __future__ import annotations

from collections.abc import Sequence

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
from vlmfix.families import ModelInfo

__all__ = ["STAGES", "make_stack"]

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
