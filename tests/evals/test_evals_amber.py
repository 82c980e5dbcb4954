"""AMBER: its files, nouns and their similarity, both parts, and whole runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from evals_scripted import Scripted
from PIL import Image

from vlmfix.errors import BadInput, MissingDependency
from vlmfix.evals import to_markdown
from vlmfix.evals.amber.data import AmberData, Lexicon
from vlmfix.evals.amber.discriminative import EXACT, AmberDiscriminative, official_figures
from vlmfix.evals.amber.generative import official_figures as official_descriptions
from vlmfix.evals.amber.objects import get_similarity, read_objects
from vlmfix.evals.amber.task import Amber, score_answers
from vlmfix.evals.inputs import nltk_tools
from vlmfix.evals.tasks import Answer, Options

RELATION: dict[str, list[str]] = {
    "sky": [],
    "forest": ["tree", "leave"],
    "grass": ["ground"],
    "road": ["street", "ground"],
    "ship": ["boat"],
    "boat": ["ship"],
    "dog": ["puppy"],
    "cloud": [],
    "light": [],
    "cat": [],
}
TYPES = {
    "existence": "discriminative-hallucination",
    "state": "discriminative-attribute-state",
    "number": "discriminative-attribute-number",
    "action": "discriminative-attribute-action",
    "relation": "relation",
}
ITEMS: list[dict[str, Any]] = [
    {"id": 1, "type": "generative", "truth": ["sky", "forest", "grass", "road"], "hallu": ["dog"]},
    {"id": 2, "type": "generative", "truth": ["ship", "ship"], "hallu": ["cloud", "dog"]},
    {"id": 3, "type": TYPES["existence"], "truth": "no"},
    {"id": 4, "type": TYPES["existence"], "truth": "no"},
    {"id": 5, "type": TYPES["state"], "truth": "yes"},
    {"id": 6, "type": TYPES["state"], "truth": "no"},
    {"id": 7, "type": TYPES["number"], "truth": "no"},
    {"id": 8, "type": TYPES["action"], "truth": "yes"},
    {"id": 9, "type": TYPES["relation"], "truth": "no"},
    {"id": 10, "type": "discriminative-relation", "truth": "yes"},
]
LEXICON = Lexicon(RELATION, frozenset({"light"}))


def write(folder: Path, items: list[dict[str, Any]] = ITEMS, queries: bool = True) -> Path:
    (folder / "data" / "query").mkdir(parents=True)
    (folder / "image").mkdir()
    data = folder / "data"
    (data / "annotations.json").write_text(json.dumps(items))
    (data / "relation.json").write_text(json.dumps(RELATION))
    (data / "safe_words.txt").write_text("light\n")
    asked = [
        {
            "id": one["id"],
            "image": f"AMBER_{2 - number % 2}.jpg",
            "query": "Describe this image." if one["type"] == "generative" else f"Is {one['id']}?",
        }
        for number, one in enumerate(items)
    ]
    if queries:
        (data / "query" / "query_all.json").write_text(json.dumps(asked))
        (data / "query" / "query_generative.json").write_text(json.dumps(asked[:2]))
    for n in (1, 2):
        Image.new("RGB", (4, 4)).save(folder / "image" / f"AMBER_{n}.jpg")
    return folder


@pytest.fixture
def tagger(monkeypatch: pytest.MonkeyPatch) -> None:
    """NLTK's steps for texts whose every word with a small or capital letter is a noun."""

    def tag(text: str) -> list[tuple[str, str]]:
        words = text.replace(".", " .").split()
        return [(word, "NNS" if word.endswith("s") else "NN") for word in words if word != "."] + [
            ("runs", "VBZ")
        ]

    tools = (tag, lambda word, part: word.removesuffix("s") if part == "n" else word)
    monkeypatch.setattr(nltk_tools, "_tools", lambda: tools)
    monkeypatch.setitem(sys.modules, "nltk", SimpleNamespace(__version__="3.9"))


