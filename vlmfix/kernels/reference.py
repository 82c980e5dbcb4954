"""Attention for few query rows in plain torch: the specification of the fused kernels.

Grouped-query attention is packed, never repeated: the G query heads that share a key head are
extra rows of one batched product, so every key is read once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from vlmfix.errors import BadInput

__all__ = [
    "GROUPS",
    "FusedEdit",
    "RowsOutput",
    "attend",
    "attend_rows",
    "mask_scores",
    "row_scores",
]

#: Number of groups that a key may belong to; group 0 is never edited.
GROUPS = 4

#: Keys or values of at most so many numbers are cast to float32 first: below this size, starting a
#: half-precision product on a CPU costs more than the cast.
_SMALL = 2**16


def _operand(tensor: torch.Tensor) -> torch.Tensor:
    half = tensor.dtype in (torch.float16, torch.bfloat16)
    small = half and tensor.device.type == "cpu" and tensor.numel() <= _SMALL
    return tensor.float() if small else tensor


def row_scores(
    query: torch.Tensor, key: torch.Tensor, scaling: float, softcap: float | None = None
) -> torch.Tensor:
    """Scaled scores of few rows.

    Args:
        query: (B, H, R, D).
        key: (B, Hkv, K, D), not repeated; H is a multiple of Hkv.
        scaling: factor on the dot products, usually D ** -0.5.
        softcap: if given, scores become softcap * tanh(scores / softcap).

    Returns:
        (B, H, R, K), float32 (float64 for float64 inputs).
    """
    batch, heads, rows, width = query.shape
    key_heads, keys = key.shape[1], key.shape[2]
    key = _operand(key)
    query = query.to(key.dtype)
    packed = query.reshape(batch * key_heads, heads // key_heads * rows, width)
    flat = key.reshape(batch * key_heads, keys, width)
    scores = torch.baddbmm(query.new_zeros(1, 1, 1), packed, flat.mT, beta=0, alpha=scaling)
    scores = scores.view(batch, heads, rows, keys)
    if scores.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def mask_scores(scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Apply a mask (B, 1 or H, R or 1, K): bool with True = visible, or additive floats."""
    if mask is None:
        return scores
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores + mask


