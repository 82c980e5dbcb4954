"""The one attention function that vlmfix registers, and the primitives behind it.

It is reached through a per-module copy of the configuration that names it (session.py), so only
the layers that a method wants ever come here. A layer with nothing to edit calls the model's own
attention and is bit-identical. During decoding, a layer with an edit computes its few rows here
*instead of* the model's attention, so the KV cache is read once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, TypeVar

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vlmfix.errors import CompositionError, UnsupportedModel
from vlmfix.kernels import ops, reference
from vlmfix.method import AttentionMethod, Plan

if TYPE_CHECKING:
    from vlmfix.frame import Frame, Window
    from vlmfix.kernels.reference import FusedEdit
    from vlmfix.session import Session

__all__ = [
    "NAME",
    "SLOT",
    "AttentionOutput",
    "Edit",
    "HeadFactors",
    "Implementation",
    "Slot",
    "Step",
    "attention_forward",
    "base_attention",
    "in_python",
]

NAME = "vlmfix"  # the name under which transformers dispatches to attention_forward
SLOT = "_vlmfix"  # where an attention module keeps its Slot
_CHUNK_BYTES = 64 * 2**20  # rows of a prefill are edited in chunks of at most this many bytes

AttentionOutput = tuple[torch.Tensor, "torch.Tensor | None"]
Function = TypeVar("Function", bound=Callable[..., Any])
Implementation = Literal["auto", "torch", "triton"]


@dataclass(frozen=True)
class Slot:
    """What an attention module needs to find its session and the attention it replaced."""

    session: Session
    layer: int
    base: Callable[..., AttentionOutput]
    impl: Implementation

    def fused(self, inputs: Inputs) -> bool:
        """Whether these rows go through the fused kernel where an edit has a form for it."""
        if self.impl == "triton":
            return True
        tensors = (inputs.query, inputs.key, inputs.value)
        return self.impl == "auto" and inputs.query.is_cuda and ops.runs_on_triton(*tensors)


class Inputs(NamedTuple):
    """What transformers hands to an attention function.

    query is (B, H, Q, D), key and value (B, Hkv, K, D); the mask is None, bool (True: visible) or
    additive, (B, 1 or H, Q or 1, at least K).
    """

    module: torch.nn.Module
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    kwargs: dict[str, Any]

    @property
    def keys(self) -> int:
        return self.key.shape[2]

    @property
    def scaling(self) -> float:
        scaling: float | None = self.kwargs.get("scaling")
        return self.query.shape[-1] ** -0.5 if scaling is None else scaling

    def base(self, slot: Slot) -> AttentionOutput:
        """The attention that the module has without us."""
        return slot.base(*self[:5], **self.kwargs)

    def visible(self, first: int, rows: int) -> torch.Tensor | None:
        """The mask of the rows from `first`: sliced, or built where transformers leaves it out."""
        if self.mask is not None:
            mask = self.mask[..., : self.keys]
            return mask if mask.shape[2] == 1 else mask[:, :, first : first + rows]
        causal = self.kwargs.get("is_causal")
        if causal is None:
            causal = getattr(self.module, "is_causal", True)
        if self.query.shape[2] == 1 or not causal:
            return None
        # transformers leaves the mask out only where queries and keys both start at position 0.
        position = torch.arange(first, first + rows, device=self.query.device)
        key = torch.arange(self.keys, device=self.query.device)
        return (key[None, :] <= position[:, None])[None, None]

    def scores(self, query: torch.Tensor) -> torch.Tensor:
        """Scaled scores (B, H, R, K) of some of the rows, before the mask."""
        return reference.row_scores(query, self.key, self.scaling, self.kwargs.get("softcap"))


@dataclass(frozen=True)
class Edit:
    """One method at one layer of one prompt; the flags say which functions it overrides."""

    method: AttentionMethod
    plan: Plan
    scores: bool
    weights: bool
    score_scale: bool
    heads: bool
    sees_weights: bool
    sees_heads: bool

    @classmethod
    def of(cls, method: AttentionMethod, plan: Plan) -> Edit:
        names = (
            "edit_scores", "edit_weights", "score_scale", "head_scale",
            "observe_weights", "observe_heads",
        )  # fmt: skip
        return cls(method, plan, *(method.overrides(name) for name in names))

    @property
    def edits_rows(self) -> bool:
        return self.scores or self.weights or self.score_scale

    @property
    def scales_heads(self) -> bool:
        return self.heads or self.plan.heads is not None

    @property
    def live(self) -> bool:
        """Whether any row of the batch has something to edit here."""
        return any(self.plan.samples)

    def tensors(self, offset: int, keys: int) -> tuple[torch.Tensor, ...]:
        """The plan's tensors for the keys that this call sees, then its constants."""
        sliced = tuple(tensor[:, offset : offset + keys] for tensor in self.plan.tensors)
        return (*sliced, *self.plan.constants)


