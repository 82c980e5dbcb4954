"""The base class of methods that edit hidden states, and the two edits that there are.

A method says what is done to the rows of a layer (a vector is added, or a subspace projected out)
and, where it gates, how strongly a row gets it; engine/hidden.py decides how to run it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from vlmfix.base.method import Method, StageName
from vlmfix.base.observer import Rows
from vlmfix.families import ModelInfo

__all__ = ["Direction", "HiddenMethod", "Site", "add_vector", "project_out"]

#: Where a hidden state is edited: "layer" = the residual stream behind a decoder layer; "mlp" =
#: what the layer's MLP adds to it, behind the norm that some families put there.
Site = Literal["layer", "mlp"]


@dataclass(frozen=True)
class Direction:
    """What is done to the rows of one layer, for the prompts of one batch.

    Attributes:
        operation: "add" a vector, or "project" a subspace out.
        vectors: float32. To add: (1, D) or (B, D). To project out: (k, D), orthonormal rows.
        strength: (B,) float32, a factor per prompt; 0 leaves a prompt alone.
        keep_norm: whether a row gets its length back.
        relative: whether what is added is measured in lengths of the row that it is added to.
    """

    operation: Literal["add", "project"]
    vectors: torch.Tensor
    strength: torch.Tensor
    keep_norm: bool = False
    relative: bool = False

    def apply(self, hidden: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
        """Hidden states (B, R, D) -> edited ones, in float32.

        Args:
            hidden: rows of B prompts.
            gate: (B, R) further factors; None: 1.
        """
        factor = self.strength[:, None] if gate is None else self.strength[:, None] * gate
        factor = factor[..., None].expand(*hidden.shape[:2], 1)
        if self.operation == "add":
            edited = add_vector(hidden, self.vectors[:, None], factor, relative=self.relative)
        else:
            edited = project_out(hidden, self.vectors, factor)
        if self.keep_norm:
            edited = _with_norm_of(hidden, edited)
        return edited


def add_vector(
    hidden: torch.Tensor, vector: torch.Tensor, factor: torch.Tensor, *, relative: bool
) -> torch.Tensor:
    """h + c v, or h + c |h| v / |v| where it is relative: (..., D) -> (..., D) float32."""
    hidden, vector = hidden.float(), vector.float()
    if relative:
        vector = torch.nn.functional.normalize(vector, dim=-1)
        vector = vector * torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
    return hidden + factor * vector


def project_out(hidden: torch.Tensor, basis: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """h - c B^T B h for orthonormal rows B (k, D): (..., D) -> (..., D) float32."""
    hidden, basis = hidden.float(), basis.float()
    return hidden - factor * ((hidden @ basis.mT) @ basis)


def _with_norm_of(hidden: torch.Tensor, edited: torch.Tensor) -> torch.Tensor:
    """The edited rows at the length that the rows had; a row of zeros stays one."""
    length: torch.Tensor = torch.linalg.vector_norm(hidden.float(), dim=-1, keepdim=True)
    return torch.nn.functional.normalize(edited, dim=-1) * length


@dataclass(frozen=True)
class HiddenMethod(Method):
    """A method that edits the hidden states of some decoder layers.

    Rows of branches of a contrastive method are not edited, and no padding is.
    """

    stage: ClassVar[StageName] = "hidden"
    reads_visual_tokens: ClassVar[bool] = False

    def layers(self, info: ModelInfo) -> Sequence[int]:
        """Indices of the decoder layers that this method edits, 0-based."""
        raise NotImplementedError

    def edited_site(self) -> Site:
        """Where in these layers."""
        return "layer"

    def edited_rows(self) -> Rows:
        """Which rows."""
        return "predicting"

    def direction(self, layer: int, has_image: torch.Tensor) -> Direction | None:
        """What is done to one layer of the prompts of a batch; None: nothing.

        Args:
            layer: one of `layers`.
            has_image: (B,) bool, the prompts with visual tokens. B counts beams and returned
                sequences as rows. Where the caller runs a prompt in several forwards without
                generate(), those with visual tokens so far.
        """
        raise NotImplementedError

    def gate(self, hidden: torch.Tensor, direction: Direction) -> torch.Tensor:
        """Factors (B, R) for rows (B, R, D), on top of `Direction.strength`.

        Tensor operations only: a compiled decode step asks inside its graph.
        """
        raise NotImplementedError

    @property
    def gates(self) -> bool:
        """Whether this method has a gate of its own."""
        return type(self).gate is not HiddenMethod.gate
