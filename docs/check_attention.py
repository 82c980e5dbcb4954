"""Does the word of an object look at the object? 200 bundled images, layer by layer.

    python docs/check_attention.py [IMAGES]

The plain bundled model describes each image. For every word that names an object which is there,
the attention maps of the rows that wrote it are read by `vlmfix.attention_map` over the model's own
caption. What counts is the share of the attention to the image that lies inside the boxes of that
object, over the share that a uniform map would put there. The control puts the same maps over the
boxes of another image's word, which is what a liking for the middle of images alone would give.
Every head's map over the image sums to 1, and the mean over heads is that of such maps.

Writes docs/results/attention/in_boxes.csv and in_boxes.png; needs the extra `eval` (matplotlib).
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch

import vlmfix
from vlmfix import emoji
from vlmfix.chat import chat_inputs
from vlmfix.evals.chair.objects import category_of, ground_truth
from vlmfix.evals.chair.tokens import find_mentions
from vlmfix.evals.inputs.coco import CocoData
from vlmfix.evals.scoring.stats import Resamples, percentile_interval

TARGET = Path(__file__).resolve().parent / "results" / "attention" / "in_boxes.csv"
PROMPT = "Please describe this image in detail."
IMAGES, BATCH, LONGEST = 200, 20, 120


@dataclass(frozen=True, eq=False)
class Seen:
    """One word for a present object: its image, its maps, and what of each cell is the object.

    Attributes:
        image: its number.
        maps: (L, H, rows, columns), each sums to 1.
        inside: (rows, columns) in [0, 1], share of a cell that the boxes cover.
    """

    image: int
    maps: np.ndarray
    inside: np.ndarray


def boxes_of(data: CocoData) -> dict[int, dict[str, list[list[float]]]]:
    """Boxes (left, top, width, height) in pixels, by image and object."""
    with zipfile.ZipFile(emoji.evaluation_split()) as split:
        rows = json.loads(split.read("annotations/instances.json"))["annotations"]
    found: dict[int, dict[str, list[list[float]]]] = {}
    for row in rows:
        name = data.categories[row["category_id"]]
        name = category_of().get(name, name)
        found.setdefault(row["image_id"], {}).setdefault(name, []).append(row["bbox"])
    return found


def covered(boxes: list[list[float]], size: tuple[int, int], grid: tuple[int, int]) -> np.ndarray:
    """(rows, columns): share of each cell that the union of the boxes covers."""
    width, height = size
    pixels = np.zeros((height, width))
    for left, top, wide, high in boxes:
        pixels[int(top) : int(top + high), int(left) : int(left + wide)] = 1
    rows, columns = grid
    return pixels.reshape(rows, height // rows, columns, width // columns).mean((1, 3))


def look(images: int) -> list[Seen]:
    """Let the model describe the first images, and see where its words for objects looked."""
    model, processor = vlmfix.load("emoji")
    data = CocoData(emoji.evaluation_split())
    boxes, truths = boxes_of(data), ground_truth(data)
    ids = sorted(data.files)[:images]
    found: list[Seen] = []
    for start in range(0, len(ids), BATCH):
        batch = ids[start : start + BATCH]
        pictures = [data.image(data.files[image]) for image in batch]
        asked = {"type": "text", "text": PROMPT}
        chats = [
            [{"role": "user", "content": [{"type": "image", "image": picture}, asked]}]
            for picture in pictures
        ]
        inputs = chat_inputs(model, processor, chats)
        with torch.no_grad():
            generated = model.generate(**inputs, max_new_tokens=LONGEST, do_sample=False)
        maps = vlmfix.attention_map(model, inputs, rows="answer", heads="all", generated=generated)
        answers = [
            row[: len(own[0].rows)]
            for row, own in zip(
                generated[:, inputs["input_ids"].shape[1] :].tolist(), maps, strict=True
            )
        ]
        truth = [truths[image] for image in batch]
        for mention in find_mentions(answers, truth, processor.tokenizer):
            image = batch[mention.answer]
            if mention.hallucinated or mention.name not in boxes[image]:
                continue
            grids = maps[mention.answer][0].grids()[0][:, :, list(mention.tokens)].mean(2).numpy()
            inside = covered(
                boxes[image][mention.name], pictures[mention.answer].size, grids.shape[-2:]
            )
            found.append(Seen(image, grids / grids.sum((2, 3), keepdims=True), inside))
    return found


def others(seen: list[Seen]) -> list[np.ndarray]:
    """For each word, what the boxes of a word of another image cover: the control."""
    half = len(seen) // 2  # words stand image by image, so none is of the same
    rolled = [seen[(at + half) % len(seen)] for at in range(len(seen))]
    assert all(one.image != other.image for one, other in zip(seen, rolled, strict=True))
    return [other.inside for other in rolled]


def ratios(seen: list[Seen]) -> list[dict[str, Any]]:
    """By layer, and by head: mass inside over that of a uniform map, with intervals."""
    draws = Resamples([one.image for one in seen])
    maps = np.stack([one.maps for one in seen])  # (words, L, H, rows, columns)
    rows = []
    for control, insides in ((False, [one.inside for one in seen]), (True, others(seen))):
        inside = np.stack(insides)
        mass = np.einsum("nlhrc,nrc->nlh", maps, inside)
        uniform = inside.mean((1, 2))
        bottom = draws.sums(uniform)
        for layer in range(mass.shape[1]):
            heads = [("mean", mass[:, layer].mean(1))]
            if not control:
                heads += [(str(h), mass[:, layer, h]) for h in range(mass.shape[2])]
            for head, own in heads:
                low, high = percentile_interval(draws.sums(own) / bottom)
                rows.append(
                    {
                        "boxes": "of another image" if control else "own",
                        "layer": layer,
                        "head": head,
                        "inside": round(float(own.mean()), 5),
                        "uniform": round(float(uniform.mean()), 5),
                        "ratio": round(float(own.sum() / uniform.sum()), 4),
                        "low": round(low, 4),
                        "high": round(high, 4),
                        "words_above_uniform": round(float((own > uniform).mean()), 4),
                        "words": len(seen),
                        "images": draws.n_clusters,
                    }
                )
    return rows


def draw(rows: list[dict[str, str]], digest: str) -> None:
    """Ratio by layer: own boxes, control, and single heads as dots."""
    figure, axes = plt.subplots(figsize=(6.4, 3.6), dpi=120, layout="constrained")
    axes.axhline(1, color="0.4", linewidth=0.8, linestyle="--", label="a uniform map")
    for boxes, colour, mark, shift in (
        ("own", "#0072B2", "o", -0.08), ("of another image", "#707070", "s", 0.08),
    ):  # fmt: skip
        own = [row for row in rows if row["boxes"] == boxes and row["head"] == "mean"]
        x = np.array([int(row["layer"]) for row in own]) + shift
        y = np.array([float(row["ratio"]) for row in own])
        bars = np.abs([[float(r[key]) for r in own] - y for key in ("low", "high")])
        label = "boxes of the object" if boxes == "own" else "control: boxes of another image"
        axes.errorbar(x, y, bars, fmt=mark, color=colour, capsize=3, markersize=6, label=label)
    single = [row for row in rows if row["head"] != "mean"]
    axes.plot(
        [int(row["layer"]) + 0.25 for row in single],
        [float(row["ratio"]) for row in single],
        "_", color="#D55E00", markersize=9, label="single heads",
    )  # fmt: skip
    axes.set_xlabel("decoder layer", fontsize=9)
    axes.set_ylabel("attention inside the box\nover that of a uniform map", fontsize=9)
    axes.set_xticks(sorted({int(row["layer"]) for row in rows}))
    axes.set_ylim(bottom=0)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=2, fontsize=8, frameon=False)
    figure.savefig(TARGET.with_suffix(".png"), metadata={TARGET.name: digest})


def main(images: int) -> None:
    """Measure, write the table, draw it."""
    matplotlib.use("Agg")
    rows = ratios(look(images))
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(text.getvalue())
    # A test compares this with the table: a picture of other figures does not pass.
    digest = hashlib.sha256(TARGET.read_bytes()).hexdigest()
    draw(list(csv.DictReader(text.getvalue().splitlines())), digest)
    print(f"wrote {TARGET.relative_to(TARGET.parents[3])} and {TARGET.stem}.png")


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else IMAGES)
