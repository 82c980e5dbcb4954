"""VCD: visual contrastive decoding, against the same image under diffusion noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from vlmfix.base.contrast import Branch, ContrastMethod, Prompt, keep_plausible
from vlmfix.base.method import check_range
from vlmfix.methods.noise import STEPS, noised

__all__ = ["VisualContrastiveDecoding"]


@dataclass(frozen=True)
class VisualContrastiveDecoding(ContrastMethod):
    """Take from the logits what the model would say of the noised image, too.

    Leng et al.: "Mitigating Object Hallucinations in Large Vision-Language Models through Visual
    Contrastive Decoding", CVPR 2024, arXiv 2311.16922. What survives the noise is the language's
    prior. With l of the image and l' of the noised one, z = l + alpha (l - l') on tokens that
    have at least `beta` of the best token's probability in l; no other token can be chosen. The
    noise (diffusion.py) is drawn once per prompt.

    Paper and code: beta is 0.1 in the paper and by the code's options, 0.2 in the script of its
    POPE runs; 0.1 is the default. Noise goes on normalised pixels, as in the code. The code
    changes sampling alone, so that its greedy and beam runs are plain; here every way of decoding
    is contrasted. Read the page on what an independent rerun of the paper's numbers gave.
    """

    alpha: float = field(
        default=1.0, metadata={"help": "strength of the contrast; 0 only rules out tokens"}
    )
    beta: float = field(
        default=0.1, metadata={"help": "least share of the best token's probability; 0: off"}
    )
    noise_step: int = field(
        default=500, metadata={"help": f"how far the image is noised, 0 to {STEPS - 1}"}
    )
    seed: int | None = field(
        default=None, metadata={"help": "of the noise; default: torch.initial_seed()"}
    )

    name: ClassVar[str] = "vcd"

    def __post_init__(self) -> None:
        check_range(self, "alpha", 0.0, 10.0)
        check_range(self, "beta", 0.0, 1.0)
        check_range(self, "noise_step", 0, STEPS - 1)
        check_range(self, "seed", 0, 2**63, high_open=True)

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
