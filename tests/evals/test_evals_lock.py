"""One run at a time in a folder; what a killed run leaves keeps nobody out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from evals_worlds import FakeModel, write_world

import vlmfix.evals
from vlmfix.errors import BadInput
from vlmfix.evals.running import lock
from vlmfix.evals.running.lock import LOCK_FILE, locked
from vlmfix.evals.tasks import Sample

HOLDER = """
import pathlib, sys, time
from vlmfix.evals.running.lock import locked
with locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def world(tmp_path: Path) -> Path:
    return write_world(tmp_path / "world")


def run(model: Any, world: Path, output: Path, **options: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"n_images": 10, "batch_size": 4, "quiet": True, **options}
    return vlmfix.evals.evaluate(["chair"], model, data=world, output=output, **settings)


@pytest.mark.parametrize("how", [{"resume": True}, {"overwrite": True}])
def test_a_second_run_in_the_folder_is_refused(
    world: Path, tmp_path: Path, how: dict[str, Any]
) -> None:
    refused = []

    def reply(method: Any, sample: Sample) -> str:
        if not refused:
            with pytest.raises(BadInput, match=r"another run \(process \d+ on .*\) writes into"):
                run(FakeModel(lambda method, sample: "Two."), world, tmp_path / "o", **how)
            refused.append(sample)
        return "A dog."

    results = run(FakeModel(reply), world, tmp_path / "o", **how)
    assert refused and results["errors"] == 0
    lines = (tmp_path / "o" / "samples_chair_base.jsonl").read_text().splitlines()
    assert [json.loads(line)["response"] for line in lines] == ["A dog."] * 10
    assert not (tmp_path / "o" / LOCK_FILE).exists()


def test_a_run_that_was_faster_is_not_replaced(world: Path, tmp_path: Path) -> None:
    """Two runs start into one new folder; one of them loads its model for longer."""

    class Slow(FakeModel):
        def check(self, methods: Any) -> None:
            run(FakeModel(lambda method, sample: "A dog."), world, tmp_path / "o")

    with pytest.raises(BadInput, match="not empty"):
        run(Slow(lambda method, sample: "A cat."), world, tmp_path / "o")
    assert "A cat." not in (tmp_path / "o" / "samples_chair_base.jsonl").read_text()


def test_the_lock_ends_with_its_process(tmp_path: Path) -> None:
    folder = tmp_path / "o"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(BadInput, match=f"process {holder.pid} "), locked(folder):
            pass
    finally:
        holder.kill()
        holder.communicate()
    assert (folder / LOCK_FILE).exists()
    with locked(folder):
        pass
    assert not (folder / LOCK_FILE).exists()


def test_a_lock_that_is_left_is_no_content_of_the_folder(world: Path, tmp_path: Path) -> None:
    for name, how in (("a", {}), ("b", {"resume": True})):
        (tmp_path / name).mkdir()
        (tmp_path / name / LOCK_FILE).write_text("process 1 on another machine\n")
        assert run(FakeModel(lambda method, sample: "A."), world, tmp_path / name, **how)


def test_a_refused_run_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError), locked(tmp_path / "o"):
        raise ValueError
    assert not (tmp_path / "o").exists()


def test_a_file_system_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(file: Any) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(lock, "_lock", refuse)
    with (
        pytest.warns(UserWarning, match=r"file system without locks \(Function not implemented\)"),
        locked(tmp_path / "o"),
    ):
        pass


@pytest.mark.parametrize("content", ["", '{"config": {"seed": 0', "[]", "{}", "[" * 100_000, None])
def test_a_torn_run_file_is_refused(world: Path, tmp_path: Path, content: str | None) -> None:
    model = FakeModel(lambda method, sample: "A dog.")
    run(model, world, tmp_path / "o")
    file = tmp_path / "o" / "run.json"
    file.unlink()
    if content is None:
        file.mkdir()
    else:
        file.write_text(content)
    before = (tmp_path / "o" / "samples_chair_base.jsonl").read_bytes()
    with pytest.raises(BadInput, match=r"run\.json.*start again with overwrite"):
        run(model, world, tmp_path / "o", resume=True)
    assert (tmp_path / "o" / "samples_chair_base.jsonl").read_bytes() == before
