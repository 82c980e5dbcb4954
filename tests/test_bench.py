"""The benchmark on its smallest model: what it counts, what it refuses, what it writes."""

from __future__ import annotations

import csv
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from vlmfix import bench
from vlmfix.bench_models import subject
from vlmfix.errors import BadInput

TINY = {"models": ("llava-tiny",), "dtypes": ("float32",), "devices": ("cpu",)}


@pytest.fixture(scope="module")
def report() -> bench.Report:
    return bench.run(**TINY, rounds=2, new_tokens=5, batch=2)


def test_one_row_per_arm(report: bench.Report) -> None:
    assert [row["arm"] for row in report.rows] == ["plain", "var", "pai"]
    plain, var, pai = report.rows
    assert plain["edited_rows"] == 0
    assert plain["over_plain_p50"] == 1
    assert var["edited_rows"] > 0
    assert pai["edited_rows"] > 0
    for row in report.rows:
        assert (row["batch"], row["prompt"], row["visual_tokens"]) == (2, 68, 36)
        speeds = [row[f"tokens_per_second_p{p}"] for p in bench.PERCENTILES]
        assert 0 < speeds[0] <= speeds[1] <= speeds[2]


def test_speeds_and_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    def turn(subject: object, stack: object, new_tokens: int) -> tuple[float, int]:
        return (0.5, 0) if stack is None else (1.0, new_tokens)

    monkeypatch.setattr(bench, "_turn", turn)
    plain, var = bench.run(**TINY, methods=(("var",),), rounds=2, batch=2).rows
    assert (plain["tokens_per_second_p50"], plain["over_plain_p50"]) == (4, 1)
    assert (var["tokens_per_second_p50"], var["over_plain_p50"]) == (2, 0.5)


def test_prefill_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    # The prompt is handed over at 0, the first token at 10, then one token per second.
    clock = iter([0.0, 10.0, 11.0, 12.0, 13.0])
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    made = subject("llava-tiny", "float32", "cpu", 1)
    assert bench._decode(made, 4) == 1


def test_a_method_that_edits_nothing_is_refused() -> None:
    # At keep=1 VAR moves nothing, so its speed would be that of the plain model.
    found = bench.run(**TINY, methods=(("var:sink_channels=0;tau=1;keep=1",),), rounds=1)
    assert [row["arm"] for row in found.rows] == ["plain"]
    assert len(found.refused) == 1
    assert "edited no row" in found.refused[0]


def test_the_csv_grows_and_keeps_its_columns(report: bench.Report, tmp_path: Path) -> None:
    path = tmp_path / "new" / "bench.csv"
    bench.write_csv(report, path)
    bench.write_csv(report, path)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["arm"] for row in rows] == ["plain", "var", "pai"] * 2
    assert rows[0]["torch"] == torch.__version__
    path.write_text("a,b\n")
    with pytest.raises(BadInput, match="new file"):
        bench.write_csv(report, path)


def test_the_table_says_what_was_not_measured(report: bench.Report) -> None:
    console = Console(width=160, record=True, file=StringIO())
    console.print(bench.render(report))
    text = console.export_text()
    assert "llava-tiny" in text
    assert bench.NO_GPU in text
    assert bench.SLOW_PLAIN not in report.notes
    half = {**TINY, "dtypes": ("bfloat16",)}
    assert bench.SLOW_PLAIN in bench.run(**half, methods=(), rounds=1, new_tokens=3).notes


def test_bad_names_and_numbers() -> None:
    with pytest.raises(BadInput, match="llava-300m"):
        bench.run(models=("gpt",))
    with pytest.raises(BadInput, match="new tokens"):
        bench.run(**TINY, new_tokens=1)


def test_threads_and_random_state_are_put_back() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    subject("llava-tiny", "float32", "cpu", 1)
    assert torch.equal(torch.rand(3), expected)
    before = torch.get_num_threads()
    bench.run(**TINY, methods=(), rounds=1, new_tokens=3, threads=before + 1)
    assert torch.get_num_threads() == before
