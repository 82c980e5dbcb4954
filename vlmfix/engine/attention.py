"""The one attention function that vlmfix registers.

It is reached through a per-module copy of the configuration that names it (hooks.py), so only
the layers that a method wants ever come here. A layer with nothing to edit calls the model's own
attention and is bit-identical. During decoding, a layer with an edit computes its few rows here
*instead of* the model's attention, so the KV cache is read once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vlmfix.base.observer import Observer, SeenRows
from vlmfix.engine.branches import Branches
from vlmfix.engine.call import Call
from vlmfix.engine.dispatch import AttentionOutput, in_python
from vlmfix.engine.edits import (
    Chosen,
    Edit,
    HeadFactors,
    Inputs,
    Step,
    as_bool,
    count,
    edited_rows,
    edited_weights,
    row_count,
)
from vlmfix.engine.frame import Frame, Window, without_gaps
from vlmfix.engine.plans import Plans
from vlmfix.engine.state import Implementation, State
from vlmfix.errors import CompositionError
from vlmfix.kernels import ops, reference

__all__ = ["NAME", "SLOT", "Slot", "attention_forward"]

NAME = "vlmfix"  # the name under which transformers dispatches to attention_forward
SLOT = "_vlmfix"  # where an attention module keeps its Slot
_CHUNK_BYTES = 64 * 2**20  # rows of a prefill are edited in chunks of at most this many bytes


@dataclass(frozen=True)
class Slot:
    """What an attention module needs to find its thread's state, and the attention it replaced."""

    state: State
    layer: int
    base: Callable[..., AttentionOutput]
    impl: Implementation

    def run(self, inputs: Inputs) -> AttentionOutput:
        """The attention that the module has without us."""
        return self.base(*inputs[:5], **inputs.kwargs)

    def fused(self, inputs: Inputs) -> bool:
        """Whether these rows go through the fused kernel where an edit has a form for it."""
        if self.impl == "triton":
            return True
        tensors = (inputs.query, inputs.key, inputs.value)
        return self.impl == "auto" and inputs.query.is_cuda and ops.runs_on_triton(*tensors)


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
    prepared = slot.state.prepared
    if prepared is not None:  # a decode step whose Python part ran outside the compiled graph
        steps = prepared.get(("attention", slot.layer))
        if not steps:
            return slot.run(inputs)
        rows, batch = len(steps[0].edit.plan.samples), len(query)
        if batch == rows:
            return _decode(slot, steps, None, inputs), None
        base = _decode(slot, steps, None, inputs.samples(0, rows))
        branches, _ = slot.run(inputs.samples(rows, batch))
        return torch.cat([base, branches]), None
    return _hooked_attention(slot, inputs)


@in_python
def _hooked_attention(slot: Slot, inputs: Inputs) -> AttentionOutput:
    """Attention of a layer that some stack wants: edited, or the model's own."""
    frame = slot.state.frame
    if frame is None:
        return slot.run(inputs)
    frame.reached.add(slot.layer)
    plans, branches = frame.get(Plans), frame.ledger.get(Branches)
    planned = () if plans is None else plans.edits(slot.layer, inputs.query.device)
    edits = tuple(edit for edit in planned if edit.live)
    observers = frame.observers_of(slot.layer)
    if not edits and not observers and (branches is None or inputs.unread):
        return slot.run(inputs)
    if edits or observers:
        inputs.check(slot.layer, (frame.queries, frame.needed))
    if branches is None:
        return _edited(slot, frame, edits, observers, inputs)
    # Edits see the base rows alone; behind them come the rows of branches.
    base = inputs.samples(0, branches.rows)
    busy = edits or observers
    groups = [
        _edited(slot, frame, edits, observers, base) if busy else _unedited(slot, frame, base)
    ]
    for branch, first in enumerate(branches.first, 1):
        rows = inputs.samples(branch * branches.rows, (branch + 1) * branches.rows)
        rows = rows.keys_from(max(0, first - frame.offset(slot.layer)))
        groups.append(_unedited(slot, frame, rows))
    outputs, weights = zip(*groups, strict=True)
    return torch.cat(outputs), None if weights[0] is None else weights[0]


