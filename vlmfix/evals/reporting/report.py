"""Results as a terminal table, as Markdown and as a file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlmfix.evals.tasks import Column, get_task

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.table import Table

__all__ = [
    "decoding",
    "headline",
    "markdown_line",
    "markdown_text",
    "p_text",
    "render",
    "to_markdown",
]

_ARM_WIDTH = 16

Scores = Mapping[str, Any]


def render(results: Mapping[str, Any]) -> RenderableType:
    """Results as rich tables, one per task.

    Made for 120 columns; in a narrower terminal the differences go below the values.
    """
    from rich.console import Group

    shown: list[RenderableType] = []
    for name, entry in results["tasks"].items():
        shown.append(_TaskTable(results, name, entry))
        if "parsers" in entry:
            table = _rich_table(*_parser_table(entry))
            table.title = _PARSERS_TITLE
            shown.append(table)
    return Group(*shown)


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
        from rich.text import Text

        table = _rich_table(*_table(self._name, self._entry, stacked))
        table.title = Text(_title(self._results, self._name, self._entry))
        caption = "\n".join(_caption(self._results, self._name, self._entry))
        table.caption = Text(caption, justify="left")
        return table


def _rich_table(headings: list[str], sections: list[list[list[str]]]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
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
        blocks += [
            f"**{markdown_text(_title(results, name, entry))}**",
            _markdown_table(*_table(name, entry)),
            "\n".join(map(markdown_text, _caption(results, name, entry))),
        ]
        if "parsers" in entry:
            blocks += [f"**{_PARSERS_TITLE}**", _markdown_table(*_parser_table(entry))]
    return "\n\n".join(blocks) + "\n"


def _markdown_table(headings: list[str], sections: list[list[list[str]]]) -> str:
    rule = "|---|---|" + "---:|" * (len(headings) - 2)
    return "\n".join(
        [markdown_line(headings), rule, *(markdown_line(row) for rows in sections for row in rows)]
    )


def markdown_line(cells: list[str]) -> str:
    """A row of a Markdown table, with the cells as text."""
    return "| " + " | ".join(markdown_text(cell).replace("|", "\\|") for cell in cells) + " |"


def markdown_text(text: str) -> str:
    """The text as one line of Markdown that shows it: no tags, no links, no heading.

    Names of models, methods and files are anybody's.
    """
    line = " ".join(text.split()).replace("&", "&amp;").replace("](", "]\\(")
    return _TAG.sub("&lt;", line)


#: What may begin a tag or a link; "<.001" is neither.
_TAG = re.compile(r"<(?=[A-Za-z/!?])")


def _title(results: Mapping[str, Any], name: str, entry: Mapping[str, Any]) -> str:
    partial = "PARTIAL: " if entry["partial"] else ""
    config = results["config"]
    # Results of earlier versions have one data set for all tasks; scored files have no model.
    data = entry["data"] if "data" in entry else config["data"]
    facts = [
        f"{partial}{name.upper()} on {data}",
        *([config["model"]] if "model" in config else []),
    ]
    return ", ".join([*facts, f"{entry['n_images']} images", f"{entry['n_samples']} items"])


def _caption(results: Mapping[str, Any], name: str, entry: Mapping[str, Any]) -> list[str]:
    """What stands below a table, line by line."""
    arms = entry["arms"]
    facts = [f"{key.replace('_', ' ')} {entry[key]}" for key in _FACTS if entry.get(key)]
    if "gen_kwargs" in entry:
        facts.append(decoding(entry["gen_kwargs"], results["config"]))
    exact = "; Δ to base, paired; p exact McNemar" if len(arms) > 1 else ""
    joined = exact and f"{exact} by seed, joined by Rüger's rule"
    cost = (
        "; passes: forward passes per answer; tok/s: new tokens per second" if _timed(arms) else ""
    )
    if _several_seeds(entry):
        how = (
            "± half a 95 % interval (bootstrap over images, each with the answers of all seeds); "
            f"sd: between seeds{joined}{cost}."
        )
    else:
        how = f"± half a 95 % interval (bootstrap over images){exact}{cost}."
    files = [f"{arm}: {names}" for arm, names in results["config"].get("answers", {}).items()]
    lines = ["; ".join(facts), *files, how]
    if "pooled" in _first(arms)["scores"]:
        lines.append(
            "pooled: p counts a question that stands in several splits once, the figures each time."
        )
    if any("prior_matched" in scored for scored in arms.values()):
        lines.append(
            "same yes: the base's yes-logit shifted by a constant until it says yes as often as "
            "the method; AUC: of the probability of yes, which no shift changes."
        )
    if "against_greedy" in entry:
        lines.append("to greedy: Δ and p to the base decoded greedily.")
    for number, (arm, scored) in enumerate(arms.items()):
        notes = [f"{scored[key]} {word}" for key, word in _COUNTS.items() if scored.get(key)]
        if number and scored["same_as_base"] == 1:
            notes.append("every answer is the base's")
        notes += scored["flags"]
        notes += [f"WARNING {warning}" for warning in scored.get("warnings", ())]
        if notes:
            lines.append(f"{arm}: {', '.join(notes)}")
    return list(filter(None, lines))


def _first(arms: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arm that the others are compared with."""
    found: Mapping[str, Any] = next(iter(arms.values()))
    return found


