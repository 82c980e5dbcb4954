"""What edits do to attention rows: the primitives behind the attention function.

One path serves the rows of a prefill, those of a decode step and those that an observer sees:
scores, head factors from scores, score edits, mask, softmax, weight edits, values. Plain torch
throughout; attention.py says which rows, and when the fused kernel takes over.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch

from vlmfix.base.attention import AttentionMethod, FusedEdit, Plan
from vlmfix.engine.call import Call
from vlmfix.errors import UnsupportedModel
from vlmfix.families import ModelInfo
from vlmfix.families.source import arguments_of_attention
from vlmfix.kernels import reference

__all__ = [
    "READ_ARGUMENTS",
    "Chosen",
    "Edit",
    "HeadFactors",
    "Inputs",
    "Step",
    "as_bool",
    "count",
    "edited_rows",
    "edited_weights",
    "require_attention",
    "row_count",
]


#: What modules name in a call of their attention function, and what is either read here or has no
#: part in the softmax of sdpa and eager attention. The last one scales a loss: Trainer hands it to
#: the model, and transformers hands it on to every layer.
READ_ARGUMENTS = frozenset(
    {
        "query", "key", "value", "attention_mask", "scaling", "softcap", "is_causal", "dropout",
        "sliding_window", "position_ids", "output_attentions", "indices", "block_indices",
        "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "num_items_in_batch",
    }
)  # fmt: skip


class Inputs(NamedTuple):
    """What transformers hands to an attention function.

    query is (B, H, Q, D), key and value (B, Hkv, K, D); the mask is None, bool (True: visible) or
    additive, (B, 1 or H, Q or 1, at least K).
    """

    module: torch.nn.Module
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    kwargs: dict[str, Any]

    @property
    def keys(self) -> int:
        return self.key.shape[2]

    @property
    def scaling(self) -> float:
        scaling: float | None = self.kwargs.get("scaling")
        return self.query.shape[-1] ** -0.5 if scaling is None else scaling

    @property
    def unread(self) -> list[str]:
        """Arguments that may change the softmax, and that the row path does not read.

        Tensors of whole numbers are positions, lengths of packed sequences, and the keys that
        sparse attention has chosen, which the mask hides as well.
        """
        return sorted(
            name
            for name, value in self.kwargs.items()
            if name not in READ_ARGUMENTS
            and isinstance(value, torch.Tensor)
            and (value.is_floating_point() or value.dtype == torch.bool)
        )

    def check(self, layer: int, rows: Sequence[int]) -> None:
        """Refuse attention whose rows cannot be told, or that the row path does not model.

        Args:
            layer: index of the decoder layer.
            rows: queries of the forward, and how many of them, the last ones, need logits.

        Raises:
            UnsupportedModel: another number of queries, or arguments that are `unread`.
        """
        name = type(self.module).__name__
        if self.query.shape[2] not in rows:
            raise UnsupportedModel(
                f"layer {layer} ({name}) attends with {self.query.shape[2]} rows in a forward of "
                f"{rows[0]} tokens, so vlmfix cannot tell which row is which token. No method that "
                "reads or edits attention can run on this model."
            )
        if self.unread:
            raise UnsupportedModel(_why_unread(layer, name, self.unread))

    def samples(self, start: int, stop: int) -> Inputs:
        """The same for some of the B rows of the batch."""
        cut = slice(start, stop)
        mask = self.mask if self.mask is None or len(self.mask) == 1 else self.mask[cut]
        return self._replace(
            query=self.query[cut], key=self.key[cut], value=self.value[cut], mask=mask
        )

    def keys_from(self, first: int) -> Inputs:
        """The same without the keys before `first`, which no row sees."""
        if not first:
            return self
        mask = self.mask if self.mask is None else self.mask[..., first : self.keys]
        key, value = self.key[:, :, first:], self.value[:, :, first:]
        return self._replace(key=key, value=value, mask=mask)

    def visible(self, first: int, rows: int) -> torch.Tensor | None:
        """The mask of the rows from `first`: sliced, or built where transformers leaves it out."""
        if self.mask is not None:
            mask = self.mask[..., : self.keys]
            return mask if mask.shape[2] == 1 else mask[:, :, first : first + rows]
        causal = self.kwargs.get("is_causal")
        if causal is None:
            causal = getattr(self.module, "is_causal", True)
        if self.query.shape[2] == 1 or not causal:
            return None
        # transformers leaves the mask out only where queries and keys both start at position 0.
        position = torch.arange(first, first + rows, device=self.query.device)
        key = torch.arange(self.keys, device=self.query.device)
        return (key[None, :] <= position[:, None])[None, None]

    def scores(self, query: torch.Tensor) -> torch.Tensor:
        """Scaled scores (B, H, R, K) of some of the rows, before the mask."""
        return reference.row_scores(query, self.key, self.scaling, self.kwargs.get("softcap"))


@dataclass(frozen=True)
class Edit:
    """One method at one layer of one prompt; the flags say which functions it overrides."""

    method: AttentionMethod
    plan: Plan
    scores: bool
    weights: bool
    score_scale: bool
    heads: bool

    @classmethod
    def of(cls, method: AttentionMethod, plan: Plan) -> Edit:
        names = ("edit_scores", "edit_weights", "score_scale", "head_scale")
        return cls(method, plan, *(method.overrides(name) for name in names))

    @property
    def edits_rows(self) -> bool:
        return self.scores or self.weights or self.score_scale

    @property
    def scales_heads(self) -> bool:
        return self.heads or self.plan.heads is not None

    @property
    def live(self) -> bool:
        """Whether any row of the batch has something to edit here."""
        return any(self.plan.samples)

    def tensors(self, offset: int, keys: int) -> dict[str, torch.Tensor]:
        """The plan's tensors for the keys that this call sees, then its constants."""
        plan = self.plan
        sliced = {name: x[:, offset : offset + keys] for name, x in plan.tensors.items()}
        return {**sliced, **plan.constants}


