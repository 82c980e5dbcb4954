"""The tab Attention: maps of the attention behind a word, base next to method."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import gradio as gr

from vlmfix.analysis import viz
from vlmfix.demo import pages
from vlmfix.demo.asking import Question, message
from vlmfix.demo.compare import ON_LOAD
from vlmfix.demo.desk import QUIET, Desk, Run, enlarged
from vlmfix.demo.engine import Engine
from vlmfix.demo.looks import Look, look
from vlmfix.errors import BadInput

__all__ = ["MEAN", "Attention", "heads", "layers"]

#: Stands for the mean over all layers, or all heads.
MEAN = -1
_FIRST = "Run something in Compare, then click a word of an answer."
#: The file exists when this runs, but the browser learns of it a moment later.
_DOWNLOAD = "() => setTimeout(() => document.querySelector('#png-file')?.click(), 300)"


def layers(engine: Engine) -> list[tuple[str, int]]:
    """The choices of the layer control."""
    return [("mean of all", MEAN), *((str(layer), layer) for layer in engine.layers)]


def heads(engine: Engine) -> list[tuple[str, int]]:
    """The choices of the head control."""
    return [("mean of all", MEAN), *((str(head), head) for head in range(engine.info.num_heads))]


class Attention:
    """The components of the tab and their events."""

    def __init__(self, desk: Desk, run: gr.State, tabs: gr.Tabs) -> None:
        self._desk, self._tabs = desk, tabs
        self.look = gr.State(None, time_to_live=3600)
        self.chosen = gr.State(None, time_to_live=3600)
        self.message = gr.HTML(pages.status(_FIRST), elem_id="attention-message")
        self.words = gr.HTML(js_on_load=ON_LOAD, elem_id="attention-words")
        small: dict[str, Any] = {"min_width": 120}
        engine = desk.engine
        with gr.Row():
            self.beside = gr.Radio([], label="Next to the base", elem_id="beside")
            self.layer = gr.Dropdown(
                layers(engine), value=MEAN, label="Layer", elem_id="layer", **small
            )
            self.head = gr.Dropdown(
                heads(engine), value=MEAN, label="Head", elem_id="head", **small
            )
            self.part = gr.Dropdown(
                [("part 1", 0)], value=0, label="Part", visible=False, elem_id="part", **small
            )
        self.figures = gr.HTML(elem_id="figures")
        save = gr.Button("Save as PNG", elem_id="png")
        file = gr.DownloadButton("PNG", visible="hidden", elem_id="png-file")
        how = [self.layer, self.head, self.part]
        self._drawn = [self.message, self.figures, self.look, self.part]
        self.beside.input(self._beside, [run, self.chosen, self.beside, *how], self._drawn, **QUIET)
        for control in how:
            control.input(self._redraw, [run, self.look, *how], self.figures, queue=False, **QUIET)
        exported = save.click(self._export, [run, self.look, *how], [self.message, file], **QUIET)
        exported.success(None, None, None, js=_DOWNLOAD, **QUIET)
        self._run, self._how = run, how

    def listen(self, words: gr.HTML) -> None:
        """Show a map on this tab when a visitor clicks one of these words."""
        words.word(
            self._word,
            [self._run, self.beside, *self._how],
            [self._tabs, self.chosen, self.beside, self.words, *self._drawn],
            **QUIET,
        )

    @property
    def begun(self) -> list[Any]:
        """Outputs of `begin`."""
        return [self.message, self.words, self.beside, self.figures, self.chosen, self.look]

    def begin(self, run: Run | None) -> tuple[Any, ...]:
        """Take over new answers and clear what was chosen before."""
        if run is None:
            return pages.status(_FIRST), "", gr.update(choices=[], value=None), "", None, None
        usable = [(pane.name, at) for at, pane in enumerate(run.panes) if at and not pane.error]
        beside = gr.update(choices=usable, value=usable[0][1] if usable else None)
        told = pages.status("Click a word to see where the rows that wrote it attend.")
        return told, self._words(run, None), beside, "", None, None

    def _words(self, run: Run, chosen: tuple[int, int] | None) -> str:
        words = [self._desk.engine.words(pane) for pane in run.panes]
        return pages.panes(run.panes, words, run.truth, chosen=chosen, facts=False)

    def _word(
        self, run: Run | None, beside: int | None, layer: int, head: int, part: int,
        event: gr.EventData,
    ) -> dict[Any, Any]:  # fmt: skip
        """Show the map of a clicked word."""
        if run is None:
            return {self.message: pages.status(_FIRST)}
        chosen = pane, _ = int(event.pane), int(event.word)
        if pane and not run.panes[pane].error:
            beside = pane
        return {
            **self._looked(run, chosen, beside, layer, head, part),
            **{self.chosen: chosen, self.beside: beside, self.words: self._words(run, chosen)},
            self._tabs: gr.update(selected="attention"),
        }

    def _beside(
        self, run: Run | None, chosen: tuple[int, int] | None, beside: int | None,
        layer: int, head: int, part: int,
    ) -> dict[Any, Any]:  # fmt: skip
        """Show the map of another method next to the base."""
        if run is None or chosen is None:
            return {self.message: pages.status(_FIRST)}
        return self._looked(run, chosen, beside, layer, head, part)

    def _looked(
        self, run: Run, chosen: tuple[int, int], beside: int | None,
        layer: int, head: int, part: int,
    ) -> dict[Any, Any]:  # fmt: skip
        pane, number = chosen
        engine = self._desk.engine
        try:
            if run.number != engine.number:
                raise BadInput("the model was changed after this answer: run it again in Compare.")
            method = run.panes[beside].method if beside else None
            found = look(engine, run.asked, run.panes[pane], number, method)
        except Exception as error:
            return {
                self.message: pages.alert(message(error)),
                self.figures: "",
                self.look: None,
            }
        part = part if part < len(found.parts) else 0
        parts = [(f"part {at + 1}", at) for at in range(len(found.parts))]
        told = (
            f"Attention of the rows that wrote “{found.word}” in the answer of "
            f"{run.panes[pane].name}; both arms read the same answer. {found.note or ''}"
        )
        return {
            self.message: pages.status(told),
            self.figures: _draw(run.asked, found, layer, head, part),
            self.look: found,
            self.part: gr.update(choices=parts, value=part, visible=len(parts) > 1),
        }

    def _redraw(self, run: Run | None, look: Look | None, layer: int, head: int, part: int) -> str:
        return "" if run is None or look is None else _draw(run.asked, look, layer, head, part)

    def _export(
        self, run: Run | None, look: Look | None, layer: int, head: int, part: int
    ) -> tuple[Any, Any]:
        """Save the maps and their scale as one PNG."""
        if run is None or look is None:
            return pages.alert("there is no map yet: click a word first."), None
        picture, grids = _chosen(run.asked, look, layer, head, part)
        titles = {f"{arm}: “{look.word}”": grid for arm, grid in grids.items()}
        path = Path(tempfile.mkdtemp(dir=self._desk.folder)) / "attention.png"
        try:
            viz.draw_maps(picture, titles, path, label=_where(layer, head))
        except Exception as error:
            return pages.alert(message(error)), None
        return gr.skip(), str(path)


def _where(layer: int, head: int) -> str:
    """A label of a map: its layers and heads."""
    first = "mean over layers" if layer == MEAN else f"layer {layer}"
    second = "mean over heads" if head == MEAN else f"head {head}"
    return f"attention weight, {first}, {second}"


def _chosen(
    asked: Question, look: Look, layer: int, head: int, part: int
) -> tuple[Any, dict[str, Any]]:
    """A part of the picture, and the map (rows, columns) of each arm over it."""
    one = look.parts[part]
    at = slice(None) if layer == MEAN else [look.layers.index(layer)]
    of = slice(None) if head == MEAN else [head]
    grids = {arm: own[at][:, of].mean((0, 1)).numpy() for arm, own in one.grids.items()}
    return enlarged(asked.picture.crop(one.box)), grids


def _draw(asked: Question, look: Look, layer: int, head: int, part: int) -> str:
    """Draw a part of the picture and the maps of all arms over it, on one scale."""
    picture, grids = _chosen(asked, look, layer, head, part)
    high = max(float(grid.max()) for grid in grids.values())
    shown = [(picture, "the picture")]
    for arm, grid in grids.items():
        caption = (
            f"{arm}: {100 * grid.sum():.1f} % of the attention is on the picture; "
            f"{_where(layer, head)}, lightest {100 * high:.2f} %"
        )
        shown.append((viz.overlay(picture, grid, high=high), caption))
    return pages.figures(shown)
