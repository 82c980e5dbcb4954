"""RBD (experimental): away from a noised image, towards the image's significant tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from vlmfix.base.contrast import Branch, ContrastMethod, Prompt, keep_plausible
from vlmfix.base.method import option
from vlmfix.families import ModelInfo
from vlmfix.methods.noise import STEPS, noised, require_pixels

__all__ = ["ReBalancingContrastiveDecoding", "significant"]


def significant(attention: torch.Tensor, mu: float) -> torch.Tensor:
    """Mark the visual tokens of one prompt that draw more attention than usual.

    Args:
        attention: (N,) attention of the last prompt token to N visual tokens.
        mu: least number of (population) standard deviations above the mean.

    Returns:
        (N,) bool, at least one of them, if N > 0.
    """
    # In float64 the mean of equal numbers is that number, so that rounding never splits a tie.
    attention = attention.double()
    if not len(attention):
        return torch.zeros_like(attention, dtype=torch.bool)
    chosen = attention >= attention.mean() + mu * attention.std(correction=0)
    chosen[attention.argmax()] = True
    return chosen


@dataclass(frozen=True)
class ReBalancingContrastiveDecoding(ContrastMethod):
    """Subtract a branch that sees noise, add one that sees only the image's significant tokens.

    Experimental: rebuilt from the abstract of Liang et al.: "Mitigating Hallucination in
    Visual-Language Models via Re-Balancing Contrastive Decoding", PRCV 2024, arXiv 2409.06485.
    Its method section, constants and tables were not available, and no code is public. The textual
    branch (noise on the image, against the bias of text) and the visual one (a selection of
    significant tokens) are the paper's, the rest is ours. Do not report its numbers as the
    paper's.

    With l the logits of the prompt, t those of the textual and v those of the visual branch,
    z = l + a_t (l - t) + a_v (v - l), on tokens with at least `beta` of the best token's
    probability in l. The noise is VCD's, so that a_v = 0 is `vcd` with alpha = a_t. Significant
    are visual tokens whose attention from the last prompt token (mean over heads and layers) is
    at least mean + mu standard deviations over the visual tokens of the prompt; the visual branch
    hides the others from all tokens. The set is found once per prompt. It holds what `avc` calls
    blind tokens and subtracts, and attention sinks of the image are not taken out of it.
    """

    a_t: float = option(0.5, "weight of the textual branch; 0: it does not run", 0.0, 10.0)
    a_v: float = option(0.5, "weight of the visual branch; 0: it does not run", 0.0, 10.0)
    beta: float = option(
        0.1, "rule out tokens below this share of the best token's probability; 0: none", 0.0, 1.0
    )
    noise_step: int = option(
        500, f"step of the noise schedule, 0 (hardly any noise) to {STEPS - 1}", 0, STEPS - 1
    )
    mu: float = option(
        0.0,
        "significant tokens get attention at least this many standard deviations above the mean",
        -1000.0,
        1000.0,
    )
    seed: int | None = option(
        None, "seed of the noise; default: torch.initial_seed()", 0, 2**63, high_open=True
    )

    name: ClassVar[str] = "rbd"
    reads_visual_tokens: ClassVar[bool] = True

    def prepared(self, info: ModelInfo, model: torch.nn.Module) -> ReBalancingContrastiveDecoding:
        if self.a_t:
            require_pixels(self.name, info, model)
        return self

    def streams(self) -> int:
        return int(self.a_t > 0) + int(self.a_v > 0)

    def neutral(self) -> bool:
        return self.a_t == 0 and self.a_v == 0 and self.beta == 0

    def watched(self, info: ModelInfo) -> Sequence[int]:
        return tuple(info.attention) if self.a_v else ()

    def branches(self, prompt: Prompt) -> Sequence[Branch]:
        branches = []
        if self.a_t:
            branches.append(Branch(vision=noised(prompt, self.noise_step, self.seed)))
        if self.a_v:
            branches.append(Branch(hidden=self._insignificant(prompt)))
        return branches

    def _insignificant(self, prompt: Prompt) -> torch.Tensor:
        """(B, L) bool: visual tokens that are not significant."""
        attention = torch.stack([prompt.seen[layer] for layer in sorted(prompt.seen)]).mean(0)
        hidden = torch.zeros_like(prompt.visual)
        for row, visual in enumerate(prompt.visual):
            hidden[row, visual] = ~significant(attention[row, visual], self.mu)
        return hidden

    def contrast(
        self, base: torch.Tensor, branches: Sequence[torch.Tensor], token: torch.Tensor
    ) -> torch.Tensor:
        left = list(branches)
        combined = base
        if self.a_t:
            combined = combined + self.a_t * (base - left.pop(0))
        if self.a_v:
            combined = combined + self.a_v * (left.pop(0) - base)
        return keep_plausible(combined, base, self.beta)
