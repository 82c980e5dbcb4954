"""Where a model's weights are. accelerate may keep them elsewhere than they compute: then the
parameters of a module are empty (device "meta") and a hook of accelerate brings them in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

__all__ = ["computing_device", "weights"]


def computing_device(module: torch.nn.Module) -> torch.device:
    """Where a module computes: with the inputs of its first parameter.

    Returns:
        The device; "meta" if the module has no weights at all.
    """
    for part in module.modules():
        for hook in _hooks(part):
            if hook.offload and hook.execution_device is not None:
                return torch.device(hook.execution_device)
        for parameter in part.parameters(recurse=False):
            return parameter.device
    return torch.device("meta")


def weights(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor | None]]:
    """The parameters of a model by name, those that accelerate keeps elsewhere included.

    Yields:
        Name and values, one at a time. None: the parameter has no values. Names tied to another
        parameter are left out.
    """
    stored = {path: kept for path, part in model.named_modules() for kept in _stored(part)}
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in tied:
            continue
        if parameter.device.type == "meta":
            yield name, _elsewhere(name, stored)
        else:
            yield name, parameter.detach()


def _elsewhere(name: str, stored: Mapping[str, Mapping[str, torch.Tensor]]) -> torch.Tensor | None:
    parts = name.split(".")
    for cut in reversed(range(len(parts))):
        kept = stored.get(".".join(parts[:cut]))
        if kept is not None:
            try:
                return kept[".".join(parts[cut:])]
            except KeyError:  # a lazy mapping: asking whether it has the name reads it, too
                continue
    return None


def _stored(module: torch.nn.Module) -> Iterator[Mapping[str, torch.Tensor]]:
    for hook in _hooks(module):
        if hook.weights_map is not None:
            yield hook.weights_map


def _hooks(module: torch.nn.Module) -> list[Any]:
    """accelerate's hooks on a module that place its weights."""
    hook = getattr(module, "_hf_hook", None)
    return [one for one in getattr(hook, "hooks", [hook]) if hasattr(one, "weights_map")]
