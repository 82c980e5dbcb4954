"""Models and images from names and files, and what is said when they cannot be used."""

from __future__ import annotations

import base64
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import warnings
from io import BytesIO
from pathlib import Path
from unittest import mock

import pytest
import tiny
import tiny_folders
import torch
import transformers
from packaging.requirements import Requirement
from PIL import Image
from transformers import AutoProcessor

from vlmfix.errors import BadInput, MissingDependency, UnsupportedModel
from vlmfix.images import formats
from vlmfix.loading import _torchvision_command, load, load_image, load_model


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folders.save("llava", tmp_path_factory.mktemp("llava"), with_processor=True)


@pytest.fixture
def copy(llava: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llava, tmp_path / "copy"))


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_a_folder_gives_the_saved_model_and_a_processor(llava: Path) -> None:
    model, processor = load(llava, device="cpu")
    assert not model.training
    saved = tiny.build("llava").model.state_dict()
    assert all(torch.equal(value, saved[key]) for key, value in model.state_dict().items())
    words = processor(text="user <image> ?", images=Image.new("RGB", (20, 30)), return_tensors="pt")
    assert (words["input_ids"] == model.config.image_token_id).sum() == 16


def test_dtype_by_name(llava: Path) -> None:
    assert load_model(llava, dtype="bf16", device="cpu").dtype == torch.bfloat16
    assert load_model(llava, dtype=torch.float16, device="cpu").dtype == torch.float16
    with pytest.raises(BadInput, match="float32"):
        load_model(llava, dtype="int3")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", "null"),
        ("config.json", "[" * 100_000),
        ("config.json", '{"model_type": "llava", "image_token_index": "x"}'),
        ("config.json", '{"model_type": "llava", "vision_config": 5}'),
        ("generation_config.json", "[1]"),
    ],
)
def test_a_damaged_file_of_the_model_is_one_message(copy: Path, file: str, content: str) -> None:
    (copy / file).write_text(content)
    with pytest.raises(BadInput, match=f"cannot load {re.escape(str(copy))}: "):
        load_model(copy)


@pytest.mark.parametrize(
    ("file", "place", "field", "value"),
    [
        ("config.json", "text_config", "num_hidden_layers", -1),
        ("config.json", "vision_config", "num_hidden_layers", 0),
        ("generation_config.json", None, "num_beams", "x"),
        ("generation_config.json", None, "eos_token_id", [2, "x"]),
        ("generation_config.json", None, "repetition_penalty", [1.05]),
        ("generation_config.json", None, "pad_token_id", True),
    ],
)
def test_a_field_that_would_fail_in_an_answer_is_named(
    copy: Path, file: str, place: str | None, field: str, value: object
) -> None:
    content = json.loads((copy / file).read_text())
    (content[place] if place else content)[field] = value
    (copy / file).write_text(json.dumps(content))
    with pytest.raises(BadInput, match=f"^{re.escape(file)} of {re.escape(str(copy))}: {field}"):
        load_model(copy)


@pytest.mark.parametrize("device", ["toaster", "cuda", "cuda:99", "meta", "xpu", "hpu"])
def test_a_device_that_is_not_there(llava: Path, device: str) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    for folder in (llava, "emoji"):
        with (
            mock.patch("transformers.PreTrainedModel.from_pretrained", side_effect=AssertionError),
            pytest.raises(BadInput, match="^(unknown )?device .*use cpu"),
        ):
            load_model(folder, device=device)


def test_a_model_without_processor_loads_alone(tmp_path: Path) -> None:
    folder = tiny_folders.save("qwen2_5_vl", tmp_path)
    assert load_model(folder, device="cpu").config.model_type == "qwen2_5_vl"
    with pytest.raises(BadInput, match="processor.save_pretrained"):
        load(folder)


@pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is not None, reason="torchvision is installed"
)
def test_a_processor_that_needs_torchvision_says_so(tmp_path: Path) -> None:
    folder = tiny_folders.save("qwen2_5_vl", tmp_path)
    tiny_folders.tokenizer().save_pretrained(folder)
    kinds = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(kinds))
    with pytest.raises(MissingDependency, match="pip install torchvision torch==.*LLaVA-NeXT"):
        load(folder)


