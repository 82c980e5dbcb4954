"""The methods that run together, and the stages that run them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from vlmfix.base.method import Method
from vlmfix.engine.stage import Stage

__all__ = ["PLAIN", "Stack"]

Kind = TypeVar("Kind", bound=Stage)


@dataclass(frozen=True, eq=False)
class Stack:
    """Methods and their stages, in the order in which they run. Compared by identity."""

    methods: tuple[Method, ...] = ()
    stages: tuple[Stage, ...] = ()

    @property
    def names(self) -> list[str]:
        """The names of the stages."""
        return [stage.name for stage in self.stages]

    def find(self, kind: type[Kind]) -> Kind | None:
        """The stage of this kind, if it runs."""
        return next((stage for stage in self.stages if isinstance(stage, kind)), None)

    def specs(self) -> tuple[str, ...]:
        """The methods as specs."""
        return tuple(method.spec() for method in self.methods)


#: The plain model.
PLAIN = Stack()
