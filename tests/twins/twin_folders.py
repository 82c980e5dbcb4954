"""Write a twin as a folder in the layout of the hub, and load it as a user does.

Without torchvision, transformers loads no processor that could also read videos. Everything else of
such a processor is tried here nevertheless: its video part alone is replaced (`video_stand_in`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import twin_tokenizers
from tokenizers import Tokenizer
from transformers.utils import PushToHubMixin
from twin_recipes import RECIPES, Recipe
from twin_tokenizers import Ids

import vlmfix
from vlmfix.families import ModelInfo, describe_model


@dataclass(frozen=True)
class Twin:
    """A twin as a user has it in hand; the model in float32, whatever the checkpoint says."""

    name: str
    recipe: Recipe
    folder: Path
    model: Any
    processor: Any

    @property
    def info(self) -> ModelInfo:
        return describe_model(self.model)

    def visual(self, ids: torch.Tensor) -> torch.Tensor:
        """(B, L) bool: the placeholders of images."""
        return torch.isin(ids, torch.tensor(self.info.image_token_ids))


def write(name: str, folder: Path) -> Path:
    """Write config, weights, tokenizer and processor of a twin into `folder`."""
    recipe = RECIPES[name]
    folder.mkdir(parents=True)
    ids, made = tokenizer_of(recipe)
    config = small_config(recipe, ids)
    put(folder / "config.json", config)
    _weights(folder)
    # Saving wrote small files, too, as transformers 5 does; the hub has older ones.
    put(folder / "config.json", config)
    post = twin_tokenizers.starts_with(ids, recipe.begin) if recipe.begin else None
    files = twin_tokenizers.files(ids, made, recipe.tokenizer_config, post)
    for file, data in {**files, **recipe.files}.items():
        put(folder / file, _with_ids(data, ids) if file == "generation_config.json" else data)
    return folder


def tokenizer_of(recipe: Recipe) -> tuple[Ids, Tokenizer]:
    """The ids of a twin, and its tokenizer without special tokens."""
    return getattr(twin_tokenizers, recipe.tokenizer)(recipe.tokens)


def put(path: Path, data: Any) -> None:
    """Write a text as it is, anything else as JSON."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(data if isinstance(data, str) else json.dumps(data, indent=1), "utf-8")


def small_config(recipe: Recipe, ids: Ids) -> Any:
    """config.json of the twin: narrower, shallower, with the twin's ids and vocabulary."""
    return _with_ids(merged(recipe.config, recipe.small), ids)


def merged(base: Any, over: Any) -> Any:
    """`base` with the entries of `over`, mapping by mapping."""
    if not (isinstance(base, Mapping) and isinstance(over, Mapping)):
        return over
    return {**base, **{key: merged(base.get(key), value) for key, value in over.items()}}


def _with_ids(data: Any, ids: Ids, key: str = "") -> Any:
    if isinstance(data, Mapping):
        return {name: _with_ids(value, ids, name) for name, value in data.items()}
    if key.endswith(("token_id", "token_index", "token_ids")):
        if isinstance(data, list):
            return [ids.twin(number) for number in data]
        return data if data is None else ids.twin(data)
    # Towers and Q-Formers name a vocabulary, too, which the text's is large enough for.
    return ids.size(data) if key.startswith("vocab_size") else data


def _weights(folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(folder)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                # Wide enough that attention is not flat and that images matter.
                wide = 0.3 if "embed" in name else 0.7 / weight[0].numel() ** 0.5
                weight.normal_(0, wide)
    model.to(getattr(torch, str(config.dtype or "float32").removeprefix("torch.")))
    model.save_pretrained(folder)


# -- loading ---------------------------------------------------------------------------------------


def lacks(recipe: Recipe) -> list[str]:
    """The packages that the processor needs and that are not installed."""
    return [package for package in recipe.needs if find_spec(package) is None]


def load(folder: Path, recipe: Recipe, **options: Any) -> tuple[Any, Any]:
    """`vlmfix.load`, also where packages are missing that only videos need."""
    missing = lacks(recipe)
    with video_stand_in() if missing else nullcontext():
        return vlmfix.load(folder, device="cpu", **options)


class _NoVideos(PushToHubMixin):
    """Stands where a processor keeps its video part."""

    model_input_names = ("pixel_values_videos",)
    num_frames = fps = 1

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> _NoVideos:
        return cls()

    def to_dict(self) -> dict[str, Any]:
        return {}


@contextmanager
def video_stand_in() -> Iterator[None]:
    """Load processors without their video part, as if torchvision and num2words were there."""
    from transformers import processing_utils
    from transformers.models import pixtral
    from transformers.models.pixtral import image_processing_pil_pixtral as without_torchvision
    from transformers.models.smolvlm import processing_smolvlm

    mixin, table = (
        processing_utils.ProcessorMixin,
        processing_utils.MODALITY_TO_AUTOPROCESSOR_MAPPING,
    )
    check, get = mixin.check_argument_for_proper_class, type(table).__getitem__

    def check_others(self: Any, name: str, argument: Any) -> Any:
        return type(argument) if name == "video_processor" else check(self, name, argument)

    def get_others(self: Any, name: str) -> Any:
        return _NoVideos if name == "video_processor" else get(self, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixin, "check_argument_for_proper_class", check_others)
        patch.setattr(type(table), "__getitem__", get_others)
        # Pixtral's processor takes a function from the file that needs torchvision.
        patch.setitem(
            sys.modules, f"{pixtral.__name__}.image_processing_pixtral", without_torchvision
        )
        processing = import_module(f"{pixtral.__name__}.processing_pixtral")
        patch.setattr(pixtral, "PixtralProcessor", processing.PixtralProcessor)
        patch.setattr(processing_smolvlm, "num2words", str)
        yield
