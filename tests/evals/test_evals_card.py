"""The score card: what shares a column, what is marked, what the files say, what is drawn."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evals_worlds import FakeModel, write_world
from PIL import Image
from test_evals_score import reply

import vlmfix.evals
from vlmfix.errors import BadInput
from vlmfix.evals.reporting.card import Table, columns, make_card, read_runs
from vlmfix.evals.reporting.plots import draw_chair, draw_forest
from vlmfix.evals.reporting.write import report, to_markdown
from vlmfix.evals.score import score
from vlmfix.evals.scoring.stats import holm


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("card") / "world")


def run(world: Path, output: Path, methods: list[str], **options: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "tasks": ["pope", "chair"],
        "n_images": 10,
        "quiet": True,
        **options,
    }
    return vlmfix.evals.evaluate(
        settings.pop("tasks"), FakeModel(reply), methods, data=world, output=output, **settings
    )


@pytest.fixture(scope="module")
def both(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("both")
    return folder, run(world, folder / "run", ["var", "pai"])


def one(card: list[Table]) -> Table:
    (table,) = card
    return table


def test_figures_are_those_of_the_results(both: tuple[Path, dict[str, Any]]) -> None:
    folder, results = both
    table = one(make_card(read_runs(folder)))
    assert [row.method for row in table.rows] == ["base", "var", "pai"]
    assert [(b.task, b.place) for b in table.blocks] == [("pope", "pooled"), ("chair", "caption")]
    var = table.rows[1]
    there = results["tasks"]["chair"]["arms"]["var"]
    cell = var.cells[1, "chair_s"]
    assert cell.value == pytest.approx(100 * there["scores"]["caption"]["chair_s"]["value"])
    assert cell.delta == pytest.approx(100 * there["delta"]["caption"]["chair_s"]["value"])
    tests = [
        results["tasks"]["chair"]["arms"][arm]["delta"]["caption"]["mcnemar"]["p"]
        for arm in ("var", "pai")
    ]
    assert [row.cells[1, "chair_s"].p for row in table.rows[1:]] == pytest.approx(holm(tests))
    # 180 questions, fewer distinct ones: the pool's test is not about its difference.
    assert var.cells[0, "accuracy"].p is None
    pope = results["tasks"]["pope"]["arms"]["var"]
    assert var.cells[0, "auc"].value == pytest.approx(100 * pope["auc"]["pooled"]["value"])
    beyond = pope["prior_matched"]["pooled"]["accuracy"]["delta"]["value"]
    assert var.cells[0, "beyond_shift"].value == pytest.approx(100 * beyond)
    assert table.rows[0].cells[1, "words"].delta is None
    assert table.rows[0].cost["passes_per_token_ratio"] == 1.0


def test_one_split_has_its_test(world: Path, tmp_path: Path) -> None:
    run(world, tmp_path / "run", ["var"], tasks=["pope"], splits=["random"])
    results = read_runs(tmp_path)["run"]
    table = one(make_card(read_runs(tmp_path)))
    expected = results["tasks"]["pope"]["arms"]["var"]["delta"]["random"]["mcnemar"]["p"]
    assert table.rows[1].cells[0, "accuracy"].p == expected < 1


def test_a_pool_has_the_test_of_all_methods_or_of_none(world: Path, tmp_path: Path) -> None:
    """pai answers as the base does, so its test fits its difference (none); var's does not."""

    def pai_is_base(method: Any, sample: Any) -> Any:
        return reply(None if method == "pai" else method, sample)

    where = {"data": world, "output": tmp_path / "run"}
    results = vlmfix.evals.evaluate(
        ["pope"], FakeModel(pai_is_base), ["var", "pai"], n_images=10, quiet=True, **where
    )  # fmt: skip
    arms = results["tasks"]["pope"]["arms"]
    test, n = arms["var"]["delta"]["pooled"]["mcnemar"], arms["var"]["counts"]["pooled"]["n"]
    difference = arms["var"]["delta"]["pooled"]["accuracy"]["value"] * n
    assert round(difference) != test["better"] - test["worse"]  # so that there is something to see
    table = one(make_card(read_runs(tmp_path)))
    assert [row.cells[0, "accuracy"].p for row in table.rows] == [None, None, None]


