"""The benchmark on its smallest models: what it counts, what it refuses, what it writes."""

from __future__ import annotations

import csv
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

import vlmfix
from vlmfix import attention, bench, bench_arm, bench_models
from vlmfix.bench_arm import Arm, Decoding, Memory, Turn
from vlmfix.bench_models import Llava, Tower, subject
from vlmfix.bench_plot import draw
from vlmfix.edits import Inputs
from vlmfix.errors import BadInput
from vlmfix.registry import build_stack

TINY: dict[str, Any] = {
    "models": ("llava-tiny",),
    "dtypes": ("float32",),
    "devices": ("cpu",),
    "rounds": 1,
    "new_tokens": 5,
}


@pytest.fixture(scope="module")
def report() -> bench.Report:
    return bench.run(**{**TINY, "rounds": 2}, batch=2)


def test_one_row_per_arm(report: bench.Report) -> None:
    assert not report.refused
    assert [row["arm"] for row in report.rows] == ["plain", "var", "vhr", "pai"]
    plain, *arms = report.rows
    assert plain["edited_rows_per_step"] == 0
    assert plain["tokens_per_second_over_plain_p50"] == plain["first_token_over_plain_p50"] == 1
    assert plain["memory_over_plain"] == 1
    # PAI edits all 4 heads of 4 layers in 2 samples.
    assert arms[2]["edited_rows_per_step"] == 32
    assert all(row["edited_rows_per_step"] > 0 for row in arms)
    for row in report.rows:
        assert (row["batch"], row["prompt"], row["visual_tokens"]) == (2, 68, 36)
        speeds = [row[f"tokens_per_second_p{p}"] for p in bench.PERCENTILES]
        assert 0 < speeds[0] <= speeds[1] <= speeds[2]
        # 5 layers, keys and values, 2 samples, 68 + 5 - 1 positions, width 64, 4 bytes.
        assert row["kv_cache_bytes"] == 5 * 2 * 2 * 72 * 64 * 4
        assert row["peak_above_weights_bytes"] > row["kv_cache_bytes"]
        assert row["weight_bytes"] == 4 * row["parameters"]


def test_ratios_are_taken_within_a_round() -> None:
    plain = [Turn(first_token=1.0, step=0.5), Turn(first_token=2.0, step=1.0)]
    slow = [Turn(first_token=2.0, step=1.0), Turn(first_token=4.0, step=2.0)]
    found = bench._times(slow, plain, batch=2)
    assert (found["first_token_seconds_p50"], found["tokens_per_second_p50"]) == (3, 1.5)
    for p in bench.PERCENTILES:
        assert found[f"first_token_over_plain_p{p}"] == 2
        assert found[f"tokens_per_second_over_plain_p{p}"] == 0.5
    memory = bench._memory(Memory(peak=30, cache=10), Memory(peak=20, cache=10))
    assert memory["memory_over_plain"] == 2


