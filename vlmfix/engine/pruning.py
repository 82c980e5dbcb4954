"""The stage of methods that prune visual tokens before the language model: prompts are cut.

Everything that depends on the length of a prompt (masks, positions, the KV cache, the number of
tokens that may follow) transformers derives from what generate() is given. So a prompt is cut
before generate() starts, and afterwards only the ids that it returns are put right.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers.cache_utils import Cache

from vlmfix.base.method import Method
from vlmfix.base.pruning import PruningMethod, TokenMethod
from vlmfix.engine.call import Call
from vlmfix.engine.edits import require_attention
from vlmfix.engine.encoded import CallImages, Reduction
from vlmfix.engine.hooks import Host
from vlmfix.engine.kept import ask, with_features
from vlmfix.engine.pruned import CutPrompts, follow_cut_prompts
from vlmfix.engine.stage import Forward, Generation, Stage
from vlmfix.engine.state import Implementation
from vlmfix.errors import BadInput, CompositionError, StateError, UnsupportedModel
from vlmfix.families import ModelInfo, pixel_names, vision_arguments
from vlmfix.families.prompt import carries_vision
from vlmfix.families.source import drops_positions
from vlmfix.families.surgeon import TOKEN_TYPES, compact, real_tokens
from vlmfix.families.tower import Tower, describe_tower, require_readable

__all__ = ["PruningStage", "Shortened", "put_back", "shorten"]


@dataclass(frozen=True)
class _Cut:
    """Of one call: columns of its prompts after they were cut."""

    length: int


@dataclass(frozen=True, eq=False)
class PruningStage(Stage):
    """Cuts whole prompts to the visual tokens that a method keeps."""

    method: TokenMethod

    name: ClassVar[str] = "prompt pruning"

    @classmethod
    def of(cls, methods: Sequence[Method], info: ModelInfo) -> PruningStage | None:
        own = [method for method in methods if isinstance(method, TokenMethod)]
        return cls(own[0]) if own else None

    @classmethod
    def check(cls, methods: Sequence[Method], info: ModelInfo, impl: Implementation) -> None:
        own = [method.name for method in methods if isinstance(method, PruningMethod)]
        if len(own) > 1:
            raise CompositionError(
                f"{' and '.join(own)} both prune visual tokens, and which of them would see what "
                "the other left is not defined. Keep one of them."
            )

    def examine(self, model: Any, info: ModelInfo) -> None:
        looked_at = self.method.relevance_layer(info)
        require_attention(info, () if looked_at is None else (looked_at,))
        own = hasattr(model.base_model, "get_rope_index")  # it counts without being told
        if self.method.positions == "original" and not own and drops_positions(model):
            raise UnsupportedModel(
                f"{self.method.name}: positions=original cannot be kept on model type "
                f"{info.model_type!r}, whose generate() drops the positions it is given. Leave "
                "positions=contiguous."
            )
        text = model.config.get_text_config(decoder=True)
        if self.method.positions == "original" and getattr(text, "index_block_size", None):
            raise UnsupportedModel(
                f"{self.method.name}: positions=original cannot be kept on model type "
                f"{info.model_type!r}, whose sparse attention takes them for the numbers of keys. "
                "Leave positions=contiguous."
            )
        tower = self._tower(model, info)
        if tower is not None:
            require_readable(tower)

    @property
    def reads_question(self) -> bool:
        return self.method.reads_question

    def _tower(self, model: Any, info: ModelInfo) -> Tower | None:
        """The vision tower; None where every placeholder is a visual token like any other."""
        try:
            return describe_tower(model, info)
        except UnsupportedModel:
            if self.method.needs_tiles:
                raise
            return None

    def reach(self, host: Host) -> None:
        tower = host.tower or self._tower(host.model, host.info)
        if tower is not None:  # any layer tells which placeholders are newlines
            host.record_tower(tower, self.method.encoder_layers(tower) or (0,))

    def before_generate(self, generation: Generation) -> None:
        call, kwargs = generation.call, generation.kwargs
        _require_empty_cache(self.method, kwargs.get("past_key_values"))
        shortened = shorten(generation.host, self.method, kwargs, call.question)
        if shortened is None:
            _say_features_stay(self.method, kwargs)
            return
        cut = shortened.kwargs
        positions = cut.get("position_ids")
        one_axis = positions is not None and positions.ndim == 2
        if one_axis and generation.option("use_cache") is False:
            raise BadInput(
                f"{self.method.name}: positions=original leaves gaps, which transformers takes for "
                "several prompts in one row when there is no cache. Use positions=contiguous, or a "
                "cache."
            )
        call.prompt_length = cut["input_ids"].shape[1]
        call.keep(_Cut(call.prompt_length))
        _note(call, shortened)
        _shift_lengths(generation, cut, shortened.removed)
        generation.kwargs = cut

    def after_generate(self, generation: Generation, output: Any) -> Any:
        cut = generation.call.get(_Cut)
        return output if cut is None else put_back(output, generation.ids, cut.length)

    def before_forward(self, forward: Forward) -> None:
        kwargs = forward.kwargs
        if not pixel_names(kwargs):
            if forward.call is None:  # in generate() features have replaced the pixels
                _say_features_stay(self.method, kwargs)
            forward.kwargs = follow_cut_prompts(forward)
            return
        _require_empty_cache(self.method, forward.cache)
        length = forward.prompt_length
        shortened = shorten(forward.host, self.method, kwargs, prompt_length=length)
        if shortened is None:
            return
        forward.kwargs = shortened.kwargs
        forward.prompt_length = None if length is None else length - shortened.removed
        _note(forward.frame.call, shortened)
        forward.frame.ledger.keep(_cut_prompts(self.method, kwargs, shortened))


def _cut_prompts(method: TokenMethod, given: Mapping[str, Any], shortened: Shortened) -> CutPrompts:
    """What forwards behind these prompts must know of them."""
    cut, ids = shortened.kwargs, given["input_ids"]
    mask, positions = cut["attention_mask"], cut.get("position_ids")
    removed = following = None
    if positions is None:  # the model counts columns
        removed = torch.full_like(mask[:, :1], ids.shape[1] - mask.shape[1])
    elif positions.ndim == 2 and method.positions == "original":
        following = positions[:, -1:] + 1
    elif positions.ndim == 2:
        before = real_tokens(ids, given.get("attention_mask")).sum(1, keepdim=True)
        removed = before - mask.sum(1, keepdim=True)
    return CutPrompts(ids.shape[1], mask, removed, following)


def _say_features_stay(method: TokenMethod, kwargs: Mapping[str, Any]) -> None:
    """Warn where a user gives images as features, which are not cut."""
    if carries_vision(kwargs) and not pixel_names(kwargs):
        warnings.warn(
            f"{method.name} drops no visual token here: these images are features that were "
            "encoded before, and it prunes what it encodes itself. Pass pixels.",
            stacklevel=2,
        )


def _require_empty_cache(method: TokenMethod, cache: Cache | None) -> None:
    if cache is not None and cache.get_seq_length():
        raise StateError(
            f"{method.name} cuts whole prompts, and this call goes on from a KV cache. Start from "
            "the whole conversation, without past_key_values."
        )


def _note(call: Call, shortened: Shortened) -> None:
    """What later parts of a call must know of prompts that were cut."""
    reductions = shortened.reductions
    call.visual_tokens = tuple(one.size for one in reductions)
    images = [one.image for one in reductions if one.image is not None]
    recorded = images if len(images) == len(reductions) else None
    call.keep(CallImages(recorded, reductions, shortened.placeholders))


def _shift_lengths(generation: Generation, cut: dict[str, Any], removed: int) -> None:
    """Lower the options of generate() that count the prompt."""
    config = cut.get("generation_config")
    if config is not None:
        cut["generation_config"] = config = copy.deepcopy(config)
    for name in ("max_length", "min_length"):
        value = generation.option(name)
        if not value:
            continue
        if config is None or generation.given.get(name) is not None:
            cut[name] = value - removed
        else:
            setattr(config, name, value - removed)


@dataclass(frozen=True)
class Shortened:
    """Prompts that were cut.

    Attributes:
        kwargs: of generate() or of a forward, for the shorter prompts.
        reductions: per image, in the order of the prompts.
        placeholders: how many each prompt had.
        removed: how many columns the batch lost.
    """

    kwargs: dict[str, Any]
    reductions: list[Reduction]
    placeholders: list[int]
    removed: int


def shorten(
    host: Host,
    method: TokenMethod,
    kwargs: Mapping[str, Any],
    question: tuple[torch.Tensor, torch.Tensor] | None = None,
    prompt_length: int | None = None,
) -> Shortened | None:
    """Cut whole prompts; None if nothing goes: no image, features given, or every token kept.

    Args:
        host: the wrapped model; its vision tower is recorded if the method wants it.
        method: prepared.
        kwargs: of generate() or of a forward over whole prompts; `input_ids` (B, L).
        question: as `find_question` gives it, where the processor is known.
        prompt_length: where an answer begins behind the prompts; None: nothing is behind them.

    Raises:
        BadInput: videos, placeholders that the images do not fill, a mask of pairs, or positions
            that cannot be closed up.
        UnsupportedModel: a model that takes no features in place of pixels.
    """
    asked = ask(host, method, kwargs, question, prompt_length)
    if asked is None:
        return None
    _check_mask(method, kwargs["input_ids"], kwargs.get("attention_mask"))
    kept = torch.zeros(sum(one.count for one in asked.reductions), dtype=torch.bool)
    start = 0
    for reduction in asked.reductions:
        kept[start + reduction.positions.cpu()] = True
        start += reduction.count
    if bool(kept.all()):
        if len(kept) and method.tokens is None:
            warnings.warn(
                f"{method.name} drops none of the {len(kept)} visual tokens of these prompts: so "
                "much of each image is all of it. Give a smaller ratio, or larger images.",
                stacklevel=2,
            )
        return None
    cut, vision = dict(kwargs), vision_arguments(host.model, kwargs)
    for name in vision:
        cut.pop(name)
    reduced = with_features(asked.output, asked.features, asked.reductions)
    cut["mm_encoder_outputs"] = {"image": reduced}
    kept = kept.to(asked.placeholders.device)
    removed = _cut_tokens(host.model, cut, vision, asked.placeholders, kept, method)
    return Shortened(cut, asked.reductions, asked.placeholders.sum(1).tolist(), removed)


def _check_mask(method: TokenMethod, ids: torch.Tensor, mask: Any) -> None:
    """Refuse a mask of queries and keys that says more than which tokens are padding."""
    if isinstance(mask, Mapping):  # those of sliding layers are made of it
        mask = mask.get("full_attention")
    if mask is None or mask.ndim == 2:
        return
    real = real_tokens(ids, mask)[:, None]
    mask = mask[..., : ids.shape[1]]  # the other keys are room in a static cache
    seen = (mask if mask.dtype == torch.bool else mask == 0) & real[..., None]
    causal = torch.ones_like(seen).tril() & real[..., None, :] & real[..., None]
    if torch.equal(seen, causal):
        return
    raise BadInput(
        f"{method.name} cuts whole prompts, and the mask given says for pairs of tokens who sees "
        "whom. Give an attention_mask (rows, columns), or none."
    )


def _cut_tokens(
    model: Any,
    cut: dict[str, Any],
    vision: Mapping[str, Any],
    placeholders: torch.Tensor,
    kept: torch.Tensor,
    method: TokenMethod,
) -> int:
    """Cut ids, mask, types and positions in place; how many columns went."""
    ids, mask = cut["input_ids"], cut.get("attention_mask")
    real = real_tokens(ids, mask)
    keep = real.clone()
    keep[placeholders] = kept
    tensors: dict[str, tuple[torch.Tensor, int]] = {"input_ids": (ids, 0)}
    for name in TOKEN_TYPES:
        if cut.get(name) is not None:
            tensors[name] = (cut[name], 0)
    positions = _positions(model, cut, vision, real, method)
    if positions is not None:
        tensors["position_ids"] = (positions, 0)
    shorter, new_mask = compact(keep, tensors)
    text = (new_mask.cumsum(1) - 1).clamp(min=0)
    given = cut.pop("position_ids", None)
    if positions is None and given is not None and not _counts_columns(given):
        shorter["position_ids"] = text
    if positions is not None and positions.ndim == 3:
        places = shorter["position_ids"]
        # The first of four axes counts tokens: with gaps masks would see two prompts. HunYuan has
        # four of its own, and looks at the mask alone.
        whole = places if len(places) == 4 else torch.cat([text[None], places])
        shorter["position_ids"] = whole
        # Added to the number of real tokens: models count by the mask, without the padding.
        following = places.amax(dim=(0, 2)) + 1 - new_mask.sum(1)
        for module in model.modules():
            if "rope_deltas" in module.__dict__:
                module.rope_deltas = following[:, None]
    cut |= {**shorter, "attention_mask": new_mask}
    return int(ids.shape[1] - new_mask.shape[1])


def _positions(
    model: Any,
    cut: Mapping[str, Any],
    vision: Mapping[str, Any],
    real: torch.Tensor,
    method: TokenMethod,
) -> torch.Tensor | None:
    """Positions of the whole prompts, (axes, B, L) or (B, L), to be cut; None: count the rest.

    Raises:
        BadInput: positions that were given and cannot be closed up.
    """
    given: torch.Tensor | None = cut.get("position_ids")
    index = getattr(model.base_model, "get_rope_index", None)
    if index is None:
        counted = (real.long().cumsum(1) - 1).clamp(min=0)
        if method.positions == "original":
            return counted if given is None else given.expand_as(counted)
        if given is None or _counts_columns(given):
            return None
        if not torch.equal(given.expand_as(counted)[real], counted[real]):
            raise BadInput(
                f"{method.name}: positions=contiguous counts what is left, and the position_ids "
                "given are not counted one by one. Use positions=original, or leave them out."
            )
        return None
    if given is not None:
        axes = _axes(model)
        return given[-axes:] if given.ndim == 3 else given.expand(axes, *real.shape)
    offered = {**cut, **vision, "attention_mask": real.long()}
    wanted = {
        name: offered[name] for name in inspect.signature(index).parameters if name in offered
    }
    found: torch.Tensor = index(**wanted)[0]
    return found


def _axes(model: Any) -> int:
    """The axes of the model's positions, without that of the text."""
    parameters = model.config.get_text_config(decoder=True).rope_parameters or {}
    return len(parameters.get("mrope_section") or "thw")


def _counts_columns(positions: torch.Tensor) -> bool:
    """Whether positions (B or 1, L) number the columns, as models do that are given none."""
    return torch.equal(
        positions, torch.arange(positions.shape[1], device=positions.device).expand_as(positions)
    )


def put_back(output: Any, ids: torch.Tensor, length: int) -> Any:
    """What generate() returned for cut prompts of `length` columns, with the prompts (B, L) whole.

    Args:
        output: the sequences, or what holds them.
        ids: what the caller gave.
        length: of the cut prompts.
    """
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    prompts = ids.repeat_interleave(len(sequences) // len(ids), 0).to(sequences.device)
    whole = torch.cat([prompts, sequences[:, length:]], dim=1)
    if isinstance(output, torch.Tensor):
        return whole
    output.sequences = whole
    return output
