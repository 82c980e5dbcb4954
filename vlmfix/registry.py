"""Which methods there are, and how a text such as "var:keep=0.4" becomes one.

The rows of vlmfix's own methods are data (`vlmfix/methods/table.py`), so listing them is instant
and imports no torch; a method's module is imported when the method is built. A package that adds
methods names their classes as entry points of the group "vlmfix.methods", and is imported to list
them.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import re
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeAlias

from vlmfix.errors import BadInput, UnknownMethod
from vlmfix.plugins import PlugIn, PlugIns, find_plug_ins

if TYPE_CHECKING:
    from vlmfix.base.method import Method

__all__ = ["MethodInfo", "MethodSpec", "build_stack", "describe", "list_methods", "parse_spec"]

MethodSpec: TypeAlias = "str | Method | Sequence[str | Method] | None"


@dataclass(frozen=True)
class MethodInfo:
    """One row of the method table."""

    name: str
    target: str
    title: str
    stage: str
    summary: str
    paper: str
    needs: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()


_CONTINUATION = re.compile(r"^\s*[A-Za-z_]\w*\s*=")
_STACK = re.compile(r"\+(?=\s*[A-Za-z])")


def _table() -> Any:
    """The module that holds the rows; methods import this file, so this one names them as text."""
    return importlib.import_module("vlmfix.methods.table")


def list_methods() -> list[MethodInfo]:
    """Every method, sorted by name. Imports no torch, unless another package adds methods.

    Warns of methods of other packages that cannot be used.
    """
    _plug_ins().warn()
    return sorted(_rows(), key=lambda row: row.name)


def _rows() -> Iterator[MethodInfo]:
    """vlmfix's own methods first: to find one of them imports no other package."""
    yield from _table().METHODS
    for name, plug_in in _plug_ins().found.items():
        yield _row(name, plug_in)


@cache
def _plug_ins() -> PlugIns:
    """Methods of other packages."""
    taken = {name for row in _table().METHODS for name in (row.name, *row.aliases)}

    def fault(kind: Any) -> str | None:
        from vlmfix.base.method import Method

        if not (isinstance(kind, type) and issubclass(kind, Method)):
            return f"{kind!r} is no class that derives from vlmfix.base.method.Method"
        missing = [name for name in ("name", "stage", "__doc__") if not getattr(kind, name, None)]
        if missing:
            return f"{kind.__name__} has no {', '.join(missing)}: declare it in the class"
        if clash := taken & set(getattr(kind, "aliases", ())):
            return f"vlmfix has a method called {', '.join(clash)}: rename that alias"
        return None

    return find_plug_ins("vlmfix.methods", taken, fault)


def _row(name: str, plug_in: PlugIn) -> MethodInfo:
    """What the class of a method in another package says of itself."""
    kind = plug_in.kind
    return MethodInfo(
        name=name,
        target=plug_in.target,
        title=f"{kind.__name__}, of the package {plug_in.package}",
        stage=kind.stage,
        summary=inspect.cleandoc(kind.__doc__).split("\n")[0],
        paper=getattr(kind, "paper", ""),
        needs=getattr(kind, "needs", ()),
        aliases=getattr(kind, "aliases", ()),
    )


