"""The one attention function that vlmfix registers, and the primitives behind it.

It is reached through a per-module copy of the configuration that names it (session.py), so only
the layers that a method wants ever come here. A layer with nothing to edit calls the model's own
attention and is bit-identical. During decoding, a layer with an edit computes its few rows here
*instead of* the model's attention, so the KV cache is read once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vlmfix.errors import CompositionError, UnsupportedModel
from vlmfix.kernels import reference
from vlmfix.method import AttentionMethod, Plan

if TYPE_CHECKING:
    from vlmfix.frame import Frame
    from vlmfix.session import Session

__all__ = ["NAME", "SLOT", "Edit", "Slot", "attention_forward", "in_python"]

NAME = "vlmfix"  # the name under which transformers dispatches to attention_forward
SLOT = "_vlmfix"  # where an attention module keeps its Slot
_CHUNK_BYTES = 64 * 2**20  # rows of a prefill are edited in chunks of at most this many bytes

AttentionOutput = tuple[torch.Tensor, "torch.Tensor | None"]
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Slot:
    """What an attention module needs to find its session and the attention it replaced."""

    session: Session
    layer: int
    base: Callable[..., AttentionOutput]


@dataclass(frozen=True)
class Edit:
    """One method at one layer of one prompt; the flags say which functions it overrides."""

    method: AttentionMethod
    plan: Plan
    scores: bool
    weights: bool
    heads: bool
    sees_weights: bool
    sees_heads: bool

    @classmethod
    def of(cls, method: AttentionMethod, plan: Plan) -> Edit:
        names = ("edit_scores", "edit_weights", "head_scale", "observe_weights", "observe_heads")
        return cls(method, plan, *(method.overrides(name) for name in names))

    @property
    def needs_rows(self) -> bool:
        return self.scores or self.weights or self.sees_weights

    def tensors(self, offset: int, keys: int) -> tuple[torch.Tensor, ...]:
        """The plan's tensors for the keys that this call sees."""
        return tuple(tensor[:, offset : offset + keys] for tensor in self.plan.tensors)


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
    edits = () if frame is None else frame.edits(slot.layer, query.device)
    if frame is None or not edits:
        return slot.base(module, query, key, value, mask, **kwargs)
    return _edited_attention(slot, frame, edits, module, query, key, value, mask, kwargs)


