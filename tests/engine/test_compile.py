"""The bundled model with a static cache and torch.compile: one graph, the same answers."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from transformers import CompileConfig

import vlmfix
from vlmfix.loading import load, load_image

#: VAR is given a channel and a low threshold, as no visual sinks form in the bundled model.
SPECS = ("var:sink_channels=0;tau=1", pytest.param("vhr", marks=pytest.mark.slow))
_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++")


@pytest.fixture(scope="module")
def bundled() -> tuple[Any, Any]:
    return load("emoji")


def _inputs(processor: Any, first: int) -> Any:
    texts = []
    for question in ("Describe the image.", "Is there a dog in the image?"):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        chat = [{"role": "user", "content": content}]
        texts.append(processor.apply_chat_template(chat, add_generation_prompt=True))
    images = [load_image(f"emoji:{number}") for number in (first, first + 1)]
    return processor(
        text=texts, images=images, padding=True, padding_side="left", return_tensors="pt"
    )


def _logits(model: Any, inputs: Any, **kwargs: Any) -> torch.Tensor:
    out = model.generate(
        **inputs,
        max_new_tokens=8,
        min_new_tokens=8,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **kwargs,
    )
    return torch.stack(out.logits)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's inductor warns of torch.jit
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(
    "backend",
    ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, _COMPILER])],
)
def test_full_graph_equals_eager(bundled: tuple[Any, Any], spec: str, backend: str) -> None:
    model, processor = bundled
    config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    config._compile_all_devices = True
    compiled = {"cache_implementation": "static", "compile_config": config}
    torch.compiler.reset()  # beyond a number of graphs of one function, torch stops compiling it
    plain = _logits(model, _inputs(processor, 1))
    with vlmfix.wrapped(model, spec):
        for first in (1, 3):  # the second prompt runs the graph of the first
            inputs = _inputs(processor, first)
            eager = _logits(model, inputs)
            rows = vlmfix.last_call(model).edited_rows
            assert torch.allclose(_logits(model, inputs, **compiled), eager, atol=1e-4)
            assert vlmfix.last_call(model).edited_rows == rows > 0
            if first == 1:
                assert (plain - eager).abs().max() > 1e-3
