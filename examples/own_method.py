"""A method of your own, outside the package: give wrap() an object instead of a name.

    python examples/own_method.py
    python examples/own_method.py llava-hf/llava-1.5-7b-hf

As a package of its own, the method is known by its name everywhere ("vlmfix methods", "vlmfix eval
--method imagelift"), once its pyproject.toml says

    [project.entry-points."vlmfix.methods"]
    imagelift = "my_package.imagelift:ImageLift"
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

import vlmfix
from vlmfix.base.attention import AttentionMethod, Keys, Plan
from vlmfix.base.method import option
from vlmfix.families import ModelInfo


@dataclass(frozen=True)
class ImageLift(AttentionMethod):
    """Add `lift` to the scores of visual tokens, in the row that predicts, before the softmax."""

    lift: float = option(1.0, "what is added to scores of visual tokens; 0: nothing", 0.0, 100.0)

    name: ClassVar[str] = "imagelift"
    rows: ClassVar[Literal["predicting", "text"]] = "predicting"

    def layers(self, info: ModelInfo) -> Sequence[int]:
        """The later half of the layers."""
        return range(info.num_layers // 2, info.num_layers)

    def plan(self, keys: Keys) -> Plan | None:
        """What is added to each key (B, K), and the samples that have an image."""
        if self.lift == 0:
            return None
        return Plan({"lift": self.lift * keys.visual.float()}, keys.visual.any(1).tolist())

    def edit_scores(self, scores: torch.Tensor, *, lift: torch.Tensor) -> torch.Tensor:
        """Scores (B, H, R, K), edited."""
        return scores + lift[:, None, None].to(scores.dtype)


if __name__ == "__main__":
    model, processor = vlmfix.load(*sys.argv[1:])
    question = {"type": "text", "text": "Describe the image."}
    chat = [{"role": "user", "content": [{"type": "image", "image": "emoji:4"}, question]}]
    for lift in (0.0, 1.0, 4.0):
        with vlmfix.wrapped(model, ImageLift(lift)):
            answer = vlmfix.generate(model, processor, chat, max_new_tokens=100, do_sample=False)
            print(f"lift {lift}: {vlmfix.last_call(model).edited_rows} rows edited. {answer}")
