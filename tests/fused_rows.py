"""One decode step in float64, through a method's own torch path and through its fused form."""

from __future__ import annotations

import torch

from vlmfix.base.attention import AttentionMethod, Plan
from vlmfix.kernels.reference import attend, attend_rows, mask_scores, row_scores


def both_forms(
    method: AttentionMethod, plan: Plan, *, seed: int, heads: int = 8, key_heads: int = 2
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Outputs (B, H, R, D) of the torch path, of the fused form, and of no edit at all.

    Three random rows over the keys of the plan; the first key of the first sample is masked, as
    padding is.
    """
    assert plan.fused is not None and plan.fused.groups is not None
    batch, keys = plan.fused.groups.shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, 16, generator=generator, dtype=torch.float64)

    query = 1.5 * draw(batch, heads, 3)
    key, value = draw(batch, key_heads, keys), draw(batch, key_heads, keys)
    mask = torch.ones(batch, 1, 1, keys, dtype=torch.bool)
    mask[0, ..., 0] = False
    tensors = {**plan.tensors, **plan.constants}
    scores = row_scores(query, key, 0.25)
    plain = attend(mask_scores(scores, mask).softmax(-1), value)
    if method.overrides("edit_scores"):
        scores = method.edit_scores(scores, **tensors)
    weights = mask_scores(scores, mask).softmax(-1)
    if method.overrides("edit_weights"):
        weights, _ = method.edit_weights(weights, **tensors)
    fused = attend_rows(query, key, value, plan.fused, scaling=0.25, mask=mask).out
    return attend(weights, value), fused, plain
