"""POPE: building, reading and scoring questions, where files and models are imperfect."""

from __future__ import annotations

import json
import random
import zipfile
from pathlib import Path
from typing import Any

import pytest
from evals_worlds import write_world

from vlmfix.emoji import evaluation_split
from vlmfix.errors import BadInput
from vlmfix.evals.inputs.coco import CocoData
from vlmfix.evals.inputs.parsers import PARSERS, get_parser
from vlmfix.evals.pope.builder import Question, build_questions, select_images
from vlmfix.evals.pope.files import load_questions, pair_answers
from vlmfix.evals.pope.task import Pope, score_answers
from vlmfix.evals.tasks import Options

IMAGES = [
    ("a.png", ["dog", "cup", "car"]),
    ("b.png", ["cat", "kite", "dog", "egg"]),
    ("c.png", ["bed", "cat", "cow"]),
]


def test_positives_and_negatives_alternate_and_are_true() -> None:
    for strategy in ("random", "popular", "adversarial"):
        questions = build_questions(IMAGES, strategy, seed=3)
        assert [q.question_id for q in questions] == list(range(1, 19))
        assert [q.label for q in questions] == ["yes", "no"] * 9
        for question in questions:
            objects = dict(IMAGES)[question.image]
            named = question.text.removesuffix(" in the image?").split()[-1]
            assert (named in objects) == (question.label == "yes"), question
            assert question.text.split()[2] == ("an" if named == "egg" else "a")
        asked = [(q.image, q.text) for q in questions]
        assert len(set(asked)) == len(asked)


def test_same_seed_same_questions_other_seed_others() -> None:
    assert build_questions(IMAGES, "random", 1) == build_questions(IMAGES, "random", 1)
    assert build_questions(IMAGES, "random", 1) != build_questions(IMAGES, "random", 2)


@pytest.mark.parametrize("strategy", ["random", "popular", "adversarial"])
@pytest.mark.timeout(10)
def test_an_image_that_holds_everything_is_skipped(strategy: str) -> None:
    full = [("all.png", ["dog", "cup", "car", "cat"]), ("b.png", ["cat", "cup", "car"])]
    with pytest.warns(UserWarning, match=r"hold every object.*all\.png"):
        questions = build_questions(full, strategy, seed=0)
    # b.png lacks only the dog: one pair, then it is exhausted too.
    assert [(q.image, q.label) for q in questions] == [("b.png", "yes"), ("b.png", "no")]


def test_popular_takes_the_most_frequent_absent_object() -> None:
    images = [
        ("1.png", ["dog", "cup", "car"]),
        ("2.png", ["cat", "cup", "dog"]),
        ("3.png", ["kite", "bed", "fork"]),
    ]
    first = [q for q in build_questions(images, "popular", 0) if q.image == "3.png"]
    assert [q.text for q in first if q.label == "no"] == [
        "Is there a dog in the image?",
        "Is there a cup in the image?",
        "Is there a car in the image?",
    ]


def test_too_few_images_names_both_numbers() -> None:
    objects = {1: ["a", "b", "c"], 2: ["a"], 3: ["a", "b", "c", "d"]}
    with pytest.raises(BadInput, match=r"500 images wanted, but only 2 have 3"):
        select_images(objects, 500, 0, 3)
    assert select_images(objects, None, 0, 3) == [1, 3]
    many = {i: ["a", "b", "c"] for i in range(50)}
    assert select_images(many, 7, 5, 3) == random.Random(5).sample(range(50), 7)


def test_unknown_names_list_the_choices(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="random, popular, adversarial"):
        build_questions(IMAGES, "hard", 0)
    with pytest.raises(BadInput, match="official, opera, lmms_eval"):
        get_parser("offical")
    with pytest.raises(BadInput, match="bare, lmms, vcd, clearsight"):
        Pope(CocoData(write_world(tmp_path / "w")), Options(prompt_style="chatty", n_images=None))


@pytest.mark.parametrize("form", ["lines", "list"])
@pytest.mark.parametrize(
    ("text", "label", "yes"), [("text", "label", "yes"), ("question", "answer", 1)]
)
def test_question_files_in_every_spelling(
    tmp_path: Path, form: str, text: str, label: str, yes: Any
) -> None:
    rows = [{"question_id": 4, "image": "a.png", text: "Is there a cup in the imange?", label: yes}]
    rows.append({"question_id": 9, "image": "a.png", text: "Is there a dog?", label: "No"})
    path = tmp_path / "pope.json"
    path.write_text(json.dumps(rows) if form == "list" else "\n".join(map(json.dumps, rows)))
    file = load_questions(path)
    assert [(q.question_id, q.label) for q in file.questions] == [(4, "yes"), (9, "no")]
    assert file.variant == "2 rows, no published size; 1 rows read 'imange'"


