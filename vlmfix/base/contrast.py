"""The base class of contrastive methods: extra streams of the same answer, and how to combine them.

A contrastive method decodes each prompt several times at once: as it is, and in branches that see
something else (noise, less of the image, no image). Every branch writes the same tokens; what it
would have written next is weighed against what the prompt as it is would have. The method says
what its branches see and how logits combine, both on plain tensors; engine/contrast.py runs them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from vlmfix.base.method import Method, StageName
from vlmfix.families import ModelInfo

__all__ = ["Branch", "ContrastMethod", "Prompt", "keep_plausible", "noise_generator"]

#: Logits between the least plausible token and the likeliest implausible one: e^-1e4 is 0 in
#: float32 and float64, so that none of the latter is ever sampled.
_GAP = 1e4


@dataclass(frozen=True)
class Prompt:
    """The prompts of a batch, one row each: beams and returned sequences are not among them.

    Attributes:
        info: structure of the model.
        ids: (B, L) token ids, padded on the left.
        real: (B, L) bool, no padding.
        visual: (B, L) bool, image and video tokens.
        vision: what the processor made of the images, by name (pixel_values, image_grid_thw, ...);
            empty where the caller passed features that were encoded before.
        seen: {layer: (B, L) float32} for the layers of `ContrastMethod.watched`: attention of the
            last prompt token to every token of the prompt, mean over heads, as the model used it.
        placeholders: visual tokens that the images of each prompt made, of which `visual` has fewer
            where a pruning method cut the prompts; None: they were not cut.
    """

    info: ModelInfo
    ids: torch.Tensor
    real: torch.Tensor
    visual: torch.Tensor
    vision: Mapping[str, Any]
    seen: Mapping[int, torch.Tensor] = field(default_factory=dict)
    placeholders: Sequence[int] | None = None


@dataclass(frozen=True)
class Branch:
    """What one branch sees in place of the prompts. Rows without an image are not combined.

    Attributes:
        image: False: the prompts with every visual token deleted; nothing else may be said then.
        vision: in place of `Prompt.vision`, of the same shapes.
        hidden: (B, L) bool, tokens that no other token attends to; all positions stay.
        filled: (B, L) bool, visual tokens whose embeddings, and features that enter deeper layers
            (DeepStack), are replaced: the embeddings by `fill`, the features by 0.
        fill: a scalar, or (B, L, D) in float32.
    """

    image: bool = True
    vision: Mapping[str, Any] | None = None
    hidden: torch.Tensor | None = None
    filled: torch.Tensor | None = None
    fill: torch.Tensor | float = 0.0


@dataclass(frozen=True)
class ContrastMethod(Method):
    """A method that combines the logits of the prompts with those of branches."""

    stage: ClassVar[StageName] = "logits"
    reads_visual_tokens: ClassVar[bool] = False

    def streams(self) -> int:
        """How many branches these settings weigh; 0 runs none, and `contrast` gets none."""
        raise NotImplementedError

    def watched(self, info: ModelInfo) -> Sequence[int]:
        """The decoder layers whose attention `branches` wants in `Prompt.seen`."""
        return ()

    def branches(self, prompt: Prompt) -> Sequence[Branch]:
        """What the branches see; asked once per prompt, if `streams` is not 0.

        A row must not depend on the other rows of the batch.
        """
        raise NotImplementedError

    def contrast(
        self, base: torch.Tensor, branches: Sequence[torch.Tensor], token: torch.Tensor
    ) -> torch.Tensor:
        """Combine the logits of some rows.

        Args:
            base: (B, R, V) float32 logits of the prompts as they are.
            branches: the same of every branch.
            token: (R,) int64, the tokens to be chosen, counted from 1 at the first of the answer.

        Returns:
            (B, R, V) float32.
        """
        raise NotImplementedError


def noise_generator(seed: int | None) -> torch.Generator:
    """A generator on the CPU for the noise of a branch; None: `torch.initial_seed()`.

    The seed is moved aside: after `torch.manual_seed(seed)` the tokens of a sampled answer would
    else be drawn from the very numbers that the noise is made of.
    """
    seed = torch.initial_seed() if seed is None else seed
    return torch.Generator().manual_seed((seed + 0x5DEECE66D) % 2**63)


def keep_plausible(combined: torch.Tensor, base: torch.Tensor, beta: float) -> torch.Tensor:
    """Rule out tokens that the base finds implausible: below beta times its best token.

    Li et al.: "Contrastive Decoding", ACL 2023, arXiv 2210.15097; all contrastive methods here use
    it. The papers set such tokens to minus infinity. Here they go to 1e4 below the least plausible
    one, in their own order: their probability is 0 all the same, but where a logits processor
    forbids every plausible token (min_new_tokens does it to the end token) there is still one to
    take, and a beam search always has candidates.

    Args:
        combined: (..., V) logits after the contrast.
        base: (..., V) logits before it.
        beta: share of the best token's probability, in [0, 1]; 0 keeps every token.

    Returns:
        (..., V), `combined` on plausible tokens, minus infinity where the base has it.
    """
    # A token that the model itself forbids is so in every stream, and -inf - (-inf) is no number.
    combined = torch.where(base == -torch.inf, base, combined)
    if not beta:
        return combined
    plausible = base >= base.amax(-1, keepdim=True) + math.log(beta)
    infinity = torch.full_like(combined, torch.inf)
    least = torch.where(plausible, combined, infinity).amin(-1, keepdim=True)
    best = torch.where(plausible, -infinity, combined).amax(-1, keepdim=True)
    lowered = combined - best.clamp(min=torch.finfo(combined.dtype).min) + least - _GAP
    return torch.where(plausible, combined, lowered)
