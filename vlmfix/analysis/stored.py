"""Calibrations on disk: what belongs to which model, and where it lies."""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from vlmfix.analysis.fingerprint import fingerprint, same_model
from vlmfix.emoji import model_path
from vlmfix.errors import BadInput, StateError
from vlmfix.images import one_line

__all__ = [
    "FOLDER_FILE",
    "Calibration",
    "cache_folder",
    "calibration_path",
    "load_calibration",
    "store",
    "write",
]

FOLDER_FILE = "vlmfix_calibration.json"  # in a model folder, next to its weights
_FORMAT = 1


@dataclass(frozen=True)
class Calibration:
    """The measurements on one model.

    A part that was never measured is None; a measurement that found nothing is an empty tuple.
    Layers and heads are 0-based.

    Attributes:
        fingerprint: fingerprint of the model, see fingerprint.py.
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


def store(model: Any, *, beside: bool = False, **measured: Any) -> Calibration:
    """Add measured fields of `Calibration` to those stored for a model, and return all of them.

    Args:
        model: the model.
        beside: whether to write into the model's own folder and remove its file in the cache
            folder, so that there is one file; else into the cache folder.
        measured: fields of `Calibration`.

    Raises:
        BadInput: see `calibration_path`; a stored file that cannot be read.
    """
    target = calibration_path(model, beside=beside)
    mark, kind = fingerprint(model), str(model.config.model_type)
    result = Calibration(mark, kind, **measured).over(load_calibration(model))
    write(result, target)
    if beside:
        _cached(mark).unlink(missing_ok=True)
    return replace(result, path=str(target))


def _cached(mark: str) -> Path:
    return cache_folder() / "calibration" / f"{mark}.json"


def calibration_path(model: Any, *, beside: bool = False) -> Path:
    """The file for the calibration of this model, once it is known that it can be written.

    Raises:
        BadInput: `beside`, and the model was not loaded from a folder, or from that of the bundled
            model, which belongs to the package; a folder that cannot be written to.
        StateError: the model has no weights.
    """
    if not beside:
        path = _cached(fingerprint(model))
        _try_writing(path, "set VLMFIX_CACHE to a folder of yours, or --no-save")
        return path
    folder = _model_folder(model)
    if folder is None:
        raise BadInput(
            "this model was not loaded from a folder, so its calibration cannot go next to its "
            "weights. Store it in the cache folder (the default), or load the model from a folder."
        )
    if folder.resolve() == model_path().resolve():
        raise BadInput(
            f"{folder} belongs to the package and has its own {FOLDER_FILE}, which other users of "
            "this installation share. Store the calibration in the cache folder (the default), or "
            "copy the folder and load the copy."
        )
    _try_writing(folder / FOLDER_FILE, "store it in the cache folder (the default)")
    return folder / FOLDER_FILE


def _try_writing(path: Path, way_out: str) -> None:
    """Find out whether a file can be written there, and leave nothing behind."""
    try:
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder")
        with tempfile.TemporaryFile(dir=next(filter(os.path.lexists, path.parents))):
            pass
    except OSError as error:
        raise BadInput(
            f"the calibration cannot be written to {path} ({error}): {way_out}."
        ) from error


def _model_folder(model: Any) -> Path | None:
    name = str(getattr(model.config, "_name_or_path", "") or "")
    return Path(name) if name and Path(name).is_dir() else None


def write(result: Calibration, path: Path) -> None:
    """Write a calibration as JSON: to a temporary file, then a rename, so never half of it.

    A new file gets the permissions of any other new file of this user; an old one keeps its own.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    measured = {k: v for k, v in asdict(result).items() if v is not None and k != "path"}
    scratch = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with scratch.open("x", encoding="utf-8") as file:
            json.dump({"format": _FORMAT, **measured}, file, indent=2)
            file.write("\n")
        if path.exists():
            shutil.copymode(path, scratch)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def load_calibration(model: Any) -> Calibration | None:
    """The stored calibration of this model; None if there is none, or if it has no weights.

    The user's cache folder comes first, and the model's own folder completes it, so that a file
    next to the weights never hides a newer measurement. What was measured on a quantised model
    also counts for the model as it was before, and the other way round.

    Warns:
        UserWarning: the file next to the weights belongs to another model; several calibrations
            fit a quantised model.

    Raises:
        BadInput: a file exists but cannot be read.
    """
    try:
        mark = fingerprint(model)
    except StateError:
        return None
    found: Calibration | None = None
    for result in (*_from_cache(mark), *_from_folder(mark, _model_folder(model))):
        found = found.over(result) if found else result
    return found


