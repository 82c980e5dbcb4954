"""The little of lmms-eval 0.7.3 that our adapters touch, as its source documents it."""

from __future__ import annotations

import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch


@dataclass
class TokenCounts:
    input_tokens: int | None = None
    output_tokens: int | None = None


@dataclass
class GenerationResult:
    text: str
    token_counts: TokenCounts | None = None


@dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None


class Hook:
    def __init__(self) -> None:
        self.seen: list[tuple[str, Any, str]] = []

    def add_partial(self, attr: str, req: Any, res: str) -> None:
        self.seen.append((attr, req, res))


class Model:
    is_simple = True

    def __init__(self) -> None:
        self._rank, self._world_size = 0, 1
        self.cache_hook = Hook()
        self.task_dict: dict[str, Any] = {}

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._world_size

    def clean(self) -> None:
        for name in [n for n, v in vars(self).items() if isinstance(v, torch.nn.Module)]:
            delattr(self, name)


class Task:
    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.download(None)


@dataclass
class Request:
    args: tuple[Any, ...]


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the fake in the place of the package, and our adapters on top of it."""
    contents: dict[str, dict[str, Any]] = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.instance": {
            "GenerationResult": GenerationResult,
            "TokenCounts": TokenCounts,
        },
        "lmms_eval.api.model": {"lmms": Model},
        "lmms_eval.api.task": {"ConfigurableMessagesTask": Task},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
    }
    for name, content in contents.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("lmms_model", "lmms_tasks", "lmms_plugin.models.vlmfix"):
        monkeypatch.delitem(sys.modules, f"vlmfix.integrations.{name}", raising=False)
