"""The HTML of the demo, made from plain data. Every text goes through `escape`."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from vlmfix.demo.words import Word, differing
from vlmfix.registry import describe, list_methods

if TYPE_CHECKING:
    from PIL.Image import Image

    from vlmfix.demo.asking import Pane
    from vlmfix.engine.call import CallReport

__all__ = ["about", "alert", "examples", "figures", "legend", "panes", "progress", "status"]


def panes(
    shown: Sequence[Pane],
    words: Sequence[Sequence[Word]],
    truth: frozenset[str] | None,
    *,
    chosen: tuple[int, int] | None = None,
    facts: bool = True,
) -> str:
    """The answers side by side.

    Args:
        shown: the panes, the base first.
        words: the words of each pane.
        truth: the objects of an EmojiCOCO picture; None for other pictures.
        chosen: numbers of the pane and of its word that is pressed; None: no word.
        facts: whether to show speed and report below each answer.
    """
    parts = []
    for at, pane in enumerate(shown):
        busy = "" if pane.done else ' aria-busy="true"'
        below = f'<p class="facts">{escape(_facts(pane))}</p>{_done(pane.report)}' if facts else ""
        parts.append(
            f'<section class="pane" data-pane="{at}" aria-label="{escape(pane.name)}"{busy}>'
            f"<h3>{escape(pane.name)}</h3>{_answer(at, shown, words, truth, chosen)}{below}"
            "</section>"
        )
    return f'<div class="panes">{"".join(parts)}</div>'


def _answer(
    at: int,
    shown: Sequence[Pane],
    words: Sequence[Sequence[Word]],
    truth: frozenset[str] | None,
    chosen: tuple[int, int] | None,
) -> str:
    pane = shown[at]
    changed = differing(words[0], words[at], shown[0].done) if at else set()
    if shown[0].error:
        changed = set()
    buttons = []
    for number, word in enumerate(words[at]):
        marks = {
            "differs": number in changed,
            "absent": truth is not None and any(name not in truth for name in word.objects),
        }
        told = {"differs": "differs from base", "absent": "not in the picture"}
        classes = " ".join(["word", *(mark for mark, on in marks.items() if on)])
        title = ", ".join(told[mark] for mark, on in marks.items() if on)
        pressed = ' aria-pressed="true"' if chosen == (at, number) else ""
        hint = f' title="{title}"' if title else ""
        buttons.append(
            f'<button type="button" class="{classes}" data-pane="{at}" data-word="{number}"'
            f"{hint}{pressed}>{escape(word.text)}</button>"
        )
    error = f'<p class="error" role="alert">{escape(pane.error)}</p>' if pane.error else ""
    return f'<p class="answer">{" ".join(buttons)}</p>{error}'


def _facts(pane: Pane) -> str:
    """Speed and length of an answer in one line."""
    tokens = len(pane.tokens)
    if pane.error and not tokens:
        return ""
    speed = f"{tokens / pane.seconds:.0f} tokens/s" if tokens and pane.seconds else "waiting"
    facts = [f"{tokens} tokens", speed, f"{pane.passes} passes", f"{pane.seconds:.2f} s"]
    if pane.finish == "length":
        facts.append("cut at the limit")
    if pane.note:
        facts.append(f"changes nothing here: {pane.note}")
    return " · ".join(facts)


def _done(report: CallReport | None) -> str:
    """The report of `vlmfix.last_call`, folded."""
    if report is None:
        return ""
    rows: list[tuple[str, str]] = [("methods", " + ".join(report.methods))]
    if report.edited_rows:
        layers = ", ".join(map(str, report.rows_by_layer))
        rows.append(("attention rows edited", f"{report.edited_rows}, in layers {layers}"))
    if report.contrasted_rows:
        rows.append(("logits combined", f"{report.contrasted_rows} rows"))
    if report.streams > 1:
        rows.append(("streams", str(report.streams)))
    for stayed, count in report.visual_tokens:
        rows.append(("visual tokens", f"{stayed} of {count}"))
    rows.append(("prompt", f"{report.prompt_length} tokens"))
    rows.append(("passes", f"{report.passes}, and {report.extra_passes} more"))
    for method, notes in report.notes.items():
        for what, by_layer in notes.items():
            told = ", ".join(f"layer {at}: {sum(n)}" for at, n in by_layer.items())
            rows.append((f"{method}: {what.replace('_', ' ')}", told))
    for method, found in report.pixels.items():
        for finding in found:
            if finding is not None:
                told = ", ".join(f"{key} {value}" for key, value in finding.facts().items())
                rows.append((method, told))
    lines = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in rows)
    return f"<details><summary>what was done</summary><dl>{lines}</dl></details>"


def legend(truth: frozenset[str] | None) -> str:
    """The meaning of the marks."""
    differs = '<span class="word differs">marked</span>: differs from base'
    if truth is None:
        more = "This picture has no annotations, so no word is marked as absent."
    else:
        more = (
            '<span class="word absent">underlined</span>: not in the picture (CHAIR). '
            f"The picture shows: {escape(', '.join(sorted(truth)) or 'no objects')}."
        )
    return f'<p class="legend">{differs}. {more} Click a word to see its attention map.</p>'


def alert(text: str) -> str:
    """An error message; empty for an empty text."""
    return f'<p class="error" role="alert">{escape(text)}</p>' if text else ""


def status(text: str) -> str:
    """A line about the state of the run."""
    return f'<p class="status" role="status">{escape(text)}</p>'


def progress(done: int, steps: int, label: str) -> str:
    """A progress bar with a label."""
    told = f"{label}: {done} of {steps} questions"
    return (
        f'<p class="status" role="status"><progress max="{steps}" value="{done}" '
        f'aria-label="{escape(told)}"></progress> {escape(told)}</p>'
    )


def figures(pictures: Sequence[tuple[Image, str]], kind: str = "cells") -> str:
    """Pictures side by side, each with a caption.

    Args:
        pictures: each with its caption.
        kind: "cells", whose edges stay sharp, or "plot".
    """
    parts = [
        f'<figure><img src="{_data_url(picture)}" alt="{escape(caption)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
        for picture, caption in pictures
    ]
    return f'<div class="figures {kind}">{"".join(parts)}</div>'


def examples(pictures: Sequence[Image]) -> str:
    """The bundled pictures as buttons."""
    parts = [
        f'<button type="button" class="example" data-number="{number}">'
        f'<img src="{_data_url(picture)}" alt="EmojiCOCO picture {number + 1}"></button>'
        for number, picture in enumerate(pictures)
    ]
    return f'<p class="legend">EmojiCOCO</p><div class="examples">{"".join(parts)}</div>'


def _data_url(picture: Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def about(model: str, fits: Mapping[str, str | None]) -> str:
    """The methods: what each does, its options, its paper, and whether it fits the model.

    Args:
        model: name of the model.
        fits: why each method does not fit, by name; None if it does.
    """
    entries = "".join(_method(describe(row.name), fits.get(row.name)) for row in list_methods())
    return (
        "<p>vlmfix runs published inference-time fixes for vision-language models that describe "
        "things that are not there, on any Hugging Face model, and measures base and method as a "
        f"pair. This page runs <b>{escape(model)}</b>, greedily. What holds on a small model need "
        f"not hold on a large one.</p>{entries}"
    )


def _method(info: Mapping[str, Any], why_not: str | None) -> str:
    options = "".join(
        f"<tr><td><code>{escape(o['name'])}</code></td><td><code>{escape(str(o['default']))}</code>"
        f"</td><td>{escape(o['help'])}</td></tr>"
        for o in info["options"]
    )
    note = (
        f'<p class="error">Does not run on this model yet: {escape(why_not)}</p>' if why_not else ""
    )
    table = (
        '<div class="scroll"><table><thead><tr><th>option</th><th>default</th><th>what it is</th>'
        f"</tr></thead><tbody>{options}</tbody></table></div>"
    )
    return (
        f'<details class="method"><summary><b>{escape(info["name"])}</b> {escape(info["summary"])}'
        f"</summary>{note}<h4>{escape(info['title'])}</h4><p>{_cited(info['paper'])}</p>"
        f"<pre>{escape(info['doc'])}</pre>{table}</details>"
    )


def _cited(paper: str) -> str:
    """A citation with its arXiv number as a link."""
    link = r'<a href="https://arxiv.org/abs/\1" rel="noreferrer">arXiv \1</a>'
    return re.sub(r"arXiv (\d{4}\.\d{4,5})", link, escape(paper))
