"""Families that take whole pictures or tiles of them."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from tiny_configs import (
    BLIP_TOWER,
    DECODER,
    IMAGE,
    SLIDING,
    TILINGS,
    TOWER,
    VIDEO,
    VOCABULARY,
    config,
    decoder,
    tower,
)
from tiny_layouts import Inputs, Layout, mm_types, sized

from .register import (
    FOUR,
    HYBRID,
    LINEAR,
    SAM,
    SIGLIP,
    Convolutions,
    Patches,
    family,
    patches,
    picture,
    with_tower,
)


@family(Layout(16, picture(16, 3)))
def vipllava() -> Any:
    c = config(
        "vipllava",
        vision_config=tower("clip_vision_model"),
        text_config=decoder("llama"),
        image_token_index=IMAGE,
        vision_feature_layer=[0, 0, 1, 1, 0],
    )
    return hf.VipLlavaForConditionalGeneration(c)


@family(Layout(16, picture(16, 3, name="pixel_values_images")))
def video_llava() -> Any:
    c = config(
        "video_llava",
        vision_config=tower("clip_vision_model"),
        text_config=decoder("llama"),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
    )
    return hf.VideoLlavaForConditionalGeneration(c)


@family(Layout(88, sized(32, 5, 3)))
def llava_next_video() -> Any:
    c = config(
        "llava_next_video",
        vision_config=tower("clip_vision_model"),
        text_config=decoder("llama"),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=TILINGS,
    )
    return hf.LlavaNextVideoForConditionalGeneration(c)


@family(Layout(16, picture(16, 3)))
def fast_vlm() -> Any:
    from transformers.models.fast_vlm import modeling_fast_vlm

    c = config(
        "fast_vlm",
        vision_config={
            "model_type": "timm_wrapper",
            "architecture": "fastvit_mci3",
            "do_pooling": True,
            "global_pool": "avg",
            "hidden_size": 32,
            "initializer_range": 0.02,
            "model_args": {"inference_mode": True},
        },
        text_config=decoder("qwen2"),
        image_token_index=IMAGE,
    )
    c.vision_config.hidden_size = 32
    return with_tower(
        modeling_fast_vlm,
        "timm",
        lambda v: Convolutions(32, 4, v),
        lambda: hf.FastVlmForConditionalGeneration(c),
    )


@family(Layout(4, picture(16, 3)))
def cohere2_vision() -> Any:
    c = config(
        "cohere2_vision",
        vision_config=tower("siglip_vision_model", **SIGLIP),
        text_config=decoder("cohere2", **{**SLIDING, "sliding_window": 12}),
        image_token_id=IMAGE,
        downsample_factor=2,
        alignment_intermediate_size=64,
    )
    return hf.Cohere2VisionForConditionalGeneration(c)


@family(Layout(4, picture(16, 1, 3)))
def perception_lm() -> Any:
    from transformers.models.perception_lm import modeling_perception_lm

    c = config(
        "perception_lm",
        vision_config={
            "model_type": "timm_wrapper",
            "architecture": "vit_pe_core_large_patch14_336",
            "model_args": {"embed_dim": 32, "img_size": (16, 16), "depth": 1, "global_pool": ""},
        },
        text_config=decoder("llama"),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        projector_pooling_ratio=2,
        vision_use_cls_token=True,
    )
    return with_tower(
        modeling_perception_lm,
        "timm",
        lambda v: Patches(32, 4, v),
        lambda: hf.PerceptionLMForConditionalGeneration(c),
    )


@family(Layout(16, picture(16, 3)))
def deepseek_vl() -> Any:
    c = config(
        "deepseek_vl",
        vision_config=tower("siglip_vision_model", **SIGLIP),
        text_config=decoder("llama"),
        image_token_id=IMAGE,
    )
    return hf.DeepseekVLForConditionalGeneration(c)


def _both(batch: int, generator: torch.Generator) -> Inputs:
    return {
        "pixel_values": torch.randn(batch, 3, 16, 16, generator=generator),
        "high_res_pixel_values": torch.randn(batch, 3, 64, 64, generator=generator),
    }


@family(Layout(16, _both))
def deepseek_vl_hybrid() -> Any:
    c = config(
        "deepseek_vl_hybrid",
        vision_config=tower("siglip_vision_model", **SIGLIP),
        high_res_vision_config={"model_type": "sam_vision_model", **SAM},
        text_config=decoder("llama"),
        image_token_id=IMAGE,
    )
    return hf.DeepseekVLHybridForConditionalGeneration(c)


@family(Layout(16, picture(16, 3)))
def janus() -> Any:
    c = config(
        "janus",
        vision_config={
            **{k: v for k, v in TOWER.items() if k != "intermediate_size"},
            "mlp_ratio": 1.5,
            "projection_dim": 64,
            "num_image_tokens": 16,
        },
        text_config=decoder("llama"),
        vq_config={
            "embed_dim": 8,
            "num_embeddings": 8,
            "latent_channels": 8,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "num_patches": 4,
            "projection_dim": 64,
            "image_token_embed_dim": 64,
        },
        image_token_id=IMAGE,
    )
    return hf.JanusForConditionalGeneration(c)


@family(Layout(4, picture(16, 3)))
def aria() -> Any:
    c = config(
        "aria",
        vision_config={**TOWER, "model_type": "idefics3_vision"},
        text_config={**DECODER, "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
        projector_patch_to_query_dict={16: 4},
        image_token_index=IMAGE,
    )
    return hf.AriaForConditionalGeneration(c)


@family(Layout(4, picture(16, 1, 3)))
def idefics2() -> Any:
    c = config(
        "idefics2",
        vision_config=TOWER,
        perceiver_config={
            "hidden_size": 64,
            "resampler_n_latents": 4,
            "resampler_depth": 1,
            "resampler_n_heads": 2,
            "resampler_head_dim": 16,
            "num_key_value_heads": 1,
        },
        text_config=decoder("mistral", sliding_window=None),
        image_token_id=IMAGE,
    )
    return hf.Idefics2ForConditionalGeneration(c)


@family(Layout(4, picture(16, 3), (96,), (97,)))
def ovis2() -> Any:
    c = config(
        "ovis2",
        vision_config={
            **TOWER,
            "vocab_size": 20,
            "hidden_stride": 2,
            "num_visual_indicator_tokens": 2,
        },
        text_config=decoder("qwen2"),
        image_token_id=IMAGE,
        visual_indicator_token_ids=[96, 97],
        hidden_size=64,
        vocab_size=VOCABULARY,
    )
    return hf.Ovis2ForConditionalGeneration(c)


# The tower sees 128 x 128 pixels, 8 x 8 patches, and two convolutions leave 2 x 2 tokens.
@family(Layout(4, picture(128, 3), (96,), (97,)))
def got_ocr2() -> Any:
    c = config(
        "got_ocr2",
        vision_config={**SAM, "image_size": 128},
        text_config=decoder("qwen2"),
        image_token_index=IMAGE,
    )
    return hf.GotOcr2ForConditionalGeneration(c)


@family(Layout(4, picture(16, 3)))
def qianfan_ocr() -> Any:
    c = config(
        "qianfan_ocr",
        vision_config={**BLIP_TOWER, "image_size": [16, 16], "patch_size": [4, 4]},
        text_config=decoder("qwen3"),
        image_token_id=IMAGE,
    )
    return hf.QianfanOCRForConditionalGeneration(c)


def _spatial(batch: int, generator: torch.Generator) -> Inputs:
    return {
        "pixel_values": torch.randn(batch, 16, 48, generator=generator),
        "spatial_shapes": torch.tensor([[4, 4]] * batch),
        "pixel_attention_mask": torch.ones(batch, 16, dtype=torch.long),
    }


@family(Layout(4, _spatial))
def lfm2_vl() -> Any:
    c = config(
        "lfm2_vl",
        vision_config={
            "model_type": "siglip2_vision_model",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "patch_size": 4,
            "num_patches": 16,
            "vision_use_head": False,
        },
        text_config=decoder(
            "lfm2", **FOUR, layer_types=["conv", "full_attention", "conv", "full_attention"]
        ),
        image_token_id=IMAGE,
        projector_hidden_size=48,
    )
    return hf.Lfm2VlForConditionalGeneration(c)


# 2 x 2 tokens, a newline per row, and one token before and one behind: 2 x 3 + 2.
@family(Layout(8, patches(48), (96,), (97,), extra=mm_types))
def hunyuan_vl() -> Any:
    c = config(
        "hunyuan_vl",
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "out_hidden_size": 64,
            "patch_size": 4,
            "max_image_size": 16,
            "min_image_size": 4,
            "img_max_token_num": 16,
            "max_vit_seq_len": 64,
            "text_hidden_size": 64,
        },
        text_config={
            **DECODER,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "xdrope_section": [2, 2, 2, 2],
            },
        },
        image_token_id=IMAGE,
        im_start_id=96,
        im_end_id=97,
        im_newline_id=98,
    )
    return hf.HunYuanVLForConditionalGeneration(c)


# 4 x 4 patches; each token is pooled from a square of 2 x 2 of them.
def _molmo(batch: int, generator: torch.Generator) -> Inputs:
    place = torch.arange(16).view(2, 2, 2, 2).permute(0, 2, 1, 3).reshape(4, 4)
    return {
        "pixel_values": torch.randn(batch, 16, 48, generator=generator),
        "image_token_pooling": torch.cat([place + 16 * at for at in range(batch)]),
        "image_grids": torch.tensor([[2, 2, 0, 0]] * batch),
        "image_num_crops": torch.tensor([1] * batch),
    }


@family(Layout(4, _molmo, (96,), (97,), extra=mm_types, places="image_token_pooling"))
def molmo2() -> Any:
    c = config(
        "molmo2",
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "image_size": [16, 16],
            "patch_size": 4,
        },
        adapter_config={
            "vision_feature_layer": [0, 1],
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "intermediate_size": 48,
            "text_hidden_size": 64,
        },
        text_config={**DECODER, "additional_vocab_size": 0},
        image_patch_id=IMAGE,
        image_start_token_id=96,
        image_end_token_id=97,
        low_res_image_start_token_id=98,
        frame_start_token_id=99,
        frame_end_token_id=95,
    )
    return hf.Molmo2ForConditionalGeneration(c)


def _packed(batch: int, generator: torch.Generator) -> Inputs:
    # All patches of a batch side by side: (1, 3, patch, patches x patch).
    return {
        "pixel_values": torch.randn(1, 3, 4, batch * 64 * 4, generator=generator),
        "target_sizes": torch.tensor([[8, 8]] * batch, dtype=torch.int32),
    }


def _minicpm(name: str, cls: str, text: str, **more: Any) -> Any:
    rope = {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [1, 1, 2],
        "mrope_interleaved": True,
        "partial_rotary_factor": 0.5,
    }
    c = config(
        name,
        vision_config={**TOWER, "image_size": 32},
        text_config={
            **DECODER,
            **FOUR,
            **LINEAR,
            "model_type": text,
            "layer_types": HYBRID,
            "rope_parameters": rope,
        },
        insert_layer_id=0,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        **more,
    )
    return getattr(hf, cls)(c)


@family(Layout(4, _packed, (96,), (97,), side_by_side=True))
def minicpmv4_6() -> Any:
    return _minicpm(
        "minicpmv4_6", "MiniCPMV4_6ForConditionalGeneration", "qwen3_5_text", image_size=32
    )


@family(Layout(4, _packed, (96,), (97,), extra=mm_types, side_by_side=True))
def minicpmv4_7() -> Any:
    return _minicpm(
        "minicpmv4_7",
        "MiniCPMV4_7ForConditionalGeneration",
        "qwen3_5_text",
        image_size=32,
        image_start_id=96,
        image_end_id=97,
        slice_start_id=98,
        slice_end_id=99,
        newline_id=95,
    )


@family(Layout(16, _packed, (96,), (97,), side_by_side=True))
def minicpm_ocr() -> Any:
    return _minicpm("minicpm_ocr", "MiniCPMOcrForConditionalGeneration", "qwen3_5_text")
