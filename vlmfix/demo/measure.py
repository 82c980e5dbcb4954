"""The tab Measure: a quick POPE on the bundled images, with a paired table and a forest plot."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from typing import Any

import gradio as gr
from PIL import Image

from vlmfix.demo import pages
from vlmfix.demo.asking import message
from vlmfix.demo.compare import Compare
from vlmfix.demo.desk import QUIET, Desk
from vlmfix.demo.measuring import measure
from vlmfix.evals import to_markdown
from vlmfix.evals.reporting.card import make_card
from vlmfix.evals.reporting.plots import draw_forest

__all__ = ["Measure"]


class Measure:
    """The components of the tab and their events."""

    def __init__(self, desk: Desk, compare: Compare) -> None:
        self._desk, self._compare = desk, compare
        gr.Markdown(
            "POPE on the first bundled images: is there such an object in the picture? Base and "
            "the methods set in Compare answer the same questions. Few images give wide intervals."
        )
        self.images = gr.Slider(2, 100, 10, step=1, label="Images", elem_id="images")
        with gr.Row():
            go = gr.Button("Measure", variant="primary", elem_id="measure-run")
            stop = gr.Button("Stop", elem_id="measure-stop")
        self.message = gr.HTML(elem_id="measure-message")
        self.forest = gr.HTML(elem_id="forest")
        self.table = gr.Markdown(elem_id="table", elem_classes="table")
        outputs = [self.message, self.forest, self.table]
        go.click(self._measure, {self.images} | compare.settings, outputs, **QUIET)
        stop.click(desk.stop, queue=False, **QUIET)

    def _measure(self, values: dict[Any, Any], request: gr.Request) -> Iterator[dict[Any, Any]]:
        told = pages.status("vlmfix is making the questions.")
        yield {self.message: told, self.forest: "", self.table: ""}
        try:
            methods = self._compare.methods(values)
            stop = self._desk.begin(request)
            for event in measure(self._desk.engine, methods, int(values[self.images]), stop):
                if isinstance(event, dict):
                    yield {
                        self.message: pages.status("Done: differences to the base, paired."),
                        self.forest: _forest(event),
                        self.table: to_markdown(event),
                    }
                else:
                    yield {self.message: pages.progress(*event)}
        except Exception as error:
            yield {self.message: pages.alert(message(error))}


def _forest(results: Mapping[str, Any]) -> str:
    """The forest plot of the score card; empty if no method was measured."""
    [table] = make_card({"POPE": results})
    figure = draw_forest(table)
    if figure is None:
        return ""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=110)
    with Image.open(drawn) as picture:
        shown = [(picture.copy(), "Forest plot: differences to the base")]
        return pages.figures(shown, "plot")
