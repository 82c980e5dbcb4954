"""IMBA: the property tests and worked numbers of its specification."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fused_rows import both_forms
from made_keys import make_keys
from matrix import family, logits, prompt
from tiny import TinyFamily, build, generate_kwargs
from tiny_configs import IMAGE as IMAGE_ID
from tiny_configs import VIDEO as VIDEO_ID

import vlmfix
from vlmfix.base.attention import lift_scores
from vlmfix.errors import BadInput, UnsupportedModel
from vlmfix.families import describe_model
from vlmfix.families.kinds import IMAGE, PAD, TEXT
from vlmfix.families.tower import Received
from vlmfix.methods.imba import PayAttentionToInformedTokens, select_tokens
from vlmfix.methods.pai import PayAttentionToImage
from vlmfix.registry import build as build_method

STRONG = PayAttentionToInformedTokens(
    alpha=2.0, beta=1.0, local_ratio=0.5, start_layer=0, end_layer=3
)
# Padding, text, four visual tokens (plain, local, summary, plain), text; and a text-only prompt.
KINDS = torch.tensor([[PAD, TEXT, IMAGE, IMAGE, IMAGE, IMAGE, TEXT], [PAD] + [TEXT] * 6])
VALUES = torch.tensor([[0, 0, 0, 1, 2, 0, 0], [0] * 7]).float()


def keys_of(values: torch.Tensor, kinds: torch.Tensor = KINDS) -> Any:
    return make_keys(kinds.to(torch.uint8), image_values=values)


def test_worked_row() -> None:
    scores = torch.tensor([1.0, 0.5, -1.0, 0.8, 0.2], dtype=torch.float64).view(1, 1, 1, 5)
    kinds = torch.tensor([[TEXT, IMAGE, IMAGE, IMAGE, TEXT]])
    method = PayAttentionToInformedTokens(alpha=0.7, beta=0.3)
    plan = method.plan(keys_of(torch.tensor([[0.0, 1, 2, 0, 0]]), kinds))
    assert plan is not None
    edited = lift_scores(scores, plan.tensors["lift"].double())
    assert torch.allclose(edited.flatten(), torch.tensor([1.0, 0.85, -0.7, 0.8, 0.2]).double())
    for row, expected in (
        (scores, [0.332234, 0.201510, 0.044963, 0.272010, 0.149282]),
        (edited, [0.301982, 0.259919, 0.055167, 0.247242, 0.135689]),
    ):
        weights = row.softmax(-1).flatten()
        assert torch.allclose(weights, torch.tensor(expected).double(), atol=1e-6)
    # Plain visual tokens keep their ratio to text.
    ratio = scores.softmax(-1)[..., 3] / scores.softmax(-1)[..., 0]
    assert torch.allclose(edited.softmax(-1)[..., 3] / edited.softmax(-1)[..., 0], ratio)


def test_sets_are_disjoint_and_of_the_right_size() -> None:
    generator = torch.Generator().manual_seed(0)
    early = torch.rand(576, generator=generator)
    late = torch.rand(576, generator=generator)
    assert (select_tokens(early, late, 0.25) == 1).sum() == 144
    assert not (select_tokens(early, late, 0.25) == 2).any()
    late[early.topk(5).indices] = 10.0  # five outliers, all of them among the local ones
    late[early.topk(576).indices[-3:]] = 10.0  # three that are not
    groups = select_tokens(early, late, 0.25)
    assert (groups == 2).sum() == 8 and (groups == 1).sum() == 144 - 5
    assert torch.equal((groups == 2).nonzero().flatten(), (late == 10).nonzero().flatten())
    local = early >= early.topk(144).values[-1]
    assert torch.equal(groups == 1, local & (late != 10))
    # 0.29 * 100 is a little below 29 in floating point.
    assert (select_tokens(early[:100], torch.zeros(100), 0.29) == 1).sum() == 29


def test_summary_tokens_are_outliers_by_tukeys_rule() -> None:
    late = torch.full((20,), 0.5)
    assert not (select_tokens(late, late, 0.0) == 2).any()
    late[13] = 0.6
    assert select_tokens(late, late, 0.0).nonzero().flatten().tolist() == [13]
    # Of 1 to 7 and one more beyond, the quartiles are 2.75 and 6.25, so the bound is 11.5.
    for value, found in ((11.4, []), (11.6, [7])):
        late = torch.tensor([1.0, 2, 3, 4, 5, 6, 7, value])
        assert select_tokens(late, late, 0.0).nonzero().flatten().tolist() == found


def test_spatial_tokens_join_the_local_ones() -> None:
    early = torch.tensor([4.0, 3, 2, 1, 0, 0, 0, 0])
    column = early.flip(0)
    flat = torch.zeros(8)
    assert select_tokens(early, flat, 0.25, column, 0.0).tolist() == [1, 1, 0, 0, 0, 0, 0, 0]
    assert select_tokens(early, flat, 0.25, column, 0.25).tolist() == [1, 1, 0, 0, 0, 0, 1, 1]
    late = torch.tensor([9.0, 0, 0, 0, 0, 0, 0, 9])
    assert select_tokens(early, late, 0.25, column, 0.25).tolist() == [2, 1, 0, 0, 0, 0, 1, 2]


def test_class_token_where_there_is_one_and_all_patches_elsewhere() -> None:
    column, cls = torch.tensor([1.0, 2, 3, 4]), torch.tensor([4.0, 3, 2, 1])
    key = torch.zeros(4, 2)
    method = PayAttentionToInformedTokens()
    with_cls = [Received(column, cls, key)] * 2
    assert method.image_values(with_cls).tolist() == [1, 0, 0, 0]
    assert method.image_values([Received(column, None, key)] * 2).tolist() == [0, 0, 0, 1]
    spatial = replace(method, spatial_ratio=0.25)
    assert spatial.image_values(with_cls).tolist() == [1, 0, 0, 1]
    # Local tokens come from the first of the two layers, summary tokens from the second.
    other = Received(torch.zeros(4), torch.tensor([0.0, 0, 0, 9]), key)
    assert method.image_values([with_cls[0], other]).tolist() == [1, 0, 0, 2]


def test_layers_of_the_encoder() -> None:
    def layers(count: int, full: tuple[int, ...]) -> tuple[int, ...]:
        tower: Any = SimpleNamespace(layers=(None,) * count, full_attention=full)
        return PayAttentionToInformedTokens().encoder_layers(tower)

    assert layers(24, tuple(range(24))) == (0, 22)
    assert layers(32, (7, 15, 23, 31)) == (7, 31)
    assert layers(1, (0,)) == (0, 0)


def test_plan() -> None:
    method = PayAttentionToInformedTokens(alpha=0.7, beta=0.3)
    plan = method.plan(keys_of(VALUES))
    assert plan is not None and plan.samples == [True, False]
    assert torch.allclose(plan.tensors["lift"][0], torch.tensor([0, 0, 0, 0.7, 0.3, 0, 0]))
    assert not plan.tensors["lift"][1].any()
    assert plan.notes == {"local": [1, 0], "summary": [1, 0]}
    assert replace(method, alpha=0.0, beta=0.0).plan(keys_of(VALUES)) is None
    only_summary = replace(method, alpha=0.0).plan(keys_of(VALUES))
    assert only_summary is not None and only_summary.samples == [True, False]
    plain = method.plan(keys_of(torch.zeros(2, 7)))
    assert plain is not None and plain.samples == [False, False]
    scores = torch.randn(2, 4, 2, 7)
    assert torch.equal(method.edit_scores(scores, **plain.tensors), scores)


@pytest.mark.parametrize("seed", [0, 1])
def test_fused_form_equals_the_torch_path(seed: int) -> None:
    method = PayAttentionToInformedTokens(alpha=1.5, beta=0.6)
    plan = method.plan(keys_of(VALUES))
    assert plan is not None
    torch_path, fused, plain = both_forms(method, plan, seed=seed)
    assert torch.allclose(torch_path, fused, atol=1e-6)
    assert (torch_path[0] - plain[0]).abs().max() > 1e-2
    assert torch.equal(torch_path[1], plain[1])


def test_all_tokens_local_is_pai() -> None:
    scores = torch.randn(1, 4, 3, 7, generator=torch.Generator().manual_seed(1)).double()
    values = torch.where(KINDS[:1] == IMAGE, 1.0, 0.0)
    every = select_tokens(torch.rand(4), torch.zeros(4), 1.0)
    assert torch.equal(every, torch.ones(4).long())
    plan = PayAttentionToInformedTokens(alpha=0.6, beta=0.6).plan(keys_of(values, KINDS[:1]))
    pai = PayAttentionToImage(alpha=0.6).plan(keys_of(values, KINDS[:1]))
    assert plan is not None and pai is not None
    edited = lift_scores(scores, plan.tensors["lift"])
    expected = PayAttentionToImage(alpha=0.6).edit_scores(scores, **pai.tensors)
    assert torch.equal(edited, expected) and not torch.equal(edited, scores)


def recorded(monkeypatch: pytest.MonkeyPatch, tiny: Any, inputs: Any) -> torch.Tensor:
    """The group of every visual token, row after row, as one forward plans them."""
    found: list[torch.Tensor] = []
    plan = PayAttentionToInformedTokens.plan

    def keep(self: PayAttentionToInformedTokens, keys: Any) -> Any:
        found.append(keys.image_values[keys.kinds == IMAGE])
        assert not keys.image_values[keys.kinds != IMAGE].any()
        return plan(self, keys)

    with monkeypatch.context() as patch, vlmfix.wrapped(tiny.model, STRONG):
        patch.setattr(PayAttentionToInformedTokens, "plan", keep)
        logits(tiny.model, inputs)
    assert len(found) == 3 and all(torch.equal(found[0], other) for other in found)
    return found[0]


def test_tokens_are_those_that_the_encoder_itself_attends_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiny = build("llava")
    inputs = prompt(tiny)
    found = recorded(monkeypatch, tiny, inputs).view(3, -1)
    tiny.model.set_attn_implementation("eager")
    encoder = tiny.model.get_encoder(modality="image")
    with torch.no_grad():
        weights = encoder(inputs["pixel_values"], output_attentions=True).attentions
    assert len(weights) == 2  # so the first layer is the one before the last, too
    cls = weights[0][:, :, 0, 1:].sum(1)
    for image in range(3):
        quartiles = cls[image].quantile(torch.tensor([0.25, 0.75]))
        summary = cls[image] > quartiles[1] + 1.5 * (quartiles[1] - quartiles[0])
        local = torch.zeros(16, dtype=torch.bool)
        local[cls[image].topk(8).indices] = True
        expected = torch.where(summary, 2.0, local.float())
        assert torch.equal(found[image], expected)


def test_text_and_padding_before_the_image_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = family("llava")
    inputs = tiny.inputs(1, seed=3)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    text = torch.full_like(ids[:, :5], 7)
    later = {
        **inputs,
        "input_ids": torch.cat((text, ids), 1),
        "attention_mask": torch.cat((torch.ones_like(text), mask), 1),
    }
    padded = {**later, "attention_mask": torch.cat((torch.zeros_like(text), mask), 1)}
    expected = recorded(monkeypatch, tiny, inputs)
    assert expected.any()
    for other in (later, padded):
        assert torch.equal(recorded(monkeypatch, tiny, other), expected)


def test_images_are_sorted_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = family("llava")
    inputs = tiny.inputs(1)
    pixels = tiny.inputs(3, seed=8)["pixel_values"]
    ids = torch.cat((inputs["input_ids"], inputs["input_ids"][:, 1:]), 1)
    alone = [
        recorded(monkeypatch, tiny, {**inputs, "pixel_values": pixels[at : at + 1]})
        for at in range(3)
    ]
    assert not torch.equal(alone[0], alone[1]) and not torch.equal(alone[1], alone[2])
    for second in (1, 2):
        both = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": pixels[[0, second]],
        }
        expected = torch.cat((alone[0], alone[second]))
        assert torch.equal(recorded(monkeypatch, tiny, both), expected)


def test_preset_layers_and_options() -> None:
    tiny = family("llava")
    info = describe_model(tiny.model)
    llama: dict[str, Any] = {"text_type": "llama", "hidden_size": 4096, "vocab_size": 32064}
    known = PayAttentionToInformedTokens().prepared(
        replace(info, num_layers=32, **llama), tiny.model
    )
    assert (known.alpha, known.beta, known.start_layer, known.end_layer) == (0.7, 0.3, 2, 32)
    other = PayAttentionToInformedTokens().prepared(info, tiny.model)
    assert (other.alpha, other.beta, list(other.layers(info))) == (0.5, 0.2, [1, 2])
    assert build_method("paint:alpha=0.1") == PayAttentionToInformedTokens(alpha=0.1)
    with pytest.raises(BadInput, match="do not lie in a model of 3 layers"):
        vlmfix.wrap(tiny.model, "imba:start_layer=3")
    for options in ({"alpha": -1}, {"beta": 11}, {"local_ratio": 1.1}, {"spatial_ratio": -0.1}):
        with pytest.raises(BadInput, match="out of range"):
            PayAttentionToInformedTokens(**options)


@pytest.mark.parametrize("name", ["llava_onevision", "idefics2"])
def test_families_without_a_token_per_patch_are_refused(name: str) -> None:
    tiny = build(name)
    with pytest.raises(UnsupportedModel, match="cannot be read"):
        vlmfix.wrap(tiny.model, "imba")
    assert "_vlmfix_session" not in tiny.model.__dict__


def test_features_encoded_before_the_call_are_refused() -> None:
    """Nobody saw the tower at work, so which tokens are informative is not known."""
    tiny = family("llava")
    inputs = prompt(tiny)
    with torch.no_grad(), vlmfix.wrapped(tiny.model, "imba"):
        features = tiny.model.model.get_image_features(inputs["pixel_values"], return_dict=True)
        text = {name: value for name, value in inputs.items() if name != "pixel_values"}
        with pytest.raises(vlmfix.StateError, match="Pass all pixels"):
            tiny.model.generate(**text, mm_encoder_outputs={"image": features}, max_new_tokens=2)


def video_of(tiny: TinyFamily, beside: bool) -> dict[str, Any]:
    """Two prompts with a video each, or an image in the first and a video in the second."""
    inputs = tiny.inputs(batch=2)
    ids, rows = inputs["input_ids"], slice(1 if beside else 0, 2)
    kind = IMAGE_ID if tiny.name == "glm4v" else VIDEO_ID  # GLM-4V's frames are image tokens
    ids[rows] = torch.where(ids[rows] == IMAGE_ID, kind, ids[rows])
    inputs["mm_token_type_ids"][rows] *= 2
    patches, grids = inputs.pop("pixel_values"), inputs.pop("image_grid_thw")
    half = len(patches) // 2
    if beside:
        inputs |= {"pixel_values": patches[:half], "image_grid_thw": grids[:1]}
        patches, grids = patches[half:], grids[1:]
    return {**inputs, "pixel_values_videos": patches, "video_grid_thw": grids}


@pytest.mark.parametrize(
    ("name", "beside"),
    [
        ("qwen2_5_vl", False),
        ("qwen2_5_vl", True),
        ("qwen3_vl", False),
        ("qwen3_vl", True),
        ("glm4v", False),
    ],
)
def test_videos_are_refused_by_name(name: str, beside: bool) -> None:
    tiny = build(name)
    inputs = video_of(tiny, beside)
    with vlmfix.wrapped(tiny.model, STRONG) as model:
        with pytest.raises(BadInput, match="imba weighs .* not read for videos"):
            model.generate(**inputs, **generate_kwargs())
        with pytest.raises(BadInput, match="imba weighs .* not read for videos"), torch.no_grad():
            model(**inputs)
        image = tiny.inputs(batch=2)
        with torch.no_grad():  # the video before it is forgotten
            model(**image)
        assert vlmfix.last_call(model).edited_rows > 0


def test_images_too_small_for_a_share_are_said() -> None:
    tiny = family("qwen2_5_vl")
    spec = "imba:local_ratio=0.2;start_layer=0"  # of 4 tokens, of which none stands out
    with (
        vlmfix.wrapped(tiny.model, spec) as model,
        pytest.warns(UserWarning, match="imba chooses none of the 8 visual tokens"),
        torch.no_grad(),
    ):
        model(**tiny.inputs(batch=2))
