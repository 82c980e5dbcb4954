"""GIFT: the property tests and worked numbers of its specification."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from made_keys import make_keys
from matrix import family, logits, prompt
from prompts import observed
from tiny import build

import vlmfix
from vlmfix.analysis.calibrate import Calibration, cache_folder, fingerprint, write
from vlmfix.base.observer import SeenRows
from vlmfix.engine import attention
from vlmfix.errors import BadInput, StateError
from vlmfix.families import describe_model
from vlmfix.families.kinds import GENERATED, IMAGE, PAD, TEXT
from vlmfix.methods.gift import GazeObserver, GazeShiftFusion, fuse, gaze_map, top_heads

# Keys: other, visual 1, visual 2, the question, a generated token.
WEIGHTS = torch.tensor([[0.4, 0.1, 0.2, 0.2, 0.1], [0.6, 0.05, 0.05, 0.1, 0.2]]).double()
VISUAL = torch.tensor([[0, 1, 1, 0, 0]]).double()
QUESTION = torch.tensor([[0, 0, 0, 1, 0]]).double()
STRONG = GazeShiftFusion(alpha=6.0, saliency_layer=1, edited_layers=(1, 2))


def lifted(alpha: float, gaze: torch.Tensor) -> torch.Tensor:
    """m - 1 of every key."""
    return torch.expm1(alpha * gaze)


def seen(weights: torch.Tensor, visual: torch.Tensor, content: list[bool]) -> SeenRows:
    """Rows from position 0, of a question of which some words carry content."""
    words = torch.tensor([content])
    return SeenRows(0, weights, 0, 0, visual, torch.ones_like(words), words)


@pytest.mark.parametrize(
    ("alpha", "ratio", "expected"),
    [
        (1.0, 1.572761, [0.310950, 0.211312, 0.155475, 0.244525, 0.077738]),
        (5.0, 50.137720, [0.015644, 0.580445, 0.007822, 0.392178, 0.003911]),
    ],
)
def test_worked_rows(alpha: float, ratio: float, expected: list[float]) -> None:
    lift = lifted(alpha, torch.tensor([[0, 1, 0, 0, 0]]).double())
    weights = WEIGHTS[None, :, None]
    edited, changed = fuse(weights, VISUAL, lift, QUESTION)
    assert changed.flatten().tolist() == [True, False]
    assert torch.allclose(edited[0, 0, 0], torch.tensor(expected).double(), atol=1e-6)
    assert torch.equal(edited[0, 1], weights[0, 1])
    # r is what the question gained on a key that nothing touched.
    got = (edited[..., 3] / edited[..., 4] / (weights[..., 3] / weights[..., 4]))[0, 0, 0]
    assert float(got) == pytest.approx(ratio, abs=1e-5)


def test_worked_saliency() -> None:
    visual = torch.ones(1, 3, dtype=torch.bool)
    rows = torch.tensor(
        [
            [[0.10, 0.20, 0.05], [0.30, 0.18, 0.05], [0.25, 0.40, 0.05]],
            [[0.02, 0.30, 0.02], [0.02, 0.30, 0.03], [0.02, 0.30, 0.02]],
        ]
    ).double()[None]
    observer = GazeObserver((0,))
    observer.see_weights(seen(rows, visual, [False, True, True]))
    rises = observer.seen[0]
    totals = torch.tensor([[0.42, 0.01]]).double()
    assert torch.allclose(rises.sum(-1), totals, atol=1e-6)
    assert top_heads(rises.sum(-1), 0.5).tolist() == [[1, 0]]
    gaze = torch.tensor([0.10, 0.11, 0]).double()  # mean over the two rows
    assert torch.allclose(rises[0, 0] / 2, gaze, atol=1e-6)
    expected = torch.tensor([[0.909091, 1, 0]]).double()
    assert torch.allclose(gaze_map(rises, visual), expected, atol=1e-6)
    # The first content word alone: only the rows that are content count.
    observer = GazeObserver((0,))
    observer.see_weights(seen(rows, visual, [False, True, False]))
    assert torch.allclose(observer.seen[0][0, 0], torch.tensor([0.2, 0, 0]).double())


def test_map_is_clipped_at_three_standard_deviations() -> None:
    visual = torch.ones(1, 30, dtype=torch.bool)
    visual[0, 25:] = False
    gaze = torch.rand(25, generator=torch.Generator().manual_seed(0)).double()
    gaze[7] = 40.0
    rises = torch.nn.functional.pad(gaze, (0, 5), value=99.0).view(1, 1, 30)
    top = gaze.mean() + 3 * gaze.std()
    assert top < 40
    clipped = gaze.clamp(max=top)
    expected = (clipped - clipped.min()) / (clipped.max() - clipped.min())
    got = gaze_map(rises, visual, 1.0)
    assert torch.allclose(got[0, :25], expected, atol=1e-9) and not got[0, 25:].any()


@pytest.mark.parametrize("value", [0.0, 0.3])
def test_flat_map_and_single_token_raise_nothing(value: float) -> None:
    visual = torch.tensor([[False, True, True, True], [False, False, True, False], [False] * 4])
    rises = torch.full((3, 2, 4), value) * visual[:, None]
    assert torch.equal(gaze_map(rises, visual), torch.zeros(3, 4))


def test_alpha_zero_is_the_identity_of_the_maths() -> None:
    weights = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(0)).softmax(-1)
    visual, question = VISUAL.float().expand(2, 5), QUESTION.float().expand(2, 5)
    edited, changed = fuse(weights, visual, torch.zeros(2, 5), question)
    assert torch.equal(edited, weights) and not changed.any()
    # beta is a knob of its own: it acts without any gain of the image, too.
    edited, changed = fuse(weights, visual, torch.zeros(2, 5), question, beta=2.0)
    assert changed.sum(1).tolist() == [[2, 2, 2]] * 2
    assert torch.allclose(edited.sum(-1), torch.ones(2, 4, 3), atol=1e-6)


def _naive(
    weights: torch.Tensor, visual: Any, factor: Any, question: Any, beta: float
) -> torch.Tensor:
    """One row (H, K) by the formulas, with loops and plain numbers."""
    heads, keys = weights.shape
    row = weights.tolist()
    mass_v = [sum(row[h][j] for j in range(keys) if visual[j]) for h in range(heads)]
    mass_t = [sum(row[h][j] for j in range(keys) if question[j]) for h in range(heads)]
    by_v = sorted(range(heads), key=mass_v.__getitem__)[-(heads // 2) :]
    by_t = sorted(range(heads), key=mass_t.__getitem__)[-(heads // 2) :]
    below = sum(mass_v[h] for h in by_v)
    above = sum(row[h][j] * factor[j] for h in by_v for j in range(keys) if visual[j])
    ratio = above / below if below else 1.0
    for h in range(heads):
        for j in range(keys):
            if h in by_v and visual[j]:
                row[h][j] *= float(factor[j])
            if h in by_t and question[j]:
                row[h][j] *= beta * float(ratio)
        if h in by_v or h in by_t:
            row[h] = [value / sum(row[h]) for value in row[h]]
    return torch.tensor(row, dtype=torch.float64)


@pytest.mark.parametrize("beta", [1.0, 0.6])
def test_every_row_chooses_for_itself_as_the_formulas_say(beta: float) -> None:
    generator = torch.Generator().manual_seed(4)
    weights = torch.randn(2, 8, 3, 14, generator=generator, dtype=torch.float64).mul(2).softmax(-1)
    kinds = torch.full((2, 14), TEXT)
    kinds[0, 2:7], kinds[1, 4:7], kinds[:, 12:] = IMAGE, IMAGE, GENERATED
    visual = kinds == IMAGE
    question = torch.zeros(2, 14, dtype=torch.bool)
    question[0, 8:12], question[1, 8:10] = True, True
    gaze = torch.rand(2, 14, generator=generator, dtype=torch.float64) * visual
    lift = lifted(3.0, gaze)
    edited, changed = fuse(weights, visual.double(), lift, question.double(), beta)
    chosen = set()
    for sample in range(2):
        for row in range(3):
            expected = _naive(
                weights[sample, :, row], visual[sample], 1 + lift[sample], question[sample], beta
            )
            assert torch.allclose(edited[sample, :, row], expected, atol=1e-9)
            chosen.add(tuple(changed[sample, :, row].tolist()))
    assert len(chosen) > 1
    assert torch.allclose(edited.sum(-1), torch.ones(2, 8, 3).double())
    assert torch.equal(edited[~changed], weights[~changed]) and not changed.all()


def test_inside_a_selected_head_ratios_follow_the_map() -> None:
    generator = torch.Generator().manual_seed(5)
    weights = torch.randn(1, 6, 1, 5, generator=generator, dtype=torch.float64).softmax(-1)
    lift = lifted(2.0, torch.tensor([[0, 0.9, 0.2, 0, 0]]).double())
    edited, changed = fuse(weights, VISUAL, lift, QUESTION)
    looks = top_heads((weights * VISUAL[:, None, None]).sum(-1), 0.5)[0, :, 0].bool()
    assert looks.sum() == 3 and changed[0, looks].all()
    before = weights[0, looks, 0, 1] / weights[0, looks, 0, 2]
    after = edited[0, looks, 0, 1] / edited[0, looks, 0, 2]
    assert torch.allclose(after / before, torch.full((3,), math.exp(2.0 * 0.7)).double())
    untouched = edited[0, :, 0, 0] / edited[0, :, 0, 4]
    assert torch.allclose(untouched, weights[0, :, 0, 0] / weights[0, :, 0, 4])


def test_rows_that_see_no_image_keep_their_bits() -> None:
    weights = torch.rand(2, 4, 2, 5)
    weights[:, :, :, 1:3] = 0  # a sliding window that has left the image behind
    weights = weights / weights.sum(-1, keepdim=True)
    lift = lifted(5.0, torch.tensor([[0, 1, 0.5, 0, 0]] * 2))
    visual, question = VISUAL.float().expand(2, 5), QUESTION.float().expand(2, 5)
    edited, changed = fuse(weights, visual, lift, question)
    assert torch.equal(edited, weights) and not changed.any()


KINDS = torch.tensor(
    [
        [PAD, TEXT, IMAGE, IMAGE, TEXT, TEXT, GENERATED],
        [PAD, PAD, TEXT, TEXT, TEXT, TEXT, GENERATED],
    ]
).to(torch.uint8)


def test_plan() -> None:
    rises = torch.zeros(2, 2, 6)
    rises[0, 0, 2:4] = torch.tensor([0.5, 0.1])
    rises[0, 1, 2:4] = torch.tensor([0.1, 0.2])
    keys = make_keys(KINDS, seen={1: rises})
    plan = replace(STRONG, alpha=2.0).plan(keys)
    assert plan is not None and plan.samples == [True, False]
    visual, lift, question = plan.tensors.values()
    assert torch.allclose(lift[0], torch.tensor([0, 0, math.e**2 - 1, 0, 0, 0, 0]))
    assert not lift[1].any() and not visual[1].any() and not question[1].any()
    assert question[0].tolist() == [0, 0, 0, 0, 1, 1, 0]
    weights = torch.rand(2, 4, 1, 7)
    edited, changed = STRONG.edit_weights(weights, **plan.tensors)
    assert changed[0].any() and not changed[1].any() and torch.equal(edited[1], weights[1])
    flat = replace(STRONG, alpha=2.0).plan(make_keys(KINDS, seen={1: torch.zeros(2, 2, 6)}))
    assert flat is not None and flat.samples == [False, False]
    assert replace(STRONG, alpha=0.0).plan(keys) is None
    only_beta = replace(STRONG, alpha=0.0, beta=2.0).plan(make_keys(KINDS))
    assert only_beta is not None and only_beta.samples == [True, False]


def test_a_map_that_was_never_read_is_an_error_and_no_image_is_none() -> None:
    with pytest.raises(StateError, match="filled before gift was on"):
        STRONG.plan(make_keys(KINDS))
    plan = STRONG.plan(make_keys(KINDS[1:]))
    assert plan is not None and plan.samples == [False]
    weights = torch.rand(1, 4, 1, 7)
    edited, changed = STRONG.edit_weights(weights, **plan.tensors)
    assert torch.equal(edited, weights) and not changed.any()


@pytest.mark.parametrize("first_key", [0, 1])
def test_a_question_before_the_image_gives_its_place_to_the_text_behind(first_key: int) -> None:
    weights = torch.rand(2, 1, 7, 7, generator=torch.Generator().manual_seed(0))
    visual = torch.tensor([[0, 0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 0, 0, 0]], dtype=torch.bool)
    question = torch.tensor([[0, 1, 1, 0, 0, 0, 0], [0, 1, 0, 0, 0, 1, 0]], dtype=torch.bool)
    observer = GazeObserver((1,))
    keys = (visual[:, first_key:], weights[..., first_key:])
    observer.see_weights(SeenRows(1, keys[1], 0, first_key, keys[0], question, question))
    rises = (weights[:, 0, 1:] - weights[:, 0, :-1]).clamp_min(0)
    rows = torch.tensor([[0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 1, 0]])  # each with the row before it
    expected = torch.einsum("brk,br->bk", rises, rows.float()) * visual
    assert torch.allclose(observer.seen[1][:, 0], expected[:, first_key:])


def test_a_question_before_the_image_edits_rows() -> None:
    model, processor = vlmfix.load("emoji", device="cpu")
    processor.chat_template = (
        "{% for m in messages %}USER: {% for p in m['content'] %}"
        "{{ '<image>' if p['type'] == 'image' else p['text'] + '\\n' }}{% endfor %}"
        "{% endfor %} ASSISTANT:"
    )
    image = {"type": "image", "image": vlmfix.load_image("emoji:1")}
    content = [{"type": "text", "text": "Is there a dog in the image?"}, image]
    chat = [{"role": "user", "content": content}]
    with vlmfix.wrapped(model, "gift"):
        vlmfix.generate(model, processor, chat, max_new_tokens=3, do_sample=False)
        assert vlmfix.last_call(model).edited_rows > 0


def test_question_without_content_words_counts_in_full() -> None:
    content = torch.zeros(2, 7, dtype=torch.bool)
    content[1, 3] = True
    question = torch.zeros(2, 7, dtype=torch.bool)
    question[:, 3:6] = True
    counted = []
    for words in (content, torch.stack([question[0], content[1]])):
        observer = GazeObserver((1,))
        rows = torch.rand(2, 1, 7, 7, generator=torch.Generator().manual_seed(0))
        visual = torch.ones(2, 7, dtype=torch.bool)
        observer.see_weights(SeenRows(1, rows, 0, 0, visual, question, words))
        counted.append(observer.seen[1])
    assert torch.equal(*counted) and bool((counted[0].sum((1, 2)) > 0).all())


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("chunk_bytes", [2**26, 4000])
def test_the_map_is_that_of_the_models_own_attention(
    name: str, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the attention weights that the model itself returns, whole and in pieces."""
    monkeypatch.setattr(attention, "_CHUNK_BYTES", chunk_bytes)
    tiny = build(name)
    inputs = prompt(tiny)
    observer = GazeObserver((1,))
    observed(tiny.model, inputs, observer)
    tiny.model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = tiny.model(**inputs, output_attentions=True).attentions[1]
    ids = inputs["input_ids"]
    visual = ids == tiny.image_token_id
    for sample in range(len(ids)):
        places = visual[sample].nonzero().flatten()
        expected = torch.zeros(weights.shape[1], ids.shape[1])
        for row in range(int(places[-1]) + 1, ids.shape[1]):
            jump = (weights[sample, :, row] - weights[sample, :, row - 1]).clamp_min(0)
            expected += jump * visual[sample]
        assert expected.sum() > 0.1
        assert torch.allclose(observer.seen[1][sample], expected, atol=1e-4)


