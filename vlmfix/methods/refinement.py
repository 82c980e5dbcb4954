"""The findings of CARVE in one chat, as pictures and as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vlmfix.analysis.geometry import Box

__all__ = ["Mask", "Refinement", "Scores"]

Scores = NDArray[np.float32]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Refinement:
    """The findings of CARVE in one chat.

    Attributes:
        changed: whether the chat was rewritten.
        reason: why it was not; None if it was.
        number: index of the refined image in the chat, from 0.
        image: that image.
        scores: (h, w) float32, S.
        mask: (h, w) bool, the regions kept.
        box: bounding box of the mask, (left, top, right, bottom), right and bottom exclusive.
        refined: the new image; the original if `changed` is False.
        answer: the model's answer to the question about the original image; one token with
            steps="first".
        general: its general description, up to the last step that was compared.
        shared: whether both answers shared one prefill of the images (`analysis/passes.py`).
    """

    changed: bool
    reason: str | None
    number: int
    image: Image.Image
    scores: Scores
    mask: Mask
    box: Box
    refined: Image.Image
    answer: str = ""
    general: str = ""
    shared: bool = False

    def facts(self) -> dict[str, Any]:
        """Everything except the pictures, as plain data for JSON."""
        names = ("changed", "reason", "number", "box", "answer", "general", "shared")
        return {name: getattr(self, name) for name in names}

    def save(self, folder: str | Path, name: str = "carve") -> list[Path]:
        """Write the map over the image, the mask and the refined image as PNG files.

        Returns:
            NAME-map.png, NAME-mask.png and NAME-refined.png in `folder`.

        Raises:
            MissingDependency: matplotlib, which the map needs, is not installed.
        """
        from vlmfix.analysis.viz import overlay

        pictures = {
            "map": overlay(self.image, self.scores),
            "mask": Image.fromarray(self.mask),
            "refined": self.refined,
        }
        Path(folder).mkdir(parents=True, exist_ok=True)
        paths = [Path(folder) / f"{name}-{what}.png" for what in pictures]
        for path, picture in zip(paths, pictures.values(), strict=True):
            picture.save(path)
        return paths
