"""CHAIR: how many of the objects in a free description are not in the image.

Paper: Rohrbach et al. 2018 (arXiv 1809.02156). References: OPERA and PAI chair.py. Where we differ
from them: an image without ground truth raises instead of making every mention a hallucination; a
caption without objects gives 0.0 and a flag; shorter captions are compared at equal length too,
because cutting a caption always lowers CHAIR.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from vlmfix.errors import BadInput
from vlmfix.evals.chair_objects import ground_truth, mentions
from vlmfix.evals.coco import CocoData
from vlmfix.evals.metrics import Arm, Ratio, counts_table, summarise
from vlmfix.evals.pope_tables import QuestionTable, open_images
from vlmfix.evals.tasks import Answer, Column, Options, Sample

__all__ = ["PROMPT", "Chair", "first_words", "score_captions", "whole_sentences"]

PROMPT = "Please describe this image in detail."
SPLIT = "caption"

COUNTS = (
    "n",
    "hallucinated",
    "mentions",
    "hallucinated_mentions",
    "recalled",
    "truth",
    "distinct",
    "words",
    "tokens",
    "empty",
    "cut",
)
RATIOS = (
    Ratio("chair_s", {"hallucinated": 1}, {"n": 1}, proportion=True),
    Ratio("chair_i", {"hallucinated_mentions": 1}, {"mentions": 1}),
    Ratio("recall", {"recalled": 1}, {"truth": 1}),
    Ratio("precision", {"recalled": 1}, {"distinct": 1}),
    # 2PR/(P+R), where P and R share their numerator; undefined where both are 0.
    Ratio("f1", {"recalled": 2}, {"truth": 1, "distinct": 1}, defined_if=("recalled",)),
    Ratio("mentions_per_caption", {"mentions": 1}, {"n": 1}),
    Ratio("words", {"words": 1}, {"n": 1}),
    Ratio("tokens", {"tokens": 1}, {"n": 1}),
    Ratio("cut", {"cut": 1}, {"n": 1}, proportion=True),
)

_SENTENCE = re.compile(r"[^.!?]*[.!?]+[\"')\]]*\s*|[^.!?]+$")


def whole_sentences(caption: str) -> str:
    """The caption without a last sentence that does not end; all of it if there is no other."""
    sentences = _SENTENCE.findall(caption.strip())
    if len(sentences) > 1 and not re.search(r"[.!?][\"')\]]*\s*$", sentences[-1]):
        sentences.pop()
    return "".join(sentences).strip()


def first_words(caption: str, limit: int) -> str:
    """The whole sentences that fit into `limit` words; always at least the first sentence."""
    sentences = _SENTENCE.findall(caption.strip())
    kept, words = "", 0
    for sentence in sentences:
        words += len(sentence.split())
        if kept and words > limit:
            break
        kept += sentence
    return kept.strip()


def _count(caption: str | None, truth: frozenset[str], cut: bool = False) -> dict[str, float]:
    found = mentions(caption)
    distinct = set(found.objects)
    wrong = sum(name not in truth for name in found.objects)
    return {
        "n": 1,
        "hallucinated": wrong > 0,
        "mentions": len(found.objects),
        "hallucinated_mentions": wrong,
        "recalled": len(distinct & truth),
        "truth": len(truth),
        "distinct": len(distinct),
        "words": len((caption or "").split()),
        "tokens": found.tokens,
        "empty": not (caption or "").strip(),
        "cut": cut,
    }


def _arm(rows: Sequence[Mapping[str, float]]) -> Arm:
    return Arm(counts_table(rows, COUNTS), [not row["hallucinated"] for row in rows])


def score_captions(
    captions: Sequence[tuple[int, str | None]],
    truth: Mapping[int, frozenset[str] | set[str]],
    seed: int = 0,
) -> dict[str, Any]:
    """Score captions without any model.

    Args:
        captions: (image id, caption); several captions of one image count one by one.
        truth: image id -> its objects, as `chair_objects.ground_truth` gives them.
        seed: of the bootstrap.

    Returns:
        {"scores", "counts", "flags"} as `metrics.summarise` gives them for one arm.

    Raises:
        BadInput: captions of images without ground truth; the message lists them.
    """
    if absent := sorted({image for image, _ in captions} - set(truth)):
        raise BadInput(
            f"CHAIR: no ground truth for {len(absent)} images: {absent[:10]}: score the captions "
            "with the annotations of the images that they describe"
        )
    arm = _arm([_count(caption, frozenset(truth[image])) for image, caption in captions])
    images = [image for image, _ in captions]
    scored = summarise({"": arm}, COUNTS, RATIOS, [SPLIT] * len(images), images, seed=seed)
    entry: dict[str, Any] = scored[""]
    return entry


class Chair:
    """The CHAIR task: one description per image."""

    name = "chair"
    max_new_tokens = 512
    columns = (
        Column("chair_s", "CHAIRs", tested=True),
        Column("chair_i", "CHAIRi"),
        Column("recall", "recall"),
        Column("words", "words", percent=False, delta=False),
    )

    wants_p_yes = False
    open = staticmethod(open_images)

    def __init__(self, data: CocoData | QuestionTable, options: Options) -> None:
        if not isinstance(data, CocoData):
            raise BadInput(
                f"CHAIR needs annotated images, and {data.name} holds questions: pass a folder or "
                ".zip in COCO format with --data"
            )
        if options.truncate not in ("none", "sentence"):
            raise BadInput(f"truncate={options.truncate!r}: choose 'none' or 'sentence'")
        self._data, self._options = data, options
        self._truth = ground_truth(data)
        ids, number = sorted(data.files), options.n_images
        if number is not None and number > len(ids):
            raise BadInput(
                f"CHAIR: {number} images wanted, but {data.source} has {len(ids)}: ask for fewer "
                "(n_images=) or for all of them (n_images=None)"
            )
        self._images = ids if number is None else random.Random(options.seed).sample(ids, number)

    @property
    def partial(self) -> bool:
        """Whether the limit left out images."""
        limit = self._options.limit
        return limit is not None and limit < len(self._images)

    @cached_property
    def samples(self) -> list[Sample]:
        """One sample per selected image."""
        return [
            Sample(
                task=self.name,
                split=SPLIT,
                sample_id=str(image),
                image=self._data.files[image],
                image_id=image,
                prompt=PROMPT,
                target=sorted(self._truth[image]),
            )
            for image in self._images[: self._options.limit]
        ]

    @property
    def facts(self) -> dict[str, Any]:
        """Prompt, extraction engine and truncation rule."""
        return {
            "prompt": PROMPT,
            "engine": "builtin",
            "truncate": self._options.truncate,
            "ground_truth": "instances+captions" if self._data.captions else "instances",
        }

    def _caption(self, answer: Answer) -> str:
        if self._options.truncate == "sentence" and answer.finish == "length":
            return whole_sentences(answer.text)
        return answer.text

    def parse(self, sample: Sample, answer: Answer) -> tuple[dict[str, list[str]], bool]:
        """The objects named, those of them that are not there, and whether there are none."""
        objects = mentions(self._caption(answer)).objects
        wrong = [name for name in objects if name not in sample.target]
        return {"objects": list(objects), "hallucinated": wrong}, not wrong

    def score(
        self,
        samples: Sequence[Sample],
        arms: Mapping[str, Sequence[Answer]],
        draws: Sequence[int] | None = None,
    ) -> dict[str, Any]:
        """Scores of the captions as they are, and of each method against base at equal length."""
        captions = {arm: [self._caption(a) for a in answers] for arm, answers in arms.items()}
        cut = {arm: [a.finish == "length" for a in answers] for arm, answers in arms.items()}
        result = self._score(samples, captions, cut, draws)
        base, *methods = arms
        for method in methods:
            pair = {base: captions[base], method: captions[method]}
            both = zip(*pair.values(), strict=True)
            limits = [min(len(caption.split()) for caption in two) for two in both]
            matched = {
                arm: [first_words(c, limit) for c, limit in zip(texts, limits, strict=True)]
                for arm, texts in pair.items()
            }
            scored = self._score(samples, matched, {arm: cut[arm] for arm in pair}, draws)
            result[method]["matched_length"] = {
                "base": scored[base]["scores"],
                "method": scored[method]["scores"],
                "delta": scored[method]["delta"],
            }
        return result

    def _score(
        self,
        samples: Sequence[Sample],
        captions: Mapping[str, Sequence[str]],
        cut: Mapping[str, Sequence[bool]],
        draws: Sequence[int] | None,
    ) -> dict[str, Any]:
        truths = [frozenset(sample.target) for sample in samples]
        scored = {
            arm: _arm([_count(*row) for row in zip(texts, truths, cut[arm], strict=True)])
            for arm, texts in captions.items()
        }
        splits, images = [s.split for s in samples], [s.image for s in samples]
        seed = self._options.seed
        return summarise(scored, COUNTS, RATIOS, splits, images, seed=seed, draws=draws)
