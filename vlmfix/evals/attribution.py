"""Which attention heads write words for things that are not there: `vlmfix attribute`.

The model describes images; every object that it names is present or hallucinated by CHAIR's ground
truth. Then each head is switched off (zero-ablation) and the same answers are read again: where
the log-probability of a word falls, the head was for it. Yang, Li, Cao, Xu: "Understanding and
Mitigating Hallucination in Large Vision-Language Models via Modular Attribution and Intervention",
ICLR 2025, OpenReview Bjq4W7P2Us, finds the heads of AD-HH so; how it weighs hallucinated against
correct words is our reading: the difference of the two means.
"""

from __future__ import annotations

import csv
import math
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from vlmfix import machine
from vlmfix.analysis.calibrate import calibration_path, load_calibration, store
from vlmfix.analysis.teacher_forcing import answer_greedily
from vlmfix.base.attention import AttentionMethod, Keys, Plan
from vlmfix.chat import chat_inputs
from vlmfix.errors import BadInput
from vlmfix.evals.chair.objects import ground_truth
from vlmfix.evals.chair.task import PROMPT
from vlmfix.evals.chair.tokens import Mention, find_mentions
from vlmfix.evals.inputs.coco import CocoData
from vlmfix.evals.options import positive, usable_seed
from vlmfix.evals.reporting.head_plots import layer_head_map, require_matplotlib
from vlmfix.evals.running.files import write_json
from vlmfix.evals.running.lock import locked
from vlmfix.evals.running.progress import progress_bar
from vlmfix.evals.running.store import output_folder
from vlmfix.evals.scoring.stats import LEVEL, Resamples, percentile_interval
from vlmfix.families import ModelInfo, describe_model
from vlmfix.wrapper import using, wrapped

__all__ = ["Contrast", "ZeroHead", "attribute", "contrast"]

Floats = NDArray[np.float64]

#: 20 of the 1,024 heads of LLaVA-1.5-7B and 35 of the 1,600 of 13B are published: 2 % of them.
DEFAULT_TOP = 0.02


@dataclass(frozen=True)
class ZeroHead(AttentionMethod):
    """Switch one attention head off: its output is zero in every row, before `o_proj`."""

    layer: int
    head: int
    num_heads: int

    name: ClassVar[str] = "zero_head"

    def layers(self, info: ModelInfo) -> Sequence[int]:
        return (self.layer,)

    def plan(self, keys: Keys) -> Plan | None:
        factors = torch.ones(len(keys.kinds), self.num_heads, device=keys.kinds.device)
        factors[:, self.head] = 0
        return Plan({}, [True] * len(factors), heads=factors)


@dataclass(frozen=True)
class Contrast:
    """Influence on hallucinated against present words, by head; arrays (F,).

    Attributes:
        hallucinated: mean influence on hallucinated words.
        present: mean influence on words for what is there.
        score: their difference.
        low, high: 95 % interval of the score, bootstrap over images, each head for itself.
        distinct: whether the score differs from 0 when all heads are looked at together: 0 is
            outside the band that holds all heads' scores at once with 95 % (max-t bootstrap).
    """

    hallucinated: Floats
    present: Floats
    score: Floats
    low: Floats
    high: Floats
    distinct: NDArray[np.bool_]


def contrast(
    influence: Floats,
    hallucinated: Sequence[bool] | NDArray[np.bool_],
    images: Sequence[object],
    seed: int = 0,
) -> Contrast:
    """Compare the influence of heads on hallucinated and on present words.

    Max-t: Westfall and Young 1993, chapter 2, for a band instead of p values.

    Args:
        influence: (mentions, F).
        hallucinated: (mentions,).
        images: (mentions,), the image of each, the cluster of the bootstrap.
        seed: of the bootstrap.

    Raises:
        BadInput: words of a kind come from fewer than two images, so that nothing can be compared.
    """
    wrong = np.asarray(hallucinated, dtype=bool)
    for kind, chosen in (("hallucinated", wrong), ("present", ~wrong)):
        places = {image for image, is_kind in zip(images, chosen, strict=True) if is_kind}
        if len(places) < 2:
            raise BadInput(
                f"the answers name {int(chosen.sum())} {kind} objects, in {len(places)} images, of "
                f"{len(wrong)} objects named in all; a comparison needs both kinds, each in two "
                "images or more. Describe more images (--limit)."
            )
    kinds = np.stack((wrong, ~wrong), axis=1).astype(np.float64)  # (M, 2)
    counts = np.concatenate((kinds[:, :, None], kinds[:, :, None] * influence[:, None]), axis=2)
    totals = counts.sum(0)
    means = totals[:, 1:] / totals[:, :1]
    sums = Resamples(images, seed=seed).sums(counts)  # (R, 2, 1 + F)
    sums = sums[(sums[:, :, 0] > 0).all(1)]  # a resample without one kind has no difference
    replicates = sums[:, 0, 1:] / sums[:, 0, :1] - sums[:, 1, 1:] / sums[:, 1, :1]
    score = means[0] - means[1]
    intervals = np.array([percentile_interval(column) for column in replicates.T])
    error = replicates.std(0, ddof=1)
    scale = np.where(error > 0, error, np.inf)  # a head without any influence never varies
    widest = (np.abs(replicates - score) / scale).max(1)
    band = float(np.quantile(widest, LEVEL))
    return Contrast(
        hallucinated=means[0],
        present=means[1],
        score=score,
        low=intervals[:, 0],
        high=intervals[:, 1],
        distinct=np.abs(score) > band * np.where(error > 0, error, np.inf),
    )


