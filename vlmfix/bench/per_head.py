"""The published formulations, as baselines: weights in memory, a loop over heads.

`attend_materialised` is the attention that an eager model runs: repeated keys and values, a row of
weights for every head. `redistribute_per_head` edits such weights as the authors of VAR publish it
(arXiv 2503.03321): it picks the heads and rows on the device, brings their indices to the host, and
edits one row after another. `amplify_image` is PAI (arXiv 2407.21771), on the scores. Nothing in
the model path uses this file.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["amplify_image", "attend_materialised", "redistribute_per_head"]


def attend_materialised(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float,
    mask: torch.Tensor | None = None,
    edit_scores: Callable[[torch.Tensor], torch.Tensor] | None = None,
    edit: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Attention with its weights in memory, in the dtype of the query.

    Args:
        query: (B, H, Q, D).
        key: (B, Hkv, K, D), repeated here for the H / Hkv heads that share it.
        value: (B, Hkv, K, Dv), likewise.
        scaling: factor on the dot products.
        mask: (1 or B, 1 or H, 1 or Q, K) bool, True = visible.
        edit_scores: scaled scores (B, H, Q, K) before the mask in, edited scores out.
        edit: softmax rows (B, H, Q, K) in, edited rows out.

    Returns:
        (B, H, Q, Dv), a transposed view of (B, Q, H, Dv) in memory.
    """
    shared = query.shape[1] // key.shape[1]
    if shared > 1:
        key, value = (tensor.repeat_interleave(shared, dim=1) for tensor in (key, value))
    scores = query @ key.mT * scaling
    if edit_scores is not None:
        scores = edit_scores(scores)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    precise = torch.float64 if query.dtype == torch.float64 else torch.float32
    weights = torch.softmax(scores, dim=-1, dtype=precise).to(query.dtype)
    if edit is not None:
        weights = edit(weights)
    return (weights @ value).transpose(1, 2).contiguous().transpose(1, 2)


def amplify_image(scores: torch.Tensor, groups: torch.Tensor, *, alpha: float) -> torch.Tensor:
    """PAI: scores of visual keys rise by `alpha` times their size.

    Args:
        scores: (B, H, Q, K), before the softmax. They are not changed.
        groups: (B, K) ids: 2 and 3 are visual keys.
        alpha: the method's strength.

    Returns:
        (B, H, Q, K), edited scores.
    """
    visual = (groups >= 2)[:, None, None]
    return torch.where(visual, scores + alpha * scores.abs(), scores)


def redistribute_per_head(
    weights: torch.Tensor,
    groups: torch.Tensor,
    *,
    keep: float,
    rho: float,
    minimum_visual_mass: float,
) -> torch.Tensor:
    """VAR, one selected row of one head at a time.

    Args:
        weights: (B, H, Q, K) softmax rows. They are not changed.
        groups: (B, K) ids: 1 text sink, 2 visual sink, 3 other visual key, 0 anything else.
        keep: share of its attention that a sink keeps.
        rho: a row is edited if at least this share of its visual mass is off the sinks,
        minimum_visual_mass: and if it puts at least this mass on the image.

    Returns:
        (B, H, Q, K), edited rows.
    """
    weights = weights.clone()
    for rows, ids in zip(weights, groups, strict=True):
        sinks = ((ids == 1) | (ids == 2)).nonzero().flatten()
        visual_sinks, others = (ids == 2).nonzero().flatten(), (ids == 3).nonzero().flatten()
        if not len(visual_sinks):
            continue
        on_sinks, off_sinks = rows[..., visual_sinks].sum(-1), rows[..., others].sum(-1)
        visual = on_sinks + off_sinks
        chosen = (visual >= minimum_visual_mass) & (on_sinks / visual.clamp_min(1e-6) <= 1 - rho)
        for head, position in (chosen & (off_sinks > 0)).nonzero().tolist():
            row = rows[head, position]
            budget = (1 - keep) * row[sinks].sum()
            row[sinks] *= keep
            row[others] += budget * row[others] / row[others].sum()
    return weights
