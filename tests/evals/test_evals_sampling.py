"""Sampled answers: the same random numbers in every arm, and seeds that are not more images."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evals_worlds import FakeModel, write_world
from typer.testing import CliRunner

import vlmfix
import vlmfix.evals
from vlmfix.cli.main import app
from vlmfix.emoji.training.build import build_model, build_processor
from vlmfix.emoji.training.recipe import QUICK
from vlmfix.errors import BadInput
from vlmfix.evals.running.runner import noise_seed
from vlmfix.evals.scoring.metrics import Arm, Ratio, counts_table, summarise
from vlmfix.evals.scoring.stats import majority
from vlmfix.evals.tasks import Sample

BATCHES = range(100)


@pytest.fixture
def world(tmp_path: Path) -> Path:
    return write_world(tmp_path / "world")


def run(model: Any, world: Path, output: Path, **options: Any) -> dict[str, Any]:
    settings = {"n_images": 10, "quiet": True, "batch_size": 7, "temperature": 1.0, **options}
    tasks = settings.pop("tasks", ["pope"])
    return vlmfix.evals.evaluate(tasks, model=model, data=world, output=output, **settings)


def records(folder: Path, task: str, arm: str) -> list[dict[str, Any]]:
    lines = (folder / f"samples_{task}_{arm}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


class Moody(FakeModel):
    """Right in everything under some sampling seeds, "Yes" to everything under the others."""

    def __init__(self, right: dict[str | None, set[int]], seed: int = 0) -> None:
        super().__init__(self.answer)
        self.right = right
        self.draw_of = {noise_seed(seed, d, "pope", b): d for d in range(9) for b in BATCHES}

    def answer(self, method: str | None, sample: Sample) -> str:
        noise = self.noise[method or "base"][-1]
        return sample.target if self.draw_of[noise] in self.right[method] else "Yes"


# -- random numbers --------------------------------------------------------------------------------


def test_arms_draw_the_same_and_no_two_batches_do(world: Path, tmp_path: Path) -> None:
    several, alone = (FakeModel(lambda method, sample: "Yes") for _ in range(2))
    tasks = ["pope", "chair"]
    run(several, world, tmp_path / "a", tasks=tasks, methods=["var", "pai"], seeds=3)
    run(alone, world, tmp_path / "b", tasks=tasks, seeds=3)
    noise = several.noise["base"]
    assert noise == several.noise["var"] == several.noise["pai"] == alone.noise["base"]
    assert len(set(noise)) == len(noise)
    asked = several.batches["base"]
    # Every seed asks the same batches over again.
    pope = [batch for batch in asked if batch[0].task == "pope"]
    third = len(pope) // 3
    assert pope[:third] == pope[third : 2 * third] == pope[2 * third :]
    other = FakeModel(lambda method, sample: "Yes")
    run(other, world, tmp_path / "c", tasks=tasks, seeds=3, seed=1)
    assert not set(other.noise["base"]) & set(noise)


def test_greedy(world: Path, tmp_path: Path) -> None:
    model = FakeModel(lambda method, sample: "Yes")
    results = run(model, world, tmp_path / "o", temperature=None, seed=3)
    assert set(model.noise["base"]) == {3}
    assert model.gen_kwargs["base"] == {"max_new_tokens": 16, "do_sample": False, "num_beams": 1}
    score = results["tasks"]["pope"]["arms"]["base"]["scores"]["random"]["accuracy"]
    assert set(score) == {"value", "ci", "ci_method", "wilson"}
    assert "; greedy" in vlmfix.evals.to_markdown(results)


def test_what_is_drawn_from_is_spelled_out(world: Path, tmp_path: Path) -> None:
    model = FakeModel(lambda method, sample: "Yes")
    results = run(model, world, tmp_path / "o", temperature=0.7, seeds=2, methods=["var"])
    sampled = {"do_sample": True, "temperature": 0.7, "top_p": 1.0, "top_k": 0}
    expected = {"max_new_tokens": 16, "num_beams": 1, **sampled}
    assert model.gen_kwargs["base"] == model.gen_kwargs["var"] == expected
    assert results["tasks"]["pope"]["gen_kwargs"] == expected
    assert (results["config"]["temperature"], results["config"]["seeds"]) == (0.7, 2)
    rows = records(tmp_path / "o", "pope", "var")
    assert all(row["gen_kwargs"] == expected and row["seed"] == 0 for row in rows)
    # One record per item and seed, seed after seed.
    assert [row["sampling_seed"] for row in rows] == [0] * 180 + [1] * 180
    halves = [[row["sample_id"] for row in rows[start : start + 180]] for start in (0, 180)]
    assert halves[0] == halves[1] and len(set(halves[0])) == 180
    markdown = vlmfix.evals.to_markdown(results)
    assert "sampled at temperature 0.7, top-p 1, top-k 0; seeds 2" in markdown


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """A model with fresh weights, sampled: its words are as good as random."""
    processor = build_processor()
    torch.manual_seed(0)
    model = build_model(QUICK, processor.tokenizer).eval()
    folder = tmp_path_factory.mktemp("sampled")
    results = {}
    state = torch.random.get_rng_state()
    for name, methods in (("alone", []), ("compared", ["pai:alpha=0", "pai:alpha=9"])):
        results[name] = vlmfix.evals.evaluate(
            ["chair"],
            model=(model, processor),
            methods=methods,
            limit=5,
            batch_size=3,
            max_new_tokens=8,
            temperature=1.0,
            seeds=2,
            output=folder / name,
            quiet=True,
        )
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's random numbers moved"
    return results, folder


def responses(folder: Path, arm: str = "base") -> list[list[str]]:
    rows = records(folder, "chair", arm)
    return [[row["response"] for row in rows if row["sampling_seed"] == draw] for draw in (0, 1)]


def test_an_arm_that_changes_nothing_samples_what_the_base_samples(
    bundled: tuple[dict[str, Any], Path],
) -> None:
    results, folder = bundled
    arms = results["compared"]["tasks"]["chair"]["arms"]
    assert arms["pai:alpha=0"]["same_as_base"] == 1.0
    assert arms["pai:alpha=9"]["same_as_base"] < 1.0  # so that not everything would pass
    assert "pai:alpha=0: every answer is the base's" in vlmfix.evals.to_markdown(
        results["compared"]
    )
    # Nor does it matter to the base how many arms there are.
    assert responses(folder / "alone") == responses(folder / "compared")


def test_seeds_and_images_sample_differently(bundled: tuple[dict[str, Any], Path]) -> None:
    first, second = responses(bundled[1] / "compared")
    assert len(first) == 5 and len({*first, *second}) == 10


# -- figures ---------------------------------------------------------------------------------------

COLUMNS = ("n", "correct", "tp", "fp")
RATIOS = (
    Ratio("accuracy", {"correct": 1}, {"n": 1}, proportion=True),
    Ratio("precision", {"tp": 1}, {"tp": 1, "fp": 1}),
)


def arm(flags: list[int], fp: list[int] | None = None) -> Arm:
    """Every right answer a true positive; `fp` false positives beside each item."""
    extra = fp or [0] * len(flags)
    rows = [{"n": 1, "correct": ok, "tp": ok, "fp": e} for ok, e in zip(flags, extra, strict=True)]
    return Arm(counts_table(rows, COLUMNS), [bool(flag) for flag in flags])


def test_figures_by_hand() -> None:
    """Three items of two images under two seeds: 1 of 3 right, then 3 of 3."""
    splits, images, draws = ["s"] * 6, ["a", "a", "b"] * 2, [0] * 3 + [1] * 3
    arms = {
        "base": arm([1, 0, 0, 1, 1, 1], fp=[0, 0, 0, 3, 3, 3]),
        "method": arm([1, 1, 0, 0, 1, 1]),
    }
    result = summarise(arms, COLUMNS, RATIOS, splits, images, draws=draws)
    accuracy = result["base"]["scores"]["s"]["accuracy"]
    assert accuracy["value"] == pytest.approx(2 / 3)
    assert accuracy["by_seed"] == pytest.approx([1 / 3, 1])
    assert accuracy["sd"] == pytest.approx((2 / 3) / 2**0.5)
    # The mean of 1/1 and 3/12, where the sums of both seeds would give 4/13.
    precision = result["base"]["scores"]["s"]["precision"]
    assert precision["value"] == pytest.approx((1 + 1 / 4) / 2)
    assert result["base"]["counts"]["s"] == {"n": 6, "correct": 4, "tp": 4, "fp": 9}
    delta = result["method"]["delta"]["s"]
    assert delta["accuracy"]["value"] == pytest.approx(0)
    assert delta["accuracy"]["by_seed"] == pytest.approx([1 / 3, -1 / 3])
    assert delta["accuracy"]["sd"] == pytest.approx((2 / 3) / 2**0.5)
    assert delta["mcnemar"] == {
        "p": 1.0,
        "p_holm": 1.0,
        "by_seed": [{"better": 1, "worse": 0, "p": 1.0}, {"better": 0, "worse": 1, "p": 1.0}],
    }


def test_the_interval_draws_images_with_all_their_seeds() -> None:
    """Replayed by brute force, seed by seed."""
    generator = np.random.default_rng(1)
    images = [i // 3 for i in range(30)] * 3
    draws = [d for d in range(3) for _ in range(30)]
    flags, extra = (generator.integers(0, 2, 90) for _ in range(2))
    arms = {"base": arm(flags.tolist(), extra.tolist())}
    result = summarise(arms, COLUMNS, RATIOS, ["s"] * 90, images, 60, seed=4, draws=draws)
    drawing = np.random.default_rng(4)
    weights = [np.bincount(drawing.integers(10, size=10), minlength=10) for _ in range(60)]
    means = []
    for drawn in weights:
        by_seed = []
        for draw in range(3):
            picked = [
                i
                for image, times in enumerate(drawn)
                for _ in range(times)
                for i in range(90)
                if images[i] == image and draws[i] == draw
            ]
            by_seed.append(flags[picked].sum() / (flags[picked].sum() + extra[picked].sum()))
        means.append(statistics.fmean(by_seed))
    expected = np.quantile(means, [0.025, 0.975])
    assert result["base"]["scores"]["s"]["precision"]["ci"] == pytest.approx(expected.tolist())


def test_the_same_answers_under_five_seeds_say_no_more_than_once() -> None:
    generator = np.random.default_rng(2)
    base, method = ((generator.random(60) < share).tolist() for share in (0.5, 0.8))
    images, splits = [i // 3 for i in range(60)], ["x", "y"] * 30
    once, fivefold = (
        summarise(
            {"base": arm(base * times), "method": arm(method * times)},
            COLUMNS,
            RATIOS,
            splits * times,
            images * times,
            draws=[d for d in range(times) for _ in range(60)],
        )
        for times in (1, 5)
    )
    for name in ("base", "method"):
        for place in ("x", "y", "mean", "pooled"):
            for part in ("scores", "delta"):
                if part not in once[name]:
                    continue
                for metric in ("accuracy", "precision"):
                    one, five = (r[name][part][place][metric] for r in (once, fivefold))
                    assert five["sd"] == pytest.approx(0)
                    assert five["by_seed"] == pytest.approx([one["value"]] * 5)
                    assert set(five) - set(one) == {"sd", "by_seed"}
                    for key in set(one) - {"ci_method"}:
                        assert five[key] == pytest.approx(one[key]), (name, place, metric, key)
    single, joined = (r["method"]["delta"]["pooled"]["mcnemar"] for r in (once, fivefold))
    assert single["p"] < 0.05
    assert joined["p"] == pytest.approx(5 / 3 * single["p"])
    assert joined["by_seed"] == [{k: single[k] for k in ("better", "worse", "p")}] * 5


def test_independent_seeds_take_out_the_noise_of_sampling() -> None:
    """Nothing but noise: the interval of nine seeds is a third as wide as that of one."""
    flags = (np.random.default_rng(3).random(9 * 400) < 0.5).astype(int).tolist()
    widths = []
    for times in (1, 9):
        n = 400 * times
        draws = [d for d in range(times) for _ in range(400)]
        images = list(range(400)) * times
        arms = {"base": arm(flags[:n])}
        scored = summarise(arms, COLUMNS, RATIOS, ["s"] * n, images, draws=draws)
        low, high = scored["base"]["scores"]["s"]["accuracy"]["ci"]
        widths.append(high - low)
    assert widths[1] / widths[0] == pytest.approx(1 / 3, rel=0.1)


def test_a_seed_without_a_denominator_is_flagged() -> None:
    arms = {"base": arm([1, 1, 0, 0])}
    result = summarise(arms, COLUMNS, RATIOS, ["s"] * 4, "abab", draws=[0, 0, 1, 1])
    assert result["base"]["flags"] == ["s.precision: zero denominator in 1 of 2 seeds"]
    assert result["base"]["scores"]["s"]["precision"]["by_seed"] == [1, 0]


def test_majority() -> None:
    assert majority([0.2]) == 0.2
    assert majority([0.01, 0.3]) == 0.3
    # The third of five at 5/3 of its size.
    assert majority([0.9, 0.01, 0.03, 0.5, 0.02]) == pytest.approx(0.05)
    assert majority([0.7, 0.8, 0.9]) == 1.0


def test_seeds_are_scored_as_seeds(world: Path, tmp_path: Path) -> None:
    """The base is right under one seed of three, var under all."""
    model = Moody({None: {1}, "var": {0, 1, 2}})
    results = run(model, world, tmp_path / "o", methods=["var"], seeds=3)
    entry = results["tasks"]["pope"]
    assert (entry["n_samples"], entry["n_images"]) == (180, 10)
    base, var = entry["arms"]["base"], entry["arms"]["var"]
    for place in ("random", "popular", "adversarial", "mean", "pooled"):
        accuracy = base["scores"][place]["accuracy"]
        assert accuracy["by_seed"] == [0.5, 1, 0.5]
        assert accuracy["value"] == pytest.approx(2 / 3)
        assert accuracy["sd"] == pytest.approx(statistics.stdev([0.5, 1, 0.5]))
        assert var["delta"][place]["accuracy"]["by_seed"] == [0.5, 0, 0.5]
    assert base["counts"]["random"]["n"] == 180
    assert base["strict"]["scores"]["random"]["accuracy"]["by_seed"] == [0.5, 1, 0.5]
    test = var["delta"]["random"]["mcnemar"]
    assert [row["better"] for row in test["by_seed"]] == [30, 0, 30]
    assert test["p"] == pytest.approx(3 / 2 * 2 / 2**30)
    assert var["same_as_base"] == pytest.approx(1 / 3)  # "Yes" is not "yes"
    assert base["cost"]["answers"] == 3 * len({*model.asked("base")})
    rows = records(tmp_path / "o", "pope", "base")
    right = [np.mean([r["correct"] for r in rows if r["sampling_seed"] == d]) for d in range(3)]
    assert right == [0.5, 1, 0.5]


def test_an_item_that_failed_under_one_seed_counts_under_none(world: Path, tmp_path: Path) -> None:
    class Failing(Moody):
        def answer(self, method: str | None, sample: Sample) -> str:
            noise = self.noise[method or "base"][-1]
            if method and sample.image_id == 5 and self.draw_of[noise] == 1:
                raise MemoryError("no room")
            return super().answer(method, sample)

    model = Failing({None: set(), "var": {0, 1}})
    options: dict[str, Any] = {"methods": ["var"], "seeds": 2, "n_images": None, "batch_size": 1}
    results = run(model, world, tmp_path / "o", **options)
    entry = results["tasks"]["pope"]
    assert results["errors"] == entry["arms"]["var"]["n_errors"] == len(entry["excluded"]) == 18
    assert entry["n_samples"] == 11 * 18
    for name in ("base", "var"):
        assert entry["arms"][name]["counts"]["pooled"]["n"] == 2 * 11 * 18


def test_captions_of_equal_length_are_cut_seed_by_seed(world: Path, tmp_path: Path) -> None:
    model = FakeModel(lambda method, sample: f"A {sample.target[0]}." + " A zebra." * (not method))
    results = run(model, world, tmp_path / "o", tasks=["chair"], methods=["var"], seeds=2)
    matched = results["tasks"]["chair"]["arms"]["var"]["matched_length"]
    assert matched["base"]["caption"]["chair_s"]["by_seed"] == [0, 0]
    assert results["tasks"]["chair"]["arms"]["base"]["scores"]["caption"]["chair_s"]["value"] == 1
    assert vlmfix.evals.to_markdown(results).count("same length") == 1


def test_the_table_shows_the_spread_between_seeds(world: Path, tmp_path: Path) -> None:
    model = Moody({None: {1}, "var": {0, 1, 2}})
    results = run(model, world, tmp_path / "o", methods=["var"], seeds=3)
    lines = vlmfix.evals.to_markdown(results).splitlines()
    assert lines[2].startswith("| split | arm | accuracy % | sd | Δ | p | F1 % | sd | Δ | yes %")
    assert re.match(r"\| random \| base \| 66\.7(±0\.0)? \| 28\.9 \|  \|  \| ", lines[4])
    assert "sd: between seeds" in lines[-2] and "Rüger" in lines[-2]
    alone = vlmfix.evals.to_markdown(run(model, world, tmp_path / "p", seeds=3)).splitlines()
    assert alone[2].startswith("| split | arm | accuracy % | sd | F1 % | sd | yes % | sd | passes")
    rows = [line for line in alone if line.startswith("| ")]
    assert {line.count("|") for line in rows} == {alone[2].count("|")}
    one = vlmfix.evals.to_markdown(run(model, world, tmp_path / "q", seeds=1))
    assert " sd " not in one and "seeds 1" in one


# -- refusals and the command line -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": None, "seeds": 5}, "seeds=5 without a temperature"),
        ({"seeds": 0}, "seeds=0: must be 1 or more"),
        ({"temperature": 0.0}, "temperature=0.0: must be positive"),
        ({"temperature": -1.0}, "must be positive"),
        ({"temperature": float("nan")}, "must be positive"),
        ({"temperature": float("inf")}, "must be positive"),
        ({"temperature": "1"}, "temperature='1': must be a number"),
        ({"seed": -1}, "seed=-1: must be a whole number from 0"),
        ({"seed": 10**26}, "must be a whole number from 0"),
        ({"seed": 1.5}, "seed=1.5: must be a whole number"),
        ({"seed": True}, "seed=True: must be a whole number"),
        ({"limit": 1.5}, "limit=1.5: must be 1 or more, a whole number"),
        ({"batch_size": "4"}, "batch_size='4': must be 1 or more, a whole number"),
        ({"max_new_tokens": 1e9}, "must be 1 or more, a whole number"),
    ],
)
def test_refusals(world: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    model = FakeModel(lambda method, sample: "Yes")
    with pytest.raises(BadInput, match=message):
        run(model, world, tmp_path / "o", **options)
    assert not model.batches and not (tmp_path / "o").exists()


def test_the_largest_seed_serves_every_generator(world: Path, tmp_path: Path) -> None:
    model = FakeModel(lambda method, sample: "Yes")
    assert run(model, world, tmp_path / "o", seed=2**63 - 1)["errors"] == 0
    torch.Generator().manual_seed(2**63 - 1)


def test_the_command_line(tmp_path: Path) -> None:
    sampled = ["--temperature", "1.0", "--seeds", "2", "--splits", "adversarial", "--images", "3"]
    arguments = ["eval", "pope", *sampled, "--output", str(tmp_path / "o"), "--json"]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    results = json.loads((tmp_path / "o" / "results.json").read_text())
    entry = results["tasks"]["pope"]
    assert entry["splits"] == ["adversarial"] and entry["n_samples"] == 18
    assert entry["gen_kwargs"]["temperature"] == 1.0
    assert len(entry["arms"]["base"]["scores"]["adversarial"]["accuracy"]["by_seed"]) == 2
