"""From the flat key=value arguments that frameworks pass to a wrapped model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmfix.errors import BadInput
from vlmfix.registry import build_stack, parse_spec

__all__ = ["MAX_NEW_TOKENS", "decoding", "load_wrapped", "method_spec"]

#: Limit of an answer where nobody sets one; lmms-eval's own adapters take as many.
MAX_NEW_TOKENS = 1024

#: Settings of a framework that generate() takes as they are.
_PASSED_ON = ("min_new_tokens", "num_beams", "repetition_penalty", "length_penalty")


def load_wrapped(
    pretrained: str,
    method: str | None,
    options: Mapping[str, Any],
    dtype: str | None,
    device: Any,
) -> tuple[Any, Any]:
    """A model with methods at work, and its processor.

    Args:
        pretrained: a name as `loading.load` takes it.
        method: a method or a stack of them, as `vlmfix.wrap` takes it; None: the plain model.
        options: options of the method, if it is one.
        dtype: as `loading.load` takes it.
        device: as `loading.load` takes it.

    Raises:
        UnknownMethod, BadInput: the method or an option cannot be used; the model is not loaded.
        VlmfixError: whatever `loading.load` and `vlmfix.wrap` raise.
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
            f"{names}: of which method of {method}? Write options of a stack behind their method, "
            "as in var:keep=0.4+vhr"
        )
    written = [f"{name}={_text(value)}" for name, value in options.items()]
    return f"{method}{';' if ':' in method else ':'}{';'.join(written)}"


def _text(value: Any) -> str:
    return "/".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def decoding(settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Arguments of generate() from a framework's settings, and the names of settings left out.

    A temperature above 0 samples, unless do_sample is False; all else is greedy. A sampling task
    that names no top_p or top_k means all tokens, not transformers' own top_k of 50.

    Args:
        settings: as tasks write them; None values count as absent.

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
