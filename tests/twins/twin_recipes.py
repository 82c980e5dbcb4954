"""What published checkpoints say in their small files, as data: `RECIPES[name]`.

`config` has the facts of config.json as on the hub, in its keys and with its real ids and sizes;
`small` replaces widths and depths alone. The builder (twin_folders.py) shrinks the vocabulary and
the ids with it. Templates are our own, in the structure of the real ones (twin_templates.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import twin_templates as templates
from twin_tokenizers import Token, bert_files

Facts = Mapping[str, Any]

CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
SCALED = {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}

SIZES = ((640, 480), (480, 640), (1000, 200), (50, 50))
"""Width and height of the pictures whose placeholders are counted, see `Recipe.placeholders`."""


@dataclass(frozen=True)
class Recipe:
    """The facts of one checkpoint."""

    config: Facts
    small: Facts
    tokens: tuple[Token, ...]
    tokenizer: Literal["byte_level", "llama", "gemma"]
    tokenizer_config: Facts
    files: Mapping[str, Any]
    """The other small files by name; a text for .jinja, data for .json."""
    placeholders: tuple[int, int, int, int]
    """Visual tokens in the prompt of one picture of each of `SIZES`."""
    contents: Literal["texts", "lists", "both"] = "both"
    """How the template takes contents without an image: as a text, a list of parts, or both."""
    begin: str | None = None
    """The token that the tokenizer writes before every text."""
    needs: tuple[str, ...] = ()
    """Packages that the processor needs."""
    frugal: Facts = field(default_factory=dict)
    """Options of the image processor with which a picture has few tokens."""
    few_tiles: Facts = field(default_factory=dict)
    """Options with which a picture is still split, into fewer tiles."""
    system: bool = True
    """Whether the template takes a system message."""
    without_images: bool = True
    """Whether the processor takes a prompt without a picture."""
    images: int | None = None
    """The most pictures that the processor takes in a prompt."""
    image_text: str = "<image>"
    """Without a template: what stands before the text for each picture."""
    turns: bool = True
    """Whether it takes an answer and a second question."""


def tokens(rows: Mapping[int, str], plain: Mapping[int, str] | None = None) -> tuple[Token, ...]:
    """Special tokens and plain ones by their real ids."""
    special = [Token(number, text) for number, text in rows.items()]
    return (*special, *(Token(number, text, False) for number, text in (plain or {}).items()))


def listed(first: int, texts: tuple[str, ...]) -> dict[int, str]:
    """Tokens whose ids follow one another."""
    return dict(enumerate(texts, first))


RECIPES: dict[str, Recipe] = {}

# -- LLaVA on Vicuna and Mistral -------------------------------------------------------------------

_VICUNA_TOKENS = tokens({0: "<unk>", 1: "<s>", 2: "</s>", 32000: "<image>", 32001: "<pad>"})
_LLAMA_TOKENIZER = {
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": "<s>",
    "clean_up_tokenization_spaces": False,
    "eos_token": "</s>",
    "extra_special_tokens": {"image_token": "<image>"},
    "image_token": "<image>",
    "legacy": False,
    "model_max_length": 10**30,
    "pad_token": "<pad>",
    "padding_side": "left",
    "tokenizer_class": "LlamaTokenizer",
    "unk_token": "<unk>",
}
_CLIP_TOWER = {
    "hidden_size": 1024,
    "image_size": 336,
    "intermediate_size": 4096,
    "model_type": "clip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
    "vocab_size": 32000,
}
_VICUNA = {
    "architectures": ["LlamaForCausalLM"],
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "rms_norm_eps": 1e-05,
    "torch_dtype": "float16",
    "vocab_size": 32064,
}
_LLAVA_SMALL = {"text_config": {**TEXT, "num_key_value_heads": 4}, "vision_config": TOWER}
_CLIP_PICTURES = {
    "crop_size": {"height": 336, "width": 336},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_resize": True,
    "resample": 3,
    "size": {"shortest_edge": 336},
    **CLIP,
    **SCALED,
}
_LLAVA_PROCESSOR = {
    "image_token": "<image>",
    "num_additional_image_tokens": 1,
    "patch_size": 14,
    "vision_feature_select_strategy": "default",
}

RECIPES["llava-1.5-7b-hf"] = Recipe(
    config={
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_seq_length": 576,
        "image_token_index": 32000,
        "model_type": "llava",
        "pad_token_id": 32001,
        "projector_hidden_act": "gelu",
        "text_config": _VICUNA,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "vision_config": _CLIP_TOWER,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    },
    small=_LLAVA_SMALL,
    tokens=_VICUNA_TOKENS,
    tokenizer="llama",
    begin="<s>",
    tokenizer_config={**_LLAMA_TOKENIZER, "processor_class": "LlavaProcessor"},
    files={
        "preprocessor_config.json": {
            **_CLIP_PICTURES,
            "image_processor_type": "CLIPImageProcessor",
            "processor_class": "LlavaProcessor",
        },
        "processor_config.json": {**_LLAVA_PROCESSOR, "processor_class": "LlavaProcessor"},
        "chat_template.json": {"chat_template": templates.LLAVA},
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 32001},
    },
    placeholders=(576, 576, 576, 576),
    contents="lists",
)

_NEXT_SHAPES = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
_NEXT = {
    "architectures": ["LlavaNextForConditionalGeneration"],
    "ignore_index": -100,
    "image_grid_pinpoints": _NEXT_SHAPES,
    "image_seq_length": 576,
    "image_token_index": 32000,
    "model_type": "llava_next",
    "projector_hidden_act": "gelu",
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_image_newline_parameter": True,
    "vision_config": _CLIP_TOWER,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}
_NEXT_FILES = {
    "preprocessor_config.json": {
        **_CLIP_PICTURES,
        "aspect_ratio_setting": "anyres",
        "do_pad": True,
        "image_grid_pinpoints": _NEXT_SHAPES,
        "image_processor_type": "LlavaNextImageProcessor",
        "processor_class": "LlavaNextProcessor",
    },
    "processor_config.json": {**_LLAVA_PROCESSOR, "processor_class": "LlavaNextProcessor"},
}

RECIPES["llava-v1.6-vicuna-7b-hf"] = Recipe(
    config={**_NEXT, "pad_token_id": 32001, "text_config": {**_VICUNA, "pad_token_id": 0}},
    small=_LLAVA_SMALL,
    tokens=_VICUNA_TOKENS,
    tokenizer="llama",
    begin="<s>",
    tokenizer_config={**_LLAMA_TOKENIZER, "processor_class": "LlavaNextProcessor"},
    files={
        **_NEXT_FILES,
        "chat_template.json": {"chat_template": templates.LLAVA},
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 32001},
    },
    placeholders=(2340, 2352, 1598, 1176),
    contents="lists",
)
RECIPES["llava-v1.6-mistral-7b-hf"] = Recipe(
    config={
        **_NEXT,
        "text_config": {
            "architectures": ["MistralForCausalLM"],
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "model_type": "mistral",
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "torch_dtype": "bfloat16",
            "vocab_size": 32064,
        },
    },
    small={"text_config": TEXT, "vision_config": TOWER},
    tokens=_VICUNA_TOKENS,
    tokenizer="llama",
    begin="<s>",
    tokenizer_config={**_LLAMA_TOKENIZER, "processor_class": "LlavaNextProcessor"},
    files={
        **_NEXT_FILES,
        "chat_template.json": {"chat_template": templates.LLAVA_MISTRAL},
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2},
    },
    placeholders=(2340, 2352, 1598, 1176),
    contents="lists",
)

# -- Qwen ------------------------------------------------------------------------------------------

_QWEN_SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>"),
    *("<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
_QWEN_PLAIN = (
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
    *("<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"),
)
_QWEN3_PLAIN = (*_QWEN_PLAIN, "<tool_response>", "</tool_response>", "<think>", "</think>")
_QWEN2_TOKENS = tokens(listed(151643, _QWEN_SPECIAL), listed(151657, _QWEN_PLAIN))
_QWEN3_TOKENS = tokens(listed(151643, _QWEN_SPECIAL), listed(151657, _QWEN3_PLAIN))
_QWEN_TOKENIZER = {
    "add_bos_token": False,
    "add_prefix_space": False,
    "additional_special_tokens": list(_QWEN_SPECIAL[1:]),
    "bos_token": None,
    "clean_up_tokenization_spaces": False,
    "eos_token": "<|im_end|>",
    "errors": "replace",
    "model_max_length": 131072,
    "pad_token": "<|endoftext|>",
    "split_special_tokens": False,
    "tokenizer_class": "Qwen2Tokenizer",
    "unk_token": None,
}
_QWEN_IDS = {
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
}
_QWEN2_TEXT = {
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
_QWEN2_SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_scaling": {"mrope_section": [2, 3, 3]},
}
_QWEN25_TOWER = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 64,
    "fullatt_block_indexes": [1],
}
_QWEN_PICTURES = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_processor_type": "Qwen2VLImageProcessor",
    **CLIP,
}
_QWEN_SAMPLING = {
    "bos_token_id": 151643,
    "pad_token_id": 151643,
    "do_sample": True,
    "eos_token_id": [151645, 151643],
}

RECIPES["Qwen2-VL-7B-Instruct"] = Recipe(
    config={
        **_QWEN2_TEXT,
        **_QWEN_IDS,
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "max_position_embeddings": 32768,
        "model_type": "qwen2_vl",
        "vision_config": {
            "depth": 32,
            "embed_dim": 1280,
            "mlp_ratio": 4,
            "num_heads": 16,
            "in_chans": 3,
            "hidden_size": 3584,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
        },
    },
    small={
        **_QWEN2_SMALL,
        "vision_config": {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 64},
    },
    tokens=_QWEN2_TOKENS[:14],
    tokenizer="byte_level",
    tokenizer_config={**_QWEN_TOKENIZER, "model_max_length": 32768, "padding_side": "left"},
    files={
        "preprocessor_config.json": {**_QWEN_PICTURES, "processor_class": "Qwen2VLProcessor"},
        "chat_template.json": {"chat_template": templates.QWEN2},
        "generation_config.json": {
            **_QWEN_SAMPLING,
            "temperature": 0.01,
            "top_p": 0.001,
            "top_k": 1,
        },
    },
    needs=("torchvision",),
    placeholders=(391, 391, 252, 4),
)


def _qwen25(**config: Any) -> Recipe:
    return Recipe(
        config={
            **_QWEN2_TEXT,
            **_QWEN_IDS,
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "max_position_embeddings": 128000,
            "model_type": "qwen2_5_vl",
            "vision_config": {
                "depth": 32,
                "hidden_act": "silu",
                "hidden_size": 1280,
                "intermediate_size": 3420,
                "num_heads": 16,
                "in_chans": 3,
                "out_hidden_size": config.get("hidden_size", 3584),
                "patch_size": 14,
                "spatial_merge_size": 2,
                "spatial_patch_size": 14,
                "window_size": 112,
                "fullatt_block_indexes": [7, 15, 23, 31],
                "tokens_per_second": 2,
                "temporal_patch_size": 2,
            },
            **config,
        },
        small={**_QWEN2_SMALL, "vision_config": _QWEN25_TOWER},
        tokens=_QWEN2_TOKENS,
        tokenizer="byte_level",
        tokenizer_config={**_QWEN_TOKENIZER, "chat_template": templates.QWEN2},
        files={
            "preprocessor_config.json": {
                **_QWEN_PICTURES,
                "processor_class": "Qwen2_5_VLProcessor",
            },
            "chat_template.json": {"chat_template": templates.QWEN2},
            "generation_config.json": {
                **_QWEN_SAMPLING,
                "repetition_penalty": 1.05,
                "temperature": 0.000001,
            },
        },
        needs=("torchvision",),
        placeholders=(391, 391, 252, 4),
    )


RECIPES["Qwen2.5-VL-7B-Instruct"] = _qwen25()
RECIPES["Qwen2.5-VL-3B-Instruct"] = _qwen25(
    hidden_size=2048,
    intermediate_size=11008,
    max_window_layers=70,
    num_attention_heads=16,
    num_hidden_layers=36,
    num_key_value_heads=2,
    tie_word_embeddings=True,
    vocab_size=151936,
)

_OV_SHAPES = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]
_SIGLIP = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "model_type": "siglip_vision_model",
    "num_attention_heads": 16,
    "patch_size": 14,
    "vision_use_head": False,
}

RECIPES["llava-onevision-qwen2-7b-ov-hf"] = Recipe(
    config={
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "ignore_index": -100,
        "image_grid_pinpoints": _OV_SHAPES,
        "image_token_index": 151646,
        "model_type": "llava_onevision",
        "projector_hidden_act": "gelu",
        "text_config": {
            "architectures": ["Qwen2ForCausalLM"],
            "bos_token_id": 151643,
            "eos_token_id": 151645,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "model_type": "qwen2",
            "num_attention_heads": 28,
            "num_hidden_layers": 28,
            "num_key_value_heads": 4,
            "rope_theta": 1000000.0,
            "torch_dtype": "bfloat16",
            "vocab_size": 152128,
        },
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "use_image_newline_parameter": True,
        "video_token_index": 151647,
        "vision_aspect_ratio": "anyres_max_9",
        "vision_config": {**_SIGLIP, "image_size": 384, "num_hidden_layers": 26},
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    },
    small={"text_config": TEXT, "vision_config": TOWER},
    tokens=tokens(
        listed(151643, ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"))
    ),
    tokenizer="byte_level",
    tokenizer_config={
        **_QWEN_TOKENIZER,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "model_max_length": 32768,
        "processor_class": "LlavaOnevisionProcessor",
    },
    files={
        "preprocessor_config.json": {
            **HALF,
            **SCALED,
            "do_convert_rgb": True,
            "do_pad": True,
            "do_resize": True,
            "image_grid_pinpoints": _OV_SHAPES,
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "processor_class": "LlavaOnevisionProcessor",
            "resample": 3,
            "size": {"height": 384, "width": 384},
        },
        "video_preprocessor_config.json": {
            **HALF,
            **SCALED,
            "do_convert_rgb": True,
            "do_resize": True,
            "image_processor_type": "LlavaOnevisionVideoProcessor",
            "processor_class": "LlavaOnevisionProcessor",
            "resample": 3,
            "size": {"height": 384, "width": 384},
        },
        "processor_config.json": {
            "image_token": "<image>",
            "num_image_tokens": 729,
            "processor_class": "LlavaOnevisionProcessor",
            "video_token": "<video>",
            "vision_aspect_ratio": "anyres_max_9",
            "vision_feature_select_strategy": "full",
        },
        "chat_template.json": {"chat_template": templates.ONEVISION},
        "generation_config.json": {
            **_QWEN_SAMPLING,
            "repetition_penalty": 1.05,
            "temperature": 0.7,
            "top_k": 20,
            "top_p": 0.8,
        },
    },
    needs=("torchvision",),
    contents="lists",
    placeholders=(2929, 2943, 2123, 1485),
)

_QWEN3_PICTURES = {
    "size": {"longest_edge": 16777216, "shortest_edge": 65536},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_processor_type": "Qwen2VLImageProcessorFast",
    "processor_class": "Qwen3VLProcessor",
    **HALF,
}
_QWEN3_TOWER = {
    "deepstack_visual_indexes": [8, 16, 24],
    "depth": 27,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "in_channels": 3,
    "initializer_range": 0.02,
    "intermediate_size": 4304,
    "model_type": "qwen3_vl",
    "num_heads": 16,
    "num_position_embeddings": 2304,
    "out_hidden_size": 4096,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}

RECIPES["Qwen3-VL-8B-Instruct"] = Recipe(
    config={
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "image_token_id": 151655,
        "model_type": "qwen3_vl",
        "text_config": {
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 151643,
            "dtype": "bfloat16",
            "eos_token_id": 151645,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "initializer_range": 0.02,
            "intermediate_size": 12288,
            "max_position_embeddings": 262144,
            "model_type": "qwen3_vl_text",
            "num_attention_heads": 32,
            "num_hidden_layers": 36,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-06,
            "rope_scaling": {
                "mrope_interleaved": True,
                "mrope_section": [24, 20, 20],
                "rope_type": "default",
            },
            "rope_theta": 5000000,
            "use_cache": True,
            "vocab_size": 151936,
        },
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "video_token_id": 151656,
        "vision_config": _QWEN3_TOWER,
        "vision_end_token_id": 151653,
        "vision_start_token_id": 151652,
    },
    small={
        "text_config": {**TEXT, "rope_scaling": {"mrope_section": [4, 2, 2]}},
        "vision_config": {
            "depth": 4,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 64,
            "deepstack_visual_indexes": [0, 1, 2],
        },
    },
    tokens=_QWEN3_TOKENS,
    tokenizer="byte_level",
    tokenizer_config={**_QWEN_TOKENIZER, "model_max_length": 262144},
    files={
        "preprocessor_config.json": _QWEN3_PICTURES,
        "video_preprocessor_config.json": {
            **_QWEN3_PICTURES,
            "size": {"longest_edge": 25165824, "shortest_edge": 4096},
            "video_processor_type": "Qwen3VLVideoProcessor",
        },
        "chat_template.jinja": templates.QWEN3,
        "generation_config.json": {
            **_QWEN_SAMPLING,
            "repetition_penalty": 1.0,
            "temperature": 0.7,
            "top_k": 20,
            "top_p": 0.8,
        },
    },
    needs=("torchvision",),
    placeholders=(300, 300, 186, 64),
)

# -- InternVL --------------------------------------------------------------------------------------

_INTERNVL_TOKENS = (
    *_QWEN2_TOKENS,
    *tokens(
        listed(
            151665,
            (
                *("<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>"),
                *("<box>", "</box>", "<video>"),
            ),
        )
    ),
)

RECIPES["InternVL3-8B-hf"] = Recipe(
    config={
        "architectures": ["InternVLForConditionalGeneration"],
        "downsample_ratio": 0.5,
        "image_seq_length": 256,
        "image_token_id": 151667,
        "model_type": "internvl",
        "projector_hidden_act": "gelu",
        "text_config": {
            "architectures": ["Qwen2ForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": 151643,
            "eos_token_id": 151645,
            "hidden_act": "silu",
            "hidden_size": 3584,
            "initializer_range": 0.02,
            "intermediate_size": 18944,
            "max_position_embeddings": 32768,
            "max_window_layers": 70,
            "model_type": "qwen2",
            "num_attention_heads": 28,
            "num_hidden_layers": 28,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-06,
            "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"},
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": 151675,
        },
        "torch_dtype": "bfloat16",
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "attention_bias": True,
            "hidden_act": "gelu",
            "hidden_size": 1024,
            "image_size": [448, 448],
            "intermediate_size": 4096,
            "layer_norm_eps": 1e-06,
            "layer_scale_init_value": 0.1,
            "model_type": "internvl_vision",
            "norm_type": "layer_norm",
            "num_attention_heads": 16,
            "num_channels": 3,
            "num_hidden_layers": 24,
            "patch_size": [14, 14],
            "torch_dtype": "bfloat16",
            "use_absolute_position_embeddings": True,
            "use_mask_token": False,
            "use_mean_pooling": True,
            "use_qk_norm": False,
        },
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
    },
    small={"text_config": TEXT, "vision_config": TOWER},
    tokens=_INTERNVL_TOKENS,
    tokenizer="byte_level",
    tokenizer_config={
        **_QWEN_TOKENIZER,
        "chat_template": templates.INTERNVL,
        "context_image_token": "<IMG_CONTEXT>",
        "end_image_token": "</img>",
        "extra_special_tokens": {
            "context_image_token": "<IMG_CONTEXT>",
            "end_image_token": "</img>",
            "start_image_token": "<img>",
            "video_token": "<video>",
        },
        "model_max_length": 8192,
        "processor_class": "InternVLProcessor",
        "return_token_type_ids": False,
        "start_image_token": "<img>",
        "video_token": "<video>",
    },
    files={
        "preprocessor_config.json": {
            **SCALED,
            "crop_to_patches": False,
            "data_format": "channels_first",
            "default_to_square": True,
            "do_convert_rgb": True,
            "do_resize": True,
            "image_mean": [0.485, 0.456, 0.406],
            "image_processor_type": "GotOcr2ImageProcessorFast",
            "image_std": [0.229, 0.224, 0.225],
            "max_patches": 12,
            "min_patches": 1,
            "processor_class": "InternVLProcessor",
            "resample": 3,
            "size": {"height": 448, "width": 448},
        },
        "video_preprocessor_config.json": {
            **SCALED,
            "do_convert_rgb": True,
            "do_resize": True,
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
            "processor_class": "InternVLProcessor",
            "resample": 3,
            "size": {"height": 384, "width": 384},
            "video_processor_type": "InternVLVideoProcessor",
        },
        "processor_config.json": {
            "image_seq_length": 256,
            "processor_class": "InternVLProcessor",
        },
        "chat_template.jinja": templates.INTERNVL,
        "generation_config.json": {"bos_token_id": 151643, "eos_token_id": 151645},
    },
    needs=("torchvision",),
    frugal={"max_patches": 1},
    placeholders=(3328, 3328, 1536, 256),
)

# -- Gemma -----------------------------------------------------------------------------------------

_GEMMA_LOW = {0: "<pad>", 1: "<eos>", 2: "<bos>", 3: "<unk>", 4: "<mask>"}
_GEMMA_TOKENIZER = {
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": "<bos>",
    "clean_up_tokenization_spaces": False,
    "eos_token": "<eos>",
    "model_max_length": 10**30,
    "pad_token": "<pad>",
    "spaces_between_special_tokens": False,
    "tokenizer_class": "GemmaTokenizer",
    "unk_token": "<unk>",
    "use_default_system_prompt": False,
}

RECIPES["gemma-3-4b-it"] = Recipe(
    config={
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "eos_token_id": [1, 106],
        "image_token_index": 262144,
        "initializer_range": 0.02,
        "mm_tokens_per_image": 256,
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
            "vocab_size": 262208,
        },
        "torch_dtype": "bfloat16",
        "vision_config": {**_SIGLIP, "image_size": 896, "num_hidden_layers": 27},
    },
    small={
        "text_config": {**TEXT, "num_hidden_layers": 6},
        # 4,096 patches: a layer of one small head is enough.
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_attention_heads": 1,
            "num_hidden_layers": 1,
        },
    },
    tokens=(
        *tokens(_GEMMA_LOW, {107: "\n", 108: "\n\n"}),
        *tokens({105: "<start_of_turn>", 106: "<end_of_turn>"}),
        *tokens({255999: "<start_of_image>", 256000: "<end_of_image>"}),
        *tokens({262144: "<image_soft_token>"}),
    ),
    tokenizer="gemma",
    begin="<bos>",
    tokenizer_config={
        **_GEMMA_TOKENIZER,
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "extra_special_tokens": {
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
        "image_token": "<image_soft_token>",
        "processor_class": "Gemma3Processor",
    },
    files={
        "preprocessor_config.json": {
            **HALF,
            **SCALED,
            "do_convert_rgb": None,
            "do_pan_and_scan": None,
            "do_resize": True,
            "image_processor_type": "Gemma3ImageProcessor",
            "image_seq_length": 256,
            "pan_and_scan_max_num_crops": None,
            "pan_and_scan_min_crop_size": None,
            "pan_and_scan_min_ratio_to_activate": None,
            "processor_class": "Gemma3Processor",
            "resample": 2,
            "size": {"height": 896, "width": 896},
        },
        "processor_config.json": {"image_seq_length": 256, "processor_class": "Gemma3Processor"},
        "chat_template.json": {"chat_template": templates.GEMMA3},
        "generation_config.json": {
            "bos_token_id": 2,
            "cache_implementation": "hybrid",
            "do_sample": True,
            "eos_token_id": [1, 106],
            "pad_token_id": 0,
            "top_k": 64,
            "top_p": 0.95,
        },
    },
    placeholders=(256, 256, 256, 256),
)

RECIPES["paligemma-3b-mix-448"] = Recipe(
    config={
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "bos_token_id": 2,
        "eos_token_id": 1,
        "hidden_size": 2048,
        "ignore_index": -100,
        "image_token_index": 257152,
        "model_type": "paligemma",
        "pad_token_id": 0,
        "projection_dim": 2048,
        "text_config": {
            "hidden_size": 2048,
            "intermediate_size": 16384,
            "model_type": "gemma",
            "num_attention_heads": 8,
            "num_hidden_layers": 18,
            "num_image_tokens": 1024,
            "num_key_value_heads": 1,
            "torch_dtype": "float32",
            "vocab_size": 257216,
        },
        "torch_dtype": "float32",
        "vision_config": {
            **_SIGLIP,
            "image_size": 448,
            "num_hidden_layers": 27,
            "num_image_tokens": 1024,
            "projection_dim": 2048,
            "projector_hidden_act": "gelu_fast",
        },
    },
    small={
        "hidden_size": 64,
        "projection_dim": 64,
        "text_config": {**TEXT, "num_key_value_heads": 1},
        "vision_config": {**TOWER, "projection_dim": 64},
    },
    tokens=(
        *tokens({number: _GEMMA_LOW[number] for number in range(4)}),
        # Places and shapes of the detection and segmentation tasks.
        *tokens({}, listed(256000, tuple(f"<loc{number:04}>" for number in range(1024)))),
        *tokens({}, listed(257024, tuple(f"<seg{number:03}>" for number in range(128)))),
        *tokens({257152: "<image>"}),
    ),
    tokenizer="gemma",
    begin="<bos>",
    tokenizer_config={
        **_GEMMA_TOKENIZER,
        "additional_special_tokens": ["<image>"],
        "processor_class": "PaliGemmaProcessor",
    },
    files={
        "preprocessor_config.json": {
            **HALF,
            **SCALED,
            "do_convert_rgb": None,
            "do_resize": True,
            "image_processor_type": "SiglipImageProcessor",
            "image_seq_length": 1024,
            "processor_class": "PaliGemmaProcessor",
            "resample": 3,
            "size": {"height": 448, "width": 448},
        },
        "generation_config.json": {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0},
    },
    system=False,
    turns=False,
    without_images=False,
    contents="texts",
    placeholders=(1024, 1024, 1024, 1024),
)

# -- Idefics 3 and its descendants -----------------------------------------------------------------

_SPLIT_PICTURES = {
    **HALF,
    **SCALED,
    "do_convert_rgb": True,
    "do_image_splitting": True,
    "do_pad": True,
    "do_resize": True,
    "resample": 1,
}
_PLACES_6 = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))

RECIPES["SmolVLM2-500M-Video-Instruct"] = Recipe(
    config={
        "architectures": ["SmolVLMForConditionalGeneration"],
        "image_token_id": 49190,
        "model_type": "smolvlm",
        "pad_token_id": 128002,
        "scale_factor": 4,
        "text_config": {
            "architectures": ["VLlama3ForCausalLM"],
            "head_dim": 64,
            "hidden_size": 960,
            "intermediate_size": 2560,
            "is_llama_config": True,
            "max_position_embeddings": 8192,
            "model_type": "llama",
            "num_attention_heads": 15,
            "num_hidden_layers": 32,
            "num_key_value_heads": 5,
            "pad_token_id": 2,
            "pixel_shuffle_factor": 4,
            "qk_layer_norms": False,
            "rms_norm_eps": 1e-05,
            "rope_interleaved": False,
            "rope_theta": 100000,
            "torch_dtype": "bfloat16",
            "use_resampler": False,
            "vocab_size": 49280,
        },
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": False,
        "use_reentrant_checkpointing": False,
        "vision_config": {
            "hidden_size": 768,
            "image_size": 512,
            "max_image_size": {"longest_edge": 512},
            "model_type": "smolvlm_vision",
            "num_attention_heads": 12,
            "patch_size": 16,
            "size": {"longest_edge": 2048},
            "tie_word_embeddings": False,
            "use_base_siglip": False,
        },
        "vocab_size": 49280,
    },
    small={
        "text_config": {
            **TEXT,
            "hidden_size": 60,
            "head_dim": 4,
            "num_attention_heads": 15,
            "num_key_value_heads": 5,
        },
        "vision_config": TOWER,
    },
    tokens=(
        *tokens({0: "<|endoftext|>", 1: "<|im_start|>", 2: "<|im_end|>", 49152: "<global-img>"}),
        *tokens(listed(49153, _PLACES_6)),
        *tokens({49189: "<fake_token_around_image>", 49190: "<image>"}),
        *tokens({49279: "<end_of_utterance>"}),
    ),
    tokenizer="byte_level",
    tokenizer_config={
        "additional_special_tokens": [
            "<fake_token_around_image>",
            "<image>",
            "<end_of_utterance>",
        ],
        "bos_token": "<|im_start|>",
        "clean_up_tokenization_spaces": False,
        "end_of_utterance_token": "<end_of_utterance>",
        "eos_token": "<end_of_utterance>",
        "extra_special_tokens": {
            "end_of_utterance_token": "<end_of_utterance>",
            "fake_image_token": "<fake_token_around_image>",
            "global_image_token": "<global-img>",
            "image_token": "<image>",
        },
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
        "image_token": "<image>",
        "legacy": False,
        "model_max_length": 8192,
        "pad_token": "<|im_end|>",
        "processor_class": "SmolVLMProcessor",
        "tokenizer_class": "GPT2Tokenizer",
        "truncation_side": "left",
        "unk_token": "<|endoftext|>",
    },
    files={
        "preprocessor_config.json": {
            **_SPLIT_PICTURES,
            "image_processor_type": "SmolVLMImageProcessor",
            "max_image_size": {"longest_edge": 512},
            "processor_class": "SmolVLMProcessor",
            "size": {"longest_edge": 2048},
            "video_sampling": {"fps": 1, "max_frames": 64, "video_size": {"longest_edge": 512}},
        },
        "processor_config.json": {"image_seq_len": 64, "processor_class": "SmolVLMProcessor"},
        "chat_template.json": {"chat_template": templates.SMOLVLM},
        "generation_config.json": {
            "bos_token_id": 1,
            "eos_token_id": 49279,
            "pad_token_id": 2,
        },
    },
    needs=("torchvision", "num2words"),
    frugal={"do_image_splitting": False, "size": {"longest_edge": 512}},
    few_tiles={"size": {"longest_edge": 1024}},
    contents="lists",
    placeholders=(832, 832, 320, 1088),
)

RECIPES["Idefics3-8B-Llama3"] = Recipe(
    config={
        "architectures": ["Idefics3ForConditionalGeneration"],
        "image_token_id": 128257,
        "model_type": "idefics3",
        "scale_factor": 2,
        "text_config": {
            "architectures": ["VLlama3ForCausalLM"],
            "bos_token_id": 128000,
            "eos_token_id": [128001, 128008, 128009],
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 131072,
            "model_type": "llama",
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "pad_token_id": 128002,
            "qk_layer_norms": False,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 8.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "use_resampler": False,
            "vocab_size": 128259,
        },
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vision_config": {
            "hidden_size": 1152,
            "image_size": 364,
            "intermediate_size": 4304,
            "model_type": "idefics3",
            "num_attention_heads": 16,
            "num_hidden_layers": 27,
            "patch_size": 14,
        },
        "vocab_size": 128259,
    },
    small={"text_config": TEXT, "vision_config": TOWER},
    # Places of tiles are no tokens of this vocabulary: they are written in letters.
    tokens=(
        *tokens(
            listed(
                128000,
                (
                    *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>"),
                    *("<|reserved_special_token_1|>", "<|finetune_right_pad_id|>"),
                    *("<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>"),
                    *("<|eom_id|>", "<|eot_id|>", "<|python_tag|>"),
                ),
            )
        ),
        *tokens(listed(128256, ("<fake_token_around_image>", "<image>", "<end_of_utterance>"))),
    ),
    tokenizer="byte_level",
    begin="<|begin_of_text|>",
    tokenizer_config={
        "additional_special_tokens": [
            "<fake_token_around_image>",
            "<image>",
            "<end_of_utterance>",
        ],
        "bos_token": "<|begin_of_text|>",
        "clean_up_tokenization_spaces": True,
        "eos_token": "<|end_of_text|>",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 131072,
        "pad_token": "<|reserved_special_token_0|>",
        "processor_class": "Idefics3Processor",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "truncation_side": "left",
    },
    files={
        "preprocessor_config.json": {
            **_SPLIT_PICTURES,
            "image_processor_type": "Idefics3ImageProcessor",
            "max_image_size": {"longest_edge": 364},
            "processor_class": "Idefics3Processor",
            "size": {"longest_edge": 1456},
        },
        "processor_config.json": {"image_seq_len": 169, "processor_class": "Idefics3Processor"},
        "chat_template.json": {"chat_template": templates.IDEFICS3},
        "generation_config.json": {
            "bos_token_id": 128000,
            "eos_token_id": [128001, 128008, 128009, 128258],
            "pad_token_id": 128002,
        },
    },
    frugal={"do_image_splitting": False, "size": {"longest_edge": 364}},
    few_tiles={"size": {"longest_edge": 728}},
    contents="lists",
    placeholders=(2197, 2197, 845, 2873),
)

_GRANITE_PLACES = {
    100258: "<row_1_col_1>",
    100259: "<row_1_col_2>",
    100261: "<row_1_col_3>",
    100262: "<row_1_col_4>",
    100263: "<row_2_col_1>",
    100267: "<row_2_col_2>",
    100268: "<row_2_col_3>",
    **listed(
        100341,
        (
            "<row_2_col_4>",
            *(f"<row_{row}_col_{column}>" for row in (3, 4) for column in range(1, 5)),
        ),
    ),
}

RECIPES["granite-docling-258M"] = Recipe(
    config={
        "architectures": ["Idefics3ForConditionalGeneration"],
        "bos_token_id": 100264,
        "dtype": "bfloat16",
        "eos_token_id": 100257,
        "image_token_id": 100270,
        "model_type": "idefics3",
        "pad_token_id": 100257,
        "scale_factor": 4,
        "text_config": {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 100264,
            "dtype": "bfloat16",
            "eos_token_id": 100257,
            "head_dim": 64,
            "hidden_act": "silu",
            "hidden_size": 576,
            "initializer_range": 0.02,
            "intermediate_size": 1536,
            "max_position_embeddings": 8192,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": 9,
            "num_hidden_layers": 30,
            "num_key_value_heads": 3,
            "pad_token_id": 100257,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": None,
            "rope_theta": 100000.0,
            "tie_word_embeddings": True,
            "use_cache": False,
            "vocab_size": 100352,
        },
        "tie_word_embeddings": True,
        "use_cache": True,
        "vision_config": {
            "attention_dropout": 0.0,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 768,
            "image_size": 512,
            "initializer_range": 0.02,
            "intermediate_size": 3072,
            "max_image_size": {"longest_edge": 512},
            "model_type": "idefics3_vision",
            "num_attention_heads": 12,
            "num_channels": 3,
            "num_hidden_layers": 12,
            "patch_size": 16,
            "size": {"longest_edge": 512},
        },
        "vocab_size": 100352,
    },
    small={
        "text_config": {
            **TEXT,
            "hidden_size": 72,
            "head_dim": 8,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
        },
        "vision_config": TOWER,
    },
    tokens=(
        *tokens({100256: "<|pad|>", 100257: "<|end_of_text|>", **_GRANITE_PLACES}),
        *tokens({100264: "<|start_of_role|>", 100265: "<|end_of_role|>", 100270: "<image>"}),
        *tokens({100327: "<doctag>", 100328: "</doctag>", 100338: "<|unk|>"}),
        *tokens({100339: "<fake_token_around_image>", 100340: "<global-img>"}),
        *tokens({100350: "<code>", 100351: "</code>"}),
    ),
    tokenizer="byte_level",
    tokenizer_config={
        "add_bos_token": False,
        "add_prefix_space": False,
        "additional_special_tokens": ["<fake_token_around_image>", "<image>"],
        "bos_token": "<|start_of_role|>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|end_of_text|>",
        "errors": "replace",
        "extra_special_tokens": {},
        "model_max_length": 8192,
        "pad_token": "<|end_of_text|>",
        "padding_side": "left",
        "processor_class": "Idefics3Processor",
        "tokenizer_class": "GPT2Tokenizer",
        "unk_token": "<|unk|>",
    },
    files={
        "preprocessor_config.json": {
            **_SPLIT_PICTURES,
            "image_processor_type": "Idefics3ImageProcessor",
            "max_image_size": {"longest_edge": 512},
            "processor_class": "Idefics3Processor",
            "size": {"longest_edge": 2048},
        },
        "processor_config.json": {"image_seq_len": 64, "processor_class": "Idefics3Processor"},
        "chat_template.jinja": templates.GRANITE,
        "generation_config.json": {
            "bos_token_id": 100264,
            "eos_token_id": 100257,
            "pad_token_id": 100257,
            "use_cache": False,
        },
    },
    frugal={"do_image_splitting": False, "size": {"longest_edge": 512}},
    few_tiles={"size": {"longest_edge": 1024}},
    placeholders=(832, 832, 320, 1088),
)

# -- Mistral ---------------------------------------------------------------------------------------

_TEKKEN = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]"),
    *("[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]"),
)
_TEKKEN_7 = (*_TEKKEN, "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]")
_MISTRAL_TOKENIZER = {
    "add_bos_token": True,
    "add_prefix_space": True,
    "bos_token": "<s>",
    "clean_up_tokenization_spaces": False,
    "eos_token": "</s>",
    "legacy": True,
    "model_max_length": 10**30,
    "pad_token": "<pad>",
    "processor_class": "PixtralProcessor",
    "unk_token": "<unk>",
}
_MISTRAL_TEXT = {
    "attention_dropout": 0.0,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 1024000,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 40,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_cache": True,
    # Of the text, 131,072 ids; a thousand places before it are kept for special tokens.
    "vocab_size": 131072,
}
_PIXTRAL_TOWER = {
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "image_size": 1024,
    "intermediate_size": 4096,
    "model_type": "pixtral",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 16,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
_PIXTRAL_SMALL = {"text_config": TEXT, "vision_config": {**TOWER, "head_dim": 16}}


def _pixtral_pictures(longest: int, kind: str, patch: Any) -> dict[str, Any]:
    return {
        **CLIP,
        **SCALED,
        "do_convert_rgb": True,
        "do_resize": True,
        "image_processor_type": kind,
        "patch_size": patch,
        "processor_class": "PixtralProcessor",
        "resample": 3,
        "size": {"longest_edge": longest},
    }


_PIXTRAL_PROCESSOR = {
    "image_break_token": "[IMG_BREAK]",
    "image_end_token": "[IMG_END]",
    "image_token": "[IMG]",
    "processor_class": "PixtralProcessor",
}

RECIPES["pixtral-12b"] = Recipe(
    config={
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_seq_length": 1,
        "image_token_index": 10,
        "model_type": "llava",
        "projector_hidden_act": "gelu",
        "text_config": {**_MISTRAL_TEXT, "is_composition": True},
        "torch_dtype": "bfloat16",
        "vision_config": {**_PIXTRAL_TOWER, "is_composition": True},
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    },
    small=_PIXTRAL_SMALL,
    tokens=tokens(listed(0, _TEKKEN)),
    tokenizer="byte_level",
    begin="<s>",
    tokenizer_config={
        **_MISTRAL_TOKENIZER,
        "additional_special_tokens": list(_TEKKEN),
        "tokenizer_class": "PreTrainedTokenizerFast",
    },
    files={
        "preprocessor_config.json": _pixtral_pictures(
            1024, "PixtralImageProcessor", {"height": 16, "width": 16}
        ),
        "processor_config.json": {**_PIXTRAL_PROCESSOR, "patch_size": 16},
        "chat_template.json": {"chat_template": templates.PIXTRAL},
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2},
    },
    needs=("torchvision",),
    contents="texts",
    placeholders=(1200, 1200, 819, 16),
)
RECIPES["Mistral-Small-3.1-24B-Instruct-2503"] = Recipe(
    config={
        "architectures": ["Mistral3ForConditionalGeneration"],
        "image_token_index": 10,
        "model_type": "mistral3",
        "multimodal_projector_bias": False,
        "projector_hidden_act": "gelu",
        "spatial_merge_size": 2,
        "text_config": {
            **_MISTRAL_TEXT,
            "intermediate_size": 32768,
            "max_position_embeddings": 131072,
        },
        "torch_dtype": "bfloat16",
        "vision_config": {
            **_PIXTRAL_TOWER,
            "attention_dropout": 0.0,
            "image_size": 1540,
            "initializer_range": 0.02,
            "num_channels": 3,
            "patch_size": 14,
        },
        "vision_feature_layer": -1,
    },
    small=_PIXTRAL_SMALL,
    tokens=tokens(listed(0, _TEKKEN_7)),
    tokenizer="byte_level",
    begin="<s>",
    tokenizer_config={
        **_MISTRAL_TOKENIZER,
        "additional_special_tokens": list(_TEKKEN_7),
        "tokenizer_class": "LlamaTokenizerFast",
    },
    files={
        "preprocessor_config.json": _pixtral_pictures(1540, "PixtralImageProcessorFast", 14),
        "processor_config.json": {
            **_PIXTRAL_PROCESSOR,
            "patch_size": 14,
            "spatial_merge_size": 2,
        },
        "chat_template.json": {"chat_template": templates.MISTRAL_SMALL},
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2},
    },
    needs=("torchvision",),
    placeholders=(414, 414, 288, 4),
)

# -- GLM -------------------------------------------------------------------------------------------

_GLM_SPECIAL = (
    *("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>"),
    *("<|user|>", "<|assistant|>", "<|observation|>", "<|begin_of_image|>", "<|end_of_image|>"),
    *("<|begin_of_video|>", "<|end_of_video|>", "<|image|>", "<|video|>"),
)
_GLM_PICTURES = {
    **CLIP,
    "do_rescale": True,
    "merge_size": 2,
    "patch_size": 14,
    "processor_class": "Glm4vProcessor",
    "temporal_patch_size": 2,
}

RECIPES["GLM-4.1V-9B-Thinking"] = Recipe(
    config={
        "architectures": ["Glm4vForConditionalGeneration"],
        "image_end_token_id": 151340,
        "image_start_token_id": 151339,
        "image_token_id": 151343,
        "model_type": "glm4v",
        "text_config": {
            "attention_bias": True,
            "attention_dropout": 0.0,
            "dtype": "bfloat16",
            "eos_token_id": [151329, 151336, 151338, 151348],
            "hidden_act": "silu",
            "hidden_size": 4096,
            "initializer_range": 0.02,
            "intermediate_size": 13696,
            "max_position_embeddings": 65536,
            "model_type": "glm4v_text",
            "num_attention_heads": 32,
            "num_hidden_layers": 40,
            "num_key_value_heads": 2,
            "pad_token_id": 151329,
            "partial_rotary_factor": 0.5,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "mrope_section": [8, 12, 12],
                "partial_rotary_factor": 0.5,
                "rope_theta": 10000,
                "rope_type": "default",
            },
            "rope_theta": 10000,
            "use_cache": True,
            "vocab_size": 151552,
        },
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "video_end_token_id": 151342,
        "video_start_token_id": 151341,
        "video_token_id": 151344,
        "vision_config": {
            "attention_bias": False,
            "depth": 24,
            "hidden_act": "silu",
            "hidden_dropout_prob": 0.0,
            "hidden_size": 1536,
            "image_size": 336,
            "initializer_range": 0.02,
            "intermediate_size": 13696,
            "model_type": "glm4v_vision",
            "num_heads": 12,
            "out_hidden_size": 4096,
            "patch_size": 14,
            "rms_norm_eps": 1e-05,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    },
    small={
        "text_config": {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_scaling": {"mrope_section": [1, 1, 2]},
        },
        "vision_config": {
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 64,
        },
    },
    tokens=(
        *tokens(listed(151329, _GLM_SPECIAL)),
        *tokens({}, listed(151345, ("<think>", "</think>", "<answer>", "</answer>"))),
    ),
    tokenizer="byte_level",
    tokenizer_config={
        "additional_special_tokens": list(_GLM_SPECIAL),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "do_lower_case": False,
        "eos_token": "<|endoftext|>",
        "model_max_length": 128000,
        "pad_token": "<|endoftext|>",
        "padding_side": "left",
        "processor_class": "Glm4vProcessor",
        "remove_space": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    },
    files={
        "preprocessor_config.json": {
            **_GLM_PICTURES,
            "image_processor_type": "Glm4vImageProcessor",
            "size": {"shortest_edge": 12544, "longest_edge": 9633792},
        },
        "video_preprocessor_config.json": {
            **_GLM_PICTURES,
            "size": {"shortest_edge": 12544, "longest_edge": 47040000},
            "video_processor_type": "Glm4vVideoProcessor",
        },
        "chat_template.jinja": templates.GLM,
        "generation_config.json": {
            "do_sample": True,
            "eos_token_id": [151329, 151336, 151338, 151348],
            "pad_token_id": 151329,
            "temperature": 0.8,
            "top_k": 2,
            "top_p": 0.6,
        },
    },
    needs=("torchvision",),
    contents="texts",
    placeholders=(391, 391, 252, 9),
)

# -- Qwen3.5: three of four layers have no attention -----------------------------------------------

_QWEN35_LAYERS = ["linear_attention"] * 3 + ["full_attention"]

RECIPES["Qwen3.5-9B"] = Recipe(
    config={
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "image_token_id": 248056,
        "model_type": "qwen3_5",
        "text_config": {
            "attention_bias": False,
            "attention_dropout": 0.0,
            "attn_output_gate": True,
            "dtype": "bfloat16",
            "eos_token_id": 248044,
            "full_attention_interval": 4,
            "head_dim": 256,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "layer_types": _QWEN35_LAYERS * 8,
            "linear_conv_kernel_dim": 4,
            "linear_key_head_dim": 128,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 32,
            "linear_value_head_dim": 128,
            "max_position_embeddings": 262144,
            "model_type": "qwen3_5_text",
            "num_attention_heads": 16,
            "num_hidden_layers": 32,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-06,
            "rope_parameters": {
                "mrope_interleaved": True,
                "mrope_section": [11, 11, 10],
                "partial_rotary_factor": 0.25,
                "rope_theta": 10000000,
                "rope_type": "default",
            },
            "use_cache": True,
            "vocab_size": 248320,
        },
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "video_token_id": 248057,
        "vision_config": {
            **_QWEN3_TOWER,
            "deepstack_visual_indexes": [],
            "model_type": "qwen3_5",
        },
        "vision_end_token_id": 248054,
        "vision_start_token_id": 248053,
    },
    small={
        "text_config": {
            **TEXT,
            "layer_types": _QWEN35_LAYERS * 2,
            "linear_key_head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_value_head_dim": 16,
            "num_hidden_layers": 8,
            "rope_parameters": {"mrope_section": [1, 1, 0]},
        },
        "vision_config": {
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 64,
        },
    },
    tokens=tokens(listed(248044, _QWEN_SPECIAL), listed(248058, _QWEN3_PLAIN)),
    tokenizer="byte_level",
    tokenizer_config={**_QWEN_TOKENIZER, "model_max_length": 262144},
    files={
        "preprocessor_config.json": _QWEN3_PICTURES,
        "video_preprocessor_config.json": {
            **_QWEN3_PICTURES,
            "size": {"longest_edge": 25165824, "shortest_edge": 4096},
            "video_processor_type": "Qwen3VLVideoProcessor",
        },
        "chat_template.jinja": templates.QWEN35,
        "generation_config.json": {
            "bos_token_id": 248044,
            "do_sample": True,
            "eos_token_id": [248046, 248044],
            "pad_token_id": 248044,
            "temperature": 1.0,
            "top_k": 20,
            "top_p": 0.95,
        },
    },
    needs=("torchvision",),
    placeholders=(300, 300, 186, 64),
)

# -- Gemma 4: heads of two sizes, layers that share keys, pictures of any shape --------------------

_GEMMA4_LAYERS = ["sliding_attention"] * 5 + ["full_attention"]

RECIPES["gemma-4-E4B-it"] = Recipe(
    config={
        "architectures": ["Gemma4ForConditionalGeneration"],
        "audio_config": None,
        "boi_token_id": 255999,
        "eoi_token_id": 258882,
        "eos_token_id": [1, 106],
        "image_token_id": 258880,
        "model_type": "gemma4",
        "text_config": {
            "final_logit_softcapping": 30.0,
            "global_head_dim": 512,
            "head_dim": 256,
            "hidden_size": 2560,
            "hidden_size_per_layer_input": 256,
            "intermediate_size": 10240,
            "layer_types": _GEMMA4_LAYERS * 7,
            "model_type": "gemma4_text",
            "num_attention_heads": 8,
            "num_hidden_layers": 42,
            "num_key_value_heads": 2,
            "num_kv_shared_layers": 18,
            "sliding_window": 512,
            "vocab_size": 262144,
            "vocab_size_per_layer_input": 262144,
        },
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "video_token_id": 258884,
        "vision_config": {
            "head_dim": 64,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "model_type": "gemma4_vision",
            "num_attention_heads": 12,
            "num_hidden_layers": 16,
            "num_key_value_heads": 12,
            "patch_size": 16,
            "pooling_kernel_size": 3,
        },
        "vision_soft_tokens_per_image": 280,
    },
    small={
        "text_config": {
            **TEXT,
            "global_head_dim": 32,
            "hidden_size_per_layer_input": 8,
            "layer_types": _GEMMA4_LAYERS * 2,
            "num_hidden_layers": 12,
            "num_kv_shared_layers": 6,
        },
        "vision_config": {**TOWER, "head_dim": 16, "num_key_value_heads": 2},
    },
    tokens=(
        *tokens(_GEMMA_LOW, {107: "\n", 108: "\n\n"}),
        *tokens({98: "<|think|>", 100: "<|channel>", 101: "<channel|>"}),
        *tokens({105: "<|turn>", 106: "<turn|>", 255999: "<|image>", 256000: "<|audio>"}),
        *tokens(listed(258880, ("<|image|>", "<|audio|>", "<image|>", "<audio|>", "<|video|>"))),
    ),
    tokenizer="gemma",
    begin="<bos>",
    tokenizer_config={
        **_GEMMA_TOKENIZER,
        "audio_token": "<|audio|>",
        "boa_token": "<|audio>",
        "boi_token": "<|image>",
        "eoa_token": "<audio|>",
        "eoi_token": "<image|>",
        "extra_special_tokens": {
            "audio_token": "<|audio|>",
            "boa_token": "<|audio>",
            "boi_token": "<|image>",
            "eoa_token": "<audio|>",
            "eoi_token": "<image|>",
            "image_token": "<|image|>",
        },
        "image_token": "<|image|>",
        "padding_side": "left",
        "processor_class": "Gemma4Processor",
    },
    files={
        "processor_config.json": {
            "audio_ms_per_token": 40,
            "audio_seq_length": 750,
            "feature_extractor": {
                "feature_extractor_type": "Gemma4AudioFeatureExtractor",
                "sampling_rate": 16000,
            },
            "image_processor": {
                "do_convert_rgb": True,
                "do_normalize": False,
                "do_rescale": True,
                "do_resize": True,
                "image_mean": [0.0, 0.0, 0.0],
                "image_processor_type": "Gemma4ImageProcessor",
                "image_seq_length": 280,
                "image_std": [1.0, 1.0, 1.0],
                "max_soft_tokens": 280,
                "patch_size": 16,
                "pooling_kernel_size": 3,
                "resample": 3,
                "rescale_factor": 1 / 255,
            },
            "image_seq_length": 280,
            "processor_class": "Gemma4Processor",
            "video_processor": {
                "max_soft_tokens": 70,
                "patch_size": 16,
                "pooling_kernel_size": 3,
                "video_processor_type": "Gemma4VideoProcessor",
            },
        },
        "chat_template.jinja": templates.GEMMA4,
        "generation_config.json": {
            "bos_token_id": 2,
            "do_sample": True,
            "eos_token_id": [1, 106],
            "pad_token_id": 0,
            "temperature": 1.0,
            "top_k": 64,
            "top_p": 0.95,
        },
    },
    needs=("torchvision",),
    placeholders=(266, 266, 259, 256),
)

# -- InstructBLIP: queries instead of patches, a second tokenizer, no template ---------------------

RECIPES["instructblip-vicuna-7b"] = Recipe(
    config={
        "architectures": ["InstructBlipForConditionalGeneration"],
        "image_token_index": 32001,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "model_type": "instructblip",
        "num_query_tokens": 32,
        "qformer_config": {"model_type": "instructblip_qformer", "vocab_size": 30523},
        "text_config": {
            "architectures": ["LlamaForCausalLM"],
            "max_position_embeddings": 2048,
            "model_type": "llama",
            "pad_token_id": 32000,
            "rms_norm_eps": 1e-06,
            "torch_dtype": "float16",
            "vocab_size": 32064,
        },
        "torch_dtype": "float32",
        "use_decoder_only_language_model": True,
        "vision_config": {
            "hidden_size": 1408,
            "image_size": 224,
            "intermediate_size": 6144,
            "model_type": "instructblip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 39,
            "patch_size": 14,
        },
    },
    small={
        "qformer_config": {
            "cross_attention_frequency": 1,
            "encoder_hidden_size": 32,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
        },
        "text_config": {**TEXT, "num_key_value_heads": 4},
        "vision_config": TOWER,
    },
    tokens=tokens({0: "<unk>", 1: "<s>", 2: "</s>", 32000: "[PAD]", 32001: "<image>"}),
    tokenizer="llama",
    begin="</s>",
    # Its conversion named the end token three times.
    tokenizer_config={
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "</s>",
        "eos_token": "</s>",
        "legacy": True,
        "model_max_length": 10**30,
        "pad_token": "[PAD]",
        "padding_side": "left",
        "processor_class": "InstructBlipProcessor",
        "tokenizer_class": "LlamaTokenizer",
        "truncation_side": "left",
        "unk_token": "</s>",
    },
    files={
        "preprocessor_config.json": {
            **CLIP,
            **SCALED,
            "do_convert_rgb": True,
            "do_resize": True,
            "image_processor_type": "BlipImageProcessor",
            "processor_class": "InstructBlipProcessor",
            "resample": 3,
            "size": {"height": 224, "width": 224},
        },
        "processor_config.json": {
            "num_query_tokens": 32,
            "processor_class": "InstructBlipProcessor",
        },
        **{
            f"qformer_tokenizer/{file}": data
            for file, data in bert_files({"bos_token": "[DEC]", "truncation_side": "left"}).items()
        },
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 32000},
    },
    system=False,
    turns=False,
    without_images=False,
    images=1,
    image_text="",
    contents="texts",
    placeholders=(32, 32, 32, 32),
)
