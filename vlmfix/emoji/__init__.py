"""EmojiCOCO: a small world of true pictures and words, and a small model that sees it.

Light to import; torch, transformers and Pillow load inside the functions that need them.
"""

from __future__ import annotations

__all__ = ["evaluation_split", "example_images", "load", "model_path"]

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmfix.errors import BadInput

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

_HERE = Path(__file__).parent


def model_path() -> Path:
    """Folder of the bundled model, in save_pretrained form; works with `from_pretrained`."""
    return _HERE / "model"


def evaluation_split() -> Path:
    """The evaluation split, a zip file in COCO's layout.

    Holds annotations/instances.json, annotations/captions.json and
    images/emoji_000000000001.png, ... (112 x 112 RGB).
    """
    return _HERE / "data" / "evaluation.zip"


def load(dtype: str | torch.dtype = "float32") -> tuple[Any, Any]:
    """Load the bundled model. Needs no network.

    Args:
        dtype: a torch dtype or its name, such as "float32" or "bfloat16".

    Returns:
        (model, processor): a `LlavaForConditionalGeneration` in eval mode on the CPU, and its
        `LlavaProcessor` with chat template and left padding.

    Raises:
        BadInput: `dtype` names no floating point type of torch.
    """
    import torch
    from transformers import (
        CLIPImageProcessorPil,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    kind = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise BadInput(f"dtype {dtype!r} is no floating point type; use float32, bfloat16, float16")
    folder = model_path()
    model = LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=kind, local_files_only=True
    ).eval()
    # The Pillow image processor by name: the default one would ask for torchvision.
    processor = LlavaProcessor.from_pretrained(
        folder,
        local_files_only=True,
        image_processor=CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True),
        tokenizer=PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True),
    )
    return model, processor


def example_images(number: int = 4) -> list[tuple[str, Image]]:
    """The first pictures of the evaluation split as (file name, RGB picture).

    Raises:
        BadInput: `number` is negative or more than the split holds.
    """
    import io
    import zipfile

    from PIL import Image as Pillow

    with zipfile.ZipFile(evaluation_split()) as archive:
        names = sorted(name for name in archive.namelist() if name.startswith("images/"))
        if not 0 <= number <= len(names):
            raise BadInput(f"number must be 0 to {len(names)} (the split's pictures), not {number}")
        return [
            (Path(name).name, Pillow.open(io.BytesIO(archive.read(name))).convert("RGB"))
            for name in names[:number]
        ]
