"""Folders as they also occur on the hub: older, newer, incomplete, with settings of their own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import twin_folders
from PIL import Image
from safetensors import safe_open
from twin_chats import QUESTION, kinds, picture, user
from twin_recipes import RECIPES

import vlmfix
import vlmfix.evals
from vlmfix.analysis.calibrate import calibrate, fingerprint
from vlmfix.analysis.doctor import examine
from vlmfix.chat import chat_inputs, encode_chats
from vlmfix.errors import BadInput

LLAVA, NEXT, QWEN = "llava-1.5-7b-hf", "llava-v1.6-mistral-7b-hf", "Qwen2.5-VL-7B-Instruct"
PALIGEMMA = "paligemma-3b-mix-448"
GREEDY = {"do_sample": False, "max_new_tokens": 2, "repetition_penalty": 1.0}

# transformers hands tensors to numpy 2 in an old way.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

Variant = Callable[[str], Path]


@pytest.fixture
def variant(folders: Any, tmp_path: Path) -> Variant:
    """A copy of a twin's folder, to be changed."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(folders(name), tmp_path / name))

    return copy


def load(folder: Path, name: str) -> tuple[Any, Any]:
    return twin_folders.load(folder, RECIPES[name], dtype="float32")


def prompt(processor: Any, kind: str = "one") -> list[int]:
    ids: list[int] = encode_chats(processor, [kinds()[kind].chat])["input_ids"][0].tolist()
    return ids


@pytest.mark.parametrize("name", [LLAVA, QWEN])
def test_a_template_in_the_tokenizer_alone(name: str, folders: Any, variant: Variant) -> None:
    folder = variant(name)
    template = json.loads((folder / "chat_template.json").read_text())["chat_template"]
    (folder / "chat_template.json").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    twin_folders.put(folder / "tokenizer_config.json", {**config, "chat_template": template})
    _, processor = load(folder, name)
    _, usual = load(folders(name), name)
    for kind in ("one", "system", "second turn"):
        assert prompt(processor, kind) == prompt(usual, kind)


def test_a_chat_model_without_any_template_is_refused(variant: Variant) -> None:
    folder = variant(LLAVA)
    (folder / "chat_template.json").unlink()
    model, processor = load(folder, LLAVA)
    with pytest.raises(BadInput, match="chat template"):
        vlmfix.generate(model, processor, kinds()["one"].chat, **GREEDY)


def test_an_old_folder_without_processor_config(folders: Any, variant: Variant) -> None:
    folder = variant(LLAVA)
    (folder / "processor_config.json").unlink()
    _, processor = load(folder, LLAVA)
    _, usual = load(folders(LLAVA), LLAVA)
    assert prompt(processor) == prompt(usual)


def test_labels_among_the_inputs(folders: Any) -> None:
    model, processor = load(folders(PALIGEMMA), PALIGEMMA)
    inputs = processor(text="<image>" + QUESTION, images=picture(), return_tensors="pt")
    assert "labels" in inputs
    plain = {name: value for name, value in inputs.items() if name != "labels"}
    with vlmfix.wrapped(model, "hiprune"):
        assert torch.equal(model.generate(**inputs, **GREEDY), model.generate(**plain, **GREEDY))
    [[found]], [[wanted]] = (vlmfix.attention_map(model, given) for given in (inputs, plain))
    assert torch.equal(found.weights, wanted.weights)


def test_the_weights_have_the_names_of_the_hub(folders: Any) -> None:
    for name, begin in ((LLAVA, "language_model.model.layers.0."), (QWEN, "model.layers.0.")):
        with safe_open(folders(name) / "model.safetensors", "pt") as weights:
            assert any(key.startswith(begin) for key in weights.keys())  # noqa: SIM118


@pytest.mark.slow
@pytest.mark.parametrize("name", [LLAVA, QWEN])
def test_saved_again_by_this_transformers(name: str, folders: Any, tmp_path: Path) -> None:
    model, processor = load(folders(name), name)
    model.save_pretrained(tmp_path / "new", save_original_format=False)
    with safe_open(tmp_path / "new" / "model.safetensors", "pt") as weights:
        named = sorted(weights.keys())
    assert "model.language_model.layers.0.self_attn.q_proj.weight" in named
    for file in folders(name).iterdir():
        if not (tmp_path / "new" / file.name).exists():
            shutil.copy(file, tmp_path / "new")
    again, _ = load(tmp_path / "new", name)
    inputs = chat_inputs(model, processor, [kinds()["one"].chat])
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


