"""MME: its files, pairs of questions, scores and whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from evals_scripted import Scripted
from PIL import Image

from vlmfix.errors import BadInput
from vlmfix.evals.mme.task import (
    SUBSETS,
    Mme,
    MmeData,
    load_answers,
    score_answers,
)
from vlmfix.evals.tasks import Answer, Options

ENDING = " Please answer yes or no."


def write_lists(folder: Path, images: int = 2) -> Path:
    """Your_Results with a list per subset, and the pictures."""
    (folder / "Your_Results").mkdir(parents=True)
    for subset in SUBSETS:
        lines = []
        (folder / subset).mkdir()
        for n in range(images):
            lines += [
                f"{n}.jpg\tIs there a {subset} {n}?{ENDING}\tYes",
                f"{n}.jpg\tIs there no {subset} {n}?{ENDING}\tNo",
            ]
            Image.new("RGB", (4, 4)).save(folder / subset / f"{n}.jpg")
        (folder / "Your_Results" / f"{subset}.txt").write_text("\n".join(lines) + "\n")
    return folder


def rows(data: MmeData, wrong: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Right answers, but for questions that contain one of the texts."""
    flip = {"yes": "no", "no": "yes"}
    return [
        {
            "image": q.image,
            "question": q.text,
            "answer": flip[q.label] if any(text in q.text for text in wrong) else q.label,
        }
        for q in data.questions
    ]


def test_scores_by_hand(tmp_path: Path) -> None:
    data = MmeData.open(write_lists(tmp_path))
    # Existence: one of four wrong, so one of two images; count: one image wrong altogether.
    scored = score_answers(data, rows(data, ("no existence 0", "count 1?")))
    found = {place: m["score"]["value"] for place, m in scored["scores"].items()}
    assert found["existence"] == 75 + 50
    assert found["count"] == 50 + 50
    assert found["position"] == found["color"] == 200
    assert scored["scores"]["total"]["score"]["value"] == 125 + 100 + 400
    assert scored["counts"]["existence"]["both"] == 1


def test_order_and_ending_of_the_question_do_not_matter(tmp_path: Path) -> None:
    data = MmeData.open(write_lists(tmp_path))
    answers = rows(data, ("no color 1",))
    turned = [
        {**row, "question": row["question"].replace(ENDING, "\nAnswer with one word.")}
        for row in reversed(answers)
    ]
    assert score_answers(data, turned)["scores"] == score_answers(data, answers)["scores"]


def test_a_text_file_per_image(tmp_path: Path) -> None:
    lists = write_lists(tmp_path / "lists")
    folder = tmp_path / "single"
    for subset in SUBSETS:
        (folder / subset).mkdir(parents=True)
        lines = (lists / "Your_Results" / f"{subset}.txt").read_text().splitlines()
        for n in range(2):
            mine = [x.partition("\t")[2] for x in lines if x.startswith(f"{n}.jpg")]
            (folder / subset / f"{n}.txt").write_text("\r\n".join(mine))
        Image.new("RGB", (4, 4)).save(folder / subset / "0.png")
        (folder / subset / "images").mkdir()
        Image.new("RGB", (4, 4)).save(folder / subset / "images" / "1.jpg")
    data = MmeData.open(folder)
    assert data.questions == MmeData.open(lists).questions
    data.require_images([q.image for q in data.questions])
    assert data.image("color/0.jpg").mode == "RGB"
    with pytest.raises(BadInput, match=r"lacks 1 of 1 images, first color/7\.jpg"):
        data.require_images(["color/7.jpg"])


def test_an_image_needs_two_questions(tmp_path: Path) -> None:
    path = write_lists(tmp_path) / "Your_Results" / "count.txt"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    data = MmeData.open(tmp_path)
    with pytest.raises(BadInput, match=r"1 of 8 images have not exactly two .* count/1\.jpg \(1\)"):
        Mme(data, Options())
    with pytest.raises(BadInput, match="exactly two"):
        score_answers(data, [])


def test_a_question_asked_twice_is_no_pair(tmp_path: Path) -> None:
    path = write_lists(tmp_path) / "Your_Results" / "count.txt"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[0].replace("Yes", "No"), *lines[2:]]))
    with pytest.raises(BadInput, match="1 repeated: count/0.jpg: Is there a count 0"):
        Mme(MmeData.open(tmp_path), Options())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "0.jpg\tIs it?",
            r"count\.txt, line 1 has 2 fields .* expected image, question and Yes or",
        ),
        ("0.jpg\tIs it?\tmaybe", r"line 1: the truth 'maybe' is neither Yes nor No"),
        ("\n \n", r"count\.txt is empty"),
    ],
)
def test_broken_lists_name_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    (write_lists(tmp_path) / "Your_Results" / "count.txt").write_text(line)
    with pytest.raises(BadInput, match=message):
        MmeData.open(tmp_path)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is no folder: unpack the benchmark there. It needs one of"):
        MmeData.open(tmp_path / "nowhere")
    with pytest.raises(BadInput, match="no questions about existence"):
        MmeData.open(tmp_path)
    write_lists(tmp_path)
    (tmp_path / "LaVIN_color.txt").write_text("x")
    with pytest.raises(BadInput, match="are all lists of color: keep one"):
        MmeData.open(tmp_path)