def find(name: str) -> MethodInfo:
    """The row of a method by name or alias.

    Raises:
        UnknownMethod: with the nearest names, or with the reason why a method is not offered or
            cannot be used.
    """
    key = name.strip().lower()
    for row in _rows():
        if key == row.name or key in row.aliases:
            return row
    if reason := _plug_ins().broken.get(key):
        raise UnknownMethod(reason)
    if reason := _table().NOT_OFFERED.get(key.replace("-", "_")):
        raise UnknownMethod(f"{name!r} is not offered: {reason}.")
    names = [row.name for row in list_methods()]
    near = difflib.get_close_matches(key, names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise UnknownMethod(
        f"no method is called {name!r}.{hint} There are: {', '.join(names)}; "
        "`vlmfix methods` describes them."
    )


def load_class(row: MethodInfo) -> type[Method]:
    """Import the class of a method."""
    module, _, attribute = row.target.partition(":")
    loaded: type[Method] = attrgetter(attribute)(importlib.import_module(module))
    return loaded


def describe(name: str) -> dict[str, Any]:
    """A method's row, documentation, options and presets, as plain data."""
    row = find(name)
    cls = load_class(row)
    options = [
        {
            "name": item.name,
            "default": item.default,
            "type": str(item.type),
            "help": item.metadata.get("help", ""),
        }
        for item in dataclasses.fields(cls)
    ]
    presets = [
        {**dataclasses.asdict(one.structure), "values": one.values, "source": one.source}
        for one in cls.PRESETS
    ]
    return {
        **dataclasses.asdict(row),
        "doc": inspect.cleandoc(cls.__doc__ or ""),
        "options": options,
        "presets": presets,
    }


def parse_spec(text: str) -> list[list[str]]:
    """Split a command-line text into alternatives, each a stack of single-method specs.

    Commas separate alternatives, `+` stacks methods in one, options follow a colon and are
    separated by `;` (or by commas where no method name could stand):
    "var:keep=0.4;rho=0.6,hiprune+vhr" -> [["var:keep=0.4;rho=0.6"], ["hiprune", "vhr"]].

    Raises:
        BadInput: an empty alternative.
    """
    alternatives: list[str] = []
    for part in text.split(","):
        if _CONTINUATION.match(part) and alternatives and ":" in alternatives[-1]:
            alternatives[-1] += ";" + part.strip()
        else:
            alternatives.append(part.strip())
    stacks = [[single.strip() for single in _STACK.split(part)] for part in alternatives]
    if not text.strip() or any(
        not single or single.endswith("+") for stack in stacks for single in stack
    ):
        raise BadInput(
            f"cannot read the methods {text!r}: a name is missing. Write for example "
            '"var,pai" for two alternatives, "var:keep=0.4" for an option, "var+pai" for a stack.'
        )
    return stacks


def build(spec: str | Method) -> Method:
    """One method from "name" or "name:option=value;option=value", or the method itself.

    Raises:
        UnknownMethod: unknown name or option.
        BadInput: a value of the wrong type or out of range.
    """
    if not isinstance(spec, str):
        return spec
    name, _, tail = spec.partition(":")
    row = find(name)
    cls = load_class(row)
    hints = typing.get_type_hints(cls)
    known = [item.name for item in dataclasses.fields(cls)]
    options: dict[str, Any] = {}
    for part in filter(None, (piece.strip() for piece in re.split("[;,]", tail))):
        key, equals, value = part.partition("=")
        key = key.strip()
        if key not in known:
            raise UnknownMethod(
                f"method {row.name!r} has no option {key!r}. It has: {', '.join(known)}; "
                f"`vlmfix methods {row.name}` explains them."
            )
        if not equals:
            raise BadInput(f"option {key!r} of {row.name!r} has no value; write {key}=...")
        options[key] = _coerce(row.name, key, value.strip(), hints[key])
    return cls(**options)


def build_stack(methods: MethodSpec) -> tuple[Method, ...]:
    """The methods of one stack, in the order given: a name, a Method, a list of them, or None."""
    if methods is None:
        return ()
    if isinstance(methods, str):
        alternatives = parse_spec(methods)
        if len(alternatives) > 1:
            raise BadInput(
                f"{methods!r} names {len(alternatives)} alternatives, but a model carries one "
                'stack. Stack methods with "+" or pass a list.'
            )
        return tuple(build(single) for single in alternatives[0])
    if isinstance(methods, Sequence):
        return tuple(method for item in methods for method in build_stack(item))
    from vlmfix.base.method import Method

    if isinstance(methods, Method):
        return (methods,)
    raise BadInput(
        f"{methods!r} is not a method: give a name such as 'var', a method object, or a list."
    )


def _coerce(method: str, key: str, text: str, hint: Any) -> Any:
    """Turn an option's text into the type of its dataclass field."""
    choices = typing.get_args(hint) or (hint,)
    if type(None) in choices and text.lower() in ("none", "null"):
        return None
    literals = [c for c in choices if isinstance(c, str)]
    for choice in choices:
        literals += [c for c in typing.get_args(choice) if isinstance(c, str)]
    if literals:
        if text in literals:
            return text
        raise BadInput(
            f"{method}: option {key}={text!r} must be one of {', '.join(sorted(set(literals)))}."
        )
    try:
        if bool in choices:
            return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
        for choice in (hint, *choices):
            if typing.get_origin(choice) is tuple:
                kind = typing.get_args(choice)[0]
                return tuple(kind(piece) for piece in text.split("/")) if text != "()" else ()
        if int in choices and float not in choices:
            return int(text)
        return float(text) if float in choices else text
    except (KeyError, ValueError):
        raise BadInput(
            f"{method}: option {key}={text!r} is not of the type {hint}. "
            f"`vlmfix methods {method}` explains it."
        ) from None
