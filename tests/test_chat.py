"""`vlmfix.generate`: messages with images in, text out, on the bundled model."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tiny
import tiny_folders
import torch
from PIL import Image, ImageOps
from transformers import (
    BlipImageProcessorPil,
    GenerationConfig,
    InstructBlipProcessor,
    PaliGemmaProcessor,
    Qwen2VLImageProcessorPil,
    SiglipImageProcessorPil,
    TextStreamer,
)

import vlmfix
from vlmfix import emoji
from vlmfix.base.pixels import PixelMethod
from vlmfix.chat import Answer, encode_chats, split_chat

PROMPT = "Describe the image."
SMALL = {"height": 16, "width": 16}


@pytest.fixture(scope="module")
def bundled() -> tuple[Any, Any]:
    return vlmfix.load("emoji")


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return [image for _, image in emoji.example_images()][:3]


def _chat(*images: Any, text: str = PROMPT) -> list[dict[str, Any]]:
    parts = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def _ask(bundled: Any, messages: Any, **kwargs: Any) -> Any:
    return vlmfix.generate(
        *bundled, messages, **{"do_sample": False, "max_new_tokens": 40} | kwargs
    )


def test_one_chat_gives_text_and_a_batch_gives_what_each_gives_alone(
    bundled: Any, pictures: list[Image.Image]
) -> None:
    texts = (PROMPT, "Is there a dog in the image?", "Please describe this image in detail.")
    chats = [_chat(image, text=text) for image, text in zip(pictures, texts, strict=True)]
    alone = [_ask(bundled, chat) for chat in chats]
    assert all(isinstance(text, str) and text for text in alone) and len(set(alone)) == 3
    assert _ask(bundled, chats) == alone
    assert _ask(bundled, chats[:1]) == alone[:1]
    with vlmfix.wrapped(bundled[0], "pai:alpha=1"):
        edited = [_ask(bundled, chat) for chat in chats]
        assert _ask(bundled, chats) == edited != alone


def test_an_image_may_come_in_many_forms(
    bundled: Any, pictures: list[Image.Image], tmp_path: Path
) -> None:
    path = tmp_path / "a.png"
    pictures[0].save(path)
    url = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    expected = _ask(bundled, _chat(pictures[0]))
    for source in (path, str(path), url, path.read_bytes(), pictures[0].convert("RGBA")):
        assert _ask(bundled, _chat(source)) == expected
    assert _ask(bundled, _chat(pictures[1])) != expected


def test_text_alone_and_several_turns(bundled: Any, pictures: list[Image.Image]) -> None:
    assert isinstance(_ask(bundled, [{"role": "user", "content": "Is there a dog?"}]), str)
    first = _chat(pictures[0])
    answer = _ask(bundled, first)
    again = [
        *first,
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "Is there a dog in the image?"},
    ]
    assert _ask(bundled, again) in ("Yes", "No", "Yes.", "No.")


def test_an_answer_that_the_chat_begins(bundled: Any, pictures: list[Image.Image]) -> None:
    """Greedy, the rest of an answer follows from its beginning."""
    _, processor = bundled
    chat = _chat(pictures[0])
    whole = _ask(bundled, chat).split()
    begun = [*chat, {"role": "assistant", "content": " ".join(whole[:3])}]
    assert _ask(bundled, [chat, begun])[1].split() == whole[3:]
    (prompt,) = processor.tokenizer.batch_decode(encode_chats(processor, [begun])["input_ids"])
    assert prompt.endswith(f"ASSISTANT: {' '.join(whole[:3])}")
    for empty in ("", []):
        with pytest.raises(vlmfix.BadInput, match="the answer that the chat begins is empty"):
            _ask(bundled, [*chat, {"role": "assistant", "content": empty}])


def test_details(bundled: Any, pictures: list[Image.Image]) -> None:
    chats = [_chat(pictures[0]), _chat(pictures[1], text="Is there a dog in the image?")]
    long, short = _ask(bundled, chats, return_details=True, max_new_tokens=5)
    assert isinstance(long, Answer)
    assert (long.finish, long.new_tokens) == ("length", 5)
    assert short.finish == "eos" and short.new_tokens < 5
    assert short.prompt_tokens > 64 and long.prompt_tokens != short.prompt_tokens
    several = _ask(bundled, chats, return_details=True, num_beams=2, num_return_sequences=2)
    assert len(several) == 4 and several[0].prompt_tokens == several[1].prompt_tokens
    single = _ask(bundled, chats[1], return_details=True)
    assert [answer.text for answer in single] == [short.text]


def test_no_second_start_token(bundled: Any, pictures: list[Image.Image]) -> None:
    model, _ = bundled
    seen: list[torch.Tensor] = []
    handle = model.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    _ask(bundled, _chat(pictures[0]))
    handle.remove()
    assert int((seen[0] == model.config.text_config.bos_token_id).sum()) == 1


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "no messages"),
        (["describe"], "must be a mapping"),
        ([{"role": "user"}], "'role' and 'content'"),
        ([{"role": "user", "content": [{"type": "video", "video": "a"}]}], "'image' or 'text'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "'text' with a text"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], "'text' with a text"),
        ([{"role": "user", "content": None}], "a text or a list of parts"),
        ([{"role": "user", "content": "\ud83d"}], "half a surrogate pair"),
        ({"role": "user", "content": "x"}, "a list of messages, or a list of chats, not {'role'"),
        (7, "a list of chats, not 7"),
        ([{"role": None, "content": "Why?"}], "needs a role"),
        ([{"role": "user", "content": "What does <image> mean?"}], "holds '<image>'"),
        (_chat("nowhere.png"), "no image file"),
        (_chat(None), "image"),
        (_chat(b"not an image"), "not an image"),
    ],
)
def test_bad_messages(bundled: Any, messages: Any, message: str) -> None:
    with pytest.raises(vlmfix.BadInput, match=message):
        _ask(bundled, messages)


# -- methods that change images --------------------------------------------------------------------


@dataclass(frozen=True)
class Paint(PixelMethod):
    """Mirrors every image, and asks the model whether it runs plain."""

    name: ClassVar[str] = "paint"

    def rewrite(
        self, model: Any, processor: Any, chats: Sequence[Any]
    ) -> tuple[list[Any], list[Any]]:
        vlmfix.generate(model, processor, chats[0], max_new_tokens=1)
        assert not model.__dict__["_vlmfix_session"].stack.methods
        return [_mirrored(chat) for chat in chats], [f"chat {i}" for i in range(len(chats))]


@dataclass(frozen=True)
class Repaint(Paint):
    """The same once more."""

    name: ClassVar[str] = "repaint"


def _mirrored(chat: Any) -> Any:
    images, _ = split_chat(chat)
    return _chat(*map(ImageOps.mirror, images), text=chat[0]["content"][-1]["text"])


def test_methods_that_change_images_go_first(bundled: Any, pictures: list[Image.Image]) -> None:
    model, processor = bundled
    chats = [_chat(pictures[0]), _chat(pictures[1], text="Is there a dog in the image?")]
    mirrored = [_mirrored(chat) for chat in chats]
    plain, expected = (_ask(bundled, asked, return_details=True) for asked in (chats, mirrored))
    assert plain != expected
    with vlmfix.wrapped(model, Paint()):
        assert _ask(bundled, chats, return_details=True) == expected
        assert vlmfix.last_call(model).pixels == {"paint": ["chat 0", "chat 1"]}
        assert vlmfix.last_call(model).new_tokens == max(answer.new_tokens for answer in expected)
        assert _ask(bundled, chats[0]) == expected[0].text
        assert vlmfix.last_call(model).pixels == {"paint": ["chat 0"]}
        assert (
            "pixels" not in vlmfix.last_call(model).to_dict()
            or not vlmfix.last_call(model).to_dict()["pixels"]
        )
        several = {"num_beams": 2, "num_return_sequences": 2}
        found = _ask(bundled, chats, **several)
        with vlmfix.using(model, [Paint(), Repaint()]):  # mirrored twice
            assert _ask(bundled, chats, return_details=True) == plain
            assert list(vlmfix.last_call(model).pixels) == ["paint", "repaint"]
        with vlmfix.using(model, None):
            assert _ask(bundled, chats, return_details=True) == plain
        with vlmfix.using(model, [Paint(), "pai:alpha=2"]):
            edited = _ask(bundled, chats)
            assert vlmfix.last_call(model).edited_rows > 0
        with pytest.raises(vlmfix.BadInput, match="no messages"):
            _ask(bundled, [])
        with pytest.raises(vlmfix.BadInput, match=r"vlmfix\.generate"):
            model.generate(**vlmfix.chat.chat_inputs(model, processor, chats))
    assert found == _ask(bundled, mirrored, **several)
    with vlmfix.wrapped(model, "pai:alpha=2"):
        assert edited == _ask(bundled, mirrored) != [answer.text for answer in expected]


def test_a_streamer_sees_the_final_answer_alone(
    bundled: Any, pictures: list[Image.Image], capsys: pytest.CaptureFixture[str]
) -> None:
    with vlmfix.wrapped(bundled[0], Paint()):
        streamer = TextStreamer(bundled[1].tokenizer, skip_prompt=True, skip_special_tokens=True)
        answer = _ask(bundled, _chat(pictures[0]), streamer=streamer)
    assert capsys.readouterr().out.strip() == answer


def test_an_error_in_a_method_leaves_the_next_call_alone(
    bundled: Any, pictures: list[Image.Image]
) -> None:
    with vlmfix.wrapped(bundled[0], Paint()):
        with pytest.raises(vlmfix.BadInput, match="no image file"):
            _ask(bundled, _chat("nowhere.png"))
        with pytest.raises(ValueError):
            _ask(bundled, _chat(pictures[0]), max_new_tokens=-1)
        with pytest.raises(vlmfix.BadInput, match=r"vlmfix\.generate"):
            bundled[0].generate(torch.ones(1, 3, dtype=torch.long))
        assert _ask(bundled, _chat(pictures[0]))


# -- how long an answer may be ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "given", "expected"),
    [
        ({}, {}, 512),
        ({"max_new_tokens": 9}, {}, None),
        ({"max_length": 900}, {}, None),
        ({}, {"max_new_tokens": 7}, 7),
        ({}, {"max_length": 300}, None),
        ({}, {"generation_config": GenerationConfig(max_new_tokens=3)}, None),
        ({}, {"generation_config": GenerationConfig(num_beams=1)}, 512),
    ],
)
def test_a_length_where_nothing_sets_one(
    bundled: Any, monkeypatch: pytest.MonkeyPatch, own: Any, given: Any, expected: int | None
) -> None:
    model, processor = bundled
    seen: dict[str, Any] = {}

    def generate(**kwargs: Any) -> torch.Tensor:
        seen.update(kwargs)
        ids: torch.Tensor = kwargs["input_ids"]
        return ids

    monkeypatch.setattr(model, "generate", generate)
    config = GenerationConfig(eos_token_id=2, **own)
    monkeypatch.setattr(model, "generation_config", config)
    vlmfix.generate(model, processor, [{"role": "user", "content": "Why?"}], **given)
    assert seen.get("max_new_tokens") == expected


# -- processors ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def paligemma() -> tuple[Any, Any]:
    """A processor without a chat template, which returns labels with every prompt."""
    images = SiglipImageProcessorPil(size=SMALL)
    images.image_seq_length = 16
    return tiny.build("paligemma").model, PaliGemmaProcessor(images, tiny_folders.tokenizer())


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # its labels
def test_a_model_that_takes_one_request(paligemma: Any, pictures: list[Image.Image]) -> None:
    model, processor = paligemma
    inputs = encode_chats(processor, [_chat(pictures[0], text="is there a dog ?")])
    own = processor(text="<image>is there a dog ?", images=pictures[0], return_tensors="pt")
    labels = own.pop("labels")
    assert inputs.keys() == own.keys()
    assert all(torch.equal(inputs[name], value) for name, value in own.items())
    settings = {"do_sample": False, "max_new_tokens": 4}
    plain = model.generate(**own, **settings)
    chats = [_chat(pictures[0], text="is there a dog ?"), _chat(pictures[1], text="a ?")]
    answers = vlmfix.generate(model, processor, chats, **settings)
    new = plain[:, own["input_ids"].shape[1] :]
    assert answers[0] == processor.batch_decode(new, skip_special_tokens=True)[0].strip()
    with pytest.raises(vlmfix.BadInput, match="takes one request"):
        vlmfix.generate(model, processor, [{"role": "system", "content": "a"}, *chats[0]])
    with pytest.raises(vlmfix.BadInput, match=r"images: none.*`images` are expected"):
        vlmfix.generate(model, processor, [{"role": "user", "content": "is there a dog ?"}])
    # What the processor returns goes into a wrapped model as it is.
    with_labels = {**own, "labels": labels}
    for method in ("pai", "hiprune", "gift"):
        with vlmfix.wrapped(model, method):
            tokens = model.generate(**with_labels, **settings)
            assert torch.equal(tokens, model.generate(**own, **settings))
    (kept,), (expected,) = (
        vlmfix.visual_tokens(model, given, "hiprune") for given in (with_labels, own)
    )
    assert torch.equal(kept[0].index, expected[0].index)
    (maps,), (expected,) = (vlmfix.attention_map(model, given) for given in (with_labels, own))
    assert torch.equal(maps[0].weights, expected[0].weights)


def test_a_processor_that_puts_the_image_in_itself(pictures: list[Image.Image]) -> None:
    """InstructBLIP's, whose questions also go to its Q-Former."""
    model, images = tiny.build("instructblip").model, BlipImageProcessorPil(size=SMALL)
    texts = tiny_folders.tokenizer(), tiny_folders.tokenizer()
    processor = InstructBlipProcessor(images, *texts, num_query_tokens=4)
    chats = [_chat(pictures[0], text="is there a dog ?"), _chat(pictures[1], text="a ?")]
    settings = {"do_sample": False, "max_new_tokens": 4}
    own = processor(text="is there a dog ?", images=pictures[0], return_tensors="pt")
    plain = processor.batch_decode(model.generate(**own, **settings), skip_special_tokens=True)
    alone = [vlmfix.generate(model, processor, chat, **settings) for chat in chats]
    assert "is there a dog ? " + alone[0] == plain[0]
    assert vlmfix.generate(model, processor, chats, **settings) == alone
    assert [len(text.split()) for text in alone] != [0, 0]


