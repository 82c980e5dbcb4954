"""The engine of the demo on the bundled model."""

from __future__ import annotations

import io
import logging
import struct
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

import vlmfix
from vlmfix.demo.answers import _Streamer, answer
from vlmfix.demo.asking import (
    MAX_CHARACTERS,
    MAX_PIXELS,
    Pane,
    Question,
    message,
    read_picture,
)
from vlmfix.demo.controls import make_method
from vlmfix.demo.engine import Engine
from vlmfix.demo.looks import kept, look
from vlmfix.demo.measuring import measure
from vlmfix.emoji import example_images
from vlmfix.errors import BadInput, StateError
from vlmfix.evals.running.models import PassCounter
from vlmfix.images import formats, load_image

PROMPT = "Please describe this image in detail."


@pytest.fixture(scope="module")
def engine() -> Engine:
    torch.manual_seed(0)
    return Engine()


@pytest.fixture(scope="module")
def asked() -> Question:
    return Question(load_image("emoji:1"), PROMPT, 40)


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def method(name: str | None) -> Any:
    return None if name is None else make_method(name, {})


def written(engine: Engine, asked: Question, *names: str | None) -> list[Pane]:
    *_, panes = answer(engine, asked, [method(name) for name in names])
    assert all(pane.done for pane in panes)
    return panes


# -- answers ---------------------------------------------------------------------------------------

NAMES = (None, "vhr", "vcd", "hiprune", "gift", "carve", "fastv", "m3id")


@pytest.fixture(scope="module")
def alone(engine: Engine, asked: Question) -> dict[str | None, str]:
    """What each method answers through `vlmfix.generate`, with nobody else there."""
    answers = {}
    for name in NAMES:
        with vlmfix.using(engine.model, name):
            answers[name] = vlmfix.generate(
                engine.model, engine.processor, asked.chat, max_new_tokens=40, do_sample=False
            )
    return answers


def test_panes_answer_together_what_each_answers_alone(
    engine: Engine, asked: Question, alone: dict[str | None, str]
) -> None:
    assert len(set(alone.values())) >= 4, "the answers must differ, or a leak would not show"
    for names in (NAMES[:4], NAMES[4:]):
        for name, pane in zip(names, written(engine, asked, *names), strict=True):
            assert pane.error is None
            text = engine.tokenizer.decode(pane.tokens, skip_special_tokens=True)
            assert text.strip() == alone[name], name
            assert " ".join(word.text for word in engine.words(pane)) == alone[name]


