"""Which model a calibration belongs to, whatever dtype, device or quantisation it is loaded in.

A fingerprint has two halves, "KIND-WEIGHTS". KIND hashes the configuration and the input embedding,
which quantisers leave alone; WEIGHTS hashes every parameter, and is "quantised" where some of them
cannot be compared. Of numbers only the signs count: no rounding to another dtype changes them.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from vlmfix.errors import StateError
from vlmfix.families.placement import weights

__all__ = ["fingerprint", "same_model"]

_QUANTISED = "quantised"
_SAMPLE = 1024  # numbers of a parameter that count, at least (if it has them), spread over it
#: What differs between loads of the same model.
_LOAD = (
    "architectures",
    "dtype",
    "quantization_config",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)


def fingerprint(model: Any) -> str:
    """Two hashes in hex, of 16 digits each: "KIND-WEIGHTS", or "KIND-quantised".

    They count the configuration and the signs of 1,024 to 2,048 numbers spread over every
    parameter. dtype, device and offloading change neither; quantisation only the second one.

    Raises:
        StateError: the model has no weights (it is on the meta device).
    """
    config = json.dumps(_stable(model.config.to_dict()), sort_keys=True, default=str)
    embedding = model.get_input_embeddings()
    kind = hashlib.sha256(config.encode())
    every = hashlib.sha256()
    comparable = not _quantised(model)
    inside = {id(parameter) for parameter in embedding.parameters()}
    embedded = {
        name for name, one in model.named_parameters(remove_duplicate=False) if id(one) in inside
    }
    for name, values in sorted(weights(model), key=lambda pair: pair[0]):
        if values is None:
            raise StateError(
                f"the model has no weights ({name} is on the meta device), so nothing tells which "
                "model it is: load it with its weights."
            )
        plain = _plain(values)
        comparable &= plain
        signs = _signs(values) if plain else b""
        every.update(name.encode() + signs)
        if name in embedded:
            kind.update(signs)
    second = every.hexdigest()[:16] if comparable else _QUANTISED
    return f"{kind.hexdigest()[:16]}-{second}"


def same_model(one: str, other: str) -> bool:
    """Whether two fingerprints are of one model, as far as they can be compared."""
    (kind, _, values), (other_kind, _, other_values) = one.partition("-"), other.partition("-")
    return kind == other_kind and (values == other_values or _QUANTISED in (values, other_values))


def _signs(values: torch.Tensor) -> bytes:
    numbers = values.flatten()
    sample = numbers[:: len(numbers) // _SAMPLE or 1][: 2 * _SAMPLE]
    return torch.signbit(sample.float()).cpu().numpy().tobytes()


def _plain(values: torch.Tensor) -> bool:
    """Whether these are the numbers of the parameter, and not a quantiser's code for them."""
    return type(values) in (torch.Tensor, torch.nn.Parameter) and values.is_floating_point()


def _quantised(model: torch.nn.Module) -> bool:
    """Whether a quantiser said so, or put modules without parameters in the place of layers."""
    packed = any(type(part).__module__.startswith("torch.ao.nn.") for part in model.modules())
    return packed or getattr(model.config, "quantization_config", None) is not None


def _stable(value: Any) -> Any:
    """A configuration without the entries that change between loads of the same model."""
    if isinstance(value, dict):
        return {
            str(key): _stable(item)
            for key, item in value.items()
            if key not in _LOAD and not str(key).startswith("_")
        }
    return [_stable(item) for item in value] if isinstance(value, list | tuple) else value
