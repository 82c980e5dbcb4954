"""Attribution: words to tokens, exact ablation, the ranking against brute force, its intervals."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_folders
import torch
from evals_worlds import NAMES, write_world
from matrix import family, prompt
from tiny import FAMILIES, TinyFamily, build
from transformers import PreTrainedTokenizerFast

import vlmfix
from vlmfix.analysis.calibrate import load_calibration
from vlmfix.chat import chat_inputs
from vlmfix.emoji import model_path
from vlmfix.errors import BadInput, StateError
from vlmfix.evals import attribution
from vlmfix.evals.attribution import (
    ZeroHead,
    attribute,
    contrast,
)
from vlmfix.evals.chair.objects import category_of, ground_truth, mentions
from vlmfix.evals.chair.task import PROMPT
from vlmfix.evals.chair.tokens import find_mentions, token_spans
from vlmfix.evals.inputs.coco import CocoData
from vlmfix.evals.running.lock import locked
from vlmfix.families import describe_model


@pytest.fixture(scope="module")
def bpe() -> Any:
    return PreTrainedTokenizerFast.from_pretrained(model_path(), local_files_only=True)


@pytest.mark.parametrize(
    "text",
    [
        "The photo shows two hot dogs, a dog and a wine glass.",
        "A DOG. Dogs",
        "Ein Café — İstanbul \U0001f415 — with a dog in it",
        "A baby elephant beside the toilet seat",
    ],
)
def test_tokens_of_a_mention_write_the_word(text: str, bpe: Any) -> None:
    ids = bpe(text, add_special_tokens=False)["input_ids"]
    whole, spans = token_spans(ids, bpe)
    assert whole == text.lower()
    assert spans[0][0] == 0 and spans[-1][1] == len(whole)
    assert all(before[1] == after[0] for before, after in zip(spans, spans[1:], strict=False))
    found = find_mentions([ids], [frozenset({"dog"})], bpe)
    named = mentions(text)
    assert [mention.name for mention in found] == list(named.objects)
    for mention, (start, stop) in zip(found, named.spans, strict=True):
        written = bpe.decode([ids[at] for at in mention.tokens]).lower()
        assert whole[start:stop] in written
        # Nothing but the word, its space, and what its last token writes beyond it.
        first, last = mention.tokens[0], mention.tokens[-1]
        assert spans[first][1] > start and spans[last][0] < stop
        assert list(mention.tokens) == list(range(first, last + 1))
        assert mention.hallucinated == (mention.name != "dog")


def test_words_of_several_tokens_and_special_tokens(bpe: Any) -> None:
    ids = bpe("an ottoman and a zebra", add_special_tokens=False)["input_ids"]
    with_end = [*ids, bpe.eos_token_id]
    text, spans = token_spans(with_end, bpe)
    assert text == "an ottoman and a zebra"
    assert spans[-1] == (len(text), len(text))
    found = find_mentions([with_end, ids], [frozenset(), frozenset({"zebra"})], bpe)
    assert [(m.answer, m.hallucinated) for m in found if m.name == "zebra"] == [
        (0, True),
        (1, False),
    ]


def test_word_level_tokens() -> None:
    tokenizer = tiny_folders.tokenizer()
    ids = tokenizer("there is a dog in the image yes dog", add_special_tokens=False)["input_ids"]
    found = find_mentions([ids], [frozenset()], tokenizer)
    assert [mention.tokens for mention in found] == [(3,), (8,)]


@contextmanager
def _without(model: Any, layer: int, head: int) -> Iterator[None]:
    """The model with one head's columns of the output projection set to zero."""
    info = describe_model(model)
    module: Any = info.attention[layer]
    weight = module.o_proj.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight[:, head * info.head_dim : (head + 1) * info.head_dim] = 0
    try:
        yield
    finally:
        with torch.no_grad():
            weight.copy_(before)


