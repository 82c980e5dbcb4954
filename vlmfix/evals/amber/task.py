"""AMBER as a whole: files of answers, scored without a model, and the AMBER score.

Paper: Wang et al. 2023 (arXiv 2311.07397): AMBER score = (100 - CHAIR + F1) / 2, in percent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from vlmfix.errors import BadInput
from vlmfix.evals.amber import discriminative as amber_discriminative
from vlmfix.evals.amber import generative as amber_generative
from vlmfix.evals.amber.data import GENERATIVE, AmberData, AmberItem, answer_key
from vlmfix.evals.amber.discriminative import (
    F1,
    AmberDiscriminative,
    question_counts,
    score_questions,
)
from vlmfix.evals.amber.generative import (
    CHAIR,
    AmberGenerative,
    description_counts,
    score_descriptions,
)
from vlmfix.evals.amber.objects import Objects, Similarity, get_similarity, nouns, read_objects
from vlmfix.evals.inputs.pairing import answer_text, located, pair
from vlmfix.evals.inputs.parsers import Parser, get_parser
from vlmfix.evals.inputs.rows import Row, short
from vlmfix.evals.scoring.groups import by_draw
from vlmfix.evals.scoring.metrics import estimate
from vlmfix.evals.scoring.stats import Floats, Resamples
from vlmfix.evals.tasks import Answer, Column, Options, Sample, Task

__all__ = ["Amber", "answer_key", "score_answers"]

T = TypeVar("T")


def score_answers(
    questions: AmberData,
    answers: Sequence[Row | Mapping[str, Any]],
    parser: str = "official",
    similarity: str | Similarity = "exact",
    seed: int = 0,
) -> dict[str, Any]:
    """Score descriptions, answers to questions, or both; a part that is begun must be whole.

    Args:
        questions: annotations, and associations where descriptions are scored.
        answers: rows with `id` (or `sample_id`) and `response`. A description may bring its `nouns`
            (base forms, case kept, in order), from any tagger; NLTK finds them otherwise.
        parser: of questions, a key of `parsers.PARSERS`.
        similarity: of nouns, as `amber_objects.get_similarity` takes it.
        seed: of the bootstrap.

    Returns:
        {"scores", "counts", "flags"} as `metrics.summarise` gives them for one arm, with the places
        "generative" and those of `amber_data.GROUPS`, and "amber" for the AMBER score, from 0 to 1,
        where both parts are there; "compat": place -> what the official script prints, in percent;
        "strict": the questions by the strict parser; "n_unparsed"; "clusters": what the bootstrap
        draws.

    Raises:
        BadInput: answers that are missing, repeated, or to no question; no such parser.
        MissingDependency: what nouns or their similarity need is not installed.
    """
    rule, alike = get_parser(parser), get_similarity(similarity)
    rows = located(answers, "AMBER answers")
    numbers = {answer_key(row) for row in rows}
    begun = {questions.items[n].dimension == GENERATIVE for n in numbers & set(questions.items)}
    # Without any answer to a known item, pairing with everything says what is wrong.
    items = [
        i for i in questions.items.values() if not begun or (i.dimension == GENERATIVE) in begun
    ]
    found = pair([item.number for item in items], rows, answer_key, "AMBER answers")
    paired = list(zip(items, found, strict=True))
    described = [(item, row) for item, row in paired if item.dimension == GENERATIVE]
    asked = [(item, row) for item, row in paired if item.dimension != GENERATIVE]
    read = [(answer_text(row), _objects(item, row, questions, alike)) for item, row in described]
    pictures = [questions.picture(item.number) for item, _ in asked]
    known = None not in pictures
    entry: dict[str, Any] = _score(
        _Part({"": read}, [item for item, _ in described]),
        _Part({"": [answer_text(row) for _, row in asked]}, [item for item, _ in asked]),
        [questions.picture(item.number) for item, _ in described],
        pictures if known else [f"question {item.number}" for item, _ in asked],
        rule,
        seed,
    )[""]
    return {
        **entry,
        "parser": parser,
        "similarity": similarity if isinstance(similarity, str) else "callback",
        "clusters": "picture" if known else "question (the folder has no query for some)",
    }


def _objects(
    item: AmberItem, row: Row, questions: AmberData, similarity: Similarity | None
) -> Objects:
    words = row.first("nouns")
    if words is None:
        words = nouns(answer_text(row))
    elif not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise BadInput(f"{row.where}: `nouns` is {short(words)}, which is no list of words")
    return read_objects(words, item.truth, item.hallucinations, questions.lexicon, similarity)


@dataclass(frozen=True)
class _Part(Generic[T]):
    """One of the two parts: what every arm answered, to which items, under which seeds."""

    arms: Mapping[str, Sequence[T]]
    items: Sequence[AmberItem]
    draws: Sequence[int] | None = None


def _score(
    described: _Part[tuple[str, Objects]],
    asked: _Part[str],
    described_pictures: Sequence[object],
    asked_pictures: Sequence[object],
    parser: Parser,
    seed: int,
) -> dict[str, Any]:
    """Arm -> the scores of both parts, of the one that is there, and the AMBER score."""
    labels = [item.label for item in asked.items]
    dimensions = [item.dimension for item in asked.items]
    result: dict[str, Any] = {
        arm: {"scores": {}, "counts": {}, "flags": [], "compat": [], "n_unparsed": 0}
        for arm in asked.arms
    }
    found = {}
    if described.items and asked.items:
        _add_amber_score(
            result,
            {
                arm: description_counts(read, described.items)
                for arm, read in described.arms.items()
            },
            {arm: question_counts(texts, labels, parser) for arm, texts in asked.arms.items()},
            [*described_pictures, *asked_pictures],
            (described.draws, asked.draws),
            seed,
        )
    if described.items:
        found = score_descriptions(described.arms, described.items, seed, described.draws)
        _merge(result, found)
    if asked.items:
        found = score_questions(
            asked.arms, labels, dimensions, asked_pictures, parser, seed, asked.draws
        )
        _merge(result, found)
    for entry in result.values():
        for figures in entry["compat"]:
            if GENERATIVE in figures and "discriminative" in figures:
                total = 100 - figures[GENERATIVE]["chair"] + figures["discriminative"]["f1"]
                figures["amber_score"] = round(total / 2, 1)
        if len(entry["compat"]) == 1:
            entry["compat"] = entry["compat"][0]
    return result


def _merge(result: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Add the entries of one part to those of the whole, arm by arm."""
    for arm, part in found.items():
        entry = result[arm]
        for key in ("scores", "counts", "delta"):
            if key in part:
                entry.setdefault(key, {}).update(part[key])
        entry["flags"] += part["flags"]
        entry |= {key: part[key] for key in ("strict", "n_unparsed") if key in part}
        compat = part["compat"] if isinstance(part["compat"], list) else [part["compat"]]
        entry["compat"] = entry["compat"] or [{} for _ in compat]
        for into, figures in zip(entry["compat"], compat, strict=True):
            into.update({GENERATIVE: figures} if GENERATIVE in part["scores"] else figures)


