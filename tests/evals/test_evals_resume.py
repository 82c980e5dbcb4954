"""Runs ended half-way: what they left is kept, and the whole is what it would have been."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from evals_worlds import FakeModel, write_world

import vlmfix.evals
from vlmfix.errors import BadInput
from vlmfix.evals.running.records import differences, merge, read_records
from vlmfix.evals.tasks import Sample

HERE = Path(__file__).parent


@pytest.fixture
def world(tmp_path: Path) -> Path:
    return write_world(tmp_path / "world")


def reply(method: Any, sample: Sample) -> str:
    if sample.task == "chair":
        return f"A {sample.target[0]}." if method == "var" else "A zebra."
    return sample.target.title() if method == "var" else "Yes"


class Ended(FakeModel):
    """Ends the run at its n-th answer, as Ctrl-C would."""

    def __init__(self, at: int) -> None:
        super().__init__(self.answer)
        self.left = at

    def answer(self, method: Any, sample: Sample) -> str:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return reply(method, sample)


def run(model: Any, world: Path, output: Path, **options: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "methods": ["var"],
        "n_images": 10,
        "quiet": True,
        "batch_size": 7,
        **options,
    }
    tasks = settings.pop("tasks", ["pope", "chair"])
    return vlmfix.evals.evaluate(tasks, model=model, data=world, output=output, **settings)


def records(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """All files of records, without what differs from run to run."""
    passing = ("run_id", "rank", "latency_s")
    return {
        path.name: [
            {key: value for key, value in json.loads(line).items() if key not in passing}
            for line in path.read_text(encoding="utf-8").split("\n")[:-1]
        ]
        for path in sorted(folder.glob("samples_*"))
    }


def figures(folder: Path) -> dict[str, Any]:
    """The tasks of results.json without what was measured by the clock."""
    tasks = json.loads((folder / "results.json").read_text())["tasks"]
    for entry in tasks.values():
        for arm in entry["arms"].values():
            arm["cost"] = {
                k: arm["cost"][k] for k in ("answers", "passes_per_answer", "new_tokens")
            }
    return dict(tasks)


@pytest.mark.parametrize("sampled", [False, True])
def test_a_resumed_run_is_the_uninterrupted_run(world: Path, tmp_path: Path, sampled: bool) -> None:
    options: dict[str, Any] = {"temperature": 1.0, "seeds": 2} if sampled else {}
    whole = FakeModel(reply)
    run(whole, world, tmp_path / "whole", **options)
    expected = records(tmp_path / "whole")
    chance = random.Random(0)
    for turn in range(4):
        out = tmp_path / f"ended{turn}"
        asked: dict[str, list[Any]] = {}
        for _ in range(3):
            model = Ended(chance.randrange(60))
            with pytest.raises(KeyboardInterrupt):
                run(model, world, out, resume=True, **options)
            for path in out.glob("*.rank0.jsonl"):
                # A machine that loses its power loses what was not synced: a part of a batch.
                kept = path.read_bytes()
                path.write_bytes(kept[: -chance.randrange(1, 3000)])
        last = FakeModel(reply)
        results = run(last, world, out, resume=True, **options)
        assert records(out) == expected
        assert figures(out) == figures(tmp_path / "whole")
        assert results["resumed"] > 0
        assert not list(out.glob("*.rank*"))
        for arm, batches in last.batches.items():
            # Whole batches, the same as ever, drawn with the same random numbers.
            pairs = list(zip(batches, last.noise[arm], strict=True))
            asked[arm] = list(zip(whole.batches[arm], whole.noise[arm], strict=True))
            assert all(pair in asked[arm] for pair in pairs)
        assert sum(map(len, last.batches.values())) < sum(map(len, whole.batches.values()))


def test_a_finished_run_is_scored_again_and_nothing_is_asked(world: Path, tmp_path: Path) -> None:
    run(FakeModel(reply), world, tmp_path / "o")
    before, scores = records(tmp_path / "o"), figures(tmp_path / "o")
    (tmp_path / "o" / "results.json").unlink()
    model = FakeModel(reply)
    run(model, world, tmp_path / "o", resume=True)
    assert not any(model.batches.values())
    assert records(tmp_path / "o") == before and figures(tmp_path / "o") == scores


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, r"seed: 0 then, 1 now"),
        ({"batch_size": 8}, r"batch_size: 7 then, 8 now"),
        (
            {"methods": ["pai"]},
            r"methods\.var: \[\{'method': 'var'\}\] then, None now; methods\.pai",
        ),
        ({"limit": 3}, r"limit: None then, 3 now; tasks\.pope\.samples_sha256"),
        ({"prompt_style": "vcd"}, r"prompt_style: 'lmms' then, 'vcd' now"),
        ({"max_new_tokens": 5}, r"max_new_tokens: None then, 5 now"),
        ({"temperature": 1.0}, r"temperature: None then, 1\.0 now"),
        ({"tasks": ["pope"]}, r"tasks\.chair: \{.*\} then, None now"),
    ],
)
def test_other_settings_are_refused_by_name(
    world: Path, tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(Ended(30), world, tmp_path / "o")
    left = {path.name: path.read_bytes() for path in (tmp_path / "o").iterdir()}
    model = FakeModel(reply)
    with pytest.raises(BadInput, match=f"had other settings: {named}"):
        run(model, world, tmp_path / "o", resume=True, **change)
    assert not model.batches
    assert {path.name: path.read_bytes() for path in (tmp_path / "o").iterdir()} == left


def test_other_data_and_another_model_are_refused(world: Path, tmp_path: Path) -> None:
    run(FakeModel(reply), world, tmp_path / "o", tasks=["pope"])

    class Bigger(FakeModel):
        @property
        def facts(self) -> dict[str, Any]:
            return {**super().facts, "revision": "abc"}

    with pytest.raises(BadInput, match="revision: None then, 'abc' now"):
        run(Bigger(reply), world, tmp_path / "o", tasks=["pope"], resume=True)
    text = world / "annotations" / "captions.json"
    text.write_text(text.read_text().replace("some things", "things"))
    with pytest.raises(BadInput, match=r"tasks\.pope\.data_sha256"):
        run(FakeModel(reply), world, tmp_path / "o", tasks=["pope"], resume=True)


def test_errors_are_asked_again(world: Path, tmp_path: Path) -> None:
    def broken(method: Any, sample: Sample) -> str:
        if sample.image_id == 5:
            raise OSError("the disk was away")
        return reply(method, sample)

    options: dict[str, Any] = {"n_images": None, "tasks": ["pope"]}
    assert run(FakeModel(broken), world, tmp_path / "o", **options)["errors"] > 0
    model = FakeModel(reply)
    results = run(model, world, tmp_path / "o", resume=True, **options)
    assert results["errors"] == 0 and not results["partial"]
    run(FakeModel(reply), world, tmp_path / "whole", **options)
    assert records(tmp_path / "o") == records(tmp_path / "whole")
    # Only batches with an error were asked again.
    assert all(any(s.image_id == 5 for s in batch) for batch in model.batches["var"])


def test_what_cannot_be_resumed(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "o"
    with pytest.raises(BadInput, match=r"name the run's folder"):
        run(FakeModel(reply), world, None, resume=True)
    with pytest.raises(BadInput, match="without overwrite"):
        run(FakeModel(reply), world, out, resume=True, overwrite=True)
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(BadInput, match=r"holds no run\.json"):
        run(FakeModel(reply), world, out, resume=True)
    run(FakeModel(reply), world, out, overwrite=True)
    path = out / "samples_pope_base.jsonl"
    lines = path.read_text().split("\n")
    lines[3] = lines[3][:50]
    path.write_text("\n".join(lines))
    with pytest.raises(BadInput, match=r"samples_pope_base\.jsonl, line 4 is not a record"):
        run(FakeModel(reply), world, out, resume=True)


def test_answers_of_another_run_are_refused(world: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        run(FakeModel(reply), world, tmp_path / name, seed=seed)
    path = tmp_path / "a" / "samples_pope_var.jsonl"
    path.write_bytes((tmp_path / "b" / path.name).read_bytes())
    with pytest.raises(
        BadInput, match=r"answers that another run gave, in samples_pope_var\.jsonl"
    ):
        run(FakeModel(reply), world, tmp_path / "a", resume=True)
    path.unlink()
    assert run(FakeModel(reply), world, tmp_path / "a", resume=True)["errors"] == 0


def test_resume_starts_a_run_where_there_is_none(world: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new"):
        assert run(FakeModel(reply), world, tmp_path / name, resume=True)["resumed"] == 0


# -- files of records ------------------------------------------------------------------------------


def line(number: int, draw: int | None = None, error: str | None = None, text: str = "a") -> str:
    record = {"sampling_seed": draw, "sample_id": f"s{number}", "index": number, "error": error}
    names = {"config": "c", "run_id": "r", "finish": "eos", "response": text, "p_yes": None}
    counts = ("rank", "batch", "halvings", "n_prompt_tokens", "n_new_tokens")
    numbers = {**dict.fromkeys(counts, 1), "passes": 1.5, "latency_s": 0.5}
    return json.dumps({**record, **names, **numbers}) + "\n"


def test_only_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    whole = line(0) + line(1, text="\u2028 one line")
    for torn in ("", "{", '{"sample_id": "s2"', line(2)[:-1], "\0" * 50):
        path.write_text(whole + torn, encoding="utf-8")
        assert [record["sample_id"] for record in read_records(path)] == ["s0", "s1"]
    path.write_text(line(0) + "[]\n" + line(1))
    with pytest.raises(BadInput, match="line 2 is not a record"):
        read_records(path)
    path.write_bytes(b"\xff\n")
    with pytest.raises(BadInput, match="line 1 is not a record"):
        read_records(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sample_id", ["s0"]),
        ("index", "3"),
        ("index", True),
        ("response", 5),
        ("error", {}),
        ("sampling_seed", "0"),
        ("p_yes", float("nan")),
        ("passes", None),
        ("config", None),
    ],
)
def test_a_record_with_a_strange_value_says_where(tmp_path: Path, name: str, value: Any) -> None:
    path = tmp_path / "a.jsonl"
    record = json.loads(line(1))
    path.write_text(line(0) + json.dumps({**record, name: value}) + "\n")
    with pytest.raises(BadInput, match=rf"a\.jsonl, line 2 is not a record \(its {name} is"):
        read_records(path)
    del record[name]
    path.write_text(json.dumps(record) + "\n")
    with pytest.raises(BadInput, match=rf"line 1 is not a record \(its {name} is None"):
        read_records(path)
    path.write_text(line(0).replace('"index": 0', '"index": 0, "index": 1'))
    with pytest.raises(BadInput, match="line 1 is not a record .*'index' twice"):
        read_records(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(BadInput, match=r"cannot read .*a\.jsonl"):
        read_records(path)


def test_merge(tmp_path: Path) -> None:
    """Any number of files, twice over; errors lose; other arms stay apart."""
    stem = "samples_pope_var_[1]"
    (tmp_path / f"{stem}.rank1.jsonl").write_text(line(3) + line(1) + line(0, error="x"))
    (tmp_path / f"{stem}.rank0.jsonl").write_text(line(2) + line(0) + line(0, draw=1) + "{")
    (tmp_path / f"{stem}.rank10.jsonl").write_text(line(4, error="y") + line(4, error="z"))
    other = tmp_path / f"{stem}x.rank0.jsonl"
    other.write_text(line(9))
    for retry, ids in ((False, ["s0", "s1", "s2", "s3", "s4", "s0"]), (True, ["s0", "s1"])):
        if retry:
            (tmp_path / f"{stem}.jsonl").write_text(line(1) + line(0) + line(4, error="y"))
        for _ in range(2):
            assert [record["sample_id"] for record in merge(tmp_path, stem, retry)] == ids
            assert len(read_records(tmp_path / f"{stem}.jsonl")) == len(ids)
    first = read_records(tmp_path / f"{stem}.jsonl")[0]
    assert first["error"] is None
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{stem}.jsonl", other.name]


def test_records_reach_the_disk(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every 64 records and at the end of a file; nothing shows that but the calls."""
    synced: list[int] = []
    sync = os.fsync

    def counted(number: int) -> None:
        path = tmp_path / "o" / "samples_pope_base.rank0.jsonl"
        if path.exists() and os.fstat(number).st_ino == path.stat().st_ino:
            synced.append(path.read_bytes().count(b"\n"))
        sync(number)

    monkeypatch.setattr(os, "fsync", counted)
    run(FakeModel(reply), world, tmp_path / "o", tasks=["pope"], methods=[])
    assert synced == [64, 128, 180]


