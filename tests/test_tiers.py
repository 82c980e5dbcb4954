"""What `make test` shows of every product of cases, checked on what pytest collects."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from itertools import combinations, product
from pathlib import Path
from typing import Any

import matrix
import pytest
import tiers
from matrix import ROWS, Row, primitive
from tiny import FAMILIES

HERE = Path(__file__).parent
MODES = {
    "test_left_padded_batch_equals_singles",
    "test_other_caches_equal_the_dynamic_cache",
    "test_modes_equal_without_cache",
    "test_streaming_and_prompt_lookup_equal_greedy",
    "test_chunked_prefill_equals_one_prefill",
}
GRAPH = "test_compiled_static_decoding_is_one_graph_and_equals_greedy"


class Collected:
    """Takes the items that a run of pytest collects."""

    def __init__(self) -> None:
        self.items: list[Any] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.items = session.items


def collect(path: Path, *plugins: object) -> list[Any]:
    """The items of a file, with the markers that choose their tier.

    A file that is not below this folder needs its conftest.py as a plugin.
    """
    collected = Collected()
    config = HERE.parent / "pyproject.toml"
    command = ["--collect-only", "-qq", "-p", "no:cacheprovider", "-c", str(config), str(path)]
    assert pytest.main(command, plugins=[collected, *plugins]) == pytest.ExitCode.OK
    return collected.items


@pytest.fixture(scope="module")
def items() -> list[Any]:
    return collect(HERE / "test_matrix.py")


def fast(item: Any) -> bool:
    return item.get_closest_marker("slow") is None


def runs(item: Any) -> bool:
    """Whether a case of the matrix compares something, and is not skipped or refused."""
    row, name, case = (
        item.callspec.params["row"],
        item.callspec.params["name"],
        item.callspec.params,
    )
    if name not in row.families or (name in ("gemma3", "paligemma") and "chunk" in case):
        return False
    return (row.chunks or "chunk" not in case) and (
        row.static or case.get("mode") != "static cache"
    )


def shown(item: Any) -> dict[str, Any]:
    case = item.callspec.params
    mode = item.originalname, case.get("mode"), case.get("chunk")
    return {"method": case["row"].name, "family": case["name"], "mode": mode}


def test_every_pair_of_method_family_and_mode_is_in_the_fast_tier(items: list[Any]) -> None:
    all_cases = [item for item in items if item.originalname in MODES and runs(item)]
    assert len({shown(item)["mode"] for item in all_cases}) == 9
    few = [item for item in all_cases if fast(item)]
    for one, other in combinations(("method", "family", "mode"), 2):
        wanted = {(shown(item)[one], shown(item)[other]) for item in all_cases}
        assert {(shown(item)[one], shown(item)[other]) for item in few} == wanted
        assert len(wanted) > 60
    assert {shown(item)["family"] for item in few} == set(FAMILIES)
    assert {shown(item)["method"] for item in few} == {row.name for row in ROWS}
    assert len(few) < len(all_cases) / 4


def test_every_method_is_compiled_on_llava_and_what_it_is_made_of_elsewhere(
    items: list[Any],
) -> None:
    compiled: dict[str, set[Any]] = defaultdict(set)
    wanted: dict[str, set[Any]] = defaultdict(set)
    for item in items:
        if item.originalname != GRAPH or not item.callspec.params["row"].static:
            continue
        row, name = item.callspec.params["row"], item.callspec.params["name"]
        wanted[name].add(row.name if name == "llava" else primitive(row))
        if fast(item):
            compiled[name].add(row.name if name == "llava" else primitive(row))
    assert compiled == wanted and wanted.keys() == {"llava", "qwen2_5_vl", "gemma3"}
    assert all(len(wanted["llava"]) > len(wanted[name]) > 5 for name in ("qwen2_5_vl", "gemma3"))


FILE = """
import matrix, pytest
from test_matrix import _cell

CELLS = [(row, family) for row in matrix.ROWS for family in row.families]

@pytest.mark.rotated(shows=_cell)
@pytest.mark.parametrize(("row", "name"), CELLS)
@pytest.mark.parametrize("mode", ["greedy", "beam", "no cache"])
def test_modes(row, name, mode):
    pass
"""


def test_a_new_row_of_the_matrix_is_in_the_fast_tier(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> None:
    # By its path: folders below have a conftest of the same name.
    conftest = pytestconfig.pluginmanager.get_plugin(str(HERE / "conftest.py"))
    new = Row("new", ROWS[0].strong, ROWS[0].identity, ROWS[0].null)
    monkeypatch.setattr(matrix, "ROWS", (*ROWS, new))
    (tmp_path / "test_new_row.py").write_text(FILE)
    cases = [shown(item) for item in collect(tmp_path, conftest) if fast(item)]
    mine = [case for case in cases if case["method"] == "new"]
    assert {case["family"] for case in mine} == set(FAMILIES)
    assert {case["mode"][1] for case in mine} == {"greedy", "beam", "no cache"}
    assert len(mine) < 2 * len(FAMILIES)


def test_the_fewest_cases_show_everything() -> None:
    axes = [range(8), range(6), range(7)]
    shown = [
        {frozenset(pair) for pair in combinations(enumerate(case), 2)} for case in product(*axes)
    ]
    chosen = tiers.fewest(shown)
    assert set().union(*(shown[at] for at in chosen)) == set().union(*shown)
    assert 56 <= len(chosen) < 80  # 8 x 7 is the least that a product of these sizes needs
    assert tiers.fewest(shown) == chosen
    assert tiers.fewest([]) == set()
    assert tiers.fewest([set(), {1}, {1}, {1, 2}]) == {3}


def test_two_parameters_show_values_and_more_show_pairs() -> None:
    def chosen(*sizes: int) -> set[int]:
        names = [chr(ord("a") + at) for at in range(len(sizes))]
        cases: list[Mapping[str, Any]] = [
            dict(zip(names, case, strict=True)) for case in product(*map(range, sizes))
        ]
        shows = tiers.values_or_pairs(cases)
        return tiers.fewest([frozenset(shows(case)) for case in cases])

    assert len(chosen(4, 3)) == 4
    assert len(chosen(2, 2, 2)) == 4
    assert len(chosen(5, 1, 3)) == 5  # what does not vary is no parameter