class HeadFactors(NamedTuple):
    """Factors on the heads of a layer that hold for a prompt: (B, 1, H, 1), as outputs want them.

    `changed` (B, 1, H) bool says where they are not 1.
    """

    values: torch.Tensor
    changed: torch.Tensor

    @classmethod
    def of(cls, factors: torch.Tensor, dtype: torch.dtype) -> HeadFactors:
        """From (B, H)."""
        values = factors.to(dtype)[:, None, :, None]
        return cls(values, values[..., 0] != 1)


@dataclass(frozen=True)
class Step:
    """One edit of a layer, ready for the row of a decode step.

    Attributes:
        edit: the method and its plan.
        tensors: the plan's tensors for the keys of this step, and its constants.
        fused: the same row edit for the fused kernel, for the keys of this step.
        factors: head factors that hold for this prompt.
        counter: int64 scalar that takes the number of edited rows; None where a frame counts.
    """

    edit: Edit
    tensors: tuple[torch.Tensor, ...]
    fused: FusedEdit | None
    factors: HeadFactors | None
    counter: torch.Tensor | None


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> AttentionOutput:
    """transformers' attention signature: query (B, H, Q, D), key and value (B, Hkv, K, D)."""
    slot: Slot | None = module.__dict__.get(SLOT)
    if slot is None:
        output: AttentionOutput = sdpa_attention_forward(
            module, query, key, value, attention_mask, **kwargs
        )
        return output
    inputs = Inputs(module, query, key, value, attention_mask, kwargs)
    prepared = slot.session.prepared_steps
    if prepared is not None:  # a decode step whose Python part ran outside the compiled graph
        steps = prepared.get(slot.layer)
        return (_decode(slot, steps, None, inputs), None) if steps else inputs.base(slot)
    return _hooked_attention(slot, inputs)


def base_attention(module: Any) -> Callable[..., AttentionOutput]:
    """The attention function that a module's own configuration names."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    function: Callable[..., AttentionOutput] = ALL_ATTENTION_FUNCTIONS.get_interface(
        module.config._attn_implementation, eager
    )
    return function


def in_python(function: Function) -> Function:
    """Keep a function out of torch.compile's graphs: frames, plans and counts are Python state."""
    kept: Function = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return kept


@in_python
def _hooked_attention(slot: Slot, inputs: Inputs) -> AttentionOutput:
    """Attention of a layer that some stack wants: edited, or the model's own."""
    frame = slot.session.frame
    if frame is None:
        return inputs.base(slot)
    edits = tuple(edit for edit in frame.edits(slot.layer, inputs.query.device) if edit.live)
    if not edits:
        return inputs.base(slot)
    if inputs.kwargs.get("s_aux") is not None:
        raise UnsupportedModel(
            f"layer {slot.layer} of {type(inputs.module).__name__} uses learned attention sinks, "
            "which the row path does not model. No method that edits attention can run on this "
            "model."
        )
    _watch(slot, frame, edits, inputs)
    if not frame.decoding:
        return _prefill(slot, frame, edits, inputs)
    steps = frame.steps(slot.layer, edits, inputs.keys, inputs.query.dtype)
    return _decode(slot, steps, frame, inputs), None


# -- decode ------------------------------------------------------------------------------------


