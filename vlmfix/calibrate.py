"""Constants that a method needs and nobody has published for a model, measured on the model.

The result is a small JSON file in the user's cache folder (VLMFIX_CACHE, else the platform's),
keyed by a hash of the configuration and of a sample of the weights, so that a calibration can
never be applied to another model. A model folder may carry its own file beside the weights.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from vlmfix.errors import BadInput, CalibrationNeeded, StateError
from vlmfix.families import ModelInfo, describe_model
from vlmfix.massive import DEFAULT_FRACTION, layer_inputs, magnitude

__all__ = [
    "FOLDER_FILE",
    "Calibration",
    "cache_folder",
    "calibrate",
    "fingerprint",
    "load_calibration",
]

FOLDER_FILE = "vlmfix_calibration.json"  # in a model folder, beside its weights
_FORMAT = 1
_MAXIMUM_CHANNELS = 4
_TEXT = "There is a photograph on the table. It shows what somebody saw on a walk that day."


@dataclass(frozen=True)
class Calibration:
    """What was measured on one model.

    A part that was never measured is None; nothing found is an empty tuple. Layers and heads are
    0-based.

    Attributes:
        fingerprint: of the model, see `fingerprint`.
        sink_channels: channels that are massive at the first text token, strongest first; empty
            if none was found and that finding was kept.
        tau: the threshold on |x_d| / rms(x) that they passed.
        largest: the largest |x_d| / rms(x) of the first text token in those layers.
        layers: the layers looked at for sinks.
        magnitudes: {channel: its median |x_d| / rms(x) over those layers}.
        vision_heads: [layer][head], mean vision-aware head divergence (divergence.py).
        gift_saliency_layer: the layer whose attention to the image jumps most while the question
            is read (gaze.py).
        gift_layers: layers in which attention to image and question rise and fall together
            (gaze.py).
        gift_changes: [layer], what `gift_saliency_layer` is the largest of.
        gift_correlations: [layer], what `gift_layers` are the positive ones of.
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
        """This calibration, and of another one of the same model what this one did not measure."""
        if other is None:
            return self
        names = [item.name for item in fields(self) if getattr(self, item.name) is None]
        return replace(self, **{name: getattr(other, name) for name in names})


def cache_folder() -> Path:
    """Where calibrations are kept: VLMFIX_CACHE, or `vlmfix` in XDG_CACHE_HOME or ~/.cache."""
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
    """A configuration without what changes between loads of the same model."""
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
    save: bool = True,
    beside: bool = False,
    allow_none: bool = False,
) -> Calibration:
    """Find the sink channels of a model: one forward over one line of text.

    The first token of a text is a sink in every model that has sinks. A channel counts if
    |x_d| / rms(x) of that token exceeds 0.3125 sqrt(width) in at least half of the layers from a
    quarter to three quarters of the depth; at most four are kept.

    Args:
        model: a supported VLM, not wrapped.
        processor: its processor or tokenizer; without one, arbitrary token ids are used.
        save: write the result to the cache folder.
        beside: write it into the model's own folder instead, so that it travels with the weights.
        allow_none: keep the finding that there are no sink channels, instead of raising. Methods
            that work on sinks then run, say so with a warning, and change nothing.

    Raises:
        BadInput: `beside`, and the model was not loaded from a folder.
        CalibrationNeeded: no channel passes; methods that need sinks do not fit this model.
        StateError: the model is wrapped.
    """
    if "_vlmfix_session" in model.__dict__:
        raise StateError("calibrate needs the plain model; call vlmfix.unwrap(model) first.")
    info = describe_model(model)
    target = _target(model, beside) if save or beside else None
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
            "allow_none=True (--allow-none) keeps that finding."
        )
    result = Calibration(
        fingerprint=fingerprint(model),
        model_type=info.model_type,
        sink_channels=tuple(channels),
        tau=tau,
        largest=round(float(first.max()), 3),
        layers=layers,
        magnitudes={channel: round(float(median[channel]), 3) for channel in channels},
    )
    if target is None:
        return result
    write(result, target)
    return replace(result, path=str(target))


def _text_ids(model: Any, info: ModelInfo, processor: Any) -> torch.Tensor:
    """(1, L) ids of a line of text, starting with the model's first token if it has one."""
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


def _target(model: Any, beside: bool) -> Path:
    """Where the calibration of this model goes."""
    if not beside:
        return cache_folder() / "calibration" / f"{fingerprint(model)}.json"
    folder = _model_folder(model)
    if folder is None:
        raise BadInput(
            "this model was not loaded from a folder, so its calibration cannot go beside its "
            "weights. Store it in the cache folder (the default), or load the model from a folder."
        )
    return folder / FOLDER_FILE


def _model_folder(model: Any) -> Path | None:
    name = str(getattr(model.config, "_name_or_path", "") or "")
    return Path(name) if name and Path(name).is_dir() else None


def write(result: Calibration, path: Path) -> None:
    """Write what was measured as JSON: to a temporary file, then a rename: whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    measured = {k: v for k, v in asdict(result).items() if v is not None and k != "path"}
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=path.name, suffix=".tmp", delete=False
    ) as file:
        json.dump({"format": _FORMAT, **measured}, file, indent=2)
        file.write("\n")
    os.replace(file.name, path)


def load_calibration(model: Any) -> Calibration | None:
    """What is known of exactly this model.

    The user's cache folder comes first, then the model's own folder for what was not measured
    here; so a file that travels with the weights never hides a newer measurement.

    Raises:
        BadInput: a file is there but cannot be read.
    """
    mark = fingerprint(model)
    folder = _model_folder(model)
    candidates = [cache_folder() / "calibration" / f"{mark}.json"]
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