@pytest.mark.parametrize(
    ("version", "command"),
    [
        ("2.13.0", "pip install torchvision torch==2.13.0"),
        ("2.13.0+cpu", "pip install torchvision torch==2.13.0+cpu --index-url INDEX"),
        ("2.13.0+cu130", "pip install torchvision torch==2.13.0+cu130 --index-url INDEX"),
    ],
)
def test_the_command_for_torchvision_leaves_torch_alone(
    version: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    (said,) = re.findall("`(.*?)`", _torchvision_command())
    assert said == command
    requirement = Requirement(said.split()[3])
    assert requirement.name == "torch"
    assert [str(spec) for spec in requirement.specifier] == [f"=={version}"]
    assert requirement.specifier.contains(version)


def test_a_folder_without_image_processor(copy: Path) -> None:
    (copy / "processor_config.json").unlink()
    with pytest.raises(BadInput, match="processor.save_pretrained"):
        load(copy)


@pytest.mark.parametrize("lost", [("patch_size", "class token"), ("class token",)])
def test_a_folder_from_before_the_processor_had_a_file(copy: Path, lost: tuple[str, ...]) -> None:
    """Old folders say nothing of patches, some later ones nothing of the class token."""
    settings = json.loads((copy / "processor_config.json").read_text())
    expected = AutoProcessor.from_pretrained(copy)
    (copy / "processor_config.json").unlink()
    (copy / "preprocessor_config.json").write_text(json.dumps(settings.pop("image_processor")))
    (copy / "chat_template.jinja").write_text(expected.chat_template)
    if "patch_size" not in lost:
        settings.pop("num_additional_image_tokens")
        (copy / "processor_config.json").write_text(json.dumps(settings))
    model, processor = load(copy, device="cpu")
    assert processor.num_additional_image_tokens == expected.num_additional_image_tokens == 1
    given = {"text": "user <image> ?", "images": Image.new("RGB", (20, 30)), "return_tensors": "pt"}
    ids = processor(**given)["input_ids"]
    assert torch.equal(ids, expected(**given)["input_ids"])
    assert (ids == model.config.image_token_id).sum() == 16


def test_a_patch_size_that_nothing_tells(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["vision_config"]["model_type"] = "dinov2"
    (copy / "config.json").write_text(json.dumps(config))
    settings = json.loads((copy / "processor_config.json").read_text())
    (copy / "processor_config.json").write_text(json.dumps(settings | {"patch_size": None}))
    with pytest.raises(BadInput, match="processor_kwargs"):
        load(copy)


def test_options_of_the_processor(llava: Path) -> None:
    _, processor = load(llava, device="cpu", processor_kwargs={"patch_size": 8})
    assert processor.patch_size == 8
    for name, options in (
        (llava, {"trust_remote_code": True}),
        ("emoji", {"patch_size": 8}),
    ):
        with pytest.raises(BadInput, match="processor_kwargs="):
            load(name, processor_kwargs=options)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", '{"version": "1.0", "model": 7}'),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", "[" * 100_000),
        ("tokenizer_config.json", "[]"),
        ("processor_config.json", "null"),
    ],
)
def test_a_damaged_tokenizer(copy: Path, file: str, content: str) -> None:
    (copy / file).write_text(content)
    with pytest.raises(BadInput, match="no usable processor .* went wrong: "):
        load(copy)


def test_a_bare_tokenizer_is_not_a_processor(llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = tiny_folders.tokenizer()
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda *a, **k: bare)
    with pytest.raises(BadInput, match="no image processor"):
        load(llava)


def test_a_text_only_model_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    tiny.build("llama").model.config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="text-only.*'llama'"):
        load_model(tmp_path)


def test_names_that_lead_nowhere(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    for name, hint in [
        (tmp_path, "no config.json in the folder"),
        (file, "is a file"),
        (tmp_path / "absent", "no folder"),
        ("absent", "no folder"),
        ("nobody/nothing", "pass the folder"),
    ]:
        with pytest.raises(BadInput, match=hint) as caught:
            load(name)
        assert str(name) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "kind", "hint"),
    [
        ("{", BadInput, "not valid JSON"),
        ("{}", BadInput, "model_type"),
        ('{"model_type": "wobble"}', UnsupportedModel, "update transformers"),
        ('{"model_type": "w", "auto_map": {"AutoConfig": "a.B"}}', UnsupportedModel, "own code"),
    ],
)
def test_damaged_or_foreign_configs(
    copy: Path, text: str, kind: type[Exception], hint: str
) -> None:
    (copy / "config.json").write_text(text)
    with pytest.raises(kind, match=hint):
        load_model(copy)


