"""The edits of attention layers: planned once per prompt, kept with its KV cache."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch

from vlmfix.base.attention import AttentionMethod, Keys
from vlmfix.engine.edits import Edit, HeadFactors, Step
from vlmfix.engine.encoded import CallImages
from vlmfix.engine.frame import Frame
from vlmfix.engine.ledger import Memory
from vlmfix.engine.recorder import VisionRecorder
from vlmfix.errors import BadInput, StateError
from vlmfix.families import ModelInfo
from vlmfix.families.kinds import GENERATED, IMAGE, VIDEO

__all__ = ["AttentionNotes", "LayerMethods", "Plans"]

#: The methods that edit each layer, in their order.
LayerMethods = Mapping[int, tuple[AttentionMethod, ...]]


@dataclass(eq=False)
class AttentionNotes(Memory):
    """What the methods that edit attention know of the prompts of one ledger.

    Attributes:
        flags: {(method, layer): (B, capacity) bool}, what a method noted about tokens.
        flagged: {(method, layer): positions that it has noted something about}.
        factors: {(method, layer): head factors that hold for the prompts}.
        seen: {method: {layer: tensor}}, what the observer of a method's probe pass kept.
        image_values: {method: (B, capacity) float32}, what a method gave to each visual token.
        plans: {layer: {stage: edits}}; void when kinds, flags or the question change.
    """

    flags: dict[tuple[AttentionMethod, int], torch.Tensor] = field(default_factory=dict)
    flagged: dict[tuple[AttentionMethod, int], int] = field(default_factory=dict)
    factors: dict[tuple[AttentionMethod, int], HeadFactors] = field(default_factory=dict)
    seen: dict[AttentionMethod, dict[int, torch.Tensor]] = field(default_factory=dict)
    image_values: dict[AttentionMethod, torch.Tensor] = field(default_factory=dict)
    plans: dict[int, dict[object, tuple[Edit, ...]]] = field(default_factory=dict)

    def grow(self, capacity: int) -> None:
        def wider(values: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.pad(values, (0, capacity - values.shape[1]))

        with torch.inference_mode(False):
            self.flags = {key: wider(flags) for key, flags in self.flags.items()}
        self.image_values = {key: wider(values) for key, values in self.image_values.items()}
        self.plans.clear()

    def changed(self) -> None:
        self.plans.clear()

    def cut(self, length: int) -> None:
        def cleared(values: torch.Tensor) -> torch.Tensor:
            return torch.cat([values[:, :length], torch.zeros_like(values[:, length:])], dim=1)

        with torch.inference_mode(False):
            self.flags = {key: cleared(flags) for key, flags in self.flags.items()}
        self.flagged = {key: min(end, length) for key, end in self.flagged.items()}
        self.image_values = {key: cleared(values) for key, values in self.image_values.items()}
        self.factors.clear()  # they, and what was seen, are of the whole prompt
        self.seen.clear()

    def rows_are_alike(self) -> bool:
        kept = [*self.flags.values(), *self.image_values.values()]
        kept += [tensor for seen in self.seen.values() for tensor in seen.values()]
        kept += [factors.values for factors in self.factors.values()]
        return all(torch.allclose(x.float(), x[:1].float()) for x in kept)

    def flag(self, method: AttentionMethod, layer: int, frame: Frame, flags: torch.Tensor) -> None:
        """Note (B, Q) flags of a method about the tokens of a forward.

        Those of an answer matter once a later turn goes on from it, as a part of its prompt.
        """
        ledger, start = frame.ledger, frame.past
        if start > self.flagged.get((method, layer), 0):
            return  # the method was off, or ran compiled, in what came before
        buffer = self.flags.get((method, layer))
        if buffer is None:
            with torch.inference_mode(False):  # as for the kinds
                buffer = torch.zeros_like(ledger.kinds, dtype=torch.bool)
            self.flags[method, layer] = buffer
        stop = start + flags.shape[1]
        buffer[:, start:stop] = flags[: len(buffer)]  # behind them come the rows of branches
        self.flagged[method, layer] = stop
        if start < ledger.prompt_length:
            self.plans.pop(layer, None)

    def decided(self, method: AttentionMethod) -> bool:
        """Whether a method has seen the prompt, or chosen heads by it."""
        return method in self.seen or any(method == known for known, _ in self.factors)


class Plans:
    """The edits of one forward, layer by layer.

    Args:
        stage: whose edits they are; compared by identity.
        by_layer: its methods, by layer.
        frame: of the forward.
        info: structure of the model.
        recorder: of the model's vision tower, if a method reads it.
    """

    def __init__(
        self,
        stage: object,
        by_layer: LayerMethods,
        frame: Frame,
        info: ModelInfo,
        recorder: VisionRecorder | None,
    ) -> None:
        self.stage, self.by_layer, self.frame = stage, by_layer, frame
        self.info, self.recorder = info, recorder
        self.notes = frame.ledger.of(AttentionNotes)

    def edits(self, layer: int, device: torch.device) -> tuple[Edit, ...]:
        """The edits of one layer, planned once per prompt on its device."""
        methods = self.by_layer.get(layer)
        if not methods:
            return ()
        plans = self.notes.plans.setdefault(layer, {})
        if self.stage not in plans:
            plans[self.stage] = tuple(self._plan(methods, layer, device))
        return plans[self.stage]

    def _plan(
        self, methods: tuple[AttentionMethod, ...], layer: int, device: torch.device
    ) -> Iterator[Edit]:
        for method in methods:
            plan = method.plan(self._keys(method, layer, device))
            if plan is not None:
                self.frame.call.note(method.name, layer, plan.notes)
                yield Edit.of(method, plan)

    def _keys(self, method: AttentionMethod, layer: int, device: torch.device) -> Keys:
        ledger = self.frame.ledger
        flags = self.notes.flags.get((method, layer))
        if flags is None and method.overrides("flag_tokens"):
            raise StateError(
                f"this KV cache was filled while {method.name} was off, so what {method.name} "
                "notes about the prompt is missing. Start from the prompt, without this cache."
            )
        if flags is not None:  # those of an answer wait until a later turn has it in its prompt
            flags = flags & (ledger.kinds != GENERATED)
        values = self._image_values(method) if method.overrides("image_values") else None
        seen = self.notes.seen.get(method, {})
        return Keys(
            layer=layer,
            num_heads=self.info.heads_of(layer),
            kinds=ledger.kinds.to(device),
            flags=None if flags is None else flags.to(device),
            question=ledger.question.to(device),
            content=ledger.content.to(device),
            seen={at: kept.to(device) for at, kept in seen.items()},
            image_values=None if values is None else values.to(device),
        )

    def _image_values(self, method: AttentionMethod) -> torch.Tensor:
        """(B, capacity) float32: what a method gives to each visual token, 0 elsewhere."""
        ledger, call, recorder = self.frame.ledger, self.frame.call, self.recorder
        known = self.notes.image_values
        if method in known:
            return known[method]
        if not ledger.whole:  # in the middle of a chunked prefill
            return torch.zeros_like(ledger.kinds, dtype=torch.float32)
        assert recorder is not None  # attached when the stack was reached
        images = call.of(CallImages)
        if images.recorded is None:
            images.recorded = recorder.take()
        if recorder.took_video or bool((ledger.kinds == VIDEO).any()):
            raise BadInput(
                f"{method.name} weighs visual tokens by the vision tower's attention, which is not "
                "read for videos, and this prompt holds one. Ask about images, or run the plain "
                "model with vlmfix.using(model, None)."
            )
        layers = method.encoder_layers(recorder.tower)
        pieces = []
        for image in images.recorded:
            tiles = [
                method.image_values([tile.received[layer] for layer in layers]).float()
                for tile in image.tiles
            ]
            pieces.append(image.to_visual_tokens(tiles).nan_to_num(0.0).to(ledger.kinds.device))
        if images.reductions is not None:  # the prompt holds fewer tokens than were encoded
            pieces = [
                x[r.positions.to(x.device)] for x, r in zip(pieces, images.reductions, strict=True)
            ]
        copies = len(ledger.kinds) // (call.rows or len(ledger.kinds))
        placeholders = (ledger.kinds == IMAGE)[::copies]
        count = sum(len(piece) for piece in pieces)
        if count != int(placeholders.sum()):
            raise StateError(
                f"{method.name} must see the images of a prompt being encoded, but {count} visual "
                "tokens were encoded in this call and the prompt holds "
                f"{int(placeholders.sum())}. Pass all pixels to this generate() or forward, not "
                "features that were encoded before."
            )
        values = torch.zeros(placeholders.shape, device=placeholders.device)
        if pieces:
            values[placeholders] = torch.cat(pieces)
            if not bool(values.any()):
                warnings.warn(
                    f"{method.name} chooses none of the {count} visual tokens of these images, so "
                    "it changes nothing here. Give larger images, or a larger share.",
                    stacklevel=2,
                )
        known[method] = values.repeat_interleave(copies, 0)
        return known[method]

    def steps(
        self, layer: int, edits: tuple[Edit, ...], keys: int, dtype: torch.dtype
    ) -> tuple[Step, ...]:
        """The edits of one layer, ready for the `keys` keys and the dtype of a decode step."""
        offset = self.frame.offset(layer)
        steps = []
        for edit in edits:
            fused = edit.plan.fused
            if fused is not None and offset and fused.groups is not None:
                fused = replace(fused, groups=fused.groups[:, offset:])
            factors = self.factors(layer, edit, dtype)
            if factors is None and edit.heads and edit.method.head_scale_from == "prompt":
                factors = self._no_factors(edit, layer, dtype)
            steps.append(Step(edit, edit.tensors(offset, keys), fused, factors, None))
        return tuple(steps)

    def factors(self, layer: int, edit: Edit, dtype: torch.dtype) -> HeadFactors | None:
        """Factors on the head outputs that hold for this prompt, once they are known."""
        known = self.notes.factors.get((edit.method, layer))
        if known is None and edit.plan.heads is not None:
            known = HeadFactors.of(edit.plan.heads, dtype)
            self.notes.factors[edit.method, layer] = known
        return known

    def _no_factors(self, edit: Edit, layer: int, dtype: torch.dtype) -> HeadFactors:
        """Ones, where an edit that decides at the prompt had nothing to decide."""
        if edit.live:
            raise StateError(
                f"this KV cache was filled while {edit.method.name} was off, so the heads that it "
                "chose are missing. Start from the prompt, without this cache."
            )
        kinds = self.frame.ledger.kinds
        ones = torch.ones(len(kinds), self.info.heads_of(layer), device=kinds.device)
        return HeadFactors.of(ones, dtype)
