"""The base class of methods that edit attention, and what the engine hands to them.

A method states its maths on plain tensors; engine/attention.py decides how to run it. A method
overrides only the functions it needs, and the engine runs only what was overridden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from vlmfix.base.method import Method, StageName
from vlmfix.base.observer import Observer, Rows
from vlmfix.families import ModelInfo
from vlmfix.families.kinds import IMAGE, VIDEO
from vlmfix.families.tower import Received, Tower
from vlmfix.kernels.reference import FusedEdit

__all__ = ["AttentionMethod", "FusedEdit", "Keys", "Plan", "ProbePass", "lift_scores"]


@dataclass(frozen=True)
class Keys:
    """What the keys of one layer are. B counts beams and returned sequences as rows.

    Attributes:
        layer: index of the decoder layer.
        num_heads: its query heads.
        kinds: (B, K) uint8 of families/kinds.py.
        flags: (B, K) bool, what `flag_tokens` noted at this layer; None without it.
        question: (B, K) bool, text of the user's question: after the last visual token. Where the
            processor is known (`vlmfix.generate`): see `question.find_question`.
        content: (B, K) bool, tokens of the question that carry content; all of it where the
            processor is not known.
        seen: what the observer of `probe_pass` kept, by layer.
        image_values: (B, K) float32, what `image_values` gave to each visual token, 0 elsewhere.
    """

    layer: int
    num_heads: int
    kinds: torch.Tensor
    flags: torch.Tensor | None
    question: torch.Tensor
    content: torch.Tensor
    seen: Mapping[int, torch.Tensor] = field(default_factory=dict)
    image_values: torch.Tensor | None = None

    @property
    def visual(self) -> torch.Tensor:
        """(B, K) bool: image and video tokens."""
        return (self.kinds == IMAGE) | (self.kinds == VIDEO)


@dataclass(frozen=True)
class Plan:
    """What a method prepared for one layer of one prompt.

    Attributes:
        tensors: by name, each (B, K, ...), sliced by the engine to the keys that a call sees. The
            functions of the method get them as keyword arguments of these names.
        samples: for each row of the batch, whether anything of it can be edited here. Where no
            row can, the model's own attention runs; a compiled step runs the edit all the same,
            and it must then change nothing.
        notes: counts per sample, shown by `last_call`, e.g. {"visual_sinks": [3, 0]}.
        constants: tensors without a key axis, by name, handed over as they are.
        heads: (B, H) float32 factors on the head outputs of every row, where they are known
            without looking at the outputs; `head_scale` is then not asked.
        fused: the same row edit for the fused kernel; `groups` and `log_weight` cover all keys.
    """

    tensors: Mapping[str, torch.Tensor]
    samples: list[bool]
    notes: dict[str, list[int]] = field(default_factory=dict)
    constants: Mapping[str, torch.Tensor] = field(default_factory=dict)
    heads: torch.Tensor | None = None
    fused: FusedEdit | None = None


@dataclass(frozen=True)
class ProbePass:
    """An extra forward before the prompt's own, in which an observer looks and nothing is edited.

    `prompt` is "whole" (the same prompt again) or "text" (the visual tokens deleted).
    """

    prompt: Literal["whole", "text"]
    observer: Observer


@dataclass(frozen=True)
class AttentionMethod(Method):
    """A method that edits the attention of some decoder layers.

    `rows` says which query rows are edited (see `observer.Rows`).
    """

    stage: ClassVar[StageName] = "attention"
    rows: ClassVar[Rows] = "predicting"
    #: "prompt": head_scale is asked once, at the last prompt row, and holds for all rows;
    #: "step": it is asked for every row that predicts, and holds for that row.
    head_scale_from: ClassVar[Literal["prompt", "step"]] = "prompt"

    #: Whether the plans read Keys.question or Keys.content.
    reads_question: ClassVar[bool] = False
    #: Whether the plans carry factors on head outputs (Plan.heads).
    head_factors: ClassVar[bool] = False
    #: Whether the plans carry the same row edit for the fused kernel (Plan.fused).
    has_fused_form: ClassVar[bool] = False

    def layers(self, info: ModelInfo) -> Sequence[int]:
        """Indices of the decoder layers that this method edits, 0-based."""
        raise NotImplementedError

    def flag_tokens(self, hidden: torch.Tensor) -> torch.Tensor:
        """Note prompt tokens at a layer's input: hidden (B, Q, D) -> (B, Q) bool."""
        raise NotImplementedError

    def probe_pass(self, info: ModelInfo) -> ProbePass | None:
        """The extra forward that the plans need, with an observer made for this one prompt."""
        return None

    def encoder_layers(self, tower: Tower) -> tuple[int, ...]:
        """Layers of the vision tower whose received attention `image_values` wants."""
        return ()

    def image_values(self, received: Sequence[Received]) -> torch.Tensor:
        """One value per visual token of one tile (most families have one tile per image).

        Args:
            received: what the tile's N visual tokens receive, per layer of `encoder_layers`.

        Returns:
            (N,); the engine puts it where the tokens are in the prompt (`Keys.image_values`).
        """
        raise NotImplementedError

    def plan(self, keys: Keys) -> Plan | None:
        """Prepare one layer of one prompt; None: these settings never edit this layer."""
        raise NotImplementedError

    # The four functions below get the plan's tensors by their names in it, as keyword arguments.

    def edit_scores(self, scores: torch.Tensor, *args: Any, **plan: Any) -> torch.Tensor:
        """Scaled scores (B, H, R, K) float32, before the mask -> edited scores."""
        raise NotImplementedError

    def edit_weights(
        self, weights: torch.Tensor, *args: Any, **plan: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Softmax rows (B, H, R, K) -> edited rows, and (B, H, R) bool: which were changed."""
        raise NotImplementedError

    def score_scale(self, scores: torch.Tensor, *args: Any, **plan: Any) -> torch.Tensor:
        """Scaled scores (B, H, R, K), unedited -> factors (B, H, R) on the head outputs.

        Scores are 0 where a row does not see a key.
        """
        raise NotImplementedError

    def head_scale(self, outputs: torch.Tensor, *args: Any, **plan: Any) -> torch.Tensor:
        """Head outputs (B, H, R, D) before o_proj -> factors (B, H, R); see head_scale_from."""
        raise NotImplementedError

    def knocks_out(self) -> bool:
        """Whether head_scale also wants the outputs that the same rows have without visual keys.

        They come right after `outputs`, in the same shape.
        """
        return False

    def edits_rows(self) -> bool:
        """Whether this method changes attention rows (and not only scales heads or looks)."""
        return any(map(self.overrides, ("edit_scores", "edit_weights", "score_scale")))

    def scales_heads(self) -> bool:
        """Whether this method multiplies head outputs by factors."""
        return any(map(self.overrides, ("head_scale", "score_scale"))) or self.head_factors

    def overrides(self, function: str) -> bool:
        """Whether this method has a function of its own of that name."""
        return getattr(type(self), function) is not getattr(AttentionMethod, function)


def lift_scores(scores: torch.Tensor, lift: torch.Tensor) -> torch.Tensor:
    """s' = s + lift |s|: scores (B, H, R, K), lift (B, K), 0 where a key is not lifted (PAI, IMBA).

    It can only raise a score, and is not invariant to shifts of the row: it has to see scores
    before the mask and before any maximum is subtracted.
    """
    return torch.addcmul(scores, scores.abs(), lift[:, None, None, :].to(scores.dtype))
