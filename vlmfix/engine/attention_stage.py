"""The stage of methods that edit attention, with their probe passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from vlmfix.base.attention import AttentionMethod
from vlmfix.base.method import Method
from vlmfix.engine.counters import lend
from vlmfix.engine.edits import require_attention
from vlmfix.engine.frame import Frame
from vlmfix.engine.hooks import Host
from vlmfix.engine.plans import AttentionNotes, LayerMethods, Plans
from vlmfix.engine.prefill import decoder_hook
from vlmfix.engine.probe import Rerun, probe, run_last_token
from vlmfix.engine.stage import DecodeStep, Forward, Generation, Stage
from vlmfix.engine.state import Implementation
from vlmfix.errors import CompositionError, StateError, UnsupportedModel
from vlmfix.families import ModelInfo
from vlmfix.families.prompt import every_row
from vlmfix.families.source import norms_of_heads
from vlmfix.families.tower import describe_tower, require_readable

__all__ = ["AttentionStage"]


@dataclass(frozen=True)
class _KeepsCache:
    """Of a generate() call: its KV cache outlives it, so that a later turn may go on from it."""


@dataclass(frozen=True, eq=False)
class AttentionStage(Stage):
    """Plans the edits of attention layers; attention.py runs them.

    Attributes:
        methods: in the order of the stack.
        by_layer: the same, for each layer that they edit.
        probes: those that want an extra forward before the prompt's own.
        alone: whether no other method runs.
    """

    methods: tuple[AttentionMethod, ...]
    by_layer: LayerMethods
    probes: tuple[AttentionMethod, ...]
    alone: bool

    name: ClassVar[str] = "attention"

    @classmethod
    def of(cls, methods: Sequence[Method], info: ModelInfo) -> AttentionStage | None:
        own = tuple(method for method in methods if isinstance(method, AttentionMethod))
        by_layer: dict[int, tuple[AttentionMethod, ...]] = {}
        for method in own:
            for layer in method.layers(info):
                if layer in info.attention:
                    by_layer[layer] = (*by_layer.get(layer, ()), method)
        probes = tuple(method for method in own if method.probe_pass(info) is not None)
        return cls(own, by_layer, probes, len(methods) == 1) if own else None

    @classmethod
    def check(cls, methods: Sequence[Method], info: ModelInfo, impl: Implementation) -> None:
        stage = cls.of(methods, info) if impl == "triton" else None
        for layer, own in sorted(stage.by_layer.items()) if stage else ():
            _check_fused(layer, own)

    @property
    def reads_question(self) -> bool:
        return any(method.reads_question for method in self.methods)

    def examine(self, model: torch.nn.Module, info: ModelInfo) -> None:
        probes = (method.probe_pass(info) for method in self.probes)
        looked_at = {layer for wanted in probes if wanted for layer in wanted.observer.watched}
        require_attention(info, sorted(looked_at | set(self.by_layer)))
        for layer, methods in self.by_layer.items():
            _examine_layer(info, layer, methods)
        if self._readers:
            require_readable(describe_tower(model, info))

    @property
    def _readers(self) -> list[AttentionMethod]:
        """The methods that read the vision tower."""
        return [method for method in self.methods if method.overrides("image_values")]

    def reach(self, host: Host) -> None:
        host.reach_attention(self.by_layer)
        host.reach_inputs(
            layer
            for layer, methods in self.by_layer.items()
            if any(method.overrides("flag_tokens") for method in methods)
        )
        if self.probes:  # a last token that runs again needs the position that the model gave it
            decoder = host.model.get_decoder()
            host.add_hook("decoder", decoder, decoder_hook(host.state), pre=True)
        if self._readers:
            tower = host.tower or describe_tower(host.model, host.info)
            layers = {layer for method in self._readers for layer in method.encoder_layers(tower)}
            host.record_tower(tower, layers)

    def before_generate(self, generation: Generation) -> None:
        given = generation.given.get("past_key_values") is not None
        if given or generation.option("return_dict_in_generate"):
            generation.call.keep(_KeepsCache())

    def before_forward(self, forward: Forward) -> None:
        frame = forward.frame
        if frame.past and not frame.decoding:
            self._check_later_part(frame, forward.host.info)
        frame.expected.update(self.by_layer)
        if frame.needed < frame.queries and any(_reads_prompt(x, frame) for x in self.methods):
            forward.kwargs = every_row(forward.host.info, forward.kwargs)
        if self.probes and not frame.past:
            probe(forward, self.probes, self.alone)
        if frame.get(Rerun) is None:
            host = forward.host
            frame.keep(Plans(self, self.by_layer, frame, host.info, host.recorder))

    def _check_later_part(self, frame: Frame, info: ModelInfo) -> None:
        """Refuse, of a prompt over a cache, what these methods cannot know of what came before.

        Raises:
            StateError: images behind what a method decides once for a whole prompt, a prompt that
                was cut since, or an answer about whose tokens nothing was noted.
        """
        ledger, past = frame.ledger, frame.past
        notes, visual = ledger.of(AttentionNotes), ledger.visual()[:, : past + frame.queries]
        images = bool(visual[:, past:].any())
        for method in self.methods:
            decides = method.overrides("head_scale") and method.head_scale_from == "prompt"
            if not decides and method.probe_pass(info) is None:
                continue
            if images or (bool(visual.any()) and not notes.decided(method)):
                raise StateError(
                    f"{method.name} looks at a whole prompt once, with all of its images, and this "
                    "part of one goes on from a KV cache. Start from the whole conversation, "
                    "without past_key_values."
                )
        if any(end < past for (m, _), end in notes.flagged.items() if m in self.methods):
            raise StateError(
                "compiled steps wrote the answer in this KV cache, and nothing was noted about its "
                "tokens. Generate with disable_compile=True, or start from the whole conversation, "
                "without past_key_values."
            )
        if images:
            notes.image_values.clear()

    def enter_layer(
        self, frame: Frame, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        ends = frame.call.rows is not None and frame.call.get(_KeepsCache) is None
        for method in () if frame.decoding and ends else self.by_layer.get(layer, ()):
            if method.overrides("flag_tokens"):
                hidden = args[0] if args else kwargs["hidden_states"]
                notes = frame.ledger.of(AttentionNotes)
                notes.flag(method, layer, frame, method.flag_tokens(hidden))
        return args, kwargs

    def after_forward(self, forward: Forward, output: Any) -> Any:
        rerun = forward.frame.get(Rerun)
        return output if rerun is None else run_last_token(forward, rerun, output)

    # -- compiled steps -----------------------------------------------------------------------

    def before_step(self, step: DecodeStep) -> None:
        host, frame = step.host, step.frame
        plans = Plans(self, self.by_layer, frame, host.info, host.recorder)
        for layer in self.by_layer:
            device = host.device(layer)
            counter = lend(host, frame.call, layer, device)
            edits = plans.edits(layer, device)
            length = step.cache.get_max_length(layer)
            step.prepared[self.name, layer] = tuple(
                replace(prepared, counter=counter)
                for prepared in plans.steps(layer, edits, length, host.model.dtype)
            )


def _reads_prompt(method: AttentionMethod, frame: Frame) -> bool:
    """Whether a method reads rows of the prompt that need no logits."""
    at_prompt = method.overrides("head_scale") and method.head_scale_from == "prompt"
    before = at_prompt and not frame.decoding and frame.last_prompt_row(frame.needed) is None
    return before or method.overrides("flag_tokens")


def _examine_layer(info: ModelInfo, layer: int, methods: Sequence[AttentionMethod]) -> None:
    """Refuse a layer that has not what its methods read, or that undoes what they do."""
    module = info.attention[layer]
    name = type(module).__name__
    flagging = [method.name for method in methods if method.overrides("flag_tokens")]
    if flagging and info.streams > 1:
        raise UnsupportedModel(
            f"{flagging[0]} reads the residual stream that enters a layer, and the layers of this "
            f"{info.model_type} model hand on {info.streams} streams, for which no paper defines "
            "what it looks for. Use a method that reads attention alone."
        )
    scaling = [method.name for method in methods if method.scales_heads()]
    if scaling and (norms := norms_of_heads(module)):
        raise UnsupportedModel(
            f"{scaling[0]} scales the outputs of heads, and layer {layer} ({name}) normalises each "
            f"head behind attention ({norms[0]}), which undoes any factor. Use a method that edits "
            "attention itself."
        )


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
