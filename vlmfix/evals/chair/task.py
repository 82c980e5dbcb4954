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
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from vlmfix.errors import BadInput
from vlmfix.evals.chair.files import (
    choose_captions,
    image_id_of,
    last_captions,
    read_image_ids,
)
from vlmfix.evals.chair.objects import ground_truth, named_objects, require_engine
from vlmfix.evals.inputs.coco import CocoData
from vlmfix.evals.inputs.rows import Row
from vlmfix.evals.pope.tables import QuestionTable, open_images
from vlmfix.evals.scoring.metrics import Arm, Ratio, counts_table, summarise
from vlmfix.evals.tasks import Answer, Column, Options, Sample, Task

__all__ = [
    "LENGTH_CAPS",
    "PROMPT",
    "Chair",
    "first_words",
    "score_answers",
    "score_captions",
    "whole_sentences",
]

PROMPT = "Please describe this image in detail."
#: Words to which captions are cut, to show how CHAIRi and recall grow with length.
LENGTH_CAPS = (64, 128)
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
    ends = caption.count(".") + caption.count("!") + caption.count("?")
    if len(caption.split()) + ends <= limit:  # a sentence may begin in a word, as in 3.5
        return caption.strip()
    sentences = _SENTENCE.findall(caption.strip())
    kept, words = "", 0
    for sentence in sentences:
        words += len(sentence.split())
        if kept and words > limit:
            break
        kept += sentence
    return kept.strip()


def _count(
    caption: str | None,
    truth: frozenset[str],
    cut: bool = False,
    engine: str = "builtin",
    mode: str = "compat",
) -> dict[str, float]:
    objects, tokens = named_objects(caption, engine, mode)
    distinct = set(objects)
    wrong = len([name for name in objects if name not in truth])
    return {
        "n": 1,
        "hallucinated": wrong > 0,
        "mentions": len(objects),
        "hallucinated_mentions": wrong,
        "recalled": len(distinct & truth),
        "truth": len(truth),
        "distinct": len(distinct),
        "words": len((caption or "").split()),
        "tokens": tokens,
        "empty": not (caption or "").strip(),
        "cut": cut,
    }


def _arm(rows: Sequence[Mapping[str, float]]) -> Arm:
    return Arm(counts_table(rows, COUNTS), [not row["hallucinated"] for row in rows])


def score_captions(
    captions: Sequence[tuple[int, str | None]],
    truth: Mapping[int, frozenset[str] | set[str]],
    seed: int = 0,
    engine: str = "builtin",
    mode: str = "compat",
) -> dict[str, Any]:
    """Score captions without any model.

    Args:
        captions: (image id, caption); several captions of one image count one by one.
        truth: image id -> its objects, as `chair_objects.ground_truth` gives them.
        seed: of the bootstrap.
        engine: finds the objects in captions, a key of `chair_objects.ENGINES`.
        mode: "compat", or "fixed" for repaired rules.

    Returns:
        {"scores", "counts", "flags"} as `metrics.summarise` gives them for one arm.

    Raises:
        BadInput: captions of images without ground truth; the message lists them.
        MissingDependency: as `chair_objects.require_engine`.
    """
    require_engine(engine, mode)
    if absent := sorted({image for image, _ in captions} - set(truth)):
        raise BadInput(
            f"CHAIR: no ground truth for {len(absent)} images: {absent[:10]}: score the captions "
            "with the annotations of the images that they describe"
        )
    rows = [
        _count(caption, frozenset(truth[image]), engine=engine, mode=mode)
        for image, caption in captions
    ]
    images = [image for image, _ in captions]
    scored = summarise({"": _arm(rows)}, COUNTS, RATIOS, [SPLIT] * len(images), images, seed=seed)
    entry: dict[str, Any] = scored[""]
    return entry


