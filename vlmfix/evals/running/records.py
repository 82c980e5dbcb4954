"""Records of a run: one JSON line per sample and sampling seed, in files that survive a crash.

Every process appends to a file of its own, `samples_<task>_<arm>.rank<r>.jsonl`. `merge` makes
`samples_<task>_<arm>.jsonl` of them, in the order of the samples. It can be repeated at any time:
what it has merged it reads again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from vlmfix.errors import BadInput
from vlmfix.evals.inputs.rows import parse_json, short
from vlmfix.evals.running.files import HALVES, write_lines
from vlmfix.evals.tasks import Answer, Sample, Task

__all__ = [
    "Done",
    "Record",
    "Recorder",
    "answer_of",
    "differences",
    "digest",
    "merge",
    "part",
    "read_records",
]

Record = Mapping[str, Any]
Done = dict[tuple[int | None, str], Answer]
"""(number of the sampling seed, or None; sample_id) -> answer."""

#: Records between two calls of fsync. What is flushed survives every end of the
#: process; this bounds what a machine that loses its power can lose.
SYNC_EVERY = 64


class Recorder:
    """Appends one JSON line per sample, flushed at once, so that a crash loses nothing finished.

    Args:
        path: the .jsonl file.
        task: reads the answers.
        common: keys that all records of the file share.
    """

    def __init__(self, path: Path, task: Task, common: Mapping[str, Any]) -> None:
        self._task, self._common = task, common
        self._positions = {sample.sample_id: i for i, sample in enumerate(task.samples)}
        self._unsynced = 0
        self._file: IO[str] = path.open("a", encoding="utf-8", newline="\n", errors=HALVES)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *exc: object) -> None:
        self._sync()
        self._file.close()

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
        self._unsynced = 0

    def write(
        self,
        sample: Sample,
        answer: Answer,
        latency: float,
        draw: int | None,
        prefix: str,
        batch: int,
        halvings: int,
    ) -> None:
        """Record one answer.

        Args:
            sample: what was asked.
            answer: what came back.
            latency: seconds that the batch took that held it.
            draw: number of the sampling seed; None: greedy.
            prefix: the beginning of the answer that was given.
            batch: number of the batch.
            halvings: how often it was halved, for want of memory or to single out a bad input.
        """
        failed = answer.error is not None
        parsed, correct = (None, None) if failed else self._task.parse(sample, answer)
        record = {
            **self._common,
            "sampling_seed": draw,
            "task": sample.task,
            "split": sample.split,
            "index": self._positions[sample.sample_id],
            "sample_id": sample.sample_id,
            "image": sample.image,
            "image_id": sample.image_id,
            "prompt": sample.prompt,
            "follows": sample.follows,
            "prefix": prefix,
            "target": sample.target,
            "response": None if failed else answer.text,
            "p_yes": answer.p_yes,
            "n_prompt_tokens": answer.prompt_tokens,
            "n_new_tokens": answer.new_tokens,
            "passes": answer.passes,
            "finish": "error" if failed else answer.finish,
            "batch": batch,
            "halvings": halvings,
            "latency_s": round(latency, 4),
            "error": answer.error,
            "parsed": parsed,
            "correct": correct,
        }
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._file.flush()
        self._unsynced += 1
        if self._unsynced >= SYNC_EVERY:
            self._sync()


def answer_of(record: Record) -> Answer:
    """The answer that a record holds."""
    return Answer(
        record["response"] or "",
        record["n_prompt_tokens"],
        record["n_new_tokens"],
        record["finish"],
        record["passes"],
        record["error"],
        record["p_yes"],
    )


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of one file; a last line that a crash tore is left out.

    Raises:
        BadInput: the file cannot be read, or another line is not a record; the message has its
            number.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise BadInput(f"cannot read {path} ({error.strerror}): it holds answers") from None
    # Without its newline a record may be torn even where it reads well: "passes": 1|2.
    return [_record(line, f"{path}, line {n}") for n, line in enumerate(lines[:-1], start=1)]


#: What a run reads in its records.
_KINDS: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("sample_id", "config", "run_id", "finish"), (str,)),
    **dict.fromkeys(("index", "rank", "batch", "halvings"), (int,)),
    **dict.fromkeys(("n_prompt_tokens", "n_new_tokens"), (int,)),
    **dict.fromkeys(("passes", "latency_s"), (int, float)),
    **{name: (str, type(None)) for name in ("response", "error")},
    **{"sampling_seed": (int, type(None)), "p_yes": (int, float, type(None))},
}


def _record(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = parse_json(line.decode("utf-8"), where)
        if not isinstance(record, dict):
            raise BadInput(f"it holds {short(record)}")
        for name, kinds in _KINDS.items():
            value = record.get(name)
            if name not in record or isinstance(value, bool) or not isinstance(value, kinds):
                raise BadInput(f"its {name} is {short(value)}")
        if record["p_yes"] is not None and not 0 <= record["p_yes"] <= 1:
            raise BadInput(f"its p_yes is {record['p_yes']}")
    except ValueError as error:
        raise BadInput(
            f"{where} is not a record ({error}): delete that line, or start again with "
            "overwrite=True (--overwrite)"
        ) from None
    return dict(record)


def merge(folder: Path, stem: str, retry: bool = False) -> list[dict[str, Any]]:
    """One file of what all processes recorded, in the order of the samples, seed after seed.

    Of several records of one answer, one that holds an answer wins over an error.

    Args:
        folder: of the run.
        stem: of the files: samples_<task>_<arm>.
        retry: leave errors out, so that they are asked again.

    Returns:
        The records of the merged file.

    Raises:
        BadInput: a file that cannot be read.
    """
    whole = folder / f"{stem}.jsonl"
    parts = sorted(path for path in folder.glob("*.jsonl") if _is_part(path.name, stem))
    chosen: dict[tuple[Any, str], dict[str, Any]] = {}
    for path in [*([whole] if whole.exists() else []), *parts]:
        for record in read_records(path):
            key = record["sampling_seed"], record["sample_id"]
            if key not in chosen or chosen[key]["error"] is not None:
                chosen[key] = record
    records = [r for r in chosen.values() if not (retry and r["error"] is not None)]
    records.sort(key=lambda record: (record["sampling_seed"] or 0, record["index"]))
    write_lines(whole, records)
    for path in parts:
        path.unlink()
    return records


def part(folder: Path, stem: str, rank: int) -> Path:
    """The file that one process appends to."""
    return folder / f"{stem}.rank{rank}.jsonl"


def _is_part(name: str, stem: str) -> bool:
    """Whether this is `<stem>.rank<r>.jsonl` (a glob would trip over brackets in names of arms)."""
    start, end = f"{stem}.rank", ".jsonl"
    return (
        name.startswith(start) and name.endswith(end) and name[len(start) : -len(end)].isdecimal()
    )


def digest(content: Any) -> str:
    """sha256 of JSON-able content, the same in every order of its keys."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def differences(then: Any, now: Any, where: str = "") -> list[str]:
    """What differs between two JSON-able contents, as "methods.var.keep: 0.6 then, 0.4 now"."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        names: Sequence[str] = list(dict.fromkeys([*then, *now]))
        return [
            line
            for name in names
            for line in differences(
                then.get(name), now.get(name), f"{where}.{name}" if where else name
            )
        ]
    if isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        pairs = zip(then, now, strict=True)
        return [
            line for i, (a, b) in enumerate(pairs) for line in differences(a, b, f"{where}[{i}]")
        ]
    return [] if then == now else [f"{where}: {then!r} then, {now!r} now"]
