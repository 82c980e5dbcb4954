"""Families that hand images over in a way of their own."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from tiny_configs import (
    BLIP_TOWER,
    DECODER,
    DECODER_WITHOUT_HEAD_DIM,
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
from tiny_layouts import Inputs, Layout, sized, small_picture

from .register import FOUR, SAM, SIGLIP, family, picture


# As LLaVA-NeXT, but tiles of 4 x 4 patches become 2 x 2 tokens: 4 + 4 x 4 + 4 newlines.
@family(Layout(24, sized(32, 5, 3)))
def granite4_vision() -> Any:
    c = config(
        "granite4_vision",
        vision_config=tower("siglip_vision_model", **{**SIGLIP, "hidden_size": 64}),
        text_config={**DECODER, **FOUR},
        image_token_index=IMAGE,
        image_grid_pinpoints=TILINGS,
        vision_feature_select_strategy="full",
        downsample_rate="1/2",
        deepstack_layer_map=[[-1, 0], [-2, 1]],
        spatial_target_layers=[2, 2, 3, 3],
        qformer_config={
            "model_type": "blip_2_qformer",
            "num_hidden_layers": 1,
            "intermediate_size": 48,
            "cross_attention_frequency": 1,
            "use_qformer_text_input": False,
            "vocab_size": VOCABULARY,
        },
    )
    return hf.Granite4VisionForConditionalGeneration(c)


# 8 x 8 patches of 4 pixels; two convolutions of stride 2 leave 2 x 2.
@family(Layout(4, picture(32, 3), (96,), (97,)))
def step3p7() -> Any:
    c = config(
        "step3p7",
        vision_config={**TOWER, "image_size": 32, "max_position_embeddings": 64},
        text_config={
            **DECODER,
            **SLIDING,
            "sliding_window": 12,
            "num_sliding_attention_heads": 2,
            "n_routed_experts": 4,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "share_expert_dim": 32,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
        },
        image_token_id=IMAGE,
    )
    return hf.Step3p7ForConditionalGeneration(c)


SAM2 = {**SAM, "downsample_channels": [24, 32]}


# SAM leaves one patch, which asks 144 queries; a separator follows.
@family(Layout(145, picture(64, 3), (96,), (97,)))
def deepseek_ocr2() -> Any:
    c = config(
        "deepseek_ocr2",
        vision_config={
            "sam_config": SAM2,
            "encoder_config": {
                **DECODER_WITHOUT_HEAD_DIM,
                "hidden_size": 32,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "num_hidden_layers": 2,
            },
        },
        text_config={
            **DECODER,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
        },
        image_token_id=IMAGE,
    )
    return hf.DeepseekOcr2ForConditionalGeneration(c)


# 128 pixels: 8 x 8 patches, 2 x 2 after SAM's convolutions, a newline per row, a separator.
@family(Layout(7, picture(128, 3), (96,), (97,)))
def unlimited_ocr() -> Any:
    c = config(
        "unlimited_ocr",
        vision_config={
            "sam_config": {**SAM2, "image_size": 128},
            "encoder_config": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 8,
                "patch_size": 4,
            },
        },
        text_config={
            **DECODER,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "sliding_window": 12,
            "num_key_value_heads": 4,
        },
        image_token_id=IMAGE,
    )
    return hf.UnlimitedOcrForConditionalGeneration(c)


def _tiles(batch: int, generator: torch.Generator) -> Inputs:
    return {
        "pixel_values": torch.randn(batch, 1, 3, 16, 16, generator=generator),
        "pixel_attention_mask": torch.ones(batch, 1, dtype=torch.bool),
    }


@family(Layout(4, _tiles))
def granite_docling() -> Any:
    c = config(
        "granite_docling",
        vision_config={
            **TOWER,
            "out_hidden_size": 64,
            "scale_factor": 2,
            "deepstack_visual_indexes": [0, 1],
            "use_fine_route": False,
        },
        text_config={**DECODER},
        image_token_id=IMAGE,
        pad_token_id=0,
    )
    return hf.GraniteDoclingForConditionalGeneration(c)


def _inkling_patches(batch: int, generator: torch.Generator) -> Inputs:
    return {"pixel_values": torch.randn(batch * 4, 2, 8, 8, 3, generator=generator)}


@family(Layout(4, _inkling_patches, (97,), (98,)))
def inkling() -> Any:
    c = config(
        "inkling_mm_model",
        vision_config={
            "text_hidden_size": 64,
            "patch_size": 8,
            "temporal_patch_size": 2,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        },
        text_config={
            **DECODER,
            **FOUR,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 4,
            "swa_head_dim": 16,
            "sliding_window_size": 12,
            "d_rel": 4,
            "rel_extent": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "moe_intermediate_size": 32,
            "logits_mup_width_multiplier": 1.0,
            "layer_types": ["hybrid_sliding", "hybrid"] * 2,
        },
        audio_config={"n_mel_bins": 8, "mel_vocab_size": 8, "text_hidden_size": 64},
        image_token_id=IMAGE,
        audio_token_id=96,
        image_bos_token_id=97,
        audio_bos_token_id=99,
    )
    return hf.InklingForConditionalGeneration(c)


def _inkling2_patches(batch: int, generator: torch.Generator) -> Inputs:
    return {
        "pixel_values": torch.randn(batch * 4, 8, 8, 3, generator=generator),
        "image_grid_thw": torch.tensor([[1, 2, 2]] * batch),
    }


@family(Layout(4, _inkling2_patches, (97,), (98,)))
def inkling2() -> Any:
    c = config(
        "inkling2",
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "patch_size": 4,
            "posemb_grid_size": 4,
            "projection_hidden_dim": 48,
            "text_hidden_size": 64,
        },
        text_config={
            **DECODER,
            **FOUR,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 16,
            "unpadded_vocab_size": 100,
            "sliding_window_size": 12,
            "d_rel": 4,
            "rel_extent": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "n_layers_per_attn_res_block": 2,
            "layer_types": ["hybrid_sliding", "hybrid"] * 2,
        },
        image_token_id=IMAGE,
    )
    return hf.Inkling2ForConditionalGeneration(c)


VOCABULARY_MAP = {"<image>": IMAGE, **{f"IMGIMG{chr(ord('A') + i)}Z": 60 + i for i in range(8)}}
VQ = {
    "embed_dim": 8,
    "num_embeddings": 8,
    "latent_channels": 8,
    "base_channels": 32,
    "channel_multiplier": [1, 1],
    "num_res_blocks": 1,
}


@family(Layout(64, picture(16, 3)))
def chameleon() -> Any:
    c = config(
        "chameleon",
        vq_config={**VQ, "resolution": 16, "attn_resolutions": []},
        **DECODER_WITHOUT_HEAD_DIM,
        vocabulary_map=VOCABULARY_MAP,
    )
    return hf.ChameleonForConditionalGeneration(c)


def _fuyu(batch: int, generator: torch.Generator) -> Inputs:
    return {"pixel_values": torch.randn(batch, 4, 48, generator=generator)}


@family(Layout(4, _fuyu))
def fuyu() -> Any:
    c = config(
        "fuyu",
        text_config={
            **DECODER_WITHOUT_HEAD_DIM,
            "model_type": "persimmon",
            "num_key_value_heads": 4,
        },
        patch_size=4,
        image_size=16,
        image_token_id=IMAGE,
    )
    return hf.FuyuForCausalLM(c)


QFORMER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "encoder_hidden_size": 32,
    "vocab_size": VOCABULARY,
    "cross_attention_frequency": 1,
    "max_position_embeddings": 64,
}


@family(Layout(4, small_picture(3)))
def blip_2() -> Any:
    c = config(
        "blip-2",
        vision_config=BLIP_TOWER,
        qformer_config=QFORMER,
        text_config=decoder("opt", ffn_dim=96, word_embed_proj_dim=64),
        num_query_tokens=4,
        image_token_index=IMAGE,
    )
    return hf.Blip2ForConditionalGeneration(c)


# As got_ocr2: 128 x 128 pixels become 2 x 2 tokens.
@family(Layout(4, picture(128, 3), (96,), (97,)))
def pp_chart2table() -> Any:
    c = config(
        "pp_chart2table",
        vision_config={**SAM, "image_size": 128},
        text_config=decoder("qwen2"),
        image_token_index=IMAGE,
    )
    return hf.GotOcr2ForConditionalGeneration(c)


def _phi_crops(batch: int, generator: torch.Generator) -> Inputs:
    return {
        "image_pixel_values": torch.randn(batch, 2, 3, 16, 16, generator=generator),
        "image_sizes": torch.tensor([[16, 16]] * batch),
        "image_attention_mask": torch.ones(batch, 2, 4, 4, dtype=torch.long),
    }


# One crop and the whole: 2 x 2 tokens and a column each, and one between.
@family(Layout(13, _phi_crops))
def phi4_multimodal() -> Any:
    c = config(
        "phi4_multimodal",
        **DECODER_WITHOUT_HEAD_DIM,
        vision_config={**TOWER, "image_token_id": IMAGE, "crop_size": 16},
        audio_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_blocks": 1,
            "num_attention_heads": 2,
            "nemo_conv_channels": 8,
            "input_size": 8,
            "ext_pw_out_channel": 32,
            "depthwise_separable_out_channel": 32,
            "audio_token_id": 96,
        },
    )
    return hf.Phi4MultimodalForCausalLM(c)


def _hw(batch: int, generator: torch.Generator) -> Inputs:
    return {
        "pixel_values": torch.randn(batch * 16, 48, generator=generator),
        "image_grid_hw": torch.tensor([[4, 4]] * batch),
    }


@family(Layout(4, _hw, (97,), (98,)))
def nemotron_h_omni() -> Any:
    c = config(
        "nemotron_h_omni",
        vision_config={
            "model_type": "radio",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "patch_size": 4,
            "image_size": 16,
            "video_temporal_patch_size": 2,
        },
        text_config={
            **DECODER,
            "model_type": "nemotron_h",
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "attention", "moe", "attention"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 1,
            "chunk_size": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "moe_shared_expert_intermediate_size": 32,
        },
        audio_config=None,
        vision_hidden_size=32,
        projector_hidden_size=48,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=96,
    )
    return hf.NemotronH_Omni_Reasoning_V3(c)


def _emu(batch: int, generator: torch.Generator) -> Inputs:
    return {
        "pixel_values": torch.randn(batch, 3, 8, 8, generator=generator),
        "image_sizes": torch.tensor([[8, 8]] * batch),
    }


# Two halvings leave 2 x 2 codes, and a newline per row.
@family(Layout(6, _emu))
def emu3() -> Any:
    codes = {f"<|visual token {i:06}|>": 60 + i for i in range(8)}
    c = config(
        "emu3",
        vq_config={
            "codebook_size": 8,
            "embed_dim": 4,
            "latent_channels": 4,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 1],
            "num_res_blocks": 1,
            "attn_resolutions": [],
            "hidden_size": 32,
            "num_attention_heads": 1,
            "temporal_downsample_factor": 1,
        },
        text_config={**DECODER},
        vocabulary_map={"<image>": IMAGE, "<|extra_200|>": 98, **codes},
    )
    return hf.Emu3ForConditionalGeneration(c)
