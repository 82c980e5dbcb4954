"""A run that is killed some times and resumed, beside one that is left alone.

    python killed_run.py FOLDER SEED KILLS

Everything is imported and loaded once; each run is a process of its own, forked from here.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

import vlmfix
import vlmfix.evals


def lines(folder: Path) -> int:
    """Finished lines of all files of records."""
    while True:
        try:
            return sum(path.read_bytes().count(b"\n") for path in folder.glob("samples_*.jsonl"))
        except FileNotFoundError:  # the run has merged its files since they were listed
            continue


def start(folder: Path, model: object) -> int:
    """The process that evaluates into this folder."""
    if pid := os.fork():
        return pid
    try:
        vlmfix.evals.evaluate(
            ["pope", "chair"],
            model=model,
            methods=["vcd"],
            limit=3,
            n_images=20,
            batch_size=4,
            max_new_tokens=12,
            temperature=1.0,
            seeds=2,
            output=folder,
            resume=True,
            quiet=True,
        )
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        os._exit(1)
    os._exit(0)


def main(root: Path, seed: int, kills: int) -> None:
    """Run both, print how many lines each killed process left."""
    torch.set_num_threads(1)
    model = vlmfix.load("emoji")
    alone = os.waitstatus_to_exitcode(os.waitpid(start(root / "alone", model), 0)[1])
    if alone:
        raise SystemExit("the run that is left alone failed")
    chance = random.Random(seed)
    moments = sorted(chance.sample(range(lines(root / "alone") - 8), kills))
    for moment in moments:
        pid = start(root / "killed", model)
        while lines(root / "killed") < moment:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.05))
        os.kill(pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(moment, lines(root / "killed"), status, flush=True)
    last = os.waitstatus_to_exitcode(os.waitpid(start(root / "killed", model), 0)[1])
    raise SystemExit(last)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