def _from_cache(mark: str) -> Iterator[Calibration]:
    own = _cached(mark)
    if own.is_file():
        yield _read(own)
    kind = mark.partition("-")[0]
    others = [path for path in sorted(own.parent.glob(f"{kind}-*.json")) if path != own]
    others = [path for path in others if same_model(path.stem, mark)]
    if len(others) > 1:
        warnings.warn(
            f"the calibrations {', '.join(path.name for path in others)} in {own.parent} are of "
            "models that a quantised one cannot be told from, so vlmfix uses none of them: "
            "calibrate the quantised model itself, or delete those of other models.",
            stacklevel=2,
        )
    elif others:
        yield _read(others[0])


def _from_folder(mark: str, folder: Path | None) -> Iterator[Calibration]:
    path = None if folder is None else folder / FOLDER_FILE
    if path is None or not path.is_file():
        return
    result = _read(path)
    if same_model(result.fingerprint, mark):
        yield result
    else:
        warnings.warn(
            f"{path} is not used: it was measured on another model ({result.fingerprint}, this one "
            f"is {mark}), such as these weights before training, or by an earlier version of "
            "vlmfix. Run `vlmfix calibrate` again, or delete the file.",
            stacklevel=2,
        )


def _read(path: Path) -> Calibration:
    try:
        content = json.loads(path.read_text("utf-8"))
        if content.pop("format") != _FORMAT:
            raise ValueError("unknown format")
        content = {key: _tuples(value) for key, value in content.items()}
        if isinstance(magnitudes := content.get("magnitudes"), dict):
            content["magnitudes"] = {int(k): v for k, v in magnitudes.items()}
        result = Calibration(**content, path=str(path))
        _check(result)
        return result
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(
            f"the calibration file {path} cannot be read ({one_line(error)}). Delete it and run "
            "`vlmfix calibrate` again."
        ) from error


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _many(check: Callable[[Any], bool], length: int | None = None) -> Callable[[Any], bool]:
    def checked(value: Any) -> bool:
        if not isinstance(value, tuple) or (length is not None and len(value) != length):
            return False
        return all(map(check, value))

    return checked


#: What a field of `Calibration` holds; whether the model has such layers, the methods check.
_KINDS: dict[str, Callable[[Any], bool]] = {
    "fingerprint": lambda value: isinstance(value, str),
    "model_type": lambda value: isinstance(value, str),
    "sink_channels": _many(_index),
    "tau": lambda value: _number(value) and value > 0,
    "largest": _number,
    "layers": _many(_index),
    "magnitudes": lambda value: isinstance(value, dict) and all(map(_number, value.values())),
    "vision_heads": _many(_many(_number)),
    "gift_saliency_layer": _index,
    "gift_layers": _many(_index),
    "gift_changes": _many(_number),
    "gift_correlations": _many(_number),
    "hallucination_heads": _many(_many(_index, 2)),
}


def _check(result: Calibration) -> None:
    """Raises ValueError if a field does not hold what it should."""
    for name, fits in _KINDS.items():
        value = getattr(result, name)
        if (value is not None or name in ("fingerprint", "model_type")) and not fits(value):
            raise ValueError(f"{name} is {str(value)[:40]!r}")
