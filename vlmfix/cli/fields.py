"""Parameters of commands made from the fields of `evals.options.Options`."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable
from dataclasses import Field, fields
from typing import Annotated, Any

from typer import Option

from vlmfix.evals.options import Options, flags, from_text

__all__ = ["with_options"]


_HINTS = typing.get_type_hints(Options)


def with_options(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command these fields of `Options` in the place of its parameter `options`.

    Args:
        names: of the fields; none: all of them.
    """
    chosen = [item for item in fields(Options) if not names or item.name in names]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        parameters: list[inspect.Parameter] = []
        for own in inspect.signature(command, eval_str=True).parameters.values():
            added = map(_parameter, chosen) if own.name == "options" else [own]
            parameters += (one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in added)

        @functools.wraps(command)
        def run(**given: Any) -> None:
            values = {item.name: from_text(item, given.pop(item.name)) for item in chosen}
            command(**given, options=Options(**values))

        # Typer reads both.
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {one.name: one.annotation for one in parameters}
        return run

    return decorate


def _parameter(item: Field[Any]) -> inspect.Parameter:
    facts = item.metadata
    kind = facts.get("kind", _HINTS[item.name])
    shown = Option(
        *flags(item),
        help=facts["help"],
        # What is read from a text is checked by who reads it.
        min=None if "kind" in facts else facts.get("least"),
        metavar=facts.get("metavar"),
    )
    return inspect.Parameter(
        item.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=item.default,
        annotation=Annotated[kind, shown],
    )
