"""PAI, guidance part: weigh the image against no image, with a constant weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from vlmfix.base.contrast import Branch, ContrastMethod, Prompt, keep_plausible
from vlmfix.base.method import option

__all__ = ["ImageGuidance"]


@dataclass(frozen=True)
class ImageGuidance(ContrastMethod):
    """Move log-probabilities away from those that the same prompt has without its image.

    Liu, Zheng, Chen: "Paying More Attention to Image: A Training-Free Method for Alleviating
    Hallucination in LVLMs", ECCV 2024, arXiv 2407.21771. This is the second half of PAI, a
    guidance gamma (c - u) + u of log-probabilities c with and u without the image; the attention
    half is `pai`, and "pai+pai_guidance" is the whole. The branch without the image is never
    edited, as in the authors' code.

    Paper and code: the code's loader and its examples have gamma 1.1, its command line 2; 1.1 is
    the default. At gamma = 1 the code returns plain scores, without ruling out any token, and so
    does this. The code is a logits processor, which runs after penalties and does not reorder its
    cache in a beam search; here the contrast comes first and beams are followed. With guidance on,
    the code leaves the attention of the last prompt row unedited; here it is edited.
    """

    gamma: float = option(1.1, "strength of the guidance; 1 changes nothing", 1.0, 100.0)
    beta: float = option(
        0.1, "rule out tokens below this share of the best token's probability; 0: none", 0.0, 1.0
    )

    name: ClassVar[str] = "pai_guidance"

    def streams(self) -> int:
        return 0 if self.neutral() else 1

    def neutral(self) -> bool:
        return self.gamma == 1

    def branches(self, prompt: Prompt) -> Sequence[Branch]:
        return [Branch(image=False)]

    def contrast(
        self, base: torch.Tensor, branches: Sequence[torch.Tensor], token: torch.Tensor
    ) -> torch.Tensor:
        plain = base.log_softmax(-1)
        combined = plain + (self.gamma - 1) * (plain - branches[0].log_softmax(-1))
        return keep_plausible(combined, base, self.beta)
