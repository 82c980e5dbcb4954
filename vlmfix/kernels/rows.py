"""Attention for few query rows with an edit, in Triton: two launches, one pass over the cache.

`_partials` is split-K flash decoding. A program owns a run of keys of one key head, and the query
rows (G heads that share it, times Q positions) that attend to it. The mass and the output of every
key group are needed separately, but without four accumulators: the query rows are repeated once per
group along M of the same dot product ("slots"), and a weight stays only in the slot of its key's
group. M is padded to 16 anyway, so up to 4 rows this is free. `_combine` merges the runs of a row,
decides on its masses how each group changes, and writes the output.

Importing this file imports Triton. With TRITON_INTERPRET=1 set before that, the kernels run on
CPU tensors, slowly: for tests.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from vlmfix.errors import BadInput
from vlmfix.kernels.reference import GROUPS, FusedEdit, RowsOutput

__all__ = ["MAX_ROWS", "MAX_WIDTH", "Launch", "attend_rows", "launches", "unsupported"]

#: Query rows of one key head: G heads times Q positions. Each block of rows reads the cache again.
MAX_ROWS = 64
#: Head width: a block of keys and one of values, three deep, must fit in shared memory.
MAX_WIDTH = 256

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_INTERPRETER_SMS = 4  # so few that small tests have both several runs and runs of several blocks


@triton.jit  # type: ignore[untyped-decorator]  # triton is untyped
def _round_to_bfloat16(x: tl.tensor) -> tl.tensor:
    """Float32 rounded to the nearest bfloat16, ties to even, by integer arithmetic.

    For the interpreter alone, whose own cast truncates.
    """
    bits = x.to(tl.uint32, bitcast=True)
    bits = bits + 0x7FFF + ((bits >> 16) & 1)
    return (bits & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]  # triton is untyped
def _of_group(group: tl.tensor, first: tl.tensor, second: tl.tensor, third: tl.tensor) -> tl.tensor:
    """The number that belongs to a group; 1 for group 0."""
    found = tl.where(group == 1, first, 1.0)
    found = tl.where(group == 2, second, found)
    return tl.where(group == 3, third, found)


@triton.jit  # type: ignore[untyped-decorator]  # triton is untyped
def _tanh(x: tl.tensor) -> tl.tensor:
    """tanh to float32 accuracy; the exponential form alone cancels near 0."""
    decay = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - decay) / (1.0 + decay)
    square = x * x
    series = 1.0 + square * (
        -1.0 / 3.0 + square * (2.0 / 15.0 + square * (-17.0 / 315.0 + square * (62.0 / 2835.0)))
    )
    return tl.where(tl.abs(x) < 0.25, x * series, tl.where(x < 0, -far, far))


# Numbers that change from step to step or from prompt to prompt are not specialised: a multiple of
# 16 would compile once more. Strides of query, key and value are: they decide how wide loads are.
@triton.jit(  # type: ignore[untyped-decorator]  # triton is untyped
    do_not_specialize=[
        "groups_batch", "weight_batch", "mask_batch", "mask_head", "mask_query",
        "scaling", "softcap", "keys", "split_keys", "key_heads", "shared", "queries", "blocks",
    ]
)  # fmt: skip
def _partials(
    # Inputs; the last five may be None; gain and rows are contiguous.
    query: tl.tensor, key: tl.tensor, value: tl.tensor,
    groups: tl.tensor, gain: tl.tensor, log_weight: tl.tensor, mask: tl.tensor, rows: tl.tensor,
    # Outputs, per run of keys, float32: sums (B * Hkv, splits, SLOTS, R, Dv) of weight times value
    # and totals (B * Hkv, splits, SLOTS, R) of weights, both over exp(peak); peaks of the scores
    # (B * Hkv, splits, R), the same for all slots.
    sums: tl.tensor, totals: tl.tensor, peaks: tl.tensor,
    # Strides in elements; all last ones are 1.
    query_batch: tl.tensor, query_head: tl.tensor, query_row: tl.tensor,
    key_batch: tl.tensor, key_head: tl.tensor, key_row: tl.tensor,
    value_batch: tl.tensor, value_head: tl.tensor, value_row: tl.tensor,
    groups_batch: tl.tensor, weight_batch: tl.tensor,
    mask_batch: tl.tensor, mask_head: tl.tensor, mask_query: tl.tensor,
    # shared: query heads per key head, G. blocks: row blocks per key head.
    scaling: tl.tensor, softcap: tl.tensor, keys: tl.tensor, split_keys: tl.tensor,
    key_heads: tl.tensor, shared: tl.tensor, queries: tl.tensor, blocks: tl.tensor,
    # FLAT_MASK: the mask has one row for all heads, and there is one query position. EMULATE:
    # bfloat16 in the interpreter, which gets its arithmetic wrong.
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    BLOCK_VALUE_WIDTH: tl.constexpr, SLOTS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr, FLAT_MASK: tl.constexpr, SOFTCAP: tl.constexpr, EMULATE: tl.constexpr,
) -> None:  # fmt: skip
    """Attention of one block of rows to one run of keys."""
    pair = tl.program_id(0) // blocks  # batch and key head
    split = tl.program_id(1)
    batch = (pair // key_heads).to(tl.int64)
    key_head_index = (pair % key_heads).to(tl.int64)
    packed = tl.arange(0, SLOTS * BLOCK_ROWS)
    slot = packed // BLOCK_ROWS
    row = (tl.program_id(0) % blocks) * BLOCK_ROWS + packed % BLOCK_ROWS
    live = row < shared * queries
    head = key_head_index * shared + row % shared
    position = (row // shared).to(tl.int64)
    column = tl.arange(0, BLOCK_WIDTH)
    value_column = tl.arange(0, BLOCK_VALUE_WIDTH)

    at = batch * query_batch + head * query_head + position * query_row
    query_tile = tl.load(
        query + at[:, None] + column[None, :],
        mask=live[:, None] & (column < WIDTH)[None, :],
        other=0.0,
    )
    if EMULATE:
        query_tile = query_tile.to(tl.float32)
    if rows is not None:
        may_edit = tl.load(rows + batch * queries + position, mask=live, other=0) != 0
    if gain is not None:
        up_1, down_1 = tl.load(gain + 2), tl.load(gain + 3)
        up_2, down_2 = tl.load(gain + 4), tl.load(gain + 5)
        up_3, down_3 = tl.load(gain + 6), tl.load(gain + 7)

    peak = tl.full((SLOTS * BLOCK_ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((SLOTS * BLOCK_ROWS,), tl.float32)
    result = tl.zeros((SLOTS * BLOCK_ROWS, BLOCK_VALUE_WIDTH), tl.float32)
    first = split * split_keys
    last = tl.minimum(first + split_keys, keys)
    for start in tl.range(first, last, BLOCK_KEYS):
        index = start + tl.arange(0, BLOCK_KEYS)
        index64 = index.to(tl.int64)
        # A key that no row sees is not loaded: that saves its bytes, and keeps the unwritten end of
        # a static cache out of the sums (0 * NaN is NaN).
        seen = index < last
        if FLAT_MASK:
            seen = seen & (tl.load(mask + batch * mask_batch + index64, mask=seen, other=0) != 0)
        visible = live[:, None] & seen[None, :]
        if mask is not None and not FLAT_MASK:
            at_row = batch * mask_batch + head * mask_head + position * mask_query
            flags = tl.load(mask + at_row[:, None] + index64[None, :], mask=visible, other=0)
            visible = visible & (flags != 0)
            seen = tl.max(visible.to(tl.int32), 0) != 0

        at_key = batch * key_batch + key_head_index * key_head + index64 * key_row
        key_tile = tl.load(
            key + at_key[None, :] + column[:, None],
            mask=seen[None, :] & (column < WIDTH)[:, None],
            other=0.0,
        )
        if EMULATE:
            key_tile = key_tile.to(tl.float32)
        scores = tl.dot(query_tile, key_tile, input_precision="ieee") * scaling
        if SOFTCAP:
            scores = softcap * _tanh(scores / softcap)
        if groups is not None:
            group = tl.load(groups + batch * groups_batch + index64, mask=seen, other=0)
            group = group.to(tl.int32)
        edited = scores
        if gain is not None:
            up = _of_group(group, up_1, up_2, up_3)
            down = _of_group(group, down_1, down_2, down_3)
            edited = edited * tl.where(edited < 0, down[None, :], up[None, :])
        if log_weight is not None:
            weight = tl.load(log_weight + batch * weight_batch + index64, mask=seen, other=0.0)
            if groups is not None:
                weight = tl.where(group != 0, weight, 0.0)
            edited = edited + weight[None, :]
        if rows is not None:
            edited = tl.where(may_edit[:, None], edited, scores)
        edited = tl.where(visible, edited, float("-inf"))

        new_peak = tl.maximum(peak, tl.max(edited, 1))
        # Where nothing was visible so far, -inf - -inf would be NaN.
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        fade = tl.exp(peak - shift)
        weights = tl.exp(edited - shift[:, None])
        if SLOTS > 1:
            weights = tl.where(slot[:, None] == group[None, :], weights, 0.0)
        total = total * fade + tl.sum(weights, 1)
        at_value = batch * value_batch + key_head_index * value_head + index64 * value_row
        value_tile = tl.load(
            value + at_value[:, None] + value_column[None, :],
            mask=seen[:, None] & (value_column < VALUE_WIDTH)[None, :],
            other=0.0,
        )
        if EMULATE:
            rounded = _round_to_bfloat16(weights)
            value_tile = value_tile.to(tl.float32)
        else:
            rounded = weights.to(value_tile.dtype)
        result = result * fade[:, None] + tl.dot(rounded, value_tile, input_precision="ieee")
        peak = new_peak

    run = pair.to(tl.int64) * tl.num_programs(1) + split
    at_peak = run * (shared * queries) + row
    at_slot = (run * SLOTS + slot) * (shared * queries) + row
    tl.store(peaks + at_peak, peak, mask=live & (slot == 0))
    tl.store(totals + at_slot, total, mask=live)
    tl.store(
        sums + at_slot[:, None] * VALUE_WIDTH + value_column[None, :],
        result,
        mask=live[:, None] & (value_column < VALUE_WIDTH)[None, :],
    )


@triton.jit(  # type: ignore[untyped-decorator]  # triton is untyped
    do_not_specialize=[
        "keep", "rho", "minimum_visual_mass", "threshold",
        "splits", "all_heads", "shared", "queries",
    ]
)  # fmt: skip
def _combine(
    sums: tl.tensor, totals: tl.tensor, peaks: tl.tensor,  # from _partials
    # Inputs, contiguous, may be None.
    rows: tl.tensor, heads: tl.tensor, head_scale: tl.tensor,
    # Outputs: out (B, Q, H, Dv), masses (B, H, Q, 4) float32, edited (B, H, Q) bool, contiguous.
    out: tl.tensor, masses: tl.tensor, edited: tl.tensor,
    keep: tl.tensor, rho: tl.tensor, minimum_visual_mass: tl.tensor, threshold: tl.tensor,
    splits: tl.tensor, all_heads: tl.tensor, shared: tl.tensor, queries: tl.tensor,
    VALUE_WIDTH: tl.constexpr, BLOCK_VALUE_WIDTH: tl.constexpr, SLOTS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr, EPILOGUE: tl.constexpr, EMULATE: tl.constexpr,
) -> None:  # fmt: skip
    """One row of one head: merge its runs, decide on the masses, write the output."""
    program = tl.program_id(0).to(tl.int64)  # (batch * H + head) * Q + position
    position = program % queries
    head = program // queries % all_heads
    batch = program // queries // all_heads
    count = shared * queries
    row = position * shared + head % shared
    run = (batch * (all_heads // shared) + head // shared) * splits  # of this pair's first split
    part = tl.arange(0, BLOCK_SPLITS)
    slot = tl.arange(0, SLOTS)

    peak = tl.full((BLOCK_SPLITS,), float("-inf"), tl.float32)
    for start in tl.range(0, splits, BLOCK_SPLITS):
        inside = start + part < splits
        at = (run + start + part) * count + row
        peak = tl.maximum(peak, tl.load(peaks + at, mask=inside, other=float("-inf")))
    shift = tl.max(peak, 0)
    shift = tl.where(shift == float("-inf"), 0.0, shift)

    share = tl.zeros((SLOTS,), tl.float32)
    for start in tl.range(0, splits, BLOCK_SPLITS):
        inside = start + part < splits
        at = (run + start + part) * count + row
        fade = tl.exp(tl.load(peaks + at, mask=inside, other=float("-inf")) - shift)
        at_slot = ((run + start + part)[:, None] * SLOTS + slot[None, :]) * count + row
        found = tl.load(totals + at_slot, mask=inside[:, None], other=0.0)
        share += tl.sum(found * fade[:, None], 0)
    total = tl.sum(share, 0)
    total = tl.where(total == 0.0, 1.0, total)  # a row that sees nothing gives zeros
    share = share / total

    may_edit = program >= 0
    if rows is not None:
        may_edit = tl.load(rows + batch * queries + position) != 0
    of_1, of_2, of_3 = 1.0, 1.0, 1.0
    selected = program < 0
    if EPILOGUE != "plain":
        first = tl.sum(tl.where(slot == 1, share, 0.0), 0)
        second = tl.sum(tl.where(slot == 2, share, 0.0), 0)
        third = tl.sum(tl.where(slot == 3, share, 0.0), 0)
        if EPILOGUE == "var":
            visual = second + third
            selected = (visual >= minimum_visual_mass) & ((1.0 - rho) * visual >= second)
            selected = may_edit & selected & (third > 0.0)
            gained = (1.0 - keep) * (first + second) / tl.maximum(third, 1e-30)
            of_1 = tl.where(selected, keep, 1.0)
            of_2 = of_1
            of_3 = tl.where(selected, 1.0 + gained, 1.0)
        else:
            selected = tl.load(heads + head) != 0
            selected = may_edit & selected & (second >= threshold) & (second > 0.0)
            of_2 = tl.where(selected, 0.0, 1.0)
    tl.store(edited + program, selected)
    column = tl.arange(0, 4)
    if SLOTS == 1:
        tl.store(masses + program * 4 + column, tl.where(column == 0, tl.sum(share, 0), 0.0))
    else:
        tl.store(masses + program * 4 + column, share)

    # Slots and splits of a row are now merely terms of one weighted sum.
    value_column = tl.arange(0, BLOCK_VALUE_WIDTH)
    result = tl.zeros((BLOCK_VALUE_WIDTH,), tl.float32)
    for start in tl.range(0, splits * SLOTS, BLOCK_SPLITS):
        term = start + part
        inside = term < splits * SLOTS
        at_peak = (run + term // SLOTS) * count + row
        fade = tl.exp(tl.load(peaks + at_peak, mask=inside, other=float("-inf")) - shift)
        factor = fade * _of_group(term % SLOTS, of_1, of_2, of_3)
        at = ((run * SLOTS + term) * count + row) * VALUE_WIDTH
        found = tl.load(
            sums + at[:, None] + value_column[None, :],
            mask=inside[:, None] & (value_column < VALUE_WIDTH)[None, :],
            other=0.0,
        )
        result += tl.sum(found * factor[:, None], 0)
    result = result / total
    if head_scale is not None:
        scale = tl.load(head_scale + batch * all_heads + head)
        result = result * tl.where(may_edit, scale, 1.0)
    if EMULATE:
        result = _round_to_bfloat16(result)
    at = ((batch * queries + position) * all_heads + head) * VALUE_WIDTH
    tl.store(
        out + at + value_column, result.to(out.dtype.element_ty), mask=value_column < VALUE_WIDTH
    )


_INTERPRETED = not isinstance(_partials, triton.JITFunction)


@dataclass(frozen=True)
class Launch:
    """A kernel with its grid, arguments and compile-time options."""

    kernel: Any
    grid: tuple[int, int]
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def __call__(self) -> None:
        """Run it."""
        self.kernel[self.grid](*self.arguments, **self.options)


def attend_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    edit: FusedEdit,
    *,
    scaling: float,
    mask: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    softcap: float | None = None,
) -> RowsOutput:
    """`reference.attend_rows` on a GPU. Keys and values that no row sees are not read.

    Masses and decisions are float32, so a row within about 1e-6 of a threshold may be decided
    differently than in float64.

    Raises:
        BadInput: inputs that the kernels do not support.
    """
    if reason := unsupported(query, key, value):
        raise BadInput(f"impl='triton' {reason}; impl='torch' can do it")
    elsewhere = query.is_cuda and query.device.index != torch.cuda.current_device()
    with torch.cuda.device(query.device) if elsewhere else contextlib.nullcontext():
        output, todo = launches(
            query, key, value, edit, scaling=scaling, mask=mask, rows=rows, softcap=softcap
        )
        for launch in todo:
            launch()
    return output


def unsupported(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> str | None:
    """Why the kernels cannot run on these tensors; None if they can."""
    if not (query.is_cuda or _INTERPRETED):
        return f"needs CUDA tensors, not {query.device.type}"
    if query.dtype not in _DTYPES:
        return f"does not support {query.dtype}"
    wide = max(query.shape[3], value.shape[3])
    if wide > MAX_WIDTH:
        return f"supports heads up to {MAX_WIDTH} wide, not {wide}"
    packed = query.shape[1] // key.shape[1] * query.shape[2]
    if packed > MAX_ROWS:
        return (
            f"takes {MAX_ROWS} rows per key head at a time, not {packed} (heads per key head times "
            "query positions): give fewer positions at a time"
        )
    if query.stride(3) != 1 or key.stride(3) != 1 or value.stride(3) != 1:
        return (
            "needs query, key and value with stride 1 along the head width: call .contiguous() on "
            "them"
        )
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        return "has no gradient: call it under torch.no_grad()"
    return None


def launches(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    edit: FusedEdit,
    *,
    scaling: float,
    mask: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    softcap: float | None = None,
    splits: int | None = None,
) -> tuple[RowsOutput, tuple[Launch, Launch]]:
    """Uninitialised outputs, and the two launches that fill them.

    Args:
        query, key, value, edit, scaling, mask, rows, softcap: as for `attend_rows`.
        splits: the most runs of keys; None: enough to fill the device twice.
    """
    batch, heads, queries, width = query.shape
    key_heads, keys, value_width = key.shape[1], key.shape[2], value.shape[3]
    shared = heads // key_heads
    slots = 1 if edit.groups is None else GROUPS
    full_mask = mask is not None and not (queries == 1 and mask.shape[1] == 1)
    block_keys, warps, stages = _blocks(query.dtype, max(width, value_width), full_mask)
    # At least 16 rows, the least of a tensor core, and at most 32, the most that registers hold.
    small, large = 16 // slots, 32 // slots
    block_rows = small if shared * queries <= small else large
    blocks = triton.cdiv(shared * queries, block_rows)
    if splits is None:
        splits = 2 * _processors(query.device) // max(1, batch * key_heads * blocks)
    splits = max(1, min(splits, triton.cdiv(keys, block_keys)))
    split_keys = triton.cdiv(triton.cdiv(keys, splits), block_keys) * block_keys
    splits = max(1, triton.cdiv(keys, split_keys)) if keys else 1  # so that none is empty

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=query.device)

    runs = (batch * key_heads, splits)
    sums = empty(*runs, slots, shared * queries, value_width)
    totals, peaks = empty(*runs, slots, shared * queries), empty(*runs, shared * queries)
    out = empty(batch, queries, heads, value_width, dtype=query.dtype)
    masses = empty(batch, heads, queries, GROUPS)
    edited = empty(batch, heads, queries, dtype=torch.bool)
    groups, log_weight, mask = _flat(edit.groups), _flat(edit.log_weight), _flat(mask)
    if mask is not None:
        mask = mask.expand(batch, heads, queries, keys)
    gain, heads_of, scale, rows = (
        None if tensor is None else tensor.contiguous()
        for tensor in (edit.gain, edit.heads, edit.head_scale, rows)
    )
    emulate = _INTERPRETED and query.dtype == torch.bfloat16
    shapes = {
        "VALUE_WIDTH": value_width,
        "BLOCK_VALUE_WIDTH": max(16, triton.next_power_of_2(value_width)),
        "SLOTS": slots,
        "EMULATE": emulate,
        "enable_fp_fusion": True,  # Triton 3.10 changes its default
    }
    partials = Launch(
        _partials,
        (batch * key_heads * blocks, splits),
        (
            query, key, value, groups, gain, log_weight, mask,
            rows if _edits_scores(edit) else None, sums, totals, peaks,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
            0 if groups is None else groups.stride(0),
            0 if log_weight is None else log_weight.stride(0),
            *((0, 0, 0) if mask is None else mask.stride()[:3]),
            scaling, 0.0 if softcap is None else softcap, keys, split_keys, key_heads, shared,
            queries, blocks,
        ),
        {
            **shapes,
            "WIDTH": width,
            "BLOCK_WIDTH": max(16, triton.next_power_of_2(width)),
            "BLOCK_ROWS": block_rows,
            "BLOCK_KEYS": block_keys,
            "FLAT_MASK": mask is not None and not full_mask,
            "SOFTCAP": softcap is not None,
            "num_warps": warps,
            "num_stages": stages,
        },
    )  # fmt: skip
    combine = Launch(
        _combine,
        (batch * heads * queries, 1),
        (
            sums, totals, peaks, rows, heads_of, scale, out, masses, edited,
            *edit.numbers, splits, heads, shared, queries,
        ),
        {
            **shapes,
            "BLOCK_SPLITS": 32,
            "EPILOGUE": edit.epilogue,
            "num_warps": 4,
        },
    )  # fmt: skip
    return RowsOutput(out.transpose(1, 2), masses, edited), (partials, combine)


def _edits_scores(edit: FusedEdit) -> bool:
    return edit.gain is not None or edit.log_weight is not None


def _flat(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor with stride 1 along the keys, as the kernels read it."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def _blocks(dtype: torch.dtype, width: int, full_mask: bool) -> tuple[int, int, int]:
    """Keys per block, warps and pipeline stages of `_partials`, by rule.

    The limits are those of ptxas for sm_90: no spills in half precision, and at most 227 KB of
    shared memory (tests/kernels compiles all variants). They were not timed on a GPU.
    """
    if dtype == torch.float32:  # exact products, without tensor cores: operands fill registers
        return 16, 8, 2
    return (32 if full_mask or width > 128 else 64), 4, 3


@functools.lru_cache
def _processors(device: torch.device) -> int:
    """Streaming multiprocessors of a device."""
    if device.type != "cuda":
        return _INTERPRETER_SMS
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count