def _decode(
    slot: Slot, steps: tuple[Step, ...], frame: Frame | None, inputs: Inputs
) -> torch.Tensor:
    """All rows belong to generated tokens: (B, Q, H, D), edited, without the model's own pass.

    Nothing here but tensors and facts that hold for the whole prompt, so that it compiles.
    """
    on_rows = tuple(step for step in steps if step.edit.edits_rows)
    query = inputs.query
    result: torch.Tensor
    if not on_rows:
        result, _ = inputs.base(slot)
    else:
        visible = inputs.visible(0, query.shape[2])
        step, fused = on_rows[0], on_rows[0].fused
        if fused is not None and len(on_rows) == 1 and slot.fused(inputs):
            done = ops.attend_rows(
                query, inputs.key, inputs.value, fused, scaling=inputs.scaling,
                mask=_as_bool(visible), softcap=inputs.kwargs.get("softcap"), impl="triton",
            )  # fmt: skip
            counted = _row_count(step.edit, None, query) if step.edit.scores else done.edited
            _count(slot, frame, step, counted)
            result = done.out.transpose(1, 2)
        else:
            chosen = [(step, step.edit, step.tensors, None) for step in on_rows]
            result = _edited_rows(slot, frame, chosen, inputs, query, visible)
    for step in steps:
        if step.factors is not None:
            values, changed = step.factors
        elif step.edit.scales_heads:
            outputs = result.transpose(1, 2)
            scale = step.edit.method.head_scale(outputs, *step.tensors)
            values = scale.transpose(1, 2).to(result.dtype)[..., None]
            changed = values[..., 0] != 1
        else:
            continue
        _count(slot, frame, step, changed.expand(result.shape[:-1]))
        result = result * values
    return result


def _as_bool(mask: torch.Tensor | None) -> torch.Tensor | None:
    """A mask as bool with True = visible; additive masks are 0 there."""
    return mask if mask is None or mask.dtype == torch.bool else mask == 0


def _count(slot: Slot, frame: Frame | None, step: Step | None, rows: torch.Tensor | int) -> None:
    """Add edited rows: to the call, or to the step's counter inside a compiled graph."""
    if frame is not None:
        frame.call.count(slot.layer, rows)
    elif step is not None and step.counter is not None:
        step.counter.add_(rows.sum() if isinstance(rows, torch.Tensor) else rows)


# -- prefill -----------------------------------------------------------------------------------


def _prefill(slot: Slot, frame: Frame, edits: tuple[Edit, ...], inputs: Inputs) -> AttentionOutput:
    """The model's own attention, then the edited rows in chunks, then the head scales."""
    query = inputs.query
    queries = query.shape[2]
    result, base_weights = inputs.base(slot)
    on_rows = _windows(frame, edits)
    if on_rows:
        start = min(window.start for _, window in on_rows)
        step = _chunk(inputs)
        pieces = [result[:, :start]]
        for first in range(start, queries, step):
            last = min(first + step, queries)
            chunk = _chosen(slot, frame, on_rows, inputs, first, last)
            visible = inputs.visible(first, last - first)
            rows = query[:, :, first:last]
            edited = _edited_rows(slot, frame, chunk, inputs, rows, visible)
            pieces.append(_choose(edited, result[:, first:last], [rows for *_, rows in chunk]))
        result = torch.cat(pieces, dim=1)
    for edit in edits:
        if edit.scales_heads or edit.sees_heads:
            result = _heads(slot, frame, edit, inputs, result)
    return result, base_weights


def _windows(frame: Frame, edits: tuple[Edit, ...]) -> list[tuple[Edit, Window]]:
    """The edits that change rows of this forward, with the rows that each changes."""
    pairs = [(edit, frame.window(edit.method.rows)) for edit in edits if edit.edits_rows]
    return [(edit, window) for edit, window in pairs if window is not None]


