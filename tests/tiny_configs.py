"""The configs of the tiny models, one function per family; `tiny.build` redraws the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers as hf
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 100
IMAGE, VIDEO, VISION_START, VISION_END, BOI, EOI = 90, 91, 92, 93, 94, 95

DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DECODER_WITHOUT_HEAD_DIM = {k: v for k, v in DECODER.items() if k != "head_dim"}
TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "num_channels": 3,
}
BLIP_TOWER = {k: v for k, v in TOWER.items() if k != "num_channels"}
QWEN_TOWER: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "out_hidden_size": 64,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 4,
}
QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
QWEN_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
TILINGS = [[16, 32], [32, 16], [32, 32]]
SLIDING = {
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}


def decoder(model_type: str, **more: Any) -> dict[str, Any]:
    """The language model's config as a dict."""
    return {**DECODER, "model_type": model_type, **more}


def tower(model_type: str, **more: Any) -> dict[str, Any]:
    """The vision tower's config as a dict."""
    return {**TOWER, "model_type": model_type, **more}


def config(model_type: str, **fields: Any) -> Any:
    """A transformers config object."""
    return CONFIG_MAPPING[model_type](**fields)


def llava() -> Any:
    c = config(
        "llava",
        vision_config=tower("clip_vision_model"),
        text_config=decoder("llama"),
        image_token_index=IMAGE,
    )
    return hf.LlavaForConditionalGeneration(c)


def llava_next() -> Any:
    c = config(
        "llava_next",
        vision_config=tower("clip_vision_model"),
        text_config=decoder("mistral", sliding_window=None),
        image_token_index=IMAGE,
        image_grid_pinpoints=TILINGS,
    )
    return hf.LlavaNextForConditionalGeneration(c)


def llava_onevision() -> Any:
    c = config(
        "llava_onevision",
        vision_config=tower("siglip_vision_model", vision_use_head=False),
        text_config=decoder("qwen2"),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=TILINGS,
    )
    return hf.LlavaOnevisionForConditionalGeneration(c)


def qwen2_vl() -> Any:
    c = config(
        "qwen2_vl",
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 64,
            "num_heads": 2,
            "patch_size": 4,
            "mlp_ratio": 2,
        },
        text_config={**DECODER_WITHOUT_HEAD_DIM, "rope_parameters": QWEN_ROPE},
        **QWEN_IDS,
    )
    return hf.Qwen2VLForConditionalGeneration(c)


def qwen2_5_vl() -> Any:
    c = config(
        "qwen2_5_vl",
        vision_config={**QWEN_TOWER, "window_size": 16, "fullatt_block_indexes": [1]},
        text_config={**DECODER_WITHOUT_HEAD_DIM, "rope_parameters": QWEN_ROPE},
        **QWEN_IDS,
    )
    return hf.Qwen2_5_VLForConditionalGeneration(c)


def qwen3_vl() -> Any:
    c = config(
        "qwen3_vl",
        vision_config={
            **QWEN_TOWER,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
        },
        text_config={**DECODER, "rope_parameters": {**QWEN_ROPE, "mrope_interleaved": True}},
        **QWEN_IDS,
    )
    return hf.Qwen3VLForConditionalGeneration(c)


