"""What the runner asks: batches, conversations, prefixes that grow, batches that do not fit."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from evals_worlds import FakeModel, write_world

import vlmfix.evals
from vlmfix.errors import BadInput
from vlmfix.evals.inputs.coco import CocoData
from vlmfix.evals.pope.tables import open_images
from vlmfix.evals.running.cost import cost, peak_memory
from vlmfix.evals.running.noop import NoOp
from vlmfix.evals.running.runner import Turn, plan_batches
from vlmfix.evals.scoring.metrics import Arm, Ratio, counts_table, summarise
from vlmfix.evals.tasks import TASKS, Answer, Column, Options, Sample


class Talk:
    """Per image: two turns of a chat, a list that the model writes on, and a bare question."""

    name = "talk"
    max_new_tokens = 4
    columns = (Column("right", "right"),)
    wants_p_yes: ClassVar[bool] = True
    open = staticmethod(open_images)
    partial = False
    facts: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, data: CocoData, options: Options) -> None:
        self.data = data

    @property
    def samples(self) -> list[Sample]:
        found = []
        for image, name in self.data.files.items():
            shared: dict[str, Any] = {"task": "talk", "split": "s", "target": "yes"}
            about: dict[str, Any] = {**shared, "image": name, "image_id": image}
            found += [
                Sample(**about, sample_id=f"{image}a", prompt="first?"),
                Sample(**about, sample_id=f"{image}b", prompt="second?", follows=f"{image}a"),
                Sample(**about, sample_id=f"{image}1", prompt="list", prefix="one:", until=","),
                Sample(
                    **about,
                    sample_id=f"{image}2",
                    prompt="list",
                    follows=f"{image}1",
                    grow=True,
                    prefix=", two:",
                    until=",",
                ),
                Sample(**about, sample_id=f"{image}c", prompt="and?", follows=f"{image}2"),
                Sample(
                    **shared,
                    image=None,
                    image_id="none",
                    sample_id=f"{image}n",
                    prompt="no picture",
                ),
            ]
        return found

    def parse(self, sample: Sample, answer: Answer) -> tuple[str, bool]:
        return answer.text, answer.text == sample.target

    def score(
        self,
        samples: Sequence[Sample],
        arms: Mapping[str, Sequence[Answer]],
        draws: Sequence[int] | None = None,
    ) -> dict[str, Any]:
        rows = {
            arm: [{"n": 1, "right": a.text == "yes"} for a in answers]
            for arm, answers in arms.items()
        }
        scored = {
            arm: Arm(counts_table(found, ("n", "right")), [bool(r["right"]) for r in found])
            for arm, found in rows.items()
        }
        splits, images = [s.split for s in samples], [s.image_id for s in samples]
        ratio = Ratio("right", {"right": 1}, {"n": 1})
        return summarise(scored, ("n", "right"), [ratio], splits, images, draws=draws)


@pytest.fixture(autouse=True)
def talk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "talk", f"{__name__}:Talk")


@pytest.fixture
def world(tmp_path: Path) -> Path:
    return write_world(tmp_path / "world", 5)


def reply(method: Any, sample: Sample) -> str:
    return f"{sample.sample_id}, and more"


def run(model: Any, world: Path, output: Path, **options: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"quiet": True, "batch_size": 3, "n_images": None, **options}
    tasks = settings.pop("tasks", ["talk"])
    return vlmfix.evals.evaluate(tasks, model=model, data=world, output=output, **settings)


def records(folder: Path, arm: str = "base", task: str = "talk") -> list[dict[str, Any]]:
    text = (folder / f"samples_{task}_{arm}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


# -- conversations ---------------------------------------------------------------------------------


def test_what_stands_before_a_question(world: Path, tmp_path: Path) -> None:
    model = FakeModel(reply)
    run(model, world, tmp_path / "o")
    asked = {r.sample.sample_id: r for batch in model.requests["base"] for r in batch}
    name = asked["3a"].sample.image
    assert (asked["3a"].turns, asked["3a"].prefix) == ((), "")
    assert asked["3b"].turns == (Turn(name, "first?", "3a, and more"),)
    assert (asked["31"].turns, asked["31"].prefix) == ((), "one:")
    # Own answers as they are handed on: up to the comma.
    assert (asked["32"].turns, asked["32"].prefix) == ((), "one: 31, two:")
    assert asked["3c"].turns == (Turn(name, "list", "one: 31, two: 32"),)
    assert asked["3c"].prefix == ""
    rows = {row["sample_id"]: row for row in records(tmp_path / "o")}
    assert rows["32"]["prefix"] == "one: 31, two:" and rows["32"]["response"] == "32, and more"
    assert rows["32"]["follows"] == "31" and rows["3a"]["follows"] is None
    assert rows["4n"]["image"] is None
    assert [row["index"] for row in records(tmp_path / "o")] == list(range(30))


def test_batches(world: Path, tmp_path: Path) -> None:
    model = FakeModel(reply)
    results = run(model, world, tmp_path / "o")
    batches = [[sample.sample_id for sample in batch] for batch in model.batches["base"]]
    # Up to three conversations from first to last turn, then the next three.
    assert batches[:3] == [["1a", "11", "2a"], ["1b", "12", "2b"], ["1c"]]
    # Five items ask the same without a picture: one request, in a batch of its own.
    assert batches[-1] == ["1n"]
    assert all(len({s.image is None for s in batch}) == 1 for batch in model.batches["base"])
    assert results["tasks"]["talk"]["arms"]["base"]["cost"]["answers"] == 26


def test_shares_of_processes_are_whole_conversations(world: Path) -> None:
    samples = Talk(CocoData(world), Options()).samples
    for size in (1, 3, 100):
        blocks = plan_batches(samples, size)
        seen = [
            sample.sample_id
            for block in blocks
            for b in block
            for g in b.groups
            for sample in g.samples
        ]
        assert sorted(seen) == sorted(sample.sample_id for sample in samples)
        numbers = [batch.number for block in blocks for batch in block]
        assert numbers == list(range(len(numbers)))
        for block in blocks:
            inside = {s.sample_id for batch in block for g in batch.groups for s in g.samples}
            before = {s.follows for batch in block for g in batch.groups for s in g.samples}
            assert before - {None} <= inside
            assert all(len(batch.groups) <= size for batch in block)


def test_a_turn_before_its_beginning_is_a_mistake_of_the_task() -> None:
    late = [
        Sample("t", "s", "b", None, 1, "?", "", follows="a"),
        Sample("t", "s", "a", None, 1, "!", ""),
    ]
    with pytest.raises(ValueError, match="t: b follows a, which does not come before it"):
        plan_batches(late, 2)


def test_what_follows_an_error_is_an_error_until_it_is_resumed(world: Path, tmp_path: Path) -> None:
    def broken(method: Any, sample: Sample) -> str:
        if sample.sample_id == "21":
            raise OSError("gone")
        return reply(method, sample)

    run(FakeModel(broken), world, tmp_path / "o", batch_size=1)
    rows = {row["sample_id"]: row["error"] for row in records(tmp_path / "o")}
    assert rows["21"] == "OSError: gone"
    assert rows["22"] == "the turn before it, 21, has no answer: OSError: gone"
    assert rows["2c"].startswith("the turn before it, 21, has no answer")
    assert {key for key, error in rows.items() if error} == {"21", "22", "2c"}
    model = FakeModel(reply)
    run(model, world, tmp_path / "o", batch_size=1, resume=True)
    assert [s.sample_id for batch in model.batches["base"] for s in batch] == ["21", "22", "2c"]
    run(FakeModel(reply), world, tmp_path / "whole", batch_size=1)
    again, whole = (records(tmp_path / name) for name in ("o", "whole"))
    for row in (*again, *whole):
        for key in ("run_id", "latency_s"):
            row.pop(key)
    assert again == whole


# -- memory ----------------------------------------------------------------------------------------

FULL = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 9"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    MemoryError("no room"),
)


def allocate() -> None:
    """More than any machine has."""
    torch.empty(2**60, dtype=torch.uint8)


def test_what_torch_says_when_the_machine_is_full(world: Path, tmp_path: Path) -> None:
    def full(method: Any, sample: Sample) -> str:
        if len(model.batches["base"][-1]) > 2:
            allocate()
        return reply(method, sample)

    model = FakeModel(full)
    results = run(model, world, tmp_path / "o", batch_size=7)
    assert results["errors"] == 0
    assert results["tasks"]["talk"]["arms"]["base"]["cost"]["halved_batches"] > 0


class Small(FakeModel):
    """Has room for two requests."""

    def __init__(self, error: Exception, room: int = 2) -> None:
        super().__init__(self.answer)
        self.error, self.room = error, room

    def answer(self, method: Any, sample: Sample) -> str:
        if len(self.batches["base"][-1]) > self.room:
            raise self.error
        return reply(method, sample)


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_a_batch_that_does_not_fit_is_halved(world: Path, tmp_path: Path, error: Exception) -> None:
    model = Small(error)
    results = run(model, world, tmp_path / "o", batch_size=7)
    assert results["errors"] == 0
    assert [row["response"] for row in records(tmp_path / "o")] == [
        row["response"] for row in records(world_run(world, tmp_path / "roomy"))
    ]
    sizes = [len(batch) for batch in model.batches["base"]]
    assert sizes[:6] == [7, 4, 2, 2, 3, 2] and max(sizes[1:]) == 7  # each batch is tried whole
    assert set(model.noise["base"]) == {0}
    halved = results["tasks"]["talk"]["arms"]["base"]["cost"]["halved_batches"]
    assert halved == len({row["batch"] for row in records(tmp_path / "o") if row["halvings"]}) > 0
    assert next(row["halvings"] for row in records(tmp_path / "o")) == 3


def world_run(world: Path, output: Path) -> Path:
    run(FakeModel(reply), world, output, batch_size=7)
    return output


def test_halves_draw_different_numbers(world: Path, tmp_path: Path) -> None:
    model = Small(FULL[0])
    run(model, world, tmp_path / "o", batch_size=4, temperature=1.0)
    whole, *halves = model.noise["base"][:3]
    assert halves[0] == whole != halves[1]


def test_one_request_that_does_not_fit_is_an_error(world: Path, tmp_path: Path) -> None:
    results = run(Small(FULL[0], room=0), world, tmp_path / "o", batch_size=4)
    assert results["errors"] == 30
    errors = {row["error"] for row in records(tmp_path / "o") if row["follows"] is None}
    assert errors == {"OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."}


def test_other_errors_are_not_tried_again(world: Path, tmp_path: Path) -> None:
    model = Small(RuntimeError("shapes differ"))
    run(model, world, tmp_path / "o", batch_size=3)
    sizes = [len(batch) for batch in model.batches["base"]]
    assert sizes[:2] == [3, 3] or len(sizes) <= 5


# -- cost ------------------------------------------------------------------------------------------


def test_cost_by_hand() -> None:
    samples = [Sample("t", "s", str(i), None, i, f"{i}?", "") for i in range(6)]
    rows = [
        {
            "sampling_seed": None,
            "sample_id": str(i),
            "run_id": "a" if i < 4 else "b",
            "rank": 0,
            "batch": i // 2,
            "latency_s": (9.0, 2.0, 7.0)[i // 2],
            "n_new_tokens": 10 + i,
            "passes": 3.0,
            "halvings": int(i >= 4),
            "error": None,
        }
        for i in range(6)
    ]
    found = cost(rows, plan_batches(samples, 2))
    # The first batch of each of the two starts is warm-up.
    assert found["tokens_per_second"] == pytest.approx((12 + 13) / 2.0)
    assert found["answers_per_second"] == pytest.approx(2 / 2.0)
    assert (found["latency_p50_s"], found["latency_p95_s"]) == (2.0, 2.0)
    assert found["seconds"] == 18.0 and found["new_tokens"] == 75 and found["answers"] == 6
    assert found["passes_per_answer"] == 3.0 and found["halved_batches"] == 1
    assert cost([], [])["tokens_per_second"] == 0.0


def test_peak_memory_grows_with_what_is_held() -> None:
    with peak_memory() as before:
        pass
    with peak_memory() as found:
        block = bytearray(1 << 26)
        block[::4096] = b"x" * len(block[::4096])
        del block
    (name,) = found
    if name == "peak_process_mib":  # counted from the start of the process
        assert found[name] >= max(before[name], 64)
    else:
        assert name == "peak_gpu_mib"


# -- controls --------------------------------------------------------------------------------------


def test_the_arm_that_edits_nothing_is_flagged_if_it_differs(world: Path, tmp_path: Path) -> None:
    class Drifting(FakeModel):
        def describe(self, method: Any) -> Any:
            return None if method is None else str(method)

    same = Drifting(reply, known=[NoOp()])
    arms = run(same, world, tmp_path / "a", noop=True)["tasks"]["talk"]["arms"]
    assert list(arms) == ["base", "noop"]
    assert arms["noop"]["same_as_base"] == 1.0 and not arms["noop"]["flags"]
    other = Drifting(
        lambda method, s: (
            reply(None, s) if method is None or s.image_id != 3 else Answer("?", p_yes=0.5)
        ),
        known=[NoOp()],
    )
    arms = run(other, world, tmp_path / "b", noop=True)["tasks"]["talk"]["arms"]
    (flag,) = arms["noop"]["flags"]
    assert "5 answers and 5 probabilities of yes of 30 differ" in flag


def test_greedy_beside_sampling(world: Path, tmp_path: Path) -> None:
    """The method is better than the sampled base, and worse than the greedy one."""

    class Mirage(FakeModel):
        def __init__(self) -> None:
            super().__init__(self.answer)

        def answer(self, method: Any, sample: Sample) -> str:
            if not self.gen_kwargs[method or "base"]["do_sample"]:
                return "yes"
            return "yes" if method and sample.image_id != 3 else "no"

    model = Mirage()
    out = tmp_path / "o"
    results = run(model, world, out, methods=["var"], temperature=0.5, seeds=3, greedy_too=True)
    entry = results["tasks"]["talk"]
    arms = entry["arms"]
    assert list(arms) == ["base", "var", "base greedy", "var greedy"]
    assert arms["base"]["scores"]["s"]["right"]["by_seed"] == [0, 0, 0]
    assert arms["base greedy"]["scores"]["s"]["right"]["value"] == 1.0
    assert arms["base greedy"]["delta"]["s"]["right"]["value"] == 1.0
    assert arms["var"]["delta"]["s"]["right"]["value"] == pytest.approx(25 / 30)
    against = entry["against_greedy"]
    assert list(against) == ["base", "var", "var greedy"]
    assert against["base"]["delta"]["s"]["right"]["value"] == -1.0
    assert against["var"]["delta"]["s"]["right"]["value"] == pytest.approx(-5 / 30)
    assert against["var greedy"]["delta"]["s"]["right"]["value"] == 0.0
    # Three answers to each item, and one where all seeds give the same.
    assert len(records(out, "var")) == 90 and len(records(out, "var_greedy")) == 30
    assert {row["sampling_seed"] for row in records(out, "base_greedy")} == {None}
    assert arms["var greedy"]["gen_kwargs"]["do_sample"] is False
    assert arms["var"]["gen_kwargs"]["temperature"] == 0.5
    vlmfix.evals.to_markdown(results)


def test_greedy_too_needs_sampling(world: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="greedy_too=True without a temperature"):
        run(FakeModel(reply), world, tmp_path / "o", greedy_too=True)


# -- data ------------------------------------------------------------------------------------------


def test_each_task_has_its_data_and_the_same_data_is_opened_once(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = write_world(tmp_path / "other", 7)
    opened: list[str] = []
    read = CocoData._read_instances

    def reading(self: CocoData) -> None:
        opened.append(self.name)
        read(self)

    monkeypatch.setattr(CocoData, "_read_instances", reading)
    tasks: Any = ["talk", "pope", "chair"]
    results = vlmfix.evals.evaluate(
        tasks,
        model=FakeModel(reply),
        data={"chair": str(other), "*": str(world)},
        n_images=None,
        output=tmp_path / "o",
        quiet=True,
    )
    assert opened == ["world", "other"]
    found = {name: (entry["data"], entry["n_images"]) for name, entry in results["tasks"].items()}
    assert found == {"talk": ("world", 6), "pope": ("world", 5), "chair": ("other", 7)}
    with pytest.raises(BadInput, match="data for amber_g, which is not evaluated here"):
        vlmfix.evals.evaluate(tasks, model=FakeModel(reply), data={"amber_g": str(world)})