def _edited(
    slot: Slot,
    frame: Frame,
    edits: tuple[Edit, ...],
    observers: Sequence[Observer],
    inputs: Inputs,
) -> AttentionOutput:
    _show_weights(slot, frame, edits, observers, inputs)
    if not frame.decoding:
        result, weights = _prefill(slot, frame, edits, inputs)
        _show_heads(slot, frame, observers, result)
        return result, weights
    steps = (
        () if not edits else _plans(frame).steps(slot.layer, edits, inputs.keys, inputs.query.dtype)
    )
    return _decode(slot, steps, frame.call, inputs), None


def _plans(frame: Frame) -> Plans:
    plans = frame.get(Plans)
    assert plans is not None  # there are edits
    return plans


def _unedited(slot: Slot, frame: Frame, inputs: Inputs) -> AttentionOutput:
    """What the model's own attention gives; on a CPU the few rows of a step in two products.

    torch's own attention is slow there for one row in half precision: 0.85 ms against 0.10 ms for
    16 heads and 608 keys (torch 2.13, one thread).
    """
    slow = slot.base is sdpa_attention_forward and inputs.query.device.type == "cpu"
    if not (slow and frame.decoding) or inputs.unread:
        return slot.run(inputs)
    visible = inputs.visible(0, inputs.query.shape[2])
    return edited_rows(slot.layer, None, (), inputs, inputs.query, visible), None


# -- decode ------------------------------------------------------------------------------------


def _decode(slot: Slot, steps: tuple[Step, ...], call: Call | None, inputs: Inputs) -> torch.Tensor:
    """All rows belong to generated tokens: (B, Q, H, D), edited, without the model's own pass.

    Nothing here but tensors and facts that hold for the whole prompt, so that it compiles.
    """
    on_rows = tuple(step for step in steps if step.edit.edits_rows)
    query = inputs.query
    result: torch.Tensor
    if not on_rows:
        result, _ = slot.run(inputs)
    else:
        visible = inputs.visible(0, query.shape[2])
        step, fused = on_rows[0], on_rows[0].fused
        if fused is not None and len(on_rows) == 1 and slot.fused(inputs):
            done = ops.attend_rows(
                query, inputs.key, inputs.value, fused, scaling=inputs.scaling,
                mask=as_bool(visible), softcap=inputs.kwargs.get("softcap"), impl="triton",
            )  # fmt: skip
            counted = row_count(step.edit, None, query) if step.edit.scores else done.edited
            count(slot.layer, call, step, counted)
            result = done.out.transpose(1, 2)
        else:
            chosen = [(step, step.edit, step.tensors, None) for step in on_rows]
            result = edited_rows(slot.layer, call, chosen, inputs, query, visible)
    for step in steps:
        if step.factors is not None:
            values, changed = step.factors
        elif step.edit.scales_heads:
            outputs = result.transpose(1, 2)
            scale = step.edit.method.head_scale(outputs, **step.tensors)
            values = scale.transpose(1, 2).to(result.dtype)[..., None]
            changed = values[..., 0] != 1
        else:
            continue
        count(slot.layer, call, step, changed.expand(result.shape[:-1]))
        result = result * values
    return result


# -- prefill -----------------------------------------------------------------------------------


def _prefill(slot: Slot, frame: Frame, edits: tuple[Edit, ...], inputs: Inputs) -> AttentionOutput:
    """The model's own attention, then the edited rows in chunks, then the head scales."""
    query = inputs.query
    queries = query.shape[2]
    result, base_weights = slot.run(inputs)
    on_rows = _windows(frame, edits, queries)
    if on_rows:
        start = min(window.start for _, window in on_rows)
        step = _chunk(inputs)
        pieces = [result[:, :start]]
        for first in range(start, queries, step):
            last = min(first + step, queries)
            chunk = _chosen(slot, frame, on_rows, inputs, first, last)
            visible = inputs.visible(first, last - first)
            rows = query[:, :, first:last]
            edited = edited_rows(slot.layer, frame.call, chunk, inputs, rows, visible)
            pieces.append(_choose(edited, result[:, first:last], [rows for *_, rows in chunk]))
        result = torch.cat(pieces, dim=1)
    for edit in edits:
        if edit.scales_heads:
            result = _heads(slot, frame, edit, inputs, result)
    return result, base_weights


def _windows(frame: Frame, edits: tuple[Edit, ...], rows: int) -> list[tuple[Edit, Window]]:
    """The edits that change some of these rows, with the rows that each changes."""
    pairs = [(edit, frame.window(edit.method.rows, rows)) for edit in edits if edit.edits_rows]
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


