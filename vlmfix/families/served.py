"""Which module the hooks go into: the model itself, or the one inside a PEFT model."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from vlmfix.errors import UnsupportedModel

__all__ = ["served_model"]


def served_model(model: torch.nn.Module) -> torch.nn.Module:
    """The model of transformers whose forwards are those of this model's generate().

    A PEFT model (LoRA and others whose adapters sit in the layers) runs the model inside it.

    Raises:
        UnsupportedModel: a module around a model, a compiled one, or a PEFT model with a prompt of
            its own or with other attention.
    """
    name = type(model).__name__
    if hasattr(model, "_orig_mod"):
        raise UnsupportedModel(
            f"{name} is what torch.compile made of a model, and its generate() runs the model "
            "inside. Wrap that one: vlmfix.wrap(model._orig_mod, ...)."
        )
    if hasattr(type(model), "get_base_model"):
        return _inside_peft(model)
    if isinstance(model, PreTrainedModel) or not hasattr(model, "generate"):
        return model
    inside = next((x for x in model.modules() if isinstance(x, PreTrainedModel)), None)
    if inside is None:
        return model
    raise UnsupportedModel(
        f"{name} is a module around a {type(inside).__name__}, whose hooks would never fire: "
        "generate() runs the model inside. Wrap that one (of PEFT, wrap what get_peft_model "
        "returned)."
    )


def _inside_peft(model: Any) -> torch.nn.Module:
    for adapter, config in model.peft_config.items():
        if config.is_prompt_learning or config.is_adaption_prompt:
            raise UnsupportedModel(
                f"adapter {adapter!r} of this PEFT model ({config.peft_type.value}) puts tokens or "
                "keys of its own before the prompt, and vlmfix cannot see which they are. Use an "
                "adapter inside the layers (LoRA), or merge it."
            )
    inside: torch.nn.Module = model.get_base_model()
    return inside
