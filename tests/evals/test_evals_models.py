"""The adapter between the harness and a real model."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from PIL import Image

import vlmfix
import vlmfix.evals
from vlmfix.base.contrast import Branch, ContrastMethod, Prompt
from vlmfix.emoji.training.build import build_model, build_processor
from vlmfix.emoji.training.recipe import QUICK
from vlmfix.evals.running.models import TransformersModel, count_passes
from vlmfix.evals.running.runner import Request
from vlmfix.evals.tasks import Sample


class Decoder(torch.nn.Module):
    def forward(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        return inputs_embeds


class Tiny(torch.nn.Module):
    """Prefill and two decoding steps; `streams` copies of every row."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = Decoder()
        self.streams = 1

    def get_decoder(self) -> torch.nn.Module:
        return self.decoder

    def steps(self, rows: int) -> None:
        for _ in range(3):
            self.decoder(inputs_embeds=torch.zeros(rows * self.streams, 1, 4))


@dataclass
class Detail:
    text: str
    prompt_tokens: int = 7
    new_tokens: int = 3
    finish: str = "eos"


def test_passes_count_rows_and_the_hook_goes_away() -> None:
    model = Tiny()
    with count_passes(model) as counter:
        model.steps(4)
        assert (counter.calls, counter.rows) == (3, 12)
        counter.reset()
        model.decoder(torch.zeros(2, 1, 4))
        assert counter.rows == 2
    model.steps(1)
    assert counter.rows == 2
    assert not model.decoder._forward_pre_hooks


def test_adapter_asks_one_chat_per_sample_and_sees_a_second_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[dict[str, Any]] = []

    @contextmanager
    def wrapped(model: Tiny, method: Any) -> Iterator[Tiny]:
        model.streams = 2
        yield model
        model.streams = 1

    def generate(model: Tiny, processor: Any, chats: Any, **kwargs: Any) -> list[Detail]:
        model.steps(len(chats))
        calls.append({"chats": chats, "drawn_from": torch.initial_seed(), **kwargs})
        return [Detail(chat[0]["content"][1]["text"].upper()) for chat in chats]

    monkeypatch.setattr(vlmfix, "wrapped", wrapped, raising=False)
    monkeypatch.setattr(vlmfix, "generate", generate, raising=False)
    asked = TransformersModel(Tiny(), "processor", name="tiny")
    assert asked.facts["model"] == "tiny" and asked.facts["model_class"] == "Tiny"
    asked.check(["vcd"])
    assert asked.describe(None) is None
    samples = [Sample("pope", "s", str(i), f"{i}.png", i, f"q{i}", "yes") for i in range(3)]
    passes = {}
    before = torch.initial_seed()
    for method in (None, "vcd"):
        with asked.arm(method, {"max_new_tokens": 16}, lambda name: f"<{name}>", False) as answer:
            replies = answer([Request(sample) for sample in samples], 5)
        assert [reply.text for reply in replies] == ["Q0", "Q1", "Q2"]
        assert (replies[0].prompt_tokens, replies[0].new_tokens) == (7, 3)
        passes[method] = replies[0].passes
    # The second stream shares the calls of the first, and must show all the same.
    assert passes == {None: 3.0, "vcd": 6.0}
    assert calls[0]["max_new_tokens"] == 16 and calls[0]["return_details"] is True
    # A method that draws noise takes it from there, whatever ran before in this process.
    assert [call["drawn_from"] for call in calls] == [5, 5] and torch.initial_seed() == before
    assert calls[0]["chats"][2][0]["content"] == [
        {"type": "image", "image": "<2.png>"},
        {"type": "text", "text": "q2"},
    ]


@dataclass(frozen=True)
class WithoutImage(ContrastMethod):
    """One branch, which sees no image."""

    name: ClassVar[str] = "without_image"

    def streams(self) -> int:
        return 1

    def neutral(self) -> bool:
        return False

    def branches(self, prompt: Prompt) -> Sequence[Branch]:
        return [Branch(image=False)]

    def contrast(
        self, base: torch.Tensor, branches: Sequence[torch.Tensor], token: torch.Tensor
    ) -> torch.Tensor:
        return 2 * base - branches[0]


