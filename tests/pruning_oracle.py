"""What a pruned prompt should say, worked out without vlmfix's engine.

Two ways: the prompt is cut by hand, token by token, and the plain model gets it with the features
that are left; or the plain model gets the whole prompt and a mask that hides what was dropped.
Both take `kept`: for each image, the placeholders that stay, counted from the image's first.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from tiny import PER_POSITION, TinyFamily
from tiny_configs import IMAGE
from torch import Tensor

from vlmfix.base.pruning import Kept, TokenMethod, VisualTokens

Inputs = dict[str, Any]
Indices = Sequence[Sequence[int]]

PIXELS = (
    "pixel_values", "pixel_values_images", "image_sizes", "image_grid_thw", "image_position_ids",
)  # fmt: skip


@dataclass(frozen=True)
class FixedTokens(TokenMethod):
    """Keeps the visual tokens that it is told, by the number of the image in its prompt."""

    index: tuple[tuple[int, ...], ...] = ((0,),)

    name: ClassVar[str] = "fixed"

    def budget(self, count: int) -> int:
        return min(max(map(len, self.index)), count)

    def keep(self, visual: VisualTokens, budget: int) -> Kept:
        return Kept(torch.tensor(self.index[visual.number]))


@dataclass(frozen=True)
class MergedPairs(TokenMethod):
    """Every other visual token becomes a mixture of itself and of the one behind it."""

    name: ClassVar[str] = "pairs"
    default_ratio: ClassVar[float] = 0.5

    def keep(self, visual: VisualTokens, budget: int) -> Kept:
        return Kept(torch.arange(0, 2 * budget, 2), pairs(budget, len(visual)))


def pairs(kept: int, count: int) -> Tensor:
    """(kept, count): three quarters of tokens 0, 2, 4, ..., and a quarter of the one behind."""
    weights = torch.zeros(kept, count)
    for row in range(kept):
        weights[row, 2 * row], weights[row, 2 * row + 1] = 0.75, 0.25
    return weights


def encoded(tiny: TinyFamily, inputs: Inputs) -> Any:
    """What the plain model's encoder returns for the images."""
    arguments = {name: inputs[name] for name in PIXELS if name in inputs}
    with torch.no_grad():
        return tiny.model.base_model.get_image_features(**arguments, return_dict=True)


def stays(inputs: Inputs, kept: Indices, sizes: Sequence[int]) -> list[list[bool]]:
    """Per row of the prompts, which tokens stay; padding does not."""
    images = [(set(own), size) for own, size in zip(kept, sizes, strict=True)]
    found, place = [], 0
    for ids, mask in zip(
        inputs["input_ids"].tolist(), inputs["attention_mask"].tolist(), strict=True
    ):
        row = []
        for token, real in zip(ids, mask, strict=True):
            if token != IMAGE:
                row.append(bool(real))
                continue
            own, size = images[0]
            row.append(place in own)
            place += 1
            if place == size:
                images, place = images[1:], 0
        found.append(row)
    assert not images
    return found


def whole_positions(tiny: TinyFamily, inputs: Inputs) -> Tensor:
    """Positions of the whole prompts: (3, B, L) with M-RoPE, else (B, L)."""
    index = getattr(tiny.model.base_model, "get_rope_index", None)
    mask = inputs["attention_mask"]
    if index is None:
        return (mask.cumsum(1) - 1).clamp(min=0)
    found: Tensor = index(
        inputs["input_ids"],
        mm_token_type_ids=inputs["mm_token_type_ids"],
        image_grid_thw=inputs.get("image_grid_thw"),
        attention_mask=mask,
    )[0]
    return found


