"""CHAIR's nltk engine: that it goes the official steps, and what it says where NLTK is not there.

Its exact figures are tested in tests/parity, where NLTK and its data are there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from evals_worlds import write_world

from vlmfix.errors import BadInput, MissingDependency
from vlmfix.evals.chair.objects import mentions, require_engine
from vlmfix.evals.chair.task import Chair, score_answers
from vlmfix.evals.inputs import nltk_tools
from vlmfix.evals.inputs.coco import CocoData
from vlmfix.evals.tasks import Options

TAGS = {"bikes": "VBZ", "seated": "VBD", "dogs": "NNS", "orange": "JJ", "fast": "RB", "the": "DT"}
LEMMAS = {
    ("bikes", "v"): "bike",
    ("seated", "v"): "seat",
    ("dogs", "n"): "dog",
    ("glasses", "n"): "glass",
}


@pytest.fixture
def fake_nltk(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """An nltk of a few words that records what it is asked to lemmatise, and as what."""
    asked: list[tuple[str, str]] = []

    class WordNetLemmatizer:
        def lemmatize(self, word: str, pos: str = "n") -> str:
            asked.append((word, pos))
            return LEMMAS.get((word, pos), word)

    def word_tokenize(text: str) -> list[str]:
        return text.replace(".", " .").replace('"', " `` ").split()

    def pos_tag(words: list[str]) -> list[tuple[str, str]]:
        return [(word, TAGS.get(word, "NN")) for word in words]

    nltk, stem = ModuleType("nltk"), ModuleType("nltk.stem")
    nltk.__dict__.update(
        word_tokenize=word_tokenize, pos_tag=pos_tag, __version__="3.8.1", stem=stem
    )
    stem.__dict__["WordNetLemmatizer"] = WordNetLemmatizer
    monkeypatch.setitem(sys.modules, "nltk", nltk)
    monkeypatch.setitem(sys.modules, "nltk.stem", stem)
    return asked


@pytest.fixture(autouse=True)
def fresh_tools() -> object:
    nltk_tools._tools.cache_clear()
    yield
    nltk_tools._tools.cache_clear()


def test_the_tag_chooses_the_part_of_speech(fake_nltk: list[tuple[str, str]]) -> None:
    found = mentions("The MAN seated dogs. orange fast bikes", engine="nltk")
    assert fake_nltk[-8:] == [
        ("the", "n"),  # a tag of no part of speech reads as a noun
        ("man", "n"),
        ("seated", "v"),
        ("dogs", "n"),
        (".", "n"),
        ("orange", "a"),
        ("fast", "r"),
        ("bikes", "v"),
    ]
    assert found.objects == ("person", "chair", "dog", "orange", "bicycle")
    assert found.tokens == 8
    # The builtin engine has no tags: a table says that "biking" is no bike.
    assert mentions("He is biking.").objects == ()


def test_pairs_and_places_are_found_after_the_lemmas(fake_nltk: list[tuple[str, str]]) -> None:
    caption = 'A "wine glass" by Hot dogs. The toilet seat'
    found = mentions(caption, engine="nltk")
    assert found.objects == ("wine glass", "hot dog", "toilet")
    assert [caption.lower()[start:stop] for start, stop in found.spans] == [
        "wine glass",
        "hot dogs",
        "toilet seat",
    ]


def test_captions_and_ground_truth_are_read_by_the_same_engine(
    fake_nltk: list[tuple[str, str]], tmp_path: Path
) -> None:
    world = write_world(tmp_path / "w", 2)
    captions = world / "annotations" / "captions.json"
    captions.write_text('{"annotations": [{"image_id": 1, "caption": "somebody bikes"}]}')
    data = CocoData(world)
    rows = [{"image_id": 1, "caption": "somebody bikes"}]
    scored = score_answers(data, rows, engine="nltk")
    assert scored["counts"]["caption"]["recalled"] == 1
    assert scored["counts"]["caption"]["hallucinated"] == 0
    assert scored["engine"] == "nltk 3.8.1"
    task = Chair(data, Options(n_images=None, chair_engine="nltk"))
    assert "bicycle" in task.samples[0].target
    assert task.facts["engine"] == "nltk 3.8.1"


def unusable(data: CocoData) -> list[Callable[[], object]]:
    return [
        lambda: require_engine("nltk"),
        lambda: mentions("A dog.", engine="nltk"),
        lambda: score_answers(data, [{"image_id": 1, "caption": ""}], engine="nltk"),
        lambda: Chair(data, Options(n_images=None, chair_engine="nltk")),
    ]


def test_without_nltk_the_message_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nltk", None)
    for use in unusable(CocoData(write_world(tmp_path / "w", 2))):
        with pytest.raises(MissingDependency, match="pip install .*nltk.* nltk.downloader .*punkt"):
            use()


def test_without_its_data_the_message_says_what_to_download(
    tmp_path: Path, fake_nltk: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(words: list[str]) -> list[tuple[str, str]]:
        raise LookupError("\n****\n  Resource averaged_perceptron_tagger not found.\n****\n")

    monkeypatch.setattr(sys.modules["nltk"], "pos_tag", absent)
    for use in unusable(CocoData(write_world(tmp_path / "w", 2))):
        with pytest.raises(MissingDependency, match=r"nltk.downloader .*wordnet.*NLTK_DATA"):
            use()


def test_a_wordnet_that_lacks_a_file_is_missing(
    fake_nltk: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """NLTK opens WordNet's parts by their paths, and a copy may lack `lexnames`."""

    def torn(words: list[str]) -> list[tuple[str, str]]:
        raise FileNotFoundError(2, "No such file or directory", "corpora/wordnet/lexnames")

    monkeypatch.setattr(sys.modules["nltk"], "pos_tag", torn)
    with pytest.raises(MissingDependency, match=r"lexnames.*nltk.downloader .*wordnet"):
        require_engine("nltk")


def test_unknown_engines_and_modes_list_the_choices(tmp_path: Path) -> None:
    data = CocoData(write_world(tmp_path / "w", 2))
    with pytest.raises(BadInput, match="engine 'spacy', mode 'compat': choose builtin or nltk"):
        Chair(data, Options(n_images=None, chair_engine="spacy"))
    with pytest.raises(BadInput, match="choose builtin or nltk, and compat or fixed"):
        score_answers(data, [], mode="better")
