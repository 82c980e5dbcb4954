"""Training batches. Step k of a stage always sees the same data: seeds, not states, decide."""

from __future__ import annotations

__all__ = ["BLANK", "Batches", "class_grid", "name_matrix", "to_pixels"]

from functools import lru_cache
from random import Random
from typing import Any

import numpy as np
import torch
from PIL.Image import Image

from vlmfix.emoji import draw, language
from vlmfix.emoji.catalogue import NAMES
from vlmfix.emoji.training.build import MEAN, PATCH, PATCHES, STD, VISUAL_TOKENS
from vlmfix.emoji.training.recipe import Recipe
from vlmfix.emoji.training.tokenizer import ANSWERS, IMAGE_TOKEN
from vlmfix.emoji.world import TRAINING, Item, Scene, sample_scene

BLANK = len(NAMES)
"""Class index of a patch without object."""
_CLASS = {name: number for number, name in enumerate(NAMES)}
_IGNORE = -100
_PACKED_LENGTH = 224
_MULTIPLE = 16  # odd lengths make matrix products on CPUs half as fast
_MEAN = torch.tensor(MEAN).view(1, 3, 1, 1)
_STD = torch.tensor(STD).view(1, 3, 1, 1)


def to_pixels(pictures: list[Image]) -> torch.Tensor:
    """Pictures of 112 x 112 -> (N, 3, 112, 112) float32, exactly as the image processor does."""
    array = np.stack([np.asarray(picture) for picture in pictures])
    return (torch.from_numpy(array).permute(0, 3, 1, 2).float() / 255 - _MEAN) / _STD


