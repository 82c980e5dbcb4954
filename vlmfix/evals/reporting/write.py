"""The score card as Markdown, JSON and csv, and as files: `vlmfix report`."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmfix.evals.reporting.card import Block, Card, Cell, Table, columns, make_card, read_runs
from vlmfix.evals.reporting.report import decoding, markdown_line, markdown_text, p_text
from vlmfix.evals.running.files import write_json, write_text

__all__ = ["report", "to_csv", "to_json", "to_markdown", "write_card"]

FORMAT = 1

_COSTS = {"passes_per_token": "passes", "tokens_per_second": "tokens/s", "peak_gpu_mib": "peak GPU"}


def to_markdown(card: Card, pictures: Mapping[int, Sequence[str]] | None = None) -> str:
    """The card as Markdown.

    Args:
        card: from `make_card`.
        pictures: number of a table -> files to show below it.
    """
    parts = ["# Score card"]
    for number, table in enumerate(card):
        shown = columns(table)
        costs = {
            key: title
            for key, title in _COSTS.items()
            if any(f"{key}_ratio" in row.cost for row in table.rows)
        }
        headings = ["method", *(title for *_, title in shown), *costs.values()]
        lines = [markdown_line(headings), "|---|" + "---:|" * (len(headings) - 1)]
        for row in table.rows:
            cells = [_text(row.cells.get((block, metric))) for block, metric, _ in shown]
            ratios = [row.cost.get(f"{key}_ratio") for key in costs]
            cells += ["" if ratio is None else f"{ratio:.2f}x" for ratio in ratios]
            lines.append(markdown_line([row.method, *cells]))
        title = f"{'PARTIAL: ' if table.partial else ''}{table.title}"
        parts += [f"## {markdown_text(title)}", "\n".join(lines), _legend(table, bool(costs))]
        parts += [f"![]({picture})" for picture in (pictures or {}).get(number, ())]
    return "\n\n".join(parts) + "\n"


def _text(cell: Cell | None) -> str:
    if cell is None:
        return ""
    text = f"{cell.value:.1f}"
    if cell.ci is not None:
        text += f" [{cell.ci[0]:.1f}, {cell.ci[1]:.1f}]"
    beside = [] if cell.delta is None else [f"{cell.delta:+.1f}"]
    if cell.delta_ci is not None:
        beside[0] += f"±{(cell.delta_ci[1] - cell.delta_ci[0]) / 2:.1f}"
    beside += [] if cell.p is None else [f"p {p_text(cell.p)}"]
    return f"{text} ({', '.join(beside)})" if beside else text


def _legend(table: Table, costs: bool) -> str:
    lines = [
        "value [95 % interval, bootstrap over images] (paired difference to base ± half its "
        "interval; exact McNemar p with Holm's correction over the methods of this table, but not "
        "for a pool of splits that share questions)"
    ]
    for number, block in enumerate(table.blocks, start=1):
        lines.append(f"({number}) {_settings(block)}")
    if any(metric == "beyond_shift" for _, metric, _ in columns(table)):
        lines.append(
            "beyond a shift: accuracy over that of the base with its yes-logit shifted until it "
            "says yes as often; AUC: of the probability of yes"
        )
    if costs:
        lines.append(
            "passes per token, tokens per second, peak memory of the GPU: ratios to the base"
        )
    lines += [
        f"WARNING {row.method}: {'; '.join(row.warnings)}" for row in table.rows if row.warnings
    ]
    return "\n".join(f"- {markdown_text(line)}" for line in lines)


def _settings(block: Block) -> str:
    facts = [block.task.upper(), block.place, f"{block.n_images} images"]
    if data := block.settings.get("data"):
        facts.append(f"of {data}")
    if kwargs := block.settings.get("gen_kwargs"):
        facts += [f"up to {kwargs['max_new_tokens']} tokens", decoding(kwargs, block.settings)]
    facts += [
        f"{key.replace('_', ' ')} {block.settings[key]}"
        for key in _SHOWN
        if block.settings.get(key)
    ]
    return ", ".join(facts) + (
        ": PARTIAL, not to be compared with whole runs" if block.partial else ""
    )


_SHOWN = ("prompt_style", "parser", "engine", "ground_truth", "truncate")


def to_json(card: Card) -> dict[str, Any]:
    """The card as JSON-able data."""
    return {
        "format": FORMAT,
        "tables": [
            {
                "title": table.title,
                "partial": table.partial,
                "blocks": [
                    {
                        "task": block.task,
                        "place": block.place,
                        "partial": block.partial,
                        "n_images": block.n_images,
                        "settings": dict(block.settings),
                    }
                    for block in table.blocks
                ],
                "rows": [
                    {
                        "method": row.method,
                        "is_base": row.is_base,
                        "figures": [
                            {"block": number, "metric": metric, **vars(cell)}
                            for (number, metric), cell in row.cells.items()
                        ],
                        "cost": row.cost,
                        "warnings": row.warnings,
                    }
                    for row in table.rows
                ],
            }
            for table in card
        ],
    }


_FIRST = ("table", "partial", "method")
_ENDS = ("", " low", " high", " delta", " delta low", " delta high", " p")


def to_csv(card: Card) -> str:
    """The card as csv: one row per method, a column per number."""
    rows: list[dict[str, Any]] = []
    names: dict[str, None] = {}
    for table in card:
        titles = {(block, metric): title for block, metric, title in columns(table)}
        names |= dict.fromkeys(title + end for title in titles.values() for end in _ENDS)
        for row in table.rows:
            flat = dict(zip(_FIRST, (table.title, table.partial, row.method), strict=True))
            for key, cell in row.cells.items():
                ci, delta_ci = cell.ci or (None, None), cell.delta_ci or (None, None)
                numbers = (cell.value, *ci, cell.delta, *delta_ci, cell.p)
                flat |= {titles[key] + end: x for end, x in zip(_ENDS, numbers, strict=True)}
            rows.append({**flat, **row.cost})
    known = {key for row in rows for key, value in row.items() if value is not None}
    costs = sorted(
        {key for row in rows for key in row} - set(names) - {"table", "partial", "method"}
    )
    fields = ["table", "partial", "method", *(name for name in names if name in known), *costs]
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_card(card: Card, folder: Path, plots: bool) -> list[Path]:
    """Write card.md, card.json and card.csv into a folder that exists, and pictures if asked.

    Returns:
        The files.

    Raises:
        MissingDependency: plots without matplotlib.
    """
    pictures: dict[int, list[str]] = {}
    if plots:
        from vlmfix.evals.reporting.plots import draw_card

        pictures = draw_card(card, folder)
    files = [folder / name for name in ("card.md", "card.json", "card.csv")]
    write_text(files[0], to_markdown(card, pictures))
    write_json(files[1], to_json(card))
    write_text(files[2], to_csv(card))
    return [*files, *(folder / name for names in pictures.values() for name in names)]


def report(folder: str | Path, output: str | Path | None = None, plots: bool = True) -> list[Path]:
    """`vlmfix report`: the card of a run, or of a folder of runs, as files.

    Args:
        folder: with results.json, or with folders that have one.
        output: where the files go; None: `folder`.
        plots: draw forest.png, and chair.png where there are captions.

    Returns:
        The files, card.md first.

    Raises:
        BadInput: as `read_runs`.
        MissingDependency: plots without matplotlib; nothing has been written then.
    """
    if plots:
        from vlmfix.evals.reporting.head_plots import require_matplotlib

        require_matplotlib()
    card = make_card(read_runs(folder))
    target = Path(output or folder)
    target.mkdir(parents=True, exist_ok=True)
    return write_card(card, target, plots)
