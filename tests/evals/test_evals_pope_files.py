"""POPE files as they are in the wild: every published form, and answers made for another one."""

from __future__ import annotations

import base64
import csv
import io
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from evals_worlds import write_world
from PIL import Image

from vlmfix.errors import BadInput
from vlmfix.evals.chair.task import Chair
from vlmfix.evals.inputs.coco import CocoData
from vlmfix.evals.pope.files import (
    answer_splits,
    asked_object,
    load_questions,
    load_splits,
    pair_answers,
)
from vlmfix.evals.pope.tables import QuestionTable, open_images, question_source
from vlmfix.evals.pope.task import Pope, score_answers
from vlmfix.evals.score import score
from vlmfix.evals.tasks import DataSource, Options

SPLITS = ("random", "popular", "adversarial")


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def coco_rows(number: int, typo: bool = False) -> list[dict[str, Any]]:
    """Questions as POPE's own files hold them, six to an image, yes and no in turn."""
    names = ["dog", "orange", "cup", "oven", "hot dog", "skis"]
    rows = []
    for n in range(number):
        name = names[n % 6]
        article = "an" if name[0] == "o" else "a"
        image = "imange" if typo and article == "an" else "image"
        rows.append(
            {
                "question_id": n + 1,
                "image": f"COCO_val2014_{n // 6:012d}.jpg",
                "text": f"Is there {article} {name} in the {image}?",
                "label": "no" if n % 2 else "yes",
            }
        )
    return rows


@pytest.mark.parametrize(
    ("number", "named"),
    [
        (3000, "full split, 500 images x 6"),
        (2910, "OPERA/LLaVA random split"),
        (8910, "OPERA/LLaVA: three splits in one"),
        (9000, "three full splits in one"),
        (2999, "2999 rows, no published size"),
    ],
)
def test_the_variant_is_told_by_the_number_of_rows(tmp_path: Path, number: int, named: str) -> None:
    path = write_lines(tmp_path / "pope.json", coco_rows(number))
    assert load_questions(path).variant.startswith(named)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Is there a dog in the image?", "dog"),
        ("Is there an orange in the imange?", "orange"),
        ("Is there a hot dog in the image? Please answer this question with one word.", "hot dog"),
        (
            "Is there a Tie in the image?\nAnswer the question using a single word or phrase.",
            "tie",
        ),
        ("USER: <image>\nIs there snow in the image? ASSISTANT:", "snow"),
        ("Is the  sky blue?", "is the sky blue?"),
    ],
)
def test_what_a_question_asks_about(text: str, name: str) -> None:
    assert asked_object(text) == name


def test_answers_to_the_rows_with_the_typo_fit_those_without(tmp_path: Path) -> None:
    mended = load_questions(write_lines(tmp_path / "pope.json", coco_rows(60)))
    typos = load_questions(write_lines(tmp_path / "opera.json", coco_rows(60, typo=True)))
    assert typos.variant.endswith("; 20 rows read 'imange'")
    answers = [
        {"image": q.image, "prompt": q.text + " Please answer.", "text": f"{q.question_id}"}
        for q in random.Random(1).sample(typos.questions, 60)
    ]
    assert pair_answers(mended.questions, answers) == [f"{n}" for n in range(1, 61)]


def test_ids_of_the_2910_rows_are_not_taken_for_those_of_the_3000(tmp_path: Path) -> None:
    full = load_questions(write_lines(tmp_path / "full.json", coco_rows(3000))).questions
    left_out = set(random.Random(0).sample(range(1, 3000, 2), 90))
    kept = [q for n, q in enumerate(full) if n not in left_out]
    # OPERA's file counts its own rows, so that ids no longer fit.
    answers = [
        {"question_id": n, "image": q.image, "question": q.text, "answer": q.label}
        for n, q in enumerate(kept, start=1)
    ]
    with pytest.raises(BadInput, match="90 of 3000 questions have no answer"):
        pair_answers(full, answers)
    assert pair_answers(kept, answers) == [q.label for q in kept]
    ids_only = [{"question_id": r["question_id"], "answer": r["answer"]} for r in answers]
    assert pair_answers(
        full, ids_only + [{"question_id": n, "answer": ""} for n in range(2911, 3001)]
    )
    with_texts = [{k: v for k, v in r.items() if k != "image"} for r in answers]
    rest = [{"question_id": n, "answer": "No"} for n in range(2911, 3001)]
    with pytest.raises(BadInput, match="made for another question file"):
        pair_answers(full, with_texts + rest)


