"""One branch of a prompt, prefilled in an internal pass: other pixels, hidden or filled tokens."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache

from vlmfix.base.contrast import Branch, Prompt
from vlmfix.engine.dispatch import in_python
from vlmfix.engine.encoded import CallImages
from vlmfix.engine.hooks import Host
from vlmfix.engine.kept import encode_reduced
from vlmfix.engine.observe import internal_pass
from vlmfix.engine.state import State
from vlmfix.families import last_logits
from vlmfix.families.surgeon import TOKEN_TYPES, prompt_without_images

__all__ = [
    "DecoderPositions",
    "PrefilledBranch",
    "decoder_hook",
    "first_layer_hook",
    "following_position",
    "padded_left",
    "prefill_branch",
]


#: Arguments of a decoder that bring image features to deeper layers (n, D) per layer, in a list or
#: by number of the layer, and those that say at which tokens they enter.
_DEEP = {"deepstack_visual_embeds": "visual_pos_masks", "deepstack_features": "vision_mask"}


@dataclass(frozen=True)
class DecoderPositions:
    """The positions that the decoder was given in a forward, if it was given any."""

    ids: torch.Tensor | None


@dataclass
class _Filling:
    """Says that the forwards of this thread are a branch whose embeddings are replaced.

    `done` says that the decoder was given embeddings, so that they have been.
    """

    branch: Branch
    done: bool = False


@dataclass(frozen=True)
class PrefilledBranch:
    """One branch, prefilled: logits (B, kept, V), its cache, its visible keys and its shift."""

    logits: torch.Tensor
    cache: Any
    visible: torch.Tensor
    shift: torch.Tensor


def prefill_branch(
    host: Host,
    prompt: Prompt,
    branch: Branch,
    encoded: Mapping[str, Any],
    images: CallImages,
    cache: Cache | None,
    tokens: Mapping[str, torch.Tensor],
    chosen: slice,
    kept: int,
) -> PrefilledBranch:
    """Prefill one branch on the prompts, and on the tokens behind them, of the chosen rows."""
    length = prompt.ids.shape[1]
    total = tokens["input_ids"].shape[1]
    rows = len(tokens["input_ids"])
    mine = {
        name: value[..., chosen, :] if value.shape[-2] == rows else value
        for name, value in tokens.items()
    }
    visible = prompt.real if branch.hidden is None else prompt.real & ~branch.hidden
    inputs: dict[str, Any] = {name: value[..., :length] for name, value in mine.items()}
    inputs["attention_mask"] = visible.long()
    shift = torch.zeros(len(prompt.ids), 1, dtype=torch.long, device=prompt.ids.device)
    if not branch.image:
        following = following_position(mine["position_ids"], length)
        inputs = prompt_without_images(host.model, host.info, inputs)
        visible = inputs["attention_mask"].bool()
        shift = inputs["position_ids"][:, -1:] + 1 - following
    else:
        vision = encoded if branch.vision is None else branch.vision
        inputs |= _image_inputs(host, vision, images)
    if total > length:
        _append(inputs, mine, length)
    text = host.model.config.get_text_config(decoder=True)
    own = DynamicCache(config=text) if cache is not None else None
    if cache is not None and any(map(cache.is_recording_past, range(len(cache.layers)))):
        own.activate_past_recording()  # type: ignore[union-attr]
    inputs |= {"past_key_values": own, "use_cache": own is not None}
    inputs |= last_logits(host.model, kept)
    thread = host.state.thread
    filling = thread.keeping(_Filling(branch)) if branch.filled is not None else nullcontext()
    with filling:
        output = internal_pass(host, inputs)
    return PrefilledBranch(output.logits[:, -kept:], own, visible, shift)


def _image_inputs(host: Host, vision: Mapping[str, Any], images: CallImages) -> Mapping[str, Any]:
    """Pixels, or encoded and cut as those of the base were."""
    if images.reductions is None or "mm_encoder_outputs" in vision:
        return vision
    return encode_reduced(host, vision, images.reductions)


def _append(inputs: dict[str, Any], tokens: Mapping[str, torch.Tensor], length: int) -> None:
    """Put the tokens behind the prompt (drafts, or all that was generated) behind the branch's."""
    ids = tokens["input_ids"][:, length:]
    extra = ids.shape[1]
    mask = inputs["attention_mask"]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], dim=1)
    inputs["attention_mask"] = torch.cat([mask, mask.new_ones(ids.shape)], dim=1)
    cross = inputs.get("cross_attention_mask")
    if cross is not None and cross.shape[1] < inputs["input_ids"].shape[1]:
        # What follows sees the images that the last token of the prompt sees.
        last_row = cross[:, -1:].expand(-1, extra, -1, -1)
        inputs["cross_attention_mask"] = torch.cat([cross, last_row], dim=1)
    last = inputs["position_ids"][..., -1:]
    steps = torch.arange(1, extra + 1, device=last.device)
    inputs["position_ids"] = torch.cat([inputs["position_ids"], last + steps], dim=-1)
    for name in TOKEN_TYPES:
        types = tokens.get(name)
        if types is None or name not in inputs:
            continue
        if types.shape[-1] > length:
            inputs[name] = torch.cat([inputs[name], types[:, length:]], dim=1)
        else:  # transformers does not extend it over the drafts of the first forward
            inputs[name] = torch.nn.functional.pad(inputs[name], (0, extra))


