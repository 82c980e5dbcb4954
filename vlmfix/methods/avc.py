"""AVC (AvisC): push the answer away from what the image's blind tokens alone would say."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from vlmfix.base.contrast import Branch, ContrastMethod, Prompt, keep_plausible, noise_generator
from vlmfix.base.method import Preset, option
from vlmfix.families import ModelInfo
from vlmfix.methods.structures import LLAVA_7B

__all__ = ["AttentionalVisionCalibration", "choose_layers", "not_blind"]

Scheme = Literal["zeros", "ones", "noise", "drop"]


def choose_layers(attention: torch.Tensor, gamma: float) -> torch.Tensor:
    """The layers that attend to the image most: (layers, N) -> (k,) indices, most first.

    With P_l the share of layer l in all attention to the image, k is the least number of layers
    whose shares, the largest first, sum to at least gamma.
    """
    ranked, order = attention.sum(1).sort(descending=True, stable=True)
    share = (ranked / ranked.sum()).cumsum(0)
    return order[: 1 + int((share < gamma).sum())]


def not_blind(attention: torch.Tensor, gamma: float, deviations: float) -> torch.Tensor:
    """Mark the visual tokens of one prompt that the branch does not see.

    Args:
        attention: (layers, N), mean over heads, of the last prompt token to N visual tokens.
        gamma: see `choose_layers`.
        deviations: lambda of the paper.

    Returns:
        (N,) bool: tokens whose attention, mean over the chosen layers, lies below its own mean
        plus `deviations` of its (unbiased) standard deviations. None, if all get the same.
    """
    mean = attention[choose_layers(attention, gamma)].mean(0)
    if len(mean) < 2 or mean.min() == mean.max():
        # No token stands out. Rounding of the mean must not decide that all lie below it.
        return torch.zeros_like(mean, dtype=torch.bool)
    return mean < mean.mean() + deviations * mean.std()


@dataclass(frozen=True)
class AttentionalVisionCalibration(ContrastMethod):
    """Contrast the prompt with one in which only its blind visual tokens are left.

    Woo, Kim, Jang, Choi, Kim: "Don't Miss the Forest for the Trees: Attentional Vision Calibration
    for Large Vision Language Models", arXiv 2405.17820 (AVC in its first version, AvisC later).
    A few visual tokens, the blind ones, draw the attention of the last prompt token regardless of
    the question. In the branch the embeddings of all other visual tokens are overwritten; logits
    become l + alpha (l - l_blind), and tokens below `beta` of the best are ruled out. Blind tokens
    are found once, from the attention of the prompt's own forward.

    Paper and code: the code takes one threshold over the whole batch and fixed positions of the
    image; here each prompt has its own, over the visual tokens of all its images and videos
    together. It edits `sample` only; here every way of decoding. An unknown `scheme` means zeros
    there and is refused here. alpha is 2.5 in the authors' scripts for LLaVA-1.5 (1 in that for
    POPE); for other models none is published, and 1 is the default. `scheme="drop"` is ours: the
    tokens that are not blind are hidden from all others, while overwritten ones still draw
    attention.
    """

    alpha: float | None = option(
        None,
        "strength of the contrast; default: preset, else 1; 0: only rule out implausible tokens",
        0.0,
        100.0,
    )
    beta: float = option(
        0.1, "rule out tokens below this share of the best token's probability; 0: none", 0.0, 1.0
    )
    gamma: float = option(
        0.5, "share of all attention to the image that the layers read must hold", 0.0, 1.0
    )
    deviations: float = option(
        1.0,
        "lambda: blind tokens get attention this many standard deviations above the mean",
        -1000.0,
        1000.0,
    )
    scheme: Scheme = option(
        "zeros",
        "what visual tokens that are not blind become: zeros, ones, noise, or drop (hidden; ours)",
    )
    seed: int | None = option(
        None, "seed of the noise; default: torch.initial_seed()", 0, 2**63, high_open=True
    )

    name: ClassVar[str] = "avc"
    reads_visual_tokens: ClassVar[bool] = True
    PRESETS: ClassVar[tuple[Preset, ...]] = (
        Preset(LLAVA_7B, {"alpha": 2.5}, "authors' scripts for AMBER and LLaVA-Bench"),
    )

    def prepared(self, info: ModelInfo, model: torch.nn.Module) -> AttentionalVisionCalibration:
        return self.with_defaults(info, alpha=1.0)

    def streams(self) -> int:
        return 0 if self.alpha == 0 else 1

    def neutral(self) -> bool:
        return self.alpha == 0 and self.beta == 0

    def watched(self, info: ModelInfo) -> Sequence[int]:
        return tuple(info.attention)

    def branches(self, prompt: Prompt) -> Sequence[Branch]:
        attention = torch.stack([prompt.seen[layer] for layer in sorted(prompt.seen)], dim=1)
        masked = torch.zeros_like(prompt.visual)
        for row, visual in enumerate(prompt.visual):
            # Columns first: sums over padding would depend on the rest of the batch.
            columns = attention[row][:, visual]
            masked[row, visual] = not_blind(columns, self.gamma, self.deviations)
        if bool(prompt.visual.any()) and not bool(masked.any()):
            warnings.warn(
                "avc finds all visual tokens of these prompts blind, so its branch sees what they "
                "see and changes nothing. Give larger images, or larger deviations.",
                stacklevel=2,
            )
        if self.scheme == "drop":
            return [Branch(hidden=masked)]
        if self.scheme == "noise":
            return [Branch(filled=masked, fill=self._noise(prompt))]
        return [Branch(filled=masked, fill=1.0 if self.scheme == "ones" else 0.0)]

    def contrast(
        self, base: torch.Tensor, branches: Sequence[torch.Tensor], token: torch.Tensor
    ) -> torch.Tensor:
        if not branches:
            return keep_plausible(base, base, self.beta)
        alpha = 1.0 if self.alpha is None else self.alpha
        return keep_plausible(base + alpha * (base - branches[0]), base, self.beta)

    def _noise(self, prompt: Prompt) -> torch.Tensor:
        """(B, L, D): N(0, 1) at visual tokens, in each row the same as if it were alone."""
        noise = torch.zeros(*prompt.ids.shape, prompt.info.hidden_size)
        for row, visual in enumerate(prompt.visual.cpu()):
            generator = noise_generator(self.seed)
            count = int(visual.sum())
            noise[row, visual] = torch.randn(count, noise.shape[-1], generator=generator)
        return noise.to(prompt.ids.device)
