"""The kernel benchmark: small shapes, and what it refuses to time."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vlmfix.bench import kernels as bench
from vlmfix.errors import BadInput
from vlmfix.kernels import reference

SMALL = bench.Shape(heads=4, key_heads=2, keys=400, width=32)
OURS = {f"vlmfix {name}" for name in ("plain", "var", "pai", "vhr")}


@pytest.fixture(autouse=True)
def few_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_MOST_COPIES", 2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("masked", [False, True])
def test_every_arm_is_timed(dtype: str, masked: bool, tmp_path: Path) -> None:
    shape = replace(SMALL, dtype=dtype, masked=masked)
    report = bench.run([shape], "cpu", rounds=3)
    arms = {row["arm"]: row for row in report.rows}
    assert arms.keys() >= OURS | {"eager", "per-head loop var", "sdpa math", "sdpa flash packed"}
    assert not report.refused
    for row in report.rows:
        assert row["note"] == bench.NO_GPU and row["cuda_graph"] is False
        assert 0 < row["microseconds_p20"] <= row["microseconds_p50"] <= row["microseconds_p80"]
        assert row["over_sdpa_p50"] > 0 and row["torch"] == torch.__version__
        assert row["implementation"] == ("torch" if row["arm"] in OURS else "")
    best = arms[arms["eager"]["best_sdpa"]]
    assert best["over_sdpa_p20"] == best["over_sdpa_p80"] == 1
    path = tmp_path / "rows.csv"
    bench.write_csv(report, path)
    with path.open() as file:
        assert [row["arm"] for row in csv.DictReader(file)] == list(arms)


def test_a_wrong_operator_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = reference._epilogue

    def wrong(masses: torch.Tensor, edit: Any) -> Any:
        exact = masses.dtype == torch.float64
        return real(masses, edit if exact else replace(edit, keep=0.7))

    monkeypatch.setattr(reference, "_epilogue", wrong)
    report = bench.run([SMALL], "cpu", rounds=1)
    arms = {row["arm"] for row in report.rows}
    assert "vlmfix var" not in arms and "vlmfix pai" in arms
    assert any(line.startswith("vlmfix var") and "wrong by" in line for line in report.refused)


def test_an_inexact_operator_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten bits of a score, as a GPU's TF32 has them, are too few where eager attention has 23."""
    real = reference.row_scores

    def coarse(query: torch.Tensor, *rest: Any) -> torch.Tensor:
        scores = real(query, *rest)
        return scores if scores.dtype == torch.float64 else scores.half().float()

    monkeypatch.setattr(reference, "row_scores", coarse)
    report = bench.run([replace(SMALL, dtype="float32")], "cpu", rounds=1)
    assert not OURS & {row["arm"] for row in report.rows}
    assert {line.split(",")[0] for line in report.refused if "wrong by" in line} == OURS


def test_the_problem_has_heads_on_both_sides_of_the_rule() -> None:
    problem = bench._problem(bench.Shape(heads=32, keys=700), "cpu")
    query, key, value = (tensor.double() for tensor in problem.caches[0])
    found = reference.attend_rows(
        query, key, value, problem.edits["var"], scaling=problem.scaling, mask=None
    )
    assert found.edited[0, :, 0].tolist() == [True, False] * 16


def test_the_default_on_a_cpu_is_small() -> None:
    shapes = bench.default_shapes("cpu")
    assert {shape.keys for shape in shapes} == {700, 2048} and len(shapes) == 16
    assert max(shape.keys for shape in bench.default_shapes("cuda")) == 32768


def test_the_program_prints_writes_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(bench, "default_shapes", lambda device: [SMALL])
    table, picture = tmp_path / "new" / "rows.csv", tmp_path / "new" / "bars.png"
    bench.main(["--output", str(table), "--plot", str(picture), "--rounds", "2"])
    printed = capsys.readouterr().out
    assert bench.NO_GPU in printed and "vlmfix var" in printed
    assert table.is_file() and picture.read_bytes().startswith(b"\x89PNG")


def test_bad_requests() -> None:
    with pytest.raises(BadInput, match="rounds=0"):
        bench.run([SMALL], "cpu", rounds=0)
    with pytest.raises(BadInput, match="no row without a mask"):
        bench.draw(bench.Report(), Path("nowhere.png"))
