"""AMBER as a whole: files of answers, scored without a model, and the AMBER score.

Paper: Wang et al. 2023 (arXiv 2311.07397): AMBER score = (100 - CHAIR + F1) / 2, in percent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlmfix.errors import BadInput
from vlmfix.evals import amber_discriminative, amber_generative
from vlmfix.evals.amber_data import GENERATIVE, AmberData, AmberItem
from vlmfix.evals.amber_discriminative import F1, question_counts, score_questions
from vlmfix.evals.amber_generative import CHAIR, description_counts, score_descriptions
from vlmfix.evals.amber_objects import Objects, Similarity, get_similarity, nouns, read_objects
from vlmfix.evals.metrics import estimate
from vlmfix.evals.pairing import answer_text, located, pair
from vlmfix.evals.parsers import get_parser
from vlmfix.evals.rows import Row, read_rows, short
from vlmfix.evals.stats import Floats, Resamples

__all__ = ["load_answers", "load_questions", "score_answers"]

WHAT = "AMBER answers"


def load_questions(path: str | Path) -> AmberData:
    """The annotations in AMBER's folder; scoring needs neither queries nor pictures.

    Raises:
        BadInput: no folder, or files that are missing or broken.
    """
    return AmberData.open(path)


def load_answers(path: str | Path) -> list[Row]:
    """Answers as the official script takes them, [{id, response}], or as our runs record them.

    Raises:
        BadInput: a file that cannot be read; the message names the line.
    """
    return read_rows(path, WHAT)


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
        "generative" and those of `amber_data.GROUPS`; "compat": place -> what the official script
        prints; "strict": the questions by the strict parser; "n_unparsed"; "clusters": what the
        bootstrap draws; with both parts "amber_score": {"value", "ci"} in percent, and in "compat"
        as a number.

    Raises:
        BadInput: answers that are missing, repeated, or to no question; no such parser.
        MissingDependency: what nouns or their similarity need is not installed.
    """
    rule, alike = get_parser(parser), get_similarity(similarity)
    rows = located(answers, WHAT)
    numbers = {_number(row) for row in rows}
    begun = {questions.items[n].dimension == GENERATIVE for n in numbers & set(questions.items)}
    # Without any answer to a known item, pairing with everything says what is wrong.
    items = [
        i for i in questions.items.values() if not begun or (i.dimension == GENERATIVE) in begun
    ]
    paired = pair([item.number for item in items], rows, _number, WHAT)
    described = [(i, r) for i, r in zip(items, paired, strict=True) if i.dimension == GENERATIVE]
    asked = [(i, r) for i, r in zip(items, paired, strict=True) if i.dimension != GENERATIVE]

    pictures = [questions.picture(item.number) for item, _ in asked]
    known = None not in pictures
    clusters = pictures if known else [f"question {item.number}" for item, _ in asked]
    result: dict[str, Any] = {"scores": {}, "counts": {}, "flags": [], "compat": {}}
    result["clusters"] = "picture" if known else "question (the folder has no query for some)"
    texts = [answer_text(row) for _, row in asked]
    labels, dimensions = [item.label for item, _ in asked], [item.dimension for item, _ in asked]
    read = [(answer_text(row), _objects(item, row, questions, alike)) for item, row in described]
    shown = [item for item, _ in described]
    if described:
        found = score_descriptions({"": read}, shown, seed)[""]
        _merge(result, found, {GENERATIVE: found["compat"]})
        result["similarity"] = similarity if isinstance(similarity, str) else "callback"
    if asked:
        found = score_questions({"": texts}, labels, dimensions, clusters, rule, seed)[""]
        _merge(result, found, found["compat"])
        result |= {key: found[key] for key in ("strict", "n_unparsed")} | {"parser": parser}
    if described and asked:
        compat = result["compat"]
        total = 100 - compat[GENERATIVE]["chair"] + compat["discriminative"]["f1"]
        compat["amber_score"] = round(total / 2, 1)
        result["amber_score"] = _amber_score(
            description_counts(read, shown),
            question_counts(texts, labels, rule),
            [*(questions.picture(item.number) for item in shown), *clusters],
            seed,
        )
    return result


def _amber_score(
    descriptions: Floats, answers: Floats, clusters: Sequence[object], seed: int
) -> dict[str, Any]:
    """From unrounded CHAIR and F1, in percent; both come from the same resamples of pictures."""
    resamples = Resamples(clusters, seed=seed)
    items = np.arange(len(clusters))
    parts = (descriptions, items[: len(descriptions)]), (answers, items[len(descriptions) :])

    def score(sums: Sequence[Floats]) -> Floats:
        chair = CHAIR.of(sums[0], amber_generative.COUNTS)
        return 50 * (1 - chair + F1.of(sums[1], amber_discriminative.COUNTS))

    value = score([table.sum(axis=0, keepdims=True) for table, _ in parts])
    replicas = score([resamples.sums(table, at) for table, at in parts])
    return estimate(value, replicas[:, None], resamples.n_clusters)


def _number(row: Row) -> int:
    return row.number("id", "sample_id")


def _objects(
    item: AmberItem, row: Row, questions: AmberData, similarity: Similarity | None
) -> Objects:
    words = row.first("nouns")
    if words is None:
        words = nouns(answer_text(row))
    elif not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise BadInput(f"{row.where}: `nouns` is {short(words)}, which is no list of words")
    return read_objects(words, item.truth, item.hallucinations, questions.lexicon, similarity)


def _merge(result: dict[str, Any], found: Mapping[str, Any], compat: Mapping[str, Any]) -> None:
    result["scores"] |= found["scores"]
    result["counts"] |= found["counts"]
    result["flags"] += found["flags"]
    result["compat"] |= compat