# -- observing ---------------------------------------------------------------------------------


def _show_weights(
    slot: Slot,
    frame: Frame,
    edits: tuple[Edit, ...],
    observers: Sequence[Observer],
    inputs: Inputs,
) -> None:
    """Show the rows of every observer's rule, each with the row before it, as they are used."""
    queries = inputs.query.shape[2]
    for observer in observers:
        looks = observer.overrides("see_weights")
        window = frame.window(observer.rows, queries) if looks else None
        if window is None:
            continue
        on_rows, device = _windows(frame, edits, queries), inputs.query.device
        visual = frame.visual(slot.layer, inputs.keys, device)
        question, content = frame.ledger.question.to(device), frame.ledger.content.to(device)
        step, begin = max(2, _chunk(inputs)), max(0, window.start - 1)
        gaps, before = frame.gaps, None
        while gaps is not None and begin and bool(gaps[:, frame.past + begin].any()):
            begin -= 1
        for first in range(begin, queries, step - 1):
            last = min(first + step, queries)
            if last - first == 1 and first > begin:
                break  # the last row of the piece before was this one
            chunk = _chosen(slot, frame, on_rows, inputs, first, last)
            visible = inputs.visible(first, last - first)
            rows = inputs.query[:, :, first:last]
            weights, _ = edited_weights(slot.layer, None, chunk, inputs, rows, visible)
            start, first_key = frame.past + first, frame.offset(slot.layer)
            if gaps is not None:
                weights = before = without_gaps(weights, gaps[:, start : frame.past + last], before)
            observer.see_weights(
                SeenRows(slot.layer, weights, start, first_key, visual, question, content)
            )


def _show_heads(
    slot: Slot, frame: Frame, observers: Sequence[Observer], result: torch.Tensor
) -> None:
    """Show the head outputs (B, Q, H, D) of the rows that predict."""
    window = frame.window("predicting", result.shape[1])
    for observer in observers:
        if window is not None and observer.overrides("see_heads"):
            observer.see_heads(slot.layer, result[:, window.start :].transpose(1, 2))


# -- heads -------------------------------------------------------------------------------------


def _heads(
    slot: Slot, frame: Frame, edit: Edit, inputs: Inputs, result: torch.Tensor
) -> torch.Tensor:
    """Head scale on a prefill's result (B, Q, H, D), before o_proj."""
    method = edit.method
    window = frame.window("predicting", result.shape[1])
    if edit.plan.heads is None and method.head_scale_from == "step":
        if window is None:
            return result
        tensors = edit.tensors(frame.offset(slot.layer), inputs.keys)
        outputs = result[:, window.start :].transpose(1, 2)
        scale = method.head_scale(outputs, **tensors)  # (B, H, R)
        if window.chosen is not None:
            chosen = window.chosen[:, None, :].to(scale.device)
            scale = torch.where(chosen, scale, torch.ones_like(scale))
        values = torch.ones_like(result[..., :1])
        values[:, window.start :, :, 0] = scale.transpose(1, 2).to(result.dtype)
        changed = values[..., 0] != 1
    else:
        plans = _plans(frame)
        stored = plans.factors(slot.layer, edit, result.dtype)
        if stored is None:
            decided = _decide_heads(slot, frame, edit, inputs, result)
            stored = HeadFactors.of(decided, result.dtype)
            plans.notes.factors[method, slot.layer] = stored
        values, changed = stored
    frame.call.count(slot.layer, changed.expand(result.shape[:-1]))
    return result * values


def _decide_heads(
    slot: Slot, frame: Frame, edit: Edit, inputs: Inputs, result: torch.Tensor
) -> torch.Tensor:
    """(B, H) factors that a method decides on at the last prompt row, for all rows to come."""
    method = edit.method
    row = frame.last_prompt_row(result.shape[1])
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
    return method.head_scale(*outputs, **tensors)[:, :, 0]


def _take_rows(tensor: torch.Tensor, row: torch.Tensor, dim: int) -> torch.Tensor:
    """One row per sample: index `row` (B,) along `dim` of a 4-D tensor, kept as a length of 1."""
    shape = list(tensor.shape)
    shape[dim] = 1
    return tensor.gather(dim, row[:, None, None, None].expand(shape))


AttentionInterface.register(NAME, attention_forward)
# Without a mask function of the same name transformers would silently pass no mask at all.
AttentionMaskInterface.register(NAME, sdpa_mask)
