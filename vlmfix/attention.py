"""The one attention function that vlmfix registers, and the primitives behind it.

It is reached through a per-module copy of the configuration that names it (session.py), so only
the layers that a method wants ever come here. A layer with nothing to edit calls the model's own
attention and is bit-identical. During decoding, a layer with an edit computes its few rows here
*instead of* the model's attention, so the KV cache is read once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

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
    "Edit",
    "Implementation",
    "Slot",
    "Step",
    "attention_forward",
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

    def fused(self, query: torch.Tensor) -> bool:
        """Whether rows of this query go through the fused kernel where an edit has such a form."""
        return self.impl == "triton" or (self.impl == "auto" and query.is_cuda)


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


@dataclass(frozen=True)
class Step:
    """One edit of a layer, ready for the row of a decode step.

    Attributes:
        edit: the method and its plan.
        tensors: the plan's tensors for the keys of this step, and its constants.
        fused: the same row edit for the fused kernel, for the keys of this step.
        factors: (B, H) head factors that hold for this prompt.
        counter: int64 scalar that takes the number of edited rows; None where a frame counts.
    """

    edit: Edit
    tensors: tuple[torch.Tensor, ...]
    fused: FusedEdit | None
    factors: torch.Tensor | None
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
    prepared = slot.session.prepared_steps
    if prepared is not None:  # a decode step whose Python part ran outside the compiled graph
        steps = prepared.get(slot.layer)
        if not steps:
            return slot.base(module, query, key, value, attention_mask, **kwargs)
        return _decode(slot, steps, None, module, query, key, value, attention_mask, kwargs), None
    return _hooked_attention(slot, module, query, key, value, attention_mask, kwargs)


def in_python(function: Function) -> Function:
    """Keep a function out of torch.compile's graphs: frames, plans and counts are Python state."""
    kept: Function = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return kept