def _patches(low: int, high: int) -> slice:
    """Patches along one axis that an object from `low` to `high` px owns.

    Those whose centre it covers within 3 px, and always the one that holds its middle.
    """
    middle = (low + high) // 2 // PATCH
    first = max(0, -(-(low - 3 - PATCH // 2) // PATCH))
    behind = (high + 2 - PATCH // 2) // PATCH + 1
    return slice(min(first, middle), max(behind, middle + 1))


def class_grid(items: tuple[Item, ...]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """(64,) class of each patch, row by row: the topmost object near its centre, or BLANK."""
    grid = np.full((PATCHES, PATCHES), BLANK)
    for item in items:
        left, top, right, bottom = item.box
        grid[_patches(top, bottom), _patches(left, right)] = _CLASS[item.name]
    return grid.reshape(-1)


def name_matrix(tokenizer: Any) -> torch.Tensor:
    """(classes + 1, vocabulary): row c averages the tokens of category c's name.

    Times the word embeddings it gives the embedding that a patch of that category should have for
    the decoder. A blank patch means <s>, the token with which the decoder's documents begin.
    """
    matrix = torch.zeros(len(NAMES) + 1, len(tokenizer))
    for number, name in enumerate(NAMES):
        ids = tokenizer(" " + name, add_special_tokens=False).input_ids
        for token in ids:
            matrix[number, token] += 1 / len(ids)
    matrix[BLANK, tokenizer.bos_token_id] = 1
    return matrix


class Batches:
    """Makes the batches of all three stages."""

    def __init__(self, recipe: Recipe, tokenizer: Any) -> None:
        self.recipe = recipe
        self.tokenizer = tokenizer
        self.encode = lru_cache(maxsize=50_000)(self._encode)

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False).input_ids)

    def _rng(self, stage: str, step: int) -> Random:
        return Random(f"{self.recipe.seed}/{stage}/{step}")

    def conversation(self, rng: Random, scene: Scene) -> list[tuple[str, str]]:
        """Turns (user, assistant): a caption first or last, yes/no questions around it."""
        recipe = self.recipe
        turns = [
            (language.styled_question(rng, name), ANSWERS[there])
            for name, there in language.choose_questions(
                rng, scene, recipe.questions, recipe.theme_negatives
            )
        ]
        description = (language.caption_prompt(rng), language.caption(rng, scene))
        # A caption in front would answer the questions by itself, so it mostly comes last.
        turns.insert(0 if rng.random() < 0.3 else len(turns), description)
        return turns

    def tokens(
        self, turns: list[tuple[str, str]], with_image: bool = True
    ) -> tuple[list[int], list[int]]:
        """Ids of a conversation, equal to the chat template's, and labels on its answers only."""
        ids = [self.tokenizer.bos_token_id]
        labels = [_IGNORE]
        for number, (user, assistant) in enumerate(turns):
            if number == 0 and with_image:
                pieces = self.encode("USER: " + IMAGE_TOKEN * VISUAL_TOKENS)
                prompt = pieces + self.encode(f"\n{user} ASSISTANT:")
            else:
                prompt = self.encode(f"USER: {user} ASSISTANT:")
            answer = (*self.encode(f" {assistant}"), self.tokenizer.eos_token_id)
            ids += [*prompt, *answer]
            labels += [_IGNORE] * len(prompt) + list(answer)
        return ids, labels

    def _collate(self, rows: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
        longest = -(-max(len(ids) for ids, _ in rows) // _MULTIPLE) * _MULTIPLE
        ids = torch.full((len(rows), longest), self.tokenizer.pad_token_id)
        labels = torch.full((len(rows), longest), _IGNORE)
        for number, (row, label) in enumerate(rows):
            ids[number, : len(row)] = torch.tensor(row)
            labels[number, : len(row)] = torch.tensor(label)
        # No mask: padding is on the right here, which a causal decoder never attends to.
        return {"input_ids": ids, "labels": labels}

    def _packed(self, rng: Random) -> tuple[list[int], list[int]]:
        """Captions without pictures, one document after the other, each starting with <s>."""
        ids: list[int] = []
        while len(ids) < _PACKED_LENGTH:
            scene = sample_scene(rng, TRAINING)
            turn = (language.caption_prompt(rng), language.caption(rng, scene))
            ids += self.tokens([turn], with_image=False)[0]
        ids = ids[:_PACKED_LENGTH]
        return ids, list(ids)

    def text(self, step: int) -> dict[str, torch.Tensor]:
        """Batch of the text stage.

        Returns:
            input_ids, labels (B, L), and classes (P, 64): the content of the symbolic pictures of
            the P rows with <image> tokens. Some objects that the words mention are missing there,
            as small and faint ones are for the vision tower.
        """
        rng = self._rng("text", step)
        rows, grids = [], []
        for _ in range(self.recipe.text.batch):
            if rng.random() < self.recipe.packed_share:
                rows.append(self._packed(rng))
                continue
            scene = sample_scene(rng, TRAINING)
            seen = tuple(item for item in scene.items if rng.random() >= self.recipe.unseen)
            rows.append(self.tokens(self.conversation(rng, scene)))
            grids.append(class_grid(seen))
        classes = torch.from_numpy(np.array(grids, dtype=np.int64).reshape(-1, VISUAL_TOKENS))
        return self._collate(rows) | {"classes": classes}

    def vision(self, step: int) -> dict[str, torch.Tensor]:
        """Batch of the vision stage: pixel_values (B, 3, 112, 112) and classes (B, 64)."""
        rng = self._rng("vision", step)
        scenes = [sample_scene(rng, TRAINING) for _ in range(self.recipe.vision.batch)]
        return {
            "pixel_values": to_pixels([draw.paint(scene) for scene in scenes]),
            "classes": torch.from_numpy(np.stack([class_grid(scene.items) for scene in scenes])),
        }

    def joint(self, step: int) -> dict[str, torch.Tensor]:
        """Batch of the joint stage: pictures with conversations."""
        rng = self._rng("joint", step)
        scenes = [sample_scene(rng, TRAINING) for _ in range(self.recipe.joint.batch)]
        batch = self._collate([self.tokens(self.conversation(rng, scene)) for scene in scenes])
        return batch | {"pixel_values": to_pixels([draw.paint(scene) for scene in scenes])}
