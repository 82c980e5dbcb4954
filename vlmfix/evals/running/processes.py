"""The processes of a run: one, or as many as `accelerate launch` (or torchrun) started.

They exchange a few facts and never tensors, so gloo serves, on machines with GPUs, too.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

__all__ = ["Processes", "is_first_process"]

T = TypeVar("T")

#: How long a process waits for the others. They may still be at an arm's last batches; one that
#: died is noticed at once, since its connection closes.
PATIENCE = timedelta(days=7)


def is_first_process() -> bool:
    """Whether this process speaks for all: rank 0, or the only one."""
    return os.environ.get("RANK", "0") == "0" or os.environ.get("WORLD_SIZE", "1") == "1"


def _leave() -> None:
    import torch.distributed as distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()


class Processes:
    """This process and the others of the run.

    Attributes:
        rank: its number, from 0.
        size: how many there are.
        local_rank: its number among those on this machine.
    """

    def __init__(self) -> None:
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0")) if self.size > 1 else 0
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0")) if self.size > 1 else 0
        self._group: Any = None
        if self.size > 1:
            import torch.distributed as distributed

            if not distributed.is_initialized():
                distributed.init_process_group("gloo", timeout=PATIENCE)
                # Threads of gloo that are left to the end of the interpreter abort it, sometimes.
                atexit.register(_leave)
            self._group = distributed.new_group(backend="gloo", timeout=PATIENCE)

    def device(self, wanted: Any) -> Any:
        """The device of this process: of several, a GPU each where the user names none."""
        if self.size == 1 or wanted not in (None, "cuda"):
            return wanted
        import torch

        count = torch.cuda.device_count()
        return f"cuda:{self.local_rank % count}" if count else wanted

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank, in each of them; waits for the last one."""
        if self.size == 1:
            return [value]
        import torch.distributed as distributed

        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value, group=self._group)
        return values

    def once(self, function: Callable[[], T]) -> T:
        """What rank 0 gets from the function, in every process; its error, too."""
        if self.size == 1:
            return function()
        outcome: tuple[Any, Exception | None] = None, None
        if self.rank == 0:
            try:
                outcome = function(), None
            except Exception as error:
                outcome = None, error
        value, failure = self.gather(outcome)[0]
        if failure is not None:
            raise failure
        result: T = value
        return result
