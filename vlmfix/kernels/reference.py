"""Attention for few query rows in plain torch: the specification of the fused kernels.

Grouped-query attention is packed, never repeated: the G query heads that share a key head are
extra rows of one batched product, so every key is read once.
"""

from __future__ import annotations

import torch

__all__ = ["attend", "mask_scores", "row_scores"]

#: Keys or values of at most so many numbers are cast up first: below it, what a half-precision
#: product costs to start on a CPU is more than what the cast costs.
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
