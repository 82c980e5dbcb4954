"""Gemma 3n and Gemma 4."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from tiny_configs import BOI, DECODER, EOI, IMAGE, VIDEO, VOCABULARY, config
from tiny_layouts import Inputs, Layout, mm_types, token_types

from .register import FOUR, Convolutions, family, picture, with_tower


def gemma4_patches(side: int, width: int) -> Callable[..., Inputs]:
    """(B, patches, width) and their places (x, y)."""

    def pixels(batch: int, generator: torch.Generator) -> Inputs:
        place = torch.stack(
            torch.meshgrid(torch.arange(side), torch.arange(side), indexing="xy"), -1
        )
        return {
            "pixel_values": torch.rand(batch, side * side, width, generator=generator),
            "image_position_ids": place.reshape(1, -1, 2).repeat(batch, 1, 1),
        }

    return pixels


GEMMA_IDS = {"image_token_id": IMAGE, "boi_token_id": BOI, "eoi_token_id": EOI}
GEMMA4_IDS = {
    **GEMMA_IDS,
    "video_token_id": VIDEO,
    "audio_token_id": 96,
    "boa_token_id": 97,
    "eoa_token_index": 98,
}
GEMMA4_LAYOUT = Layout(4, gemma4_patches(4, 48), (BOI,), (EOI,), extra=mm_types)


def _gemma4(window: int, shared: int, **more: Any) -> Any:
    types = ["sliding_attention", "full_attention"] * 2
    c = config(
        "gemma4",
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "patch_size": 4,
            "pooling_kernel_size": 2,
            "position_embedding_size": 16,
        },
        text_config={
            **DECODER,
            **FOUR,
            "layer_types": types,
            "sliding_window": window,
            "global_head_dim": 32,
            "num_kv_shared_layers": shared,
            "hidden_size_per_layer_input": 8 if shared else 0,
            "vocab_size_per_layer_input": VOCABULARY,
            **more,
        },
        audio_config=None,
        **GEMMA4_IDS,
    )
    return hf.Gemma4ForConditionalGeneration(c)


@family(GEMMA4_LAYOUT)
def gemma4() -> Any:
    """The larger ones: images see themselves whole, no keys are shared."""
    return _gemma4(12, 0, use_bidirectional_attention="vision")


@family(GEMMA4_LAYOUT)
def gemma4_moe() -> Any:
    return _gemma4(
        12,
        0,
        use_bidirectional_attention="vision",
        enable_moe_block=True,
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=32,
    )


@family(GEMMA4_LAYOUT)
def gemma4_e() -> Any:
    """E2B, E4B: the last layers take keys and values from earlier ones."""
    return _gemma4(12, 2)


@family(Layout(4, gemma4_patches(2, 192), (BOI,), (EOI,), extra=mm_types))
def gemma4_unified() -> Any:
    types = ["sliding_attention", "full_attention"] * 2
    c = config(
        "gemma4_unified",
        vision_config={
            "patch_size": 4,
            "pooling_kernel_size": 2,
            "mm_embed_dim": 32,
            "mm_posemb_size": 8,
            "output_proj_dims": 32,
        },
        text_config={
            **DECODER,
            **FOUR,
            "layer_types": types,
            "sliding_window": 12,
            "global_head_dim": 32,
        },
        audio_config={"audio_embed_dim": 16},
        **GEMMA4_IDS,
    )
    return hf.Gemma4UnifiedForConditionalGeneration(c)


@family(Layout(4, picture(16, 3), (BOI,), (EOI,), extra=token_types))
def gemma3n() -> Any:
    from transformers.models.gemma3n import modeling_gemma3n

    c = config(
        "gemma3n",
        vision_config={"hidden_size": 32, "vocab_size": 4, "vocab_offset": 100},
        text_config={
            **DECODER,
            "vocab_size": 110,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 12,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 4,
            "altup_num_inputs": 2,
            "vocab_size_per_layer_input": 100,
            "intermediate_size": [96] * 4,
            "activation_sparsity_pattern": [0.0] * 4,
        },
        audio_config={
            "vocab_size": 4,
            "vocab_offset": 104,
            "hidden_size": 32,
            "conf_num_hidden_layers": 1,
            "conf_num_attention_heads": 2,
            "input_feat_size": 16,
            "sscp_conv_channel_size": (4, 4),
        },
        vision_soft_tokens_per_image=4,
        audio_soft_tokens_per_image=4,
        boa_token_id=97,
        eoa_token_id=98,
        audio_token_id=96,
        **GEMMA_IDS,
    )
    return with_tower(
        modeling_gemma3n,
        "gemma3n_vision",
        lambda v: Convolutions(32, 8, v),
        lambda: hf.Gemma3nForConditionalGeneration(c),
    )