def _edited_attention(
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
    if kwargs.get("s_aux") is not None:
        raise UnsupportedModel(
            f"layer {slot.layer} of {type(module).__name__} uses learned attention sinks, which "
            "the row path does not model. No method that edits attention can run on this model."
        )
    batch, heads, queries, _ = query.shape
    # Each edit with the rows (B, R) that it edits from `start` on; None for all of them.
    on_rows: list[tuple[Edit, torch.Tensor | None]]
    if frame.decoding:
        start, on_rows = 0, [(edit, None) for edit in edits if edit.needs_rows]
    else:
        windows = [frame.window(edit.method.rows) for edit in edits]
        start = min((window.start for window in windows if window is not None), default=queries)
        on_rows = [
            (edit, _to(window.mask_from(start), query.device))
            for edit, window in zip(edits, windows, strict=True)
            if window is not None and edit.needs_rows
        ]
    result: torch.Tensor
    base_weights: torch.Tensor | None = None
    if frame.decoding and on_rows:
        result = _rows(slot, frame, on_rows, module, query, key, value, mask, 0, kwargs)
    else:
        result, base_weights = slot.base(module, query, key, value, mask, **kwargs)
        if on_rows and start < queries:
            step = max(1, _CHUNK_BYTES // (4 * batch * heads * key.shape[2]))
            pieces = [result[:, :start]]
            for first in range(start, queries, step):
                last = min(first + step, queries)
                rows = slice(first - start, last - start)
                chunk = [
                    (edit, None if chosen is None else chosen[:, rows]) for edit, chosen in on_rows
                ]
                edited = _rows(
                    slot, frame, chunk, module, query[:, :, first:last], key, value, mask,
                    first, kwargs,
                )  # fmt: skip
                pieces.append(_choose(edited, result[:, first:last], [c for _, c in chunk]))
            result = torch.cat(pieces, dim=1)
    for edit in edits:
        if edit.heads or edit.sees_heads:
            result = _heads(slot, frame, edit, result, key.shape[2])
    return result, base_weights


def _to(mask: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    """A mask on the device of a layer, which may not be that of the token ids."""
    return None if mask is None else mask.to(device)


def _choose(
    edited: torch.Tensor, base: torch.Tensor, chosen: list[torch.Tensor | None]
) -> torch.Tensor:
    """Edited rows where any method edits, else the model's own: (B, R, H, D)."""
    if any(rows is None for rows in chosen):
        return edited
    union = torch.stack([rows for rows in chosen if rows is not None]).any(0)
    return torch.where(union[:, :, None, None], edited, base)


def _rows(
    slot: Slot,
    frame: Frame,
    edits: list[tuple[Edit, torch.Tensor | None]],
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    first: int,
    kwargs: dict[str, Any],
) -> torch.Tensor:
    """Row edit, score edit and row probe for the rows in `query` (B, H, R, D) -> (B, R, H, D).

    `edits` pairs each method with the rows (B, R) that it edits, None for all of them; `first`
    is the index of the first row within the forward's queries.
    """
    rows, keys = query.shape[2], key.shape[2]
    offset = frame.offset(slot.layer)
    scaling = kwargs.get("scaling")
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    scores = reference.row_scores(query, key, scaling, kwargs.get("softcap"))
    plans = [edit.tensors(offset, keys) for edit, _ in edits]
    for (edit, chosen), plan in zip(edits, plans, strict=True):
        if edit.scores:
            edited = edit.method.edit_scores(scores, *plan)
            scores = edited if chosen is None else _where(chosen, edited, scores)
            frame.call.count(slot.layer, _row_count(edit, chosen, query))
    visible = _row_mask(frame, module, mask, first, rows, keys, query.device, kwargs)
    weights = torch.softmax(reference.mask_scores(scores, visible), dim=-1)
    for (edit, chosen), plan in zip(edits, plans, strict=True):
        if edit.weights:
            edited, changed = edit.method.edit_weights(weights, *plan)
            if chosen is not None:
                edited = _where(chosen, edited, weights)
                changed = changed & chosen[:, None, :]
            weights = edited
            frame.call.count(slot.layer, changed)
        if edit.sees_weights:
            edit.method.observe_weights(slot.layer, weights)
    return reference.attend(weights, value).transpose(1, 2)


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


def _row_mask(
    frame: Frame,
    module: torch.nn.Module,
    mask: torch.Tensor | None,
    first: int,
    rows: int,
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
    if frame.queries == 1 or not causal:
        return None
    # transformers leaves the mask out only where queries and keys both start at the first token.
    position = torch.arange(first, first + rows, device=device)
    return (torch.arange(keys, device=device)[None, :] <= position[:, None])[None, None]


def _heads(slot: Slot, frame: Frame, edit: Edit, result: torch.Tensor, keys: int) -> torch.Tensor:
    """Head scale and head-output probe on the layer's result (B, Q, H, D), before o_proj."""
    method, plan = edit.method, edit.tensors(frame.offset(slot.layer), keys)
    window = frame.window("predicting")
    if edit.sees_heads and window is not None:
        method.observe_heads(slot.layer, result[:, window.start :].transpose(1, 2))
    if not edit.heads:
        return result
    if method.head_scale_from == "step":
        if window is None:
            return result
        outputs = result[:, window.start :].transpose(1, 2)
        scale = method.head_scale(outputs, *plan)  # (B, H, R)
        if window.chosen is not None:
            chosen = window.chosen[:, None, :].to(scale.device)
            scale = torch.where(chosen, scale, torch.ones_like(scale))
        factors = torch.ones_like(result[..., 0])
        factors[:, window.start :] = scale.transpose(1, 2).to(result.dtype)
    else:
        stored = frame.ledger.scales.get((method, slot.layer))
        if stored is None:
            row = frame.last_prompt_row()
            if row is None:
                raise CompositionError(
                    f"{method.name} chooses heads at the last prompt token, but this forward ends "
                    "before it (chunked prefill). Generate without prefill_chunk_size."
                )
            index = row.to(result.device)[:, None, None, None].expand(-1, 1, *result.shape[2:])
            outputs = result.gather(1, index).transpose(1, 2)
            stored = method.head_scale(outputs, *plan)[:, :, 0]
            frame.ledger.scales[method, slot.layer] = stored
        factors = stored[:, None, :].to(result.dtype)
    frame.call.count(slot.layer, (factors != 1).expand(result.shape[:-1]))
    return result * factors[..., None]


AttentionInterface.register(NAME, attention_forward)
# Without a mask function of the same name transformers would silently pass no mask at all.
AttentionMaskInterface.register(NAME, sdpa_mask)
