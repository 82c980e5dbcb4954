"""Constants that a method needs and that are not published for a model, measured on the model.

The result is a small JSON file in the user's cache folder (VLMFIX_CACHE, else the platform's),
keyed by a hash of the configuration and of a sample of the weights, so that a calibration can
never be applied to another model. A model folder may hold its own file next to the weights.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from vlmfix.analysis.massive import DEFAULT_FRACTION, layer_inputs, magnitude
from vlmfix.errors import BadInput, CalibrationNeeded, StateError
from vlmfix.families import ModelInfo, describe_model

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
]

FOLDER_FILE = "vlmfix_calibration.json"  # in a model folder, next to its weights
PARTS = ("sinks", "heads", "gift")  # what `calibrate` can measure
_FORMAT = 1
_PICTURES = 8
_QUESTION = "Please describe this image in detail."
_MAXIMUM_CHANNELS = 4
_TEXT = "There is a photograph on the table. It shows what somebody saw on a walk that day."


@dataclass(frozen=True)
class Calibration:
    """The measurements on one model.

    A part that was never measured is None; a measurement that found nothing is an empty tuple.
    Layers and heads are 0-based.

    Attributes:
        fingerprint: fingerprint of the model, see `fingerprint`.
        sink_channels: channels that are massive at the first text token, strongest first; empty
            if none was found and the user allowed that.
        tau: the threshold on |x_d| / rms(x) that they passed.
        largest: the largest |x_d| / rms(x) of the first text token in those layers.
        layers: the layers that were measured for sinks.
        magnitudes: {channel: its median |x_d| / rms(x) over those layers}.
        vision_heads: [layer][head], mean vision-aware head divergence (divergence.py).
        gift_saliency_layer: the layer whose attention to the image jumps most while the question
            is read (gaze.py).
        gift_layers: layers in which attention to image and question rise and fall together
            (gaze.py).
        gift_changes: [layer], the changes of which `gift_saliency_layer` has the largest.
        gift_correlations: [layer], the correlations of which `gift_layers` have the positive ones.
        hallucination_heads: (layer, head) pairs, strongest first (`vlmfix attribute`).
        path: the file that it was read from or written to.
    """

    fingerprint: str
    model_type: str
    sink_channels: tuple[int, ...] | None = None
    tau: float | None = None
    largest: float | None = None
    layers: tuple[int, ...] | None = None
    magnitudes: dict[int, float] | None = None
    vision_heads: tuple[tuple[float, ...], ...] | None = None
    gift_saliency_layer: int | None = None
    gift_layers: tuple[int, ...] | None = None
    gift_changes: tuple[float, ...] | None = None
    gift_correlations: tuple[float, ...] | None = None
    hallucination_heads: tuple[tuple[int, int], ...] | None = None
    path: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def over(self, other: Calibration | None) -> Calibration:
        """This calibration, completed by another one of the same model."""
        if other is None:
            return self
        names = [item.name for item in fields(self) if getattr(self, item.name) is None]
        return replace(self, **{name: getattr(other, name) for name in names})


def cache_folder() -> Path:
    """The folder of calibrations: VLMFIX_CACHE, or `vlmfix` in XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("VLMFIX_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlmfix"


def fingerprint(model: Any) -> str:
    """Hash of the configuration and of up to 128 numbers spread over every parameter, as hex."""
    config = model.config.to_dict()
    digest = hashlib.sha256(json.dumps(_stable(config), sort_keys=True, default=str).encode())
    for name, parameter in sorted(model.named_parameters()):
        numbers = parameter.detach().flatten()
        sample = numbers[:: len(numbers) // 64 or 1][:128].float().cpu()
        digest.update(name.encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:32]


def _stable(value: Any) -> Any:
    """A configuration without the entries that change between loads of the same model."""
    if isinstance(value, dict):
        drop = ("dtype", "torch_dtype", "transformers_version", "use_cache", "architectures")
        return {
            str(key): _stable(item)
            for key, item in value.items()
            if key not in drop and not str(key).startswith("_")
        }
    return [_stable(item) for item in value] if isinstance(value, list | tuple) else value


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
        BadInput: `beside`, and the model was not loaded from a folder; an unknown part; a part that
            needs images, and no processor of images; a stored calibration that cannot be read.
        CalibrationNeeded: no channel passes; methods that need sinks do not fit this model.
        StateError: the model is wrapped, or in training mode.
        UnsupportedModel: GIFT's layers cannot be measured on this model, see gaze.py.
    """
    if "_vlmfix_session" in model.__dict__:
        raise StateError("calibrate needs the plain model; call vlmfix.unwrap(model) first.")
    info = describe_model(model)
    parts = _parts(only, processor)
    if beside:
        calibration_path(
            model, beside=True
        )  # refuses a model without a folder before anything is measured
    known = load_calibration(model)
    measured: dict[str, Any] = {}
    if "sinks" in parts:
        measured |= _sinks(model, info, processor, allow_none)
    if "heads" in parts or "gift" in parts:
        measured |= _on_pictures(model, processor, parts)
    if save or beside:
        return store(model, beside=beside, **measured)
    return Calibration(fingerprint(model), info.model_type, **measured).over(known)


def store(model: Any, *, beside: bool = False, **measured: Any) -> Calibration:
    """Add measured fields of `Calibration` to those stored for a model, and return all of them.

    Args:
        model: the model.
        beside: whether to write into the model's own folder and remove its file in the cache
            folder, so that there is one file; else into the cache folder.
        measured: fields of `Calibration`.

    Raises:
        BadInput: `beside`, and the model was not loaded from a folder; a stored file that cannot be
            read.
    """
    target = calibration_path(model, beside=beside)
    mark, kind = fingerprint(model), str(model.config.model_type)
    result = Calibration(mark, kind, **measured).over(load_calibration(model))
    write(result, target)
    if beside:
        _cached(mark).unlink(missing_ok=True)
    return replace(result, path=str(target))


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
    tau = DEFAULT_FRACTION * math.sqrt(info.hidden_size)
    ids = _text_ids(model, info, processor)
    inputs = layer_inputs(model, info, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    layers = tuple(range(info.num_layers // 4, 3 * info.num_layers // 4 + 1))
    layers = tuple(layer for layer in layers if layer in inputs)
    first = torch.stack([magnitude(inputs[layer][0, 0]) for layer in layers])  # (layers, D)
    median = first.median(0).values
    often = (first > tau).sum(0) * 2 >= len(layers)
    channels = [int(c) for c in median.argsort(descending=True) if often[c]][:_MAXIMUM_CHANNELS]
    if not channels and not allow_none:
        raise CalibrationNeeded(
            f"no sink channels in this {info.model_type} model: in layers {layers[0]} to "
            f"{layers[-1]} the first token reaches |x_d| / rms(x) = {float(first.max()):.1f}, the "
            f"threshold is {tau:.1f}. Methods that work on sinks (var) do not fit this model; "
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
    return torch.tensor([ids], device=model.device)


def _cached(mark: str) -> Path:
    return cache_folder() / "calibration" / f"{mark}.json"


def calibration_path(model: Any, *, beside: bool = False) -> Path:
    """The file for the calibration of this model; see `store`.

    Raises:
        BadInput: `beside`, and the model was not loaded from a folder.
    """
    if not beside:
        return _cached(fingerprint(model))
    folder = _model_folder(model)
    if folder is None:
        raise BadInput(
            "this model was not loaded from a folder, so its calibration cannot go next to its "
            "weights. Store it in the cache folder (the default), or load the model from a folder."
        )
    return folder / FOLDER_FILE


def _model_folder(model: Any) -> Path | None:
    name = str(getattr(model.config, "_name_or_path", "") or "")
    return Path(name) if name and Path(name).is_dir() else None


def write(result: Calibration, path: Path) -> None:
    """Write a calibration as JSON: to a temporary file, then a rename, so never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    measured = {k: v for k, v in asdict(result).items() if v is not None and k != "path"}
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=path.name, suffix=".tmp", delete=False
    ) as file:
        json.dump({"format": _FORMAT, **measured}, file, indent=2)
        file.write("\n")
    os.replace(file.name, path)


def load_calibration(model: Any) -> Calibration | None:
    """The stored calibration of exactly this model; None if there is none.

    The user's cache folder comes first, and the model's own folder completes it, so that a file
    next to the weights never hides a newer measurement.

    Raises:
        BadInput: a file exists but cannot be read.
    """
    mark = fingerprint(model)
    folder = _model_folder(model)
    candidates = [_cached(mark)]
    if folder is not None:
        candidates.append(folder / FOLDER_FILE)
    found: Calibration | None = None
    for path in filter(Path.is_file, candidates):
        result = _read(path)
        if result.fingerprint == mark:
            found = found.over(result) if found else result
    return found


def _read(path: Path) -> Calibration:
    try:
        content = json.loads(path.read_text())
        if content.pop("format") != _FORMAT:
            raise ValueError("unknown format")
        content = {key: _tuples(value) for key, value in content.items()}
        if (magnitudes := content.get("magnitudes")) is not None:
            content["magnitudes"] = {int(k): v for k, v in magnitudes.items()}
        return Calibration(**content, path=str(path))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(
            f"the calibration file {path} cannot be read ({error}). Delete it and run "
            "`vlmfix calibrate` again."
        ) from error


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
