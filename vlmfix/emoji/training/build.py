"""The untrained model and its processor, from configurations in code."""

from __future__ import annotations

__all__ = ["MEAN", "PATCHES", "STD", "VISUAL_TOKENS", "build_model", "build_processor"]

from typing import Any

from vlmfix.emoji.training.recipe import Recipe
from vlmfix.emoji.training.tokenizer import CHAT_TEMPLATE, IMAGE_TOKEN, build_tokenizer
from vlmfix.emoji.world import SIZE

PATCH = 14
PATCHES = SIZE // PATCH
"""Patches along one side."""
VISUAL_TOKENS = PATCHES * PATCHES
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's


def build_processor() -> Any:
    """A `LlavaProcessor`: CLIP preprocessing to 112 x 112, our tokenizer, the chat template.

    Pictures of any shape are squeezed to a square, so that no object is cropped away.
    """
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    side = {"height": SIZE, "width": SIZE}
    images = CLIPImageProcessorPil(
        size=side, crop_size=side, do_center_crop=False, image_mean=list(MEAN), image_std=list(STD)
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(recipe: Recipe, tokenizer: Any) -> Any:
    """A `LlavaForConditionalGeneration` with new random weights from torch's global generator."""
    import torch
    from transformers import (
        CLIPVisionConfig,
        GenerationConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    vision = CLIPVisionConfig(
        hidden_size=recipe.tower_width,
        intermediate_size=recipe.tower_width * 8 // 3,
        num_hidden_layers=recipe.tower_layers,
        num_attention_heads=6,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=128,
    )
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.decoder_width,
        intermediate_size=704,
        num_hidden_layers=recipe.decoder_layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        **special,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=VISUAL_TOKENS,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    # Word embeddings must be long enough for patches to be aligned with them.
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.06)
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=128, **special)
    return model
