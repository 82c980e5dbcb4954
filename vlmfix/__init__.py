"""Inference-time fixes for vision-language models that describe things that are not there.

    model = vlmfix.wrap(model, "var")
    model.generate(**inputs)
    vlmfix.unwrap(model)

Importing this package is light: torch and transformers are imported with the first name used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from vlmfix._version import __version__
from vlmfix.errors import (
    BadInput,
    CalibrationNeeded,
    CompositionError,
    MissingDependency,
    StateError,
    UnknownMethod,
    UnknownTask,
    UnsupportedModel,
    VlmfixError,
)

if TYPE_CHECKING:
    from vlmfix.analysis.maps import AttentionMap, attention_map
    from vlmfix.analysis.selection import KeptTokens, visual_tokens
    from vlmfix.chat import Answer, generate
    from vlmfix.engine.call import CallReport
    from vlmfix.loading import load, load_image
    from vlmfix.registry import MethodInfo, list_methods
    from vlmfix.wrapper import last_call, suspended, unwrap, using, wrap, wrapped

__all__ = [
    "Answer",
    "AttentionMap",
    "BadInput",
    "CalibrationNeeded",
    "CallReport",
    "CompositionError",
    "KeptTokens",
    "MethodInfo",
    "MissingDependency",
    "StateError",
    "UnknownMethod",
    "UnknownTask",
    "UnsupportedModel",
    "VlmfixError",
    "__version__",
    "attention_map",
    "generate",
    "last_call",
    "list_methods",
    "load",
    "load_image",
    "suspended",
    "unwrap",
    "using",
    "visual_tokens",
    "wrap",
    "wrapped",
]

_HOME = {
    "vlmfix.engine.call": ("CallReport",),
    "vlmfix.chat": ("Answer", "generate"),
    "vlmfix.loading": ("load", "load_image"),
    "vlmfix.analysis.maps": ("AttentionMap", "attention_map"),
    "vlmfix.registry": ("MethodInfo", "list_methods"),
    "vlmfix.analysis.selection": ("KeptTokens", "visual_tokens"),
    "vlmfix.wrapper": ("last_call", "suspended", "unwrap", "using", "wrap", "wrapped"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'vlmfix' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
