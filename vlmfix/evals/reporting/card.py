"""The score card: one row per method over all tasks, of one run or of a folder of runs.

Runs share a table where they asked the same model; their figures share a column where everything
that decides them is the same: data, items, prompts, parser, decoding, seeds. There is no mean over
tasks: it would add up percentages of different things.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vlmfix.errors import BadInput
from vlmfix.evals.reporting.report import headline
from vlmfix.evals.reporting.results import read_results
from vlmfix.evals.scoring.stats import holm
from vlmfix.evals.tasks import Column, get_task

__all__ = [
    "Block",
    "Card",
    "Cell",
    "Row",
    "Table",
    "columns",
    "heading",
    "make_card",
    "read_runs",
]

#: What a task's results hold next to the settings that decide them.
_NO_SETTING = [
    "against_greedy",
    "arms",
    "excluded",
    "image_ids",
    "n_images",
    "n_samples",
    "parsers",
    "partial",
]
_RUN_SETTINGS = ("seed", "temperature", "seeds", "limit")


@dataclass(frozen=True)
class Cell:
    """One figure of one method, in the unit of its column.

    Args:
        value: the metric, in percent where the column is.
        ci: its 95 % interval; None: too few images for one.
        delta: difference to the base; None for the base.
        delta_ci: its interval.
        p: exact McNemar, Holm-corrected for the methods of the table; None where there is no test
            of this difference.
    """

    value: float
    ci: tuple[float, float] | None
    delta: float | None = None
    delta_ci: tuple[float, float] | None = None
    p: float | None = None


@dataclass(frozen=True)
class Block:
    """The columns of one task under one set of settings.

    Args:
        task: name.
        place: which of the task's places is shown.
        columns: its metrics; "auc" and "beyond_shift" stand behind those of yes/no tasks.
        settings: everything that decides the figures.
        partial: a limit or errors left items out.
        n_images: how many images it is about.
    """

    task: str
    place: str
    columns: tuple[Column, ...]
    settings: Mapping[str, Any]
    partial: bool
    n_images: int


@dataclass
class Row:
    """One method.

    Args:
        method: name of its arm; with the run's name where runs disagree about it.
        cells: (number of the block, metric) -> figure.
        cost: "passes_per_token", "tokens_per_second", "peak_gpu_mib", and those as "_ratio" to the
            base of the same run; only what is known.
        warnings: of all tasks.
        is_base: it is what the others are compared with.
        caps: per block number, (words or None, recall cell, CHAIRi cell) by growing length of the
            captions, None for whole ones; CHAIR alone.
    """

    method: str
    is_base: bool
    cells: dict[tuple[int, str], Cell] = field(default_factory=dict)
    cost: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    caps: dict[int, list[tuple[int | None, Cell, Cell]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """One model.

    Args:
        title: model, dtype and device; or the files, where answers were scored.
        blocks: tasks, left to right.
        rows: methods, the base first.
    """

    title: str
    blocks: list[Block]
    rows: list[Row]

    @property
    def partial(self) -> bool:
        """Whether a block is."""
        return any(block.partial for block in self.blocks)


Card = list[Table]


def read_runs(folder: str | Path) -> dict[str, dict[str, Any]]:
    """Name of the run -> results, of every results.json in the folder and below.

    Raises:
        BadInput: no such folder, no results in it, or a file that is broken.
    """
    root = Path(folder)
    if not root.is_dir():
        raise BadInput(f"report: {root} is no folder: name the folder of a run, or of several")
    found = {}
    for path in sorted(root.rglob("results.json")):
        results = read_results(path)
        if results is None:
            continue  # of another command, such as attribute
        name = path.parent.relative_to(root).as_posix()
        found[root.resolve().name if name == "." else name] = results
    if not found:
        raise BadInput(
            f"report: no results.json in {root} or below: make some with `vlmfix eval ... --output "
            f"{root}`, or finish a run with --resume"
        )
    return found


def make_card(runs: Mapping[str, Mapping[str, Any]]) -> Card:
    """One table per model.

    Args:
        runs: name -> results, as `evaluate` and `score` return them.
    """
    by_title: dict[str, dict[str, Mapping[str, Any]]] = {}
    for name, results in runs.items():
        by_title.setdefault(_title(name, results["config"]), {})[name] = results
    return [_table(title, group) for title, group in by_title.items()]


def _title(name: str, config: Mapping[str, Any]) -> str:
    if "model" not in config:
        return f"answers of {name}"
    return ", ".join(str(config[key]) for key in ("model", "dtype", "device") if config.get(key))


def _table(title: str, runs: Mapping[str, Mapping[str, Any]]) -> Table:
    blocks: list[Block] = []
    found: list[tuple[str, int, Mapping[str, Any]]] = []  # run, block, entry of the task
    for name, results in runs.items():
        for task, entry in results["tasks"].items():
            block = _block(task, entry, results["config"])
            known = next((i for i, b in enumerate(blocks) if _same(b, block)), None)
            if known is None:
                known = len(blocks)
                blocks.append(block)
            found.append((name, known, entry))
    doubtful = _doubtful(found)
    rows: dict[str, Row] = {}
    for name, number, entry in found:
        base = next(iter(entry["arms"]))
        for arm, scored in entry["arms"].items():
            label = f"{arm} [{name}]" if arm in doubtful else arm
            row = rows.setdefault(label, Row(label, is_base=arm == base))
            _fill(row, number, blocks[number], scored)
    for name in runs:
        entries = [entry for run, _, entry in found if run == name]
        for arm in dict.fromkeys(arm for entry in entries for arm in entry["arms"]):
            row = rows[f"{arm} [{name}]" if arm in doubtful else arm]
            row.cost = row.cost or _cost(entries, arm)
    ordered = sorted(rows.values(), key=lambda row: not row.is_base)
    _correct(ordered)
    return Table(title, blocks, ordered)


def _block(task: str, entry: Mapping[str, Any], config: Mapping[str, Any]) -> Block:
    scored = next(iter(entry["arms"].values()))
    settings = {key: value for key, value in entry.items() if key not in _NO_SETTING}
    settings |= {key: config[key] for key in _RUN_SETTINGS if config.get(key) is not None}
    # Results of earlier versions name their data once for all tasks.
    settings |= {key: config[key] for key in ("data", "data_sha256") if key in config}
    return Block(
        task=task,
        place=headline(scored["scores"]) if scored["scores"] else "",
        columns=get_task(task).columns,
        settings=settings,
        partial=bool(entry["partial"]),
        n_images=entry["n_images"],
    )


def _same(one: Block, other: Block) -> bool:
    return (one.task, one.settings, one.partial) == (other.task, other.settings, other.partial)


def _doubtful(found: Sequence[tuple[str, int, Mapping[str, Any]]]) -> set[str]:
    """Arms that score differently in runs that should agree."""
    known: dict[tuple[int, str], Any] = {}
    return {
        arm
        for _, number, entry in found
        for arm, scored in entry["arms"].items()
        if known.setdefault((number, arm), scored["scores"]) != scored["scores"]
    }


def _fill(row: Row, number: int, block: Block, scored: Mapping[str, Any]) -> None:
    delta = scored.get("delta", {}).get(block.place)
    for column in block.columns:
        score = scored["scores"].get(block.place, {}).get(column.metric)
        if score is None:
            continue
        row.cells[number, column.metric] = _cell(
            100 if column.percent else 1,
            score,
            delta[column.metric] if delta and column.delta else None,
            _p(scored, block.place, column) if column.tested else None,
        )
    if area := scored.get("auc", {}).get(block.place):
        change = scored.get("auc_delta", {}).get(block.place)
        row.cells[number, "auc"] = _cell(100, area, change)
    if matched := scored.get("prior_matched", {}).get(block.place):
        row.cells[number, "beyond_shift"] = _cell(100, matched["accuracy"]["delta"])
    if "chair_i" in scored["scores"].get(block.place, {}):
        lengths = {int(cap): scores for cap, scores in scored.get("length_caps", {}).items()}
        row.caps[number] = [
            (cap, *_recall_and_chair(scores[block.place]))
            for cap, scores in [*sorted(lengths.items()), (None, scored["scores"])]
        ]
    for warning in scored.get("warnings", ()):
        row.warnings.append(f"{block.task}: {warning}")


def _p(scored: Mapping[str, Any], place: str, column: Column) -> float | None:
    """McNemar's p, where it is about the difference that stands next to it.

    Over a pool whose splits share questions it is not: the test counts such a question once, the
    figures count it in every split.
    """
    delta = scored.get("delta", {}).get(place, {})
    test = delta.get("mcnemar")
    if test is None:
        return None
    tests = test.get("by_seed", [test])
    changed = abs(sum(one["better"] - one["worse"] for one in tests))
    n = scored["counts"][place]["n"]
    return test["p"] if round(abs(delta[column.metric]["value"]) * n) == changed else None


def _recall_and_chair(scores: Mapping[str, Any]) -> tuple[Cell, Cell]:
    return _cell(100, scores["recall"]), _cell(100, scores["chair_i"])


def _cell(
    scale: int,
    score: Mapping[str, Any],
    delta: Mapping[str, Any] | None = None,
    p: float | None = None,
) -> Cell:
    def interval(one: Mapping[str, Any] | None) -> tuple[float, float] | None:
        return (one["ci"][0] * scale, one["ci"][1] * scale) if one and one["ci"] else None

    change = None if delta is None else delta["value"] * scale
    return Cell(score["value"] * scale, interval(score), change, interval(delta), p)


def _cost(entries: Sequence[Mapping[str, Any]], arm: str) -> dict[str, float]:
    """Cost of an arm over the tasks of one run, and its ratio to the base's over the same tasks."""
    tasks = [entry["arms"] for entry in entries if "cost" in entry["arms"].get(arm, {})]
    found = _total([arms[arm]["cost"] for arms in tasks])
    base = _total([next(iter(arms.values()))["cost"] for arms in tasks])
    ratios = {f"{key}_ratio": found[key] / base[key] for key in found if base.get(key)}
    return {**found, **ratios}