def test_prompt_and_decode_steps_are_timed_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    # The call at 0, the prompt handed over at 1, the first token at 10, then one per 2 seconds.
    clock = iter([0.0, 1.0, 10.0, 12.0, 14.0, 16.0])
    arm = _arm(())
    monkeypatch.setattr(bench_arm, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert arm.turn() == Turn(first_token=10, step=2)


def test_peak_memory_counts_what_is_alive_at_once() -> None:
    kept = torch.zeros(250)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        for _ in range(3):
            first = torch.zeros(1000)
            second = torch.zeros(500)
            del first, second
        kept += 1
    assert bench_arm._peak(profile) == 6000


def test_an_arm_shares_the_weights_and_leaves_the_model_alone() -> None:
    made = _subject()
    arm = Arm("pai", made, build_stack("pai"), Decoding(5))
    assert arm.model is not made.model
    for own, other in zip(made.model.parameters(), arm.model.parameters(), strict=True):
        assert own is other
    with pytest.raises(vlmfix.StateError, match="not wrapped"):
        vlmfix.unwrap(made.model)


def test_a_method_that_edits_nothing_is_refused() -> None:
    # At keep=1 VAR moves nothing, so its speed would be that of the plain model.
    found = bench.run(**TINY, methods=(("var:sink_channels=0;tau=1;keep=1",),))
    assert [row["arm"] for row in found.rows] == ["plain"]
    assert len(found.refused) == 1
    assert "edited no row" in found.refused[0]


@pytest.mark.parametrize("factor", [0.0, 3.0], ids=["edit forgotten", "edit too strong"])
def test_a_wrong_decode_step_is_refused(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention._decode

    def wrong(slot: Any, steps: Any, frame: Any, inputs: Inputs) -> torch.Tensor:
        plain, _ = slot.run(inputs)
        return plain + factor * (right(slot, steps, frame, inputs) - plain)

    monkeypatch.setattr(attention, "_decode", wrong)
    found = bench.run(**TINY, methods=(("pai",),))
    assert [row["arm"] for row in found.rows] == ["plain"]
    assert "its logits differ from those without a cache" in found.refused[0]


@pytest.mark.parametrize("name", ["llava-tiny", "qwen2.5-vl-tiny"])
@pytest.mark.parametrize("compile", [None, "eager"])
def test_static_cache_and_compiled_steps(name: str, compile: str | None) -> None:
    found = bench.run(**{**TINY, "models": (name,)}, cache="static", compile=compile, text_tokens=9)
    assert not found.refused
    assert [row["arm"] for row in found.rows] == ["plain", "var", "vhr", "pai"]
    assert {(row["cache"], row["compile"]) for row in found.rows} == {("static", compile or "")}
    assert all(row["visual_tokens"] == 36 for row in found.rows)


def test_compiled_steps_are_really_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward  # type: ignore[no-any-return]  # a graph module is untyped

    torch._dynamo.reset()
    arm = Arm("pai", _subject(), build_stack("pai"), Decoding(5, "static", backend))  # type: ignore[arg-type]  # a function for a name
    arm.memory()
    assert not graphs
    arm.turn()
    made = len(graphs)
    arm.turn()
    assert made == len(graphs) > 0


def test_the_csv_grows_and_keeps_its_columns(report: bench.Report, tmp_path: Path) -> None:
    path = tmp_path / "new" / "bench.csv"
    bench.write_csv(report, path)
    bench.write_csv(report, path)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["arm"] for row in rows] == ["plain", "var", "vhr", "pai"] * 2
    assert rows[0]["torch"] == torch.__version__
    draw(rows, tmp_path / "plots" / "bench.png")
    assert (tmp_path / "plots" / "bench.png").stat().st_size > 5000
    with pytest.raises(BadInput, match="nothing to draw"):
        draw(rows[:1], tmp_path / "none.png")
    path.write_text("a,b\n")
    with pytest.raises(BadInput, match="new file"):
        bench.write_csv(report, path)


def test_the_table_says_what_was_not_measured(report: bench.Report) -> None:
    console = Console(width=80, record=True, file=StringIO())
    console.print(bench.render(report))
    text = console.export_text()
    assert "llava-tiny" in text
    assert bench.NO_GPU in text
    assert bench.SLOW_PLAIN not in report.notes
    half = {**TINY, "dtypes": ("bfloat16",)}
    assert bench.SLOW_PLAIN in bench.run(**half, methods=()).notes


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"models": ("gpt",)}, "llava-300m"),
        ({"new_tokens": 3}, "4 new tokens"),
        ({"rounds": 0}, "1 round"),
        ({"cache": "paged"}, "dynamic or static"),
        ({"compile": "eager"}, "--cache static"),
        ({"text_tokens": 0}, "text token"),
        ({"models": ("emoji",), "text_tokens": 9}, "prompt of its own"),
    ],
)
def test_bad_arguments(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        bench.run(**{**TINY, **changed})


@pytest.mark.parametrize("name", sorted(bench_models.LARGE))
def test_large_shapes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = bench_models.SHAPES[name]
    with torch.device("meta"):
        model = bench_models.transformers.AutoModelForImageTextToText.from_config(shape.config())
    parameters = sum(p.numel() for p in model.parameters())
    # Of the published checkpoints: 7.06 and 8.29 billion parameters.
    assert parameters / 1e9 == pytest.approx({"l": 7.06, "q": 8.29}[name[0]], abs=0.01)
    assert bench_models._prompt(shape, 2, 9)["input_ids"].shape[1] in (4 + 576 + 9, 4 + 578 + 9)
    if not torch.cuda.is_available():
        with pytest.raises(BadInput, match="--device cpu"):
            bench.run(models=(name,))
    monkeypatch.setattr(bench_models, "_free_memory", lambda where: 2**33)
    with pytest.raises(BadInput, match="8.0 GiB free"):
        bench.run(**{**TINY, "models": (name,)})


def test_a_large_shape_runs_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    small = Llava(64, 3, 4, 96, 128, Tower(16, 4, 1, 64, 4), 6)
    monkeypatch.setitem(bench_models.SHAPES, "llava-1.5-7b", small)
    found = bench.run(**{**TINY, "models": ("llava-1.5-7b",)}, methods=(("pai",),))
    assert [row["arm"] for row in found.rows] == ["plain", "pai"]


def test_threads_and_random_state_are_put_back() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    _subject()
    assert torch.equal(torch.rand(3), expected)
    before = torch.get_num_threads()
    bench.run(**TINY, methods=(), threads=before + 1)
    assert torch.get_num_threads() == before


def _subject() -> bench_models.Subject:
    return subject("llava-tiny", "float32", "cpu", 1)


def _arm(specs: Any) -> Arm:
    return Arm("arm", _subject(), build_stack(specs) if specs else (), Decoding(4))