def test_two_requests_at_once_do_not_meet(
    engine: Engine, asked: Question, alone: dict[str | None, str]
) -> None:
    other = Question(load_image("emoji:2"), "Is there a car in the image?", 12)
    single = [pane.tokens for pane in written(engine, other, None, "spin")]
    found: dict[str, list[Pane]] = {}

    def run(key: str, question: Question, *names: str | None) -> None:
        found[key] = written(engine, question, *names)

    threads = [
        threading.Thread(target=run, args=("one", asked, None, "vhr")),
        threading.Thread(target=run, args=("two", other, None, "spin")),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    texts = [engine.tokenizer.decode(p.tokens, skip_special_tokens=True) for p in found["one"]]
    assert [text.strip() for text in texts] == [alone[None], alone["vhr"]]
    assert [pane.tokens for pane in found["two"]] == single


def test_answers_grow_side_by_side(engine: Engine, asked: Question) -> None:
    seen = []
    for panes in answer(engine, asked, [None, method("vhr"), method("pai")]):
        seen.append([len(pane.tokens) for pane in panes if not pane.done])
    midway = [lengths for lengths in seen if len(lengths) == 3 and min(lengths) > 3]
    assert midway, "no two answers were ever being written at the same time"
    assert all(max(lengths) - min(lengths) <= 2 for lengths in midway)


def test_facts_of_a_pane(engine: Engine, asked: Question) -> None:
    base, vhr, vcd, hiprune = written(engine, asked, None, "vhr", "vcd", "hiprune")
    assert (base.report, base.passes, base.finish) == (None, len(base.tokens), "eos")
    assert vhr.report is not None and vhr.report.edited_rows > 0
    assert vhr.passes == len(vhr.tokens) + 1  # the prompt without its image
    assert vcd.report is not None and vcd.report.streams == 2
    assert vcd.passes == 2 * len(vcd.tokens)
    assert hiprune.report is not None and hiprune.report.visual_tokens == ((21, 64),)
    # Turns of the others are in the wall time of the call, and not in the pane's.
    assert vhr.report.seconds is not None and vhr.seconds < 0.6 * vhr.report.seconds
    (cut,) = written(engine, Question(asked.picture, PROMPT, 5), None)
    assert (cut.finish, len(cut.tokens)) == ("length", 5)


def test_an_error_in_one_pane_leaves_the_others_and_the_model_alone(
    engine: Engine, asked: Question, alone: dict[str | None, str]
) -> None:
    base, broken = written(engine, asked, None, "head_pursuit")
    assert broken.error is not None and "needs the heads of a concept" in broken.error
    text = engine.tokenizer.decode(base.tokens, skip_special_tokens=True)
    assert text.strip() == alone[None]
    with pytest.raises(BadInput, match="5 panes"):
        next(answer(engine, asked, [None] * 5))


def test_an_unforeseen_error_goes_to_the_log_and_not_to_the_visitor(
    engine: Engine, asked: Question, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    def explode(*args: object, **kwargs: object) -> None:
        raise RuntimeError("/secret/path")

    monkeypatch.setattr(vlmfix, "generate", explode)
    with caplog.at_level(logging.ERROR):
        (pane,) = written(engine, asked, None)
    assert pane.error is not None and "RuntimeError" in pane.error
    assert "secret" not in pane.error and "secret" in caplog.text
    assert message(StateError("told as it is")) == "told as it is"


def test_a_visitor_who_leaves_ends_the_answers(engine: Engine, asked: Question) -> None:
    long = Question(asked.picture, PROMPT, 256)
    answers = answer(engine, long, [None, method("vhr")])
    panes = next(panes for panes in answers if all(len(pane.tokens) > 2 for pane in panes))
    answers.close()
    assert all(pane.done and pane.error == "stopped." for pane in panes)
    assert engine.turns.waiting == 0
    stop = threading.Event()
    stop.set()
    *_, panes = answer(engine, long, [None], stop)
    assert panes[0].error == "stopped."


def test_a_method_that_can_change_nothing_says_so(engine: Engine, asked: Question) -> None:
    with pytest.warns(UserWarning, match="will change nothing"):
        (pane,) = written(engine, asked, "var")
    assert pane.note is not None and "no sink channels" in pane.note


def test_positions_that_a_family_keeps_on_a_module_are_carried_along() -> None:
    """M-RoPE families leave `rope_deltas` of the last prompt on the model; others come between."""
    model = torch.nn.Linear(1, 1)
    model.rope_deltas = "mine"

    class Others:
        def pass_on(self) -> None:
            model.rope_deltas = "of another prompt"

    pane, passes = Pane(None), PassCounter()
    engine: Any = SimpleNamespace(model=model, turns=Others())
    streamer = _Streamer(engine, pane, passes, threading.Event())
    streamer.put(torch.tensor([[1, 2, 3]]))
    passes.rows = 1
    streamer.put(torch.tensor([7]))
    assert (pane.tokens, pane.passes, model.rope_deltas) == ([7], 1, "mine")


# -- what is refused -------------------------------------------------------------------------------


def test_bad_input_is_refused_with_the_way_out(engine: Engine) -> None:
    picture = png(load_image("emoji:1"))
    large = png(Image.new("1", (10_000, 5_000)))
    limit = MAX_CHARACTERS
    cases = [
        (None, PROMPT, "there is no picture: choose an example or upload one"),
        (large, PROMPT, "10000 x 5000 pixels are 50 megapixels, and the demo takes up to 25"),
        (b"not an image at all", PROMPT, "is not an image that Pillow can read"),
        (picture[:300], PROMPT, "is damaged"),
        (picture, "", "the prompt is empty"),
        (picture, None, "the prompt is empty"),
        (picture, "  \n ", "the prompt is empty"),
        (picture, "word " * 10_000, f"10000 words, 49999 characters. The demo takes up to {limit}"),
    ]  # fmt: skip
    for source, prompt, says in cases:
        with pytest.raises(BadInput) as caught:
            engine.question(source, prompt)
        assert says in str(caught.value)
    # 990 words, 64 visual tokens and the answer do not fit into 1,024 positions; 800 words do.
    with pytest.raises(BadInput, match=r"64 of them the picture's, and 96 for the answer make"):
        engine.question(picture, "dog " * 990)
    assert engine.question(picture, "dog " * 800).picture.size == (112, 112)
    assert engine.turns.waiting == 0


def test_the_size_of_a_picture_is_read_before_its_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    large = png(Image.new("1", (MAX_PIXELS // 1000 + 1, 1000)))
    formats()  # Pillow draws a palette of its own when it loads its plugins
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("pixels were read"))
    with pytest.raises(BadInput, match="megapixels"):
        read_picture(large)


def test_a_picture_cannot_be_larger_than_its_file_says() -> None:
    inner = png(Image.new("1", (MAX_PIXELS // 1000 + 1, 1000)))
    place = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 1, len(inner), 22)
    icon = struct.pack("<HHH", 0, 1, 1) + place + inner
    with pytest.raises(BadInput, match="Pillow can read as"):
        read_picture(icon)


def test_pictures_of_odd_shapes_are_answered(engine: Engine) -> None:
    for size in ((1, 1), (1, 400), (400, 1)):
        asked = engine.question(png(Image.new("RGB", size, "red")), "What is it?", 8)
        (pane,) = written(engine, asked, None)
        assert pane.error is None and pane.tokens


# -- what is known of a picture --------------------------------------------------------------------


def test_objects_of_a_bundled_picture_are_told_by_its_pixels(engine: Engine) -> None:
    (_, first), (_, second) = example_images(2)
    known = engine.truth(read_picture(png(first)))
    assert known == {"bed", "cup", "teddy bear", "toilet"}
    assert engine.truth(second) not in (None, known)
    changed = first.copy()
    changed.putpixel((0, 0), (1, 2, 3))
    assert engine.truth(changed) is None
    assert engine.truth(first.resize((224, 224))) is None


# -- maps and tokens -------------------------------------------------------------------------------


def test_a_word_is_looked_at_through_the_rows_that_wrote_it(
    engine: Engine, asked: Question
) -> None:
    (base,) = written(engine, asked, None)
    words = [word.text for word in engine.words(base)]
    number = words.index("bear")
    pai = make_method("pai", {"alpha": 2})
    seen = look(engine, asked, base, number, pai)
    assert (seen.word, seen.layers, seen.heads) == ("bear", tuple(range(6)), 8)
    (part,) = seen.parts
    assert part.box == (0, 0, 112, 112)
    assert list(part.grids) == ["base", "pai:alpha=2.0"]

    from vlmfix.chat import chat_inputs

    inputs = chat_inputs(engine.model, engine.processor, [asked.chat])
    generated = torch.cat((inputs["input_ids"], torch.tensor([base.tokens])), dim=1)
    ((maps,),) = vlmfix.attention_map(
        engine.model, inputs, rows="answer", heads="all", generated=generated
    )
    tokens = list(engine.words(base)[number].tokens)
    expected = maps.grids()[0][:, :, tokens].mean(2)
    assert torch.equal(part.grids["base"], expected)
    assert part.grids["pai:alpha=2.0"][-1].sum() > 1.1 * expected[-1].sum()
    with pytest.raises(BadInput, match="no such word"):
        look(engine, asked, base, len(words), None)
    with pytest.raises(BadInput, match="carve answers about an image that it has changed"):
        look(engine, asked, base, number, method("carve"))
    assert "acts on logits" in str(look(engine, asked, base, number, method("vcd")).note)


def test_maps_lie_over_the_part_that_the_processor_takes(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = engine.processor.image_processor
    monkeypatch.setattr(images, "size", {"shortest_edge": 112})
    monkeypatch.setattr(images, "do_center_crop", True)
    monkeypatch.setattr(images, "crop_size", {"height": 112, "width": 112})
    wide = Image.new("RGB", (300, 100), "white")
    wide.paste(load_image("emoji:1").resize((100, 100)), (100, 0))
    asked = engine.question(png(wide), PROMPT, 8)
    (base,) = written(engine, asked, None)
    (part,) = look(engine, asked, base, 1, None).parts
    assert part.box == (100, 0, 200, 100)
    ((box, mask),) = kept(engine, asked, make_method("uniform", {"tokens": 16}))
    assert box == (100, 0, 200, 100)
    assert (mask.shape, int(mask.sum())) == ((8, 8), 16)


def test_what_pruning_keeps_needs_a_pruning_method(engine: Engine, asked: Question) -> None:
    with pytest.raises(BadInput, match="no method that prunes"):
        kept(engine, asked, method("vhr"))


# -- measuring -------------------------------------------------------------------------------------


def drained(events: Iterator[Any]) -> tuple[list[tuple[int, int, str]], dict[str, Any]]:
    *steps, results = events
    return steps, results


def test_measuring_is_the_evaluation_of_the_library(engine: Engine) -> None:
    steps, results = drained(measure(engine, [method("vhr")], 2))
    done = [step[0] for step in steps]
    assert done == sorted(done) and done[-1] == steps[-1][1]
    assert {step[2] for step in steps} == {"pope base", "pope vhr"}
    arms = results["tasks"]["pope"]["arms"]
    assert results["config"]["model"] == "emoji"
    assert results["tasks"]["pope"]["n_images"] == 2

    from vlmfix.evals import evaluate

    plain = evaluate(
        ["pope"], "emoji", ["vhr"], limit=2, batch_size=8, quiet=True, output=str(results["run_id"])
    )
    assert arms["vhr"]["scores"] == plain["tasks"]["pope"]["arms"]["vhr"]["scores"]
    assert arms["vhr"]["delta"] == plain["tasks"]["pope"]["arms"]["vhr"]["delta"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_answers_go_on_while_somebody_measures(
    engine: Engine, asked: Question, alone: dict[str | None, str]
) -> None:
    events = measure(engine, [method("spin")], 2)
    next(events)
    base, vhr = written(engine, asked, None, "vhr")
    texts = [engine.tokenizer.decode(p.tokens, skip_special_tokens=True) for p in (base, vhr)]
    assert [text.strip() for text in texts] == [alone[None], alone["vhr"]]
    with pytest.raises(BadInput, match="change the model when they are done"):
        engine.change_model("emoji")
    events.close()
    assert engine.turns.waiting == 0


def test_measuring_what_cannot_run_is_an_error(engine: Engine) -> None:
    with pytest.raises(vlmfix.CalibrationNeeded, match="heads of a concept"):
        drained(measure(engine, [method("head_pursuit")], 2))


# -- the model -------------------------------------------------------------------------------------


def test_another_model_takes_the_place_of_the_first(tmp_path: Any) -> None:
    engine = Engine()
    engine.model.generation_config.save_pretrained(tmp_path)
    before, number = engine.name, engine.number
    with pytest.raises(BadInput, match="no config.json in the folder"):
        engine.change_model(str(tmp_path))
    assert engine.name == before and engine.number > number
    assert written(engine, Question(load_image("emoji:1"), PROMPT, 4), "pai")[0].error is None
    from vlmfix.emoji import model_path

    engine.change_model(str(model_path()))
    assert engine.name == str(model_path())
    with pytest.raises(BadInput, match="no model"):
        engine.change_model(" ")
