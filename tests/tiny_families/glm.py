"""GLM."""

from __future__ import annotations

from typing import Any

import transformers as hf
from tiny_configs import DECODER, DECODER_WITHOUT_HEAD_DIM, QWEN_ROPE, QWEN_TOWER, config

from .register import FOUR, GLM_IDS, family, qwen

GLM_ROPE = {**QWEN_ROPE, "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}
GLM_TOWER = {**QWEN_TOWER, "image_size": 16}


@family(qwen())
def glm46v() -> Any:
    c = config(
        "glm46v",
        vision_config={**GLM_TOWER, "model_type": "glm4v_vision"},
        text_config={**DECODER, "model_type": "glm4v_text", "rope_parameters": GLM_ROPE},
        **GLM_IDS,
    )
    return hf.Glm46VForConditionalGeneration(c)


@family(qwen())
def glm4v_moe() -> Any:
    c = config(
        "glm4v_moe",
        vision_config=GLM_TOWER,
        text_config={
            **DECODER,
            "rope_parameters": GLM_ROPE,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
        },
        **GLM_IDS,
    )
    return hf.Glm4vMoeForConditionalGeneration(c)


@family(qwen())
def glm_ocr() -> Any:
    c = config(
        "glm_ocr",
        vision_config=GLM_TOWER,
        text_config={**DECODER, "rope_parameters": GLM_ROPE},
        **GLM_IDS,
    )
    return hf.GlmOcrForConditionalGeneration(c)


@family(qwen())
def glm5_next() -> Any:
    c = config(
        "glm5_next",
        vision_config={**GLM_TOWER, "projection_intermediate_size": 32},
        text_config={
            **DECODER_WITHOUT_HEAD_DIM,
            **FOUR,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "kv_lora_rank": 16,
            "q_lora_rank": 32,
            "v_head_dim": 16,
            "qk_nope_head_dim": 16,
            "index_topk": 6,
            "index_head_dim": 16,
            "index_n_heads": 2,
            "linear_head_dim": 16,
            "linear_num_heads": 4,
            "hc_mult": 2,
            "index_kpool": 2,
        },
        **GLM_IDS,
    )
    return hf.Glm5NextForConditionalGeneration(c)
