"""Constants that a method needs and that are not published for a model, measured on the model.

The result is a small JSON file in the user's cache folder (VLMFIX_CACHE, else the platform's),
keyed by the model's fingerprint, so that a calibration is never applied to another model. A model
folder may hold its own file next to the weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from vlmfix.analysis.fingerprint import fingerprint
from vlmfix.analysis.massive import DEFAULT_FRACTION, layer_inputs, magnitude
from vlmfix.analysis.stored import (
    FOLDER_FILE,
    Calibration,
    cache_folder,
    calibration_path,
    load_calibration,
    store,
    write,
)
from vlmfix.errors import BadInput, CalibrationNeeded, StateError, UnsupportedModel
from vlmfix.families import ModelInfo, describe_model
from vlmfix.families.placement import computing_device

__all__ = [
    "FOLDER_FILE",
    "PARTS",
    "Calibration",
    "cache_folder",
    "calibrate",
    "calibration_path",
    "fingerprint",
    "load_calibration",
    "store",
    "write",
]

PARTS = ("sinks", "heads", "gift")  # what `calibrate` can measure
_PICTURES = 8
_QUESTION = "Please describe this image in detail."
_MAXIMUM_CHANNELS = 4
_TEXT = "There is a photograph on the table. It shows what somebody saw on a walk that day."


def calibrate(
    model: Any,
    processor: Any = None,
    *,
    only: Sequence[str] | None = None,
    save: bool = True,
    beside: bool = False,
    allow_none: bool = False,
) -> Calibration:
    """Measure the constants of a model that methods need, and store them.

    - "sinks": the sink channels, one forward over one line of text. The first token of a text is
      a sink in every model that has sinks. A channel counts if |x_d| / rms(x) of that token
      exceeds 0.3125 sqrt(width) in at least half of the layers from a quarter to three quarters
      of the depth; at most four are kept.
    - "heads": the mean vision-aware head divergence of every head over eight bundled pictures, two
      forwards (divergence.py). It is for inspection: no method takes its heads from it.
    - "gift": GIFT's layers, one answer to each of the same pictures and two forwards (gaze.py).

    Parts that this call does not measure keep the values of an earlier calibration.

    Args:
        model: a supported VLM, not wrapped; in eval mode for "heads" and "gift".
        processor: its processor or tokenizer; without one, "sinks" uses arbitrary token ids.
        only: the parts to measure, of `PARTS`. None: all of them, or "sinks" if the processor
            takes no images.
        save: whether to write the result to the cache folder.
        beside: whether to write it into the model's own folder instead, next to the weights.
        allow_none: whether to store that there are no sink channels, instead of raising. Methods
            that work on sinks then run, warn, and change nothing.

    Returns:
        All measurements of this model, old and new.

    Raises:
        BadInput: `beside`, and the model was not loaded from a folder of the user's; an unknown
            part; a part that needs images, and no processor of images; a stored calibration that
            cannot be read, or a folder that cannot be written to.
        CalibrationNeeded: no channel passes; methods that need sinks do not fit this model.
        StateError: the model is wrapped, or in training mode.
        UnsupportedModel: sinks of a model with several residual streams; GIFT's layers cannot be
            measured on this model, see gaze.py.
    """
    if "_vlmfix_session" in model.__dict__:
        raise StateError("calibrate needs the plain model; call vlmfix.unwrap(model) first.")
    info = describe_model(model)
    parts = _parts(only, processor)
    if save or beside:
        calibration_path(model, beside=beside)  # what could fail at the end fails now
    known = load_calibration(model)
    measured: dict[str, Any] = {}
    if "sinks" in parts:
        measured |= _sinks(model, info, processor, allow_none)
    if "heads" in parts or "gift" in parts:
        measured |= _on_pictures(model, processor, parts)
    if save or beside:
        return store(model, beside=beside, **measured)
    return Calibration(fingerprint(model), info.model_type, **measured).over(known)


def _parts(only: Sequence[str] | None, processor: Any) -> tuple[str, ...]:
    """The parts to measure, checked."""
    sees = getattr(processor, "image_processor", None) is not None
    if only is None:
        return PARTS if sees else ("sinks",)
    if not only or not set(only) <= set(PARTS):
        raise BadInput(
            f"only={tuple(only)}: name what to calibrate, one or more of {', '.join(PARTS)}."
        )
    if not sees and set(only) != {"sinks"}:
        raise BadInput(
            f"calibrating {', '.join(only)} shows the model pictures and needs its processor; "
            "pass it, or calibrate only=('sinks',)."
        )
    return tuple(only)


def _sinks(model: Any, info: ModelInfo, processor: Any, allow_none: bool) -> dict[str, Any]:
    if info.streams > 1:
        raise UnsupportedModel(
            f"sinks are looked for in the residual stream, and the layers of this "
            f"{info.model_type} model hand on {info.streams} streams. Methods that work on sinks "
            "(var) do not fit it; only=('heads', 'gift') (--only heads,gift) measures the rest."
        )
    tau = DEFAULT_FRACTION * math.sqrt(info.hidden_size)
    ids = _text_ids(model, info, processor)
    inputs = layer_inputs(model, info, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    layers = tuple(range(info.num_layers // 4, 3 * info.num_layers // 4 + 1))
    layers = tuple(layer for layer in layers if layer in inputs)
    first = torch.stack([magnitude(inputs[layer][0, 0]) for layer in layers])  # (layers, D)
    median = first.median(0).values
    exceeding = (first > tau).sum(0)
    often = exceeding * 2 >= len(layers)
    channels = [int(c) for c in median.argsort(descending=True) if often[c]][:_MAXIMUM_CHANNELS]
    if not channels and not allow_none:
        raise CalibrationNeeded(
            f"no sink channels in this {info.model_type} model: a channel of the first token has "
            f"to exceed |x_d| / rms(x) = {tau:.1f} in at least half of the layers {layers[0]} to "
            f"{layers[-1]}; the best does so in {int(exceeding.max())} of {len(layers)}, and the "
            f"largest value is {float(first.max()):.1f}. Methods that work on sinks (var) do not "
            "fit this model; "
            "allow_none=True (--allow-none) stores that, only=('heads', 'gift') (--only "
            "heads,gift) measures the rest."
        )
    return {
        "sink_channels": tuple(channels),
        "tau": tau,
        "largest": round(float(first.max()), 3),
        "layers": layers,
        "magnitudes": {channel: round(float(median[channel]), 3) for channel in channels},
    }


def _on_pictures(model: Any, processor: Any, parts: Sequence[str]) -> dict[str, Any]:
    """Measure the parts that need pictures, those of the tuning split, which no evaluation uses."""
    # Only these parts generate, so chat, hooks and Pillow are imported here.
    from vlmfix.analysis.divergence import measure_divergence
    from vlmfix.analysis.gaze import measure_gaze
    from vlmfix.chat import chat_inputs
    from vlmfix.emoji.dataset import split_scenes
    from vlmfix.emoji.draw import paint

    chats = []
    for _, scene in split_scenes("tuning", _PICTURES):
        content = [{"type": "image", "image": paint(scene)}, {"type": "text", "text": _QUESTION}]
        chats.append([{"role": "user", "content": content}])
    prompt = chat_inputs(model, processor, chats)
    measured: dict[str, Any] = {}
    if "heads" in parts:
        divergence = measure_divergence(model, prompt).mean(1)
        measured["vision_heads"] = tuple(map(_rounded, divergence.tolist()))
    if "gift" in parts:
        gaze = measure_gaze(model, processor, prompt)
        measured |= {
            "gift_saliency_layer": gaze.saliency_layer,
            "gift_layers": gaze.moving_together,
            "gift_changes": _rounded(gaze.changes),
            "gift_correlations": _rounded(gaze.correlations),
        }
    return measured


def _rounded(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(round(float(value), 5) for value in values)


def _text_ids(model: Any, info: ModelInfo, processor: Any) -> torch.Tensor:
    """(1, L) ids of a line of text, starting with the tokenizer's first token if it has one."""
    config = model.config.get_text_config(decoder=True)
    first = getattr(config, "bos_token_id", None)
    tokenizer = getattr(processor, "tokenizer", processor)
    if tokenizer is None:
        reserved = {*info.image_token_ids, *info.video_token_ids, first}
        ids = [i for i in range(3, info.vocab_size) if i not in reserved][:24]
    else:
        ids = list(tokenizer(_TEXT, add_special_tokens=False)["input_ids"])
    ids = ids if first is None else [int(first), *ids]
    return torch.tensor([ids], device=computing_device(model.get_input_embeddings()))
