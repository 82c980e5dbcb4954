"""The tab Tokens: what pruning methods keep of the picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from vlmfix.analysis import viz
from vlmfix.demo import pages
from vlmfix.demo.asking import message
from vlmfix.demo.controls import make_method
from vlmfix.demo.desk import QUIET, Desk, enlarged
from vlmfix.demo.looks import kept
from vlmfix.errors import BadInput
from vlmfix.registry import list_methods

__all__ = ["Tokens"]

FIRST = ("hiprune", "divprune", "uniform")


class Tokens:
    """The components of the tab and their events.

    Args:
        desk: the state that the tabs share.
        picture: the component of the picture, in Compare.
        prompt: the component of the prompt, which some methods read.
    """

    def __init__(self, desk: Desk, picture: Any, prompt: Any) -> None:
        self._desk = desk
        names = [row.name for row in list_methods() if row.stage == "tokens"]
        with gr.Row():
            pruning = gr.Dropdown(
                names,
                value=list(FIRST),
                multiselect=True,
                label="Pruning methods",
                elem_id="pruning",
            )
            share = gr.Slider(
                0.05, 1, 0.25, step=0.05, label="Share of the visual tokens kept", elem_id="share"
            )
        show = gr.Button("Show kept tokens of the picture in Compare", elem_id="show-tokens")
        told = gr.HTML(elem_id="tokens-message")
        masks = gr.HTML(elem_id="kept")
        show.click(self._show, [picture, prompt, pruning, share], [told, masks], **QUIET)

    def _show(
        self, picture: str | None, prompt: str, names: Sequence[str], share: float
    ) -> tuple[str, str]:
        engine = self._desk.engine
        shown = []
        try:
            if not names:
                raise BadInput("there is no pruning method: choose at least one.")
            asked = engine.question(picture, prompt, 1)
            for name in names:
                for box, mask in kept(engine, asked, make_method(name, {"ratio": share})):
                    part = enlarged(asked.picture.crop(box))
                    caption = f"{name}: {int(mask.sum())} of {mask.numel()} visual tokens"
                    shown.append((viz.darken_dropped(part, mask.numpy()), caption))
        except Exception as error:
            return pages.alert(message(error)), ""
        told = "Dark patches are dropped, before the language model or between its first layers."
        return pages.status(told), pages.figures(shown)