def test_answers_of_the_official_code_fit_by_order_if_they_repeat_the_questions(
    tmp_path: Path,
) -> None:
    questions = load_questions(write_lines(tmp_path / "pope.json", coco_rows(12))).questions
    rows = [{"question": q.text, "answer": q.label} for q in questions]
    answers = Pope.load_answers(write_lines(tmp_path / "answers.json", rows))
    assert score_answers({"s": questions}, {"s": answers})["counts"]["s"]["correct"] == 12
    rows[3], rows[4] = rows[4], rows[3]
    with pytest.raises(BadInput, match=r"answers.json, line 4 answers .*hot dog.* is .*oven"):
        pair_answers(questions, Pope.load_answers(write_lines(tmp_path / "answers.json", rows)))
    with pytest.raises(BadInput, match="neither image and question nor question_id"):
        pair_answers(questions, [{"answer": "yes"}] * 12)


def test_answers_of_pai_fit_by_order(tmp_path: Path) -> None:
    """`query`, `ans`, `label` (1 or 0), no picture; `question` is the chat so far."""
    texts = ["Is there a dog in the image?", "Is there a cat in the image?"]
    asked = [
        {"chat_id": n, "image": f"{n}.jpg", "text": texts, "label": ["yes", "no"]} for n in (1, 2)
    ]
    questions = write_lines(tmp_path / "chat.json", asked)
    chat = f"USER: <ImageHere> {texts[0]} ASSISTANT:"
    rows = [
        {"query": text, "label": truth, "ans": said, "question": chat, "file_path": "x"}
        for text, truth, said in [(texts[0], 1, "Yes"), (texts[1], 0, "No")] * 2
    ]
    answers = write_lines(tmp_path / "a.jsonl", rows)
    entry = score("pope", {"": answers}, questions={"chat": questions})["tasks"]["pope"]
    assert entry["arms"]["answers"]["counts"]["chat"]["correct"] == 4
    with pytest.raises(BadInput, match="4 answers do not say of which picture their label is true"):
        score("pope", {"": answers})
    rows[2]["label"] = 0
    write_lines(answers, rows)
    with pytest.raises(BadInput, match=r"line 3: the label is no, and that of the question .* yes"):
        score("pope", {"": answers}, questions={"chat": questions})


def test_an_answer_file_of_several_splits(tmp_path: Path) -> None:
    rows = [
        {"category": split, "question_id": n, "answer": split}
        for n in (1, 2)
        for split in ("random", "popular")
    ]
    answers = Pope.load_answers(write_lines(tmp_path / "all.jsonl", rows))
    found = answer_splits(answers, ["popular", "random"])
    assert {split: [r.values["answer"] for r in part] for split, part in found.items()} == {
        "popular": ["popular"] * 2,
        "random": ["random"] * 2,
    }
    with pytest.raises(BadInput, match="all.jsonl, line 1 is of the split 'random': name one of "):
        answer_splits(answers, ["popular", "adversarial"])
    alone = Pope.load_answers(
        write_lines(tmp_path / "one.jsonl", [{"question_id": 1, "answer": "y"}])
    )
    assert answer_splits(alone, ["popular"]) == {"popular": alone}
    with pytest.raises(BadInput, match="is of the split None"):
        answer_splits(alone, ["popular", "random"])
    for odd in (["popular"], {}, 5):
        rows = [{"question_id": 1, "answer": "y", "split": odd}]
        strange = Pope.load_answers(write_lines(tmp_path / "odd.jsonl", rows))
        with pytest.raises(BadInput, match=r"line 1 is of the split [\[{5]"):
            answer_splits(strange, ["popular"])


def test_gqa_files_are_lists_over_many_lines_with_other_objects(tmp_path: Path) -> None:
    """The form of VCD's and RITUAL's GQA files: three times yes, then three times no."""
    rows = [
        {"question_id": n, "image": f"{2405722 + n // 6}.jpg", "text": text, "label": label}
        for n, (text, label) in enumerate(
            [
                ("Is there a bird in the image?", "yes"),
                ("Is there a wall in the image?", "yes"),
                ("Is there a grass in the image?", "yes"),
                ("Is there a person in the image?", "no"),
            ],
            start=1,
        )
    ]
    path = tmp_path / "gqa_pope_seem_popular.json"
    path.write_text(json.dumps(rows, indent=4))
    file = load_questions(path)
    assert [q.label for q in file.questions] == ["yes", "yes", "yes", "no"]
    assert asked_object(file.questions[2].text) == "grass"


