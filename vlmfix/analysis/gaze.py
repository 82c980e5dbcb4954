"""How a model's attention to the image changes: the measure that chooses GIFT's layers.

Qi, Shang, Spiliopoulou, Pappas: "Capturing Gaze Shifts for Guidance", ICML 2026, arXiv 2510.22067.
The paper takes its saliency map from the layer with the largest total positive change of visual
attention while the question is read, and edits the layers in which attention to the image and to
the question move together. It publishes the layers of three models and no procedure; the second
rule below is our reading.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from vlmfix.analysis.teacher_forcing import answer_greedily
from vlmfix.base.observer import Observer, Rows, SeenRows
from vlmfix.engine.call import Call
from vlmfix.engine.observe import internal_pass
from vlmfix.errors import UnsupportedModel
from vlmfix.families import describe_model, last_logits
from vlmfix.families.question import find_question
from vlmfix.wrapper import session_of

__all__ = ["Gaze", "measure_gaze", "pooled_correlation", "positive_change"]


def positive_change(weights: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
    """The rise of attention to visual keys from each row to the next.

    Args:
        weights: softmax rows (B, H, R, K) of consecutive positions.
        visual: (B, K) bool.

    Returns:
        (B, H, R - 1): sum over visual keys of max(0, row - previous row), in attention mass.
    """
    rise = (weights[:, :, 1:] - weights[:, :, :-1]).clamp_min(0)
    return (rise * visual[:, None, None, :]).sum(-1)


def pooled_correlation(pairs: Sequence[torch.Tensor]) -> float:
    """Pearson correlation within groups: each (n, 2) is centred, then all are pooled.

    0 where one of the two never varies.
    """
    centred = torch.cat([group - group.mean(0) for group in pairs]).double()
    moments = centred.mT @ centred
    spread = float((moments[0, 0] * moments[1, 1]).sqrt())
    return float(moments[0, 1]) / spread if spread > 0 else 0.0


@dataclass(frozen=True)
class Gaze:
    """Attention to the image by layer.

    Attributes:
        changes: [layer], positive change (see `positive_change`) at a content word of the
            question, mean over heads and words, in attention mass; 0 without attention.
        correlations: [layer], correlation of attention to the image with attention to the
            question (each a mean over heads) over the tokens of an answer; 0 without attention.
    """

    changes: tuple[float, ...]
    correlations: tuple[float, ...]

    @property
    def saliency_layer(self) -> int:
        """The layer with the largest change."""
        return max(range(len(self.changes)), key=self.changes.__getitem__)

    @property
    def moving_together(self) -> tuple[int, ...]:
        """The layers with a positive correlation: our reading of the paper's rule."""
        return tuple(layer for layer, value in enumerate(self.correlations) if value > 0)


@dataclass(frozen=True, eq=False)
class _GazeObserver(Observer):
    """Keeps the changes at content rows, and the masses of answer rows.

    Attributes:
        question, content: (B, L) bool, as `question.find_question` gives them, padded to L.
        answer: (B, L) bool, tokens of the answers.
        changes: {layer: [(rows, H)]}.
        masses: {layer: [(B, R, 2)]}, attention to image and question, mean over heads.
        rows_seen: {layer: [(B, R)]}, which of the rows in `masses` are tokens of an answer.
    """

    question: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    content: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    answer: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    changes: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    masses: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    rows_seen: dict[int, list[torch.Tensor]] = field(default_factory=dict)

    rows: ClassVar[Rows] = "text"

    def see_weights(self, rows: SeenRows) -> None:
        layer, weights, position, visual = rows.layer, rows.weights, rows.position, rows.visual
        device = weights.device
        here = slice(position + 1, position + weights.shape[2])  # each with the row before it
        change = positive_change(weights, visual).transpose(1, 2)
        content = self.content[:, here].to(device)
        self.changes.setdefault(layer, []).append(change[content].cpu())
        question = self.question[:, : weights.shape[3]].to(device)
        kinds = torch.stack((visual, question), dim=-1).to(weights.dtype)
        masses = weights[:, :, 1:].mean(1) @ kinds
        self.masses.setdefault(layer, []).append(masses.cpu())
        self.rows_seen.setdefault(layer, []).append(self.answer[:, here].cpu())


def measure_gaze(
    model: Any, processor: Any, prompt: Mapping[str, Any], max_new_tokens: int = 64
) -> Gaze:
    """Measure a plain model's gaze on prompts with images: a greedy answer to each, two forwards.

    Args:
        model: a supported VLM in eval mode, not wrapped.
        processor: its processor, which tells the question from the chat template.
        prompt: arguments of its generate() for a left-padded batch, see `chat.chat_inputs`.
        max_new_tokens: longest answer, at least 1.

    Raises:
        UnsupportedModel: no question follows the image; or see `answer_greedily`.
    """
    info = describe_model(model)
    forced = answer_greedily(model, prompt, max_new_tokens)
    ids = forced.inputs["input_ids"]
    prompts = ids[:, : forced.prompt_length]
    asked, words = find_question(processor, info, prompts)
    visual = torch.isin(prompts, prompts.new_tensor([*info.image_token_ids, *info.video_token_ids]))
    words &= visual.cumsum(1) > 0  # a question before the image sees none of it
    width = ids.shape[1] - forced.prompt_length
    if not bool(words.any()):
        raise UnsupportedModel(
            f"no text of a question follows the image in the prompts of {type(model).__name__}, so "
            "there is no gaze to measure. Calibrate the rest with `--only sinks,heads`."
        )
    question, content = (torch.nn.functional.pad(mask, (0, width)) for mask in (asked, words))
    answer = forced.inputs["attention_mask"].bool().clone()
    answer[:, : forced.prompt_length] = False
    layers = tuple(sorted(info.attention))
    gaze = _GazeObserver(layers, question=question, content=content, answer=answer)
    call = Call(prompt_length=forced.prompt_length, rows=len(ids))
    arguments = {**forced.inputs, "use_cache": False, **last_logits(model, 1)}
    with session_of(model) as session:
        internal_pass(session.host, arguments, call=call, observers=[gaze])
    changes, correlations = [0.0] * info.num_layers, [0.0] * info.num_layers
    for layer in layers:
        changes[layer] = float(torch.cat(gaze.changes[layer]).mean())
        masses = torch.cat(gaze.masses[layer], dim=1)
        rows = torch.cat(gaze.rows_seen[layer], dim=1)
        pairs = [masses[at][rows[at]] for at in range(len(masses))]
        correlations[layer] = pooled_correlation(pairs)
    return Gaze(tuple(changes), tuple(correlations))