@pytest.mark.parametrize(("rows", "named"), [(3000, "full split"), (2910, "OPERA/LLaVA random")])
def test_published_variants_are_known_by_their_size(tmp_path: Path, rows: int, named: str) -> None:
    path = tmp_path / "pope.json"
    row = '{"image": "a.png", "text": "?", "label": "no"}\n'
    path.write_text(row * rows)
    assert load_questions(path).variant.startswith(named)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"image": "a", "text": "?", "label": "maybe"}', "line 1: the label 'maybe'"),
        ('{"image": "a", "label": "yes"}', "line 1: needs `image` and `text`"),
        ('{"image": "a", "text": "?", "label": "yes"', "line 1 is not JSON"),
        ("", "is empty: expected one JSON object per line"),
        (
            '{"question_id": 1, "image": "a", "text": "?", "label": "yes"}\n' * 2,
            "question_id: 1 repeated: 1",
        ),
    ],
)
def test_broken_question_files_say_where(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "pope.json"
    path.write_text(content)
    with pytest.raises(BadInput, match="pope.json") as caught:
        load_questions(path)
    assert message in str(caught.value)


def ten() -> tuple[list[Question], list[dict[str, Any]]]:
    questions = [
        Question(i, f"{i // 2}.png", f"q{i}", "yes" if i % 2 else "no") for i in range(1, 11)
    ]
    replies = ["Yes", "No", "No", "No", "Yes", "Yes", "Yes", "No", "Yes", "Yes"]
    return questions, [
        {"question_id": q.question_id, "image": q.image, "question": q.text, "answer": reply}
        for q, reply in zip(questions, replies, strict=True)
    ]


@pytest.mark.parametrize("with_ids", [True, False])
def test_order_of_answers_does_not_matter(with_ids: bool) -> None:
    questions, answers = ten()
    if not with_ids:
        answers = [{k: v for k, v in row.items() if k != "question_id"} for row in answers]
    shuffled = random.Random(0).sample(answers, len(answers))
    assert [r["answer"] for r in shuffled] != [r["answer"] for r in answers]
    straight = score_answers({"s": questions}, {"s": answers})
    assert score_answers({"s": questions}, {"s": shuffled}) == straight
    assert straight["counts"]["s"]["correct"] == 7


def test_missing_repeated_and_foreign_answers_are_listed() -> None:
    questions, answers = ten()
    missing = r"2 of 10 questions have no answer: \('1', 'q3'\), \('3', 'q7'\)"
    with pytest.raises(BadInput, match=missing):
        pair_answers(questions, [r for r in answers if r["question_id"] not in (3, 7)])
    with pytest.raises(BadInput, match="1 repeated"):
        pair_answers(questions, [*answers, {"question_id": 5, "answer": "Yes"}])
    with pytest.raises(BadInput, match="1 answers belong to no question: 99"):
        pair_answers(questions, [*answers, {"question_id": 99, "answer": "Yes"}])
    with pytest.raises(BadInput, match="no answers for the splits s"):
        score_answers({"s": questions}, {})


def test_zero_denominators_give_zero_and_a_flag() -> None:
    questions = [Question(1, "a", "?", "no"), Question(2, "b", "?", "no")]
    answers = [{"question_id": 1, "answer": "No"}, {"question_id": 2, "answer": "No"}]
    scored = score_answers({"s": questions}, {"s": answers})
    values = {name: score["value"] for name, score in scored["scores"]["s"].items()}
    assert values == {"accuracy": 1, "precision": 0, "recall": 0, "f1": 0, "yes_ratio": 0}
    assert scored["flags"] == [f"s.{m}: zero denominator" for m in ("precision", "recall", "f1")]
    wrong = score_answers({"s": questions}, {"s": [{**row, "answer": "Yes"} for row in answers]})
    # 2PR / (P + R) with P = 0 and no R; its short form would hide that behind a denominator of 2.
    assert "s.f1: zero denominator" in wrong["flags"]
    # All answers are right, so resampling shows no spread; Wilson's interval still does.
    assert scored["scores"]["s"]["accuracy"]["ci_method"] == "wilson"
    assert scored["scores"]["s"]["accuracy"]["ci"][0] < 0.5


@pytest.mark.parametrize("parser", PARSERS)
@pytest.mark.parametrize("empty", ["", "  \n", None])
def test_empty_answers_are_counted_by_every_parser(parser: str, empty: str | None) -> None:
    questions, answers = ten()
    answers[0]["answer"] = empty
    counts = score_answers({"s": questions}, {"s": answers}, parser)["counts"]["s"]
    assert counts["empty"] == 1 and counts["n"] == 10
    assert counts["unparsed"] == (1 if parser in ("lmms_eval", "vlmevalkit", "strict") else 0)


def test_unparsed_is_wrong_and_never_yes() -> None:
    questions = [Question(1, "a", "?", "yes"), Question(2, "a", "?", "no")]
    answers = [{"question_id": i, "answer": "a dog"} for i in (1, 2)]
    strict = score_answers({"s": questions}, {"s": answers}, "strict")["counts"]["s"]
    assert (strict["correct"], strict["yes"], strict["fn"], strict["fp"]) == (0, 0, 1, 0)
    lmms = score_answers({"s": questions}, {"s": answers}, "lmms_eval")["counts"]["s"]
    assert (lmms["correct"], lmms["fn"]) == (0, 0)


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("**No**", "no"),
        ("<answer>yes</answer>", "yes"),
        ("Yeah, sure", "yes"),
        ("nope", "no"),
        ("Cannot determine", "no"),
        ("N", "no"),
        ("There isn\u2019t one.", "no"),
        ("It is a yes", "yes"),
        ("Yes. There is no cat though.", "yes"),
        ("I know it.", None),
        ("There is a snowboard.", None),
        ("A dog. No other animals.", None),
    ],
)
def test_strict_parser(answer: str, verdict: str | None) -> None:
    assert PARSERS["strict"](answer, "yes") == verdict


