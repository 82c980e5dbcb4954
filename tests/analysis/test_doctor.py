"""What `vlmfix doctor` says about models that fit, fit partly, or do not."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from matrix import family
from tiny import FAMILIES, build

import vlmfix
from vlmfix.analysis.doctor import _visual_tokens, examine
from vlmfix.engine.attention_stage import AttentionStage
from vlmfix.errors import UnsupportedModel
from vlmfix.families import ModelInfo


@pytest.mark.parametrize("name", FAMILIES)
def test_supported_families(name: str) -> None:
    report = examine(family(name).model)
    assert report["supported"] and report["reason"] is None
    assert (report["layers"], report["heads"], report["kv_heads"]) == (3, 4, 2)
    assert report["attention_layers"] == report["layers"]
    assert report["image_token_id"] == family(name).image_token_id
    fits = {row["name"]: row for row in report["methods"]}
    assert fits["pai"]["fits"] and "alpha=0.2" in fits["pai"]["why"]
    assert not fits["var"]["fits"] and "vlmfix calibrate" in fits["var"]["why"]
    json.dumps(report)


@pytest.mark.parametrize(("name", "why"), [("kosmos2", "mask"), ("llama", "text-only")])
def test_unsupported_models_get_the_reason(name: str, why: str) -> None:
    report = examine(build(name).model)
    assert not report["supported"] and why in report["reason"] and report["methods"] == []


def test_visual_tokens_are_explained() -> None:
    said = {name: examine(family(name).model)["visual_tokens"] for name in FAMILIES}
    assert said["gemma3"] == "4 per image, or per tile where the processor cuts images"
    assert "tiles" in said["llava_next"] and "placeholder" in said["qwen2_5_vl"]


def test_visual_tokens_of_full_size_configurations() -> None:
    sides = {"image_size": 336, "patch_size": 14}
    clip = transformers.LlavaConfig(vision_config={"model_type": "clip_vision_model", **sides})
    sides = {"image_size": 1024, "patch_size": 16}
    pixtral = transformers.LlavaConfig(
        vision_config={"model_type": "pixtral", **sides}, image_seq_length=1
    )
    tiles = transformers.InternVLConfig()
    assert _visual_tokens(clip).startswith("576 per image")
    assert _visual_tokens(pixtral).startswith("by image size")
    assert "256 per image, or per tile" in _visual_tokens(tiles)


def test_doctor_and_wrap_give_the_same_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: AttentionStage, model: torch.nn.Module, info: ModelInfo) -> None:
        raise UnsupportedModel("this model has no such thing")

    monkeypatch.setattr(AttentionStage, "examine", refuse)
    model = family("llava").model
    fits = {row["name"]: row for row in examine(model)["methods"]}
    assert not fits["pai"]["fits"] and fits["pai"]["why"] == "this model has no such thing"
    assert fits["vcd"]["fits"]  # it has no such stage
    with pytest.raises(UnsupportedModel, match="no such thing"):
        vlmfix.wrap(model, "pai")
    with vlmfix.wrapped(model, None), pytest.raises(UnsupportedModel), vlmfix.using(model, "pai"):
        pass


def test_layers_without_attention_are_idle() -> None:
    model = build("glm5_next").model  # one of its four layers has softmax attention
    fits = {row["name"]: row for row in examine(model)["methods"]}
    assert "has softmax attention" in fits["vaf"]["why"] and not fits["vaf"]["fits"]
    assert fits["vhr"]["fits"]
    with pytest.warns(UserWarning, match="none of its layers .* has softmax attention"):
        vlmfix.wrap(model, "vaf")
