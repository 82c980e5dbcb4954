"""The tab Compare: the question, the methods, and their answers side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder

from vlmfix.base.method import Method
from vlmfix.demo import pages
from vlmfix.demo.answers import STOPPED, answer
from vlmfix.demo.asking import MAX_PANES, Pane, message
from vlmfix.demo.controls import Control, controls_of, make_method
from vlmfix.demo.desk import QUIET, Desk, Run
from vlmfix.emoji import example_images
from vlmfix.errors import BadInput
from vlmfix.registry import list_methods

__all__ = ["ON_LOAD", "Compare", "uploaded_file"]

EXAMPLES = 8
PROMPTS = (
    "Please describe this image in detail.",
    "Is there a dog in the image? Answer the question using a single word or phrase.",
)
#: The first methods of the panes, and the first number of panes.
FIRST = ("vhr", "pai", "vcd")
SHOWN = 3

#: Words are buttons, and a click tells gradio which one it was. The click also makes gradio render
#: the words again, perhaps on another tab: the keyboard focus moves to the pressed word there.
ON_LOAD = """
element.addEventListener('click', (event) => {
  const word = event.target.closest('button.word');
  if (word) trigger('word', {pane: Number(word.dataset.pane), word: Number(word.dataset.word)});
});
const resume = () => {
  let tries = 0;
  const timer = setInterval(() => {
    const word = element.querySelector('button.word[aria-pressed]');
    if (word && !word.offsetParent && ++tries < 40) return;
    clearInterval(timer);
    const at = document.activeElement;
    if (word && (!at || at === document.body || !at.offsetParent)) word.focus();
  }, 50);
};
watch('value', resume);
resume();
"""
_EXAMPLE = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('button.example');
  if (button) trigger('example', {number: Number(button.dataset.number)});
});
"""
#: On a narrow page the answers are out of sight.
_TO_ANSWERS = "() => { if (innerWidth < 700) document.querySelector('#message').scrollIntoView(); }"


@dataclass
class Slot:
    """The controls of one pane: its method, and the options of each method."""

    method: gr.Dropdown
    options: dict[str, dict[str, Any]]

    def components(self) -> set[Any]:
        """All components that decide what the pane runs."""
        return {self.method, *(c for own in self.options.values() for c in own.values())}

    def read(self, values: Mapping[Any, Any]) -> Method:
        """Make the method that the controls describe."""
        name = values[self.method]
        if not name:
            raise BadInput("a pane has no method: choose one, or show fewer panes.")
        own = {option: values[component] for option, component in self.options[name].items()}
        return make_method(name, own)