def attend(weights: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Head outputs of few rows: weights (B, H, R, K), value (B, Hkv, K, D) -> (B, H, R, D).

    The result has the values' dtype; the weights are cast to it first, unless the values are few.
    """
    batch, heads, rows, keys = weights.shape
    key_heads, width = value.shape[1], value.shape[3]
    operand = _operand(value)
    packed = weights.to(operand.dtype).reshape(batch * key_heads, heads // key_heads * rows, keys)
    output = torch.bmm(packed, operand.reshape(batch * key_heads, keys, width))
    return output.view(batch, heads, rows, width).to(value.dtype)


@dataclass(frozen=True, eq=False)
class FusedEdit:
    """The edit of rows in one call of `attend_rows`, in the order of the fields.

    Every key has a group, and a key of group 0 is never edited: all zeros mean plain attention
    with scaled heads. Build it once per prompt and layer, on the device of the layer; a call only
    reads it. K below is the number of keys of a call; wider tensors are read up to it, so that
    they can be made at the capacity of a cache.

    Attributes:
        groups: (B, at least K) uint8 in 0..3. None: no key has a group.
        gain: (4, 2) float32. A score s of a key in group g becomes s * gain[g, s < 0], before the
            mask. Row 0 is not read. PAI is (1 + alpha, 1 - alpha) for visual keys.
        log_weight: (B, at least K) float32 and finite, added to the score after the gain; to all
            keys if there are no groups.
        epilogue: the rule for the mass of each group, after the softmax:
            "plain": nothing.
            "var": Visual Attention Redistribution (arXiv 2503.03321). Groups are 1 text sink,
            2 visual sink, 3 other visual keys. A row whose visual mass is at least
            `minimum_visual_mass`, with at least the share `rho` of it off the sinks, leaves its
            sinks the share `keep` and gives the rest to group 3, in proportion. Rows keep their
            sum.
            "drop": AD-HH (ICLR 2025). Groups are 1 image, 2 text after it. A row of a head in
            `heads` with a mass of at least `threshold` on group 2 loses that mass, and is not
            renormalised.
        keep, rho, minimum_visual_mass: see "var".
        threshold: see "drop".
        heads: (H,) bool, see "drop".
        head_scale: (B, H) float32 factor on the output of a head.

    Raises:
        BadInput: fields that exclude each other.
    """

    groups: torch.Tensor | None = None
    gain: torch.Tensor | None = None
    log_weight: torch.Tensor | None = None
    epilogue: Literal["plain", "var", "drop"] = "plain"
    keep: float = 1.0
    rho: float = 0.0
    minimum_visual_mass: float = 0.0
    threshold: float = 0.0
    heads: torch.Tensor | None = None
    head_scale: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.epilogue not in ("plain", "var", "drop"):
            raise BadInput(f"epilogue={self.epilogue!r}: use 'plain', 'var' or 'drop'")
        if self.groups is None and (self.epilogue != "plain" or self.gain is not None):
            raise BadInput("gain, 'var' and 'drop' act on groups of keys: give groups")
        if (self.epilogue == "drop") != (self.heads is not None):
            raise BadInput("heads (H,) bool goes with epilogue='drop', and with no other")
        if not all(map(math.isfinite, self.numbers)):
            raise BadInput(
                f"keep, rho, minimum_visual_mass, threshold are {self.numbers}: not finite"
            )
        kinds = {
            "groups": (2, torch.uint8),
            "gain": (2, torch.float32),
            "log_weight": (2, torch.float32),
            "heads": (1, torch.bool),
            "head_scale": (2, torch.float32),
        }
        for name, (rank, dtype) in kinds.items():
            tensor = getattr(self, name)
            if tensor is not None and (tensor.ndim != rank or tensor.dtype != dtype):
                found = f"{tuple(tensor.shape)} {tensor.dtype}"
                raise BadInput(f"{name} is {found}; it needs {rank} dimension(s) of {dtype}")
        if self.gain is not None and self.gain.shape != (GROUPS, 2):
            raise BadInput(f"gain is {tuple(self.gain.shape)}; it needs ({GROUPS}, 2)")

    @property
    def numbers(self) -> tuple[float, float, float, float]:
        """keep, rho, minimum_visual_mass, threshold."""
        return self.keep, self.rho, self.minimum_visual_mass, self.threshold


class RowsOutput(NamedTuple):
    """The outputs of `attend_rows`.

    Attributes:
        out: (B, H, Q, Dv) in the dtype of the query; a transposed view of (B, Q, H, Dv) in memory,
            the layout that an output projection reads.
        masses: (B, H, Q, 4), share of every group in a row, after gain, log weight and mask and
            before the epilogue. Float32 (float64 for float64 inputs). Without groups, all of it is
            in group 0.
        edited: (B, H, Q) bool, rows on which the epilogue acted. Gain, log weight and head scale
            do not count: they need no decision, so the caller knows where they act.
    """

    out: torch.Tensor
    masses: torch.Tensor
    edited: torch.Tensor


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
    """Attention of few rows with an edit: the specification of every implementation.

    Float64 inputs are computed in float64 throughout. Values of masked keys are multiplied by zero,
    so they must be finite here (the fused kernel does not read them).

    Args:
        query: (B, H, Q, D).
        key: (B, Hkv, K, D), not repeated; H is a multiple of Hkv.
        value: (B, Hkv, K, Dv).
        edit: the edit of the rows.
        scaling: factor on the dot products, usually D ** -0.5.
        mask: (1 or B, 1 or H, 1 or Q, K) bool, True = visible. A row that sees nothing gives zeros.
            None: every row sees every key.
        rows: (B, Q) bool, rows that may be edited; None: all. In other rows heads are not scaled
            either.
        softcap: if given, scores become softcap * tanh(scores / softcap), before the gain.
    """
    batch, heads, count, _ = query.shape
    keys = key.shape[2]
    scores = row_scores(query, key, scaling, softcap)
    groups = None if edit.groups is None else edit.groups[:, :keys].long()
    changed = _edit_scores(scores, groups, edit)
    if rows is not None:
        changed = torch.where(rows[:, None, :, None], changed, scores)
    weights = torch.softmax(mask_scores(changed, mask), dim=-1)
    if mask is not None:
        weights = weights.masked_fill(~mask, 0.0)  # otherwise a row that sees nothing is uniform
    if groups is None:
        masses = torch.nn.functional.pad(weights.sum(-1, keepdim=True), (0, GROUPS - 1))
        edited = torch.zeros(masses.shape[:-1], dtype=torch.bool, device=masses.device)
    else:
        member = torch.nn.functional.one_hot(groups, GROUPS).to(weights.dtype)
        flat = weights.reshape(batch, heads * count, keys)
        masses = torch.bmm(flat, member).view(batch, heads, count, GROUPS)
        factors, edited = _epilogue(masses, edit)
        if rows is not None:
            edited = edited & rows[:, None, :]
        if edit.epilogue != "plain":
            factors = torch.where(edited[..., None], factors, 1.0)
            per_key = torch.bmm(factors.reshape(batch, heads * count, GROUPS), member.mT)
            weights = weights * per_key.view_as(weights)
    result = attend(weights, value)
    if edit.head_scale is not None:
        scale = edit.head_scale.to(masses.dtype)[:, :, None, None]
        if rows is not None:
            scale = torch.where(rows[:, None, :, None], scale, 1.0)
        result = result * scale
    out = query.new_empty(batch, count, heads, value.shape[3]).transpose(1, 2)
    return RowsOutput(out.copy_(result), masses, edited)


def _edit_scores(
    scores: torch.Tensor, groups: torch.Tensor | None, edit: FusedEdit
) -> torch.Tensor:
    """Gain and log weight of every key that may be edited, on scores (B, H, Q, K)."""
    if edit.gain is not None:
        assert groups is not None  # FusedEdit sees to it
        table = edit.gain.to(scores.dtype)[groups]
        table = torch.where((groups == 0)[..., None], 1.0, table)[:, None, None]
        scores = scores * torch.where(scores < 0, table[..., 1], table[..., 0])
    if edit.log_weight is not None:
        weight = edit.log_weight[:, : scores.shape[-1]].to(scores.dtype)
        if groups is not None:
            weight = weight.masked_fill(groups == 0, 0.0)
        scores = scores + weight[:, None, None]
    return scores


def _epilogue(masses: torch.Tensor, edit: FusedEdit) -> tuple[torch.Tensor, torch.Tensor]:
    """Factor of every group, masses-like, and rows (B, H, Q) that the rule selects."""
    _, first, second, third = masses.unbind(-1)
    factors = torch.ones_like(masses)
    if edit.epilogue == "var":
        visual = second + third
        selected = (visual >= edit.minimum_visual_mass) & ((1 - edit.rho) * visual >= second)
        selected = selected & (third > 0)
        gained = (1 - edit.keep) * (first + second) / third.clamp_min(1e-30)
        factors[..., 1:3] = edit.keep
        factors[..., 3] = 1 + gained
        return factors, selected
    if edit.epilogue == "drop":
        assert edit.heads is not None  # FusedEdit sees to it
        factors[..., 2] = 0
        return factors, edit.heads[:, None] & (second >= edit.threshold) & (second > 0)
    return factors, torch.zeros_like(first, dtype=torch.bool)
