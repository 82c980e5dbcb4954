"""Vision-aware head divergence (VHD): how much a head's output depends on the image.

He et al.: "Cracking the Code of Hallucination in LVLMs with Vision-aware Head
Divergence", ACL 2025, arXiv 2412.13949. A head output is softmax(QK^T / sqrt(d)) V before the
output projection, at the row that predicts the next token; heads are query heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vlmfix.base.observer import Observer
from vlmfix.engine.observe import internal_pass
from vlmfix.errors import BadInput
from vlmfix.families import ModelInfo, describe_model, last_logits
from vlmfix.families.surgeon import prompt_without_images, real_tokens
from vlmfix.wrapper import session_of

__all__ = [
    "LastHeads",
    "head_divergence",
    "measure_divergence",
    "prune_outliers",
    "select_heads",
    "total_divergence",
]


def head_divergence(with_image: torch.Tensor, without_image: torch.Tensor) -> torch.Tensor:
    """VHD of every head (eq. 4): the Euclidean distance of two outputs (..., H, D) -> (..., H)."""
    distance: torch.Tensor = torch.linalg.vector_norm(with_image - without_image, dim=-1)
    return distance


def prune_outliers(divergence: torch.Tensor, without_image: torch.Tensor) -> torch.Tensor:
    """Set to 0 the heads that diverge because their outputs are outliers *without* the image.

    Those are the heads of a layer whose VHD and whose text-only activation ||A^T||^2 (eq. 6) both
    exceed mean + standard deviation (unbiased) over the layer's heads.

    Args:
        divergence: (..., H) VHD.
        without_image: (..., H, D) head outputs without the image.
    """
    activation = without_image.square().sum(-1)
    return divergence.masked_fill(_is_large(divergence) & _is_large(activation), 0.0)


def _is_large(values: torch.Tensor) -> torch.Tensor:
    mean, sigma = values.mean(-1, keepdim=True), values.std(-1, keepdim=True)
    return values > mean + sigma


def select_heads(divergence: torch.Tensor) -> torch.Tensor:
    """Select the heads (..., H) above their layer's median (eq. 7): half of them if all differ.

    For an even number of heads the median is the lower one of the middle two. Ties with it are
    not selected, so that fewer than half may be, and none if all are equal.
    """
    return divergence > divergence.median(-1, keepdim=True).values


def total_divergence(divergence: torch.Tensor, top: int = 4) -> torch.Tensor:
    """T-VHD of a token (eq. 5): the sum over layers of the `top` largest VHD of each.

    The paper does not state its `top`; 4 is arbitrary, so compare only values of equal `top`.

    Args:
        divergence: (L, B, H) VHD.
        top: heads per layer, 1 to H.

    Returns:
        (B,).

    Raises:
        BadInput: `top` is out of range.
    """
    heads = divergence.shape[-1]
    if not 1 <= top <= heads:
        raise BadInput(f"top={top} heads per layer: give a number from 1 to {heads}.")
    return divergence.topk(top, dim=-1).values.sum(-1).sum(0)


@dataclass(frozen=True, eq=False)
class LastHeads(Observer):
    """Keeps the head outputs (B, H, D) float32 of the last row of a left-padded prompt."""

    def see_heads(self, layer: int, outputs: torch.Tensor) -> None:
        # A copy: a view of one row would keep the outputs of the whole prompt alive.
        self.seen[layer] = outputs[:, :, -1].to(torch.float32, copy=True)


def measure_divergence(
    model: torch.nn.Module, inputs: Mapping[str, Any], *, prune: bool = False
) -> torch.Tensor:
    """VHD of every head at the row that predicts the first token: two forwards, nothing edited.

    It compares two plain forwards; methods of a wrapped model do not run. The VHR method differs
    from it in deeper layers, because it has already reinforced heads in earlier ones.

    Args:
        model: a supported VLM in eval mode.
        inputs: keyword arguments of its forward for a batch of prompts, padded on the left.
        prune: whether to set outliers to 0, see `prune_outliers`.

    Returns:
        (L, B, H) float32, on the device of `input_ids`. 0 in layers without softmax attention
        (hybrid models), behind the last head of a layer with fewer than H, and for samples without
        an image.

    Raises:
        BadInput: padding on the right, or inputs that `prompt_without_images` cannot cut.
        UnsupportedModel: a model that the hooks cannot reach.
        StateError: a model in training mode.
    """
    info = describe_model(model)
    text_only = prompt_without_images(model, info, inputs)
    ids: torch.Tensor = inputs["input_ids"]
    if not bool(real_tokens(ids, inputs.get("attention_mask"))[:, -1].all()):
        raise BadInput("the prompts are padded on the right; pad them on the left (padding_side).")
    whole = {name: value for name, value in inputs.items() if name != "labels"}
    with_image = _last_heads(model, info, whole)
    without_image = _last_heads(model, info, text_only)
    visual = torch.isin(ids, ids.new_tensor(info.image_token_ids + info.video_token_ids)).any(1)
    result = torch.zeros(info.num_layers, len(ids), info.num_heads, device=ids.device)
    for layer, outputs in with_image.items():
        values = head_divergence(outputs, without_image[layer])
        if prune:
            values = prune_outliers(values, without_image[layer])
        # Without an image both prompts are the same, up to the rounding of another padding.
        result[layer, :, : values.shape[1]] = values.to(ids.device) * visual[:, None]
    return result


def _last_heads(
    model: torch.nn.Module, info: ModelInfo, inputs: Mapping[str, Any]
) -> dict[int, torch.Tensor]:
    """Head outputs (B, H, D) of the last row in every attention layer, in one forward."""
    heads = LastHeads(tuple(info.attention))
    arguments = {**inputs, "use_cache": False, **last_logits(model, 1)}
    with session_of(model) as session:
        internal_pass(session.host, arguments, observers=[heads])
    return heads.seen
