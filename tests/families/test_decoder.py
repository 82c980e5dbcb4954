"""Decoders that are not alike: what vlmfix reads of them, and what it refuses, with the reason."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
import transformers as hf
from matrix import changed, family, logits
from tiny import IMAGE, build, generate_kwargs

import vlmfix
from vlmfix.analysis.calibrate import calibrate
from vlmfix.analysis.doctor import examine
from vlmfix.analysis.head_list import head_list
from vlmfix.engine.dispatch import own_name
from vlmfix.engine.edits import Inputs
from vlmfix.errors import BadInput, UnsupportedModel
from vlmfix.evals.attribution import ZeroHead
from vlmfix.families import describe_model
from vlmfix.families.source import (
    arguments_of_attention,
    asks_for_implementation,
    norms_of_heads,
    uses_interface,
)
from vlmfix.methods.avc import AttentionalVisionCalibration
from vlmfix.methods.gift import GazeShiftFusion
from vlmfix.methods.m3id import MutualInformationDecoding
from vlmfix.methods.pai import PayAttentionToImage
from vlmfix.methods.steer import Steer, SteeringVectors
from vlmfix.methods.var import VisualAttentionRedistribution
from vlmfix.methods.vhr import VisionAwareHeadReinforcement

Model = Any

PAI = PayAttentionToImage(alpha=0.5, start_layer=0)
NOTHING = PayAttentionToImage(alpha=0.0, start_layer=0)
VHR = VisionAwareHeadReinforcement(alpha=3.0)
VAR = VisualAttentionRedistribution(
    keep=0.1, sink_channels=tuple(range(8)), tau=1.8, rho=0.0, minimum_visual_mass=0.0,
    last_layer="official",
)  # fmt: skip


def _steps(model: Model, inputs: dict[str, Any], **more: Any) -> torch.Tensor:
    """(T, B, V) logits of a greedy answer."""
    output = model.generate(
        **inputs, **generate_kwargs(max_new_tokens=3, min_new_tokens=3, **more),
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return torch.stack(output.logits)


# -- what lies around attention ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["minimax_m3_vl", "mistral_large4", "dots3_note"])
def test_sparse_attention_stays_sparse(name: str) -> None:
    tiny = build(name)
    inputs = tiny.inputs(2)
    plain, answer = logits(tiny.model, inputs), _steps(tiny.model, inputs)
    with vlmfix.wrapped(tiny.model, NOTHING):
        assert torch.equal(logits(tiny.model, inputs), plain)
        assert torch.equal(_steps(tiny.model, inputs), answer)
    with vlmfix.wrapped(tiny.model, PAI):
        assert (logits(tiny.model, inputs) - plain).abs().max() > 1e-3


def test_a_name_that_is_asked_for_equals_both() -> None:
    sparse, dense = (next(iter(describe_model(build(n).model).attention.values())) for n in (
        "mistral_large4", "llava",
    ))  # fmt: skip
    assert asks_for_implementation(sparse) and not asks_for_implementation(dense)
    name = own_name("ours", sparse)
    assert name in ("eager", "sdpa") and name == "ours" and name != "eager"
    assert {"ours": 1}[name] == 1 and "sdpa" not in {name: 1}
    assert type(own_name("ours", dense)) is str


@pytest.mark.parametrize(
    ("name", "named"), [("inkling", "position_bias"), ("inkling2", "position_bias, sinks")]
)
def test_attention_with_more_than_scores_is_refused_by_name(name: str, named: str) -> None:
    tiny = build(name)
    with pytest.raises(UnsupportedModel, match=rf"hands {named} to its attention function"):
        vlmfix.wrap(tiny.model, PAI)
    fits = {row["name"]: row for row in examine(tiny.model)["methods"]}
    for method in ("pai", "avc", "gift:alpha=1;saliency_layer=0;edited_layers=1"):
        with pytest.raises(UnsupportedModel, match="to its attention function"):
            vlmfix.wrap(tiny.model, method)
    assert not fits["pai"]["fits"] and named in fits["pai"]["why"]
    assert not fits["avc"]["fits"] and fits["divprune"]["fits"]


def test_an_argument_that_only_a_forward_shows_is_refused_too() -> None:
    tiny = family("llava")
    attention = describe_model(tiny.model).attention[1]

    def biased(module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "tilt": torch.zeros(1)}

    handle = attention.register_forward_pre_hook(biased, with_kwargs=True)
    try:
        with vlmfix.wrapped(tiny.model, PAI), pytest.raises(UnsupportedModel, match="tilt"):
            logits(tiny.model, tiny.inputs(1))
    finally:
        handle.remove()


def test_whole_numbers_among_the_arguments_are_positions() -> None:
    x = torch.zeros(1, 1, 1, 2)
    inputs = Inputs(torch.nn.Identity(), x, x, x, None, {"position_ids": torch.zeros(1, 1).long()})
    assert inputs.unread == []
    assert inputs._replace(kwargs={"mask": torch.ones(1, dtype=torch.bool)}).unread == ["mask"]


def test_a_norm_per_head_undoes_factors_and_nothing_else() -> None:
    tiny = build("muse_spark")
    inputs = tiny.inputs(2)
    plain = logits(tiny.model, inputs)
    with pytest.raises(UnsupportedModel, match=r"normalises each head behind attention \(o_norm\)"):
        vlmfix.wrap(tiny.model, VHR)
    with pytest.raises(UnsupportedModel, match="o_norm"):
        vlmfix.wrap(tiny.model, "head_pursuit:heads=1.0;alpha=5")
    with vlmfix.wrapped(tiny.model, PAI):
        assert (logits(tiny.model, inputs) - plain).abs().max() > 1e-3
    with vlmfix.wrapped(tiny.model, ZeroHead(1, 0, 4)):  # a zero stays a zero
        assert (logits(tiny.model, inputs) - plain).abs().max() > 1e-3


class _Attention(torch.nn.Module):
    def __init__(self, sinks: torch.Tensor | None = None) -> None:
        super().__init__()
        self.sinks = sinks
        self.q_norm, self.out_norm = torch.nn.LayerNorm(4), torch.nn.LayerNorm(8)

    def forward(self, x: Any, bias: Any) -> Any:
        attend = ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None)  # noqa: F821  read, never run
        y, _ = attend(self, self.q_norm(x), x, x, None, scaling=1.0, s_aux=self.sinks, bias=bias)
        return self.out_norm(y.reshape(1, 2, 8))


def test_the_source_of_an_attention_module_is_read() -> None:
    assert arguments_of_attention(_Attention()) == {"scaling", "bias"}
    assert arguments_of_attention(_Attention(torch.ones(1))) == {"scaling", "bias", "s_aux"}
    assert norms_of_heads(_Attention()) == []  # over all heads at once
    assert uses_interface(_Attention()) and not uses_interface(torch.nn.Linear(1, 1))
    unreadable = torch.nn.Linear(1, 1)
    unreadable.forward = types.MethodType(eval("lambda self, x: x"), unreadable)  # type: ignore[method-assign]
    assert arguments_of_attention(unreadable) == set() and norms_of_heads(unreadable) == []


# -- layers that differ --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gemma4", "gemma4_moe", "gemma4_unified", "step3p7"])
def test_layers_may_have_heads_of_their_own(name: str) -> None:
    tiny = build(name)
    report, info = examine(tiny.model), describe_model(tiny.model)
    assert report["supported"] and report["heads"] == info.num_heads
    inputs = tiny.inputs(2)
    plain = logits(tiny.model, inputs)
    for method in (PAI, VHR, VAR):
        with vlmfix.wrapped(tiny.model, method):
            edited = logits(tiny.model, inputs)
            assert (edited - plain).abs().max() > 1e-3 and changed(tiny.model) > 0
            assert torch.allclose(_steps(tiny.model, inputs)[0], edited, atol=1e-4)


def test_heads_are_counted_layer_by_layer() -> None:
    model = build("step3p7").model
    info = describe_model(model)
    counts = {layer: info.heads_of(layer) for layer in info.attention}
    assert len(set(counts.values())) == 2 and info.num_heads == max(counts.values())
    few = min(counts, key=lambda layer: counts[layer])
    head_list([f"{few}.{counts[few] - 1}"], info, "x")
    with pytest.raises(BadInput, match=f"heads 0 to {counts[few] - 1}"):
        head_list([f"{few}.{counts[few]}"], info, "x")
    inputs = build("step3p7").inputs(1)
    plain = logits(model, inputs)
    with vlmfix.wrapped(model, f"head_pursuit:heads={few}.0;alpha=-1"):
        assert (logits(model, inputs) - plain).abs().max() > 1e-3


# -- keys of an earlier layer --------------------------------------------------------------------


def test_layers_that_share_keys_are_known() -> None:
    assert describe_model(build("gemma3n").model).shared_keys == {2: 0, 3: 1}
    assert describe_model(build("gemma4_e").model).shared_keys == {2: 0, 3: 1}
    assert describe_model(build("gemma4").model).shared_keys == {}


@pytest.mark.parametrize("name", ["gemma3n", "gemma4_e"])
@pytest.mark.parametrize("method", [PAI, VHR, VAR], ids=["pai", "vhr", "var"])
def test_shared_keys_are_edited_in_every_mode_alike(name: str, method: Any) -> None:
    if name == "gemma3n" and method is VAR:
        pytest.skip("refused: the layers hand on two streams")
    tiny = build(name)
    inputs = tiny.inputs(2)  # longer than the window of 12
    plain = logits(tiny.model, inputs)
    with vlmfix.wrapped(tiny.model, method):
        edited, answer = logits(tiny.model, inputs), _steps(tiny.model, inputs)
        assert changed(tiny.model) > 0 and (edited - plain).abs().max() > 1e-3
        uncached = _steps(tiny.model, inputs, use_cache=False)
    assert torch.allclose(answer[0], edited, atol=1e-4)
    assert torch.allclose(answer, uncached, atol=1e-3)


@pytest.mark.parametrize(
    "method",
    [
        NOTHING,
        VisionAwareHeadReinforcement(alpha=1.0),
        VisualAttentionRedistribution(keep=1.0, sink_channels=(0,)),
        GazeShiftFusion(alpha=0.0, saliency_layer=0, edited_layers=(0, 1, 2, 3)),
    ],
    ids=["pai", "vhr", "var", "gift"],
)
def test_rows_that_need_no_logits_stay_out_of_shared_layers(method: Any) -> None:
    tiny = build("gemma4_e")
    inputs = tiny.inputs(2)
    plain = _steps(tiny.model, inputs)
    with vlmfix.wrapped(tiny.model, method):
        assert torch.equal(_steps(tiny.model, inputs), plain)


# -- several streams -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gemma3n", "glm5_next", "qwen4_exp"])
def test_several_residual_streams_have_no_sinks_and_no_direction(name: str) -> None:
    model = build(name).model
    assert describe_model(model).streams == 2
    with pytest.raises(UnsupportedModel, match="hand on 2 streams"):
        vlmfix.wrap(model, VAR)
    with pytest.raises(UnsupportedModel, match="2 streams"):
        calibrate(model, only=("sinks",), save=False)
    vectors = SteeringVectors({1: torch.nn.functional.normalize(torch.ones(64), dim=0)}, "x")
    with pytest.raises(UnsupportedModel, match="site=mlp"):
        vlmfix.wrap(model, Steer(vectors=vectors, strength=1.0, site="layer"))


# -- where the positions are ---------------------------------------------------------------------


class _Expanding(hf.LlavaForConditionalGeneration):
    """One placeholder per image in the prompt, of which the forward makes 16 positions."""

    def forward(self, input_ids: Any = None, pixel_values: Any = None, **kwargs: Any) -> Any:
        whole = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            features = self.get_image_features(pixel_values=pixel_values, return_dict=True)
            image = torch.stack(list(features.pooler_output))
            at = int((input_ids[0] == IMAGE).nonzero())
            whole = torch.cat([whole[:, :at], image, whole[:, at + 1 :]], dim=1)
        hidden = self.model.language_model(inputs_embeds=whole).last_hidden_state
        return types.SimpleNamespace(logits=self.lm_head(hidden))


@pytest.mark.parametrize(
    "method",
    [PAI, VHR, AttentionalVisionCalibration(), MutualInformationDecoding()],
    ids=lambda m: m.name,
)
def test_placeholders_that_a_forward_expands_are_refused(method: Any) -> None:
    model = build("llava").model
    model.__class__ = _Expanding
    ids = torch.tensor([[1, 5, IMAGE, 7, 8]])
    with (
        vlmfix.wrapped(model, method),
        pytest.raises(UnsupportedModel, match=r"gets 20 positions in a forward of 5 tokens"),
    ):
        model(input_ids=ids, pixel_values=torch.randn(1, 3, 16, 16))


def test_rows_that_attention_does_not_know_are_refused() -> None:
    x = torch.zeros(1, 1, 3, 2)
    inputs = Inputs(torch.nn.Identity(), x, x, x, None, {})
    inputs.check(0, (5, 3))
    with pytest.raises(UnsupportedModel, match=r"attends with 3 rows in a forward of 5 tokens"):
        inputs.check(0, (5, 5))


# -- reasons -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "cls", "reason"),
    [
        ("git", "GitForCausalLM", "without a placeholder"),
        ("blip", "BlipForConditionalGeneration", "cross-attention"),
        ("idefics", "IdeficsForVisionText2Text", "cross-attention"),
        ("evolla", "EvollaForProteinText2Text", "proteins"),
        ("pi0", "PI0ForConditionalGeneration", "actions of a robot"),
    ],
)
def test_refused_families_get_the_true_reason(model_type: str, cls: str, reason: str) -> None:
    model = torch.nn.Linear(1, 1)
    model.config = types.SimpleNamespace(model_type=model_type)  # type: ignore[assignment]
    assert hasattr(hf, cls)
    assert hf.CONFIG_MAPPING[model_type].model_type == model_type
    assert reason in examine(model)["reason"]


def test_own_attention_in_the_decoders_file_is_refused_at_wrap() -> None:
    tiny = build("llava")
    for layer in tiny.model.model.language_model.layers:
        layer.self_attn.__class__ = type(
            "RemoteAttention", (type(layer.self_attn),), {"__module__": "types"}
        )
    with pytest.raises(UnsupportedModel, match="RemoteAttention of Llava"):
        vlmfix.wrap(tiny.model, PAI)


# -- families ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["phi4_multimodal", "chameleon", "got_ocr2", "pp_chart2table"])
@pytest.mark.parametrize(
    ("strong", "null"),
    [
        (PAI, PayAttentionToImage(alpha=1e-6, start_layer=0)),
        (VHR, VisionAwareHeadReinforcement(alpha=1 + 1e-6)),
        (
            AttentionalVisionCalibration(alpha=2.5, deviations=0.3, beta=0.0),
            AttentionalVisionCalibration(alpha=1e-6, beta=0.0),
        ),
        (
            MutualInformationDecoding(decay=0.3, beta=0.0),
            MutualInformationDecoding(decay=1e-6, beta=0.0),
        ),
    ],
    ids=["pai", "vhr", "avc", "m3id"],
)
def test_families_without_a_text_configuration(name: str, strong: Any, null: Any) -> None:
    tiny = build(name)
    inputs = tiny.inputs(2)
    plain = _steps(tiny.model, inputs).log_softmax(-1)
    with vlmfix.wrapped(tiny.model, null):
        near = _steps(tiny.model, inputs).log_softmax(-1)
    assert torch.allclose(near, plain, atol=2e-3)
    with vlmfix.wrapped(tiny.model, strong):
        edited, forward = _steps(tiny.model, inputs), logits(tiny.model, inputs)
        uncached = _steps(tiny.model, inputs, use_cache=False)
        alone = [_steps(tiny.model, tiny.single(inputs, row)) for row in range(2)]
    assert (edited[0].log_softmax(-1) - plain[0]).abs().max() > 1e-3
    assert torch.allclose(edited[0], forward, atol=2e-3)
    assert torch.allclose(edited, uncached, atol=5e-3)
    assert torch.allclose(edited, torch.cat(alone, dim=1), atol=5e-3)


@pytest.mark.parametrize("name", ["exaone4_5", "hyperclovax_vision_v2"])
def test_positions_that_generate_drops_cannot_be_kept(name: str) -> None:
    tiny = build(name)
    with pytest.raises(UnsupportedModel, match="positions=original cannot be kept"):
        vlmfix.wrap(tiny.model, "divprune:ratio=0.5;positions=original")
    with vlmfix.wrapped(tiny.model, "divprune:ratio=0.5"):
        _steps(tiny.model, tiny.inputs(2))
        assert changed(tiny.model) > 0
    with vlmfix.wrapped(family("llava").model, "divprune:ratio=0.5;positions=original"):
        pass


def test_positions_may_be_fractions() -> None:
    tiny = build("qwen3_omni_moe_thinker")
    inputs = tiny.inputs(2)
    plain = logits(tiny.model, inputs)
    with vlmfix.wrapped(tiny.model, PAI):
        assert (_steps(tiny.model, inputs)[0] - plain).abs().max() > 1e-3


@pytest.mark.slow
def test_a_decoder_without_a_text_configuration_leaves_flex_attention() -> None:
    tiny = build("phi4_multimodal")
    tiny.model.set_attn_implementation({"": "flex_attention"})
    with (
        pytest.warns(UserWarning, match="runs 'flex_attention' attention"),
        vlmfix.wrapped(tiny.model, PAI),
    ):
        assert tiny.model.config._attn_implementation == "sdpa"
        logits(tiny.model, tiny.inputs(1))
    assert tiny.model.config._attn_implementation == "flex_attention"
