"""The arms of a comparison and their names: the plain model, then one per method."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from typing import Any

from vlmfix.errors import BadInput

__all__ = ["BASE", "arm_name", "file_name", "named_arms", "plain"]

BASE = "base"


def named_arms(methods: Sequence[Any] | str) -> dict[str, Any | None]:
    """Arm name -> method, the base (None) first.

    Raises:
        BadInput: two arms would share a name, or the name of their files.
    """
    arms: dict[str, Any | None] = {BASE: None}
    files = {BASE}
    for method in [methods] if isinstance(methods, str) else methods:
        name = arm_name(method)
        if not name:
            raise BadInput("a method without a name: leave the list empty to run the base alone")
        if file_name(name) in files:
            raise BadInput(f"two arms are called {name!r}: name each once (base always runs)")
        files.add(file_name(name))
        arms[name] = method
    return arms


def arm_name(method: Any) -> str:
    """What an arm is called: the text of a method, the parts of a stack joined by +."""
    if isinstance(method, str):
        return method
    if isinstance(method, (list, tuple)):
        return "+".join(arm_name(part) for part in method)
    return str(getattr(method, "name", None) or type(method).__name__)


def plain(method: Any) -> Any:
    """A method object and its options as JSON-able facts."""
    if is_dataclass(method) and not isinstance(method, type):
        options = json.loads(json.dumps(asdict(method), default=str))
        return {"method": arm_name(method), **options}
    return str(method)


def file_name(text: str) -> str:
    """The text with everything but letters, digits and . = + - made _."""
    return re.sub(r"[^A-Za-z0-9.=+-]+", "_", text).strip("_.") or "_"
