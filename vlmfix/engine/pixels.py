"""The stage of methods that change the images of prompts, before a processor sees them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from vlmfix.base.method import Method
from vlmfix.base.pixels import PixelMethod
from vlmfix.engine.hooks import Host
from vlmfix.engine.stack import PLAIN
from vlmfix.engine.stage import Generation, Stage
from vlmfix.errors import BadInput
from vlmfix.families import ModelInfo

__all__ = ["PixelStage", "Rewritten"]


@dataclass(frozen=True)
class Rewritten:
    """What the methods found in the chats that this thread now answers: {name: one per chat}."""

    found: dict[str, list[Any]]


@dataclass(frozen=True, eq=False)
class PixelStage(Stage):
    """Lets each method rewrite the chats of vlmfix.generate, in the order of the stack."""

    methods: tuple[PixelMethod, ...]

    name: ClassVar[str] = "pixels"

    @classmethod
    def of(cls, methods: Sequence[Method], info: ModelInfo) -> PixelStage | None:
        own = tuple(method for method in methods if isinstance(method, PixelMethod))
        return cls(own) if own else None

    def before_chats(
        self, host: Host, processor: Any, chats: Sequence[Any]
    ) -> tuple[Sequence[Any], Any]:
        found = {}
        for method in self.methods if chats else ():
            with host.state.thread.keeping(PLAIN):
                chats, found[method.name] = method.rewrite(host.model, processor, chats)
        return chats, Rewritten(found)

    def before_generate(self, generation: Generation) -> None:
        rewritten = generation.host.state.thread.get(Rewritten)
        if rewritten is None:
            raise BadInput(
                f"{self.methods[0].name} changes the images of a prompt, which generate() no "
                "longer has: it gets pixels that a processor has scaled. Ask through "
                "vlmfix.generate(model, processor, messages)."
            )
        generation.call.pixels = rewritten.found
