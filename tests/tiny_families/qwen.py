"""Qwen and what shares its grid of patches, its tower or its decoder."""

from __future__ import annotations

from typing import Any

import transformers as hf
from tiny_configs import (
    DECODER,
    DECODER_WITHOUT_HEAD_DIM,
    IMAGE,
    QWEN_IDS,
    QWEN_ROPE,
    QWEN_TOWER,
    VIDEO,
    VISION_END,
    VISION_START,
    config,
)

from .register import FOUR, HYBRID, LINEAR, MOE, family, qwen, spans


@family(qwen())
def qwen3_vl_moe() -> Any:
    c = config(
        "qwen3_vl_moe",
        vision_config={
            **QWEN_TOWER,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
        },
        text_config={**DECODER, **MOE, "rope_parameters": {**QWEN_ROPE, "mrope_interleaved": True}},
        **QWEN_IDS,
    )
    return hf.Qwen3VLMoeForConditionalGeneration(c)


@family(qwen())
def qwen3_5() -> Any:
    rope = {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [1, 1, 2],
        "mrope_interleaved": True,
        "partial_rotary_factor": 0.5,
    }
    c = config(
        "qwen3_5",
        vision_config={**QWEN_TOWER, "num_position_embeddings": 16},
        text_config={**DECODER, **FOUR, **LINEAR, "layer_types": HYBRID, "rope_parameters": rope},
        **QWEN_IDS,
    )
    return hf.Qwen3_5ForConditionalGeneration(c)


@family(qwen())
def qwen3_5_moe() -> Any:
    rope = {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [1, 1, 2],
        "mrope_interleaved": True,
        "partial_rotary_factor": 0.5,
    }
    c = config(
        "qwen3_5_moe",
        vision_config={**QWEN_TOWER, "num_position_embeddings": 16},
        text_config={
            **DECODER,
            **FOUR,
            **LINEAR,
            **MOE,
            "layer_types": HYBRID,
            "rope_parameters": rope,
        },
        **QWEN_IDS,
    )
    return hf.Qwen3_5MoeForConditionalGeneration(c)


@family(qwen())
def qwen4_exp() -> Any:
    rope = {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [1, 1, 2],
        "mrope_interleaved": True,
        "partial_rotary_factor": 0.5,
    }
    c = config(
        "qwen4_exp",
        vision_config={**QWEN_TOWER, "num_position_embeddings": 16},
        text_config={
            **DECODER,
            **FOUR,
            **LINEAR,
            **MOE,
            "layer_types": HYBRID,
            "rope_parameters": rope,
            "hc_lowrank": 8,
            "hc_count": 2,
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 64,
            "indexer_compress_ratio": 4,
        },
        **QWEN_IDS,
    )
    return hf.Qwen4ExpForConditionalGeneration(c)


@family(spans())
def qwen2_5_omni_thinker() -> Any:
    c = config(
        "qwen2_5_omni_thinker",
        vision_config={**QWEN_TOWER, "window_size": 16, "fullatt_block_indexes": [1]},
        text_config={**DECODER_WITHOUT_HEAD_DIM, "rope_parameters": QWEN_ROPE},
        audio_config={
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "d_model": 32,
            "num_mel_bins": 8,
            "max_source_positions": 16,
            "n_window": 4,
            "output_dim": 64,
        },
        audio_token_id=96,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_start_token_id=97,
        audio_end_token_id=98,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        user_token_id=3,
    )
    return hf.Qwen2_5OmniThinkerForConditionalGeneration(c)


@family(spans())
def qwen3_omni_moe_thinker() -> Any:
    c = config(
        "qwen3_omni_moe_thinker",
        vision_config={
            **QWEN_TOWER,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
        },
        text_config={**DECODER, **MOE, "rope_parameters": {**QWEN_ROPE, "mrope_interleaved": True}},
        audio_config={
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "d_model": 32,
            "num_mel_bins": 8,
            "max_source_positions": 16,
            "n_window": 4,
            "output_dim": 64,
            "downsample_hidden_size": 8,
            "n_window_infer": 8,
            "conv_chunksize": 8,
        },
        audio_token_id=96,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_start_token_id=97,
        user_token_id=3,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )
    return hf.Qwen3OmniMoeThinkerForConditionalGeneration(c)
