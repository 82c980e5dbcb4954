"""The folder of a run: where it is, what it was asked for, what an earlier run has left in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from vlmfix.errors import BadInput
from vlmfix.evals.inputs.rows import read_object
from vlmfix.evals.running.arms import file_name
from vlmfix.evals.running.files import write_json
from vlmfix.evals.running.lock import LOCK_FILE
from vlmfix.evals.running.records import (
    Done,
    answer_of,
    differences,
    digest,
    merge,
    read_records,
)

__all__ = ["FORMAT", "answered", "begin", "output_folder"]

FORMAT = 1

#: Written before the first answer: what was asked for, so that a resumed run can be told to differ.
RUN_FILE = "run.json"

_LOST = (
    "Without them answers of different settings could be mixed: put back a copy of the file, or "
    "start again with overwrite=True (--overwrite)"
)


def output_folder(
    output: str | Path | None,
    overwrite: bool,
    started: datetime,
    names: Iterable[str],
    model: Any,
) -> Path:
    """Where results go: `output`, or a new folder under runs/; it is not made yet.

    Args:
        output: what the user asked for.
        overwrite: whether it may hold something.
        started: time of the run.
        names: what is run, part of the name of a new folder.
        model: the model's name, if it is a text or path.

    Raises:
        BadInput: `output` is a file, or holds something.
    """
    if output is None:
        name = Path(model).name if isinstance(model, (str, Path)) else "model"
        stamp = f"{started:%Y%m%dT%H%M%S.%f}"[:-3] + "Z"
        output = Path("runs") / f"{stamp}-{'+'.join(names)}-{file_name(name)}"
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"output: {folder} is a file; name a folder")
    if not overwrite:
        _refuse_full(folder)
    return folder


def _refuse_full(folder: Path) -> None:
    if _holds_something(folder):
        raise BadInput(
            f"output: {folder} is not empty: name another folder, or replace its results with "
            "overwrite=True (--overwrite)"
        )


def _holds_something(folder: Path) -> bool:
    return folder.is_dir() and any(path.name != LOCK_FILE for path in folder.iterdir())


def begin(
    folder: Path,
    run_id: str,
    config: Mapping[str, Any],
    stems: Sequence[str],
    resume: bool,
    overwrite: bool,
) -> int:
    """Make the folder ready; returns how many answers of an earlier run count.

    Args:
        folder: of the run, locked: since `output_folder` another run may have filled it.
        run_id: its name.
        config: everything that decides its answers.
        stems: of the files of records.
        resume: go on with the run that the folder holds.
        overwrite: replace what the folder holds.

    Raises:
        BadInput: there is no run to go on with, or it had another config; or the folder holds
            something that is not to be replaced.
    """
    run_file = folder / RUN_FILE
    if resume and _holds_something(folder):
        if not run_file.exists():
            raise BadInput(
                f"resume: {folder} holds no {RUN_FILE}, which would tell which run it was: name "
                "the folder of a run, or start again with overwrite=True (--overwrite)"
            )
        try:
            then = read_object(run_file, "resume").get("config")
        except BadInput as error:
            raise BadInput(f"{error}. {_LOST}") from None
        if not isinstance(then, Mapping):
            raise BadInput(f"resume: {run_file} does not hold the settings of a run. {_LOST}")
        if changed := differences(then, config):
            raise BadInput(
                f"resume: the run in {folder} had other settings: {'; '.join(changed)}. Go on with "
                "those it had, or name another folder"
            )
        for stray in folder.glob(".*.tmp"):
            stray.unlink()
        kept = [(stem, row) for stem in stems for row in merge(folder, stem, retry=True)]
        if strange := sorted({stem for stem, row in kept if row["config"] != digest(config)}):
            raise BadInput(
                f"resume: {folder} holds answers that another run gave, in {strange[0]}.jsonl: "
                "take that file away, and they are asked again"
            )
        return len(kept)
    if not overwrite:
        _refuse_full(folder)
    for stale in [
        run_file,
        folder / "results.json",
        *folder.glob("samples_*.jsonl"),
        *folder.glob("card.*"),
    ]:
        stale.unlink(missing_ok=True)
    write_json(run_file, {"format": FORMAT, "run_id": run_id, "config": config})
    return 0


def answered(folder: Path, stem: str) -> Done:
    """Answers that an earlier run has left."""
    path = folder / f"{stem}.jsonl"
    rows = read_records(path) if path.exists() else []
    return {(row["sampling_seed"], row["sample_id"]): answer_of(row) for row in rows}
