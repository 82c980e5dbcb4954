"""The structures of the models that methods have published values for."""

from __future__ import annotations

from vlmfix.base.method import Structure

_VICUNA = (32000, 32064)  # the vocabulary tells vicuna from later Llamas of the same shape

LLAVA_7B = Structure("LLaVA-1.5-7B", "llava", "llama", 4096, 32, _VICUNA)
LLAVA_13B = Structure("LLaVA-1.5-13B", "llava", "llama", 5120, 40, _VICUNA)
LLAVA_NEXT_7B = Structure("LLaVA-NeXT-vicuna-7B", "llava_next", "llama", 4096, 32, _VICUNA)
LLAVA_NEXT_13B = Structure("LLaVA-NeXT-vicuna-13B", "llava_next", "llama", 5120, 40, _VICUNA)
LLAVA_NEXT_34B = Structure("LLaVA-1.6-34B", "llava_next", "llama", 7168, 60)
QWEN2_VL_7B = Structure("Qwen2-VL-7B", "qwen2_vl", "qwen2_vl_text", 3584, 28)
EMOJI = Structure("EmojiCOCO", "llava", "llama", 256, 6, (697, 697))