def cut_by_hand(
    tiny: TinyFamily,
    inputs: Inputs,
    kept: Indices,
    *,
    weights: Sequence[Tensor] | None = None,
    gaps: bool = False,
) -> Inputs:
    """Arguments for the plain model on prompts without the placeholders that do not stay.

    Args:
        tiny: the family.
        inputs: the whole prompts, padded on the left.
        kept: see the module.
        weights: per image (k, n), what the features that stay are made of.
        gaps: whether tokens keep their positions where the model has one axis of them.
    """
    output = copy.copy(encoded(tiny, inputs))

    def left(parts: Sequence[Tensor]) -> list[Tensor]:
        if weights is not None:
            return [w @ part for w, part in zip(weights, parts, strict=True)]
        return [part[list(own)] for own, part in zip(kept, parts, strict=True)]

    # Llama 4 and Fuyu read this, and pool nothing.
    name = "last_hidden_state" if output.get("pooler_output") is None else "pooler_output"
    sizes = [len(part) for part in output[name]]
    features = left(output[name])
    as_tensor = isinstance(output[name], Tensor)
    setattr(output, name, torch.stack(features) if as_tensor else features)
    if output.get("deepstack_features") is not None:
        output.deepstack_features = [left(level) for level in output.deepstack_features]
    rows = stays(inputs, kept, sizes)
    width = max(map(sum, rows))

    def cut(values: Tensor, fill: int) -> Tensor:
        closed = []
        for row, own in zip(rows, values.tolist(), strict=True):
            short = [value for value, here in zip(own, row, strict=True) if here]
            closed.append([fill] * (width - len(short)) + short)
        return torch.tensor(closed)

    short: Inputs = {name: cut(inputs[name], 0) for name in PER_POSITION if name in inputs}
    short["mm_encoder_outputs"] = {"image": output}
    positions = whole_positions(tiny, inputs)
    if positions.ndim == 3:
        text = (short["attention_mask"].cumsum(1) - 1).clamp(min=0)
        axes = [cut(axis, 0) for axis in positions]
        # Four axes at most: HunYuan's own are four, without that of the text.
        short["position_ids"] = torch.stack(axes if len(axes) == 4 else [text, *axes])
    elif gaps:
        short["position_ids"] = cut(positions, 0)
    return short


def masked_logits(tiny: TinyFamily, inputs: Inputs, kept: Indices, behind: Tensor) -> Tensor:
    """(B, V) logits behind whole prompts and the tokens (B, T), with what was dropped hidden."""
    sizes = [len(part) for part in encoded(tiny, inputs).pooler_output]
    new = behind.shape[1]
    visible = torch.tensor(stays(inputs, kept, sizes))
    visible = torch.nn.functional.pad(visible, (0, new), value=True)
    positions = whole_positions(tiny, inputs)
    following = positions.amax(dim=(0, -1) if positions.ndim == 3 else -1)[:, None]
    following = following + torch.arange(1, new + 1)
    if positions.ndim == 3:
        following = following.expand(3, *following.shape)
    longer: Inputs = {
        **{name: inputs[name] for name in PIXELS if name in inputs},
        "input_ids": torch.cat([inputs["input_ids"], behind], dim=1),
        "attention_mask": hiding(visible),
        "position_ids": torch.cat([positions, following], dim=-1),
    }
    with torch.no_grad():
        logits: Tensor = tiny.model(**longer, use_cache=False).logits[:, -1]
    return logits


def hiding(visible: Tensor) -> Tensor:
    """(B, L) bool, which tokens may be seen -> a causal mask (B, 1, L, L); all see themselves."""
    length = visible.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    return (visible[:, None, None, :] & causal) | torch.eye(length, dtype=torch.bool)


def prompts(tiny: TinyFamily, images: Sequence[int], tail: int = 5, seed: int = 0) -> Inputs:
    """A left-padded batch of prompts with so many images each; pixels in the order of the rows."""
    generator = torch.Generator().manual_seed(seed)
    layout = tiny.layout
    image = [*layout.before, *[IMAGE] * layout.image_tokens, *layout.after]
    rows = []
    for row, count in enumerate(images):
        ids = [1, 5 + row]
        for number in range(count):
            ids += [*image, 30 + number]
        rows.append(ids + torch.randint(5, 80, (tail + row,), generator=generator).tolist())
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    inputs = {"input_ids": ids, "attention_mask": mask}
    inputs |= layout.pixels(sum(images), generator)
    return inputs if layout.extra is None else {**inputs, **layout.extra(ids)}


def one_prompt(inputs: Inputs, images: Sequence[int], row: int) -> Inputs:
    """One row of `prompts`, alone and without padding."""
    real = inputs["attention_mask"][row].bool()
    before, total = sum(images[:row]), sum(images)
    alone: Inputs = {}
    for name, value in inputs.items():
        if value.shape[:2] == inputs["input_ids"].shape:
            alone[name] = value[row : row + 1, real]
        elif images[row]:
            each = len(value) // total
            alone[name] = value[each * before : each * (before + images[row])]
    return alone


@contextmanager
def hidden_from(tiny: TinyFamily, first: int, visible: Tensor) -> Any:
    """Hide tokens, (B, L) bool, from all others in the decoder layers from `first` on."""

    def hide(module: Any, args: Any, kwargs: Inputs) -> tuple[Any, Inputs]:
        return args, {**kwargs, "attention_mask": hiding(visible)}

    layers = tiny.model.get_decoder().layers[first:]
    handles = [layer.register_forward_pre_hook(hide, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