def test_conversations_are_asked_turn_by_turn(tmp_path: Path) -> None:
    """The form of PAI's chat files."""
    world = CocoData(write_world(tmp_path / "w", 2))
    rows = [
        {
            "chat_id": chat,
            "image": f"w_{chat:012d}.png",
            "text": [f"Is there a {name} in the image?" for name in ("dog", "cup", "car")],
            "label": ["yes", "no", "yes"],
        }
        for chat in (1, 2)
    ]
    path = write_lines(tmp_path / "coco_pope_chat_random.json", rows)
    task = Pope(world, Options(questions={"random": path}, prompt_style="bare"))
    assert [(s.sample_id, s.follows, s.image_id, s.target) for s in task.samples] == [
        ("random:1", None, 1, "yes"),
        ("random:2", "random:1", 1, "no"),
        ("random:3", "random:2", 1, "yes"),
        ("random:4", None, 2, "yes"),
        ("random:5", "random:4", 2, "no"),
        ("random:6", "random:5", 2, "yes"),
    ]
    assert task.facts["questions"] == {"random": "6 rows, no published size; 2 conversations"}
    # A limit keeps whole conversations.
    first = Pope(world, Options(questions={"random": path}, prompt_style="bare", limit=1))
    assert first.samples == task.samples[:3]


@pytest.mark.parametrize(
    "broken", [{"label": ["yes"]}, {"label": "yes"}, {"text": []}, {"text": ["Is there?", 3]}]
)
def test_broken_conversations_say_where(tmp_path: Path, broken: dict[str, Any]) -> None:
    good = {
        "image": "a.png",
        "text": ["Is there a dog?", "Is there a cup?"],
        "label": ["yes", "no"],
    }
    path = write_lines(tmp_path / "chat.json", [good, {**good, **broken}])
    with pytest.raises(BadInput, match=r"chat\.json, line 2"):
        load_questions(path)


