"""The three stages of training, each with its modules, data and loss.

text    The decoder alone. Captions without pictures teach which objects co-occur; conversations
        over symbolic pictures (64 word embeddings instead of 64 patches) teach reading a picture.
vision  The tower and the projector. Each patch learns its category, and projected patches learn
        to equal the decoder's own (frozen) embedding of the category's name.
joint   All modules, on pictures with conversations: the first stage with both pixels and words.
"""

from __future__ import annotations

__all__ = ["Stage", "fast_attention", "learning_rate_share"]

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface

from vlmfix.emoji.catalogue import NAMES
from vlmfix.emoji.training.batches import BLANK, Batches, name_matrix
from vlmfix.emoji.training.recipe import Recipe

_SCALE = 12.0  # turns cosines into logits
_FAST = "vlmfix_emoji_training"
_BLANK_WEIGHT = 0.3  # most patches are blank


def learning_rate_share(step: int, steps: int, warmup: int, final_share: float) -> float:
    """Linear warm-up, then a cosine from 1 down to `final_share`; a share of the peak rate."""
    cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
    return min(1.0, (step + 1) / warmup) * (final_share + (1 - final_share) * cosine)


def _causal_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention for training on CPUs: unpadded, all in bfloat16, three times as fast as torch's."""
    share = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(share, 1).bfloat16() for x in (key, value))
    scores = (query.bfloat16() * scaling) @ key.transpose(-1, -2)
    future = torch.full(scores.shape[-2:], -1e4, dtype=scores.dtype).triu(1)
    mixed: torch.Tensor = (scores + future).softmax(-1) @ value
    return mixed.transpose(1, 2).contiguous(), None


@contextmanager
def fast_attention(model: Any) -> Iterator[None]:
    """Speed up training of the decoder in the block; padding masks are ignored there."""
    AttentionInterface.register(_FAST, _causal_attention)
    model.set_attn_implementation({"text_config": _FAST, "vision_config": "sdpa"})
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")


class Stage:
    """One stage: parameter groups, optimiser, and one `step` of training."""

    def __init__(self, name: str, recipe: Recipe, model: Any, batches: Batches) -> None:
        self.name, self.recipe, self.model, self.batches = name, recipe, model, batches
        self.plan = recipe.stage(name)
        self.names = name_matrix(batches.tokenizer)
        # Reads categories directly off the tower, in the vision stage alone.
        torch.manual_seed(recipe.seed)
        self.head = torch.nn.Linear(recipe.tower_width, len(NAMES) + 1)
        tower = list(model.model.vision_tower.parameters())
        projector = list(model.model.multi_modal_projector.parameters())
        decoder = list(model.model.language_model.parameters())  # with the (tied) output layer
        if name == "text":
            groups = [(decoder, 1.0)]
        elif name == "vision":
            groups = [([*tower, *projector, *self.head.parameters()], 1.0)]
        else:
            groups = [(tower, recipe.tower_rate), ([*projector, *decoder], 1.0)]
        self.trained = [parameter for group, _ in groups for parameter in group]
        self.rates = [rate for _, rate in groups]
        self.optimiser = torch.optim.AdamW(
            [{"params": group} for group, _ in groups],
            lr=self.plan.learning_rate,
            weight_decay=self.plan.weight_decay,
            betas=(0.9, 0.98),
        )

    def step(self, step: int) -> float:
        """Train one batch; returns its loss. Bit-exact for equal weights, recipe and step."""
        share = learning_rate_share(step, self.plan.steps, self.plan.warmup, self.plan.final_share)
        for group, rate in zip(self.optimiser.param_groups, self.rates, strict=True):
            group["lr"] = self.plan.learning_rate * rate * share
        batch = getattr(self.batches, self.name)(step)
        with torch.autocast("cpu", dtype=torch.bfloat16), fast_attention(self.model):
            loss: torch.Tensor = getattr(self, f"_{self.name}_loss")(batch, step)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimiser.step()
        return float(loss.detach())

    def _text_loss(self, batch: dict[str, torch.Tensor], step: int) -> torch.Tensor:
        words = self.model.get_input_embeddings()
        embeddings = words(batch["input_ids"])
        symbols = (self.names @ words.weight.float())[batch["classes"]]  # (P, 64, D)
        generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + step)
        noise = torch.randn(symbols.shape, generator=generator) / symbols.shape[-1] ** 0.5
        symbols = symbols + self.recipe.symbol_noise * noise * symbols.norm(dim=-1, keepdim=True)
        is_patch = batch["input_ids"] == self.model.config.image_token_id
        embeddings = embeddings.masked_scatter(is_patch[..., None], symbols.to(embeddings.dtype))
        loss: torch.Tensor = self.model(
            inputs_embeds=embeddings,
            labels=batch["labels"],
        ).loss
        return loss

    def _vision_loss(self, batch: dict[str, torch.Tensor], step: int) -> torch.Tensor:
        inner = self.model.model
        tower = inner.vision_tower(batch["pixel_values"], output_hidden_states=True)
        features = tower.hidden_states[self.model.config.vision_feature_layer][:, 1:]
        patches = inner.multi_modal_projector(features).float()
        targets = (self.names @ self.model.get_input_embeddings().weight.float()).detach()
        directions = functional.normalize(targets, dim=-1)
        similar = _SCALE * functional.normalize(patches, dim=-1) @ directions.T
        classes = batch["classes"].reshape(-1)
        weights = torch.ones(BLANK + 1)
        weights[BLANK] = _BLANK_WEIGHT
        read = functional.cross_entropy(self.head(features).float().flatten(0, 1), classes, weights)
        aligned = functional.cross_entropy(similar.flatten(0, 1), classes, weights)
        lengths = targets.norm(dim=-1)[classes]
        length_error = (patches.norm(dim=-1).flatten() - lengths).square().mean()
        loss: torch.Tensor = read + aligned + 0.1 * length_error
        return loss

    def _joint_loss(self, batch: dict[str, torch.Tensor], step: int) -> torch.Tensor:
        loss: torch.Tensor = self.model(**batch).loss
        return loss
