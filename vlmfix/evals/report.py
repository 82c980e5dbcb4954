"""Results as a terminal table, as Markdown and as a file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmfix.evals.tasks import Column, get_task

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.table import Table

__all__ = ["render", "to_markdown", "write_json"]


_ARM_WIDTH = 16


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with draft.open("w", encoding="utf-8") as file:
            json.dump(content, file, indent=1, ensure_ascii=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def render(results: Mapping[str, Any]) -> RenderableType:
    """Results as rich tables, one per task.

    Made for 120 columns; in a narrower terminal the differences go below the values.
    """
    from rich.console import Group

    return Group(*(_TaskTable(results, name, entry) for name, entry in results["tasks"].items()))


class _TaskTable:
    """A rich renderable that fits its layout to the width it gets."""

    def __init__(self, results: Mapping[str, Any], name: str, entry: Mapping[str, Any]) -> None:
        self._results, self._name, self._entry = results, name, entry

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        wide = self._layout(stacked=False)
        # A table that is too wide would lose digits, not columns.
        fits = console.measure(wide, options=options.update(width=1000)).maximum
        yield wide if fits <= options.max_width else self._layout(stacked=True)

    def _layout(self, stacked: bool) -> Table:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        headings, sections = _table(self._name, self._entry, stacked)
        table = Table(
            title=Text(_title(self._results, self._name, self._entry)),
            caption=Text(_caption(self._results, self._name, self._entry), justify="left"),
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            pad_edge=False,
            title_justify="left",
            caption_justify="left",
        )
        for i, heading in enumerate(headings):
            # What does not fit goes on in the next line; nothing is ever cut off.
            table.add_column(
                heading,
                justify="left" if i < 2 else "right",
                overflow="fold",
                max_width=_ARM_WIDTH if i == 1 else None,
            )
        for rows in sections:
            for i, row in enumerate(rows):
                table.add_row(*map(Text, row), end_section=i == len(rows) - 1)
        return table


def to_markdown(results: Mapping[str, Any]) -> str:
    """Results as Markdown tables, one per task."""
    blocks = []
    for name, entry in results["tasks"].items():
        headings, sections = _table(name, entry)
        lines = [f"**{_title(results, name, entry)}**", "", _line(headings)]
        lines.append("|---|---|" + "---:|" * (len(headings) - 2))
        lines += [_line(row) for rows in sections for row in rows]
        blocks.append("\n".join([*lines, "", _caption(results, name, entry)]))
    return "\n\n".join(blocks) + "\n"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _title(results: Mapping[str, Any], name: str, entry: Mapping[str, Any]) -> str:
    partial = "PARTIAL: " if entry["partial"] else ""
    return (
        f"{partial}{name.upper()} on {entry['data']}, {results['config']['model']}, "
        f"{entry['n_images']} images, {entry['n_samples']} items"
    )


def _caption(results: Mapping[str, Any], name: str, entry: Mapping[str, Any]) -> str:
    arms = entry["arms"]
    facts = [f"{key.replace('_', ' ')} {entry[key]}" for key in _FACTS if entry.get(key)]
    cost = "passes: forward passes per answer; tok/s: new tokens per second."
    exact = "Δ to base, paired; p exact McNemar"
    if _several_seeds(entry):
        lines = [
            "± half a 95 % interval (bootstrap over images, each with the answers of all seeds); "
            f"sd: between seeds; {exact} by seed, joined by Rüger's rule; {cost}"
        ]
    else:
        lines = [f"± half a 95 % interval (bootstrap over images); {exact}; {cost}"]
    lines.insert(0, "; ".join([*facts, _decoding(entry["gen_kwargs"], results["config"])]))
    if "pooled" in arms["base"]["scores"]:
        lines.append(
            "pooled: p counts a question that stands in several splits once, the figures each time."
        )
    for arm, scored in arms.items():
        notes = [f"{scored[key]} {word}" for key, word in _COUNTS.items() if scored.get(key)]
        if arm != "base" and scored["same_as_base"] == 1:
            notes.append("every answer is the base's")
        notes += scored["flags"]
        if notes:
            lines.append(f"{arm}: {', '.join(notes)}")
    return "\n".join(lines)


def _decoding(gen_kwargs: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    if not gen_kwargs["do_sample"]:
        return "greedy"
    kept = "temperature {temperature:g}, top-p {top_p:g}, top-k {top_k}".format(**gen_kwargs)
    return f"sampled at {kept}; seeds {config['seeds']}, the same random numbers in every arm"


def _several_seeds(entry: Mapping[str, Any]) -> bool:
    places = entry["arms"]["base"]["scores"].values()
    return any("sd" in score for metrics in places for score in metrics.values())


_FACTS = ("prompt_style", "parser", "engine", "ground_truth", "truncate")
_COUNTS = {"n_errors": "failed", "n_unparsed": "unparsed", "n_empty": "empty"}


def _table(
    name: str, entry: Mapping[str, Any], stacked: bool = False
) -> tuple[list[str], list[list[list[str]]]]:
    """Headings, and per place one section of rows, one row per arm.

    Args:
        name: of the task.
        entry: its results.
        stacked: what goes with a value below it instead of in columns of its own.
    """
    columns = get_task(name).columns
    arms = entry["arms"]
    shown = _Shown(stacked, spread=_several_seeds(entry), compared=len(arms) > 1)
    headings = ["split", "arm"]
    for column in columns:
        headings.append(column.title + (" %" if column.percent else ""))
        headings += [] if stacked else shown.beside(column, "sd", "Δ", "p")
    headings += ["passes", "tok/s"]
    sections = []
    for place in arms["base"]["scores"]:
        rows = []
        for arm, scored in arms.items():
            delta = scored.get("delta", {}).get(place)
            cost = scored["cost"]
            rows.append(
                [
                    place if arm == "base" else "",
                    arm,
                    *_cells(columns, scored["scores"][place], delta, shown),
                    f"{cost['passes_per_answer']:.1f}",
                    f"{cost['tokens_per_second']:.0f}",
                ]
            )
        sections.append(rows)
    for arm, scored in arms.items():
        for place, base in scored.get("matched_length", {}).get("base", {}).items():
            matched = scored["matched_length"]
            method = _cells(columns, matched["method"][place], matched["delta"][place], shown)
            sections.append(
                [
                    ["same length", "base", *_cells(columns, base, None, shown), "", ""],
                    ["", arm, *method, "", ""],
                ]
            )
    return headings, sections


@dataclass(frozen=True)
class _Shown:
    """What a table shows with each value.

    Args:
        stacked: below it, not in columns of its own.
        spread: the standard deviation between seeds.
        compared: the difference to the base, and the p value of the first metric.
    """

    stacked: bool
    spread: bool
    compared: bool

    def beside(self, column: Column, sd: str, delta: str, p: str) -> list[str]:
        """Those of the three that this column has."""
        found = [sd] if self.spread else []
        found += [delta] if self.compared and column.delta else []
        return found + ([p] if self.compared and column.tested else [])


def _cells(
    columns: tuple[Column, ...],
    scores: Mapping[str, Any],
    delta: Mapping[str, Any] | None,
    shown: _Shown,
) -> Iterator[str]:
    for column in columns:
        scale = 100 if column.percent else 1
        score = scores[column.metric]
        value = _figure(score, scale) if column.percent else f"{score['value']:.1f}"
        change = _figure(delta[column.metric], scale, sign=True) if delta else ""
        p = _p(delta["mcnemar"]["p"]) if delta and "mcnemar" in delta else ""
        sd = f"{score['sd'] * scale:.1f}" if "sd" in score else ""
        if shown.stacked:
            below = shown.beside(column, sd and f"sd {sd}", change, p and f"p {p}")
            yield "\n".join([value, *filter(None, below)])
        else:
            yield from [value, *shown.beside(column, sd, change, p)]


def _figure(score: Mapping[str, Any], scale: int, sign: bool = False) -> str:
    value = f"{score['value'] * scale:{'+' if sign else ''}.1f}"
    low, high = score["ci"] or (0.0, 0.0)
    # No spread between resamples is no certainty; only a difference can be exactly none.
    if score["ci"] is None or (low == high and not sign):
        return value
    return f"{value}±{(high - low) / 2 * scale:.1f}"


def _p(value: float) -> str:
    return "<.001" if value < 0.001 else f"{value:.3f}".removeprefix("0")