def test_task_asks_the_first_images_of_the_whole_protocol(tmp_path: Path) -> None:
    data = CocoData(write_world(tmp_path / "w"))
    whole = Pope(data, Options(n_images=10, seed=4))
    first = Pope(data, Options(n_images=10, seed=4, limit=3))
    chosen = list(dict.fromkeys(s.image for s in whole.samples))
    assert len(chosen) == 10 and not whole.partial
    # The negatives depend on all ten images, so a limit must cut questions, not images to build on.
    assert first.samples == [s for s in whole.samples if s.image in chosen[:3]]
    assert first.partial and len(first.samples) == 3 * 3 * 6
    assert not Pope(data, Options(n_images=10, limit=10)).partial
    assert whole.samples[0].prompt.endswith("?\nAnswer the question using a single word or phrase.")


def test_task_reads_ready_made_questions(tmp_path: Path) -> None:
    data = CocoData(write_world(tmp_path / "w"))
    path = tmp_path / "coco_pope_random.json"
    row = {"question_id": 1, "image": "w_000000000002.png", "text": "Is there?", "label": "yes"}
    path.write_text(json.dumps(row))
    task = Pope(data, Options(questions={"random": path}, prompt_style="bare"))
    assert [(s.sample_id, s.image_id, s.prompt) for s in task.samples] == [
        ("random:1", 2, "Is there?")
    ]
    assert task.facts["questions"] == {"random": "1 rows, no published size"}


def test_captions_add_objects_only_where_all_categories_are_cocos(tmp_path: Path) -> None:
    world = write_world(tmp_path / "w")
    captions = world / "annotations" / "captions.json"
    captions.write_text(json.dumps({"annotations": [{"image_id": 1, "caption": "Two zebras."}]}))
    both = Pope(CocoData(world), Options(n_images=None))
    assert both.facts["questions"]["random"] == "built from instances+captions"
    assert any("zebra" in s.prompt for s in both.samples)
    instances = world / "annotations" / "instances.json"
    instances.write_text(instances.read_text().replace('"kite"', '"drone"'))
    only = Pope(CocoData(world), Options(n_images=None))
    assert only.facts["questions"]["random"] == "built from instances"
    assert not any("zebra" in s.prompt for s in only.samples)


SMALL_WORLD = [
    # Boxes in images of 100 x 100: name, width, height.
    [("dog", 10, 10), ("cup", 50, 50), ("car", 14, 14)],
    # A dog is small only if all dogs are; 2 % is small.
    [("dog", 5, 5), ("cat", 20, 10), ("kite", 21, 10), ("dog", 40, 40)],
    [("car", 60, 60), ("bed", 30, 30), ("cow", 15, 15)],
    [("cat", 30, 30), ("sheep", 30, 30), ("bed", 30, 30)],
]