def _chunk(inputs: Inputs) -> int:
    """How many rows of a prefill are computed at once."""
    batch, heads = inputs.query.shape[:2]
    return max(1, _CHUNK_BYTES // (4 * batch * heads * inputs.keys))


def _chosen(
    slot: Slot,
    frame: Frame,
    on_rows: list[tuple[Edit, Window]],
    inputs: Inputs,
    first: int,
    last: int,
) -> Chosen:
    """The edits of the rows from `first` to `last` of a prefill."""
    offset, device = frame.offset(slot.layer), inputs.query.device
    return [
        (None, edit, edit.tensors(offset, inputs.keys), window.mask(first, last, device))
        for edit, window in on_rows
    ]


def _choose(
    edited: torch.Tensor, base: torch.Tensor, chosen: list[torch.Tensor | None]
) -> torch.Tensor:
    """Edited rows where any method edits, else the model's own: (B, R, H, D)."""
    if any(rows is None for rows in chosen):
        return edited
    union = torch.stack([rows for rows in chosen if rows is not None]).any(0)
    return torch.where(union[:, :, None, None], edited, base)


# -- rows --------------------------------------------------------------------------------------

#: A step (None in a prefill), its edit, the tensors of its plan, and the rows (B, R) that it edits
#: (None: all of them).
Chosen: TypeAlias = (
    "Sequence[tuple[Step | None, Edit, tuple[torch.Tensor, ...], torch.Tensor | None]]"
)


def _edited_rows(
    slot: Slot,
    frame: Frame | None,
    edits: Chosen,
    inputs: Inputs,
    query: torch.Tensor,
    visible: torch.Tensor | None,
) -> torch.Tensor:
    """Edited attention for the rows in `query` (B, H, R, D) -> (B, R, H, D)."""
    weights, factors = _edited_weights(slot, frame, edits, inputs, query, visible)
    output = reference.attend(weights, inputs.value)
    if factors is not None:
        output = output * factors[..., None].to(output.dtype)
    return output.transpose(1, 2)


def _edited_weights(
    slot: Slot,
    frame: Frame | None,
    edits: Chosen,
    inputs: Inputs,
    query: torch.Tensor,
    visible: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Softmax rows (B, H, R, K) after every edit, and factors (B, H, R) on the head outputs."""
    scores = inputs.scores(query)
    factors: torch.Tensor | None = None
    for step, edit, plan, chosen in edits:
        if edit.score_scale:
            # A sliding layer's cache drops what its mask would hide: both must look the same.
            shown = _as_bool(visible)
            seen = scores if shown is None else scores.masked_fill(~shown, 0.0)
            scale = edit.method.score_scale(seen, *plan)
            if chosen is not None:
                scale = torch.where(chosen[:, None, :], scale, torch.ones_like(scale))
            factors = scale if factors is None else factors * scale
            _count(slot, frame, step, scale != 1)
    for step, edit, plan, chosen in edits:
        if edit.scores:
            edited = edit.method.edit_scores(scores, *plan)
            scores = edited if chosen is None else _where(chosen, edited, scores)
            _count(slot, frame, step, _row_count(edit, chosen, query))
    weights = torch.softmax(reference.mask_scores(scores, visible), dim=-1)
    for step, edit, plan, chosen in edits:
        if edit.weights:
            edited, changed = edit.method.edit_weights(weights, *plan)
            if chosen is not None:
                edited = _where(chosen, edited, weights)
                changed = changed & chosen[:, None, :]
            weights = edited
            _count(slot, frame, step, changed)
    return weights, factors


def _where(rows: torch.Tensor, edited: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
    return torch.where(rows[:, None, :, None], edited, plain)


def _row_count(edit: Edit, chosen: torch.Tensor | None, query: torch.Tensor) -> int:
    """Edited rows x heads of a score edit: rows of samples that have something to edit."""
    heads, rows = query.shape[1], query.shape[2]
    if chosen is None:
        return sum(edit.plan.samples) * heads * rows
    per_sample = chosen.sum(1).tolist()
    pairs = zip(edit.plan.samples, per_sample, strict=True)
    return heads * int(sum(count for live, count in pairs if live))


# -- watching ----------------------------------------------------------------------------------


def _watch(slot: Slot, frame: Frame, edits: tuple[Edit, ...], inputs: Inputs) -> None:
    """Show the rows of every watcher's rule, each with the row before it, as they are used."""
    queries = inputs.query.shape[2]
    for watcher in edits:
        window = frame.window(watcher.method.rows) if watcher.sees_weights else None
        if window is None:
            continue
        on_rows = _windows(frame, edits)
        tensors = watcher.tensors(frame.offset(slot.layer), inputs.keys)
        step = max(2, _chunk(inputs))
        for first in range(max(0, window.start - 1), queries, step - 1):
            last = min(first + step, queries)
            if last - first == 1 and first >= window.start:
                break  # the last row of the piece before was this one
            chunk = _chosen(slot, frame, on_rows, inputs, first, last)
            visible = inputs.visible(first, last - first)
            rows = inputs.query[:, :, first:last]
            weights, _ = _edited_weights(slot, None, chunk, inputs, rows, visible)
            watcher.method.observe_weights(slot.layer, weights, frame.past + first, *tensors)


# -- heads -------------------------------------------------------------------------------------


def _heads(
    slot: Slot, frame: Frame, edit: Edit, inputs: Inputs, result: torch.Tensor
) -> torch.Tensor:
    """Head scale and head-output probe on a prefill's result (B, Q, H, D), before o_proj."""
    method = edit.method
    window = frame.window("predicting")
    if edit.sees_heads and window is not None:
        method.observe_heads(slot.layer, result[:, window.start :].transpose(1, 2))
    if not edit.scales_heads:
        return result
    if edit.plan.heads is None and method.head_scale_from == "step":
        if window is None:
            return result
        tensors = edit.tensors(frame.offset(slot.layer), inputs.keys)
        outputs = result[:, window.start :].transpose(1, 2)
        scale = method.head_scale(outputs, *tensors)  # (B, H, R)
        if window.chosen is not None:
            chosen = window.chosen[:, None, :].to(scale.device)
            scale = torch.where(chosen, scale, torch.ones_like(scale))
        values = torch.ones_like(result[..., :1])
        values[:, window.start :, :, 0] = scale.transpose(1, 2).to(result.dtype)
        changed = values[..., 0] != 1
    else:
        stored = frame.factors(slot.layer, edit, result.dtype)
        if stored is None:
            decided = _decide_heads(slot, frame, edit, inputs, result)
            stored = HeadFactors.of(decided, result.dtype)
            frame.ledger.scales[method, slot.layer] = stored
        values, changed = stored
    frame.call.count(slot.layer, changed.expand(result.shape[:-1]))
    return result * values


def _decide_heads(
    slot: Slot, frame: Frame, edit: Edit, inputs: Inputs, result: torch.Tensor
) -> torch.Tensor:
    """(B, H) factors that a method decides on at the last prompt row, for all rows to come."""
    method = edit.method
    row = frame.last_prompt_row()
    if row is None:
        raise CompositionError(
            f"{method.name} chooses heads at the last prompt token, but this forward ends before "
            "it (chunked prefill). Generate without prefill_chunk_size."
        )
    row = row.to(result.device)
    outputs = [_take_rows(result, row, 1).transpose(1, 2)]
    if method.knocks_out():
        mask = inputs.visible(0, inputs.query.shape[2])
        if mask is not None and mask.shape[2] > 1:
            mask = _take_rows(mask.expand(len(row), *mask.shape[1:]), row, 2)
        blind = ~frame.visual(slot.layer, inputs.keys, row.device)[:, None, None, :]
        scores = reference.mask_scores(inputs.scores(_take_rows(inputs.query, row, 2)), mask)
        weights = torch.softmax(reference.mask_scores(scores, blind), dim=-1)
        outputs.append(reference.attend(weights, inputs.value))
    tensors = edit.tensors(frame.offset(slot.layer), inputs.keys)
    return method.head_scale(*outputs, *tensors)[:, :, 0]


def _take_rows(tensor: torch.Tensor, row: torch.Tensor, dim: int) -> torch.Tensor:
    """One row per sample: index `row` (B,) along `dim` of a 4-D tensor, kept as a length of 1."""
    shape = list(tensor.shape)
    shape[dim] = 1
    return tensor.gather(dim, row[:, None, None, None].expand(shape))


AttentionInterface.register(NAME, attention_forward)
# Without a mask function of the same name transformers would silently pass no mask at all.
AttentionMaskInterface.register(NAME, sdpa_mask)