def _add_amber_score(
    result: Mapping[str, Any],
    descriptions: Mapping[str, Floats],
    answers: Mapping[str, Floats],
    pictures: Sequence[object],
    draws: tuple[Sequence[int] | None, Sequence[int] | None],
    seed: int,
) -> None:
    """From unrounded CHAIR and F1, whose resamples draw the same pictures."""
    resamples = Resamples(pictures, seed=seed)
    found: dict[str, Floats] = {}
    for arm in result:
        n, m = len(descriptions[arm]), len(answers[arm])
        columns = []
        for some, others in zip(by_draw(draws[0], n), by_draw(draws[1], m), strict=True):
            at, to = np.array(some, dtype=np.intp), np.array(others, dtype=np.intp)
            sums = _with_resamples(resamples, descriptions[arm][at], at)
            chair = CHAIR.of(sums, amber_generative.COUNTS)
            sums = _with_resamples(resamples, answers[arm][to], n + to)
            columns.append((1 - chair + F1.of(sums, amber_discriminative.COUNTS)) / 2)
        found[arm] = np.stack(columns, axis=1)
    base = next(iter(found.values()))
    for number, (arm, values) in enumerate(found.items()):
        score = estimate(values[0], values[1:], resamples.n_clusters)
        result[arm]["scores"]["amber"] = {"amber_score": {**score, "ci_method": "bootstrap"}}
        if number:
            change = values - base
            delta = estimate(change[0], change[1:], resamples.n_clusters)
            result[arm]["delta"] = {"amber": {"amber_score": delta}}


def _with_resamples(resamples: Resamples, counts: Floats, items: NDArray[np.intp]) -> Floats:
    """(items, counts) -> (1 + R, counts): their sum as they are, then in every resample."""
    return np.concatenate([counts.sum(axis=0)[None], resamples.sums(counts, items)])


class Amber(Task):
    """The task: all of AMBER, descriptions and questions."""

    name = "amber"
    # Descriptions need them; an answer of yes or no ends by itself.
    max_new_tokens = AmberGenerative.max_new_tokens
    columns = (
        Column("amber_score", "AMBER"),
        *AmberGenerative.columns,
        *AmberDiscriminative.columns,
    )
    wants_p_yes = True
    open = AmberData.open
    answer_key = staticmethod(answer_key)

    def __init__(self, data: AmberData, options: Options) -> None:
        super().__init__(data, options)
        self._describe = AmberGenerative(data, options)
        self._ask = AmberDiscriminative(data, options)

    @property
    def partial(self) -> bool:
        """Whether the limit left out pictures."""
        return self._describe.partial or self._ask.partial

    @cached_property
    def samples(self) -> list[Sample]:
        """The descriptions, then the questions."""
        both = [*self._describe.samples, *self._ask.samples]
        return [replace(sample, task=self.name) for sample in both]

    @property
    def facts(self) -> dict[str, Any]:
        """Those of both parts."""
        return {**self._describe.facts, **self._ask.facts}

    def parse(self, sample: Sample, answer: Answer) -> tuple[Any, bool]:
        """As the part does that the sample belongs to."""
        part = self._describe if sample.split == GENERATIVE else self._ask
        return part.parse(sample, answer)

    def score(
        self,
        samples: Sequence[Sample],
        arms: Mapping[str, Sequence[Answer]],
        draws: Sequence[int] | None = None,
    ) -> dict[str, Any]:
        """The scores of both parts, and the AMBER score."""
        described = [i for i, sample in enumerate(samples) if sample.split == GENERATIVE]
        asked = [i for i, sample in enumerate(samples) if sample.split != GENERATIVE]
        read = {
            arm: [self._describe.read(samples[i], answers[i]) for i in described]
            for arm, answers in arms.items()
        }
        texts = {arm: [answers[i].text for i in asked] for arm, answers in arms.items()}
        return _score(
            _Part(read, self._items(samples, described), draws and [draws[i] for i in described]),
            _Part(texts, self._items(samples, asked), draws and [draws[i] for i in asked]),
            [samples[i].image for i in described],
            [samples[i].image for i in asked],
            self._ask.parser,
            self.options.seed,
        )

    def _items(self, samples: Sequence[Sample], at: Sequence[int]) -> list[AmberItem]:
        return [self.data.items[int(samples[i].sample_id)] for i in at]