def attribute(
    model: Any,
    processor: Any,
    data: str | Path | CocoData | None = None,
    *,
    name: str | None = None,
    limit: int = 200,
    top: float = DEFAULT_TOP,
    output: str | Path | None = None,
    overwrite: bool = False,
    save: bool = False,
    beside: bool = False,
    batch_size: int = 32,
    max_new_tokens: int = 512,
    seed: int = 0,
    quiet: bool = False,
) -> dict[str, Any]:
    """Find the hallucination heads of a model by zero-ablation.

    Costs one generate call and 1 + layers x heads forwards per batch of images.

    Args:
        model: a supported VLM in eval mode, not wrapped.
        processor: its processor.
        data: COCO-format folder or .zip; None draws the tuning split of EmojiCOCO. Do not take
            images that the heads are evaluated on later.
        name: how the results call the model.
        limit: images to describe; of more, a seeded choice.
        top: how many heads are hallucination heads: a number of heads from 1, or a share below 1.
            Only heads with a positive score are taken.
        output: folder for results.json, heads.csv and heads.png; None makes one under runs/.
        overwrite: replace the results that `output` already holds.
        save: keep the heads in the model's calibration, where `ad_hh` finds them.
        beside: keep them in the model's own folder instead.
        batch_size: images per forward.
        max_new_tokens: longest description.
        seed: of the choice of images and of the bootstrap.
        quiet: no progress bar.

    Returns:
        What results.json holds.

    Raises:
        BadInput: options, data or an output folder that cannot be used, another run in that folder;
            too few images; answers that do not name both kinds of objects. Nothing has been
            written then.
        MissingDependency: matplotlib is not installed.
        StateError: the model is wrapped, or in training mode.
        UnsupportedModel: see `teacher_forcing.answer_greedily`.
    """
    require_matplotlib()
    positive(limit=limit, batch_size=batch_size, max_new_tokens=max_new_tokens)
    usable_seed(seed)
    info = describe_model(model)
    layers = sorted(info.attention)
    pairs = [(layer, head) for layer in layers for head in range(info.heads_of(layer))]
    wanted = _how_many(top, len(pairs))
    if save or beside:  # what could fail at the end fails now
        calibration_path(model, beside=beside)
        load_calibration(model)
    started = datetime.now(UTC)
    title = name or str(getattr(model, "name_or_path", "") or type(model).__name__)
    folder = output_folder(output, overwrite, started, ("attribute",), title)
    with locked(folder):
        # Another run may have filled it since.
        output_folder(folder, overwrite, started, ("attribute",), title)
        with tempfile.TemporaryDirectory() as scratch:
            opened = (
                data if isinstance(data, CocoData) else CocoData(data or _tuning(scratch, limit))
            )
            images = _choice(opened, limit, seed)
            batches = [images[at : at + batch_size] for at in range(0, len(images), batch_size)]
            with progress_bar(len(batches) * (1 + len(pairs)), quiet) as advance:
                seen = _measure(model, processor, opened, batches, pairs, max_new_tokens, advance)
            facts = {"data": opened.source.name, "data_sha256": opened.sha256}
        wrong = np.array([mention.hallucinated for mention in seen.mentions], dtype=bool)
        by_head = contrast(seen.influence, wrong, seen.images, seed)
        order = sorted(range(len(pairs)), key=lambda at: -by_head.score[at])
        heads = [_entry(pairs[at], by_head, at) for at in order]
        chosen = [row for row in heads if row["score"] > 0][:wanted]
        results: dict[str, Any] = {
            "format": 1,
            "config": {
                "model": title,
                "model_class": type(model).__name__,
                "dtype": str(model.dtype).removeprefix("torch."),
                **facts,
                "prompt": PROMPT,
                "max_new_tokens": max_new_tokens,
                "limit": limit,
                "batch_size": batch_size,
                "seed": seed,
                "top": top,
                "machine": machine.facts(str(model.device)),
            },
            "n_images": len(images),
            "n_mentions": len(wrong),
            "n_hallucinated": int(wrong.sum()),
            # Words of which a model is less sure may lose more under any disturbance.
            "log_probability": {
                "hallucinated": float(seen.plain[wrong].mean()),
                "present": float(seen.plain[~wrong].mean()),
            },
            "agreement": seen.agreement,
            "forwards": len(batches) * (1 + len(pairs)),
            "seconds": round((datetime.now(UTC) - started).total_seconds(), 1),
            "n_distinct": int(by_head.distinct.sum()),
            "hallucination_heads": [[row["layer"], row["head"]] for row in chosen],
            "heads": heads,
        }
        _write(results, folder, info)
        if save or beside:
            kept = tuple((row["layer"], row["head"]) for row in chosen)
            results["calibration"] = store(model, beside=beside, hallucination_heads=kept).path
        return results