def test_runs_with_equal_settings_share_columns(world: Path, tmp_path: Path) -> None:
    run(world, tmp_path / "a", ["var"])
    run(world, tmp_path / "b", ["pai"])
    run(world, tmp_path / "c", ["pai"], tasks=["chair"], max_new_tokens=64)
    table = one(make_card(read_runs(tmp_path)))
    assert [row.method for row in table.rows] == ["base", "var", "pai"]
    assert [block.task for block in table.blocks] == ["pope", "chair", "chair"]
    headings = [title for *_, title in columns(table)]
    assert "POPE accuracy %" in headings
    assert {"CHAIRs % (2)", "CHAIRs % (3)"} <= set(headings)
    assert (2, "chair_s") not in table.rows[1].cells
    text = to_markdown([table])
    assert "(3) CHAIR, caption, 10 images, of world, up to 64 tokens, greedy" in text


def test_runs_that_disagree_are_kept_apart(world: Path, tmp_path: Path) -> None:
    run(world, tmp_path / "a", ["var"], tasks=["chair"])
    run(world, tmp_path / "b", ["var"], tasks=["chair"])
    path = tmp_path / "b" / "results.json"
    changed = json.loads(path.read_text())
    changed["tasks"]["chair"]["arms"]["var"]["scores"]["caption"]["recall"]["value"] = 0.123
    path.write_text(json.dumps(changed))
    table = one(make_card(read_runs(tmp_path)))
    assert [row.method for row in table.rows] == ["base", "var [a]", "var [b]"]
    assert table.rows[2].cells[0, "recall"].value == pytest.approx(12.3)


def test_other_models_and_seeds_do_not_mix(world: Path, tmp_path: Path) -> None:
    run(world, tmp_path / "a", ["var"], tasks=["chair"])
    run(world, tmp_path / "b", ["var"], tasks=["chair"], seed=1)
    path = tmp_path / "b" / "results.json"
    assert len(one(make_card(read_runs(tmp_path))).blocks) == 2
    changed = json.loads(path.read_text())
    changed["config"]["model"] = "another"
    path.write_text(json.dumps(changed))
    assert [t.title for t in make_card(read_runs(tmp_path))] == [
        "fake, float32, cpu",
        "another, float32, cpu",
    ]


def test_partial_runs_are_marked_and_kept_apart(world: Path, tmp_path: Path) -> None:
    run(world, tmp_path / "whole", ["var"], tasks=["chair"])
    run(world, tmp_path / "part", ["var"], tasks=["chair"], limit=4)
    table = one(make_card(read_runs(tmp_path)))
    assert sorted(block.partial for block in table.blocks) == [False, True]
    text = to_markdown([table])
    assert "## PARTIAL: fake" in text
    assert "4 images, of world, up to 512 tokens, greedy" in text
    assert text.count("PARTIAL, not to be compared with whole runs") == 1


