"""What the command line prints: JSON, or rich renderables made from plain data. No torch here."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from vlmfix.registry import MethodInfo

__all__ = [
    "answers",
    "attribution",
    "calibration",
    "changed_words",
    "doctor",
    "facts",
    "failure",
    "method",
    "methods",
    "only_stderr",
    "report",
    "suite",
    "to_json",
]


def report(as_json: bool, data: Any, shown: RenderableType) -> None:
    """Print `data` as JSON, or what is to be seen of it."""
    if as_json:
        text = to_json(data)
        # An escape that is JSON's own, where stdout's encoding lacks a character.
        print(text if _fits(text) else to_json(data, ascii=True))
    else:
        Console().print(shown, markup=False, highlight=False)


@contextlib.contextmanager
def only_stderr(active: bool) -> Iterator[None]:
    """Keep what libraries print out of stdout, which is for the JSON document alone."""
    with contextlib.redirect_stdout(sys.stderr) if active else contextlib.nullcontext():
        yield


def _fits(text: str) -> bool:
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def to_json(value: Any, ascii: bool = False) -> str:
    """One JSON document: dataclasses as objects, numbers that are not finite as null."""
    return json.dumps(_plain(value), indent=2, ensure_ascii=ascii, allow_nan=False)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def methods(rows: Sequence[MethodInfo]) -> RenderableType:
    """The table of methods."""
    table = _table("name", "stage", "what it does", "needs", "paper")
    for row in rows:
        name = ", ".join((row.name, *row.aliases))
        table.add_row(name, row.stage, row.summary, "; ".join(row.needs) or "-", row.paper)
    return table


def method(info: Mapping[str, Any]) -> RenderableType:
    """One method: its documentation, options and presets."""
    options = _table("option", "default", "type", "what it is")
    for option in info["options"]:
        cells = (option["name"], option["default"], option["type"], option["help"])
        options.add_row(*(Text(str(cell)) for cell in cells))
    head = Text.assemble((info["name"], "bold"), f" - {info['title']}\n{info['paper']}")
    parts: list[RenderableType] = [head, Text("\n" + info["doc"] + "\n"), options]
    if info["presets"]:
        parts.append(Text("\npresets"))
        parts += [Text("  " + _sentence(preset)) for preset in info["presets"]]
    return Group(*parts)


def doctor(report: Mapping[str, Any]) -> RenderableType:
    """What `vlmfix doctor` found: the model's facts, then which methods fit."""
    rest = {key: value for key, value in report.items() if key != "methods"}
    if report.get("calibration"):
        rest["calibration"] = _measured(report["calibration"])
    fits = _table("method", "fits", "why")
    for row in report.get("methods", ()):
        mark = Text("yes", "green") if row["fits"] else Text("no", "red")
        fits.add_row(row["name"], mark, Text(str(row["why"] or "")))
    return Group(facts(rest), fits)


def calibration(values: Mapping[str, Any]) -> RenderableType:
    """What `vlmfix calibrate` knows of a model; what was never measured is left out."""
    return facts(_measured(values))


def _measured(values: Mapping[str, Any]) -> dict[str, Any]:
    known = {
        key: value if value or value == 0 else "none"
        for key, value in values.items()
        if value is not None
    }
    if heads := values.get("vision_heads"):
        every = [(value, f"{i}.{j}") for i, row in enumerate(heads) for j, value in enumerate(row)]
        largest = sorted(every, reverse=True)[:5]
        known["vision_heads"] = "largest VHD in " + ", ".join(
            f"{name} ({value:.2f})" for value, name in largest
        )
    if heads := values.get("hallucination_heads"):
        known["hallucination_heads"] = [f"{layer}.{head}" for layer, head in heads]
    return known


_SHOWN_HEADS = 20