def test_both_ways_to_look_first_give_the_same() -> None:
    """The last token run again on the cut cache, and a forward of its own without a cache."""
    tiny = family("llava")
    inputs = prompt(tiny)
    with vlmfix.wrapped(tiny.model, STRONG), torch.no_grad():
        alone = tiny.model(**inputs, use_cache=False).logits[:, -1]
        assert vlmfix.last_call(tiny.model).extra_passes == 1
        cached = tiny.model(**inputs, use_cache=True).logits[:, -1]
    assert torch.allclose(alone, cached, atol=1e-4)
    assert (alone - logits(tiny.model, inputs)).abs().max() > 1e-2


def test_layers_by_preset_calibration_and_depth() -> None:
    tiny = family("llava")
    info = describe_model(tiny.model)

    def known(count: int, method: GazeShiftFusion | None = None, **structure: Any) -> list[Any]:
        other = replace(
            info, num_layers=count, attention=dict.fromkeys(range(count), torch.nn.Linear(1, 1)),
            **structure,
        )  # fmt: skip
        made = (method or GazeShiftFusion()).prepared(other, tiny.model)
        assert list(made.layers(other)) == list(made.edited_layers or ())
        return [made.saliency_layer, made.edited_layers, made.alpha]

    llama: dict[str, Any] = {"text_type": "llama", "vocab_size": 32064}
    assert known(32, **llama, hidden_size=4096) == [11, tuple(range(12, 23)), 5.0]
    assert known(40, **llama, hidden_size=5120) == [10, tuple(range(14, 21)), 5.0]
    qwen = {"model_type": "qwen2_vl", "text_type": "qwen2_vl_text", "hidden_size": 3584}
    assert known(28, **qwen) == [14, tuple(range(5, 19)), 4.0]
    # No preset: by depth.
    assert known(36) == [12, tuple(range(12, 24)), 4.0]
    assert known(3) == [1, (1,), 4.0]
    assert known(3, GazeShiftFusion(2.0, 1.0, 2, (0,))) == [2, (0,), 2.0]
    mark = fingerprint(tiny.model)
    path = cache_folder() / "calibration" / f"{mark}.json"
    measured = Calibration(mark, "llava", gift_saliency_layer=2, gift_layers=(0, 2))
    write(measured, path)
    assert known(3) == [2, (0, 2), 4.0]
    assert known(3, GazeShiftFusion(edited_layers=(1,))) == [2, (1,), 4.0]
    write(replace(measured, gift_layers=()), path)
    nothing = GazeShiftFusion().prepared(info, tiny.model)
    assert "found none" in str(nothing.idle()) and nothing.probe_pass(info) is None
    with pytest.raises(BadInput, match="must be layers with attention"):
        vlmfix.wrap(tiny.model, "gift:saliency_layer=3")
    with pytest.raises(BadInput, match="must be layers with attention"):
        vlmfix.wrap(tiny.model, "gift:edited_layers=0/7")


def test_layers_without_attention_are_not_chosen_by_depth() -> None:
    tiny = family("llava")
    info = describe_model(tiny.model)
    hybrid = replace(
        info, num_layers=12, attention=dict.fromkeys((3, 7, 11), torch.nn.Linear(1, 1))
    )
    made = GazeShiftFusion().prepared(hybrid, tiny.model)
    assert (made.saliency_layer, made.edited_layers) == (3, (7,))


@pytest.mark.parametrize("options", [{"alpha": -1}, {"beta": -0.1}, {"head_share": 1.5}])
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="out of range"):
        GazeShiftFusion(**options)