def test_files(both: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, _ = both
    files = report(folder, tmp_path / "out")
    names = ["card.md", "card.json", "card.csv", "forest.png", "chair.png"]
    assert [path.name for path in files] == names
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(names)
    table = one(make_card(read_runs(folder)))
    with (tmp_path / "out" / "card.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["base", "var", "pai"]
    cell = table.rows[1].cells[1, "chair_i"]
    assert float(rows[1]["CHAIRi %"]) == cell.value
    assert float(rows[1]["CHAIRi % delta"]) == cell.delta
    assert rows[0]["CHAIRi % delta"] == ""
    stored = json.loads((tmp_path / "out" / "card.json").read_text())
    figures = stored["tables"][0]["rows"][1]["figures"]
    (figure,) = [f for f in figures if (f["block"], f["metric"]) == (1, "chair_i")]
    assert figure["value"] == cell.value and figure["delta_ci"] == list(cell.delta_ci or ())
    text = (tmp_path / "out" / "card.md").read_text()
    assert f"| {cell.value:.1f} [" in text and "![](forest.png)" in text
    for name in ("forest.png", "chair.png"):
        with Image.open(tmp_path / "out" / name) as picture:
            assert np.asarray(picture.convert("L")).std() > 5
    assert len(report(folder, tmp_path / "plain", plots=False)) == 3


def test_forest_shows_each_difference_with_its_interval(both: tuple[Path, dict[str, Any]]) -> None:
    table = one(make_card(read_runs(both[0])))
    panels = [axes for axes in draw_forest(table).axes if axes.get_visible()]
    titles = [panel.get_title() for panel in panels]
    assert titles == ["POPE accuracy", "POPE F1", "POPE yes", "CHAIRs", "CHAIRi", "CHAIR recall"]
    cell = table.rows[2].cells[1, "chair_i"]
    zero, _, _, line, mark = panels[4].lines
    assert tuple(line.get_xdata()) == pytest.approx(cell.delta_ci)
    assert tuple(mark.get_xdata()) == pytest.approx([cell.delta])
    assert tuple(mark.get_ydata()) == (1,)


def test_chair_picture_has_captions_of_all_lengths(both: tuple[Path, dict[str, Any]]) -> None:
    table = one(make_card(read_runs(both[0])))
    figure = draw_chair(table)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["base", "var", "pai"]
    mark = next(line for line in figure.axes[0].lines if line.get_label() == "var")
    cells = table.rows[1].cells
    point = (cells[1, "recall"].value, cells[1, "chair_i"].value)
    assert (mark.get_xdata()[0], mark.get_ydata()[0]) == pytest.approx(point)


def test_tables_without_methods_or_captions(world: Path, tmp_path: Path) -> None:
    run(world, tmp_path / "run", [], tasks=["pope"])
    table = one(make_card(read_runs(tmp_path)))
    assert draw_forest(table) is None and draw_chair(table) is None
    assert [path.name for path in report(tmp_path)] == ["card.md", "card.json", "card.csv"]


def test_scored_files_have_a_card(both: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    files = [{"": both[0] / "run" / f"samples_pope_{arm}.jsonl"} for arm in ("var", "base")]
    results = score("pope", *files)
    (tmp_path / "results.json").write_text(json.dumps(results))
    table = one(make_card(read_runs(tmp_path)))
    assert [row.method for row in table.rows] == ["base", "method"]
    assert table.rows[1].cost == {}
    assert "passes" not in to_markdown([table])


def test_warnings_reach_the_card(world: Path, tmp_path: Path) -> None:
    def mute(method: Any, sample: Any) -> Any:
        return "" if method == "var" else reply(method, sample)

    vlmfix.evals.evaluate(
        ["chair"],
        FakeModel(mute),
        ["var"],
        data=world,
        output=tmp_path / "r",
        n_images=10,
        quiet=True,
    )
    text = to_markdown(make_card(read_runs(tmp_path)))
    assert "WARNING var: chair: 100% of the answers empty (base" in text


def test_folders_that_hold_nothing_to_report(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is no folder"):
        report(tmp_path / "nowhere")
    with pytest.raises(BadInput, match="no results.json"):
        report(tmp_path)
    (tmp_path / "results.json").write_text('{"hallucination_heads": []}')
    with pytest.raises(BadInput, match="no results.json"):
        report(tmp_path)
    (tmp_path / "results.json").write_text('{"tasks": ')
    with pytest.raises(BadInput, match="is not JSON"):
        report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def changed(results: dict[str, Any], place: str, value: Any) -> str:
    """results.json with another value at a place; ... takes it out."""
    copy = json.loads(json.dumps(results))
    *path, last = place.split("/")
    inner = copy
    for name in path:
        inner = inner[name]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return json.dumps(copy)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("tasks", [], r"tasks is \[\], not dict"),
        ("tasks/pope", {}, "tasks.pope has no arms"),
        ("tasks/pope/arms", {}, "tasks.pope.arms is empty"),
        ("tasks/nosuch", {"arms": {}, "partial": False, "n_images": 1}, "arms is empty"),
        ("config", None, "config is None, not dict"),
        ("tasks/pope/n_images", "<script>", "n_images is '<script>', not int"),
        ("tasks/pope/partial", "no", "partial is 'no', not bool"),
        ("tasks/pope/arms/base/scores/pooled/f1/value", "x", "f1.value is 'x', not int or float"),
        ("tasks/pope/arms/base/scores/pooled/f1/ci", [1], r"f1.ci is \[1\], not 2 values"),
        ("tasks/pope/arms/var/delta/pooled/f1", ..., "arms.var.delta.pooled has no f1"),
        ("tasks/pope/arms/var/delta/pooled/mcnemar", {}, "mcnemar has no p"),
        ("tasks/pope/arms/var/counts/pooled", {}, "counts.pooled has no n"),
        ("tasks/pope/arms/base/cost", {}, "cost has no new_tokens"),
        ("tasks/pope/arms/base/warnings", [1], r"warnings\[0\] is 1, not str"),
        ("tasks/pope/gen_kwargs/do_sample", True, "gen_kwargs has no temperature"),
        ("tasks/chair/arms/base/scores/caption/recall", ..., "not both chair_i and recall"),
    ],
)
def test_broken_results_are_refused_by_place(
    both: tuple[Path, dict[str, Any]], tmp_path: Path, place: str, value: Any, message: str
) -> None:
    (tmp_path / "results.json").write_text(changed(both[1], place, value))
    with pytest.raises(BadInput, match=rf"results\.json: .*{message}"):
        report(tmp_path, plots=False)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize("content", ["[" * 200_000, "\xff", '{"a": 1, "a": 2}', "{", ""])
def test_results_that_are_no_json_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "results.json").write_text(content, encoding="latin-1")
    with pytest.raises(BadInput, match=r"results\.json"):
        report(tmp_path, plots=False)


def test_names_in_a_card_are_text(both: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """A results.json may be anybody's, and a viewer of Markdown shows HTML."""
    evil = "x\n# Heading\n<script>alert(1)</script> [a](javascript:b)|&lt;b&gt;"
    results = json.loads(json.dumps(both[1]))
    results["config"]["model"] = evil
    entry = results["tasks"]["pope"]
    entry["data"] = evil
    entry["arms"][evil] = {**entry["arms"]["var"], "warnings": [evil]}
    (tmp_path / "results.json").write_text(json.dumps(results))
    text = report(tmp_path, plots=False)[0].read_text()
    table = vlmfix.evals.to_markdown(results)
    for shown in (text, table):
        assert evil.split("\n")[2] not in shown and "<script" not in shown
        assert "&lt;script>alert(1)&lt;/script>" in shown
        assert "](" not in shown and "&lt;b" not in shown.replace("&amp;lt;b", "")
        assert not [line for line in shown.split("\n") if line.startswith("# Heading")]
    row = next(line for line in text.split("\n") if line.startswith("| x # Heading"))
    assert (
        row.replace("\\|", "").count("|") == text.split("\n| base")[1].split("\n")[0].count("|") + 1
    )


def test_half_a_surrogate_pair_is_written_as_json_escapes_it(
    both: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    results = {**both[1], "config": {**both[1]["config"], "model": "\ud800"}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    files = report(tmp_path, plots=False)
    assert json.loads(files[1].read_text())["tables"][0]["title"].startswith("\ud800")
    assert "\\ud800" in files[0].read_text()


def test_the_table_compares_with_greedy_too(world: Path, tmp_path: Path) -> None:
    sampled = {"temperature": 1.0, "seeds": 2, "greedy_too": True}
    results = run(world, tmp_path / "run", ["var"], tasks=["pope"], splits=["random"], **sampled)
    text = vlmfix.evals.to_markdown(results)
    entry = results["tasks"]["pope"]
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("| to greedy | "))
    rows = {line.split(" | ")[1].strip(): line for line in lines[first : first + 3]}
    assert set(rows) == set(entry["against_greedy"]) == {"base", "var", "var greedy"}
    for arm, line in rows.items():
        delta = entry["against_greedy"][arm]["delta"]["random"]["accuracy"]["value"]
        assert f"{100 * delta:+.1f}" in line
