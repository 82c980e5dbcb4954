"""Head Pursuit: inhibit or enhance the heads that write a concept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from vlmfix.analysis.head_list import head_list, head_names, heads_by_layer
from vlmfix.base.attention import AttentionMethod, Keys, Plan
from vlmfix.base.method import option
from vlmfix.errors import CalibrationNeeded
from vlmfix.families import ModelInfo

__all__ = ["HeadPursuit", "static_factors"]


def static_factors(heads: Sequence[int], count: int, alpha: float) -> torch.Tensor:
    """(H,) float32 factors on the `count` heads of a layer: alpha for the listed ones, else 1."""
    factors = torch.ones(count)
    factors[list(heads)] = alpha
    return factors


@dataclass(frozen=True)
class HeadPursuit(AttentionMethod):
    """Multiply the outputs of listed heads by alpha, in every row of prompt and answer.

    "Head Pursuit: Probing Attention Specialization in Multimodal Transformers", NeurIPS 2025,
    arXiv 2510.21518. Heads that write a concept (colours, numbers, sentiment) are found offline,
    for any list of words, by `vlmfix.analysis.pursuit.rank_heads`; alpha = -1 turns their words
    away, 5 brings them up. The paper controls concepts with it and does not measure hallucination.

    The edit is static: it does not depend on the image, so prompts without one are edited too.
    The paper's text leaves open whether activations are centred before explained variance is taken
    (here they are not; a port by others centres them) and how correlations are summed over samples;
    see `vlmfix.analysis.pursuit.pursue`. The authors' code was not to be had.
    """

    heads: tuple[str, ...] | None = option(
        None, "heads as layer.head, e.g. 16.29/26.9, from vlmfix.analysis.pursuit.rank_heads"
    )
    alpha: float = option(
        -1.0,
        "factor on the heads' outputs: -1 inhibits, 5 enhances, 1 changes nothing",
        -100.0,
        100.0,
    )

    name: ClassVar[str] = "head_pursuit"
    head_factors: ClassVar[bool] = True

    def prepared(self, info: ModelInfo, model: torch.nn.Module) -> HeadPursuit:
        if self.heads is None:
            raise CalibrationNeeded(
                "head_pursuit needs the heads of a concept, which depend on the model and on the "
                "words. Rank them with "
                "vlmfix.analysis.pursuit.rank_heads(model, processor, inputs, words) "
                "and pass the first ones as heads=(...), such as ('16.29', '26.9')."
            )
        return replace(self, heads=head_names(head_list(self.heads, info, self.name)))

    def idle(self) -> str | None:
        return None if self.heads else "its list of heads is empty"

    def layers(self, info: ModelInfo) -> Sequence[int]:
        return sorted(heads_by_layer(self.heads))

    def plan(self, keys: Keys) -> Plan | None:
        if self.alpha == 1:
            return None
        batch = len(keys.kinds)
        factors = static_factors(heads_by_layer(self.heads)[keys.layer], keys.num_heads, self.alpha)
        heads = factors.to(keys.kinds.device).expand(batch, -1)
        return Plan({}, [True] * batch, heads=heads)
