"""What a contrastive method cannot run on: models, caches, prompts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.cache_utils import DynamicCache

from vlmfix.base.contrast import ContrastMethod
from vlmfix.engine.branches import Branches
from vlmfix.engine.edits import require_attention
from vlmfix.engine.frame import Frame
from vlmfix.engine.joined import unjoinable
from vlmfix.engine.stage import Forward
from vlmfix.errors import BadInput, CompositionError, StateError, UnsupportedModel
from vlmfix.families import ModelInfo
from vlmfix.families.kinds import PAD
from vlmfix.families.prompt import carries_vision

__all__ = ["check_cross_attention", "check_model", "check_prompt", "check_turn"]


#: Families whose sparse attention chooses few keys, and chooses others where a prompt is padded or
#: a score rounds differently: the plain model itself answers a batch otherwise than its prompts.
_CHOOSE_BY_BATCH = ("dots3_note", "glm5_next", "mistral_large4")


def check_model(method: ContrastMethod, model: Any, info: ModelInfo) -> None:
    """Refuse a model whose KV cache, or whose attention, branches cannot share or read.

    Raises:
        UnsupportedModel: what of it.
    """
    if not method.streams():
        return
    require_attention(info, method.watched(info))
    if info.model_type in _CHOOSE_BY_BATCH:
        raise UnsupportedModel(
            f"{method.name} runs its branches in one batch with the prompts, and the sparse "
            f"attention of model type {info.model_type!r} chooses other keys in a batch than for a "
            "prompt alone. Use a method that edits attention or prunes."
        )
    text = model.config.get_text_config(decoder=True)
    if what := unjoinable(DynamicCache(config=text)):
        raise UnsupportedModel(
            f"{method.name} runs its branches in the rows of one KV cache, and that of model type "
            f"{info.model_type!r} has layers ({what}) to which rows cannot be joined. Use a method "
            "that edits attention or prunes."
        )


def check_turn(
    method: ContrastMethod,
    ran: ContrastMethod | None,
    branches: Branches | None,
    frame: Frame,
    kwargs: Mapping[str, Any],
) -> None:
    """Refuse tokens behind a prompt whose branches are not there, are others, or cannot follow.

    Args:
        method: runs now.
        ran: ran its branches of the prompts.
        branches: those in the cache.
        frame, kwargs: of the forward.

    Raises:
        StateError: they cannot go on from here.
    """
    if method.streams() and ran is None:
        raise StateError(
            f"this KV cache was filled while {method.name} was off, so its branches are missing. "
            "Start from the prompt, without this cache."
        )
    if branches is not None and ran is not None and ran != method:
        raise StateError(
            f"this KV cache holds the branches of {ran.spec()!r}, not those of "
            f"{method.spec()!r}. Go on with the same method and options, or start from the prompt "
            "without this cache."
        )
    # Some models hand the pixels of the prompt to every step of an answer, too (Phi-4 multimodal).
    if method.streams() and not frame.decoding and carries_vision(kwargs):
        raise StateError(
            f"{method.name} cannot take images in a later turn: its branches have gone their "
            "own way. Generate from the whole conversation, without past_key_values."
        )


def check_prompt(method: ContrastMethod, frame: Frame) -> None:
    """Refuse a prompt that is cut, or padded on the right.

    Raises:
        BadInput, CompositionError: what of it.
    """
    length = frame.ledger.prompt_length
    end = frame.past + frame.queries
    if end < length and frame.call.rows is None:
        raise CompositionError(
            f"{method.name} must see a whole prompt in one forward, but this one holds "
            f"{frame.queries} of its {length} tokens. Give it whole, or let "
            "generate(prefill_chunk_size=...) cut it."
        )
    if end >= length and bool((frame.ledger.kinds[:, length - 1] == PAD).any()):
        raise BadInput(
            f"{method.name} reads the logits of the last column, where a prompt is padded. Pad on "
            'the left: processor.tokenizer.padding_side = "left".'
        )


def check_cross_attention(method: ContrastMethod, forward: Forward) -> None:
    """Rows with and without an image are one batch, so their mask must say which is which.

    Raises:
        BadInput: it is missing.
    """
    missing = forward.kwargs.get("cross_attention_mask") is None
    if missing and forward.host.info.cross_attention and bool(forward.frame.ledger.visual().any()):
        raise BadInput(
            f"{method.name} needs cross_attention_mask, of the prompt as the model's processor "
            "returns it and of each token behind it as generate() extends it."
        )
