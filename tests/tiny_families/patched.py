"""Further families that take the patches of all images on one axis."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from tiny_configs import (
    DECODER,
    DECODER_WITHOUT_HEAD_DIM,
    IMAGE,
    QWEN_IDS,
    QWEN_ROPE,
    QWEN_TOWER,
    SLIDING,
    TOWER,
    VIDEO,
    VISION_END,
    VISION_START,
    config,
    decoder,
)
from tiny_layouts import Inputs, Layout

from .register import FOUR, GLM_IDS, family, patches, qwen, spans


@family(spans())
def exaone4_5() -> Any:
    c = config(
        "exaone4_5",
        vision_config={
            **QWEN_TOWER,
            "window_size": 16,
            "fullatt_block_indexes": [1],
            "num_key_value_heads": 1,
        },
        text_config=decoder("exaone4", sliding_window=None, layer_types=["full_attention"] * 3),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    return hf.Exaone4_5_ForConditionalGeneration(c)


@family(spans())
def hyperclovax_vision_v2() -> Any:
    c = config(
        "hyperclovax_vision_v2",
        vision_config={
            **QWEN_TOWER,
            "model_type": "qwen2_5_vl_vision",
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        text_config=decoder("hyperclovax"),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    return hf.HyperCLOVAXVisionV2ForConditionalGeneration(c)


@family(qwen(patches(3, 4, 4)))
def paddleocr_vl() -> Any:
    c = config(
        "paddleocr_vl",
        vision_config={**TOWER, "spatial_merge_size": 2},
        text_config={**DECODER, "rope_parameters": QWEN_ROPE},
        **QWEN_IDS,
    )
    return hf.PaddleOCRVLForConditionalGeneration(c)


@family(spans(patches(48, image_merge_sizes=2)))
def video_llama_3() -> Any:
    c = config(
        "video_llama_3",
        vision_config={k: v for k, v in TOWER.items() if k != "image_size"},
        text_config=decoder("qwen2"),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    return hf.VideoLlama3ForConditionalGeneration(c)


@family(spans(patches(3 * 2 * 4 * 4)))
def minimax_m3_vl() -> Any:
    c = config(
        "minimax_m3_vl",
        vision_config={
            **TOWER,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "hidden_size": 48,
        },
        text_config={
            **DECODER,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "dense_intermediate_size": 64,
            "shared_intermediate_size": 32,
            "intermediate_size": 32,
            "rotary_dim": 8,
            "index_n_heads": 2,
            "index_head_dim": 16,
            "index_block_size": 4,
            "index_topk_blocks": 2,
            "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
        },
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        projector_hidden_size=64,
    )
    return hf.MiniMaxM3SparseForConditionalGeneration(c)


def _ernie(ids: torch.Tensor) -> Inputs:
    types = (ids == IMAGE).long()
    span = (ids == IMAGE) | (ids == VISION_START) | (ids == VISION_END)
    return {"mm_token_type_ids": types, "moe_mm_token_type_ids": span.int()}


@family(Layout(4, patches(48), (VISION_START,), (VISION_END,), extra=_ernie))
def ernie4_5_vl_moe() -> Any:
    c = config(
        "ernie4_5_vl_moe",
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "num_heads": 2,
            "patch_size": 4,
            "intermediate_size": 48,
        },
        text_config={
            **DECODER_WITHOUT_HEAD_DIM,
            "moe_intermediate_size": [32, 32],
            "moe_k": 2,
            "moe_num_experts": 4,
            "moe_num_shared_experts": 1,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [3, 3, 2],
            },
        },
        **GLM_IDS,
    )
    return hf.Ernie4_5_VLMoeForConditionalGeneration(c)


@family(spans(patches(3, 4, 4)))
def kimi_k25() -> Any:
    c = config(
        "kimi_k25",
        vision_config={
            "patch_size": 4,
            "pos_emb_height": 4,
            "pos_emb_width": 4,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
        },
        text_config={
            **DECODER_WITHOUT_HEAD_DIM,
            "model_type": "deepseek_v3",
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 16,
            "q_lora_rank": 32,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 12,
        },
        projection_hidden_size=32,
        **QWEN_IDS,
    )
    return hf.Kimi_K25ForConditionalGeneration(c)


@family(spans(patches(3 * 2 * 4 * 4)))
def muse_glimmer() -> Any:
    c = config(
        "muse_glimmer",
        vision_config={
            "patch_size": 4,
            "pos_emb_height": 4,
            "pos_emb_width": 4,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "max_position_embeddings": 64,
        },
        text_config={**DECODER, **SLIDING, "sliding_window": 12},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        out_hidden_size=128,
        projector_hidden_size=48,
    )
    return hf.MuseGlimmerForConditionalGeneration(c)


@family(spans(patches(3 * 2 * 4 * 4)))
def muse_spark() -> Any:
    c = config(
        "muse_spark",
        vision_config={
            "patch_size": 4,
            "pos_emb_height": 4,
            "pos_emb_width": 4,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "max_position_embeddings": 64,
        },
        text_config={
            **DECODER,
            **SLIDING,
            "sliding_window": 12,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "moe_hidden_size": 32,
        },
        audio_config={"hidden_sizes": (8, 8, 8, 8), "depths": (1, 1, 1, 1), "out_hidden_size": 64},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=96,
        out_hidden_size=128,
        projector_hidden_size=48,
    )
    return hf.MuseSparkForConditionalGeneration(c)


@family(qwen(patches(3 * 2 * 4 * 4)))
def cohere_compass() -> Any:
    c = config(
        "cohere_compass",
        vision_config={
            **QWEN_TOWER,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
        },
        text_config={
            **DECODER_WITHOUT_HEAD_DIM,
            **SLIDING,
            "sliding_window": 12,
            "rope_parameters": {
                k: {**QWEN_ROPE, "mrope_interleaved": True}
                for k in ("sliding_attention", "full_attention")
            },
        },
        **QWEN_IDS,
    )
    return hf.CohereCompassForConditionalGeneration(c)


@family(qwen(patches(48)))
def cosmos3_edge() -> Any:
    c = config(
        "cosmos3_edge",
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "patch_size": 4,
            "num_patches": 16,
        },
        text_config={**DECODER, "rope_parameters": QWEN_ROPE},
        projector_hidden_size=48,
        **QWEN_IDS,
    )
    return hf.Cosmos3EdgeForConditionalGeneration(c)


@family(qwen())
def cosmos3_omni() -> Any:
    c = config(
        "cosmos3_omni",
        vision_config={
            **QWEN_TOWER,
            "model_type": "qwen3_vl_vision",
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
        },
        text_config={
            **DECODER,
            "model_type": "qwen3_vl_text",
            "rope_parameters": {**QWEN_ROPE, "mrope_interleaved": True},
        },
        **QWEN_IDS,
    )
    return hf.Cosmos3OmniForConditionalGeneration(c)


@family(spans(patches(3 * 2 * 4 * 4)))
def lfm3_vl() -> Any:
    c = config(
        "lfm3_vl",
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "layer_types": ["conv", "full_attention", "full_attention"],
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "patch_size": 4,
        },
        text_config=decoder(
            "lfm2", **FOUR, layer_types=["conv", "full_attention", "conv", "full_attention"]
        ),
        projector_hidden_size=48,
        **QWEN_IDS,
    )
    return hf.Lfm3VlForConditionalGeneration(c)


@family(spans(patches(3 * 4 * 4)))
def dots3_note() -> Any:
    c = config(
        "dots3_note",
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "patch_size": 4,
            "moe_intermediate_size": 32,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "adapter_in_dim": 32,
            "adapter_out_dim": 64,
            "adapter_merge_size": 2,
            "mlp_layer_types": ["dense", "sparse"],
        },
        text_config={
            **DECODER_WITHOUT_HEAD_DIM,
            "num_key_value_heads": 4,
            "layer_types": ["indexed_attention"] * 3,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "kv_lora_rank": 16,
            "q_lora_rank": 32,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 12,
            "head_dim": 8,
            "index_topk": 6,
            "index_head_dim": 16,
            "index_n_heads": 2,
            "shared_experts_intermediate_size": 32,
        },
        audio_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "feature_size": 8,
            "downsample_hidden_size": 8,
            "adapter_input_size": 32,
            "adapter_out_dim": 64,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=96,
    )
    return hf.Dots3NoteForConditionalGeneration(c)
