"""Llama 4, and what Mistral AI made."""

from __future__ import annotations

from typing import Any

import transformers as hf
from tiny_configs import (
    BOI,
    DECODER,
    DECODER_WITHOUT_HEAD_DIM,
    EOI,
    IMAGE,
    TOWER,
    config,
    decoder,
    tower,
)
from tiny_layouts import Layout, sized

from .register import FOUR, family, picture


@family(Layout(4, picture(16, 3), (BOI,), (EOI,)))
def llama4() -> Any:
    c = config(
        "llama4",
        vision_config={
            **TOWER,
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
            "intermediate_size": 128,
        },
        text_config={
            **DECODER,
            **FOUR,
            "intermediate_size_mlp": 96,
            "num_local_experts": 4,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 12,
            "no_rope_layer_interval": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
        image_token_index=IMAGE,
        boi_token_index=BOI,
        eoi_token_index=EOI,
    )
    return hf.Llama4ForConditionalGeneration(c)


@family(Layout(4, sized(16, 3)))
def mistral3_ministral() -> Any:
    """Ministral 3: Mistral 3 with the ministral3 decoder."""
    c = config(
        "mistral3",
        vision_config=tower("pixtral", head_dim=16),
        text_config=decoder(
            "ministral3",
            sliding_window=None,
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 16.0,
                "original_max_position_embeddings": 64,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
        ),
        image_token_index=IMAGE,
        spatial_merge_size=2,
        vision_feature_layer=-1,
    )
    return hf.Mistral3ForConditionalGeneration(c)


@family(Layout(4, sized(16, 3)))
def mistral3_mistral4() -> Any:
    """Mistral Small 4: Mistral 3 with the mistral4 decoder (latent attention, experts)."""
    c = config(
        "mistral3",
        vision_config=tower("pixtral", head_dim=16),
        text_config={
            **DECODER_WITHOUT_HEAD_DIM,
            "model_type": "mistral4",
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "kv_lora_rank": 16,
            "q_lora_rank": 32,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 12,
        },
        image_token_index=IMAGE,
        spatial_merge_size=2,
        vision_feature_layer=-1,
    )
    return hf.Mistral3ForConditionalGeneration(c)


@family(Layout(4, sized(16, 3)))
def mistral_large4() -> Any:
    c = config(
        "mistral_large4",
        vision_config=tower("pixtral", head_dim=16),
        text_config={
            **DECODER_WITHOUT_HEAD_DIM,
            **FOUR,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 12,
            "head_dim": 8,
            "index_topk": 6,
            "index_head_dim": 16,
            "index_n_heads": 2,
        },
        image_token_index=IMAGE,
        spatial_merge_size=2,
        vision_feature_layer=-1,
    )
    return hf.MistralLarge4ForConditionalGeneration(c)


@family(Layout(4, sized(16, 3)))
def lighton_ocr() -> Any:
    c = config(
        "lighton_ocr",
        vision_config=tower("pixtral", head_dim=16),
        text_config=decoder("qwen3"),
        image_token_id=IMAGE,
        spatial_merge_size=2,
    )
    return hf.LightOnOcrForConditionalGeneration(c)


@family(Layout(16, sized(16, 3)))
def llava_pixtral() -> Any:
    """Pixtral as the hub has it: Llava with a pixtral tower."""
    c = config(
        "llava",
        vision_config=tower("pixtral", head_dim=16),
        text_config=decoder("mistral", sliding_window=None),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return hf.LlavaForConditionalGeneration(c)
