"""VHR: the property tests and worked numbers of its specification."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from made_keys import make_keys
from matrix import family, logits, prompt
from prompts import observed
from tiny import FAMILIES, generate_kwargs
from transformers import DynamicCache

import vlmfix
from vlmfix.analysis.divergence import (
    LastHeads,
    head_divergence,
    measure_divergence,
    prune_outliers,
)
from vlmfix.base.attention import ProbePass
from vlmfix.engine.plans import AttentionNotes
from vlmfix.errors import BadInput, CompositionError, StateError
from vlmfix.families import ModelInfo, describe_model
from vlmfix.families.kinds import IMAGE, PAD, TEXT
from vlmfix.methods.vhr import VisionAwareHeadReinforcement, reinforce

WITH = torch.tensor([[3, 4], [1, 0], [0.5, 0.5], [2, 2]], dtype=torch.float64)
WITHOUT = torch.tensor([[0, 0], [1, 1], [0.5, 0.5], [8, 10]], dtype=torch.float64)
ALL = (0, 1, 2)


def _text_only(rows: int = 2) -> dict[str, Any]:
    ids = torch.arange(5, 5 + 7 * rows).view(rows, 7)
    ids[:, 0] = 1
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _ledger_scales(model: Any) -> dict[int, torch.Tensor]:
    """{layer: (B, H)} the factors that are stored for the one live cache of a wrapped model."""
    (ledger,) = model.__dict__["_vlmfix_session"].caches._ledgers.values()
    factors = ledger.of(AttentionNotes).factors
    return {layer: scale.values[:, 0, :, 0] for (_, layer), scale in factors.items()}


def test_worked_layer() -> None:
    factors = reinforce(WITH[None], WITHOUT[None], 2.0, prune=True)
    assert factors.tolist() == [[2, 2, 1, 1]]
    expected = torch.tensor([[6, 8], [2, 0], [0.5, 0.5], [2, 2]], dtype=torch.float64)
    assert torch.equal(factors[0, :, None] * WITH, expected)
    assert reinforce(WITH[None], WITHOUT[None], 2.0, prune=False).tolist() == [[2, 1, 1, 2]]


@pytest.mark.parametrize("heads", [8, 28, 32])
def test_half_of_the_heads_of_every_sample_is_scaled(heads: int) -> None:
    generator = torch.Generator().manual_seed(heads)
    one, other = torch.randn(2, 3, heads, 5, generator=generator, dtype=torch.float64)
    factors = reinforce(one, other * torch.tensor([1.0, 3.0, 9.0])[:, None, None], 2.5, prune=False)
    assert (factors == 2.5).sum(1).tolist() == [heads // 2] * 3
    assert set(factors.flatten().tolist()) == {1.0, 2.5}
    for sample in range(3):
        alone = reinforce(one[sample : sample + 1], other[sample : sample + 1], 2.5, prune=False)
        if sample == 0:
            assert torch.equal(alone[0], factors[0])


def test_pruned_heads_are_not_reinforced_and_others_may_be() -> None:
    generator = torch.Generator().manual_seed(4)
    one, other = torch.randn(2, 1, 32, 6, generator=generator, dtype=torch.float64)
    other[0, 7] *= 20
    divergence = head_divergence(one, other)
    assert prune_outliers(divergence, other)[0].argmin() == 7
    assert reinforce(one, other, 2.0, prune=False)[0, 7] == 2
    assert reinforce(one, other, 2.0, prune=True)[0, 7] == 1


@pytest.mark.parametrize(
    "method",
    [
        VisionAwareHeadReinforcement(alpha=1.0),
        VisionAwareHeadReinforcement(alpha=1.0, vhd_source="knockout"),
        VisionAwareHeadReinforcement(reinforced_layers=()),
    ],
)
def test_nothing_to_do_runs_no_second_forward(method: VisionAwareHeadReinforcement) -> None:
    tiny = family("llava")
    inputs = prompt(tiny)
    plain = logits(tiny.model, inputs)
    with vlmfix.wrapped(tiny.model, method):
        assert torch.equal(logits(tiny.model, inputs), plain)
        report = vlmfix.last_call(tiny.model)
        assert (report.passes, report.extra_passes, report.edited_rows) == (1, 0, 0)


@pytest.mark.parametrize(("source", "extra"), [("text", 1), ("knockout", 0)])
@pytest.mark.parametrize("cache", [True, False])
def test_one_more_forward_per_prompt(source: Any, extra: int, cache: bool) -> None:
    tiny = family("llava")
    with vlmfix.wrapped(tiny.model, VisionAwareHeadReinforcement(vhd_source=source)):
        tiny.model.generate(**prompt(tiny), **generate_kwargs(use_cache=cache))
        report = vlmfix.last_call(tiny.model)
    assert (report.passes, report.extra_passes) == (6, extra)
    assert report.edited_rows > 0


def test_all_rows_of_the_prompt_are_scaled() -> None:
    """Half of the heads, in every row of the prompt and of every later step."""
    tiny = family("llava")
    inputs = tiny.inputs(1)
    info = describe_model(tiny.model)
    method = VisionAwareHeadReinforcement(reinforced_layers=ALL, prune_outliers=False)
    with vlmfix.wrapped(tiny.model, method):
        tiny.model.generate(**inputs, **generate_kwargs())
        rows = vlmfix.last_call(tiny.model).rows_by_layer
    expected = (inputs["input_ids"].shape[1] + 5) * info.num_heads // 2
    assert rows == dict.fromkeys(ALL, expected)


@pytest.mark.parametrize("source", ["text", "knockout"])
@pytest.mark.parametrize("name", ["llava", "internvl", "gemma3"])
def test_heads_stay_while_decoding_and_are_those_of_a_sample_alone(source: Any, name: str) -> None:
    tiny = family(name)
    inputs = prompt(tiny, 2)
    assert (inputs["attention_mask"] == 0).any()
    method = VisionAwareHeadReinforcement(vhd_source=source)

    def scales(inputs: dict[str, Any]) -> dict[int, torch.Tensor]:
        cache = DynamicCache(config=tiny.model.config.get_text_config())
        with torch.no_grad():
            out = tiny.model(**inputs, past_key_values=cache)
            first = {layer: scale.clone() for layer, scale in _ledger_scales(tiny.model).items()}
            mask = inputs["attention_mask"]
            for _ in range(3):
                mask = torch.nn.functional.pad(mask, (0, 1), value=1)
                token = out.logits[:, -1:].argmax(-1).clamp(max=80)
                out = tiny.model(input_ids=token, attention_mask=mask, past_key_values=cache)
        last = _ledger_scales(tiny.model)
        assert first.keys() == last.keys() and first
        assert all(torch.equal(first[layer], last[layer]) for layer in first)
        return last

    with vlmfix.wrapped(tiny.model, method):
        together = scales(inputs)
        for row in range(2):
            alone = scales(tiny.single(inputs, row))
            for layer, scale in together.items():
                assert torch.equal(scale[row], alone[layer][0])
                assert 0 < (scale[row] == 2).sum() <= 2
    assert not all(torch.equal(scale[0], scale[1]) for scale in together.values())


def test_the_image_stream_is_reinforced_layer_by_layer() -> None:
    """With L_r = {1, 2}, alpha moves the divergence of layer 2 and not that of layer 1."""
    tiny = family("llava")
    inputs = prompt(tiny)
    seen: dict[float, list[torch.Tensor]] = {}

    class Spy(VisionAwareHeadReinforcement):
        """Notes the head outputs of layers 0, 1 and 2 before they are scaled."""

        def head_scale(
            self, outputs: torch.Tensor, *blind: torch.Tensor, **plan: Any
        ) -> torch.Tensor:
            own = seen.setdefault(self.alpha, [])
            own.append(outputs)
            scale = super().head_scale(outputs, *blind, **plan)
            return torch.ones_like(scale) if len(own) == 1 else scale

    for alpha in (2.0, 3.0):
        with vlmfix.wrapped(tiny.model, Spy(alpha=alpha, reinforced_layers=ALL)):
            logits(tiny.model, inputs)
    for layer, same in ((0, True), (1, True), (2, False)):
        assert torch.equal(seen[2.0][layer], seen[3.0][layer]) == same


def test_the_text_stream_is_plain() -> None:
    """Heads of the first reinforced layer come from the difference of two plain forwards."""
    tiny = family("qwen2_5_vl")
    inputs = prompt(tiny)
    expected = measure_divergence(tiny.model, inputs, prune=True)
    for layer in ALL:
        method = VisionAwareHeadReinforcement(reinforced_layers=(layer,))
        cache = DynamicCache(config=tiny.model.config.get_text_config())
        with vlmfix.wrapped(tiny.model, method):
            logits(tiny.model, inputs, past_key_values=cache)
            scale = _ledger_scales(tiny.model)[layer]
        above = expected[layer] > expected[layer].median(-1, keepdim=True).values
        assert torch.equal(scale == 2, above)


@pytest.mark.parametrize("source", ["text", "knockout"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_without_an_image_is_left_alone(source: Any, name: str) -> None:
    tiny = family(name)
    inputs = _text_only()
    for key in ("token_type_ids", "mm_token_type_ids"):
        if key in prompt(tiny):
            inputs[key] = torch.zeros_like(inputs["input_ids"])
    plain = logits(tiny.model, inputs)
    tokens = tiny.model.generate(**inputs, **generate_kwargs())
    with vlmfix.wrapped(tiny.model, VisionAwareHeadReinforcement(vhd_source=source)):
        assert torch.equal(logits(tiny.model, inputs), plain)
        assert torch.equal(tiny.model.generate(**inputs, **generate_kwargs()), tokens)
        report = vlmfix.last_call(tiny.model)
    assert (report.extra_passes, report.edited_rows) == (0, 0)


@pytest.mark.parametrize("source", ["text", "knockout"])
def test_a_sample_without_an_image_beside_one_with(source: Any) -> None:
    tiny = family("llava")
    inputs = tiny.inputs(2, lengths=(6, 8))
    text = inputs["input_ids"].clone()
    text[1, text[1] == 90] = 33
    mixed = {**inputs, "input_ids": text, "pixel_values": inputs["pixel_values"][:1]}
    plain = logits(tiny.model, mixed)
    cache = DynamicCache(config=tiny.model.config.get_text_config())
    with vlmfix.wrapped(tiny.model, VisionAwareHeadReinforcement(vhd_source=source)):
        edited = logits(tiny.model, mixed, past_key_values=cache)
        scales = _ledger_scales(tiny.model)
    assert torch.equal(edited[1], plain[1])
    assert (edited[0] - plain[0]).abs().max() > 1e-3
    assert all((scale[1] == 1).all() and (scale[0] == 2).any() for scale in scales.values())


def test_head_scale_without_divergence_and_without_an_image() -> None:
    """Even rounding noise must not reinforce the heads of a sample that has no image."""
    outputs = torch.randn(2, 8, 1, 4, generator=torch.Generator().manual_seed(0))
    noisy = outputs + 1e-7 * torch.randn(outputs.shape, generator=torch.Generator().manual_seed(1))
    text = VisionAwareHeadReinforcement()
    knockout = replace(text, vhd_source="knockout")
    for visual, without, same in (
        (torch.tensor([True, True]), outputs, [True, True]),
        (torch.tensor([False, True]), noisy, [True, False]),
    ):
        scale = text.head_scale(outputs, visual=visual, without_image=without[:, :, 0])
        assert scale.shape == (2, 8, 1)
        assert (scale == 1).flatten(1).all(1).tolist() == same
        assert torch.equal(knockout.head_scale(outputs, without, visual=visual), scale)


@pytest.mark.parametrize(("prune", "factors"), [(True, [3, 3, 1, 1]), (False, [3, 1, 1, 3])])
def test_options_reach_the_choice(prune: bool, factors: list[int]) -> None:
    method = VisionAwareHeadReinforcement(alpha=3.0, prune_outliers=prune)
    outputs, visual = WITH[None, :, None].float(), torch.tensor([True])
    scale = method.head_scale(outputs, visual=visual, without_image=WITHOUT[None])
    assert scale.flatten().tolist() == factors


@dataclass(frozen=True)
class Mirror(VisionAwareHeadReinforcement):
    """VHR whose text stream sees what the image stream sees."""

    def probe_pass(self, info: ModelInfo) -> ProbePass | None:
        return ProbePass("whole", LastHeads(tuple(self.layers(info))))


def test_equal_streams_change_nothing() -> None:
    tiny = family("llava")
    inputs = tiny.inputs(1)  # without padding both forwards make the same mask
    plain = logits(tiny.model, inputs)
    with vlmfix.wrapped(tiny.model, Mirror(reinforced_layers=ALL)):
        assert torch.equal(logits(tiny.model, inputs), plain)
        assert vlmfix.last_call(tiny.model).edited_rows == 0
        assert vlmfix.last_call(tiny.model).extra_passes == 1


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_scaling_before_the_projection_scales_that_heads_columns(name: str) -> None:
    """o_proj(scale A) is the sum over heads of scale_h A_h W_h, in every row."""
    tiny = family(name)
    inputs = prompt(tiny)
    module: Any = describe_model(tiny.model).attention[1]
    got: list[tuple[torch.Tensor, torch.Tensor]] = []
    handle = module.o_proj.register_forward_hook(lambda m, a, out: got.append((a[0], out)))
    cache = DynamicCache(config=tiny.model.config.get_text_config())
    logits(tiny.model, inputs)
    method = VisionAwareHeadReinforcement(alpha=3.0, reinforced_layers=(1,))
    with vlmfix.wrapped(tiny.model, method):
        logits(tiny.model, inputs, past_key_values=cache)
        scale = _ledger_scales(tiny.model)[1]
    handle.remove()
    (plain, _), *_, (_, output) = got
    heads = scale.shape[1]
    columns = module.o_proj.weight.unflatten(1, (heads, -1))  # (d_model, H, D)
    outputs = plain.unflatten(-1, (heads, -1))
    expected = torch.einsum("bh,bqhd,mhd->bqm", scale, outputs, columns)
    assert torch.allclose(output, expected, atol=1e-5)


def test_knockout_compares_with_the_same_row_without_visual_keys() -> None:
    """In the first layer nothing above can differ, so it is attention over the other keys."""
    tiny = family("llava")
    inputs = tiny.inputs(1)
    module: Any = describe_model(tiny.model).attention[0]
    seen: list[tuple[torch.Tensor, ...]] = []

    class Spy(VisionAwareHeadReinforcement):
        def head_scale(
            self, outputs: torch.Tensor, *blind: torch.Tensor, **plan: Any
        ) -> torch.Tensor:
            seen.append((outputs, blind[0]))
            return super().head_scale(outputs, *blind, **plan)

    states: list[torch.Tensor] = []
    handle = module.v_proj.register_forward_hook(lambda m, a, out: states.append(out))
    with vlmfix.wrapped(tiny.model, Spy(vhd_source="knockout", reinforced_layers=(0,))):
        logits(tiny.model, inputs)
    handle.remove()
    (with_image, blind), values = seen[0], states[0][0].unflatten(-1, (2, -1))
    text = inputs["input_ids"][0] != 90
    # Attention over fewer keys lies in the span of their values and sums to one.
    for head in range(4):
        basis = torch.cat([values[text, head // 2], torch.ones(int(text.sum()), 1)], 1)
        target = torch.cat([blind[0, head, 0], torch.ones(1)])
        weights = torch.linalg.lstsq(basis.mT, target, driver="gelsd").solution
        assert torch.allclose(weights @ basis, target, atol=1e-4)
    assert (with_image - blind).abs().max() > 1e-3


def test_two_images_are_taken_away_together() -> None:
    tiny = family("llava")
    inputs = tiny.inputs(1)
    ids, image = inputs["input_ids"], torch.full((1, 16), 90)
    both = torch.cat([ids[:, :-3], image, ids[:, -3:]], dim=1)
    prompts = {
        "input_ids": both,
        "attention_mask": torch.ones_like(both),
        "pixel_values": torch.cat([inputs["pixel_values"], inputs["pixel_values"].flip(-1)]),
    }
    text = {"input_ids": both[:, both[0] != 90]}
    streams = []
    for arguments in (prompts, text):
        probe = LastHeads((1,))
        observed(tiny.model, arguments, probe)
        streams.append(probe.seen[1])
    cache = DynamicCache(config=tiny.model.config.get_text_config())
    with vlmfix.wrapped(tiny.model, VisionAwareHeadReinforcement(reinforced_layers=(1,))):
        logits(tiny.model, prompts, past_key_values=cache)
        assert torch.equal(_ledger_scales(tiny.model)[1], reinforce(*streams, 2.0, prune=True))


def test_beams_of_a_sample_share_their_heads() -> None:
    tiny = family("llava")
    chosen: list[torch.Tensor] = []

    class Spy(VisionAwareHeadReinforcement):
        def head_scale(self, outputs: torch.Tensor, **plan: torch.Tensor) -> torch.Tensor:
            chosen.append(super().head_scale(outputs, **plan))
            return chosen[-1]

    with vlmfix.wrapped(tiny.model, Spy()):
        tiny.model.generate(**prompt(tiny, 2), **generate_kwargs(num_beams=3))
    assert len(chosen) == 2  # once per reinforced layer: steps and beams add none
    for scale in chosen:
        beams = scale.view(2, 3, -1)
        assert (beams == beams[:, :1]).all() and (beams == 2).any()


def test_heads_are_scaled_after_the_rows_whatever_the_order_of_the_stack() -> None:
    tiny = family("qwen2_5_vl")
    inputs = prompt(tiny)
    outputs = []
    for stack in (["vhr", "pai:start_layer=0"], ["pai:start_layer=0", "vhr"], "vhr", "pai"):
        with vlmfix.wrapped(tiny.model, stack):
            outputs.append(logits(tiny.model, inputs))
    one, other, *single = outputs
    assert torch.equal(one, other)
    assert all((one - alone).abs().max() > 1e-3 for alone in single)


def test_neutral_alpha_reproduces_64_greedy_tokens() -> None:
    tiny = family("llava")
    inputs = prompt(tiny)
    kwargs = generate_kwargs(max_new_tokens=64, min_new_tokens=64)
    plain = tiny.model.generate(**inputs, **kwargs)
    with vlmfix.wrapped(tiny.model, VisionAwareHeadReinforcement(alpha=1.0)):
        assert torch.equal(tiny.model.generate(**inputs, **kwargs), plain)


def test_plan_is_made_of_samples_with_an_image() -> None:
    kinds = torch.tensor([[PAD, TEXT, IMAGE, TEXT], [TEXT] * 4]).to(torch.uint8)
    method = VisionAwareHeadReinforcement(reinforced_layers=(2,))
    stream = torch.zeros(2, 4, 8)
    plan = method.plan(make_keys(kinds, seen={2: stream}))
    assert plan is not None and plan.samples == [True, False] and not plan.tensors
    assert plan.constants["visual"].tolist() == [True, False]
    assert plan.constants["without_image"] is stream
    blind = replace(method, vhd_source="knockout").plan(make_keys(kinds))
    assert blind is not None and blind.samples == [True, False] and len(blind.constants) == 1
    assert method.plan(make_keys(kinds[1:])) is None
    assert replace(method, alpha=1.0).plan(make_keys(kinds)) is None
    with pytest.raises(StateError, match="Start without this cache"):
        method.plan(make_keys(kinds))


def test_a_cache_that_was_filled_without_vhr_is_refused() -> None:
    tiny = family("llava")
    inputs = tiny.inputs(1)
    cache = DynamicCache(config=tiny.model.config.get_text_config())
    with vlmfix.wrapped(tiny.model, "vhr"):
        with vlmfix.using(tiny.model, "pai"):
            logits(tiny.model, inputs, past_key_values=cache)
        with pytest.raises(StateError, match="this KV cache was"):
            logits(tiny.model, {"input_ids": torch.tensor([[7]])}, past_key_values=cache)


def test_chunked_prefill_is_refused_for_the_knockout_too() -> None:
    tiny = family("llava")
    method = VisionAwareHeadReinforcement(vhd_source="knockout")
    with (
        vlmfix.wrapped(tiny.model, method),
        pytest.raises(CompositionError, match="Generate without prefill_chunk_size"),
    ):
        tiny.model.generate(**tiny.inputs(1), prefill_chunk_size=5, **generate_kwargs())


@pytest.mark.parametrize(
    ("count", "chosen"),
    [(32, [1, *range(18, 32)]), (40, [1, *range(22, 40)]), (28, [1, *range(16, 28)]), (1, [])],
)
def test_layers_scale_with_the_depth(count: int, chosen: Sequence[int]) -> None:
    tiny = family("llava")
    info = replace(describe_model(tiny.model), num_layers=count)
    method = VisionAwareHeadReinforcement().prepared(info, tiny.model)
    assert list(method.layers(info)) == chosen
    without = VisionAwareHeadReinforcement(include_second_layer=False).prepared(info, tiny.model)
    assert list(without.layers(info)) == chosen[1:]
    given = VisionAwareHeadReinforcement(reinforced_layers=(0,)).prepared(info, tiny.model)
    assert list(given.layers(info)) == [0]


def test_preset_is_the_papers() -> None:
    tiny = family("llava")
    info = describe_model(tiny.model)
    for kind in ("llava", "llava_next"):
        large = replace(info, model_type=kind, text_type="llama", hidden_size=4096, num_layers=32)
        large = replace(large, vocab_size=32064)
        assert (
            sum(preset.structure.fits(large) for preset in VisionAwareHeadReinforcement.PRESETS)
            == 1
        )
        method = VisionAwareHeadReinforcement().prepared(large, tiny.model)
        assert (method.reinforced_layers, method.alpha) == ((1, *range(18, 32)), 2.0)


def test_options_out_of_range() -> None:
    tiny = family("llava")
    for layers in ((3,), (-1,)):
        with pytest.raises(BadInput, match="layers of this model, 0 to 2"):
            vlmfix.wrap(tiny.model, VisionAwareHeadReinforcement(reinforced_layers=layers))
    with pytest.raises(BadInput, match="out of range"):
        VisionAwareHeadReinforcement(alpha=-0.1)


def test_options_through_text() -> None:
    from vlmfix.registry import build

    built = build("vhr:alpha=3;reinforced_layers=1/18;prune_outliers=false;vhd_source=knockout")
    assert built == VisionAwareHeadReinforcement(
        alpha=3.0, reinforced_layers=(1, 18), prune_outliers=False, vhd_source="knockout"
    )
    assert build(built.spec()) == built
