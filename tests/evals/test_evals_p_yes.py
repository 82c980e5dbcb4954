"""The probability of yes: which tokens, from which distribution, at which price; prefixes, too."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vlmfix
from vlmfix import emoji
from vlmfix.evals.inputs.coco import CocoData
from vlmfix.evals.running.models import FirstToken, TransformersModel, yes_no_tokens
from vlmfix.evals.running.noop import NoOp
from vlmfix.evals.running.runner import Request, Turn
from vlmfix.evals.tasks import Sample


@pytest.fixture(scope="module")
def bundled() -> tuple[Any, Any]:
    return vlmfix.load("emoji")


@pytest.fixture(scope="module")
def data() -> CocoData:
    return CocoData(emoji.evaluation_split())


GREEDY = {"max_new_tokens": 4, "do_sample": False}


def question(data: CocoData, image: int, text: str, **more: Any) -> Sample:
    return Sample("pope", "s", f"{image}{text}", data.files[image], image, text, "yes", **more)


def requests(data: CocoData) -> list[Request]:
    words = ("dog", "pizza", "car")
    return [
        Request(question(data, image, f"Is there a {word} in the image?"))
        for image, word in zip(sorted(data.files), words, strict=False)
    ]


# -- tokens ----------------------------------------------------------------------------------------


class Tokenizer:
    """A vocabulary, and pieces of what is not in it: its characters."""

    def __init__(self, *words: str) -> None:
        self.words = {word: i for i, word in enumerate(words)}

    def get_vocab(self) -> dict[str, int]:
        return dict(self.words)

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [self.words[c] for c in text if c in self.words]}


def test_all_spellings_of_yes_and_no() -> None:
    words = ["Yes", "▁yes", "ĠNO", "no", "yes", "nope", "▁Yesterday", " No", "▁YES", "YEs"]
    yes, no = yes_no_tokens(Tokenizer(*words))
    assert yes == [0, 1, 4, 8] and no == [2, 3, 7]


def test_tokenizers_without_the_words() -> None:
    letters = "yesnoYESNO"
    assert yes_no_tokens(Tokenizer(*letters))[0] == [0, 5]
    assert yes_no_tokens(Tokenizer(*letters))[1] == [3, 8]
    # With a space before, both begin with the space: then nothing tells them apart.
    assert yes_no_tokens(Tokenizer(*letters, " ")) == ([], [])


def test_both_ruled_out_is_no_probability() -> None:
    first = FirstToken([0, 1], [2])
    infinite = float("inf")
    scores = torch.tensor(
        [[1.0, 1.0, 1.0, 5.0], [-infinite, -infinite, -infinite, 0], [0, 0, -infinite, 0]]
    )
    assert first(None, scores) is scores
    assert first.p_yes == [pytest.approx(2 / 3), None, 1.0]
    first(None, scores + 1)
    assert first.p_yes[0] == pytest.approx(2 / 3)  # of the first token, whatever comes later
    none = FirstToken([], [])
    none(None, scores)
    assert none.p_yes == [None, None, None]


# -- distribution ----------------------------------------------------------------------------------

METHODS = [None, "pai", "vhr", "vcd", "hiprune", "carve", "pai+vcd"]


def passes(model: Any, method: str | None) -> tuple[int, int] | None:
    """Of the last call; a plain model counts none."""
    if method is None:
        return None
    report = vlmfix.last_call(model)
    return report.passes, report.extra_passes


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("temperature", [None, 0.5])
def test_it_is_what_the_answer_was_decoded_from(
    bundled: Any, data: CocoData, method: str | None, temperature: float | None
) -> None:
    model, processor = bundled
    sampled = {} if temperature is None else {"do_sample": True, "temperature": temperature}
    settings = {**GREEDY, **sampled}
    kept: list[torch.Tensor] = []

    def keep(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        kept.append(scores.clone())
        return scores

    asked = TransformersModel(model, processor)
    batch = requests(data)
    calls = {}
    with asked.arm(method, settings, data.image, True) as answer:
        answers = answer(batch, 3)
        calls[True] = passes(model, method)
    with asked.arm(method, {**settings, "logits_processor": [keep]}, data.image, False) as answer:
        again = answer(batch, 3)
        calls[False] = passes(model, method)
    probabilities = kept[0].double().softmax(-1)
    yes, no = yes_no_tokens(processor.tokenizer)
    mass = [probabilities[:, ids].sum(1) for ids in (yes, no)]
    expected = (mass[0] / (mass[0] + mass[1])).tolist()
    assert [a.p_yes for a in answers] == pytest.approx(expected)
    assert all(a.p_yes is None for a in again)
    # The same answers, from no pass more.
    assert [(a.text, a.passes) for a in answers] == [(a.text, a.passes) for a in again]
    assert calls[True] == calls[False]
    if temperature is None:
        for reply in answers:
            assert reply.p_yes is not None
            assert (reply.p_yes > 0.5) == reply.text.lower().startswith("yes")


def test_methods_move_it_and_the_control_does_not(bundled: Any, data: CocoData) -> None:
    asked = TransformersModel(*bundled)
    found = {}
    for name, method in (("base", None), ("noop", NoOp()), ("vcd", "vcd"), ("pai", "pai:alpha=2")):
        with asked.arm(method, GREEDY, data.image, True) as answer:
            found[name] = [a.p_yes for a in answer(requests(data), 0)]
    assert found["noop"] == found["base"]
    assert found["vcd"] != found["base"] != found["pai"]


def test_the_control_is_hooked(bundled: Any, data: CocoData) -> None:
    model, _ = bundled
    asked = TransformersModel(*bundled)
    asked.check([NoOp()])
    assert asked.describe(NoOp()) == [{"method": "noop"}]
    with asked.arm(NoOp(), GREEDY, data.image, False) as answer:
        answer(requests(data), 0)
        report = vlmfix.last_call(model)
    assert report.methods == ("noop",) and report.passes > 0 and report.edited_rows == 0


# -- prefixes and turns ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", [None, "pai", "vcd", "hiprune"])
def test_an_answer_goes_on_from_its_beginning(
    bundled: Any, data: CocoData, method: str | None
) -> None:
    """Greedy: from a part of the answer the model writes the rest of it."""
    image = sorted(data.files)[3]
    describe = question(data, image, "Please describe this image in detail.")
    asked = TransformersModel(*bundled)
    with asked.arm(method, {"max_new_tokens": 40, "do_sample": False}, data.image, False) as answer:
        (whole,) = answer([Request(describe)], 0)
        words = whole.text.split()
        assert len(words) > 6
        begun, rest = " ".join(words[:4]), " ".join(words[4:])
        alone, padded = answer(
            [Request(describe, prefix=begun), Request(question(data, image, "Describe."))], 0
        )
    assert alone.text == rest
    assert alone.prompt_tokens > whole.prompt_tokens


def test_turns_are_a_chat(bundled: Any, data: CocoData) -> None:
    model, processor = bundled
    image = sorted(data.files)[1]
    name = data.files[image]
    last = question(data, image, "Is there a dog in the image?")
    request = Request(last, (Turn(name, "Please describe this image in detail.", "A cat."),), "Y")
    chat = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": data.image(name)},
                {"type": "text", "text": "Please describe this image in detail."},
            ],
        },
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Is there a dog in the image?"},
        {"role": "assistant", "content": "Y"},
    ]
    (expected,) = vlmfix.generate(model, processor, chat, return_details=True, **GREEDY)
    asked = TransformersModel(model, processor)
    with asked.arm(None, GREEDY, data.image, False) as answer:
        (found,) = answer([request], 0)
    assert (found.text, found.prompt_tokens) == (expected.text, expected.prompt_tokens)


def test_a_question_without_a_picture(bundled: Any, data: CocoData) -> None:
    bare = Sample("t", "s", "1", None, "none", "Is there a dog in the image?", "yes")
    asked = TransformersModel(*bundled)
    for method in (None, "pai", "vcd", NoOp()):
        with asked.arm(method, GREEDY, data.image, True) as answer:
            (found,) = answer([Request(bare)], 0)
        assert found.p_yes is not None and found.prompt_tokens < 64