# Nouns; objects named; imagined; covered; expected, all by hand.
@pytest.mark.parametrize(
    ("words", "named", "imagined", "covered", "expected"),
    [
        (["sky", "zebra", "Dog"], ["sky"], [], {0}, set()),  # neither is in the vocabulary
        (["tree", "leave", "forest"], ["tree", "leave", "forest"], [], {1}, set()),
        (["ground"], ["ground"], [], {2}, set()),  # grass and road list it: the first one
        (["street"], ["street"], [], {3}, set()),
        (["puppy", "dog"], ["puppy", "dog"], ["puppy", "dog"], set(), {0}),
        (["light"], ["light"], [], set(), set()),  # safe, but named
        (["cat", "cat"], ["cat", "cat"], ["cat", "cat"], set(), set()),  # every mention counts
        ([], [], [], set(), set()),
    ],
)
def test_objects_by_equal_words(
    words: list[str], named: list[str], imagined: list[str], covered: set[int], expected: set[int]
) -> None:
    item = ITEMS[0]
    found = read_objects(words, item["truth"], item["hallu"], LEXICON)
    assert (list(found.named), list(found.imagined)) == (named, imagined)
    assert (found.covered, found.expected) == (covered, expected)


def test_an_object_annotated_twice_is_covered_once() -> None:
    found = read_objects(["ship", "boat", "ship"], ["ship", "ship"], [], LEXICON)
    assert found.covered == {0}


def test_associations_come_before_the_objects_themselves() -> None:
    # "ship" stands for the boat that lists it before it stands for the ship.
    found = read_objects(["ship"], ["ship", "boat"], [], LEXICON)
    assert found.covered == {1}


def alike(*pairs: tuple[str, str]) -> Any:
    return lambda one, other: 0.9 if (one, other) in pairs else 0.8


@pytest.mark.parametrize(
    ("pairs", "imagined", "covered", "expected"),
    [
        ([], ["cat"], set(), set()),  # 0.8 is not above the threshold
        ([("cat", "sky")], [], {0}, set()),
        ([("cat", "tree"), ("cat", "sky")], [], {1}, set()),  # associations first
        ([("cat", "dog")], ["cat"], set(), {0}),
        ([("cat", "dog"), ("cat", "road")], [], {3}, {0}),  # expected, and excused
    ],
)
def test_objects_by_similarity(
    pairs: list[tuple[str, str]], imagined: list[str], covered: set[int], expected: set[int]
) -> None:
    item = ITEMS[0]
    found = read_objects(["cat"], item["truth"], item["hallu"], LEXICON, alike(*pairs))
    assert (list(found.imagined), found.covered, found.expected) == (imagined, covered, expected)


def test_a_noun_equal_to_a_true_object_is_not_compared() -> None:
    found = read_objects(["sky"], ["sky"], ["dog"], LEXICON, alike(("sky", "dog")))
    assert (found.imagined, found.expected) == ((), frozenset())


def test_an_expected_noun_may_mark_a_second_object() -> None:
    found = read_objects(["dog"], [], ["cloud", "dog"], LEXICON, alike(("dog", "cloud")))
    assert found.expected == {0, 1}


def fake_spacy(monkeypatch: pytest.MonkeyPatch, vectors: dict[str, float]) -> list[str]:
    loaded = []

    class Doc(SimpleNamespace):
        def similarity(self, other: Any) -> float:
            return float(1 - abs(self.vector_norm - other.vector_norm))

    class Model:
        vocab = SimpleNamespace(vectors=vectors)

        def __call__(self, word: str) -> Doc:
            return Doc(vector_norm=vectors.get(word, 0.0))

    module = ModuleType("spacy")

    def load(name: str) -> Model:
        loaded.append(name)
        return Model()

    module.load = load
    monkeypatch.setitem(sys.modules, "spacy", module)
    return loaded


