"""Quick, self-contained figures during training; `vlmfix eval` has the real benchmarks.

POPE-like: per picture, its first three objects and one absent object for each, asked in the
"lmms" style as a first turn; the greedy first token decides ("No" is no, anything else is yes).
Captions: exact category names in greedy captions, counted once per caption.
"""

from __future__ import annotations

__all__ = ["evaluate", "main", "pope_questions"]

import argparse
import json
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any

import torch

from vlmfix.emoji import draw, language
from vlmfix.emoji.catalogue import NAMES
from vlmfix.emoji.dataset import split_scenes
from vlmfix.emoji.training.batches import to_pixels
from vlmfix.emoji.training.build import VISUAL_TOKENS
from vlmfix.emoji.training.tokenizer import IMAGE_TOKEN
from vlmfix.emoji.world import Scene
from vlmfix.errors import VlmfixError

_BATCH = 50


def pope_questions(
    objects: list[list[str]], seed: int = 0
) -> dict[str, list[tuple[int, str, bool]]]:
    """POPE's questions for pictures with these objects (at least three each).

    Returns:
        "random" and "adversarial" -> (picture number, category, is it there). A random negative
        is any absent category; an adversarial one is the absent category seen most often with
        the positive. No category is asked twice of a picture.
    """
    together: dict[str, Counter[str]] = {name: Counter() for name in NAMES}
    for present in objects:
        for a, b in combinations(present, 2):
            together[a][b] += 1
            together[b][a] += 1
    rng = Random(seed)
    asked: dict[str, list[tuple[int, str, bool]]] = {"random": [], "adversarial": []}
    for kind, rows in asked.items():
        for number, present in enumerate(objects):
            used = set(present)
            for positive in present[:3]:
                absent = [name for name in NAMES if name not in used]
                if kind == "random":
                    negative = rng.choice(absent)
                else:
                    negative = max(absent, key=lambda name: together[positive][name])
                used.add(negative)
                rows += [(number, positive, True), (number, negative, False)]
    return asked


def _prompt(user: str) -> str:
    return f"USER: {IMAGE_TOKEN * VISUAL_TOKENS}\n{user} ASSISTANT:"


def _says_yes(
    model: Any, tokenizer: Any, pixels: torch.Tensor, rows: list[tuple[int, str, bool]]
) -> list[bool]:
    no = tokenizer(" No", add_special_tokens=False).input_ids[0]
    said: list[bool] = []
    for start in range(0, len(rows), _BATCH):
        part = rows[start : start + _BATCH]
        asked = [language.question(name) + language.QUESTION_STYLES["lmms"] for _, name, _ in part]
        inputs = tokenizer([_prompt(text) for text in asked], padding=True, return_tensors="pt")
        pictures = pixels[[number for number, _, _ in part]]
        logits = model(**inputs, pixel_values=pictures, logits_to_keep=1).logits[:, -1]
        said += (logits.argmax(-1) != no).tolist()
    return said


def _captions(model: Any, tokenizer: Any, pixels: torch.Tensor) -> list[str]:
    texts: list[str] = []
    for start in range(0, len(pixels), _BATCH):
        part = pixels[start : start + _BATCH]
        prompts = [_prompt("Please describe this image in detail.")] * len(part)
        inputs = tokenizer(prompts, return_tensors="pt")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model.generate(**inputs, pixel_values=part, max_new_tokens=110, do_sample=False)
        rest = out[:, inputs["input_ids"].shape[1] :]
        texts += tokenizer.batch_decode(rest, skip_special_tokens=True)
    return texts


@torch.no_grad()
def evaluate(model: Any, tokenizer: Any, scenes: list[Scene]) -> dict[str, Any]:
    """Quick figures of a model on scenes with at least three categories each.

    Returns:
        Accuracies (random, adversarial), yes_on_present, no_on_random, no_on_adversarial, and of
        captions: recall, chair_i, chair_s, words; plus one sample caption.
    """
    training = model.training
    model.eval()
    pixels = to_pixels([draw.paint(scene) for scene in scenes])
    objects = [list(dict.fromkeys(item.name for item in scene.items)) for scene in scenes]
    figures: dict[str, Any] = {}
    for kind, rows in pope_questions(objects).items():
        said = _says_yes(model, tokenizer, pixels, rows)
        right = [yes == there for yes, (_, _, there) in zip(said, rows, strict=True)]
        figures[kind] = sum(right) / len(right)
        negatives = [ok for ok, (_, _, there) in zip(right, rows, strict=True) if not there]
        positives = [ok for ok, (_, _, there) in zip(right, rows, strict=True) if there]
        figures[f"no_on_{kind}"] = sum(negatives) / len(negatives)
        figures["yes_on_present"] = sum(positives) / len(positives)
    texts = _captions(model, tokenizer, pixels)
    told = [set(language.mentioned(text)) for text in texts]
    wrong = [len(names - set(present)) for names, present in zip(told, objects, strict=True)]
    found = sum(len(names & set(present)) for names, present in zip(told, objects, strict=True))
    figures["recall"] = found / sum(map(len, objects))
    figures["chair_i"] = sum(wrong) / max(1, sum(map(len, told)))
    figures["chair_s"] = sum(map(bool, wrong)) / len(texts)
    figures["words"] = sum(len(text.split()) for text in texts) / len(texts)
    figures = {key: round(value, 4) for key, value in figures.items()}
    figures["sample"] = texts[0].strip()
    model.train(training)
    return figures


def main(arguments: list[str] | None = None) -> int:
    """Print the quick figures of a stored model; returns the exit code (2 for unusable input)."""
    from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

    from vlmfix.emoji import model_path

    parser = argparse.ArgumentParser(description="Quick figures of a trained EmojiCOCO model.")
    parser.add_argument(
        "--model",
        type=Path,
        default=model_path(),
        help="folder of the model; default: the bundled one",
    )
    parser.add_argument(
        "--split", default="tuning", help="split to evaluate on: tuning (default) or evaluation"
    )
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    try:
        scenes = [scene for _, scene in split_scenes(given.split, given.images)]
    except VlmfixError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    model = LlavaForConditionalGeneration.from_pretrained(given.model, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(given.model)
    print(json.dumps(evaluate(model, tokenizer, scenes), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
