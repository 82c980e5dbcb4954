"""Controls for the options of a method, read off its dataclass, and the way back to a method."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from vlmfix.base.method import Method
from vlmfix.registry import build, find, load_class

__all__ = ["Control", "controls_of", "make_method"]


@dataclass(frozen=True)
class Control:
    """The control of one option.

    Attributes:
        name: name of the option.
        kind: "flag", "choice", "whole" and "number" (numbers), "list" (separated by /), "text".
        default: default of the option.
        help: help text of the option.
        choices: the values of a choice.
        optional: whether an empty control means None.
    """

    name: str
    kind: Literal["flag", "choice", "whole", "number", "list", "text"]
    default: Any
    help: str
    choices: tuple[str, ...] = ()
    optional: bool = False


def controls_of(name: str) -> tuple[Control, ...]:
    """The controls of a method, in the order of its fields.

    An option of type Any takes a file of the server or a Python object, and a visitor may name
    neither: it has no control, so the method is made with its default.

    Raises:
        UnknownMethod: no method of that name.
    """
    cls = load_class(find(name))
    hints = typing.get_type_hints(cls)
    fields = [item for item in dataclasses.fields(cls) if hints[item.name] is not Any]
    return tuple(_control(item, hints[item.name]) for item in fields)


def _control(item: dataclasses.Field[Any], hint: Any) -> Control:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    kinds = [
        kind for kind in (typing.get_args(hint) if union else (hint,)) if kind is not type(None)
    ]
    common = (item.default, item.metadata.get("help", ""))
    optional = union and type(None) in typing.get_args(hint)
    (kind,) = kinds  # an option of two types has no control: give it one type
    if typing.get_origin(kind) is Literal:
        return Control(item.name, "choice", *common, typing.get_args(kind), optional)
    if typing.get_origin(kind) is tuple:
        return Control(item.name, "list", *common, (), optional)
    names: dict[Any, Any] = {bool: "flag", int: "whole", float: "number", str: "text"}
    return Control(item.name, names[kind], *common, (), optional)


def make_method(name: str, values: Mapping[str, Any]) -> Method:
    """Make a method from the values of its controls.

    Args:
        name: name of the method.
        values: the value of each control, by name. An empty control (None or "") means None where
            the option is optional, else the default; options without a value keep the default.

    Raises:
        BadInput: a value that the method cannot take.
    """
    options = {}
    for control in controls_of(name):
        if control.name in values:
            value = _read(name, control, values[control.name])
            if value != control.default:
                options[control.name] = value
    return load_class(find(name))(**options)


def _read(method: str, control: Control, value: Any) -> Any:
    if value is None or (isinstance(value, str) and not value.strip()):
        return None if control.optional else control.default
    if isinstance(value, str) and control.kind in ("list", "whole", "number"):
        # The registry reads text as on the command line, where commas separate options.
        text = value.replace(",", "/").replace(" ", "")
        return getattr(build(f"{method}:{control.name}={text}"), control.name)
    if control.kind == "number":
        return float(value)
    return int(value) if control.kind == "whole" else value
