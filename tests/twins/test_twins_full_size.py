"""Doctor on the configurations as published, on the meta device: no weights, no memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import twin_folders
from twin_recipes import RECIPES

from vlmfix.analysis.doctor import examine

FAST = ("llava-1.5-7b-hf",)


def model_on_meta(folder: Path, config: Any) -> Any:
    from transformers import AutoConfig, AutoModelForImageTextToText

    folder.mkdir()
    twin_folders.put(folder / "config.json", config)
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder)).eval()


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in RECIPES]
)
def test_doctor_on_the_published_configuration(name: str, tmp_path: Path) -> None:
    recipe = RECIPES[name]
    full = examine(model_on_meta(tmp_path / "full", recipe.config))
    small_config = twin_folders.small_config(recipe, twin_folders.tokenizer_of(recipe)[0])
    small = examine(model_on_meta(tmp_path / "small", small_config))

    text = recipe.config.get("text_config", recipe.config)
    assert full["supported"] and full["reason"] is None
    assert full["parameters"] > 100 * small["parameters"]
    for ours, theirs in (("layers", "num_hidden_layers"), ("heads", "num_attention_heads")):
        if theirs in text:
            assert full[ours] == text[theirs]
    ids = {key: number for key, number in recipe.config.items() if key.startswith("image_token")}
    assert full["image_token_id"] in ids.values()
    assert full["vision_tower"] == small["vision_tower"]
    # What holds of the twin holds of the checkpoint; some constants are published for this alone.
    fits = [{m["name"] for m in report["methods"] if m["fits"]} for report in (full, small)]
    assert fits[0] >= fits[1], {m["name"]: m["why"] for m in full["methods"] if not m["fits"]}