def test_an_interrupted_merge_is_repeated(tmp_path: Path) -> None:
    """Ended between the merged file and the removal of the parts: nothing is doubled."""
    (tmp_path / "s.jsonl").write_text(line(0) + line(1))
    (tmp_path / "s.rank0.jsonl").write_text(line(0))
    (tmp_path / "s.rank1.jsonl").write_text(line(1))
    assert [record["sample_id"] for record in merge(tmp_path, "s")] == ["s0", "s1"]


def test_differences() -> None:
    then = {"a": 1, "b": {"c": [1, {"d": 2}], "e": None}, "gone": 3}
    now = {"a": 1, "b": {"c": [1, {"d": 5}], "e": 0}, "new": 4}
    assert differences(then, now) == [
        "b.c[1].d: 2 then, 5 now",
        "b.e: None then, 0 now",
        "gone: 3 then, None now",
        "new: None then, 4 now",
    ]
    assert differences(then, dict(reversed(then.items()))) == []


# -- real processes --------------------------------------------------------------------------------


def test_killed_once(tmp_path: Path) -> None:
    killed(1, tmp_path)


@pytest.mark.slow
def test_killed_five_times(tmp_path: Path) -> None:
    killed(5, tmp_path)


def killed(times: int, tmp_path: Path) -> None:
    """SIGKILL at random moments of a real run with the bundled model."""
    seed = random.SystemRandom().randrange(10**6)
    command = [sys.executable, str(HERE / "killed_run.py"), str(tmp_path), str(seed), str(times)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"seed {seed}: {done.stderr}"
    kills = [list(map(int, row.split())) for row in done.stdout.splitlines()]
    assert len(kills) == times and all(status == -9 for *_, status in kills), (
        f"seed {seed}: {kills}"
    )
    expected = records(tmp_path / "alone")
    assert {len(rows) for rows in expected.values()} == {6, 108}
    assert records(tmp_path / "killed") == expected, f"seed {seed}: {kills}"
    assert figures(tmp_path / "killed") == figures(tmp_path / "alone")
    texts = [re.sub(r"\W", "", r["response"]) for r in expected["samples_chair_base.jsonl"]]
    assert len(set(texts)) > 3  # so that not every answer would be the right one