@in_python
def _hooked_attention(
    slot: Slot,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> AttentionOutput:
    """Attention of a layer that some stack wants: edited, or the model's own."""
    frame = slot.session.frame
    if frame is None:
        return slot.base(module, query, key, value, mask, **kwargs)
    edits = tuple(edit for edit in frame.edits(slot.layer, query.device) if edit.live)
    if not edits:
        return slot.base(module, query, key, value, mask, **kwargs)
    refuse_learned_sinks(slot, module, kwargs)
    arguments = (slot, frame, edits, module, query, key, value, mask, kwargs)
    watchers = tuple(edit for edit in edits if edit.sees_weights)
    if watchers:
        _watch(watchers, *arguments)
    if not frame.decoding:
        return _prefill(*arguments)
    steps = frame.steps(slot.layer, edits, key.shape[2])
    return _decode(slot, steps, frame, module, query, key, value, mask, kwargs), None


def refuse_learned_sinks(slot: Slot, module: torch.nn.Module, kwargs: dict[str, Any]) -> None:
    """Stop where a layer adds learned sinks to its softmax."""
    if kwargs.get("s_aux") is not None:
        raise UnsupportedModel(
            f"layer {slot.layer} of {type(module).__name__} uses learned attention sinks, which "
            "the row path does not model. No method that edits attention can run on this model."
        )


# -- decode ------------------------------------------------------------------------------------


def _decode(
    slot: Slot,
    steps: tuple[Step, ...],
    frame: Frame | None,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> torch.Tensor:
    """All rows belong to generated tokens: (B, Q, H, D), edited, without the model's own pass.

    Nothing here but tensors and facts that hold for the whole prompt, so that it compiles.
    """
    on_rows = tuple(step for step in steps if step.edit.edits_rows)
    result: torch.Tensor
    if not on_rows:
        result, _ = slot.base(module, query, key, value, mask, **kwargs)
    else:
        rows, keys = query.shape[2], key.shape[2]
        visible = _row_mask(module, mask, 0, rows, rows, keys, query.device, kwargs)
        step, fused = on_rows[0], on_rows[0].fused
        if fused is not None and len(on_rows) == 1 and slot.fused(query):
            done = ops.attend_rows(
                query, key, value, fused, scaling=_scaling(query, kwargs),
                mask=_as_bool(visible), softcap=kwargs.get("softcap"), impl="triton",
            )  # fmt: skip
            counted = _row_count(step.edit, None, query) if step.edit.scores else done.edited
            _count(slot, frame, step, counted)
            result = done.out.transpose(1, 2)
        else:
            chosen = [(step, step.edit, step.tensors, None) for step in on_rows]
            result = _edited_rows(slot, frame, chosen, query, key, value, visible, kwargs)
    for step in steps:
        if step.factors is not None:
            factors = step.factors[:, None, :].to(result.dtype)
        elif step.edit.scales_heads:
            outputs = result.transpose(1, 2)
            factors = step.edit.method.head_scale(outputs, *step.tensors).transpose(1, 2)
            factors = factors.to(result.dtype)
        else:
            continue
        _count(slot, frame, step, (factors != 1).expand(result.shape[:-1]))
        result = result * factors[..., None]
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


def _prefill(
    slot: Slot,
    frame: Frame,
    edits: tuple[Edit, ...],
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> AttentionOutput:
    """The model's own attention, then the edited rows in chunks, then the head scales."""
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    result: torch.Tensor
    result, base_weights = slot.base(module, query, key, value, mask, **kwargs)
    on_rows = _windows(frame, edits, query.device)
    if on_rows:
        start = min(window.start for _, window in on_rows)
        step = _chunk(batch, heads, keys)
        pieces = [result[:, :start]]
        for first in range(start, queries, step):
            last = min(first + step, queries)
            chunk = [
                (None, edit, edit.tensors(frame.offset(slot.layer), keys), chosen)
                for edit, window in on_rows
                for chosen in [window.mask(first, last, query.device)]
            ]
            visible = _row_mask(
                module, mask, first, last - first, queries, keys, query.device, kwargs
            )
            edited = _edited_rows(
                slot, frame, chunk, query[:, :, first:last], key, value, visible, kwargs
            )
            pieces.append(_choose(edited, result[:, first:last], [rows for *_, rows in chunk]))
        result = torch.cat(pieces, dim=1)
    for edit in edits:
        if edit.scales_heads or edit.sees_heads:
            result = _heads(slot, frame, edit, module, query, key, value, mask, kwargs, result)
    return result, base_weights


def _windows(
    frame: Frame, edits: tuple[Edit, ...], device: torch.device
) -> list[tuple[Edit, Window]]:
    """The edits that change rows of this forward, with the rows that each changes."""
    pairs = [(edit, frame.window(edit.method.rows)) for edit in edits if edit.edits_rows]
    return [(edit, window) for edit, window in pairs if window is not None]


def _chunk(batch: int, heads: int, keys: int) -> int:
    """How many rows of a prefill are computed at once."""
    return max(1, _CHUNK_BYTES // (4 * batch * heads * keys))


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
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> torch.Tensor:
    """Edited attention for the rows in `query` (B, H, R, D) -> (B, R, H, D)."""
    weights, factors = _edited_weights(slot, frame, edits, query, key, visible, kwargs)
    output = reference.attend(weights, value)
    if factors is not None:
        output = output * factors[..., None].to(output.dtype)
    return output.transpose(1, 2)


def _edited_weights(
    slot: Slot,
    frame: Frame | None,
    edits: Chosen,
    query: torch.Tensor,
    key: torch.Tensor,
    visible: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Softmax rows (B, H, R, K) after every edit, and factors (B, H, R) on the head outputs."""
    scores = reference.row_scores(query, key, _scaling(query, kwargs), kwargs.get("softcap"))
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


def _scaling(query: torch.Tensor, kwargs: dict[str, Any]) -> float:
    scaling: float | None = kwargs.get("scaling")
    return query.shape[-1] ** -0.5 if scaling is None else scaling


def _row_count(edit: Edit, chosen: torch.Tensor | None, query: torch.Tensor) -> int:
    """Edited rows x heads of a score edit: rows of samples that have something to edit."""
    heads, rows = query.shape[1], query.shape[2]
    if chosen is None:
        return sum(edit.plan.samples) * heads * rows
    per_sample = chosen.sum(1).tolist()
    pairs = zip(edit.plan.samples, per_sample, strict=True)
    return heads * int(sum(count for live, count in pairs if live))


def _row_mask(
    module: torch.nn.Module,
    mask: torch.Tensor | None,
    first: int,
    rows: int,
    queries: int,
    keys: int,
    device: torch.device,
    kwargs: dict[str, Any],
) -> torch.Tensor | None:
    """The mask of the rows from `first`: sliced, or built where transformers leaves it out."""
    if mask is not None:
        mask = mask[..., :keys]
        return mask if mask.shape[2] == 1 else mask[:, :, first : first + rows]
    causal = kwargs.get("is_causal")
    if causal is None:
        causal = getattr(module, "is_causal", True)
    if queries == 1 or not causal:
        return None
    # transformers leaves the mask out only where queries and keys both start at the first token.
    position = torch.arange(first, first + rows, device=device)
    return (torch.arange(keys, device=device)[None, :] <= position[:, None])[None, None]


# -- watching ----------------------------------------------------------------------------------


def _watch(
    watchers: tuple[Edit, ...],
    slot: Slot,
    frame: Frame,
    edits: tuple[Edit, ...],
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> None:
    """Show the rows of every watcher's rule, each with the row before it, as they are used."""
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    offset = frame.offset(slot.layer)
    on_rows = _windows(frame, edits, query.device)
    for watcher in watchers:
        window = frame.window(watcher.method.rows)
        if window is None:
            continue
        step = max(2, _chunk(batch, heads, keys))
        tensors = watcher.tensors(offset, keys)
        for first in range(max(0, window.start - 1), queries, step - 1):
            last = min(first + step, queries)
            if last - first == 1 and first >= window.start:
                break  # the last row of the piece before was this one
            chunk: Chosen = [
                (None, edit, edit.tensors(offset, keys), other.mask(first, last, query.device))
                for edit, other in on_rows
            ]
            visible = _row_mask(
                module, mask, first, last - first, queries, keys, query.device, kwargs
            )
            weights, _ = _edited_weights(
                slot, None, chunk, query[:, :, first:last], key, visible, kwargs
            )
            position = frame.past + first
            watcher.method.observe_weights(slot.layer, weights, position, *tensors)


# -- heads -------------------------------------------------------------------------------------


def _heads(
    slot: Slot,
    frame: Frame,
    edit: Edit,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    kwargs: dict[str, Any],
    result: torch.Tensor,
) -> torch.Tensor:
    """Head scale and head-output probe on a prefill's result (B, Q, H, D), before o_proj."""
    method = edit.method
    window = frame.window("predicting")
    if edit.sees_heads and window is not None:
        method.observe_heads(slot.layer, result[:, window.start :].transpose(1, 2))
    if not edit.scales_heads:
        return result
    tensors = edit.tensors(frame.offset(slot.layer), key.shape[2])
    if edit.plan.heads is None and method.head_scale_from == "step":
        if window is None:
            return result
        outputs = result[:, window.start :].transpose(1, 2)
        scale = method.head_scale(outputs, *tensors)  # (B, H, R)
        if window.chosen is not None:
            chosen = window.chosen[:, None, :].to(scale.device)
            scale = torch.where(chosen, scale, torch.ones_like(scale))
        factors = torch.ones_like(result[..., 0])
        factors[:, window.start :] = scale.transpose(1, 2).to(result.dtype)
    else:
        stored = frame.factors(slot.layer, edit)
        if stored is None:
            row = frame.last_prompt_row()
            if row is None:
                raise CompositionError(
                    f"{method.name} chooses heads at the last prompt token, but this forward ends "
                    "before it (chunked prefill). Generate without prefill_chunk_size."
                )
            row = row.to(result.device)
            seen = [_take_rows(result, row, 1).transpose(1, 2)]
            if method.knocks_out():
                blind = ~frame.visual(slot.layer, key.shape[2], key.device)[:, None, None, :]
                visible = _mask_of_rows(module, mask, row, query.shape[2], key.shape[2], kwargs)
                scores = reference.row_scores(
                    _take_rows(query, row, 2), key, _scaling(query, kwargs), kwargs.get("softcap")
                )
                scores = reference.mask_scores(reference.mask_scores(scores, visible), blind)
                seen.append(reference.attend(torch.softmax(scores, dim=-1), value))
            stored = method.head_scale(*seen, *tensors)[:, :, 0]
            frame.ledger.scales[method, slot.layer] = stored
        factors = stored[:, None, :].to(result.dtype)
    frame.call.count(slot.layer, (factors != 1).expand(result.shape[:-1]))
    return result * factors[..., None]


def _take_rows(tensor: torch.Tensor, row: torch.Tensor, dim: int) -> torch.Tensor:
    """One row per sample: index `row` (B,) along `dim` of a 4-D tensor, kept as a length of 1."""
    shape = list(tensor.shape)
    shape[dim] = 1
    return tensor.gather(dim, row[:, None, None, None].expand(shape))


def _mask_of_rows(
    module: torch.nn.Module,
    mask: torch.Tensor | None,
    row: torch.Tensor,
    queries: int,
    keys: int,
    kwargs: dict[str, Any],
) -> torch.Tensor | None:
    """The mask (B, 1, 1, K) of one row per sample."""
    full = _row_mask(module, mask, 0, queries, queries, keys, row.device, kwargs)
    if full is None or full.shape[2] == 1:
        return full
    return _take_rows(full.expand(len(row), *full.shape[1:]), row, 2)


AttentionInterface.register(NAME, attention_forward)
# Without a mask function of the same name transformers would silently pass no mask at all.
AttentionMaskInterface.register(NAME, sdpa_mask)