def test_the_end_of_an_answer_by_a_configuration(bundled: Any, pictures: list[Image.Image]) -> None:
    whole = _ask(bundled, _chat(pictures[0]), return_details=True)[0]
    second = bundled[1].tokenizer(whole.text, add_special_tokens=False)["input_ids"][1]
    config = GenerationConfig(eos_token_id=second, max_new_tokens=9, do_sample=False)
    cut = vlmfix.generate(
        *bundled, _chat(pictures[0]), return_details=True, generation_config=config
    )[0]
    assert (cut.finish, cut.new_tokens) == ("eos", 2) and whole.text.startswith(cut.text)


def test_what_a_processor_refuses_is_bad_input(pictures: list[Image.Image]) -> None:
    processor = tiny_folders.processor()
    processor.image_processor = Qwen2VLImageProcessorPil()
    with pytest.raises(vlmfix.BadInput, match=r"images: 3 x 900\): absolute aspect ratio"):
        encode_chats(processor, [_chat(pictures[0].resize((3, 900)))])
    processor = tiny_folders.processor()
    processor.patch_size = None
    with pytest.raises(vlmfix.BadInput, match=r"patch_size.*vlmfix\.load"):
        encode_chats(processor, [_chat(pictures[0])])


def test_a_placeholder_that_the_model_does_not_know_is_refused(
    bundled: tuple[Any, Any], pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundled[0].config, "image_token_index", 10**9)
    with pytest.raises(vlmfix.BadInput, match="image_token_id of the model's config.json is 10000"):
        _ask(bundled, _chat(pictures[0]))
    assert isinstance(_ask(bundled, _chat(text="Hello"), max_new_tokens=2), str)
