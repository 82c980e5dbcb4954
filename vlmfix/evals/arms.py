"""The arms of a comparison and their names: the plain model, then one per method."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from typing import Any

from vlmfix.errors import BadInput

__all__ = ["BASE", "arm_name", "file_name", "named_arms", "plain"]

BASE = "base"

#: File systems take 255 bytes; samples_, the task and .jsonl go around the name.
_LONGEST = 200


def named_arms(methods: Sequence[Any] | str) -> dict[str, Any | None]:
    """Arm name -> method, the base (None) first.

    Raises:
        BadInput: two arms would share a name, or the name of their files.
    """
    arms: dict[str, Any | None] = {BASE: None}
    files = {BASE: BASE}
    for method in [methods] if isinstance(methods, str) else methods:
        name = arm_name(method)
        if not name:
            raise BadInput("a method without a name: leave the list empty to run the base alone")
        if name in arms:
            raise BadInput(f"two arms are called {name!r}: name each once (base always runs)")
        file = file_name(name)
        if file in files:
            raise BadInput(
                f"the arms {files[file]!r} and {name!r} would share a file ({file}): evaluate them "
                "in runs of their own"
            )
        files[file], arms[name] = name, method
    return arms


def arm_name(method: Any) -> str:
    """What an arm is called: the text of a method, the parts of a stack joined by +.

    A method object is called by its name and the options that differ from the defaults.
    """
    if isinstance(method, str):
        return method
    if isinstance(method, (list, tuple)):
        return "+".join(arm_name(part) for part in method)
    return str(method.spec()) if hasattr(method, "spec") else type(method).__name__


def plain(method: Any) -> Any:
    """A method object and its options as JSON-able facts."""
    if is_dataclass(method) and not isinstance(method, type):
        options = json.loads(json.dumps(asdict(method), default=str))
        return {"method": getattr(method, "name", type(method).__name__), **options}
    return str(method)


def file_name(text: str) -> str:
    """The text with everything but letters, digits and . = + - made _.

    What is too long for a file system (a list of heads) ends in a hash of the whole instead.
    """
    name = re.sub(r"[^A-Za-z0-9.=+-]+", "_", text).strip("_.") or "_"
    if len(name) <= _LONGEST:
        return name
    return f"{name[: _LONGEST - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
