"""One evaluation with a fake model, for `accelerate launch` to start in several processes.

    python launched_run.py WORLD FOLDER [LOST]

The process of rank LOST is killed after three batches, as one is that takes too much memory.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import zlib
from pathlib import Path
from typing import Any

from evals_worlds import FakeModel

import vlmfix.evals
from vlmfix.evals.tasks import Answer, Sample

LOST_AFTER = 3


class Composed(FakeModel):
    """Its answers depend on everything that is in the batch, and on what it is drawn with."""

    def __init__(self, lost: bool) -> None:
        super().__init__(self.answer)
        self.lost = lost

    def answer(self, method: Any, sample: Sample) -> Answer:
        name = method or "base"
        if self.lost and len(self.batches[name]) > LOST_AFTER:
            time.sleep(1)  # the other one has work to lose by then
            os.kill(os.getpid(), signal.SIGKILL)
        batch = [other.sample_id for other in self.batches[name][-1]]
        number = zlib.crc32(repr((name, batch, self.noise[name][-1], sample.sample_id)).encode())
        return Answer(("Yes", "No")[number % 2], number % 7, 2, "eos", 2.0, p_yes=number % 11 / 10)


def evaluate(world: str, folder: str, lost: bool = False) -> dict[str, Any]:
    """POPE and CHAIR, sampled twice, base and var."""
    return vlmfix.evals.evaluate(
        ["pope", "chair"],
        model=Composed(lost),
        methods=["var"],
        data=world,
        n_images=10,
        batch_size=4,
        temperature=1.0,
        seeds=2,
        output=folder,
        resume=Path(folder).exists(),
        quiet=True,
    )


if __name__ == "__main__":
    rank = os.environ.get("RANK")
    results = evaluate(sys.argv[1], sys.argv[2], sys.argv[3:] == [rank])
    print(f"rank {rank}: {results['run_id']} {results['config']['processes']}", flush=True)
