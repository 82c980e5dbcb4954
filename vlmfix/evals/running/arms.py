"""The arms of a comparison and their names: the plain model, then one per method.

Where greedy decoding runs next to sampling, every arm has a greedy twin.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any

from vlmfix.errors import BadInput

__all__ = [
    "BASE",
    "NOOP",
    "Arm",
    "arm_name",
    "decoded_arms",
    "file_name",
    "greedy_twin",
    "named_arms",
    "plain",
]

BASE = "base"
NOOP = "noop"

#: File systems take 255 bytes; samples_, the task and .jsonl go around the name.
_LONGEST = 200


@dataclass(frozen=True)
class Arm:
    """One way to answer.

    Args:
        method: as the caller of `evaluate` named it; None: the plain model.
        temperature: of sampling; None: greedy.
        draws: numbers of the sampling seeds; one None: greedy.
    """

    method: Any | None
    temperature: float | None
    draws: Sequence[int | None]

    def gen_kwargs(self, max_new_tokens: int) -> dict[str, Any]:
        """Arguments of generate().

        Sampling is spelled out: transformers' own top_k is 50, and checkpoints bring settings, too.
        """
        sampled = self.temperature is not None
        shared = {"max_new_tokens": max_new_tokens, "do_sample": sampled, "num_beams": 1}
        if self.temperature is None:
            return shared
        return {**shared, "temperature": float(self.temperature), "top_p": 1.0, "top_k": 0}


def decoded_arms(
    methods: Mapping[str, Any | None], temperature: float | None, seeds: int, greedy_too: bool
) -> dict[str, Arm]:
    """Arm name -> how it answers, the base first.

    Args:
        methods: arm name -> method, from `named_arms`.
        temperature: of sampling; None: greedy.
        seeds: how many answers are sampled to each item.
        greedy_too: next to the sampled arms, the same greedy; `greedy_twin` has their names.

    Raises:
        BadInput: a temperature that is none, or settings of sampling without a temperature.
    """
    if temperature is None:
        for name, value in (("seeds", seeds if seeds > 1 else None), ("greedy_too", greedy_too)):
            if value:
                raise BadInput(
                    f"{name}={value} without a temperature: greedy answers are the same under "
                    "every seed. Sample with temperature=1.0 (--temperature 1.0), or leave "
                    f"{name} out"
                )
    elif not 0 < temperature < math.inf:
        raise BadInput(
            f"temperature={temperature}: must be positive; leave it out for greedy decoding"
        )
    greedy: Sequence[int | None] = (None,)
    drawn = greedy if temperature is None else range(seeds)
    arms = {name: Arm(method, temperature, drawn) for name, method in methods.items()}
    if greedy_too:
        arms |= {greedy_twin(name): Arm(method, None, greedy) for name, method in methods.items()}
    return arms


def greedy_twin(arm: str) -> str:
    """Name of the arm that decodes greedily next to a sampled one."""
    return f"{arm} greedy"


def named_arms(methods: Sequence[Any] | str, noop: bool = False) -> dict[str, Any | None]:
    """Arm name -> method, the base (None) first.

    Args:
        methods: one arm each.
        noop: add the control that is hooked and edits nothing, after the base.

    Raises:
        BadInput: two arms would share a name, or the name of their files.
    """
    arms: dict[str, Any | None] = {BASE: None}
    files = {BASE: BASE}
    if noop:
        from vlmfix.evals.running.noop import NoOp

        arms[NOOP], files[NOOP] = NoOp(), NOOP
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
