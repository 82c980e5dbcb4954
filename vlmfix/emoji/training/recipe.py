"""The training recipe as data: every number that determines the model."""

from __future__ import annotations

__all__ = ["QUICK", "RECIPE", "STAGES", "Recipe", "StageRecipe"]

import hashlib
import json
from dataclasses import asdict, dataclass, replace

STAGES = ("text", "vision", "joint")


@dataclass(frozen=True)
class StageRecipe:
    """Length and optimisation of one stage. Counts are optimiser steps, never minutes."""

    steps: int
    batch: int
    learning_rate: float
    warmup: int
    final_share: float
    """The cosine schedule ends at this share of `learning_rate`."""
    weight_decay: float


@dataclass(frozen=True)
class Recipe:
    """Architecture, settings of the data, and stages."""

    seed: int
    text: StageRecipe
    vision: StageRecipe
    joint: StageRecipe
    questions: int
    """Yes/no questions per picture."""
    theme_negatives: float
    """Share of the questions with answer No whose object belongs to the scene's theme."""
    packed_share: float
    """Share of rows in the text stage that are captions without any picture."""
    unseen: float
    """Text stage: share of objects that the symbolic picture does not show."""
    symbol_noise: float
    """Text stage: noise on symbols, relative to their length."""
    tower_rate: float
    """Joint stage: learning rate of the vision tower relative to the rest."""
    checkpoint_every: int
    evaluate_every: int
    evaluation_images: int
    tower_layers: int = 5
    tower_width: int = 192
    decoder_layers: int = 6
    decoder_width: int = 256

    def stage(self, name: str) -> StageRecipe:
        """The stage of that name: "text", "vision" or "joint"."""
        stage: StageRecipe = getattr(self, name)
        return stage

    def digest(self) -> str:
        """Short hash of every field; checkpoints of another recipe are refused by it."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


RECIPE = Recipe(
    seed=1,
    text=StageRecipe(1100, 16, 2.5e-3, 120, 0.05, 0.0),
    vision=StageRecipe(5200, 32, 1.2e-3, 100, 0.03, 0.01),
    joint=StageRecipe(1650, 24, 8e-4, 150, 0.02, 0.02),
    questions=4,
    theme_negatives=0.25,
    packed_share=0.4,
    unseen=0.1,
    symbol_noise=0.5,
    tower_rate=0.3,
    checkpoint_every=100,
    evaluate_every=550,
    evaluation_images=60,
)

QUICK = replace(
    RECIPE,
    text=StageRecipe(4, 4, 1e-3, 2, 0.1, 0.01),
    vision=StageRecipe(4, 4, 1e-3, 2, 0.1, 0.01),
    joint=StageRecipe(4, 4, 1e-3, 2, 0.1, 0.01),
    checkpoint_every=2,
    evaluate_every=1000,
    evaluation_images=4,
)
"""Seconds instead of minutes, for tests; the resulting model has learned nothing."""