def test_answers_that_do_not_fit(tmp_path: Path) -> None:
    data = MmeData.open(write_lists(tmp_path))
    answers = rows(data)
    with pytest.raises(BadInput, match="1 of 16 questions have no answer: .*existence/0.jpg"):
        score_answers(data, answers[1:])
    with pytest.raises(BadInput, match="1 repeated"):
        score_answers(data, [*answers, answers[3]])
    with pytest.raises(BadInput, match="1 answers belong to no question"):
        score_answers(data, [*answers, {"image": "x", "question": "?", "answer": "no"}])
    with pytest.raises(BadInput, match="row 1 has no `response` or `answer`"):
        score_answers(data, [{"image": a["image"], "question": a["question"]} for a in answers])


def test_answers_of_the_official_tool(tmp_path: Path) -> None:
    data = MmeData.open(write_lists(tmp_path / "data"))
    out = tmp_path / "answers"
    out.mkdir()
    for subset in SUBSETS:
        lines = (tmp_path / "data" / "Your_Results" / f"{subset}.txt").read_text().splitlines()
        text = "\n".join(f"{x}\tYes,\tit is" for x in lines)
        (out / f"LaVIN_{subset}.txt").write_text(text)
    scored = score_answers(data, load_answers(out))
    assert scored["scores"]["total"]["score"]["value"] == 4 * 50
    (out / "LaVIN_count.txt").write_text(lines[0])
    with pytest.raises(BadInput, match="line 1 has no fourth field, the answer"):
        load_answers(out)


def test_a_run_compares_the_method_with_the_base(tmp_path: Path) -> None:
    def reply(method: Any, request: Any) -> str:
        label = str(request.sample.target)
        # The base takes every negative question of existence for a positive one.
        slips = method is None and "no existence" in request.sample.prompt
        return "Yes" if slips or label == "yes" else "No"

    model = Scripted(reply)
    entry = model.run("mme", write_lists(tmp_path / "mme"), tmp_path / "out")
    base, method = entry["arms"]["base"], entry["arms"]["var"]
    assert base["scores"]["total"]["score"]["value"] == 50 + 600
    assert method["scores"]["total"]["score"]["value"] == 800
    assert method["delta"]["total"]["score"]["value"] == 150
    assert method["delta"]["existence"]["score"]["value"] == 150
    assert method["delta"]["existence"]["mcnemar"]["better"] == 2
    prompts = {request.sample.prompt for request in model.requests}
    assert "Is there a count 0?\nAnswer the question using a single word or phrase." in prompts
    bare = Mme(MmeData.open(tmp_path / "mme"), Options(prompt_style="bare"))
    assert bare.samples[0].prompt == f"Is there a existence 0?{ENDING}"


def test_a_limit_keeps_all_subsets_and_pairs(tmp_path: Path) -> None:
    task = Mme(MmeData.open(write_lists(tmp_path)), Options(limit=1))
    assert task.partial
    assert [sample.split for sample in task.samples] == [s for s in SUBSETS for _ in range(2)]
    whole = Mme(MmeData.open(tmp_path), Options(limit=2))
    assert not whole.partial
    assert {s.sample_id for s in task.samples} < {s.sample_id for s in whole.samples}


def test_half_an_image_is_left_out(tmp_path: Path) -> None:
    task = Mme(MmeData.open(write_lists(tmp_path)), Options())
    samples = task.samples[1:]  # the first question of existence/0.jpg failed
    answers = [Answer(s.target) for s in samples]
    scored = task.score(samples, {"base": answers})["base"]
    assert scored["counts"]["existence"]["n"] == 2
    assert scored["scores"]["existence"]["score"]["value"] == 200


def test_seeds_do_not_mix_their_pairs(tmp_path: Path) -> None:
    """Each seed gets another half of every pair right: no image is right under any seed."""
    task = Mme(MmeData.open(write_lists(tmp_path)), Options())
    n = len(task.samples)
    answers = [Answer("yes")] * n + [Answer("no")] * n
    scored = task.score(task.samples * 2, {"base": answers}, [0] * n + [1] * n)["base"]
    assert scored["scores"]["count"]["score"]["by_seed"] == [50, 50]
    assert scored["counts"]["count"]["images"] == 4


def test_nothing_answered_is_nothing_scored(tmp_path: Path) -> None:
    task = Mme(MmeData.open(write_lists(tmp_path)), Options())
    scored = task.score([], {"base": [], "var": []}, [])
    assert scored["var"]["scores"] == {} and "delta" in scored["var"]