@pytest.mark.parametrize("name", FAMILIES)
def test_ablation_equals_zero_columns_of_the_output_projection(name: str) -> None:
    tiny = family(name)
    inputs = prompt(tiny)
    info = describe_model(tiny.model)
    with torch.no_grad():
        plain = tiny.model(**inputs).logits
        for layer, head in ((0, 1), (info.num_layers - 1, info.num_heads - 1)):
            with vlmfix.wrapped(tiny.model, ZeroHead(layer, head, info.num_heads)):
                ablated = tiny.model(**inputs).logits
            with _without(tiny.model, layer, head):
                expected = tiny.model(**inputs).logits
            real = inputs["attention_mask"].bool()
            assert torch.allclose(ablated[real], expected[real], atol=1e-4)
            assert (ablated[:, -1] - plain[:, -1]).abs().max() > 1e-3


#: A vocabulary of words that CHAIR knows: whatever a model with random weights says is an object.
_OBJECTS = [
    word
    for word, name in category_of().items()
    if name in NAMES and word.isalpha() and mentions(word).words == (word,) and word != "seat"
]
WORDS = ("user", "assistant", "image", *_OBJECTS)


@pytest.fixture
def world(tmp_path: Path) -> Path:
    return write_world(tmp_path / "world", n_images=7)


@pytest.fixture
def talker(monkeypatch: pytest.MonkeyPatch) -> tuple[TinyFamily, Any]:
    """A tiny model that names objects, and its processor."""
    monkeypatch.setattr(tiny_folders, "WORDS", WORDS)
    tiny = build("llava", seed=3)
    # Never the words that name nothing, so that one answer is one object after another.
    processor = tiny_folders.processor()
    nothing = [
        number
        for word, number in processor.tokenizer.get_vocab().items()
        if word not in _OBJECTS and word != "</s>"
    ]
    tiny.model.generation_config.suppress_tokens = nothing
    return tiny, processor


def _brute_force(tiny: TinyFamily, processor: Any, data: CocoData, tokens: int) -> dict[Any, Any]:
    """{(layer, head): (mean over hallucinated, mean over present)}, image by image, by columns."""
    model, info, truth = tiny.model, describe_model(tiny.model), ground_truth(data)
    pairs = [(layer, head) for layer in range(info.num_layers) for head in range(info.num_heads)]
    lost: dict[Any, tuple[list[float], list[float]]] = {pair: ([], []) for pair in pairs}
    for image, file_name in data.files.items():
        content = [{"type": "image", "image": data.image(file_name)}]
        content.append({"type": "text", "text": PROMPT})
        inputs = chat_inputs(model, processor, [[{"role": "user", "content": content}]])
        length = inputs["input_ids"].shape[1]
        with torch.no_grad():
            ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
            whole = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
            plain = model(**whole).logits[0].log_softmax(-1)
            for pair in pairs:
                with _without(model, *pair):
                    ablated = model(**whole).logits[0].log_softmax(-1)
                for at in range(length, ids.shape[1]):
                    token = int(ids[0, at])
                    name = category_of().get(processor.tokenizer.convert_ids_to_tokens(token))
                    if name is not None:
                        change = float(plain[at - 1, token] - ablated[at - 1, token])
                        lost[pair][name in truth[image]].append(change)
    return {pair: tuple(np.mean(kind) for kind in kinds) for pair, kinds in lost.items()}