def test_a_branch_counts_as_a_second_pass() -> None:
    """Base and branch decode in one forward, of twice the rows; the branch prefills apart."""
    processor = build_processor()
    torch.manual_seed(0)
    model = build_model(QUICK, processor.tokenizer).eval()
    asked = TransformersModel(model, processor)
    samples = [Sample("chair", "s", str(i), "", i, f"What is {i}?", []) for i in range(2)]
    passes = {}

    def blank(name: str) -> Image.Image:
        return Image.new("RGB", (112, 112))

    for method in (None, WithoutImage()):
        settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
        with asked.arm(method, settings, blank, False) as answer:
            requests = [Request(sample) for sample in samples]
            passes[method] = [reply.passes for reply in answer(requests, 0)]
    assert list(passes.values()) == [[4, 4], [8, 8]]


@pytest.mark.parametrize(
    ("number", "of_larger", "says"),
    [(63, 252, True), (63, 63, False), (64, 256, False), (None, None, False)],
    ids=["few", "as few of any picture", "enough", "unknown"],
)
def test_few_visual_tokens_of_the_bundled_images_are_told(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int | None,
    of_larger: int | None,
    says: bool,
) -> None:
    processor = build_processor()
    torch.manual_seed(0)
    model = build_model(QUICK, processor.tokenizer).eval()
    own = TransformersModel(model, processor).visual_tokens(Image.new("RGB", (112, 112)))
    assert own == 64
    assert TransformersModel(Tiny(), processor).visual_tokens(None) is None
    monkeypatch.setattr(
        TransformersModel,
        "visual_tokens",
        lambda self, picture: number if picture.width <= 112 else of_larger,
    )
    settings: dict[str, Any] = {"limit": 1, "max_new_tokens": 1, "quiet": True}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        vlmfix.evals.evaluate(["chair"], (model, processor), output=tmp_path / "o", **settings)
    told = [str(one.message) for one in caught if "visual tokens" in str(one.message)]
    assert len(told) == says
    if told:
        assert "chair: the bundled images have 112 x 112 pixels" in told[0]


def test_the_bundled_world_end_to_end(tmp_path: Path) -> None:
    """Real generate, wrap and pictures; the weights are fresh, so only the plumbing counts."""
    processor = build_processor()
    torch.manual_seed(0)
    model = build_model(QUICK, processor.tokenizer).eval()
    results = vlmfix.evals.evaluate(
        ["pope", "chair"],
        model=(model, processor),
        methods=["pai:alpha=0.9"],
        limit=1,
        max_new_tokens=3,
        output=tmp_path / "out",
        quiet=True,
    )
    assert results["errors"] == 0 and results["partial"]
    for task, items in (("pope", 18), ("chair", 1)):
        arms = results["tasks"][task]["arms"]
        assert list(arms) == ["base", "pai:alpha=0.9"]
        for arm in arms:
            path = tmp_path / "out" / f"samples_{task}_{arm.replace(':', '_')}.jsonl"
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            assert len(rows) == items
            longest = max(row["n_new_tokens"] for row in rows)
            # One pass over the prompt gives the first token, and each further token costs one.
            assert arms[arm]["cost"]["passes_per_answer"] == longest
    assert results["config"]["methods"]["pai:alpha=0.9"][0]["alpha"] == 0.9
    assert results["config"]["dtype"] == "float32"


def test_options_are_recorded_as_they_run() -> None:
    model, processor = vlmfix.load("emoji")
    asked = TransformersModel(model, processor)
    (options,) = asked.describe("pai:alpha=0.3")
    assert (options["alpha"], options["start_layer"], options["end_layer"]) == (0.3, 1, 6)