def write_small_world(folder: Path) -> Path:
    names = sorted({name for row in SMALL_WORLD for name, _, _ in row})
    images = [
        {"id": i, "file_name": f"{i}.png", "width": 100, "height": 100}
        for i in range(1, len(SMALL_WORLD) + 1)
    ]
    boxes = [(i, *box) for i, row in enumerate(SMALL_WORLD, start=1) for box in row]
    annotations = [
        {"id": n, "image_id": i, "category_id": names.index(name), "bbox": [3, 4, width, height]}
        for n, (i, name, width, height) in enumerate(boxes)
    ]
    categories = [{"id": i, "name": name} for i, name in enumerate(names)]
    (folder / "annotations").mkdir(parents=True)
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations" / "instances.json").write_text(json.dumps(content))
    return folder


def asked(task: Pope) -> list[tuple[str, str, str]]:
    return [(s.image, s.prompt.split()[3], s.target) for s in task.samples]


def test_small_objects_by_hand(tmp_path: Path) -> None:
    data = CocoData(write_small_world(tmp_path / "w"))
    assert data.largest[2] == pytest.approx({"dog": 0.16, "cat": 0.02, "kite": 0.021})
    task = Pope(data, Options(n_images=None, splits=("small",)))
    assert asked(task) == [
        # Beside a dog: cup and car, which are in 1.png, then cat and kite, of 2.png.
        ("1.png", "dog", "yes"),
        ("1.png", "cat", "no"),
        # Beside a car: dog and cup, then bed and cow, of 3.png.
        ("1.png", "car", "yes"),
        ("1.png", "bed", "no"),
        # Beside a cat: dog and kite, then sheep and bed, of 4.png.
        ("2.png", "cat", "yes"),
        ("2.png", "sheep", "no"),
    ]
    assert task.facts["questions"] == {
        "small": "built from instances, objects up to 2% of the image, adversarial"
    }
    both = Pope(data, Options(n_images=None, splits=("small", "random")))
    assert [s for s in both.samples if s.split == "small"] == task.samples


def test_small_objects_of_the_bundled_images() -> None:
    data = CocoData(evaluation_split())
    task = Pope(data, Options(splits=("small",)))
    labels = [sample.target for sample in task.samples]
    assert labels == ["yes", "no"] * 466
    assert len({sample.image for sample in task.samples}) == 312
    assert {s.image for s in task.samples} <= {s.image for s in Pope(data, Options()).samples}
    with zipfile.ZipFile(evaluation_split()) as archive:
        content = json.loads(archive.read("annotations/instances.json"))
    boxes: dict[tuple[int, str], list[float]] = {}
    for row in content["annotations"]:
        _, _, width, height = row["bbox"]
        key = (row["image_id"], data.categories[row["category_id"]])
        boxes.setdefault(key, []).append(width * height / 112**2)
    for sample in task.samples:
        name = sample.prompt.split(" in the image?")[0].split(maxsplit=3)[3]
        sizes = boxes.get((int(sample.image_id), name))
        assert (sizes is not None and max(sizes) <= 0.02) == (sample.target == "yes")
        assert sizes is None or sample.target == "yes"


def test_splits_are_chosen(tmp_path: Path) -> None:
    data = CocoData(write_world(tmp_path / "w"))
    every = Pope(data, Options(n_images=None))
    one = Pope(data, Options(n_images=None, splits=("adversarial",)))
    assert one.samples == [s for s in every.samples if s.split == "adversarial"]
    assert {s.split for s in every.samples} == {"random", "popular", "adversarial"}
    two = Pope(data, Options(n_images=None, splits=("popular", "random")))
    assert list(two.facts["questions"]) == ["popular", "random"]
    choices = "random, popular, adversarial, small"
    for splits in ((), ("hard",), ("random", "random")):
        with pytest.raises(BadInput, match=choices):
            Pope(data, Options(n_images=None, splits=splits))
    with pytest.raises(BadInput, match="leave splits= out"):
        Pope(data, Options(questions={"random": tmp_path / "q"}, splits=("random",)))


def test_small_needs_boxes_and_something_small(tmp_path: Path) -> None:
    options = Options(n_images=None, splits=("small",))
    with pytest.raises(BadInput, match=r"instances\.json, annotations, item 1 .*`bbox` in every"):
        Pope(CocoData(write_world(tmp_path / "w")), options)
    world = write_small_world(tmp_path / "s")
    path = world / "annotations" / "instances.json"
    whole = path.read_text()
    path.write_text(whole.replace('"width": 100', '"width": 0'))
    with pytest.raises(BadInput, match="without a usable size .*`width` and `height`"):
        Pope(CocoData(world), options)
    path.write_text(whole.replace('"width": 100', '"width": 10'))
    with pytest.raises(BadInput, match="no object of the 4 selected images covers 2% of"):
        Pope(CocoData(world), options)
