"""CARVE: crop and enlarge what the question draws attention to, then ask again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

from vlmfix.analysis.geometry import Box, piece_places
from vlmfix.analysis.passes import Look, look
from vlmfix.base.method import Preset, option
from vlmfix.base.pixels import PixelMethod
from vlmfix.chat import split_chat
from vlmfix.engine.session import SESSION
from vlmfix.errors import BadInput, UnsupportedModel
from vlmfix.families import ModelInfo
from vlmfix.families.tower import describe_tower
from vlmfix.methods.chats import last_text, request, with_images
from vlmfix.methods.refinement import Mask, Refinement, Scores
from vlmfix.methods.structures import EMOJI

__all__ = [
    "ContrastiveAttentionRefinement",
    "bounding_box",
    "components_kept",
    "contrast_attention",
    "counted_steps",
    "cut_out",
    "default_layers",
    "relevant_mask",
    "spread",
]

Steps = Literal["all", "first", "last"]

_ROUNDING = 1e-5  # what a resize may make of a constant, as a share of it


def contrast_attention(question: torch.Tensor, general: torch.Tensor, lam: float) -> torch.Tensor:
    """A_Q / (A_G + lambda), of the same shape; 0 where that would divide by 0."""
    below = general + lam
    return torch.where(below > 0, question / below, torch.zeros_like(below))


def counted_steps(
    question: torch.Tensor, general: torch.Tensor, steps: Steps
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Select the steps of two answers that count, and weigh them.

    Args:
        question: (L, T, n), attention of the rows that predicted the answer to the question.
        general: (L, T', n), of those that predicted a general description.
        steps: "all" takes the first min(T, T') steps, step t with weight t; "first" the first
            step; "last" the last step of each answer.

    Returns:
        (L, C, n), (L, C, n) and (C,), float64.
    """
    if steps == "last":
        question, general = question[:, -1:], general[:, -1:]
    count = 1 if steps == "first" else min(question.shape[1], general.shape[1])
    weights = torch.arange(1, count + 1, dtype=torch.float64)
    return question[:, :count].double(), general[:, :count].double(), weights


def spread(tokens: torch.Tensor, views: Sequence[torch.Tensor], width: int, height: int) -> Scores:
    """Resize values of tokens (n,) to (height, width) pixels, bilinearly; views are added up.

    Resizing is linear, so that layers and steps can be added up on the tokens before.
    """
    total = np.zeros((height, width), dtype=np.float32)
    for view in views:
        grid = Image.fromarray(tokens[view].float().numpy())
        total += np.asarray(grid.resize((width, height), Image.Resampling.BILINEAR))
    return total


def components_kept(total: int, at_most: int | None, p: float) -> int:
    """How many components of the mask are kept; None: by the rule of the authors' code.

    The code has one number for the share of pixels and that of components.
    """
    return max(3, int(total * p)) if at_most is None else at_most


def relevant_mask(scores: Scores, p: float, at_most: int | None) -> Mask:
    """Mark the 4-connected regions at or above the quantile 1 - p that have the largest sums.

    Where the scores are constant up to rounding, the mask is the whole image.
    """
    if scores.max() - scores.min() <= _ROUNDING * scores.max():
        return np.ones(scores.shape, dtype=bool)
    labels, count = ndimage.label(scores >= np.quantile(scores, 1 - p))
    sums = ndimage.sum_labels(scores, labels, range(1, count + 1))
    best = 1 + np.argsort(-sums, kind="stable")[: components_kept(count, at_most, p)]
    kept: Mask = np.isin(labels, best)
    return kept


