"""Results as a terminal table, as Markdown and as a file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmfix.evals.tasks import Column, get_task

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["render", "to_markdown", "write_json"]


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
    """Results as rich tables, one per task, for a terminal of 120 columns."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    parts: list[RenderableType] = []
    for name, entry in results["tasks"].items():
        headings, sections = _table(name, entry)
        table = Table(
            title=Text(_title(results, name, entry)),
            caption=Text(_caption(results, name, entry), justify="left"),
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            pad_edge=False,
            title_justify="left",
            caption_justify="left",
        )
        for i, heading in enumerate(headings):
            # Only the name of an arm may be long, so only it may wrap.
            table.add_column(
                heading,
                justify="left" if i < 2 else "right",
                no_wrap=i != 1,
                overflow="fold",
                min_width=min(14, max(map(len, entry["arms"]))) if i == 1 else None,
            )
        for rows in sections:
            for i, row in enumerate(rows):
                table.add_row(*map(Text, row), end_section=i == len(rows) - 1)
        parts.append(table)
    return Group(*parts)


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
        f"{partial}{name.upper()} on {results['config']['data']}, {results['config']['model']}, "
        f"{entry['n_images']} images, {entry['n_samples']} items"
    )


def _caption(results: Mapping[str, Any], name: str, entry: Mapping[str, Any]) -> str:
    arms = entry["arms"]
    facts = [f"{key.replace('_', ' ')} {entry[key]}" for key in _FACTS if entry.get(key)]
    lines = [
        "; ".join([*facts, "greedy"]),
        "± half a 95 % interval (bootstrap over images); Δ to base, paired; p exact McNemar; "
        "passes: forward passes per answer; tok/s: new tokens per second.",
    ]
    for arm, scored in arms.items():
        notes = [f"{scored[key]} {word}" for key, word in _COUNTS.items() if scored.get(key)]
        if arm != "base" and scored["same_as_base"] == 1:
            notes.append("every answer is the base's")
        notes += scored["flags"]
        if notes:
            lines.append(f"{arm}: {', '.join(notes)}")
    return "\n".join(lines)


_FACTS = ("prompt_style", "parser", "engine", "ground_truth", "truncate")
_COUNTS = {"n_errors": "failed", "n_unparsed": "unparsed", "n_empty": "empty"}


def _table(name: str, entry: Mapping[str, Any]) -> tuple[list[str], list[list[list[str]]]]:
    """Headings, and per place one section of rows, one row per arm."""
    columns = get_task(name).columns
    arms = entry["arms"]
    headings = ["split", "arm"]
    for column in columns:
        headings.append(column.title + (" %" if column.percent else ""))
        headings += ["Δ"] if column.delta else []
        headings += ["p"] if column.tested else []
    headings += ["passes", "tok/s"]
    sections = [
        [
            [place if arm == "base" else "", arm]
            + [
                cell
                for column in columns
                for cell in _cells(
                    column, scored["scores"][place], scored.get("delta", {}).get(place)
                )
            ]
            + [
                f"{scored['cost']['passes_per_answer']:.1f}",
                f"{scored['cost']['tokens_per_second']:.0f}",
            ]
            for arm, scored in arms.items()
        ]
        for place in arms["base"]["scores"]
    ]
    for arm, scored in arms.items():
        if "matched_length" in scored:
            sections.append(list(_matched(columns, arm, scored["matched_length"])))
    return headings, sections


def _matched(
    columns: tuple[Column, ...], arm: str, matched: Mapping[str, Any]
) -> Iterator[list[str]]:
    """Two rows: base and method, both cut to the shorter caption of each image."""
    for label, side, delta in (("base", "base", None), (arm, "method", matched["delta"])):
        yield [
            "same length" if side == "base" else "",
            label,
            *(
                cell
                for column in columns
                for place, scores in matched[side].items()
                for cell in _cells(column, scores, delta and delta[place])
            ),
            "",
            "",
        ]


def _cells(
    column: Column, scores: Mapping[str, Any], delta: Mapping[str, Any] | None
) -> Iterator[str]:
    scale = 100 if column.percent else 1
    plain = scores[column.metric]["value"]
    yield _figure(scores[column.metric], scale) if column.percent else f"{plain:.1f}"
    if column.delta:
        yield _figure(delta[column.metric], scale, sign=True) if delta else ""
    if column.tested:
        yield _p(delta["mcnemar"]["p"]) if delta and "mcnemar" in delta else ""


def _figure(score: Mapping[str, Any], scale: int, sign: bool = False) -> str:
    value = f"{score['value'] * scale:{'+' if sign else ''}.1f}"
    low, high = score["ci"] or (0.0, 0.0)
    # No spread between resamples is no certainty; only a difference can be exactly none.
    if score["ci"] is None or (low == high and not sign):
        return value
    return f"{value}±{(high - low) / 2 * scale:.1f}"


def _p(value: float) -> str:
    return "<.001" if value < 0.001 else f"{value:.3f}".removeprefix("0")