def glm4v() -> Any:
    rope = {**QWEN_ROPE, "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}
    c = config(
        "glm4v",
        vision_config={**QWEN_TOWER, "image_size": 16},
        text_config={**DECODER, "rope_parameters": rope},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_start_token_id=VISION_START,
        image_end_token_id=VISION_END,
        video_start_token_id=BOI,
        video_end_token_id=EOI,
    )
    return hf.Glm4vForConditionalGeneration(c)


def internvl() -> Any:
    c = config(
        "internvl",
        vision_config={**BLIP_TOWER, "image_size": [16, 16], "patch_size": [4, 4]},
        text_config=decoder("qwen2"),
        image_token_id=IMAGE,
        image_seq_length=4,
    )
    return hf.InternVLForConditionalGeneration(c)


def idefics3() -> Any:
    c = config(
        "idefics3",
        vision_config=TOWER,
        text_config=decoder("llama"),
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=0,
    )
    return hf.Idefics3ForConditionalGeneration(c)


def smolvlm() -> Any:
    c = config(
        "smolvlm",
        vision_config=TOWER,
        text_config=decoder("llama"),
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=0,
    )
    return hf.SmolVLMForConditionalGeneration(c)


def paligemma() -> Any:
    c = config(
        "paligemma",
        vision_config=tower("siglip_vision_model", projection_dim=64, vision_use_head=False),
        text_config=decoder("gemma"),
        image_token_index=IMAGE,
        projection_dim=64,
        hidden_size=64,
    )
    return hf.PaliGemmaForConditionalGeneration(c)


def gemma3() -> Any:
    c = config(
        "gemma3",
        vision_config=tower("siglip_vision_model", vision_use_head=False),
        text_config=decoder("gemma3_text", query_pre_attn_scalar=16, **SLIDING),
        image_token_index=IMAGE,
        boi_token_index=BOI,
        eoi_token_index=EOI,
        mm_tokens_per_image=4,
    )
    return hf.Gemma3ForConditionalGeneration(c)


def mistral3() -> Any:
    c = config(
        "mistral3",
        vision_config=tower("pixtral", head_dim=16),
        text_config=decoder("mistral", sliding_window=None),
        image_token_index=IMAGE,
        spatial_merge_size=2,
        vision_feature_layer=-1,
    )
    return hf.Mistral3ForConditionalGeneration(c)


def aya_vision() -> Any:
    c = config(
        "aya_vision",
        vision_config=tower("siglip_vision_model", vision_use_head=False),
        text_config=decoder("cohere2", **SLIDING),
        image_token_index=IMAGE,
        downsample_factor=2,
        alignment_intermediate_size=64,
    )
    return hf.AyaVisionForConditionalGeneration(c)


def mllama() -> Any:
    c = config(
        "mllama",
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 2,
            "intermediate_size": 48,
            "vision_output_dim": 64,
            "image_size": 16,
            "patch_size": 4,
            "max_num_tiles": 2,
            "intermediate_layers_indices": [0],
            "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
        },
        text_config={
            **DECODER_WITHOUT_HEAD_DIM,
            "num_hidden_layers": 4,
            "cross_attention_layers": [1, 3],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
        image_token_index=IMAGE,
    )
    return hf.MllamaForConditionalGeneration(c)


def instructblip() -> Any:
    c = config(
        "instructblip",
        vision_config=BLIP_TOWER,
        qformer_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "encoder_hidden_size": 32,
            "vocab_size": VOCABULARY,
            "cross_attention_frequency": 1,
            "max_position_embeddings": 64,
        },
        text_config=decoder("llama"),
        num_query_tokens=4,
        image_token_index=IMAGE,
    )
    return hf.InstructBlipForConditionalGeneration(c)


def kosmos2() -> Any:
    c = config(
        "kosmos-2",
        vision_config=TOWER,
        text_config={
            "vocab_size": VOCABULARY,
            "embed_dim": 64,
            "layers": 3,
            "ffn_dim": 96,
            "attention_heads": 4,
            "max_position_embeddings": 512,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        latent_query_num=4,
    )
    return hf.Kosmos2ForConditionalGeneration(c)


def llama() -> Any:
    return hf.LlamaForCausalLM(config("llama", **DECODER))


BUILDERS: dict[str, Callable[[], Any]] = {
    function.__name__: function
    for function in (
        llava,
        llava_next,
        llava_onevision,
        qwen2_vl,
        qwen2_5_vl,
        qwen3_vl,
        glm4v,
        internvl,
        idefics3,
        smolvlm,
        paligemma,
        gemma3,
        mistral3,
        aya_vision,
        mllama,
        instructblip,
        kosmos2,
        llama,
    )
}