def attribution(results: Mapping[str, Any]) -> RenderableType:
    """What `vlmfix attribute` found: the hallucination heads first, then the next ones."""
    chosen = {tuple(pair) for pair in results["hallucination_heads"]}
    table = _table("head", "score", "95 % interval", "hallucinated", "present", "")
    for row in results["heads"][:_SHOWN_HEADS]:
        table.add_row(
            f"{row['layer']}.{row['head']}",
            f"{row['score']:+.3f}",
            f"{row['low']:+.3f} to {row['high']:+.3f}",
            f"{row['hallucinated']:+.3f}",
            f"{row['present']:+.3f}",
            "hallucination head" if (row["layer"], row["head"]) in chosen else "",
        )
    known = [row for row in results["heads"] if row["distinct"]]
    for_them = sum(row["score"] > 0 for row in known)
    lines = [
        f"{results['n_images']} images, {results['n_mentions']} objects named, "
        f"{results['n_hallucinated']} of them hallucinated; {results['forwards']} forwards, "
        f"{results['seconds']:.0f} s",
        "score: mean log-probability (nats) that hallucinated words lose without the head, minus "
        "what words for present objects lose",
        f"of {len(results['heads'])} scores, compared all at once, {for_them} are above 0 and "
        f"{len(known) - for_them} below it beyond chance (95 %)",
    ]
    if not chosen:
        lines.append("no head has a positive score, so there are no hallucination heads to name")
    if results.get("calibration"):
        lines.append(f"kept in {results['calibration']}")
    lines.append(f"written to {results['output']}")
    return Group(table, Text("\n".join(lines)))


def facts(values: Mapping[str, Any]) -> RenderableType:
    """Names and values, one per line."""
    table = Table.grid(padding=(0, 2))
    for key, value in values.items():
        table.add_row(Text(key.replace("_", " "), "bold"), Text(_sentence(value)))
    return table


def failure(results: Mapping[str, Any]) -> str:
    """How many items of an evaluation failed, and what the first of them said."""
    folder = Path(results["output"])
    texts = (path.read_text("utf-8") for path in sorted(folder.glob("samples_*.jsonl")))
    reasons = (json.loads(line)["error"] for text in texts for line in text.split("\n") if line)
    first = next((reason for reason in reasons if reason), "not recorded")
    return f"error: {results['errors']} items failed; the first: {first} (all: {folder})"


def suite(card: Mapping[str, Any]) -> RenderableType:
    """What `vlmfix eval --suite` did: the tables of its parts, what was left out, the files."""
    from vlmfix.evals.reporting.report import render

    left = [f"{name} is left out: {why}" for name, why in card["left_out"].items()]
    lines = [*left, *(f"written: {path}" for path in card["files"])]
    for part in card["parts"].values():
        if part["errors"]:
            lines.append(failure(part))
    return Group(*(render(part) for part in card["parts"].values()), Text("\n".join(lines)))


def answers(arms: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Answers under each other; words that differ from the first arm's stand out.

    Args:
        arms: Each with "method", "answer" and "last_call"; the first is the base.
    """
    table = Table(show_lines=True)
    table.add_column("method", overflow="fold", min_width=8, ratio=1)
    table.add_column("answer", ratio=4)
    table.add_column("what was done", ratio=4)
    base = arms[0]["answer"]
    for arm in arms:
        done = Text(_done(arm["last_call"]), "dim")
        table.add_row(Text(arm["method"]), changed_words(base, arm["answer"]), done)
    return table


def _done(call: Mapping[str, Any] | None) -> str:
    """What a call report says, in short."""
    if call is None:
        return "plain model"
    layers = ", ".join(map(str, call["rows_by_layer"]))
    extra = f" + {call['extra_passes']}" if call["extra_passes"] else ""
    lines = [
        f"{call['edited_rows']} rows edited" + (f", layers {layers}" if layers else ""),
        f"{call['new_tokens']} tokens, {call['passes']}{extra} passes, {call['seconds']:.2f} s",
    ]
    for notes in call["notes"].values():
        for what, by_layer in notes.items():
            counts = [_sentence(count) for count in by_layer.values()]
            if len(set(counts)) == 1:
                found = f"{counts[0]} in each layer"
            else:
                found = ", ".join(f"{at}: {n}" for at, n in zip(by_layer, counts, strict=True))
            lines.append(f"{what.replace('_', ' ')} {found}")
    for name, finding in call["pixels"].items():
        box = f"({', '.join(map(str, finding['box']))})"
        left = f"image left as it was, {finding['reason']}"
        lines.append(f"{name}: {f'box {box} enlarged' if finding['changed'] else left}")
    return "\n".join(lines)


def changed_words(base: str, answer: str) -> Text:
    """The answer, its words that the base does not have at that place in bold."""
    old, new = base.split(), answer.split()
    text = Text()
    matcher = difflib.SequenceMatcher(a=old, b=new, autojunk=False)
    for what, _, _, start, stop in matcher.get_opcodes():
        style = "" if what == "equal" else "bold yellow"
        for word in new[start:stop]:
            text.append(" " if text else "").append(word, style)
    return text


def _table(*columns: str) -> Table:
    table = Table()
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _sentence(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_sentence(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return " ".join(map(_sentence, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