def picture(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 6), (level, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def hub_rows() -> list[dict[str, Any]]:
    """Rows as lmms-eval's hub set has them: ids begin anew in each category."""
    return [
        {
            "id": f"{s}{n}",
            "question_id": str(n + 1),
            "question": f"Is there a {name} in the image?",
            "answer": "no" if n % 2 else "yes",
            "image_source": f"COCO_val2014_{image:012d}",
            "image": {"bytes": picture(image), "path": None},
            "category": split,
        }
        for s, split in enumerate(SPLITS)
        for n, (image, name) in enumerate((i, o) for i in (7, 8) for o in ("dog", f"cup{s}"))
    ]


def write_parquet(path: Path, rows: list[dict[str, Any]], form: str = "feature") -> Path:
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    if form == "feature":
        datasets = pytest.importorskip("datasets")
        types = {key: datasets.Value("string") for key in columns}
        features = datasets.Features({**types, "image": datasets.Image()})
        datasets.Dataset.from_dict(columns, features=features).to_parquet(path)
        return path
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    if form == "bytes":
        columns["image"] = [cell["bytes"] for cell in columns["image"]]
    parquet.write_table(pyarrow.table(columns), path)
    return path


@pytest.mark.parametrize("form", ["feature", "struct", "bytes", "folder"])
def test_parquet_files_of_the_hub_set(tmp_path: Path, form: str) -> None:
    rows = hub_rows()
    if form == "folder":
        (tmp_path / "set").mkdir()
        path = tmp_path / "set"
        write_parquet(path / "test-00000-of-00002.parquet", rows[:5], "struct")
        write_parquet(path / "test-00001-of-00002.parquet", rows[5:], "struct")
    else:
        path = write_parquet(tmp_path / "test-00000.parquet", rows, form)
    table = Pope.open(path)
    assert isinstance(table, QuestionTable) and isinstance(table, DataSource)
    assert {split: len(file.questions) for split, file in table.splits.items()} == dict.fromkeys(
        SPLITS, 4
    )
    task = Pope(table, Options(prompt_style="bare"))
    assert [s.sample_id for s in task.samples[:5]] == [
        "random:1",
        "random:2",
        "random:3",
        "random:4",
        "popular:1",
    ]
    sample = task.samples[3]
    assert (sample.image, sample.prompt, sample.target) == (
        "COCO_val2014_000000000008.jpg",
        "Is there a cup0 in the image?",
        "no",
    )
    table.require_images([s.image for s in task.samples if s.image])
    assert table.image("COCO_val2014_000000000008.jpg").getpixel((0, 0)) == (8, 0, 0)
    with pytest.raises(BadInput, match=r"lacks 1 of 1 images, first other\.jpg"):
        table.require_images(["other.jpg"])
    one = Pope(table, Options(splits=("random",)))
    assert {s.split for s in one.samples} == {"random"}
    with pytest.raises(BadInput, match="no questions of the split small: choose from random"):
        Pope(table, Options(splits=("small",)))
    with pytest.raises(BadInput, match="CHAIR needs annotated images"):
        Chair(table, Options())


def test_the_fingerprint_of_a_table_is_that_of_its_content(tmp_path: Path) -> None:
    rows = hub_rows()
    first = QuestionTable(write_parquet(tmp_path / "a.parquet", rows, "struct")).sha256
    assert QuestionTable(write_parquet(tmp_path / "b.parquet", rows, "bytes")).sha256 == first
    rows[0]["answer"] = "no"
    assert QuestionTable(write_parquet(tmp_path / "c.parquet", rows, "struct")).sha256 != first
    rows = hub_rows()
    rows[0]["image"] = {"bytes": picture(99), "path": None}
    assert QuestionTable(write_parquet(tmp_path / "d.parquet", rows, "struct")).sha256 != first


def test_a_parquet_file_of_questions_over_pictures_of_ones_own(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "pope.parquet", hub_rows(), "struct")
    world = CocoData(write_world(tmp_path / "w", 2))
    everything = Pope(world, Options(questions={"all": path}))
    assert list(everything.facts["questions"]) == list(SPLITS)
    one = Pope(world, Options(questions={"popular": path}))
    assert [s for s in everything.samples if s.split == "popular"] == one.samples
    with pytest.raises(BadInput, match="several files for the splits popular"):
        Pope(world, Options(questions={"popular": path, "all": path}))


@pytest.mark.parametrize("bad", ["torn", "absent", "picture"])
def test_tables_that_cannot_be_read(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "pope.parquet"
    if bad == "torn":
        path.write_bytes(b"PAR1 and then nothing")
    elif bad == "picture":
        rows = hub_rows()
        rows[0]["image"] = {"bytes": b"no picture", "path": None}
        write_parquet(path, rows, "struct")
        with pytest.raises(BadInput, match=r"COCO_val2014_000000000007\.jpg is not a readable"):
            QuestionTable(path).image("COCO_val2014_000000000007.jpg")
        return
    with pytest.raises(BadInput, match=r"cannot read the questions .*pope\.parquet"):
        open_images(path)


def test_a_hub_name_is_read_by_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub itself is not asked: `load_dataset` is given its answer here."""
    datasets = pytest.importorskip("datasets")
    path = write_parquet(tmp_path / "pope.parquet", hub_rows())
    whole = datasets.load_dataset("parquet", data_files=str(path), split="train")
    asked = []

    def load(name: str, configuration: str | None) -> dict[str, Any]:
        asked.append((name, configuration))
        if configuration is None:
            return {"test": whole}
        return {
            s: whole.filter(lambda row, s=s: row["category"] == s).remove_columns("category")
            for s in SPLITS
        }

    monkeypatch.setattr(datasets, "load_dataset", load)
    plain, full = open_images("lmms-lab/POPE"), open_images("lmms-lab/POPE:Full")
    assert asked == [("lmms-lab/POPE", None), ("lmms-lab/POPE", "Full")]
    assert isinstance(plain, QuestionTable) and isinstance(full, QuestionTable)
    assert plain.name == "lmms-lab/POPE"
    assert plain.splits == full.splits


def test_a_hub_name_without_a_network(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    for name in ("lmms-lab/POPE", "misspelt/folder"):
        with pytest.raises(BadInput, match=f"no data at {name}, nor a data set of that name"):
            open_images(name)


def test_tables_need_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BadInput, match=r"pip install 'vlmfix\[eval\]'"):
        open_images(tmp_path / "pope.parquet")


def write_tsv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    return path


def tsv_rows() -> list[dict[str, Any]]:
    """VLMEvalKit's form: one row per (image, object), asked in several categories at once."""
    return [
        {
            "index": 10 + n,
            "image": content,
            "question": f"Is there a {name} in the image?",
            "answer": answer,
            "category": category,
        }
        for n, (content, name, answer, category) in enumerate(
            [
                (base64.b64encode(picture(7)).decode(), "dog", "Yes", "random,popular,adversarial"),
                ("10", "cup", "No", "popular"),
                ("10", "car", "No", "random,adversarial"),
                (base64.b64encode(picture(8)).decode(), "kite", "Yes", "popular, random"),
            ]
        )
    ]


def test_the_tsv_of_vlmevalkit_puts_a_row_into_all_its_categories(tmp_path: Path) -> None:
    table = Pope.open(write_tsv(tmp_path / "POPE.tsv", tsv_rows()))
    assert isinstance(table, QuestionTable)
    found = {s: [q.question_id for q in f.questions] for s, f in table.splits.items()}
    assert found == {"random": [10, 12, 13], "popular": [10, 11, 13], "adversarial": [10, 12]}
    popular = table.splits["popular"].questions
    assert [q.label for q in popular] == ["yes", "no", "yes"]
    assert [table.image(q.image).getpixel((0, 0))[0] for q in popular] == [7, 7, 8]
    assert (
        load_splits(tmp_path / "POPE.tsv").keys() == question_source(tmp_path / "POPE.tsv").keys()
    )


def test_broken_tables_say_where(tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "POPE.tsv", tsv_rows())
    path.write_text(path.read_text() + "14\tonly two fields\n")
    with pytest.raises(BadInput, match=r"POPE\.tsv, line 6 has another number of fields"):
        open_images(path)
    rows = tsv_rows()
    rows[3]["image"] = "&" * 100
    with pytest.raises(BadInput, match="13 is not a readable image"):
        table = open_images(write_tsv(path, rows))
        table.image("13")
    rows[3]["category"] = ""
    with pytest.raises(BadInput, match="some rows have a `category` and some have none"):
        open_images(write_tsv(path, rows))


def test_one_split_is_asked_of_a_file_that_holds_several(tmp_path: Path) -> None:
    rows = [{**row, "category": SPLITS[n % 3]} for n, row in enumerate(coco_rows(6))]
    path = write_lines(tmp_path / "llava_pope_test.jsonl", rows)
    with pytest.raises(BadInput, match="holds the splits random, popular, adversarial: choose one"):
        load_questions(path)
    world = CocoData(write_world(tmp_path / "w", 2))
    task = Pope(world, Options(questions={"popular": path}))
    assert [s.sample_id for s in task.samples] == ["popular:2", "popular:5"]
    with pytest.raises(BadInput, match="no questions of the split hard: choose from random"):
        Pope(world, Options(questions={"hard": path}))


def test_builder_options(tmp_path: Path) -> None:
    folder = write_world(tmp_path / "w")
    captions = folder / "annotations" / "captions.json"
    captions.write_text(json.dumps({"annotations": [{"image_id": 1, "caption": "Two zebras."}]}))
    world = CocoData(folder)

    def asked(**options: Any) -> set[str]:
        task = Pope(world, Options(n_images=None, **options))
        return {asked_object(s.prompt) for s in task.samples}

    assert "zebra" in asked() and "zebra" in asked(ground_truth="instances+captions")
    assert "zebra" not in asked(ground_truth="instances")
    captions.unlink()
    with pytest.raises(
        BadInput, match="needs captions, and COCO's categories alone; .* has no cap"
    ):
        Pope(CocoData(folder), Options(n_images=None, ground_truth="instances+captions"))
    with pytest.raises(BadInput, match="ground_truth='boxes': choose instances or"):
        Pope(world, Options(ground_truth="boxes"))


def test_the_typo_of_the_official_files_on_request(tmp_path: Path) -> None:
    folder = write_world(tmp_path / "w")
    instances = folder / "annotations" / "instances.json"
    instances.write_text(instances.read_text().replace('"kite"', '"orange"'))
    prompts = [
        {
            s.prompt
            for s in Pope(CocoData(folder), Options(n_images=None, official_typo=typo)).samples
        }
        for typo in (False, True)
    ]
    assert not any("imange" in prompt for prompt in prompts[0])
    assert {p.replace("imange", "image") for p in prompts[1]} == prompts[0] != prompts[1]