def test_ranking_equals_brute_force(
    talker: tuple[TinyFamily, Any], world: Path, tmp_path: Path
) -> None:
    tiny, processor = talker
    results = attribute(
        tiny.model, processor, world, limit=7, top=3, batch_size=3, max_new_tokens=6,
        output=tmp_path / "out", quiet=True,
    )  # fmt: skip
    expected = _brute_force(tiny, processor, CocoData(world), 6)
    assert len(results["heads"]) == len(expected)
    for row in results["heads"]:
        hallucinated, present = expected[row["layer"], row["head"]]
        assert row["hallucinated"] == pytest.approx(hallucinated, abs=2e-4)
        assert row["present"] == pytest.approx(present, abs=2e-4)
        assert row["score"] == pytest.approx(row["hallucinated"] - row["present"])
        assert row["low"] <= row["score"] <= row["high"]
    best = sorted(expected, key=lambda pair: expected[pair][1] - expected[pair][0])
    assert [tuple(pair) for pair in results["hallucination_heads"]] == best[:3]
    assert 0 < results["n_hallucinated"] < results["n_mentions"]
    assert all(value < 0 for value in results["log_probability"].values())
    assert results["agreement"] == 1.0
    assert results["forwards"] == 3 * (1 + len(expected))


def test_the_only_head_that_matters_is_found(
    talker: tuple[TinyFamily, Any], world: Path, tmp_path: Path
) -> None:
    """All other heads of the model say next to nothing."""
    tiny, processor = talker
    info = describe_model(tiny.model)
    with torch.no_grad():
        for layer, module in info.attention.items():
            weight: Any = module.o_proj.weight  # type: ignore[union-attr]  # Module or Tensor
            for head in range(info.num_heads):
                columns = slice(head * info.head_dim, (head + 1) * info.head_dim)
                weight[:, columns] *= 3.0 if (layer, head) == (1, 2) else 1e-4
    results = attribute(
        tiny.model, processor, world, limit=7, max_new_tokens=6, output=tmp_path / "o", quiet=True
    )
    effects = {
        (row["layer"], row["head"]): abs(row["hallucinated"]) + abs(row["present"])
        for row in results["heads"]
    }
    ranked = sorted(effects, key=effects.__getitem__, reverse=True)
    assert ranked[0] == (1, 2) and effects[1, 2] > 100 * effects[ranked[1]]


