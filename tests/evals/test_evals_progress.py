"""evaluate(): what it tells while it runs, and models that are wrapped already."""

from __future__ import annotations

from pathlib import Path

import pytest

import vlmfix
from vlmfix.evals import evaluate


def test_progress_is_told_after_every_batch(tmp_path: Path) -> None:
    told: list[tuple[int, int, str]] = []
    evaluate(
        ["pope"], "emoji", ["pai"], limit=1, batch_size=8, quiet=True, output=tmp_path / "run",
        progress=lambda *event: told.append(event),
    )  # fmt: skip
    (steps,) = {total for _, total, _ in told}
    done = [n for n, _, _ in told]
    assert done == sorted(set(done)) and done[-1] == steps
    assert [label for _, _, label in told] == ["pope base"] * 2 + ["pope pai"] * 2


def test_what_progress_raises_ends_the_run(tmp_path: Path) -> None:
    def stop(*event: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(["pope"], "emoji", limit=1, quiet=True, output=tmp_path / "run", progress=stop)
    assert not (tmp_path / "run" / "results.json").exists()


def test_a_wrapped_model_is_asked_with_each_method_instead_of_its_own(tmp_path: Path) -> None:
    model, processor = vlmfix.load("emoji")
    settings = {"limit": 2, "quiet": True, "batch_size": 16}
    plain = evaluate(["pope"], (model, processor), ["vhr"], output=tmp_path / "a", **settings)
    vlmfix.wrap(model, "spin")
    wrapped = evaluate(["pope"], (model, processor), ["vhr"], output=tmp_path / "b", **settings)
    for arm in ("base", "vhr"):
        before, after = (run["tasks"]["pope"]["arms"][arm] for run in (plain, wrapped))
        assert before["scores"] == after["scores"]
        assert before["cost"]["passes_per_answer"] == after["cost"]["passes_per_answer"]
    assert plain["tasks"]["pope"]["arms"]["vhr"]["same_as_base"] < 1
    assert vlmfix.unwrap(model) is model