@pytest.mark.slow
@pytest.mark.parametrize("name", [LLAVA, QWEN])
def test_layers_offloaded_to_disk(name: str, folders: Any, tmp_path: Path) -> None:
    from accelerate import disk_offload

    model, processor = load(folders(name), name)
    away, _ = load(folders(name), name)
    disk_offload(away, tmp_path / "away", execution_device=torch.device("cpu"))
    assert fingerprint(away) == fingerprint(model)
    fits = [[m["name"] for m in examine(one)["methods"] if m["fits"]] for one in (model, away)]
    assert fits[0] == fits[1]
    found = calibrate(away, processor, only=["sinks"], save=False, allow_none=True)
    assert found.magnitudes is not None
    for method in ("pai", "gift", "hiprune"):
        answers = []
        for one in (model, away):
            with vlmfix.wrapped(one, method):
                answers.append(vlmfix.generate(one, processor, kinds()["one"].chat, **GREEDY))
        assert answers[0] == answers[1]


def test_an_evaluation_is_greedy_whatever_the_checkpoint_says(folders: Any, tmp_path: Path) -> None:
    model, processor = load(folders(QWEN), QWEN)
    assert model.generation_config.do_sample and model.generation_config.repetition_penalty == 1.05
    found = []
    for folder, penalty in (("as it is", 1.05), ("stronger", 50.0)):
        model.generation_config.repetition_penalty = penalty
        with pytest.warns(UserWarning, match="16 visual tokens"):  # of a bundled picture
            results = vlmfix.evals.evaluate(
                ["pope"],
                model=(model, processor),
                limit=1,
                splits=["random"],
                max_new_tokens=8,
                output=tmp_path / folder,
                quiet=True,
            )
        undone = results["config"]["generation_config"]["neutralised"]
        assert undone["repetition_penalty"] == penalty and undone["do_sample"] is True
        [file] = (tmp_path / folder).glob("**/*.jsonl")
        found.append([json.loads(line)["response"] for line in file.read_text().splitlines()])
    assert found[0] == found[1]


def test_answers_are_as_long_as_vlmfix_says(folders: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = load(folders(QWEN), QWEN)
    assert model.generation_config.max_new_tokens is None  # the checkpoint sets none
    monkeypatch.setattr("vlmfix.chat.MAX_NEW_TOKENS", 30)
    model.generation_config.eos_token_id = None
    chat = kinds()["one"].chat
    [answer] = vlmfix.generate(model, processor, chat, return_details=True, do_sample=False)
    assert (answer.new_tokens, answer.finish) == (30, "length")


def test_a_limit_of_pixels(variant: Variant) -> None:
    folder = variant(QWEN)
    config = json.loads((folder / "preprocessor_config.json").read_text())
    twin_folders.put(folder / "preprocessor_config.json", {**config, "max_pixels": 50176})
    model, processor = load(folder, QWEN)
    ids = encode_chats(processor, [[user([picture(640, 480)], QUESTION)]])["input_ids"]
    assert int((ids == model.config.image_token_id).sum()) == 54  # 9 x 6 instead of 23 x 17


@pytest.mark.slow
@pytest.mark.parametrize("name", [QWEN, NEXT])
@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_pictures_of_every_mode(name: str, mode: str, folders: Any) -> None:
    model, processor = load(folders(name), name)
    shown = picture().convert(mode)
    assert isinstance(shown, Image.Image)
    assert isinstance(vlmfix.generate(model, processor, [user([shown], QUESTION)], **GREEDY), str)


def test_a_picture_that_the_processor_refuses(folders: Any) -> None:
    model, processor = load(folders(QWEN), QWEN)
    with pytest.raises(BadInput, match="3 x 900"):
        vlmfix.generate(model, processor, [user([picture(3, 900)], QUESTION)], **GREEDY)
