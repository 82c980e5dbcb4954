"""AMBER against the official script: what it prints, and the counts behind it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from vlmfix.evals.amber.data import AmberData
from vlmfix.evals.amber.task import Amber, score_answers

# accuracy, precision, recall, F1 of synthetic_discriminative.json by the official script.
OFFICIAL = {
    "discriminative": (73.0, 84.5, 75.3, 79.6),
    "existence": (82.0, 100.0, 82.0, 90.1),
    "attribute": (69.4, 73.0, 68.8, 70.8),
    "state": (70.3, 73.6, 69.8, 71.6),
    "number": (64.8, 68.3, 64.2, 66.2),
    "action": (76.3, 81.0, 75.3, 78.0),
    "relation": (62.7, 56.7, 63.0, 59.7),
}


@pytest.fixture(scope="module")
def questions(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> AmberData:
    """The published annotations; which picture a question shows is made up, for the bootstrap."""
    folder = tmp_path_factory.mktemp("amber")
    for name in ("annotations.json", "relation.json", "safe_words.txt"):
        (folder / name).write_bytes((golden / "amber" / name).read_bytes())
    queries = [
        {"id": number, "image": f"AMBER_{1 + (number - 1) % 1004}.jpg", "query": "?"}
        for number in range(1, 15221)
    ]
    (folder / "query_all.json").write_text(json.dumps(queries))
    return AmberData.open(folder)


@pytest.fixture(scope="module")
def discriminative(golden: Path) -> list[Any]:
    return Amber.load_answers(golden / "amber" / "synthetic_discriminative.json")


def test_questions_score_as_the_official_script_prints(
    questions: AmberData, discriminative: list[Any]
) -> None:
    shuffled = random.Random(0).sample(discriminative, len(discriminative))
    scored = score_answers(questions, shuffled)
    names = ("accuracy", "precision", "recall", "f1")
    printed = {place: tuple(row[name] for name in names) for place, row in scored["compat"].items()}
    assert printed == OFFICIAL
    # The same answers read as answers: "no", "No." and "yes" count for what they say.
    values = {place: metrics["accuracy"]["value"] for place, metrics in scored["scores"].items()}
    assert all(100 * values[place] > OFFICIAL[place][0] for place in OFFICIAL)
    assert scored["counts"]["discriminative"]["n"] == 14216
    assert scored["counts"]["discriminative"]["empty"] == 273 == scored["strict"]["n_unparsed"]


def seeded_nouns(questions: AmberData, golden: Path) -> list[dict[str, Any]]:
    """Nouns drawn from what is annotated and from the whole vocabulary."""
    generator = random.Random(0)
    associations = json.loads((golden / "amber" / "relation.json").read_text())
    vocabulary = sorted({word for key, words in associations.items() for word in [key, *words]})
    answers = []
    for item in questions.items.values():
        if item.dimension != "generative":
            continue
        near = [*item.truth, *item.hallucinations]
        near = near + [word for name in near for word in associations[name]]
        nouns = [
            generator.choice(near if generator.random() < 0.8 else vocabulary)
            for _ in range(generator.randrange(9))
        ]
        answers.append({"id": item.number, "response": "", "nouns": nouns})
    return answers


def pseudo_similarity(first: str, second: str) -> float:
    low, high = sorted((first, second))
    return 1.0 if first == second else random.Random(f"{low}/{high}").random()


# The official loop on these nouns, with equal strings and with the similarity above: imagined,
# covered and expected objects, descriptions with an imagined one, and the four printed figures.
@pytest.mark.parametrize(
    ("similarity", "counts", "printed"),
    [
        ("exact", (2162, 1219, 1094, 773), (55.5, 21.8, 77.0, 22.2)),
        (pseudo_similarity, (362, 1999, 1666, 221), (9.3, 35.7, 22.0, 33.8)),
    ],
    ids=["exact", "callback"],
)
def test_descriptions_score_as_the_official_loop_counts(
    golden: Path, questions: AmberData, similarity: Any, counts: Any, printed: Any
) -> None:
    scored = score_answers(questions, seeded_nouns(questions, golden), similarity=similarity)
    sums = scored["counts"]["generative"]
    assert (sums["n"], sums["named"], sums["truth"]) == (1004, 3897, 5599)
    assert sums["hallucinations"] == 4924
    names = ("imagined", "covered", "expected", "hallucinated")
    assert tuple(sums[name] for name in names) == counts
    figures = scored["compat"]["generative"]
    assert tuple(figures[name] for name in ("chair", "cover", "hal", "cog")) == printed


def test_both_parts_make_the_amber_score(
    golden: Path, questions: AmberData, discriminative: list[Any]
) -> None:
    scored = score_answers(questions, [*discriminative, *seeded_nouns(questions, golden)])
    assert scored["compat"]["amber_score"] == round((100 - 55.5 + 79.6) / 2, 1)
    f1 = scored["scores"]["discriminative"]["f1"]["value"]
    exact = (1 - 2162 / 3897 + f1) / 2
    score = scored["scores"]["amber"]["amber_score"]
    assert score["value"] == pytest.approx(exact, abs=1e-12)
    assert score["ci"][0] < exact < score["ci"][1] < score["ci"][0] + 0.03