def bounding_box(mask: Mask) -> Box:
    """The tight box of a mask that is not empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def cut_out(image: Image.Image, mask: Mask, box: Box, black: bool) -> Image.Image:
    """Crop a box of an image, and enlarge it until it covers the size of the image.

    One factor enlarges both sides, so that one of them may become longer than the image's. Sides
    are cut to whole pixels, as in the authors' code, where rounding of the factor may cost the last
    one.

    Args:
        image: RGB.
        mask: (h, w) bool.
        box: (left, top, right, bottom).
        black: whether pixels outside of the mask become black.
    """
    pixels = np.asarray(image)
    if black:
        pixels = np.where(mask[..., None], pixels, np.uint8(0))
    crop = Image.fromarray(pixels).crop(box)
    scale = max(image.width / crop.width, image.height / crop.height)
    size = (int(crop.width * scale), int(crop.height * scale))
    return crop if size == crop.size else crop.resize(size, Image.Resampling.LANCZOS)


_GENERAL = "Write a general description of the image."
_SUFFIX = "Answer the question using a single word or phrase."
_SHARED = {"background": "black", "general": _GENERAL, "suffix": _SUFFIX}
#: Defaults of the two sources; every option can be set separately.
_VARIANTS: dict[str, dict[str, Any]] = {
    "code": {"p": 0.2, "components": None, "steps": "all", "final": "both", **_SHARED},
    "paper": {"p": 0.4, "components": 2, "steps": "last", "final": "refined", **_SHARED},
}


@dataclass(frozen=True)
class ContrastiveAttentionRefinement(PixelMethod):
    """Give the model a close-up of what its question, unlike a general request, attends to.

    Ge et al.: "Focusing by Contrastive Attention: Enhancing VLMs' Visual Reasoning", ECCV 2026,
    arXiv 2509.06461. Two internal passes of the plain model answer the question and a request for
    a general description, greedily. The ratio of the two answers' attention to the image, added
    over layers and steps and resized to the pixels, is cut at a quantile. Its strongest regions are
    kept, the rest is blacked out, and their box is enlarged to the size of the image. The model
    then answers the user's own prompt with this image.

    Paper and code disagree: at most two regions or at least three, the refined image alone or next
    to the original, the last step or all of them. preset="code" (the default, because it can be
    compared run by run) and preset="paper" follow them. Three things are in neither. Maps lie on
    the model's true token grid (the code takes 8 x 32 tokens for 16 x 16) and where the processor
    cut the image. The suffix that asks for one word is added in the two internal passes alone; the
    final prompt stays the user's. Of several images, the one whose share of attention grows most is
    refined. `lam` near 1e-8 lets tokens with hardly any attention dominate; 1e-5 is safer in
    bfloat16.
    """

    preset: Literal["code", "paper"] = option(
        "code", "source of the defaults of p, components, steps and final: code or paper"
    )
    layers: tuple[int, ...] | None = option(
        None,
        "decoder layers whose attention is read, e.g. 20/21; default: 20 to 25, or 70 to 90 % of "
        "the depth in models of up to 26 layers",
    )
    lam: float = option(
        1e-8, "lambda, added to the attention of the general description before the division", 0, 1
    )
    p: float | None = option(
        None, "share of the pixels that are candidates; default: 0.2 (code), 0.4 (paper)", 0, 1
    )
    components: int | None = option(
        None,
        "most regions kept; default: the share p of them, at least 3 (code), or 2 (paper)",
        1,
        10_000,
    )
    steps: Steps | None = option(
        None,
        "steps of the answers that count: all, later ones more (code), first, or last (paper)",
    )
    background: Literal["black", "keep"] | None = option(
        None, "pixels of the box outside of all regions: black (code and paper) or keep"
    )
    final: Literal["both", "refined"] | None = option(
        None, "images of the final prompt: both (code) or refined, without the original (paper)"
    )
    minimum_contrast: float = option(
        0.0, "leave an image as it is if max/mean of its map is below this; 1.5 is cautious", 0, 1e6
    )
    max_new_tokens: int = option(32, "longest answer of the two internal passes", 1, 1024)
    general: str | None = option(
        None, f'the request for a general description; default: "{_GENERAL}"'
    )
    suffix: str | None = option(
        None,
        f'text added to question and request unless it ends the question; default: "{_SUFFIX}"',
    )

    name: ClassVar[str] = "carve"
    PRESETS: ClassVar[tuple[Preset, ...]] = (
        Preset(
            EMOJI,
            {"background": "keep", "general": "Describe the image.", "suffix": ""},
            "its training data have no black areas and no other wording; tuning split",
        ),
    )

    def prepared(self, info: ModelInfo, model: torch.nn.Module) -> ContrastiveAttentionRefinement:
        describe_tower(model, info)
        layers = default_layers(info.num_layers) if self.layers is None else self.layers
        readable = tuple(layer for layer in layers if layer in info.attention)
        if not readable or (self.layers is not None and readable != self.layers):
            raise BadInput(
                f"carve: layers={layers} must be layers of this model with attention: "
                f"{sorted(info.attention)}."
            )
        return replace(self.with_defaults(info, **_VARIANTS[self.preset]), layers=readable)

    def idle(self) -> str | None:
        return "p=1 keeps every pixel" if self.p == 1 else None

    def rewrite(
        self, model: Any, processor: Any, chats: Sequence[Any]
    ) -> tuple[list[Any], list[Refinement | None]]:
        """Rewrite chats; the finding is None for a chat without an image or a question."""
        read = [split_chat(chat) for chat in chats]
        asks = [last_text(plain) if images else None for images, plain in read]
        requests = [
            with_images(request(plain, at, text, self.suffix or ""), [[image] for image in images])
            for text in (None, self.general)
            for (images, plain), at in zip(read, asks, strict=True)
            if at is not None
        ]
        half = len(requests) // 2
        limit = 1 if self.steps == "first" else self.max_new_tokens
        # Only steps="last" needs complete descriptions.
        complete = None if self.steps == "last" else range(half)
        layers = self.layers or ()
        looks = look(model, processor, requests, layers, limit, complete) if requests else []
        pairs = iter(zip(looks[:half], looks[half:], strict=True))
        tokenizer = getattr(processor, "tokenizer", processor)
        places = _Places(model, processor)
        new: list[Any] = []
        findings: list[Refinement | None] = []
        for chat, (images, plain), at in zip(chats, read, asks, strict=True):
            new.append(chat)
            findings.append(None)
            if at is None:
                continue
            question, general = next(pairs)
            found = self.refine(images, [places.of(image) for image in images], question, general)
            if found.changed:
                shown = [[image] for image in images]
                shown[found.number].append(found.refined)
                if self.final == "refined":
                    shown[found.number].remove(found.image)
                new[-1] = with_images(plain, shown)
            read_on = None if self.steps == "last" else len(question.tokens)
            said = tokenizer.batch_decode(
                [question.tokens, general.tokens[:read_on]], skip_special_tokens=True
            )
            findings[-1] = replace(
                found, answer=said[0].strip(), general=said[1].strip(), shared=question.shared
            )
        return new, findings

    def refine(
        self,
        images: Sequence[Image.Image],
        places: Sequence[Sequence[Box]],
        question: Look,
        general: Look,
    ) -> Refinement:
        """Refine one image of a chat.

        Args:
            images: the images of the chat.
            places: for each image, the boxes of the pieces that the processor makes of it.
            question: attention to the pieces while the model answered the question.
            general: attention to the pieces while it described the image.

        Raises:
            UnsupportedModel: the number of maps is not the number of pieces.
        """
        number, pieces = self._most_drawn(places, question, general)
        image = images[number]
        scores = np.zeros((image.height, image.width), dtype=np.float32)
        cells = []  # sides of a visual token in pixels
        for (left, top, right, bottom), tokens, views in pieces:
            width, height = right - left, bottom - top
            scores[top:bottom, left:right] += spread(tokens, views, width, height)
            cells += [(width / view.shape[1], height / view.shape[0]) for view in views]
        mask = relevant_mask(scores, self.p or 0.0, self.components)
        box = bounding_box(mask)
        sides = box[2] - box[0], box[3] - box[1]
        smallest = [max(2.0, min(side)) for side in zip(*cells, strict=True)]
        black = self.background == "black"
        reason = None
        if scores.max() < self.minimum_contrast * scores.mean():
            reason = f"max/mean of the map is below {self.minimum_contrast:g}"
        elif mask.all() or (not black and sides == image.size):
            reason = "every pixel is kept"
        elif sides[0] < smallest[0] or sides[1] < smallest[1]:
            reason = "the box is smaller than a visual token"
        return Refinement(
            changed=reason is None,
            reason=reason,
            number=number,
            image=image,
            scores=scores,
            mask=mask,
            box=box,
            refined=cut_out(image, mask, box, black) if reason is None else image,
        )

    def _most_drawn(
        self, places: Sequence[Sequence[Box]], question: Look, general: Look
    ) -> tuple[int, list[tuple[Box, torch.Tensor, tuple[torch.Tensor, ...]]]]:
        """Find the image whose share of attention grows most with the question.

        Returns:
            Its index, and for each of its pieces: its box, S on its visual tokens, and where these
            lie in the piece.
        """
        if sum(map(len, places)) != len(question.maps):
            raise UnsupportedModel(
                f"carve counts {sum(map(len, places))} pieces of images where the model got "
                f"{len(question.maps)}, so its maps cannot be assigned to places. Use a processor "
                "that cuts every image of a size alike."
            )
        maps = iter(zip(question.maps, general.maps, strict=True))
        found = []
        for boxes in places:
            drawn = usual = 0.0
            pieces = []
            for box, (one, other) in zip(boxes, maps, strict=False):
                seen = counted_steps(one.weights[:, 0], other.weights[:, 0], self.steps or "all")
                drawn += float(torch.einsum("ltn,t->", seen[0], seen[2]))
                usual += float(torch.einsum("ltn,t->", seen[1], seen[2]))
                ratio = contrast_attention(*seen[:2], self.lam)
                pieces.append((box, torch.einsum("ltn,t->n", ratio, seen[2]), one.views))
            found.append((drawn / max(usual, 1e-30), pieces))
        number = max(range(len(found)), key=lambda at: found[at][0])
        return number, found[number][1]


def default_layers(count: int) -> tuple[int, ...]:
    """Layers 20 to 25, as published; 70 to 90 % of the depth in models of up to 26 layers."""
    return tuple(range(20, 26) if count > 26 else range(int(0.7 * count), int(0.9 * count) + 1))


class _Places:
    """The boxes of the pieces of an image, measured on the processor once per size."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.processor = processor
        self.cuts = describe_tower(model, model.__dict__[SESSION].host.info).layout == "tiles"
        self.known: dict[tuple[int, int], list[Box]] = {}

    def of(self, image: Image.Image) -> list[Box]:
        if image.size not in self.known:
            whole = [(0, 0, *image.size)]
            self.known[image.size] = (
                piece_places(self.processor, *image.size) if self.cuts else whole
            )
        return self.known[image.size]