def test_damaged_weights(copy: Path) -> None:
    weights = copy / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadInput, match="download them again"):
        load_model(copy)
    weights.unlink()
    with pytest.raises(BadInput, match=r"model\.safetensors"):
        load_model(copy)


def test_missing_weights_are_not_replaced_by_noise(copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = copy / "model.safetensors"
    kept = {k: v.clone() for k, v in load_file(weights).items() if "layers.1.mlp" not in k}
    save_file(kept, weights, metadata={"format": "pt"})
    with pytest.raises(BadInput, match="lacks"):
        load_model(copy)


def test_every_kind_of_image_source(tmp_path: Path) -> None:
    image = Image.new("RGB", (3, 2), (10, 20, 30))
    data = encoded(image)
    path = tmp_path / "a.png"
    path.write_bytes(data)
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    for source in (image, path, str(path), data, url):
        read = load_image(source)
        assert (read.mode, read.size, read.getpixel((0, 0))) == ("RGB", (3, 2), (10, 20, 30))


def test_exif_turns_the_image(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert load_image(encoded(Image.new("RGB", (8, 4)), "JPEG", exif=exif)).size == (4, 8)


def test_palette_with_transparency_and_grey() -> None:
    palette = Image.new("P", (3, 1))
    palette.putdata([0, 1, 2])
    palette.putpalette(list(range(9)))
    # Pillow warns of such an image when it goes to RGB directly.
    data = encoded(palette, transparency=b"\x00\x80\x07")
    assert load_image(data).mode == "RGB"
    assert load_image(Image.new("L", (2, 2), 7)).getpixel((0, 0)) == (7, 7, 7)


def test_images_that_cannot_be_used(tmp_path: Path) -> None:
    text = tmp_path / "notes.png"
    text.write_text("not an image")
    empty = tmp_path / "empty.jpg"
    empty.touch()
    noise = Image.effect_noise((64, 64), 80)
    for source, hint in [
        (tmp_path / "absent.png", "no image file"),
        (tmp_path, "is a folder"),
        (text, "not an image"),
        (empty, "not an image"),
        (encoded(noise)[:600], "damaged"),
        (encoded(noise, "JPEG")[:600], "damaged"),
        (encoded(noise.convert("I;16")), "8 bits"),
        (Image.new("RGB", (0, 5)), "no pixels .0 x 5."),
        (encoded(noise, "ICO"), "Pillow can read as .*JPEG.*PNG.*convert it"),
        (encoded(noise.convert("RGB"), "PCX"), "Pillow can read as"),
        ("https://example.com/a.png", "download"),
        ("data:image/png;base64,@@@", "base64"),
        ("data:nothing", "no comma"),
        (7, "pass a path"),
    ]:
        with pytest.raises(BadInput, match=hint):
            load_image(source)


@pytest.mark.parametrize("kind", ["AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF"])
def test_formats_that_are_read(kind: str) -> None:
    if kind not in formats():
        pytest.skip(f"this Pillow has no {kind}")
    assert load_image(encoded(Image.new("RGB", (16, 8)), kind)).size == (16, 8)


def test_no_image_starts_another_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import EpsImagePlugin

    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(BadInput, match="Pillow can read as"):
        load_image(eps)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("limit", [150, 99])
def test_a_decompression_bomb_is_refused(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    data = encoded(Image.new("RGB", (10, 20)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    # Outside the tests the warning of Pillow, up to twice the limit, stops nothing.
    warnings.simplefilter("ignore")
    with pytest.raises(BadInput, match="too large"):
        load_image(data)


def test_bundled_images_by_number() -> None:
    first, second = load_image("emoji:1"), load_image("emoji:2")
    assert first.mode == "RGB"
    assert first.tobytes() != second.tobytes()
    for name in ("emoji:0", "emoji:x", "emoji:999999"):
        with pytest.raises(BadInput, match="emoji:1 to emoji:"):
            load_image(name)
