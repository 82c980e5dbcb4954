"""What a checkpoint's generation_config adds to generate(), and what an evaluation keeps of it.

Qwen2.5-VL penalises repetitions by 1.05, others sample at temperatures of their own. Answers are
called greedy, or sampled at a temperature, and have to be that whatever checkpoint gave them.
"""

from __future__ import annotations

from typing import Any

from vlmfix.families.inner import generating_module

__all__ = ["neutral", "split_config"]

#: What a model needs in order to write at all, and what only decides how fast it does.
_KEPT = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "stop_strings"),
    *("bad_words_ids", "suppress_tokens", "begin_suppress_tokens"),
    *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size"),
    *("compile_config", "disable_compile"),
}

#: Values under which a setting does nothing; None for all that are not here.
_NEUTRAL = {
    **{"do_sample": False, "early_stopping": False, "remove_invalid_values": False},
    **{"temperature": 1.0, "top_k": 0, "top_p": 1.0, "typical_p": 1.0},
    **{"epsilon_cutoff": 0.0, "eta_cutoff": 0.0},
    **{"repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0, "length_penalty": 1.0},
    **{"no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "min_length": 0},
    **{"num_beams": 1, "num_return_sequences": 1, "num_beam_groups": 1, "diversity_penalty": 0.0},
    **{"output_scores": False, "return_dict_in_generate": False},
}

#: Named in every call in which they act: `arms.Arm.gen_kwargs`.
_NAMED = {"max_length", "max_new_tokens", "do_sample", "num_beams", "temperature", "top_k", "top_p"}


def split_config(model: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of a model's generation_config that hold in an evaluation, and those undone.

    Both have only what is set, the second only what would change something. Names that transformers
    does not know change nothing and are among the first.
    """
    from transformers import GenerationConfig

    config = getattr(generating_module(model), "generation_config", None)
    if config is None:
        return {}, {}
    known = GenerationConfig().to_dict()
    kept: dict[str, Any] = {}
    undone: dict[str, Any] = {}
    for name, value in sorted(config.to_dict().items()):
        if value is None or name == "transformers_version" or name.startswith("_"):
            continue
        if name in _KEPT or name not in known:
            kept[name] = value
        elif value != _NEUTRAL.get(name) and name not in ("max_length", "max_new_tokens"):
            undone[name] = value
    return kept, undone


def neutral(model: Any) -> dict[str, Any]:
    """Arguments of generate() that undo what a model's generation_config would change."""
    names = set(split_config(model)[1]) - _NAMED
    return {name: _NEUTRAL.get(name) for name in sorted(names)}
