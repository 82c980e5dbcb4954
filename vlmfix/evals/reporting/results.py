"""results.json as it comes back from a disk or another machine: checked before it is shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vlmfix.errors import BadInput
from vlmfix.evals.inputs.rows import read_object, short
from vlmfix.evals.tasks import get_task

__all__ = ["read_results"]


class _Fault(Exception):
    """What a value is not."""


Check = Callable[[Any, str], None]
"""Raises `_Fault` unless the value at this place is what it should be."""


def read_results(path: Path) -> dict[str, Any] | None:
    """What the results.json of a run or of scored answers holds; None: it is of another command.

    Raises:
        BadInput: it cannot be read, or a score card cannot be made of it; the message names the
            place in it.
    """
    results = read_object(path, "report")
    if not {"tasks", "config"} <= set(results):
        return None
    try:
        _RESULTS(results, "")
        for task, entry in results["tasks"].items():
            get_task(task)
            if entry.get("gen_kwargs", {}).get("do_sample") and "seeds" not in results["config"]:
                raise _Fault("config has no seeds, and the answers are sampled")
    except _Fault as fault:
        raise BadInput(
            f"report: {path}: {fault}: score the answers again, or fetch the file again"
        ) from None
    return results


def _is(*kinds: type) -> Check:
    names = " or ".join("nothing" if kind is type(None) else kind.__name__ for kind in kinds)

    def check(value: Any, place: str) -> None:
        if type(value) not in kinds:
            raise _Fault(f"{place} is {short(value)}, not {names}")

    return check


def _object(fields: Mapping[str, Check], needed: tuple[str, ...] = ()) -> Check:
    """An object in which what is named is there or, if it is not needed, at least right."""

    def check(value: Any, place: str) -> None:
        _is(dict)(value, place or "the file")
        for name in needed:
            if name not in value:
                raise _Fault(f"{place or 'the file'} has no {name}")
        for name, inner in fields.items():
            if name in value:
                inner(value[name], f"{place}.{name}".lstrip("."))

    return check


def _each(inner: Check, least: int = 0) -> Check:
    """An object with any names, or at least so many, and one kind of value."""

    def check(value: Any, place: str) -> None:
        _is(dict)(value, place)
        if len(value) < least:
            raise _Fault(f"{place} is empty")
        for name, one in value.items():
            inner(one, f"{place}.{name}")

    return check


def _list(inner: Check, length: int | None = None) -> Check:
    def check(value: Any, place: str) -> None:
        _is(list)(value, place)
        if length is not None and len(value) != length:
            raise _Fault(f"{place} is {short(value)}, not {length} values")
        for number, one in enumerate(value):
            inner(one, f"{place}[{number}]")

    return check


def _or_null(inner: Check) -> Check:
    return lambda value, place: None if value is None else inner(value, place)


_TEXT, _NUMBER = _is(str), _is(int, float)
_SCORE = _object({"value": _NUMBER, "ci": _or_null(_list(_NUMBER, 2))}, ("value", "ci"))
_SCORES = _each(_each(_SCORE))
_TEST = _object({"p": _NUMBER, "better": _NUMBER, "worse": _NUMBER}, ("better", "worse"))


def _difference(value: Any, place: str) -> None:
    """Scores by metric, and McNemar's test, by one or by several seeds."""
    _is(dict)(value, place)
    for name, one in value.items():
        inner = _mcnemar if name == "mcnemar" else _SCORE
        inner(one, f"{place}.{name}")


def _mcnemar(value: Any, place: str) -> None:
    _object({"p": _NUMBER, "by_seed": _list(_TEST)}, ("p",))(value, place)
    if "by_seed" not in value:
        _TEST(value, place)


_SPENT = ("new_tokens", "passes_per_answer", "answers", "tokens_per_second")
_ARM = _object(
    {
        "scores": _SCORES,
        "counts": _each(_each(_NUMBER)),
        "delta": _each(_difference),
        "auc": _each(_SCORE),
        "auc_delta": _each(_SCORE),
        "prior_matched": _each(_object({"accuracy": _object({"delta": _SCORE}, ("delta",))})),
        "length_caps": _each(_SCORES),
        "warnings": _list(_TEXT),
        "cost": _object(dict.fromkeys((*_SPENT, "peak_gpu_mib"), _NUMBER), _SPENT),
    },
    ("scores",),
)


def _arm(value: Any, place: str) -> None:
    """One arm, whose parts speak of the same places and metrics."""
    _ARM(value, place)
    caps = value.get("length_caps", {})
    if odd := [cap for cap in caps if not cap.isdecimal()]:
        raise _Fault(f"{place}.length_caps has {odd[0]!r}, which is no number of words")
    for where, metrics in value["scores"].items():
        found = {f"scores.{where}": metrics}
        if "chair_i" in metrics:
            found |= {f"length_caps.{cap}.{where}": one.get(where, {}) for cap, one in caps.items()}
        for name, scores in found.items():
            if "chair_i" in metrics and not {"chair_i", "recall"} <= set(scores):
                raise _Fault(f"{place}.{name} has not both chair_i and recall")
        difference = value.get("delta", {}).get(where, metrics)
        if missing := set(metrics) - set(difference):
            raise _Fault(f"{place}.delta.{where} has no {min(missing)}")
        if "mcnemar" in difference and "n" not in value.get("counts", {}).get(where, {}):
            raise _Fault(f"{place}.counts.{where} has no n")


def _generate(value: Any, place: str) -> None:
    """Arguments of generate(); sampling names all of its settings."""
    shared = {"max_new_tokens": _NUMBER, "do_sample": _is(bool)}
    _object(shared, tuple(shared))(value, place)
    if value["do_sample"]:
        sampling = dict.fromkeys(("temperature", "top_p", "top_k"), _NUMBER)
        _object(sampling, tuple(sampling))(value, place)


_TASK = _object(
    {
        "arms": _each(_arm, least=1),
        "partial": _is(bool),
        "n_images": _is(int),
        "gen_kwargs": _generate,
    },
    ("arms", "partial", "n_images"),
)
_RESULTS = _object({"config": _object({"seeds": _is(int)}), "tasks": _each(_TASK)})
