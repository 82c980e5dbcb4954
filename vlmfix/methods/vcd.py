"""VCD: visual contrastive decoding, against the same image under diffusion noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from vlmfix.base.contrast import Branch, ContrastMethod, Prompt, keep_plausible
from vlmfix.base.method import option
from vlmfix.families import ModelInfo
from vlmfix.methods.noise import STEPS, noised, require_pixels

__all__ = ["VisualContrastiveDecoding"]


@dataclass(frozen=True)
class VisualContrastiveDecoding(ContrastMethod):
    """Subtract the logits that the model has for a noised image.

    Leng et al.: "Mitigating Object Hallucinations in Large Vision-Language Models through Visual
    Contrastive Decoding", CVPR 2024, arXiv 2311.16922. What survives the noise is the language's
    prior. With l of the image and l' of the noised one, z = l + alpha (l - l') on tokens that
    have at least `beta` of the best token's probability in l; no other token can be chosen. The
    noise (noise.py) is sampled once per prompt.

    Paper and code: beta is 0.1 in the paper and by the code's options, 0.2 in the script of its
    POPE runs; 0.1 is the default. Noise is added to normalised pixels, as in the code. The code
    changes only sampling, so that its greedy and beam runs are plain; here every way of decoding
    is contrasted. docs/methods/vcd.md has an independent rerun of the paper's numbers.
    """

    alpha: float = option(
        1.0, "strength of the contrast; 0: only rule out implausible tokens", 0.0, 10.0
    )
    beta: float = option(
        0.1, "rule out tokens below this share of the best token's probability; 0: none", 0.0, 1.0
    )
    noise_step: int = option(
        500, f"step of the noise schedule, 0 (hardly any noise) to {STEPS - 1}", 0, STEPS - 1
    )
    seed: int | None = option(
        None, "seed of the noise; default: torch.initial_seed()", 0, 2**63, high_open=True
    )

    name: ClassVar[str] = "vcd"

    def prepared(self, info: ModelInfo, model: torch.nn.Module) -> VisualContrastiveDecoding:
        if self.streams():
            require_pixels(self.name, info, model)
        return self

    def streams(self) -> int:
        return int(self.alpha > 0)

    def neutral(self) -> bool:
        return self.alpha == 0 and self.beta == 0

    def branches(self, prompt: Prompt) -> Sequence[Branch]:
        return (Branch(vision=noised(prompt, self.noise_step, self.seed)),)

    def contrast(
        self, base: torch.Tensor, branches: Sequence[torch.Tensor], token: torch.Tensor
    ) -> torch.Tensor:
        if not branches:
            return keep_plausible(base, base, self.beta)
        return keep_plausible(base + self.alpha * (base - branches[0]), base, self.beta)
