"""Several processes, started by `accelerate launch`, give the answers of one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from evals_worlds import write_world
from launched_run import LOST_AFTER, evaluate
from test_evals_resume import figures, records

from vlmfix.errors import BadInput
from vlmfix.evals.running.processes import Processes, is_first_process
from vlmfix.evals.running.records import read_records

HERE = Path(__file__).parent


def launch(processes: int, *command: str) -> subprocess.CompletedProcess[str]:
    """Run it under the real launcher; without a GPU, --multi_gpu starts the processes as well."""
    flags = f"--multi_gpu --num_processes {processes} --num_machines 1 --main_process_port 0"
    quiet = "--mixed_precision no --dynamo_backend no"
    start = [sys.executable, "-m", "accelerate.commands.launch", *flags.split(), *quiet.split()]
    paths = [str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(
        [*start, *command], capture_output=True, text=True, check=False, env=environment
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("launched") / "world")


@pytest.fixture(scope="module")
def alone(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of it."""
    folder = tmp_path_factory.mktemp("launched") / "alone"
    evaluate(str(world), str(folder))
    return folder


def test_two_processes_answer_as_one(world: Path, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "two"
    done = launch(2, str(HERE / "launched_run.py"), str(world), str(out))
    assert done.returncode == 0, done.stderr
    # Both return the results, and have agreed on them. Gloo writes into the same lines.
    said = sorted(re.findall(r"rank (\d): (\S+) (\d)", done.stdout))
    assert [rank for rank, _, _ in said] == ["0", "1"], done.stdout
    assert len({run_id for _, run_id, _ in said}) == 1
    assert {processes for _, _, processes in said} == {"2"}
    assert records(out) == records(alone)
    assert figures(out) == figures(alone)
    for path in out.glob("samples_*.jsonl"):
        ranks = {row["rank"]: row["batch"] for row in read_records(path)}
        assert set(ranks) == {0, 1}
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in alone.iterdir())


@pytest.mark.slow
def test_a_lost_process_costs_its_share_alone(world: Path, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "lost"
    done = launch(2, str(HERE / "launched_run.py"), str(world), str(out), "1")
    assert done.returncode != 0
    assert not (out / "results.json").exists()
    kept = {rank: read_records(out / f"samples_pope_base.rank{rank}.jsonl") for rank in (0, 1)}
    assert len({(row["sampling_seed"], row["batch"]) for row in kept[1]}) == LOST_AFTER
    assert kept[0] and all(row["batch"] % 2 == 0 for row in kept[0])
    # One process alone, or any number, goes on from there.
    results = evaluate(str(world), str(out))
    assert results["resumed"] == len(kept[0]) + len(kept[1])
    assert records(out) == records(alone)
    assert figures(out) == figures(alone)
    rows = read_records(out / "samples_pope_base.jsonl")
    assert sum(row["run_id"] != results["run_id"] for row in rows) == results["resumed"]


@pytest.mark.slow
def test_a_refusal_reaches_every_process(world: Path, alone: Path, tmp_path: Path) -> None:
    """Only the first one looks at the folder; the others must not wait for ever."""
    run = json.loads((alone / "run.json").read_text())
    run["config"]["seed"] = 9
    other = tmp_path / "other"
    other.mkdir()
    (other / "run.json").write_text(json.dumps(run))
    done = launch(2, str(HERE / "launched_run.py"), str(world), str(other))
    assert done.returncode != 0
    assert done.stderr.count("BadInput: resume: the run in") == 2
    assert "seed: 9 then, 0 now" in done.stderr


# -- one process -----------------------------------------------------------------------------------


def test_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    one = Processes()
    assert (one.rank, one.size, one.local_rank) == (0, 1, 0)
    assert one.gather("x") == ["x"] and one.once(lambda: 3) == 3
    assert one.device(None) is None and one.device("cuda:1") == "cuda:1" and is_first_process()

    def fail() -> Any:
        raise BadInput("no")

    with pytest.raises(BadInput, match="no"):
        one.once(fail)


def test_only_the_first_process_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert not is_first_process()
    monkeypatch.setenv("RANK", "0")
    assert is_first_process()
