"""Models whose own generate() runs the language model inside of them on embeddings.

BLIP-2 and InstructBLIP encode the image, put its features where `input_ids` holds placeholders,
and call the generate() of their language model. No forward of the model itself runs then, and none
is given ids. `OuterGeneration` generates with the model itself instead, as every other family does:
ids and features go in, and its forward runs for every token. The tokens are the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationMixin

__all__ = ["INNER", "OuterGeneration", "generating_module", "outer_forward"]

#: Families that generate so, by `config.model_type`.
INNER = ("blip-2", "instructblip")

#: What their language model takes, and they hand on without naming it.
_TEXT = ("position_ids", "past_key_values", "use_cache", "logits_to_keep")

_REQUIRED = inspect.Parameter.empty

Function = Callable[..., Any]


def generating_module(model: Any) -> Any:
    """The module whose generate(), and whose generation configuration, a model's own uses."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    return model.language_model if kind in INNER else model


class OuterGeneration(GenerationMixin):  # type: ignore[misc]  # transformers' is untyped
    """Generates with a model of `INNER` itself; everything but the loop is the model's own.

    Args:
        model: has `outer_forward` for its forward.
    """

    main_input_name = "input_ids"

    def __init__(self, model: torch.nn.Module) -> None:
        self._model: Any = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, **kwargs: Any) -> Any:
        return self._model(**kwargs)

    @property
    def prepare_inputs_for_generation(self) -> Function:
        """The model's, on which its session looks."""
        function: Function = self._model.prepare_inputs_for_generation
        return function

    @property
    def generation_config(self) -> Any:
        return generating_module(self._model).generation_config

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Take the arguments of the model's own generate(), with `input_ids`; return the same."""
        model = self._model
        names = inspect.signature(type(model).generate).parameters
        given = {**dict(zip(list(names)[1:], args, strict=False)), **kwargs}
        if given.get("attention_mask") is None:  # and none is guessed from the padding token
            given["attention_mask"] = torch.ones_like(given["input_ids"])
        given["use_cache"] = True  # embeddings always have a cache
        if hasattr(model, "hf_device_map"):
            model._preprocess_accelerate()
        return super().generate(**given)


def outer_forward(model: Any) -> Function:
    """The forward of a model of `INNER`, which takes a KV cache and tokens without an image, too.

    Args:
        model: the model, with its forward as it is.

    Returns:
        A function that takes the arguments of that forward and those of `_TEXT`.
    """
    own = model.forward
    known = dict(inspect.signature(own).parameters)
    encoding = set(inspect.signature(model.get_image_features).parameters) - {"kwargs"}
    # It asks for some of them also where the image is encoded already.
    needed = {name: None for name in encoding if known[name].default is _REQUIRED}

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(known, args, strict=False)), **kwargs}
        if given.get("pixel_values") is None and not given.get("mm_encoder_outputs"):
            text = {name: value for name, value in given.items() if name not in encoding}
            text.pop("mm_encoder_outputs", None)
            return model.language_model(**text)
        output = own(**{**needed, **given})
        if not isinstance(output, tuple):  # what generate() reads of a language model's output
            inner = output.language_model_outputs
            for name in ("past_key_values", "hidden_states", "attentions"):
                if inner.get(name) is not None:
                    output[name] = inner[name]
        return output

    *named, rest = known.values()
    named += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in _TEXT]
    shown: Any = forward
    shown.__signature__ = inspect.Signature([*named, rest])  # generate() reads what it takes
    return forward