def _total(costs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    tokens = sum(cost["new_tokens"] for cost in costs)
    passes = sum(cost["passes_per_answer"] * cost["answers"] for cost in costs)
    timed = [cost for cost in costs if cost["tokens_per_second"]]
    seconds = sum(cost["new_tokens"] / cost["tokens_per_second"] for cost in timed)
    found = {}
    if tokens:
        found["passes_per_token"] = passes / tokens
    if seconds:
        found["tokens_per_second"] = sum(cost["new_tokens"] for cost in timed) / seconds
    # What a process held at most from its start on says nothing about one arm.
    if peaks := [cost["peak_gpu_mib"] for cost in costs if "peak_gpu_mib" in cost]:
        found["peak_gpu_mib"] = max(peaks)
    return found


def _correct(rows: Sequence[Row]) -> None:
    """Holm's correction of every column over its methods; none for a column without all its p."""
    for key in dict.fromkeys(key for row in rows for key in row.cells):
        methods = [row for row in rows if key in row.cells and row.cells[key].delta is not None]
        p_values = [p for row in methods if (p := row.cells[key].p) is not None]
        whole = len(p_values) == len(methods)
        adjusted = holm(p_values) if whole else [None] * len(methods)
        for row, p in zip(methods, adjusted, strict=True):
            row.cells[key] = replace(row.cells[key], p=p)


_CONTROLS = {"auc": "AUC", "beyond_shift": "beyond a shift"}


def columns(table: Table) -> list[tuple[int, str, str]]:
    """(number of the block, metric, heading) of every column that has a figure."""
    found = []
    for number, block in enumerate(table.blocks):
        titles = {c.metric: c.title + (" %" if c.percent else "") for c in block.columns}
        for metric, title in {**titles, **{k: f"{v} %" for k, v in _CONTROLS.items()}}.items():
            if any((number, metric) in row.cells for row in table.rows):
                found.append((number, metric, heading(table, number, title)))
    return found


def heading(table: Table, number: int, title: str) -> str:
    """A column's title with its task, and with the number of its block where a task has several."""
    task = table.blocks[number].task
    several = sum(other.task == task for other in table.blocks) > 1
    mark = f" ({number + 1})" if several else ""
    return (
        f"{title}{mark}"
        if title.upper().startswith(task.upper())
        else f"{task.upper()}{mark} {title}"
    )