def test_files_and_the_calibration(
    talker: tuple[TinyFamily, Any], world: Path, tmp_path: Path
) -> None:
    tiny, processor = talker
    folder = tmp_path / "out"
    settings: dict[str, Any] = {"limit": 7, "top": 0.2, "max_new_tokens": 6, "quiet": True}
    results = attribute(tiny.model, processor, world, output=folder, save=True, **settings)
    stored = json.loads((folder / "results.json").read_text())
    assert stored["heads"] == results["heads"]
    with (folder / "heads.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["score"]) for row in rows] == [row["score"] for row in results["heads"]]
    assert (folder / "heads.png").read_bytes().startswith(b"\x89PNG")
    calibration = load_calibration(tiny.model)
    assert calibration is not None and calibration.sink_channels is None
    kept = [list(pair) for pair in calibration.hallucination_heads or ()]
    assert kept == results["hallucination_heads"] and 0 < len(kept) <= 2
    scores = {(row["layer"], row["head"]): row["score"] for row in results["heads"]}
    assert all(scores[layer, head] > 0 for layer, head in kept)
    with pytest.raises(BadInput, match="not empty"):
        attribute(tiny.model, processor, world, output=folder, **settings)
    with locked(folder), pytest.raises(BadInput, match="another run"):
        attribute(tiny.model, processor, world, output=folder, overwrite=True, **settings)
    again = attribute(tiny.model, processor, world, output=folder, overwrite=True, **settings)
    assert again["heads"] == results["heads"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top": 0}, "top=0: give a number of heads, 1 to 12"),
        ({"top": 2.5}, "top=2.5"),
        ({"top": 13}, "top=13"),
        ({"limit": 8}, "8 images wanted, but"),
        ({"limit": 0}, "limit=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_refused_before_anything_is_written(
    options: dict[str, Any], message: str, talker: tuple[TinyFamily, Any], world: Path
) -> None:
    tiny, processor = talker
    folder = world / "out"
    with pytest.raises(BadInput, match=message):
        attribute(tiny.model, processor, world, **{"limit": 7, **options}, output=folder)
    assert not folder.exists() and "_vlmfix_session" not in tiny.model.__dict__


def test_answers_that_name_nothing(world: Path, tmp_path: Path) -> None:
    tiny = build("llava")
    settings: dict[str, Any] = {"limit": 3, "max_new_tokens": 4, "quiet": True}
    with pytest.raises(BadInput, match="of 0 objects named in all"):
        attribute(tiny.model, tiny_folders.processor(), world, output=tmp_path / "o", **settings)
    assert not (tmp_path / "o").exists()
    with vlmfix.wrapped(tiny.model, None), pytest.raises(StateError, match="already wrapped"):
        attribute(tiny.model, tiny_folders.processor(), world, output=tmp_path / "o", **settings)


def test_what_could_not_be_kept_is_not_measured(
    talker: tuple[TinyFamily, Any], world: Path, tmp_path: Path
) -> None:
    tiny, processor = talker
    with pytest.raises(BadInput, match="not loaded from a folder"):
        attribute(tiny.model, processor, world, limit=7, output=tmp_path / "o", beside=True)
    assert not (tmp_path / "o").exists()


def test_without_data_it_draws_the_tuning_split(tmp_path: Path) -> None:
    path = attribution._tuning(str(tmp_path), 3)
    data = CocoData(path)
    assert len(data.files) == 3
    assert json.loads(data._bytes("annotations/instances.json"))["info"]["seed"] == 2017


def _worked(images: list[int]) -> attribution.Contrast:
    influence = np.array([[1.0, 0.0, 2.0], [3.0, 0.0, 2.0], [1.0, 0.0, 2.0], [0.0, 0.0, 3.0]])
    return contrast(influence, [True, True, False, False], images)


def test_worked_contrast() -> None:
    found = _worked([1, 2, 3, 4])
    assert found.hallucinated.tolist() == [2.0, 0.0, 2.0]
    assert found.present.tolist() == [0.5, 0.0, 2.5]
    assert found.score.tolist() == [1.5, 0.0, -0.5]
    assert (found.low[1], found.high[1], found.distinct[1]) == (0.0, 0.0, False)
    assert found.low[0] < 1.5 < found.high[0]


def test_the_interval_knows_that_words_share_images() -> None:
    rng = np.random.default_rng(0)
    per_image = rng.normal(size=(40, 1))
    influence = np.repeat(per_image, 6, axis=0)
    wrong = [at // 6 % 2 == 0 for at in range(240)]
    clustered = contrast(influence, wrong, [at // 6 for at in range(240)])
    alone = contrast(influence, wrong, list(range(240)))
    width = (clustered.high - clustered.low)[0] / (alone.high - alone.low)[0]
    assert clustered.score == pytest.approx(alone.score)
    assert width == pytest.approx(6**0.5, rel=0.15)


def test_only_what_stands_out_among_all_heads_is_distinct() -> None:
    found = alarms = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        influence = rng.normal(size=(300, 50))
        wrong = [bool(flag) for flag in rng.random(300) < 0.3]
        images = [at // 3 for at in range(300)]
        influence[wrong, 7] += 1.0
        result = contrast(influence, wrong, images, seed)
        found += int(result.distinct[7])
        alarms += bool(np.delete(result.distinct, 7).any())
    assert found == 20
    assert alarms <= 4  # 1 expected; looking at every head for itself would give about 18


@pytest.mark.parametrize("wrong", [[True] * 4, [False] * 4])
def test_one_kind_of_words_is_no_comparison(wrong: list[bool]) -> None:
    with pytest.raises(BadInput, match="needs both kinds"):
        contrast(np.ones((4, 2)), wrong, [1, 2, 3, 4])
    with pytest.raises(BadInput, match="Describe more images"):
        contrast(np.ones((4, 2)), [True, True, False, False], [1, 1, 2, 3])
