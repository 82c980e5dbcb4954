"""GIFT's layers: worked changes, and the measurement against attention maps of eager mode."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_folders
import torch
from matrix import family
from PIL import Image
from tiny import build

from vlmfix.analysis.gaze import Gaze, measure_gaze, pooled_correlation, positive_change
from vlmfix.analysis.teacher_forcing import answer_greedily
from vlmfix.chat import chat_inputs
from vlmfix.errors import StateError, UnsupportedModel
from vlmfix.families import describe_model
from vlmfix.families.question import find_question


def test_worked_changes() -> None:
    # Three visual keys and one other; totals .42 and .01 by head.
    first = [[0.10, 0.20, 0.05], [0.30, 0.18, 0.05], [0.25, 0.40, 0.05]]
    other = [[0.02, 0.30, 0.02], [0.02, 0.30, 0.03], [0.02, 0.30, 0.02]]
    weights = torch.tensor([first, other])[None]
    weights = torch.cat((weights, 1 - weights.sum(-1, keepdim=True)), dim=-1)
    visual = torch.tensor([[True, True, True, False]])
    change = positive_change(weights, visual)
    assert torch.allclose(change, torch.tensor([[[0.20, 0.22], [0.01, 0.0]]]), atol=1e-6)
    assert torch.allclose(change.sum(-1), torch.tensor([[0.42, 0.01]]), atol=1e-6)


def test_correlation_is_within_answers() -> None:
    rising = torch.tensor([[0.0, 0.0], [1.0, 2.0], [2.0, 4.0]])
    assert pooled_correlation([rising]) == pytest.approx(1.0)
    assert pooled_correlation([rising * torch.tensor([1.0, -1.0])]) == pytest.approx(-1.0)
    # Two answers on different levels: each falls while the other rises, whatever the levels.
    falling = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert pooled_correlation([falling, falling + 10]) == pytest.approx(-1.0)
    assert pooled_correlation([torch.ones(4, 2)]) == 0.0


def test_rules() -> None:
    gaze = Gaze((0.1, 0.5, 0.3), (0.2, -0.1, 0.0))
    assert gaze.saliency_layer == 1
    assert gaze.moving_together == (0,)


def _chats(number: int, question: str) -> list[Any]:
    chats = []
    for seed in range(number):
        torch.manual_seed(seed)
        pixels = torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8).numpy()
        content = [
            {"type": "image", "image": Image.fromarray(pixels)},
            {"type": "text", "text": question + " dog" * seed},
        ]
        chats.append([{"role": "user", "content": content}])
    return chats


def test_measurement_equals_loops_over_eager_attention() -> None:
    tiny = build("llava")
    model, processor = tiny.model, tiny_folders.processor()
    prompt = chat_inputs(model, processor, _chats(3, "is there a dog in the image ?"))
    gaze = measure_gaze(model, processor, prompt, max_new_tokens=7)

    info = describe_model(model)
    forced = answer_greedily(model, prompt, 7)
    length = forced.prompt_length
    ids = forced.inputs["input_ids"]
    question, content = find_question(processor, info, ids[:, :length])
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(**forced.inputs, output_attentions=True).attentions
    for layer, weights in enumerate(maps):
        changes, groups = [], []
        for row, answer in enumerate(forced.answers):
            visual = (ids[row] == tiny.image_token_id).nonzero().flatten()
            asked = question[row].nonzero().flatten()
            for at in content[row].nonzero().flatten().tolist():
                for head in range(info.num_heads):
                    rise = weights[row, head, at, visual] - weights[row, head, at - 1, visual]
                    changes.append(float(rise.clamp_min(0).sum()))
            rows = weights[row, :, length : length + len(answer)].mean(0)
            groups.append(torch.stack((rows[:, visual].sum(1), rows[:, asked].sum(1)), dim=1))
        assert gaze.changes[layer] == pytest.approx(sum(changes) / len(changes), rel=1e-4)
        assert gaze.correlations[layer] == pytest.approx(pooled_correlation(groups), abs=1e-3)


def test_pieces_of_a_long_prompt_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = family("llava")
    processor = tiny_folders.processor()
    prompt = chat_inputs(tiny.model, processor, _chats(2, "is there a dog in the image ?"))
    whole = measure_gaze(tiny.model, processor, prompt, max_new_tokens=5)
    monkeypatch.setattr("vlmfix.engine.attention._chunk", lambda *sizes: 3)
    pieces = measure_gaze(tiny.model, processor, prompt, max_new_tokens=5)
    assert pieces.changes == pytest.approx(whole.changes, rel=1e-5)
    assert pieces.correlations == pytest.approx(whole.correlations, abs=1e-4)


def test_a_prompt_without_a_question_is_refused() -> None:
    tiny = family("llava")
    prompt = tiny.inputs(1, lengths=[0])
    with pytest.raises(UnsupportedModel, match="no text of a question"):
        measure_gaze(tiny.model, tiny_folders.processor(), prompt, max_new_tokens=2)


def test_a_model_in_training_mode_is_refused() -> None:
    tiny = build("llava")
    tiny.model.train()
    processor = tiny_folders.processor()
    prompt = chat_inputs(tiny.model, processor, _chats(1, "is there a dog ?"))
    with pytest.raises(StateError, match="training mode"):
        measure_gaze(tiny.model, processor, prompt, max_new_tokens=2)
