"""HallusionBench: its rows, groups, questions without a picture, and whole runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from evals_scripted import Scripted
from PIL import Image

from vlmfix.errors import BadInput
from vlmfix.evals.hallusionbench.task import (
    SUFFIX,
    HallusionBench,
    HallusionData,
    score_answers,
)
from vlmfix.evals.tasks import Answer, Options


def row(
    category: str, set_id: int, figure: int, question: int, truth: str, image: bool = True
) -> dict[str, Any]:
    return {
        "category": category,
        "subcategory": "chart",
        "visual_input": "1" if image else "0",
        "set_id": str(set_id),
        "figure_id": str(figure),
        "question_id": str(question),
        "question": f"Is {category}{set_id} {question} so?",
        "gt_answer": truth,
        "gt_answer_details": "It is.",
        "filename": f"./{category}/chart/{set_id}_{figure}.png" if image else None,
    }


# One set of each category: VS has two questions about nothing, an original and an altered figure;
# VD has an original and an altered figure.
ROWS = [
    *(row("VS", 0, 0, q, "1", image=False) for q in range(2)),
    *(row("VS", 0, 1, q, "1") for q in range(2)),
    *(row("VS", 0, 2, q, "0") for q in range(2)),
    *(row("VD", 0, 0, q, "1") for q in range(2)),
    row("VD", 0, 1, 0, "0"),
]


def write(folder: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "HallusionBench.json").write_text(json.dumps(rows))
    for one in rows:
        if one.get("filename"):
            path = folder / "hallusion_bench" / str(one["filename"])
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4)).save(path)
    return folder


def right(one: dict[str, Any]) -> str:
    return "Yes" if one["gt_answer"] == "1" else "No"


def values(scored: dict[str, Any], place: str = "all") -> tuple[float, ...]:
    return tuple(scored["scores"][place][name]["value"] for name in ("aacc", "qacc", "facc"))


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        # Of 9 rows, 4 questions (two per set) and 4 figures (without VS figure 0).
        ([], (1, 1, 1)),
        ([0], (8 / 9, 3 / 4, 1)),  # no figure: the question is lost alone
        ([2], (8 / 9, 3 / 4, 3 / 4)),
        ([2, 4], (7 / 9, 3 / 4, 2 / 4)),  # the same question on both figures
        ([2, 3], (7 / 9, 2 / 4, 3 / 4)),  # both questions about one figure
        ([6], (8 / 9, 3 / 4, 3 / 4)),  # VD figure 0 is a figure
        ([8], (8 / 9, 3 / 4, 3 / 4)),
    ],
)
def test_questions_and_figures(
    tmp_path: Path, wrong: list[int], expected: tuple[float, ...]
) -> None:
    answers = [
        {
            **one,
            "model_prediction": ("No" if right(one) == "Yes" else "Yes")
            if i in wrong
            else right(one),
        }
        for i, one in enumerate(ROWS)
    ]
    scored = score_answers(HallusionData.open(write(tmp_path)), answers[::-1])
    assert values(scored) == pytest.approx(expected, abs=1e-12)
    assert scored["scores"]["all"]["aacc"]["value"] == expected[0]


def test_places(tmp_path: Path) -> None:
    answers = [{**one, "answer": "Yes."} for one in ROWS]
    scored = score_answers(HallusionData.open(write(tmp_path)), answers)
    assert values(scored, "VS") == (4 / 6, 0, 1 / 2)
    # Without the questions about nothing, figure 1 and 2 are what is left of a question.
    assert scored["counts"]["visual"]["n"] == 7
    assert values(scored, "VD") == (2 / 3, 1 / 2, 1 / 2)
    assert scored["scores"]["all"]["yes_ratio"]["value"] == 1


def test_an_answer_that_says_neither_is_wrong_and_counted(tmp_path: Path) -> None:
    answers = [{**one, "answer": "I see a chart"} for one in ROWS]
    scored = score_answers(HallusionData.open(write(tmp_path)), answers)
    assert values(scored) == (0, 0, 0)
    assert scored["n_unparsed"] == 9
    # POPE's rule takes everything without a "no" for a yes.
    assert (
        values(score_answers(HallusionData.open(tmp_path), answers, parser="official"))[0] == 6 / 9
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gt_answer": "2"}, r"item 1: gt_answer is '2', not 0 or 1"),
        ({"set_id": "a"}, r"item 1: set_id is 'a', which is no whole number"),
        ({"question": None}, r"item 1: the text under question is null"),
    ],
)
def test_broken_rows_name_file_and_place(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    write(tmp_path, [{**ROWS[0], **change}, *ROWS[1:]])
    with pytest.raises(BadInput, match=rf"HallusionBench\.json, {message}"):
        HallusionData.open(tmp_path)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no bundled data: .* --data hallusionbench=FOLDER"):
        HallusionData.open(None)
    with pytest.raises(BadInput, match="holds no HallusionBench.json. It needs"):
        HallusionData.open(tmp_path)
    with pytest.raises(BadInput, match="1 repeated: VS_chart_0_0_0"):
        HallusionData.open(write(tmp_path, [*ROWS, ROWS[0]]))


def test_answers_that_do_not_fit(tmp_path: Path) -> None:
    questions = HallusionData.open(write(tmp_path))
    answers = [{**one, "answer": right(one)} for one in ROWS]
    with pytest.raises(BadInput, match="1 of 9 questions have no answer: VS_chart_0_0_0"):
        score_answers(questions, answers[1:])
    with pytest.raises(BadInput, match="1 repeated: VD_chart_0_1_0"):
        score_answers(questions, [*answers, answers[-1]])
    with pytest.raises(BadInput, match="no answer parser 'guess'"):
        score_answers(questions, answers, parser="guess")


def test_a_run_asks_some_questions_without_a_picture(tmp_path: Path) -> None:
    def reply(method: Any, request: Any) -> str:
        blind = method is None and request.sample.image is None
        return "maybe" if blind else str(request.sample.target)

    model = Scripted(reply)
    folder = write(tmp_path / "data")
    entry = model.run("hallusionbench", folder, tmp_path / "out")
    base, method = entry["arms"]["base"], entry["arms"]["var"]
    assert values(method) == (1, 1, 1)
    assert values(base) == pytest.approx((7 / 9, 2 / 4, 1))
    assert (base["n_unparsed"], method["n_unparsed"]) == (2, 0)
    assert method["delta"]["all"]["mcnemar"]["better"] == 2
    assert method["delta"]["visual"]["aacc"]["value"] == 0
    assert sum(request.sample.image is None for request in model.requests) == 4
    assert all(request.sample.prompt.endswith(f"?{SUFFIX}") for request in model.requests)
    assert set(model.pictures) == {
        f"{category}/chart/0_{n}.png"
        for category, n in (("VS", 1), ("VS", 2), ("VD", 0), ("VD", 1))
    }


def test_a_limit_takes_whole_sets(tmp_path: Path) -> None:
    task = HallusionBench(HallusionData.open(write(tmp_path)), Options(limit=1))
    assert task.partial
    assert len(task.samples) == 6
    assert {sample.split for sample in task.samples} == {"VS"}


def test_a_set_of_which_a_question_failed_is_left_out(tmp_path: Path) -> None:
    task = HallusionBench(HallusionData.open(write(tmp_path)), Options())
    samples = task.samples[1:]
    scored = task.score(samples, {"base": [Answer(s.target) for s in samples]})["base"]
    assert scored["counts"]["all"]["n"] == 3
    assert "VS" not in scored["scores"]


def test_seeds_are_groups_of_their_own(tmp_path: Path) -> None:
    task = HallusionBench(HallusionData.open(write(tmp_path)), Options())
    n = len(task.samples)
    answers = [Answer(s.target) for s in task.samples] + [Answer("maybe")] * n
    scored = task.score(task.samples * 2, {"base": answers}, [0] * n + [1] * n)["base"]
    assert scored["scores"]["all"]["qacc"]["by_seed"] == [1, 0]
    assert scored["counts"]["all"]["figures"] == 8


def test_nothing_answered_is_nothing_scored(tmp_path: Path) -> None:
    task = HallusionBench(HallusionData.open(write(tmp_path)), Options())
    assert task.score([], {"base": [], "var": []}, [])["var"]["scores"] == {}