class Compare:
    """The components of the tab and their events."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self.run = gr.State(None, time_to_live=3600)
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                self._question()
            with gr.Column(scale=5, min_width=280):
                with gr.Row():
                    self.slots = [self._slot(at) for at in range(MAX_PANES - 1)]
                self.message = gr.HTML(elem_id="message")
                self.panes = gr.HTML(js_on_load=ON_LOAD, elem_id="panes")
                self.legend = gr.HTML(elem_id="legend")
        self.stop.click(desk.stop, queue=False, **QUIET)
        self.go.click(None, None, None, js=_TO_ANSWERS, **QUIET)

    def _question(self) -> None:
        self.picture = gr.Image(
            label="Picture",
            type="filepath",
            sources=["upload", "clipboard"],
            buttons=[],
            height=220,
            elem_id="picture",
        )
        # gradio would decode the image, and fail on it, before the demo can refuse it.
        self.picture.preprocess = uploaded_file
        examples = gr.HTML(
            pages.examples([picture for _, picture in example_images(EXAMPLES)]),
            js_on_load=_EXAMPLE,
            elem_id="examples",
        )
        examples.example(self._example, None, self.picture, **QUIET)
        self.prompt = gr.Textbox(PROMPTS[0], label="Prompt", lines=2, elem_id="prompt")
        with gr.Row():
            self.go = gr.Button("Run", variant="primary", min_width=80, elem_id="run")
            self.stop = gr.Button("Stop", min_width=80, elem_id="stop")
        gr.Examples(
            [[prompt] for prompt in PROMPTS],
            [self.prompt],
            label="Prompts",
            elem_id="prompts",
            api_visibility="private",
        )
        counts = list(range(2, MAX_PANES + 1))
        self.count = gr.Radio(counts, value=SHOWN, label="Panes", elem_id="count")
        self.length = gr.Slider(
            8, 256, 96, step=8, label="Longest answer, in tokens", elem_id="length"
        )

    def _example(self, event: gr.EventData) -> str:
        """The file of a bundled picture."""
        name, picture = example_images(EXAMPLES)[int(event.number)]
        path = self._desk.folder / name
        if not path.exists():
            picture.save(path)
        return str(path)

    def _slot(self, at: int) -> Slot:
        number = at + 2
        groups, options = {}, {}
        with gr.Column(visible=number <= SHOWN, min_width=180, elem_id=f"slot-{number}") as slot:
            method = gr.Dropdown(
                self._desk.choices(),
                value=FIRST[at],
                label=f"Method of pane {number}",
                elem_id=f"method-{number}",
            )
            with gr.Accordion("Options", open=False, elem_id=f"options-{number}"):
                for row in list_methods():
                    with gr.Column(visible=row.name == FIRST[at]) as groups[row.name]:
                        options[row.name] = {
                            control.name: _component(control, f"option-{number}-{row.name}")
                            for control in controls_of(row.name)
                        }
        method.change(
            lambda name: [gr.update(visible=name == other) for other in groups],
            method,
            list(groups.values()),
            queue=False,
            **QUIET,
        )
        self.count.change(
            lambda count: gr.update(visible=count >= number), self.count, slot, queue=False, **QUIET
        )
        return Slot(method, options)

    @property
    def settings(self) -> set[Any]:
        """All components that decide which methods run."""
        return {self.count}.union(*(slot.components() for slot in self.slots))

    @property
    def inputs(self) -> set[Any]:
        """The inputs of `answer`."""
        return {self.picture, self.prompt, self.length} | self.settings

    @property
    def outputs(self) -> list[Any]:
        """The outputs of `answer`."""
        return [self.message, self.panes, self.legend, self.run]

    def methods(self, values: Mapping[Any, Any]) -> list[Method]:
        """The methods of the panes that are shown, without the base."""
        return [slot.read(values) for slot in self.slots[: int(values[self.count]) - 1]]

    def answer(self, values: dict[Any, Any], request: gr.Request) -> Iterator[dict[Any, Any]]:
        """Stream the answers of all panes."""
        engine = self._desk.engine
        panes: list[Pane] = []
        try:
            methods = self.methods(values)
            length = int(values[self.length])
            asked = engine.question(values[self.picture], values[self.prompt], length)
            truth, number = engine.truth(asked.picture), engine.number
            yield {
                self.message: pages.status("The model is answering."),
                self.legend: pages.legend(truth),
                self.run: None,
            }
            for panes in answer(engine, asked, [None, *methods], self._desk.begin(request)):
                words = [engine.words(pane) for pane in panes]
                yield {self.panes: pages.panes(panes, words, truth)}
        except Exception as error:
            yield {self.message: pages.alert(message(error))}
            return
        yield {
            self.message: pages.status(ending(panes)),
            self.run: Run(asked, panes, truth, number),
        }


def ending(panes: Sequence[Pane]) -> str:
    """A line that says how the answers ended."""
    if any(pane.error == STOPPED for pane in panes):
        return "Stopped."
    return "All answers are written."


def uploaded_file(payload: Any) -> str | None:
    """The path of an uploaded file, as gradio's Image hands it over; None for any other path.

    gradio checks only payloads that declare themselves as files, which a request may omit.
    """
    path = getattr(payload, "path", None)
    folder = Path(get_upload_folder()).resolve()
    return path if path and Path(path).resolve().is_relative_to(folder) else None


def _component(control: Control, place: str) -> Any:
    """The component of a control.

    Args:
        control: an option of a method.
        place: prefix of the component's id, which names pane and method.
    """
    common: dict[str, Any] = {
        "label": control.name,
        "info": control.help,
        "elem_id": f"{place}-{control.name}",
    }
    if control.kind == "flag":
        return gr.Checkbox(value=control.default, **common)
    if control.kind == "choice":
        choices: list[Any] = [(choice, choice) for choice in control.choices]
        if control.optional:
            choices.insert(0, ("(default)", ""))
        return gr.Dropdown(choices, value=control.default or "", **common)
    if control.kind in ("whole", "number") and not control.optional:
        precision = 0 if control.kind == "whole" else None
        return gr.Number(value=control.default, precision=precision, **common)
    default = "" if control.default is None else control.default
    shown = "/".join(map(str, default)) if isinstance(default, tuple) else default
    # Optional numbers as well: a number field of gradio turns an empty value into 0.
    return gr.Textbox(value=str(shown), placeholder="default", **common)
