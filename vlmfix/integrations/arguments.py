"""Read the flat key=value arguments of frameworks, and load the wrapped model that they name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmfix.errors import BadInput
from vlmfix.registry import build_stack, parse_spec

__all__ = ["MAX_NEW_TOKENS", "decoding", "load_wrapped", "method_spec"]

#: Default limit of an answer; lmms-eval's own adapters have the same.
MAX_NEW_TOKENS = 1024

#: Settings of a framework that generate() takes unchanged.
_PASSED_ON = ("min_new_tokens", "num_beams", "repetition_penalty", "length_penalty")


def load_wrapped(
    pretrained: str,
    method: str | None,
    options: Mapping[str, Any],
    dtype: str | None,
    device: Any,
) -> tuple[Any, Any]:
    """Load a model wrapped with methods, and its processor.

    Args:
        pretrained: "emoji", a local folder or a hub id, as for `loading.load`.
        method: a method or a stack, as for `vlmfix.wrap`; None: the plain model.
        options: options of a single method.
        dtype: dtype of the model, as for `loading.load`.
        device: device of the model, as for `loading.load`.

    Raises:
        UnknownMethod, BadInput: the method or an option cannot be used; the model is not loaded.
        VlmfixError: the other errors of `loading.load` and `vlmfix.wrap`.
    """
    stack = build_stack(method_spec(method, options))

    import vlmfix
    from vlmfix.loading import load

    model, processor = load(pretrained, dtype=dtype, device=device)
    return vlmfix.wrap(model, stack) if stack else model, processor


def method_spec(method: str | None, options: Mapping[str, Any]) -> str | None:
    """One text for a method and its options: ("var", {"keep": 0.4}) -> "var:keep=0.4".

    Raises:
        BadInput: options without a method, or with several.
    """
    if not options:
        return method or None
    names = ", ".join(options)
    if not method:
        raise BadInput(
            f"unknown argument: {names}. Options of a method need the method: write "
            "method=NAME,OPTION=VALUE (`vlmfix methods` lists both)"
        )
    alternatives = parse_spec(method)
    if len(alternatives) > 1 or len(alternatives[0]) > 1:
        raise BadInput(
            f"{names}: options of a stack ({method}) need their method: write them after it, as "
            "in var:keep=0.4+vhr"
        )
    written = [f"{name}={_text(value)}" for name, value in options.items()]
    return f"{method}{';' if ':' in method else ':'}{';'.join(written)}"


def _text(value: Any) -> str:
    return "/".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def decoding(settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Arguments of generate() from a framework's settings, and the names of settings left out.

    A temperature above 0 samples, unless do_sample is False; otherwise decoding is greedy. A
    sampling task without top_p and top_k samples from all tokens, not from transformers' top 50.

    Args:
        settings: the settings of a task; None values count as absent.

    Raises:
        BadInput: a value of the wrong kind or out of range.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    known = {"until", "max_new_tokens", "do_sample", "temperature", "top_p", "top_k", *_PASSED_ON}
    try:
        asked = given.get("do_sample")
        temperature = float(given.get("temperature", 1.0 if asked else 0.0))
        limit = int(given.get("max_new_tokens", MAX_NEW_TOKENS))
        top_p, top_k = float(given.get("top_p", 1.0)), int(given.get("top_k", 0))
    except (TypeError, ValueError) as error:
        raise BadInput(f"generation settings {dict(given)}: {error}") from None
    if limit < 1 or temperature < 0:
        raise BadInput(
            f"generation settings: max_new_tokens={limit} must be 1 or more and "
            f"temperature={temperature} 0 or more"
        )
    sampled = temperature > 0 and asked is not False
    arguments: dict[str, Any] = {"max_new_tokens": limit, "do_sample": sampled, "num_beams": 1}
    if sampled:
        arguments |= {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    arguments |= {name: given[name] for name in _PASSED_ON if name in given}
    return arguments, sorted(set(given) - known)