def test_spacy_similarity(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = fake_spacy(monkeypatch, {"boat": 1.0, "ship": 0.9, "dog": 0.2})
    similarity = get_similarity("spacy")
    assert similarity is not None
    assert loaded == ["en_core_web_lg"]
    assert similarity("boat", "ship") == pytest.approx(0.9)
    assert similarity("boat", "dog") == pytest.approx(0.2)
    # Words without a vector are like themselves alone.
    assert (similarity("yak", "yak"), similarity("yak", "gnu"), similarity("yak", "dog")) == (
        1,
        0,
        0,
    )
    get_similarity("spacy:en_core_web_md")
    assert loaded[-1] == "en_core_web_md"


def test_a_model_without_vectors_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_spacy(monkeypatch, {})
    with pytest.raises(BadInput, match="model en_core_web_sm has no word vectors: use en_core_web"):
        get_similarity("spacy:en_core_web_sm")


def test_what_similarity_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(MissingDependency, match="python -m spacy download en_core_web_lg"):
        get_similarity("spacy")
    with pytest.raises(BadInput, match="no similarity 'cosine': choose 'exact', 'spacy'"):
        get_similarity("cosine")
    assert get_similarity("exact") is None


def test_what_nouns_need(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nltk_tools._tools.cache_clear()
    monkeypatch.setitem(sys.modules, "nltk", None)
    data = AmberData.open(write(tmp_path))
    with pytest.raises(MissingDependency, match="pip install .*nltk.* nltk.downloader punkt"):
        Amber(data, Options())
    with pytest.raises(MissingDependency, match="tagging words needs NLTK"):
        score_answers(data, [{"id": n, "response": "A dog."} for n in (1, 2)])
    AmberDiscriminative(data, Options())  # needs none


def described(first: list[str], second: list[str]) -> list[dict[str, Any]]:
    return [
        {"id": 1, "response": "x", "nouns": first},
        {"id": 2, "response": "", "nouns": second},
    ]


def test_descriptions_by_hand(tmp_path: Path) -> None:
    data = AmberData.open(write(tmp_path))
    answers = described(["sky", "tree", "dog", "light"], ["boat", "ship"])
    scored = score_answers(data, answers[::-1])
    values = {name: score["value"] for name, score in scored["scores"]["generative"].items()}
    assert values == {"chair": 1 / 6, "cover": 3 / 6, "hal": 1 / 2, "cog": 1 / 3}
    assert scored["compat"]["generative"] == {
        "chair": 16.7,
        "cover": 50.0,
        "hal": 50.0,
        "cog": 33.3,
    }
    assert scored["counts"]["generative"]["empty"] == 1
    assert "amber" not in scored["scores"]
    assert (scored["similarity"], scored["scores"].keys()) == ("exact", {"generative"})


def test_descriptions_without_any_object(tmp_path: Path) -> None:
    scored = score_answers(AmberData.open(write(tmp_path)), described([], ["zebra"]))
    assert scored["scores"]["generative"]["chair"]["value"] == 0
    assert scored["flags"] == ["generative.chair: zero denominator"]
    assert scored["compat"]["generative"]["chair"] == 0.0
    # The official counter of trials starts at 0.001: 2 / 2.001 of the descriptions are clean.
    assert scored["compat"]["generative"]["hal"] == 0.0


def test_official_rounding_of_descriptions() -> None:
    """Counters of trials start at 0.001: one of one is 99.9, and one clean description 0.1."""
    sums = {"n": 1, "hallucinated": 0, "named": 1, "imagined": 1, "covered": 1, "truth": 1}
    found = official_descriptions({**sums, "expected": 1, "hallucinations": 1})
    assert found == {"chair": 99.9, "cover": 99.9, "hal": 0.1, "cog": 99.9}


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [("Yes", "yes"), ("No", "no"), ("yes", None), ("no", None), ("No.", None), ("", None)],
)
def test_the_official_script_takes_two_answers(answer: str, verdict: str | None) -> None:
    assert EXACT(answer, "yes") == verdict


def replies(**changes: str) -> list[dict[str, Any]]:
    """Right answers, as the official script wants them, but for some ids."""
    right = {one["id"]: one["truth"].title() for one in ITEMS[2:]}
    right |= {int(key[1:]): text for key, text in changes.items()}
    return [{"id": number, "response": text} for number, text in right.items()]


def test_questions_by_hand(tmp_path: Path) -> None:
    data = AmberData.open(write(tmp_path))
    scored = score_answers(data, replies(_4="Yes", _5="no.", _6="", _9="No, it is not."))
    place = scored["scores"]["discriminative"]
    # Read: 3 no/no, 4 no/yes, 5 yes/no, 6 no/yes (official rule: empty is yes), 7, 8, 9, 10 right.
    assert place["accuracy"]["value"] == 5 / 8
    assert place["precision"]["value"] == 3 / 4
    assert place["recall"]["value"] == 3 / 5
    assert place["f1"]["value"] == pytest.approx(2 * 3 / (4 + 5))
    assert scored["scores"]["attribute"]["accuracy"]["value"] == 2 / 4
    assert scored["scores"]["existence"]["recall"]["value"] == 1 / 2
    assert set(scored["scores"]) == {
        "discriminative", "existence", "attribute", "state", "number", "action", "relation"
    }  # fmt: skip
    # As the official script reads them, 5 and 9 are neither Yes nor No: 3, 7, 8, 10 are right.
    assert scored["compat"]["discriminative"] == {
        "accuracy": 50.0, "precision": 100.0, "recall": 40.0, "f1": 57.1
    }  # fmt: skip
    assert (scored["n_unparsed"], scored["strict"]["n_unparsed"]) == (0, 1)
    assert scored["clusters"] == "picture"


def test_official_rounding() -> None:
    """F1 has 0.001 in its denominator for existence, and 0.0001 else: 1 / 1.501, or / 1.5001."""
    half, all_no = ["No", "Yes"] * 100, ["no"] * 200
    printed = {"accuracy": 50.0, "precision": 100.0, "recall": 50.0}
    found = official_figures(half, all_no, ["existence"] * 200)
    assert found["existence"] == {**printed, "f1": 66.6}
    assert found["discriminative"] == {**printed, "f1": 66.7}
    # One answer of one: 1 / 1.001 rounds to 99.9; pooled over three counters, 1 / 1.003 to 99.7.
    one = official_figures(["No"], ["no"], ["state"])
    assert (one["state"]["accuracy"], one["attribute"]["accuracy"]) == (99.9, 99.7)
    assert one["discriminative"]["accuracy"] == 99.9
    assert "relation" not in one


def test_both_parts_make_the_amber_score(tmp_path: Path) -> None:
    data = AmberData.open(write(tmp_path))
    scored = score_answers(data, described(["sky", "cat"], []) + replies(_3="Yes"))
    score = scored["scores"]["amber"]["amber_score"]
    f1 = 2 * 4 / (4 + 5)
    assert score["value"] == pytest.approx((1 - 1 / 2 + f1) / 2)
    assert score["ci"][0] <= score["value"] <= score["ci"][1]
    # CHAIR is 1 / 2.001, that is 50.0; P and R are 4 / 4.001 and 4 / 5.001, that is 100 and 80.
    assert scored["compat"]["amber_score"] == round((100 - 50.0 + 88.9) / 2, 1)


def test_the_amber_score_draws_pictures_for_both_parts(tmp_path: Path) -> None:
    """A resample that holds the first picture twice has its questions twice, too."""
    folder = write(tmp_path, queries=False)
    first = {1, 3, 4, 5, 6}
    queries = [
        {"id": n, "image": f"AMBER_{1 if n in first else 2}.jpg", "query": "?"}
        for n in range(1, 11)
    ]
    (folder / "data" / "query" / "query_all.json").write_text(json.dumps(queries))
    # All is wrong about the first picture, and nothing about the second.
    answers = described(["cat"], ["ship"]) + replies(_3="Yes", _4="Yes", _5="No", _6="Yes")
    score = score_answers(AmberData.open(folder), answers)["scores"]["amber"]["amber_score"]
    assert score["ci"] == [0, 1]


def test_a_part_that_is_begun_must_be_whole(tmp_path: Path) -> None:
    data = AmberData.open(write(tmp_path))
    with pytest.raises(BadInput, match="1 of 2 questions have no answer: 2: answer all"):
        score_answers(data, described([], [])[:1])
    with pytest.raises(BadInput, match="10 of 10 questions have no answer: 1, 2, 3"):
        score_answers(data, [])
    with pytest.raises(BadInput, match="1 answers belong to no question: 99"):
        score_answers(data, [*replies(), {"id": 99, "response": "No"}])
    with pytest.raises(BadInput, match="1 repeated: 3"):
        score_answers(data, [*replies(), {"id": 3, "response": "No"}])
    with pytest.raises(BadInput, match=r"row 1: `nouns` is 'dog', which is no list of words"):
        score_answers(data, [{"id": n, "response": "", "nouns": "dog"} for n in (1, 2)])


def test_without_queries_questions_are_scored_and_it_says_so(tmp_path: Path) -> None:
    data = AmberData.open(write(tmp_path, queries=False))
    scored = score_answers(data, replies())
    assert scored["scores"]["discriminative"]["accuracy"]["value"] == 1
    assert scored["clusters"] == "question (the folder has no query for some)"
    with pytest.raises(BadInput, match="no query for 8 of 8 annotated questions: 3, 4, 5"):
        AmberDiscriminative(data, Options())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "generic"}, r"item 1: type 'generic' is none of generative, disc"),
        ({"truth": "sky"}, r"item 1: truth is 'sky', which is no list of words"),
        ({"hallu": None}, r"item 1: hallu is None, which is no list of words"),
        ({"id": "one"}, r"item 1: id is 'one', which is no whole number"),
        ({"type": "relation"}, r"item 1: truth \['sky', .*\] is neither yes nor no"),
    ],
)
def test_broken_annotations_name_file_and_place(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInput, match=rf"annotations\.json, {message}"):
        AmberData.open(write(tmp_path, [{**ITEMS[0], **change}]))


