"""The benchmark on its smallest models: what it counts, what it refuses, what it writes."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

import vlmfix
from vlmfix.base.contrast import ContrastMethod
from vlmfix.base.pruning import Kept
from vlmfix.bench import arm as bench_arm
from vlmfix.bench import models as bench_models
from vlmfix.bench import run as bench
from vlmfix.bench.arm import Arm, Decoding, Memory, Turn, TwoProducts
from vlmfix.bench.models import Llava, TowerSizes, subject
from vlmfix.bench.plot import draw
from vlmfix.engine import attention, contrast
from vlmfix.engine.attention import Slot
from vlmfix.engine.branches import Branches
from vlmfix.engine.edits import Inputs
from vlmfix.errors import BadInput
from vlmfix.methods.random_tokens import RandomTokens
from vlmfix.registry import build, build_stack, list_methods

TINY: dict[str, Any] = {
    "models": ("llava-tiny",),
    "dtypes": ("float32",),
    "devices": ("cpu",),
    "rounds": 1,
    "new_tokens": 5,
}
#: Where float32 on llava has shown the same already.
BFLOAT16 = pytest.param("bfloat16", marks=pytest.mark.slow)
QWEN = pytest.param("qwen2.5-vl-tiny", marks=pytest.mark.slow)
ARMS = ("var", "vhr", "pai", "vcd")
CONTRASTS = sorted(
    row.name for row in list_methods() if isinstance(build(row.name), ContrastMethod)
)


@pytest.fixture(scope="module")
def report() -> bench.Report:
    methods = [[name] for name in ARMS]
    return bench.run(**{**TINY, "rounds": 2}, methods=methods, batch=2)


def test_one_row_per_arm(report: bench.Report) -> None:
    assert not report.refused
    assert [row["arm"] for row in report.rows] == ["plain", "two products", *ARMS]
    plain, control, *arms = report.rows
    assert plain["edited_rows_per_step"] == control["edited_rows_per_step"] == 0
    assert plain["tokens_per_second_over_plain_p50"] == plain["first_token_over_plain_p50"] == 1
    assert control["tokens_per_second_over_two_products_p50"] == 1
    assert plain["peak_over_plain"] == 1
    # PAI edits all 4 heads of 4 layers in 2 samples, VCD the logits of 2 samples.
    assert [row["edited_rows_per_step"] for row in arms[2:]] == [32, 2]
    assert all(row["edited_rows_per_step"] > 0 for row in arms)
    assert [row["streams"] for row in report.rows] == [1, 1, 1, 1, 1, 2]
    for row in report.rows:
        assert (row["batch"], row["prompt"], row["visual_tokens"]) == (2, 68, 36)
        speeds = [row[f"tokens_per_second_p{p}"] for p in bench.PERCENTILES]
        assert 0 < speeds[0] <= speeds[1] <= speeds[2]
        # 5 layers, keys and values, 2 samples, 68 + 5 - 1 positions, width 64, 4 bytes.
        assert row["kv_cache_bytes"] == row["streams"] * 5 * 2 * 2 * 72 * 64 * 4
        assert row["kv_cache_over_plain"] == row["streams"]
        assert row["peak_above_weights_bytes"] > row["kv_cache_bytes"]
        ratio = row["peak_above_weights_bytes"] / plain["peak_above_weights_bytes"]
        assert row["peak_over_plain"] == ratio
        assert row["weight_bytes"] == 4 * row["parameters"]


def test_ratios_are_taken_within_a_round() -> None:
    plain = [Turn(1.0, 0.5, prefill=0.5, tower=0.25), Turn(2.0, 1.0, prefill=1.0, tower=0.25)]
    slow = [Turn(2.0, 1.0, prefill=0.75, tower=0.25), Turn(4.0, 2.0, prefill=1.5, tower=0.75)]
    between = [Turn(9.0, 0.75, prefill=9.0, tower=9.0), Turn(9.0, 1.5, prefill=9.0, tower=9.0)]
    found = bench._times(slow, plain, between, batch=2)
    assert (found["first_token_seconds_p50"], found["tokens_per_second_p50"]) == (3, 1.5)
    assert (found["prefill_seconds_p50"], found["tower_seconds_p50"]) == (1.125, 0.5)
    for p in bench.PERCENTILES:
        assert found[f"first_token_over_plain_p{p}"] == 2
        assert found[f"prefill_over_plain_p{p}"] == 1.5
        assert found[f"tokens_per_second_over_plain_p{p}"] == 0.5
        assert found[f"tokens_per_second_over_two_products_p{p}"] == 0.75
    alone = bench._times(slow, plain, None, batch=2)
    assert {key: value for key, value in alone.items() if value is not None} == {
        key: value for key, value in found.items() if "two_products" not in key
    }
    memory = bench._memory(Memory(peak=30, cache=20), Memory(peak=20, cache=10))
    assert (memory["peak_over_plain"], memory["kv_cache_over_plain"]) == (1.5, 2)


def test_prompt_and_decode_steps_are_timed_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    # The call at 0, the vision tower from 1 to 3, the prompt handed over at 4, the decoder from 5
    # to 9, the first token at 10, then one per 2 seconds, no longer timed within.
    clock = iter([0.0, 1.0, 3.0, 4.0, 5.0, 9.0, 10.0, 12.0, 14.0, 16.0])
    arm = _arm(())
    monkeypatch.setattr(bench_arm, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert arm.turn() == Turn(first_token=10, step=2, prefill=4, tower=2)
    assert next(clock, None) is None


def test_a_stopwatch_adds_up_and_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fails(torch.nn.Module):
        def forward(self, fail: bool) -> None:
            if fail:
                raise RuntimeError("on purpose")

    clock = iter([0.0, 1.0, 5.0, 7.0, 20.0, 30.0])
    monkeypatch.setattr(bench_arm, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    module = Fails()
    watch = bench_arm.Stopwatch(module, "cpu")
    module(False)
    with pytest.raises(RuntimeError, match="on purpose"):
        module(True)  # a look at a prompt that has seen enough ends so
    watch.stop()
    module(False)
    assert watch.seconds == 3
    assert not module._forward_hooks and not module._forward_pre_hooks


def test_arms_that_drop_visual_tokens(tmp_path: Path) -> None:
    methods = [["hiprune:tokens=9"], ["ptp:tokens=9"], ["fastv:tokens=9"]]
    found = bench.run(**TINY, methods=methods, batch=2)
    assert not found.refused
    # No method here edits or contrasts, so the control has nothing to be compared with.
    assert [row["arm"] for row in found.rows] == ["plain", *(spec for [spec] in methods)]
    plain, *arms = found.rows
    assert plain["visual_tokens_kept"] == plain["visual_tokens"] == 36
    assert [row["visual_tokens_kept"] for row in arms] == [9, 9, 9]
    # Keys and values, 2 samples, width 64, 4 bytes: 27 of 68 + 5 - 1 columns are gone, of FastV's
    # cache in 3 of 5 layers.
    column = 2 * 2 * 64 * 4
    lengths = [5 * 45, 5 * 45, 2 * 72 + 3 * 45]
    assert plain["kv_cache_bytes"] == 5 * 72 * column
    assert [row["kv_cache_bytes"] for row in arms] == [length * column for length in lengths]
    for row in found.rows:
        assert 0 < row["prefill_seconds_p50"] < row["first_token_seconds_p50"]
        assert 0 < row["tower_seconds_p50"] < row["first_token_seconds_p50"]
    bench.write_csv(found, tmp_path / "bench.csv")
    with (tmp_path / "bench.csv").open(newline="") as file:
        draw(list(csv.DictReader(file)), tmp_path / "bench.png")
    assert (tmp_path / "bench.png").stat().st_size > 5000
    console = Console(width=80, record=True, file=StringIO())
    console.print(bench.render(found))
    lines = console.export_text().splitlines()
    head = next(line for line in lines if line.startswith("arm"))
    assert head.split() == ["arm", "kept", "prefill", "first", "token", "tokens/s", "peak", "cache"]
    assert next(line for line in lines if line.startswith("hiprune:tokens=9")).split()[1] == "9"


def test_a_pruned_prompt_that_differs_from_its_reference_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never_twice(self: Any, visual: Any, budget: int) -> Kept:
        calls.append(budget)
        return Kept(torch.arange(budget) + len(calls))

    calls: list[int] = []
    monkeypatch.setattr(RandomTokens, "keep", never_twice)
    found = bench.run(**TINY, methods=(("random:tokens=9",),))
    assert [row["arm"] for row in found.rows] == ["plain"]
    assert "its logits differ from those without a cache" in found.refused[0]


def test_keeping_every_token_is_refused() -> None:
    found = bench.run(**TINY, methods=(("random:ratio=1.0",),))
    assert "dropped no visual token" in found.refused[0]


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
    assert [row["arm"] for row in found.rows] == ["plain", "two products"]
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
    assert [row["arm"] for row in found.rows] == ["plain", "two products"]
    assert "its logits differ from those without a cache" in found.refused[0]


@pytest.mark.parametrize("dtype", ["float32", BFLOAT16])
@pytest.mark.parametrize("model", ["llava-tiny", pytest.param("emoji", marks=pytest.mark.slow)])
def test_contrastive_methods_run_without_their_cut(model: str, dtype: str) -> None:
    settings = {**TINY, "models": (model,), "dtypes": (dtype,)}
    found = bench.run(**settings, methods=[[name] for name in CONTRASTS])
    assert not found.refused
    arms = found.rows[2:]
    assert [row["arm"] for row in arms] == CONTRASTS
    for row in arms:
        assert row["spec"] == build(bench.FORCED[row["arm"]]).spec()
        assert "beta=0" in row["spec"]
        assert row["streams"] == row["kv_cache_over_plain"] == (3 if row["arm"] == "rbd" else 2)
        assert row["edited_rows_per_step"] == 1


def test_sinks_are_forced_only_where_the_model_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    both = bench.FORCED | bench.FORCED_SINKS
    for channels, forced in ((None, both), ((), both), ((7,), bench.FORCED)):
        found = None if channels is None else SimpleNamespace(sink_channels=channels)
        monkeypatch.setattr(bench, "load_calibration", lambda model, found=found: found)
        assert bench._forced(None) == forced


@pytest.mark.parametrize("dtype", ["float32", BFLOAT16])
@pytest.mark.parametrize(
    "mutant",
    [
        "forgotten",
        pytest.param("base for branch", marks=pytest.mark.slow),
        "positions of the base",
    ],
)
def test_a_wrong_contrastive_step_is_refused(
    mutant: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    combine, widen = contrast.combine_decoded, Branches.widen

    def wrong_combine(method: Any, frame: Any, output: Any, token: torch.Tensor) -> Any:
        base = output.logits[: frame.ledger.get(Branches).rows]
        if mutant == "forgotten":
            output.logits = base.float()
            return output
        output.logits = torch.cat([base, base])
        return combine(method, frame, output, token)

    def wrong_widen(self: Branches, *args: Any) -> dict[str, Any]:
        return widen(replace(self, shift=torch.zeros_like(self.shift)), *args)

    if mutant == "positions of the base":
        monkeypatch.setattr(Branches, "widen", wrong_widen)
    else:
        monkeypatch.setattr(contrast, "combine_decoded", wrong_combine)
    found = bench.run(**{**TINY, "dtypes": (dtype,)}, methods=(("m3id",),))
    assert [row["arm"] for row in found.rows] == ["plain", "two products"]
    why = "edited no row" if mutant == "forgotten" else "its logits differ from those without"
    assert why in found.refused[0]


def test_a_constant_on_all_logits_is_no_change() -> None:
    # Nearly no weight: log-probabilities of the plain model, far off its logits, and as good.
    settings = {**TINY, "dtypes": ("bfloat16",)}
    found = bench.run(**settings, methods=(("m3id:decay=1e-6;beta=0",),))
    assert "half of what the method changes" in found.refused[0]


@pytest.mark.parametrize("spec", ["two products", "vcd", "rbd"])
def test_every_row_of_a_step_is_two_products(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # So that a contrastive method over the control compares rows, and no kinds of attention.
    calls = {"products": 0, "own": 0}
    products, own = attention.edited_rows, Slot.run

    def count_products(*args: Any) -> torch.Tensor:
        calls["products"] += 1
        return products(*args)

    def count_own(slot: Slot, inputs: Inputs) -> Any:
        calls["own"] += 1
        return own(slot, inputs)

    control = spec == "two products"
    arm = Arm(spec, _subject(), [TwoProducts()] if control else build_stack(spec), Decoding(5))
    monkeypatch.setattr(attention, "edited_rows", count_products)
    monkeypatch.setattr(Slot, "run", count_own)
    arm.decoding = Decoding(1)
    arm._generate(1, {})
    prompt = dict(calls)
    arm._generate(4, {})
    rows = 1 if control else vlmfix.last_call(arm.model).streams
    assert calls["products"] - 2 * prompt["products"] == 3 * 5 * rows
    assert calls["own"] == 2 * prompt["own"]


def test_without_the_plain_model_there_are_no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench_arm._TOLERANCES, "float32", -1.0)
    found = bench.run(**TINY, methods=(("pai",),))
    assert not found.rows
    assert [line.partition(":")[0] for line in found.refused] == [
        "plain on llava-tiny (float32, cpu)"
    ]


def test_memory_is_that_of_a_short_turn_and_holds_no_branch_twice() -> None:
    arm = Arm("rbd", _subject(), build_stack("rbd"), Decoding(40))
    memory = arm.check(None).memory
    # 5 layers, keys and values, 3 streams, 68 + 8 - 1 positions, width 64, 4 bytes.
    assert memory.cache == 5 * 2 * 3 * 75 * 64 * 4
    assert memory.peak < 1.5 * memory.cache


@pytest.mark.parametrize("name", ["llava-tiny", QWEN])
@pytest.mark.parametrize("compile", [None, pytest.param("eager", marks=pytest.mark.slow)])
def test_static_cache_and_compiled_steps(name: str, compile: str | None) -> None:
    settings = {**TINY, "models": (name,), "methods": [[name] for name in ARMS]}
    found = bench.run(**settings, cache="static", compile=compile, text_tokens=9)
    assert not found.refused
    control = [] if compile else ["two products"]  # a graph has torch's attention in it
    assert [row["arm"] for row in found.rows] == ["plain", *control, *ARMS]
    assert {(row["cache"], row["compile"]) for row in found.rows} == {("static", compile or "")}
    assert all(row["visual_tokens"] == 36 for row in found.rows)
    known = {row["tokens_per_second_over_two_products_p50"] is None for row in found.rows}
    assert known == {compile is not None}


def test_compiled_steps_are_really_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward  # type: ignore[no-any-return]  # a graph module is untyped

    torch._dynamo.reset()
    arm = Arm("pai", _subject(), build_stack("pai"), Decoding(5, "static", backend))  # type: ignore[arg-type]  # a function for a name
    arm._memory()
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
    assert [row["arm"] for row in rows] == ["plain", "two products", *ARMS] * 2
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
    assert max(map(len, text.splitlines())) <= 80
    head, cells = (next(x for x in text.splitlines() if x.startswith(n)) for n in ("arm", "vcd"))
    assert head.split() == [
        "arm",
        "rows",
        "first",
        "token",
        "tokens/s",
        "products",
        "peak",
        "cache",
    ]
    assert cells.split()[1] == "2" and cells.split()[-1] == "2.00"
    assert bench.NO_GPU in text
    assert bench.SLOW_PLAIN not in report.notes
    half = {**TINY, "dtypes": ("bfloat16",)}
    assert bench.SLOW_PLAIN in bench.run(**half, methods=(("pai",),)).notes
    assert bench.SLOW_PLAIN not in bench.run(**half, methods=(("random",),)).notes


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


@pytest.mark.slow
def test_a_large_shape_runs_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    small = Llava(64, 3, 4, 96, 128, TowerSizes(16, 4, 1, 64, 4), 6)
    monkeypatch.setitem(bench_models.SHAPES, "llava-1.5-7b", small)
    found = bench.run(**{**TINY, "models": ("llava-1.5-7b",)}, methods=(("pai",),))
    assert [row["arm"] for row in found.rows] == ["plain", "two products", "pai"]


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
