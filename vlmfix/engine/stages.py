"""The stages there are, in the order in which they run, and the stack that they make of methods."""

from __future__ import annotations

from collections.abc import Sequence

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
        kind.check(methods, info)
    made = (kind.of(methods, info) for kind in STAGES)
    stack = Stack(tuple(methods), tuple(stage for stage in made if stage is not None))
    attention = stack.find(AttentionStage)
    if impl == "triton" and attention is not None:
        for layer, own in sorted(attention.by_layer.items()):
            _check_fused(layer, own)
    return stack


def _check_fused(layer: int, methods: Sequence[AttentionMethod]) -> None:
    """Refuse what the kernel has no form for: impl='triton' never falls back."""
    editing = [method for method in methods if method.edits_rows()]
    without = [method.name for method in editing if not method.has_fused_form]
    if without:
        raise CompositionError(
            f"impl='triton': {', '.join(without)} has no fused form. Use impl='auto', which "
            "takes the torch implementation for it."
        )
    if len(editing) > 1:
        raise CompositionError(
            f"impl='triton': {' and '.join(m.name for m in editing)} both edit the rows of "
            f"layer {layer}, and the kernel runs one edit per layer. Use impl='auto'."
        )