def following_position(positions: torch.Tensor, length: int) -> torch.Tensor:
    """Position of the first token behind prompts of `length` columns: (B or 1, 1).

    Behind text the axes of M-RoPE agree, so the last one speaks for all.
    """
    axes = positions.reshape(-1, *positions.shape[-2:])
    return axes[-1][:, length - 1 : length] + 1


def padded_left(mask: torch.Tensor, length: int) -> torch.Tensor:
    return torch.nn.functional.pad(mask, (length - mask.shape[1], 0))


def decoder_hook(state: State) -> Any:
    """A forward pre-hook of the decoder: notes positions, and fills in what a branch says."""

    def hook(module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
        return None if state.prepared is not None else enter(args, kwargs)

    @in_python
    def enter(args: Any, kwargs: dict[str, Any]) -> Any:
        filling = state.thread.get(_Filling)
        if filling is not None:
            filling.done = kwargs.get("inputs_embeds") is not None
            return (args, _replace_embeddings(filling.branch, kwargs)) if filling.done else None
        if state.frame is not None:
            state.frame.keep(DecoderPositions(kwargs.get("position_ids")))
        return None

    return hook


def first_layer_hook(state: State) -> Any:
    """A forward pre-hook of the first layer, for decoders that embed token ids themselves."""

    def hook(module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
        return None if state.prepared is not None else enter(args, kwargs)

    @in_python
    def enter(args: Any, kwargs: dict[str, Any]) -> Any:
        filling = state.thread.get(_Filling)
        if filling is None or filling.done:
            return None
        if args:
            return (_filled(filling.branch, args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": _filled(filling.branch, kwargs["hidden_states"])}

    return hook


def _filled(branch: Branch, embeddings: torch.Tensor) -> torch.Tensor:
    """Embeddings (B, Q, D) with those of some visual tokens replaced."""
    assert branch.filled is not None
    extra = embeddings.shape[1] - branch.filled.shape[1]  # tokens behind the prompt
    place = torch.nn.functional.pad(branch.filled, (0, extra)).to(embeddings.device)
    fill = torch.as_tensor(branch.fill).to(embeddings)
    if fill.ndim:
        fill = torch.nn.functional.pad(fill, (0, 0, 0, extra))
    return torch.where(place[..., None], fill, embeddings)


def _replace_embeddings(branch: Branch, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a decoder's forward with the embeddings of some visual tokens replaced.

    Features that enter deeper layers at visual tokens (DeepStack) are 0 at the same ones.
    """
    embeddings, filled = kwargs["inputs_embeds"], branch.filled
    assert filled is not None
    changed = {**kwargs, "inputs_embeds": _filled(branch, embeddings)}
    behind = embeddings.shape[1] - filled.shape[1]
    place = torch.nn.functional.pad(filled, (0, behind)).to(embeddings.device)
    for name, where in _DEEP.items():
        deep = kwargs.get(name)
        if deep is None:
            continue
        gone = place[kwargs[where].reshape(place.shape).to(place.device)][:, None]
        layers = deep.items() if isinstance(deep, Mapping) else enumerate(deep)
        left = {at: features.masked_fill(gone.to(features.device), 0.0) for at, features in layers}
        changed[name] = left if isinstance(deep, Mapping) else list(left.values())
    return changed