def test_broken_vocabulary_and_queries(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no entry for yak, which the annotations use"):
        _ = AmberData.open(write(tmp_path / "a", [{**ITEMS[0], "truth": ["yak"]}])).lexicon
    folder = write(tmp_path / "b")
    (folder / "data" / "safe_words.txt").unlink()
    with pytest.raises(BadInput, match=r"holds no safe_words\.txt. It needs annotations\.json"):
        _ = AmberData.open(folder).lexicon
    folder = write(tmp_path / "c")
    path = folder / "data" / "query" / "query_generative.json"
    path.write_text('[{"id": 1, "image": "AMBER_9.jpg", "query": "Describe this image."}]')
    whole = path.with_name("query_all.json")
    kept = whole.read_text()
    whole.rename(path.with_name("query_more.json"))
    with pytest.raises(BadInput, match="item 1: id 1 asks something else in another file"):
        AmberData.open(folder)
    whole.write_text(kept)
    whole.with_name("query_more.json").unlink()
    path.write_text('[{"id": 77, "image": "AMBER_9.jpg", "query": "Describe this image."}]')
    with pytest.raises(BadInput, match="item 1: id 77 is not among the annotations"):
        AmberData.open(folder)


def test_the_whole_query_file_holds(tmp_path: Path) -> None:
    """The official files disagree about one question: query_all.json is the one that was asked."""
    folder = write(tmp_path)
    path = folder / "data" / "query" / "query_discriminative.json"
    rows = [{"id": n, "image": "AMBER_1.jpg", "query": "Is it so?"} for n in (3, 4)]
    path.write_text(json.dumps(rows))
    with pytest.warns(UserWarning, match="query_discriminative.json asks .* at id 3, 4: query_all"):
        data = AmberData.open(folder)
    assert data.queries[3] == ("AMBER_2.jpg", "Is 3?") and data.queries[4][1] == "Is 4?"
    path.write_text(json.dumps(rows + rows[:1]))
    with pytest.raises(BadInput, match=r"query_discriminative\.json: id: 1 repeated: 3"):
        AmberData.open(folder)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no bundled data: .*--data amber=FOLDER .* AMBER_1\.jpg"):
        AmberData.open(None)
    with pytest.raises(BadInput, match=r"holds no annotations\.json"):
        AmberData.open(tmp_path)


@pytest.mark.usefixtures("tagger")
def test_a_run_of_everything(tmp_path: Path) -> None:
    def reply(method: Any, request: Any) -> str:
        sample = request.sample
        if sample.split == "generative":
            return "sky trees" + (" cats" if method is None else "")
        return "Yes." if method is None else str(sample.target)

    model = Scripted(reply)
    entry = model.run("amber", write(tmp_path / "data"), tmp_path / "out")
    base, method = entry["arms"]["base"], entry["arms"]["var"]
    # "cats" is imagined in both; "sky" and "trees" are true of the first picture alone.
    assert base["scores"]["generative"]["chair"]["value"] == 4 / 6
    assert method["scores"]["generative"]["chair"]["value"] == 2 / 4
    assert base["scores"]["discriminative"]["f1"]["value"] == 0
    assert base["scores"]["amber"]["amber_score"]["value"] == pytest.approx((1 - 4 / 6) / 2)
    delta = method["delta"]["amber"]["amber_score"]
    assert delta["value"] == pytest.approx((1 - 1 / 2 + 1) / 2 - (1 - 4 / 6) / 2)
    assert method["delta"]["generative"]["chair"]["value"] < 0
    assert method["delta"]["discriminative"]["mcnemar"]["better"] == 5
    assert base["compat"]["discriminative"]["accuracy"] == 0.0
    assert (entry["engine"], entry["similarity"]) == ("nltk 3.9", "exact")
    table = to_markdown(json.loads((tmp_path / "out" / "results.json").read_text()))
    assert "| AMBER % " in table and "| generative | base |" in table
    prompts = {request.sample.sample_id: request.sample.prompt for request in model.requests}
    assert prompts["1"] == "Describe this image."
    assert prompts["3"] == "Is 3?\nAnswer the question using a single word or phrase."
    records = [
        json.loads(x)
        for x in (tmp_path / "out" / "samples_amber_base.jsonl").read_text().split("\n")
        if x
    ]
    assert records[0]["parsed"] == {"objects": ["sky", "tree", "cat"], "hallucinated": ["cat"]}
    assert score_answers(AmberData.open(tmp_path / "data"), records)["scores"] == base["scores"]


@pytest.mark.usefixtures("tagger")
def test_seeds_have_figures_of_their_own(tmp_path: Path) -> None:
    task = Amber(AmberData.open(write(tmp_path)), Options())
    n = len(task.samples)
    good = [Answer("sky" if s.split == "generative" else s.target.title()) for s in task.samples]
    bad = [Answer("cat" if s.split == "generative" else "Yes") for s in task.samples]
    scored = task.score(task.samples * 2, {"base": good + bad}, [0] * n + [1] * n)["base"]
    by_seed = scored["scores"]["amber"]["amber_score"]["by_seed"]
    assert by_seed == pytest.approx([(1 - 1 / 2 + 1) / 2, 0])
    assert [figures["amber_score"] for figures in scored["compat"]] == [75.0, 0.0]
    assert [figures["generative"]["hal"] for figures in scored["compat"]] == [50.0, 100.0]


def test_a_limit_takes_the_first_pictures(tmp_path: Path) -> None:
    task = AmberDiscriminative(AmberData.open(write(tmp_path)), Options(limit=1))
    assert task.partial
    assert {sample.image for sample in task.samples} == {"AMBER_2.jpg"}
    with pytest.raises(BadInput, match="no prompt style 'polite'"):
        AmberDiscriminative(AmberData.open(tmp_path), Options(prompt_style="polite"))


@pytest.mark.usefixtures("tagger")
def test_nothing_answered_is_nothing_scored(tmp_path: Path) -> None:
    data = AmberData.open(write(tmp_path))
    for task in (Amber(data, Options()), AmberDiscriminative(data, Options())):
        scored = task.score([], {"base": [], "var": []}, [])
        assert (scored["var"]["scores"], scored["var"]["n_unparsed"]) == ({}, 0)
