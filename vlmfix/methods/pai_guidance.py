"""PAI, guidance part: weigh the image against no image, with one weight throughout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from vlmfix.base.contrast import Branch, ContrastMethod, Prompt, keep_plausible
from vlmfix.base.method import check_range

__all__ = ["ImageGuidance"]


@dataclass(frozen=True)
class ImageGuidance(ContrastMethod):
    """Move log-probabilities away from those that the same prompt has without its image.

    Liu, Zheng, Chen: "Paying More Attention to Image: A Training-Free Method for Alleviating
    Hallucination in LVLMs", ECCV 2024, arXiv 2407.21771. This is the second half of PAI, a
    guidance gamma (c - u) + u of log-probabilities c with and u without the image; the attention
    half is `pai`, and "pai+pai_guidance" is the whole. The image-free stream is never edited, as
    in the authors' code.

    Paper and code: the code's loader and its examples have gamma 1.1, its command line 2; 1.1 is
    the default. At gamma = 1 the code returns plain scores, without ruling out any token, and so
    does this. The code is a logits processor, hence runs after penalties, and does not reorder
    its cache in a beam search; here the contrast comes first and beams are followed. With guidance
    on, the code leaves the last prompt row without the attention boost; here it has it.
    """

    gamma: float = field(
        default=1.1, metadata={"help": "strength of the guidance; 1 changes nothing"}
    )
    beta: float = field(
        default=0.1, metadata={"help": "least share of the best token's probability; 0: off"}
    )

    name: ClassVar[str] = "pai_guidance"

    def __post_init__(self) -> None:
        check_range(self, "gamma", 1.0, 100.0)
        check_range(self, "beta", 0.0, 1.0)

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