def _timed(arms: Mapping[str, Any]) -> bool:
    return any("cost" in scored for scored in arms.values())


def decoding(gen_kwargs: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    if not gen_kwargs["do_sample"]:
        return "greedy"
    kept = "temperature {temperature:g}, top-p {top_p:g}, top-k {top_k}".format(**gen_kwargs)
    return f"sampled at {kept}; seeds {config['seeds']}, the same random numbers in every arm"


def _several_seeds(entry: Mapping[str, Any]) -> bool:
    places = _first(entry["arms"])["scores"].values()
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
    curve = any("auc" in scored for scored in arms.values())
    headings += ["AUC %"] * curve + ["passes", "tok/s"] * _timed(arms)
    blank = [""] * (curve + 2 * _timed(arms))
    sections = []
    for place in _first(arms)["scores"]:
        rows: list[list[str]] = []
        for arm, scored in arms.items():
            delta = scored.get("delta", {}).get(place)
            area = scored.get("auc", {}).get(place)
            cost = scored.get("cost")
            rows.append(
                [
                    "" if rows else place,
                    arm,
                    *_cells(columns, scored["scores"][place], delta, shown),
                    *[_figure(area, 100) if area else ""] * curve,
                    *(_speed(cost) if cost else [""] * 2 * _timed(arms)),
                ]
            )
        sections.append(rows)
    for arm, scored in arms.items():
        sections += [
            [
                [what, "base", *_cells(columns, base, None, shown), *blank],
                ["", arm, *_cells(columns, method, delta, shown), *blank],
            ]
            for what, base, method, delta in _controls(scored)
        ]
    if greedy := entry.get("against_greedy"):
        place = headline(_first(arms)["scores"])
        sections.append(
            [
                [
                    "to greedy",
                    arm,
                    *_cells(columns, arms[arm]["scores"][place], compared["delta"][place], shown),
                    *blank,
                ]
                for arm, compared in greedy.items()
            ]
        )
    return headings, sections


_PARSERS_TITLE = "The same answers read by other rules"
_PARSED = ("accuracy", "precision", "recall", "f1", "yes_ratio")


def _parser_table(entry: Mapping[str, Any]) -> tuple[list[str], list[list[list[str]]]]:
    """Headings and sections: one row per parser and arm, over all splits."""
    headings = [
        "parser",
        "arm",
        *(f"{m.replace('_ratio', '')} %" for m in _PARSED),
        "unparsed",
        "empty",
    ]
    sections = []
    for parser, arms in entry["parsers"].items():
        rows: list[list[str]] = []
        for arm, scored in arms.items():
            place = headline(scored["scores"])
            cells = [_figure(scored["scores"][place][metric], 100) for metric in _PARSED]
            counts = scored["counts"][place]
            numbers = [f"{counts[name]:.0f}" for name in ("unparsed", "empty")]
            rows.append(["" if rows else parser, arm, *cells, *numbers])
        sections.append(rows)
    return headings, sections


def _speed(cost: Mapping[str, float]) -> list[str]:
    return [f"{cost['passes_per_answer']:.1f}", f"{cost['tokens_per_second']:.0f}"]


def headline(places: Iterable[str]) -> str:
    """The place that stands for a task where there is room for one: the pool, or the first."""
    names = list(places)
    return "pooled" if "pooled" in names else names[0]


def _controls(scored: Mapping[str, Any]) -> Iterator[tuple[str, Scores, Scores, Scores]]:
    """What, the base's scores, the method's, and the differences, of comparisons on equal terms."""
    for place, base in scored.get("matched_length", {}).get("base", {}).items():
        matched = scored["matched_length"]
        yield "same length", base, matched["method"][place], matched["delta"][place]
    if matched := scored.get("prior_matched"):
        both = {
            metric: parts
            for metric, parts in matched[headline(matched)].items()
            if metric != "shift"
        }
        base, method, delta = (
            {metric: parts[part] for metric, parts in both.items()}
            for part in ("base", "method", "delta")
        )
        yield "same yes", base, method, delta


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
        if column.metric not in scores:
            yield from ["", *([] if shown.stacked else shown.beside(column, "", "", ""))]
            continue
        score = scores[column.metric]
        plain = not column.percent and not column.delta
        value = f"{score['value']:.1f}" if plain else _figure(score, scale)
        change = _figure(delta[column.metric], scale, sign=True) if delta else ""
        p = p_text(delta["mcnemar"]["p"]) if delta and "mcnemar" in delta else ""
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


def p_text(value: float) -> str:
    return "<.001" if value < 0.001 else f"{value:.3f}".removeprefix("0")
