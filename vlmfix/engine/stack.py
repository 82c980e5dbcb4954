"""The methods that run together, and the stages that run them."""

from __future__ import annotations

from dataclasses import dataclass

from vlmfix.base.method import Method
from vlmfix.engine.stage import Stage

__all__ = ["PLAIN", "Stack"]


@dataclass(frozen=True, eq=False)
class Stack:
    """Methods and their stages, in the order in which they run. Compared by identity."""

    methods: tuple[Method, ...] = ()
    stages: tuple[Stage, ...] = ()

    @property
    def names(self) -> list[str]:
        """The names of the stages."""
        return [stage.name for stage in self.stages]

    def specs(self) -> tuple[str, ...]:
        """The methods as specs."""
        return tuple(method.spec() for method in self.methods)


#: The plain model.
PLAIN = Stack()
