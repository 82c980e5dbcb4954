"""Draw the README's picture: three bundled images, and what base and methods say about them.

    python docs/make_pictures.py [METHOD ...]
    python docs/make_pictures.py --maps
    python docs/make_pictures.py --tokens
    python docs/make_pictures.py --carve
    python docs/make_pictures.py --pruning

Needs the extra `eval` (matplotlib). The images are the first three of the evaluation split on which
the plain model names an object that is not there; the methods' answers play no part in the choice.
With --maps it draws the picture of docs/maps.md instead: where the plain model looks in the first
bundled image as it predicts its first token and the objects that it names. With --carve it draws
that of docs/methods/carve.md: what CARVE makes of the first five bundled images of the evaluation
split, each asked about its smallest object. With --tokens it draws the first of docs/pruning.md:
what pruning methods keep of the first bundled image. With --pruning it draws the second, what that
costs in answers, from the committed runs, and writes the table that it draws from.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from generate import KEPT, kept_csv
from matplotlib.patches import Rectangle
from PIL import Image

import vlmfix
from vlmfix import emoji
from vlmfix.analysis.viz import draw_maps, draw_tokens, overlay
from vlmfix.chat import chat_inputs
from vlmfix.emoji.language import question
from vlmfix.evals.chair.objects import category_of, ground_truth, mentions
from vlmfix.evals.inputs.coco import CocoData

TARGET = Path(__file__).resolve().parent / "pictures" / "compare.png"
MAPS = TARGET.with_name("attention_map.png")
CARVED = TARGET.with_name("carve.png")
TOKENS = TARGET.with_name("kept_tokens.png")
PRUNING = ("hiprune", "visionzip", "divprune", "cluster", "ptp", "fastv", "uniform", "random")
PROMPT = "Please describe this image in detail."
IMAGES = 3
PRESENT, ABSENT, OTHER = "#1a7f37", "#cf222e", "#24292f"
DPI, SIZE, LINE = 110, 10, 0.14  # font size in points, height of a line in axes units


def main(methods: list[str]) -> None:
    """Ask every arm about every image and draw the answers."""
    matplotlib.use("Agg")
    data = CocoData(emoji.evaluation_split())
    truth = ground_truth(data)
    model, processor = vlmfix.load("emoji")
    arms = ["base", *methods]
    # The layout is fixed before any word is placed: words are placed by their drawn width.
    figure, axes = plt.subplots(
        IMAGES, len(arms) + 1, figsize=(3.4 * len(arms) + 1.9, 1.75 * IMAGES + 0.35), dpi=DPI,
        width_ratios=[0.5] + [1.0] * len(arms), squeeze=False,
    )  # fmt: skip
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.02, top=0.9, wspace=0.06, hspace=0.08)
    vlmfix.wrap(model, None)

    def answer(picture: Any, arm: str) -> str:
        content = [{"type": "image", "image": picture}, {"type": "text", "text": PROMPT}]
        chat = [{"role": "user", "content": content}]
        with vlmfix.using(model, None if arm == "base" else arm):
            text = vlmfix.generate(model, processor, chat, max_new_tokens=120, do_sample=False)
        return str(text)

    row = 0
    for image_id, name in sorted(data.files.items()):
        picture = data.image(name)
        if set(mentions(answer(picture, "base")).objects) <= truth[image_id]:
            continue
        axes[row][0].imshow(picture)
        axes[row][0].axis("off")
        for column, arm in enumerate(arms, start=1):
            title = arm if row == 0 else ""
            _caption(axes[row][column], answer(picture, arm), truth[image_id], title)
        row += 1
        if row == IMAGES:
            break
    figure.suptitle(
        "green: the object is there    red: it is not", fontsize=9, color=OTHER, y=0.995
    )
    TARGET.parent.mkdir(exist_ok=True)
    figure.savefig(TARGET)
    print(f"wrote {TARGET.relative_to(TARGET.parents[2])}")


def attention_picture() -> None:
    """Draw the attention to emoji:1, mean over layers and heads, of rows that predict a word."""
    model, processor = vlmfix.load("emoji")
    picture = vlmfix.load_image("emoji:1")
    content = [{"type": "image", "image": picture}, {"type": "text", "text": PROMPT}]
    inputs = chat_inputs(model, processor, [[{"role": "user", "content": content}]])
    generated = model.generate(**inputs, max_new_tokens=120, do_sample=False)
    ((seen,),) = vlmfix.attention_map(model, inputs, rows="answer", generated=generated)
    maps = seen.grids()[0].mean((0, 1))  # (answer tokens, rows, columns)
    written = generated[0, inputs["input_ids"].shape[1] :]
    words = [processor.decode(token).strip() for token in written]
    grids = {f"first token: “{words[0]}”": maps[0]}
    for piece in _pieces(processor.decode(written, skip_special_tokens=True)):
        if mentions(_bare(piece)).objects:
            grids[f"before “{_bare(piece)}”"] = maps[words.index(_bare(piece).split()[0])]
    draw_maps(picture, grids, MAPS)
    print(f"wrote {MAPS.relative_to(MAPS.parents[2])}")


def tokens_picture() -> None:
    """Draw what is left of emoji:1 if a quarter of its visual tokens stays."""
    model, processor = vlmfix.load("emoji")
    picture = vlmfix.load_image("emoji:1")
    content = [{"type": "image", "image": picture}, {"type": "text", "text": PROMPT}]
    inputs = chat_inputs(model, processor, [[{"role": "user", "content": content}]])
    masks = {}
    for name in PRUNING:
        ((kept,),) = vlmfix.visual_tokens(model, inputs, f"{name}:ratio=0.25", processor=processor)
        masks[name] = kept.masks()[0]
    draw_tokens(picture, masks, TOKENS)
    print(f"wrote {TOKENS.relative_to(TOKENS.parents[2])}")


def carve_picture() -> None:
    """Draw what CARVE finds when five images are asked about their smallest object."""
    matplotlib.use("Agg")
    data = CocoData(emoji.evaluation_split())
    with zipfile.ZipFile(emoji.evaluation_split()) as split:
        objects = json.loads(split.read("annotations/instances.json"))["annotations"]
    model, processor = vlmfix.load("emoji")
    asked, chats = [], []
    for image_id, name in sorted(data.files.items())[:5]:
        own = [item for item in objects if item["image_id"] == image_id]
        smallest = min(own, key=lambda item: item["area"])
        text = question(data.categories[smallest["category_id"]])
        image = data.image(name)
        content = [{"type": "image", "image": image}, {"type": "text", "text": text}]
        asked.append((image, text, smallest["bbox"]))
        chats.append([{"role": "user", "content": content}])
    with vlmfix.wrapped(model, "carve"):
        answers = vlmfix.generate(model, processor, chats, max_new_tokens=8, do_sample=False)
        found = vlmfix.last_call(model).pixels["carve"]
    figure, axes = plt.subplots(4, 5, figsize=(11, 9), dpi=80, layout="constrained")
    for axis in axes.ravel():
        axis.axis("off")
    for column, ((image, text, box), one, answer) in enumerate(
        zip(asked, found, answers, strict=True)
    ):
        dimmed = Image.composite(image, image.point(lambda v: v // 4), Image.fromarray(one.mask))
        rows = (image, overlay(image, one.scores), dimmed, one.refined)
        for axis, picture in zip(axes[:, column], rows, strict=True):
            axis.imshow(picture)
        left, top, right, bottom = one.box
        for axis, place, line in (
            (axes[0][column], (box[:2], *box[2:]), "dotted"),
            (axes[2][column], ((left, top), right - left - 1, bottom - top - 1), "solid"),
        ):
            axis.add_patch(Rectangle(*place, fill=False, edgecolor=ABSENT, linestyle=line, lw=1.5))
        axes[0][column].set_title(f"{text}\nat first {one.answer}, then {answer}", fontsize=8)
    figure.savefig(CARVED)
    print(f"wrote {CARVED.relative_to(CARVED.parents[2])}")


#: Panels: task, place, metric, what of it, title.
PANELS = (
    ("pope", "pooled", "accuracy", "value", "POPE accuracy, three splits"),
    ("chair", "caption", "recall", "value", "captions: recall of objects"),
    ("chair", "caption", "chair_i", "value", "captions: CHAIRi, less is better"),
    ("chair", "same_length", "chair_i", "delta", "CHAIRi over base, both cut to one length"),
)
#: Okabe and Ito's colours, which colour-blind readers can tell apart, and marks.
STYLES = {
    "hiprune": ("#D55E00", "o"),
    "visionzip": ("#0072B2", "s"),
    "divprune": ("#009E73", "D"),
    "cluster": ("#CC79A7", "^"),
    "ptp": ("#E69F00", "v"),
    "fastv": ("#56B4E9", "P"),
    "uniform": ("#000000", "X"),
    "random": ("#707070", "."),
}


def pruning_picture() -> None:
    """Draw what pruning costs in answers, and write the table of it."""
    matplotlib.use("Agg")
    KEPT.write_text(kept_csv())
    rows = list(csv.DictReader(KEPT.read_text().splitlines()))
    figure, panels = plt.subplots(2, 2, figsize=(11, 9.5), dpi=90, layout="constrained")
    for axes, (*what, key, title) in zip(panels.flat, PANELS, strict=True):
        chosen = [row for row in rows if [row["task"], row["place"], row["metric"]] == what]
        _kept(axes, chosen, key)
        axes.set_title(title, fontsize=10)
    figure.supylabel("per cent, the last panel in points", fontsize=9, color=OTHER)
    figure.supxlabel(
        "visual tokens kept, per cent of 64, log scale; bars: 95 % intervals; "
        "random: mean and range of three draws; grey: the plain model",
        fontsize=9, color=OTHER,
    )  # fmt: skip
    picture = KEPT.with_suffix(".png")
    # A test compares this with the table: a picture of other figures does not pass.
    digest = hashlib.sha256(KEPT.read_bytes()).hexdigest()
    figure.savefig(picture, metadata={KEPT.name: digest})
    print(f"wrote {KEPT.relative_to(TARGET.parents[2])} and {picture.name}")


def _kept(axes: Any, rows: list[dict[str, str]], key: str) -> None:
    """Draw a metric, or its difference to base, over the share of tokens, a line per method."""
    low, high = ("low", "high") if key == "value" else (f"{key}_low", f"{key}_high")

    def figures(name: str, key: str) -> np.ndarray:
        return np.array([100 * float(row[key]) for row in rows if row["method"] == name])

    base = 0.0
    if key == "value":
        base = figures("base", key).item()
        interval = [figures("base", end).item() for end in (low, high)]
        axes.axhspan(*interval, color="0.9", linewidth=0)
    axes.axhline(base, color="0.6", linewidth=0.8)
    ends = {}
    for place, (name, (color, mark)) in enumerate(STYLES.items()):
        shares, values = figures(name, "share"), figures(name, key)
        if name == "random":
            budgets = sorted(set(shares), reverse=True)
            draws = np.array([values[shares == share] for share in budgets])  # (budgets, draws)
            axes.fill_between(
                [100, *budgets], [base, *draws.min(1)], [base, *draws.max(1)], color=color,
                alpha=0.25, linewidth=0,
            )  # fmt: skip
            axes.plot([100, *budgets], [base, *draws.mean(1)], "--", color=color, linewidth=1.2)
            ends[name] = draws.mean(1)[-1]
            continue
        # Side by side, or the bars of one share would hide each other.
        x = shares * 1.02 ** (place - (len(STYLES) - 2) / 2)
        bars = np.abs([figures(name, low) - values, figures(name, high) - values])
        axes.plot([100, *x], [base, *values], color=color, linewidth=1)
        axes.errorbar(x, values, bars, fmt=mark, color=color, markersize=5, linewidth=1.2)
        ends[name] = values[-1]
    ticks = sorted({100.0, *figures("uniform", "share")})
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:.0f}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(106, 6.6)
    axes.tick_params(labelsize=8)
    axes.grid(axis="y", linewidth=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    bottom, top = axes.get_ylim()
    heights = _apart(list(ends.values()), 0.045 * (top - bottom))
    for (name, end), height in zip(ends.items(), heights, strict=True):
        axes.annotate(
            name, (ticks[0] / 1.09, end), (ticks[0] / 1.2, height), fontsize=9, va="center",
            color=STYLES[name][0], annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": STYLES[name][0], "linewidth": 0.6},
        )  # fmt: skip


def _apart(places: list[float], gap: float) -> np.ndarray:
    """The places, moved as little as it takes (least squares) to be a gap apart."""
    order = np.argsort(places)
    steps = gap * np.arange(len(places))
    rest = np.array(places)[order] - steps
    count = len(rest)
    # Isotonic regression by its min-max formula.
    level = [
        max(min(rest[i:j].mean() for j in range(k + 1, count + 1)) for i in range(k + 1))
        for k in range(count)
    ]
    moved = np.empty(count)
    moved[order] = level + steps
    return moved


def _caption(axis: Any, text: str, truth: frozenset[str], title: str) -> None:
    """Write a caption word by word, objects in colour."""
    axis.axis("off")
    axis.set_title(title, fontsize=10, loc="left", fontweight="bold")
    renderer = axis.figure.canvas.get_renderer()
    space = 0.4 * SIZE / 72 * DPI / axis.get_window_extent(renderer).width
    x, y = 0.0, 0.86
    for piece in _pieces(text):
        drawn = axis.text(
            x, y, piece, fontsize=SIZE, color=_colour(piece, truth), va="baseline",
            transform=axis.transAxes,
        )  # fmt: skip
        width = drawn.get_window_extent(renderer).transformed(axis.transAxes.inverted()).width
        if x + width > 1:
            x, y = 0.0, y - LINE
            drawn.set_position((x, y))
        x += width + space


def _pieces(text: str) -> list[str]:
    """Words of a text; the two words of an object such as "hot dog" stay together."""
    words = text.split()
    pieces: list[str] = []
    while words:
        pair = " ".join(words[:2])
        size = 2 if len(words) > 1 and len(mentions(_bare(pair)).words) == 1 and (
            " " in mentions(_bare(pair)).words[0]
        ) else 1  # fmt: skip
        pieces.append(" ".join(words[:size]))
        del words[:size]
    return pieces


def _bare(piece: str) -> str:
    return re.sub(r"[^\w\s]", "", piece)


def _colour(piece: str, truth: frozenset[str]) -> str:
    objects = mentions(_bare(piece)).objects
    if not objects:
        return OTHER
    return PRESENT if set(objects) <= {category_of().get(o, o) for o in truth} else ABSENT


if __name__ == "__main__":
    if sys.argv[1:] == ["--maps"]:
        attention_picture()
    elif sys.argv[1:] == ["--tokens"]:
        tokens_picture()
    elif sys.argv[1:] == ["--carve"]:
        carve_picture()
    elif sys.argv[1:] == ["--pruning"]:
        pruning_picture()
    else:
        main(sys.argv[1:] or ["vhr", "pai"])