def score_answers(
    questions: CocoData | Mapping[int, frozenset[str] | set[str]],
    answers: Sequence[Row | Mapping[str, Any]],
    engine: str = "builtin",
    mode: str = "compat",
    truncate: str = "none",
    repeats: str = "last",
    image_ids: str | Path | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Score the captions of any project without any model.

    Args:
        questions: the annotated images, or image id -> its objects.
        answers: rows with `image_id` (or `image`) and `caption` (or `response`, `answer`, `text`).
        engine: finds the objects in captions, a key of `chair_objects.ENGINES`.
        mode: "compat", or "fixed" for repaired rules.
        truncate: "sentence" drops a last sentence that does not end.
        repeats: several captions of one image, as files have them to which a script was run twice:
            the "last" counts and a warning says so, or "all" do.
        image_ids: file of the images that must have captions, no others; None: those that have.
        seed: of the bootstrap.

    Returns:
        As `score_captions`, with "engine", "mode", "n_images" and "repeated", the number of
        captions left out.

    Raises:
        BadInput: rows that cannot be read, captions without ground truth, images without caption.
        MissingDependency: as `chair_objects.require_engine`.
    """
    used = require_engine(engine, mode)
    _check_truncate(truncate)
    captions = choose_captions(answers, repeats)
    repeated = len(answers) - len(captions)
    if image_ids is not None:
        wanted = read_image_ids(image_ids)
        described = {image for image, _ in captions}
        if missing := [image for image in wanted if image not in described]:
            raise BadInput(
                f"CHAIR: {len(missing)} of {len(wanted)} images have no caption: {missing[:10]}"
            )
        chosen = set(wanted)
        captions = [(image, caption) for image, caption in captions if image in chosen]
    images = list(dict.fromkeys(image for image, _ in captions))
    truth: Mapping[int, frozenset[str] | set[str]]
    if isinstance(questions, CocoData):
        known = [image for image in images if image in questions.objects]
        truth = ground_truth(questions, known, engine, mode)
    else:
        truth = questions
    if truncate == "sentence":
        captions = [(image, whole_sentences(caption)) for image, caption in captions]
    return {
        **score_captions(captions, truth, seed, engine, mode),
        "engine": used,
        "mode": mode,
        "n_images": len(images),
        "repeated": repeated,
    }


def _check_truncate(truncate: str) -> None:
    if truncate not in ("none", "sentence"):
        raise BadInput(f"truncate={truncate!r}: choose 'none' or 'sentence'")


class Chair(Task):
    """The CHAIR task: one description per image."""

    name = "chair"
    max_new_tokens = 512
    columns = (
        Column("chair_s", "CHAIRs", tested=True),
        Column("chair_i", "CHAIRi"),
        Column("recall", "recall"),
        Column("words", "words", percent=False, delta=False),
    )

    open = staticmethod(open_images)

    def __init__(self, data: CocoData | QuestionTable, options: Options) -> None:
        if not isinstance(data, CocoData):
            raise BadInput(
                f"CHAIR needs annotated images, and {data.name} holds questions: pass a folder or "
                ".zip in COCO format with --data"
            )
        super().__init__(data, options)
        _check_truncate(options.truncate)
        self._engine = require_engine(options.chair_engine, options.chair_mode)
        self.images = _choose_images(data, options)
        engine, mode = options.chair_engine, options.chair_mode
        self._truth = ground_truth(data, self.images[: options.limit], engine, mode)

    @cached_property
    def samples(self) -> list[Sample]:
        """One sample per selected image."""
        return [
            Sample(
                task=self.name,
                split=SPLIT,
                sample_id=str(image),
                image=self.data.files[image],
                image_id=image,
                prompt=PROMPT,
                target=sorted(self._truth[image]),
            )
            for image in self.images[: self.options.limit]
        ]

    @property
    def facts(self) -> dict[str, Any]:
        """Prompt, extraction engine and truncation rule."""
        return {
            "prompt": PROMPT,
            "engine": self._engine,
            "mode": self.options.chair_mode,
            "truncate": self.options.truncate,
            "ground_truth": "instances+captions" if self.data.captions else "instances",
        }

    @classmethod
    def load_answers(cls, path: str | Path) -> list[Row]:
        """Captions; of several for one image the last counts, with a warning."""
        return last_captions(super().load_answers(path))

    @staticmethod
    def answer_key(row: Row) -> int:
        """The id of the described image."""
        return image_id_of(row.first("image_id", "image"), row.where)

    @classmethod
    def open_answered(
        cls, rows: Sequence[Row], source: str, annotations: str | Path | None, options: Options
    ) -> tuple[Any, Options]:
        """Captions are scored of the images that they describe."""
        data, options = super().open_answered(rows, source, annotations, options)
        return data, replace(options, image_ids=list(dict.fromkeys(map(cls.answer_key, rows))))

    def _caption(self, answer: Answer) -> str:
        if self.options.truncate == "sentence" and answer.finish == "length":
            return whole_sentences(answer.text)
        return answer.text

    def parse(self, sample: Sample, answer: Answer) -> tuple[dict[str, list[str]], bool]:
        """The objects named, those of them that are not there, and whether there are none."""
        engine, mode = self.options.chair_engine, self.options.chair_mode
        objects, _ = named_objects(self._caption(answer), engine, mode)
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
        for cap in LENGTH_CAPS:
            short = {arm: [first_words(c, cap) for c in texts] for arm, texts in captions.items()}
            if short != captions:
                scored = self._score(samples, short, cut, draws)
                for arm in arms:
                    result[arm].setdefault("length_caps", {})[str(cap)] = scored[arm]["scores"]
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
        engine, mode = self.options.chair_engine, self.options.chair_mode
        scored = {
            arm: _arm(
                [
                    _count(caption, truth, limited, engine, mode)
                    for caption, truth, limited in zip(texts, truths, cut[arm], strict=True)
                ]
            )
            for arm, texts in captions.items()
        }
        splits, images = [s.split for s in samples], [s.image for s in samples]
        seed = self.options.seed
        return summarise(scored, COUNTS, RATIOS, splits, images, seed=seed, draws=draws)


def _choose_images(data: CocoData, options: Options) -> list[int]:
    """Ids of the images to describe: those of a file, or drawn among all."""
    if options.image_ids is not None:
        given, source = options.image_ids, "the list of images"
        if isinstance(given, (str, Path)):
            given, source = read_image_ids(given), str(given)
        wanted = list(given)
        if strange := [image for image in wanted if image not in data.files]:
            raise BadInput(
                f"CHAIR: {source} names {len(strange)} images that {data.source} does not list: "
                f"{strange[:10]}"
            )
        return wanted
    ids, number = sorted(data.files), options.n_images
    if number is not None and number > len(ids):
        raise BadInput(
            f"CHAIR: {number} images wanted, but {data.source} has {len(ids)}: ask for fewer "
            "(n_images=) or for all of them (n_images=None)"
        )
    return ids if number is None else random.Random(options.seed).sample(ids, number)
