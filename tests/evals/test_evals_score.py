"""`vlmfix score`: our own records score as in the run; others' files pair or are refused."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evals_worlds import FakeModel, write_world

import vlmfix.evals
from vlmfix.errors import BadInput, UnknownTask
from vlmfix.evals.options import SCORING, Options
from vlmfix.evals.reporting.report import to_markdown
from vlmfix.evals.score import score
from vlmfix.evals.tasks import Answer, Sample, get_task, list_tasks


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def reply(method: Any, sample: Sample) -> Answer:
    """Base and method are right at different items; p_yes says a little more than the answer."""
    draw = random.Random(f"{method}/{sample.image}/{sample.prompt}")
    if sample.task == "chair":
        named = [*sample.target[: draw.randint(0, 3)], *(["zebra"] * draw.randint(0, 1))]
        words = "".join(f"There is a {name} here. " for name in named)
        return Answer(words, 10, 2, draw.choice(["eos", "length"]), 2.0)
    word = sample.target if draw.random() < 0.8 else "yes"
    p_yes = draw.random() / 2 + (word == "yes") / 2
    return Answer(word.title(), 10, 2, "eos", 2.0, p_yes=p_yes)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    """A world, the folder of a run on it, and its results."""
    root = tmp_path_factory.mktemp("score")
    world = write_world(root / "world")
    results = vlmfix.evals.evaluate(
        ["pope", "chair"],
        model=FakeModel(reply),
        methods=["var"],
        data=world,
        output=root / "run",
        n_images=10,
        quiet=True,
    )
    return world, root / "run", results


COMPARED = ("scores", "counts", "delta", "auc", "auc_delta", "prior_matched", "matched_length")


@pytest.mark.parametrize("task", ["pope", "chair"])
def test_records_of_a_run_score_as_in_the_run(
    run: tuple[Path, Path, dict[str, Any]], task: str
) -> None:
    world, folder, results = run
    files = [{"": folder / f"samples_{task}_{arm}.jsonl"} for arm in ("var", "base")]
    scored = score(task, *files, annotations=world if task == "chair" else None)
    entry, expected = scored["tasks"][task], results["tasks"][task]
    for ours, theirs in (("base", "base"), ("method", "var")):
        for key in COMPARED:
            there = expected["arms"][theirs].get(key)
            assert entry["arms"][ours].get(key) == there, (ours, key)
        assert entry["arms"][ours]["warnings"] == expected["arms"][theirs]["warnings"]
    assert entry["n_samples"] == expected["n_samples"]
    assert entry["arms"]["method"]["delta"]  # so that not everything compares nothing
    assert ("prior_matched" in entry["arms"]["method"]) == (task == "pope")
    assert "prompt_style" not in entry and "cost" not in entry["arms"]["base"]


def test_records_of_several_seeds(tmp_path: Path) -> None:
    world = write_world(tmp_path / "world")
    results = vlmfix.evals.evaluate(
        ["pope"],
        model=FakeModel(reply),
        methods=["var"],
        data=world,
        output=tmp_path / "run",
        n_images=6,
        temperature=1.0,
        seeds=2,
        quiet=True,
    )
    files = [{"": tmp_path / "run" / f"samples_pope_{arm}.jsonl"} for arm in ("var", "base")]
    scored = score("pope", *files)["tasks"]["pope"]["arms"]
    assert scored["method"]["scores"] == results["tasks"]["pope"]["arms"]["var"]["scores"]
    assert scored["method"]["delta"] == results["tasks"]["pope"]["arms"]["var"]["delta"]
    lines = files[1][""].read_text().splitlines(keepends=True)
    (tmp_path / "one.jsonl").write_text("".join(lines[: len(lines) // 2]))
    with pytest.raises(BadInput, match="different sampling seeds"):
        score("pope", files[0], {"": tmp_path / "one.jsonl"})


def questions(n: int) -> list[dict[str, Any]]:
    return [
        {
            "question_id": i + 1,
            "image": f"COCO_val2014_{i // 6 + 1:012d}.jpg",
            "text": f"Is there a {'dog' if i % 2 else 'cat'}{i} in the image?",
            "label": "no" if i % 2 else "yes",
        }
        for i in range(n)
    ]


def answers(rows: list[dict[str, Any]], right: Callable[[int], bool]) -> list[dict[str, Any]]:
    other = {"yes": "No", "no": "Yes"}
    return [
        {
            "question_id": row["question_id"],
            "answer": row["label"].title() if right(i) else other[row["label"]],
        }
        for i, row in enumerate(rows)
    ]


def test_order_does_not_matter_and_pairs_are_compared(tmp_path: Path) -> None:
    asked = questions(60)
    q = {"random": write(tmp_path / "q.json", asked)}
    base, method = answers(asked, lambda i: i % 5 > 0), answers(asked, lambda i: i % 10 != 3)
    random.Random(0).shuffle(method)
    a = {"random": write(tmp_path / "a.jsonl", method)}
    b = {"random": write(tmp_path / "b.jsonl", base)}
    entry = score("pope", a, b, questions=q)["tasks"]["pope"]
    delta = entry["arms"]["method"]["delta"]["random"]
    # Wrong: 12 of the base, 6 others of the method.
    assert delta["accuracy"]["value"] == pytest.approx(6 / 60)
    assert (delta["mcnemar"]["better"], delta["mcnemar"]["worse"]) == (12, 6)
    # No probabilities, no controls that need them.
    assert "auc" not in entry["arms"]["method"]
    alone = score("pope", a, questions=q)["tasks"]["pope"]["arms"]
    assert alone["answers"]["scores"] == entry["arms"]["method"]["scores"]


def test_missing_repeated_and_strange_answers_are_listed(tmp_path: Path) -> None:
    asked = questions(12)
    q = {"": write(tmp_path / "q.json", asked)}
    good = answers(asked, lambda i: True)
    for rows, message in (
        (good[2:], "2 of 12 questions have no answer: 1, 2"),
        ([*good, good[4]], "1 repeated: 5"),
        ([*good, {"question_id": 77, "answer": "No"}], "1 answers belong to no question: 77"),
        ([*good[1:], {"question_id": 1, "answer": 3}], "line 12: `answer` is 3"),
        ([*good[1:], {**good[0], "p_yes": 1.5}], "line 12: `p_yes` is 1.5"),
        ([*good[1:], {**good[0], "p_yes": "high"}], "line 12: `p_yes` is 'high'"),
        ([*good[1:], {**good[0], "error": "no memory"}], "line 12 records a failure"),
    ):
        with pytest.raises(BadInput, match=message):
            score("pope", {"": write(tmp_path / "a.jsonl", rows)}, questions={"all": q[""]})
    with pytest.raises(BadInput, match="do not say what is true, first .*line 1: name the POPE"):
        score("pope", {"": write(tmp_path / "a.jsonl", good)})


def test_captions_of_chosen_images(tmp_path: Path) -> None:
    world = write_world(tmp_path / "world")
    rows = [{"image_id": i, "caption": "A zebra." if i == 3 else "Nothing."} for i in (3, 5, 9)]
    a = {"": write(tmp_path / "a.jsonl", rows)}
    entry = score("chair", a, annotations=world)["tasks"]["chair"]
    assert entry["n_samples"] == 3
    assert entry["arms"]["answers"]["scores"]["caption"]["chair_s"]["value"] == pytest.approx(1 / 3)
    b = {"": write(tmp_path / "b.jsonl", [*rows[:2], {**rows[2], "image_id": 8}])}
    with pytest.raises(BadInput, match="1 of 3 questions have no answer: 8"):
        score("chair", a, b, annotations=world)
    with pytest.raises(
        BadInput, match="1 images that world does not list|does not list: \\[900\\]"
    ):
        strange = write(tmp_path / "c.jsonl", [{"image_id": 900, "caption": "A dog."}])
        score("chair", {"": strange}, annotations=world)
    with pytest.warns(UserWarning, match="2 captions of 1 images: only the last of each counts"):
        twice = {"": write(tmp_path / "d.jsonl", [rows[0], {**rows[0], "caption": "Nothing."}])}
        entry = score("chair", twice, annotations=world)["tasks"]["chair"]
    assert entry["arms"]["answers"]["counts"]["caption"]["mentions"] == 0


def test_what_does_not_go_together(tmp_path: Path) -> None:
    world = write_world(tmp_path / "world")
    a = {"": write(tmp_path / "a.jsonl", [{"image_id": 3, "caption": "A zebra."}])}
    with pytest.raises(BadInput, match="--questions are POPE's"):
        score("chair", a, questions={"all": "q.json"})
    with pytest.raises(BadInput, match="--parser all: chair has one way"):
        score("chair", a, annotations=world, parser="all")
    with pytest.raises(BadInput, match="keep one"):
        score("pope", a, questions={"all": "q.json"}, annotations=world)
    with pytest.raises(UnknownTask, match="chair"):
        score("vqa", a)
    with pytest.raises(BadInput, match="no answer parser 'loose'"):
        score("pope", a, parser="loose")


def test_every_task_scores_files() -> None:
    several = {name for name in list_tasks() if get_task(name).several_parsers}
    assert several == {"pope", "amber_d"}
    assert set(SCORING) <= {item.name for item in fields(Options)}


def test_options_that_do_not_concern_files_are_refused(tmp_path: Path) -> None:
    a = {"": write(tmp_path / "a.jsonl", [{"image_id": 3, "caption": "A zebra."}])}
    with pytest.raises(BadInput, match="limit: these options do not concern answers"):
        score("chair", a, limit=3)


def test_all_parsers_side_by_side(golden: Path, tmp_path: Path) -> None:
    """The edge answers: every rule gets right what its reference gets right."""
    rows = json.loads((golden / "pope" / "edge_parsing.json").read_text())
    asked = [
        {
            "question_id": i,
            "image": f"{i}.jpg",
            "text": f"Is there a thing{i}?",
            "label": row["label"],
        }
        for i, row in enumerate(rows, start=1)
    ]
    given = [{"question_id": i, "answer": row["answer"]} for i, row in enumerate(rows, start=1)]
    results = score(
        "pope",
        {"": write(tmp_path / "a.jsonl", given)},
        questions={"all": write(tmp_path / "q.json", asked)},
        parser="all",
    )
    entry = results["tasks"]["pope"]
    table = {name: arms["answers"] for name, arms in entry["parsers"].items()}
    right = {name: arm["counts"]["pope"]["correct"] for name, arm in table.items()}
    assert right["official"] == sum(row["official"] == row["label"] for row in rows) == 22
    assert right["opera"] == sum(row["opera"] == row["label"] for row in rows)
    assert right["vlmevalkit"] == sum(row["vlmevalkit"] == row["label"] for row in rows)
    assert right["lmms_eval"] == sum(row["lmms_eval_score"] for row in rows)
    assert right["vcd"] == sum(row["vcd_counts_as"] == row["label"] for row in rows)
    assert table["official"]["scores"]["pope"]["f1"]["value"] == 0.5
    empty = sum(not row["answer"].strip() for row in rows)
    assert {arm["counts"]["pope"]["empty"] for arm in table.values()} == {empty}
    assert table["vlmevalkit"]["counts"]["pope"]["unparsed"] == sum(
        row["vlmevalkit"] == "unknown" for row in rows
    )
    text = to_markdown(results)
    assert "The same answers read by other rules" in text
    assert all(f"| {name} | answers |" in text for name in table)
    assert "± half a 95 % interval (bootstrap over images)." in text  # nothing is compared


def test_mme_and_hallusionbench_files_of_their_authors(golden: Path, tmp_path: Path) -> None:
    mme = score("mme", {"": golden / "mme"}, annotations=mme_questions(golden, tmp_path / "mme"))
    scores = mme["tasks"]["mme"]["arms"]["answers"]["scores"]
    assert [round(scores[s]["score"]["value"], 2) for s in ("existence", "count")] == [185.0, 88.33]


def mme_questions(golden: Path, folder: Path) -> Path:
    """The tables of answers without their answers."""
    folder.mkdir()
    for path in (golden / "mme").glob("LaVIN_*.txt"):
        lines = [line.split("\t")[:3] for line in path.read_text().splitlines() if line]
        name = path.name.removeprefix("LaVIN_")
        (folder / name).write_text("".join("\t".join(line) + "\n" for line in lines))
    return folder


def test_scoring_nine_thousand_answers_is_quick(tmp_path: Path) -> None:
    """3 s is the promise on a quiet machine; this one may be busy, so processor time counts."""
    draw = np.random.default_rng(0)
    splits = ("random", "popular", "adversarial")
    asked = questions(3000)
    q, a = {}, {}
    for split in splits:
        q[split] = write(tmp_path / f"{split}.json", asked)
        flags = draw.random(3000) < 0.85
        rows = answers(asked, lambda i, flags=flags: bool(flags[i]))
        said = [{**row, "p_yes": float(draw.random())} for row in rows]
        a[split] = write(tmp_path / f"{split}.jsonl", said)
    began = time.process_time()
    results = score("pope", a, questions=q)
    seconds = time.process_time() - began
    print(f"9,000 POPE answers: {seconds:.2f} s")
    assert seconds < 3
    assert results["tasks"]["pope"]["n_samples"] == 9000
    assert "auc" in results["tasks"]["pope"]["arms"]["answers"]


@pytest.mark.slow
def test_scoring_five_thousand_captions_is_quick(tmp_path: Path) -> None:
    """5 s is the promise; processor time, as above."""
    names = ["dog", "cat", "person", "pizza", "kite", "zebra"]
    annotated = {
        "images": [{"id": i, "file_name": f"{i:012d}.jpg"} for i in range(5000)],
        "categories": [{"id": k, "name": name} for k, name in enumerate(names)],
        "annotations": [
            {"id": 3 * i + j, "image_id": i, "category_id": (i + j) % 6}
            for i in range(5000)
            for j in range(3)
        ],
    }
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco" / "instances.json").write_text(json.dumps(annotated))
    words = "A {} stands beside a {} on a wooden table near the window, with a cup in front of it. "
    rows = [
        {
            "image_id": i,
            "caption": "".join(
                words.format(names[(i + j) % 6], names[i * j % 6]) for j in range(3)
            ),
        }
        for i in range(5000)
    ]
    answers = {"": write(tmp_path / "captions.jsonl", rows)}
    began = time.process_time()
    results = score("chair", answers, annotations=tmp_path / "coco")
    seconds = time.process_time() - began
    print(f"5,000 CHAIR captions: {seconds:.2f} s")
    assert seconds < 5
    assert results["tasks"]["chair"]["n_samples"] == 5000