class HeadFactors(NamedTuple):
    """Factors on the heads of a layer that hold for a prompt: (B, 1, H, 1), as outputs want them.

    `changed` (B, 1, H) bool says where they are not 1.
    """

    values: torch.Tensor
    changed: torch.Tensor

    @classmethod
    def of(cls, factors: torch.Tensor, dtype: torch.dtype) -> HeadFactors:
        """From (B, H)."""
        values = factors.to(dtype)[:, None, :, None]
        return cls(values, values[..., 0] != 1)


@dataclass(frozen=True)
class Step:
    """One edit of a layer, ready for the row of a decode step.

    Attributes:
        edit: the method and its plan.
        tensors: the plan's tensors for the keys of this step, and its constants.
        fused: the same row edit for the fused kernel, for the keys of this step.
        factors: head factors that hold for this prompt.
        counter: int64 scalar that takes the number of edited rows; None where the call counts.
    """

    edit: Edit
    tensors: dict[str, torch.Tensor]
    fused: FusedEdit | None
    factors: HeadFactors | None
    counter: torch.Tensor | None


def require_attention(info: ModelInfo, layers: Iterable[int]) -> None:
    """Refuse decoder layers whose attention the row path does not model.

    Raises:
        UnsupportedModel: the module of a layer hands more to its attention function than is read.
    """
    for layer in layers:
        module = info.attention.get(layer)
        if module is not None and (unread := arguments_of_attention(module) - READ_ARGUMENTS):
            raise UnsupportedModel(_why_unread(layer, type(module).__name__, sorted(unread)))


def _why_unread(layer: int, module: str, names: Sequence[str]) -> str:
    return (
        f"layer {layer} ({module}) hands {', '.join(names)} to its attention function (learned "
        "sinks, position biases, ...), which vlmfix does not model. No method that reads or edits "
        "attention can run on this model."
    )


def count(layer: int, call: Call | None, step: Step | None, rows: torch.Tensor | int) -> None:
    """Add edited rows: to the call, or to the step's counter inside a compiled graph."""
    if call is not None:
        call.count(layer, rows)
    elif step is not None and step.counter is not None:
        step.counter.add_(rows.sum() if isinstance(rows, torch.Tensor) else rows)


def as_bool(mask: torch.Tensor | None) -> torch.Tensor | None:
    """A mask as bool with True = visible; additive masks are 0 there."""
    return mask if mask is None or mask.dtype == torch.bool else mask == 0


#: A step (None in a prefill), its edit, the tensors of its plan, and the rows (B, R) that it edits
#: (None: all of them).
Chosen: TypeAlias = (
    "Sequence[tuple[Step | None, Edit, dict[str, torch.Tensor], torch.Tensor | None]]"
)


def edited_rows(
    layer: int,
    call: Call | None,
    edits: Chosen,
    inputs: Inputs,
    query: torch.Tensor,
    visible: torch.Tensor | None,
) -> torch.Tensor:
    """Edited attention for the rows in `query` (B, H, R, D) -> (B, R, H, D)."""
    weights, factors = edited_weights(layer, call, edits, inputs, query, visible)
    output = reference.attend(weights, inputs.value)
    if factors is not None:
        output = output * factors[..., None].to(output.dtype)
    return output.transpose(1, 2)


def edited_weights(
    layer: int,
    call: Call | None,
    edits: Chosen,
    inputs: Inputs,
    query: torch.Tensor,
    visible: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Softmax rows (B, H, R, K) after every edit, and factors (B, H, R) on the head outputs."""
    scores = inputs.scores(query)
    factors: torch.Tensor | None = None
    for step, edit, plan, chosen in edits:
        if edit.score_scale:
            # A sliding layer's cache drops what its mask would hide: both must look the same.
            shown = as_bool(visible)
            seen = scores if shown is None else scores.masked_fill(~shown, 0.0)
            scale = edit.method.score_scale(seen, **plan)
            if chosen is not None:
                scale = torch.where(chosen[:, None, :], scale, torch.ones_like(scale))
            factors = scale if factors is None else factors * scale
            count(layer, call, step, scale != 1)
    for step, edit, plan, chosen in edits:
        if edit.scores:
            edited = edit.method.edit_scores(scores, **plan)
            scores = edited if chosen is None else _where(chosen, edited, scores)
            count(layer, call, step, row_count(edit, chosen, query))
    weights = torch.softmax(reference.mask_scores(scores, visible), dim=-1)
    for step, edit, plan, chosen in edits:
        if edit.weights:
            edited, changed = edit.method.edit_weights(weights, **plan)
            if chosen is not None:
                edited = _where(chosen, edited, weights)
                changed = changed & chosen[:, None, :]
            weights = edited
            count(layer, call, step, changed)
    return weights, factors


def _where(rows: torch.Tensor, edited: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
    return torch.where(rows[:, None, :, None], edited, plain)


def row_count(edit: Edit, chosen: torch.Tensor | None, query: torch.Tensor) -> int:
    """Edited rows x heads of a score edit: rows of samples that have something to edit."""
    heads, rows = query.shape[1], query.shape[2]
    if chosen is None:
        return sum(edit.plan.samples) * heads * rows
    per_sample = chosen.sum(1).tolist()
    pairs = zip(edit.plan.samples, per_sample, strict=True)
    return heads * int(sum(count for live, count in pairs if live))