@dataclass(frozen=True)
class _Measured:
    """What the ablations gave: M mentions, F heads.

    Attributes:
        mentions: (M,).
        images: (M,), id of the image of each.
        plain: (M,), log-probability of each word by the plain model.
        influence: (M, F), what it loses without each head.
        agreement: see `teacher_forcing.ForcedAnswers`, over all answers.
    """

    mentions: list[Mention]
    images: list[int]
    plain: Floats
    influence: Floats
    agreement: float


def _measure(
    model: Any,
    processor: Any,
    data: CocoData,
    batches: Sequence[Sequence[int]],
    pairs: Sequence[tuple[int, int]],
    max_new_tokens: int,
    advance: Callable[[int, str], None],
) -> _Measured:
    """Describe images and switch the heads `pairs` off one by one, batch by batch."""
    truth = ground_truth(data)
    data.require_images([data.files[image] for batch in batches for image in batch])
    tokenizer = getattr(processor, "tokenizer", processor)
    info = describe_model(model)
    found: list[Mention] = []
    images: list[int] = []
    plain: list[Floats] = []
    lost: list[Floats] = []
    predicted = tokens = 0.0
    with wrapped(model, None):
        for batch in batches:
            prompt = chat_inputs(model, processor, [_chat(data, image) for image in batch])
            forced = answer_greedily(model, prompt, max_new_tokens)
            named = find_mentions(forced.answers, [truth[image] for image in batch], tokenizer)
            found += named
            images += [batch[mention.answer] for mention in named]
            plain.append(_words(forced.log_probabilities, named))
            written = sum(map(len, forced.answers))
            predicted, tokens = predicted + forced.agreement * written, tokens + written
            advance(1, "describing")
            columns = []
            for layer, head in pairs:
                with using(model, ZeroHead(layer, head, info.heads_of(layer))):
                    columns.append(plain[-1] - _words(forced.read(model), named))
                advance(1, "switching heads off")
            lost.append(np.stack(columns, axis=1))
    return _Measured(found, images, np.concatenate(plain), np.concatenate(lost), predicted / tokens)


def _how_many(top: float, heads: int) -> int:
    """How many heads `top` asks for; at least one."""
    if not (0 < top < 1 or (top >= 1 and top == int(top) and top <= heads)):
        raise BadInput(f"top={top:g}: give a number of heads, 1 to {heads}, or a share below 1")
    return max(1, round(top * heads)) if top < 1 else int(top)


def _tuning(folder: str, limit: int) -> Path:
    from vlmfix.emoji.dataset import write_split

    path = Path(folder) / "emoji_tuning.zip"
    write_split(path, "tuning", limit)
    return path


def _choice(data: CocoData, limit: int, seed: int) -> list[int]:
    ids = sorted(data.files)
    if limit > len(ids):
        raise BadInput(f"{limit} images wanted, but {data.source} has {len(ids)}: ask for fewer")
    return sorted(random.Random(seed).sample(ids, limit))


def _chat(data: CocoData, image: int) -> list[dict[str, Any]]:
    picture = data.image(data.files[image])
    content = [{"type": "image", "image": picture}, {"type": "text", "text": PROMPT}]
    return [{"role": "user", "content": content}]


def _words(scores: Sequence[torch.Tensor], named: Sequence[Mention]) -> Floats:
    """Log-probability of each word: the sum over its tokens."""
    rows = [row.double().cpu().numpy() for row in scores]
    return np.array([rows[mention.answer][list(mention.tokens)].sum() for mention in named])


def _entry(pair: tuple[int, int], by_head: Contrast, at: int) -> dict[str, Any]:
    return {
        "layer": pair[0],
        "head": pair[1],
        "score": float(by_head.score[at]),
        "low": float(by_head.low[at]),
        "high": float(by_head.high[at]),
        "distinct": bool(by_head.distinct[at]),
        "hallucinated": float(by_head.hallucinated[at]),
        "present": float(by_head.present[at]),
    }


def _write(results: dict[str, Any], folder: Path, info: ModelInfo) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    scores = np.full((info.num_layers, info.num_heads), math.nan)
    for row in results["heads"]:
        scores[row["layer"], row["head"]] = row["score"]
    layer_head_map(
        scores,
        f"{results['config']['model']}: loss without a head, hallucinated minus present words",
        folder / "heads.png",
        "score (nats)",
        symmetric=True,
        marked=results["hallucination_heads"],
    )
    with (folder / "heads.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(results["heads"][0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(results["heads"])
    write_json(folder / "results.json", results)
    results["output"] = str(folder)
