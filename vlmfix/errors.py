"""The errors of vlmfix, as a tree. Every message says what happened, where, and the way out.

VlmfixError
├── BadInput             an argument, file or image that cannot be used (also a ValueError)
│   ├── UnknownMethod    no method, or no method option, of that name
│   └── UnknownTask      no evaluation task of that name
├── UnsupportedModel     a model that the hooks cannot reach, or a method cannot use
├── CompositionError     two methods, or a method and a generation mode, that exclude each other
├── CalibrationNeeded    a method needs constants that are unknown for this model
├── StateError           wrap of a wrapped model, unwrap of a plain one, ... (also a RuntimeError)
└── MissingDependency    an optional package is not installed (also an ImportError)
"""

from __future__ import annotations

__all__ = [
    "BadInput",
    "CalibrationNeeded",
    "CompositionError",
    "MissingDependency",
    "StateError",
    "UnknownMethod",
    "UnknownTask",
    "UnsupportedModel",
    "VlmfixError",
]


class VlmfixError(Exception):
    """Base of the errors that vlmfix raises on purpose; the command line exits with 2 on them."""


class BadInput(VlmfixError, ValueError):
    """An argument, a file or an image that cannot be used."""


class UnknownMethod(BadInput):
    """No method, or no option of a method, has that name."""


class UnknownTask(BadInput):
    """No evaluation task has that name."""


class UnsupportedModel(VlmfixError):
    """The hooks cannot reach the model, or this method cannot use it."""


class CompositionError(VlmfixError):
    """Two methods, or a method and a generation mode, that exclude each other."""


class CalibrationNeeded(VlmfixError):
    """The method needs constants that are not known for this model."""


class StateError(VlmfixError, RuntimeError):
    """The model is not in the state that the call needs."""


class MissingDependency(VlmfixError, ImportError):
    """An optional package is not installed."""
