"""Runs the branches of a contrastive method: rows of their own behind the base rows of one cache.

The prompts run as generate() runs them. When they are through, each branch prefills apart, and its
keys and values are joined, padded on the left, behind the base rows of the very cache that
generate() holds. From then on one forward serves all streams: its inputs are widened before and
its logits combined after, so that whoever calls the model sees base rows alone. In row order,
branch g of row b is row g R + b, with R base rows (beams and returned sequences included) and g = 0
the base.

docs/experiments/contrast.md holds the experiment that chose this over a second forward per step.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from vlmfix.base.contrast import Branch, ContrastMethod, Prompt
from vlmfix.engine.call import Call
from vlmfix.engine.frame import Frame, Stack
from vlmfix.engine.ledger import Ledger
from vlmfix.engine.shortening import encode_reduced
from vlmfix.engine.watchers import LastRow
from vlmfix.errors import BadInput, CompositionError, StateError
from vlmfix.families import last_logits, vision_arguments
from vlmfix.families.kinds import PAD
from vlmfix.families.prompt import carries_vision
from vlmfix.families.surgeon import PER_TOKEN, TOKEN_TYPES, module_state, prompt_without_images

if TYPE_CHECKING:
    from vlmfix.engine.session import Session

__all__ = ["Streams", "before_forward", "combine", "combine_decoded", "replace_embeddings"]

#: Layers of a KV cache that rows can be joined to. Quantised ones cannot be cut, linear attention
#: keeps no keys.
_JOINABLE = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)


@dataclass(frozen=True)
class Streams:
    """The rows of one cache, once the branches have been joined to it.

    Attributes:
        branches: their number, G.
        visible: ((1 + G) R, P) bool, which of the P keys of the prompt a row sees.
        following: (R, 1) int64, the position of the first token behind the prompt, in the base.
        shift: (G R, 1) int64, what to add to a position of the base for the same token in a branch.
        as_base: whether every branch sees the keys that its base row sees.
        first: per branch, the first key that any of its rows sees.
    """

    branches: int
    visible: torch.Tensor
    following: torch.Tensor
    shift: torch.Tensor
    as_base: bool
    first: tuple[int, ...]

    @property
    def rows(self) -> int:
        """R, the base rows."""
        return len(self.visible) // (1 + self.branches)

    def widen(self, kwargs: Mapping[str, Any], frame: Frame) -> dict[str, Any]:
        """The arguments of a forward on R rows, for all (1 + G) R of them.

        Args:
            kwargs: of a forward on tokens behind the prompt; input_ids is (R, Q).
            frame: of that forward.
        """
        past = frame.past
        offset = max(frame.offsets.values(), default=0)
        ids = kwargs["input_ids"]
        rows, queries = ids.shape
        wide = dict(kwargs)
        for name in ("input_ids", *TOKEN_TYPES):
            if kwargs.get(name) is not None:
                wide[name] = kwargs[name].repeat(1 + self.branches, 1)
        mask = kwargs.get("attention_mask")
        positions = kwargs.get("position_ids")
        if positions is None:  # outside of generate() the model would make them
            steps = past - self.visible.shape[1] + torch.arange(queries, device=ids.device)
            positions = self.following.to(ids.device) + steps
        positions = positions.expand(*positions.shape[:-2], rows, queries)
        repeats = [1] * positions.ndim
        repeats[-2] = self.branches
        wide["position_ids"] = torch.cat(
            [positions, positions.repeat(repeats) + self.shift.to(positions.device)], dim=-2
        )
        if isinstance(mask, Mapping):
            wide["attention_mask"] = {
                kind: self._wide_mask(m, past, queries, offset if kind != "full_attention" else 0)
                for kind, m in mask.items()
            }
        else:
            wide["attention_mask"] = self._wide_mask(mask, past, queries, 0)
        return wide

    def _wide_mask(
        self, mask: torch.Tensor | None, past: int, queries: int, offset: int
    ) -> torch.Tensor | None:
        groups, prompt = 1 + self.branches, self.visible.shape[1]
        if mask is None:
            if self.as_base:
                return None
            rest = self.visible.new_ones(len(self.visible), past + queries - prompt)
            return torch.cat([self.visible, rest], dim=1).long()
        wide = mask.repeat(groups, *[1] * (mask.ndim - 1))
        if self.as_base:
            return wide
        visible = self.visible.to(mask.device)
        if mask.ndim == 2:
            wide[:, :prompt] *= visible.to(mask.dtype)
            return wide
        # (R, 1, Q, K), as a static cache has it: K keys from `offset` on, bool or additive.
        keys = mask.shape[-1]
        visible = visible[:, offset : offset + keys]
        hidden = torch.nn.functional.pad(~visible, (0, keys - visible.shape[1]))[:, None, None]
        filler = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        return wide.masked_fill(hidden, filler)


# -- before a forward ------------------------------------------------------------------------------


def before_forward(
    session: Session, frame: Frame, kwargs: dict[str, Any]
) -> tuple[Frame, dict[str, Any]]:
    """What the contrastive method of a stack needs of a forward that is about to run.

    Args:
        session: whose model it is.
        frame: of the forward, on base rows.
        kwargs: its keyword arguments, `input_ids` among them.

    Returns:
        The frame to run under, which watches what the branches will be made of, and arguments.

    Raises:
        BadInput, CompositionError, StateError: the branches could not be run.
    """
    method, ledger, cache = frame.stack.contrast, frame.ledger, _cache(kwargs)
    assert method is not None
    by_name, config = kwargs.get("return_dict"), cast("Any", session.model.config)
    if not (config.return_dict if by_name is None else by_name):
        raise BadInput(f"{method.name} combines logits by name: leave return_dict=False out.")
    behind_prompt = bool(frame.past) and ledger.pieces is None
    if behind_prompt:
        _check_cache(method, frame, kwargs)
    if not method.streams():
        return frame, kwargs
    if behind_prompt:
        if ledger.streams is None:
            return frame, kwargs
        return frame, ledger.streams.widen(kwargs, frame)
    _check_prompt(method, frame, cache)
    if cache is not None:
        _keep_pieces(ledger, kwargs, frame.past, frame.queries)
    if frame.past + frame.queries < ledger.prompt_length or frame.call.branches is not None:
        return frame, kwargs
    watched = tuple(method.watched(session.info))
    if watched:
        watcher = LastRow(watched, row=ledger.prompt_length - 1)
        stack = Stack((*frame.stack.methods, watcher), session.info)
        session.reach(stack)
        frame = Frame(
            stack, frame.call, ledger, frame.past, frame.queries, frame.offsets, frame.tap
        )
        ledger.seen[method] = watcher.seen
    return frame, kwargs


def _check_cache(method: ContrastMethod, frame: Frame, kwargs: Mapping[str, Any]) -> None:
    """Refuse tokens behind a prompt whose branches are not there, are others, or cannot follow."""
    ledger = frame.ledger
    if method.streams() and ledger.contrast is None:
        raise StateError(
            f"this KV cache was filled while {method.name} was off, so its branches are missing. "
            "Start from the prompt, without this cache."
        )
    if ledger.streams is not None and ledger.contrast != method:
        raise StateError(
            f"this KV cache holds the branches of {ledger.contrast.spec()!r}, not those of "
            f"{method.spec()!r}. Go on with the same method and options, or start from the prompt "
            "without this cache."
        )
    if method.streams() and carries_vision(kwargs):
        raise StateError(
            f"{method.name} cannot take images in a later turn: its branches have gone their "
            "own way. Generate from the whole conversation, without past_key_values."
        )


def _check_prompt(method: ContrastMethod, frame: Frame, cache: Cache | None) -> None:
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
    if cache is None:
        return
    wrong = {type(layer).__name__ for layer in cache.layers if type(layer) not in _JOINABLE}
    if wrong or cache.offloading:
        what = ", ".join(sorted(wrong)) or "offloaded layers"
        raise CompositionError(
            f"{method.name} runs its branches in the rows of one KV cache, which it cannot do with "
            f"{what}. Generate with a dynamic or a static cache."
        )


def _keep_pieces(ledger: Ledger, kwargs: Mapping[str, Any], past: int, queries: int) -> None:
    """Collect what belongs to each token of a prompt, which may come in chunks."""
    pieces = ledger.pieces = ledger.pieces or {}
    for name in PER_TOKEN:
        value = kwargs.get(name)
        if value is None:
            continue
        before = pieces.get(name)
        if before is None or value.shape[-1] != queries:  # some are handed over whole each time
            pieces[name] = value
        else:
            pieces[name] = torch.cat([before, value], dim=-1)


# -- after a forward -------------------------------------------------------------------------------


def combine(session: Session, frame: Frame, kwargs: Mapping[str, Any], output: Any) -> Any:
    """Combine the streams of a forward that has run; after a prompt, run its branches first.

    Args:
        session: whose model it is.
        frame: of the forward.
        kwargs: its keyword arguments, as `before_forward` left them.
        output: what it returned.

    Returns:
        The output, with float32 logits (R, Q, V) and nothing of the branches.
    """
    method, ledger = frame.stack.contrast, frame.ledger
    assert method is not None
    end, length = frame.past + frame.queries, ledger.prompt_length
    if end < length:  # a chunk of the prompt: nothing is sampled from it
        return output
    # The rows that predict: of a prompt the last one, and drafts behind it.
    kept = min(output.logits.shape[1], end - max(length - 1, frame.past))
    token = torch.arange(end - kept, end, device=output.logits.device) - length + 2
    prompt = frame.past == 0 or ledger.pieces is not None
    if not (prompt and method.streams()):
        return combine_decoded(frame, output, token)
    if bool(ledger.visual()[:, :length].any()):
        branches = _run_branches(session, frame, method, kwargs, kept)
        output = _fold(frame, output, [output.logits, *branches], token)
    ledger.pieces, ledger.contrast = None, method
    return output


def combine_decoded(frame: Frame, output: Any, token: torch.Tensor) -> Any:
    """Combine the streams of a decode step; `token` (R,) as in `ContrastMethod.contrast`."""
    method, streams = frame.stack.contrast, frame.ledger.streams
    assert method is not None
    if not method.streams():
        return _fold(frame, output, [output.logits], token)
    if streams is None:  # prompts without an image have no branches
        return output
    logits = output.logits.chunk(1 + streams.branches)
    for name in ("hidden_states", "attentions"):
        if output.get(name) is not None:
            output[name] = tuple(x if x is None else x[: streams.rows] for x in output[name])
    return _fold(frame, output, logits, token)


def _fold(frame: Frame, output: Any, logits: Sequence[torch.Tensor], token: torch.Tensor) -> Any:
    """Put the combination of base and branch logits into an output."""
    method, kept = frame.stack.contrast, len(token)
    assert method is not None
    base, *branches = (stream[:, -kept:].float() for stream in logits)
    # A branch that overflowed says nothing; its row then speaks for itself.
    branches = [torch.where(x.isnan().any(-1, keepdim=True), base, x) for x in branches]
    has_image = frame.ledger.visual().any(1).to(base.device)
    combined = method.contrast(base, branches, token.to(base.device))
    combined = torch.where(has_image[:, None, None], combined, base)
    frame.call.contrasted.append(has_image.sum() * kept)
    frame.call.streams = max(frame.call.streams, len(logits))
    output.logits = torch.cat([logits[0][:, :-kept].float(), combined], dim=1)
    return output


def _run_branches(
    session: Session,
    frame: Frame,
    method: ContrastMethod,
    kwargs: Mapping[str, Any],
    kept: int,
) -> list[torch.Tensor]:
    """Prefill the branches of a prompt that has just run: (R, kept, V) logits of each."""
    ledger, call = frame.ledger, frame.call
    cache = _cache(kwargs)
    length, rows = ledger.prompt_length, len(ledger.kinds)
    tokens = {name: kwargs[name] for name in PER_TOKEN if kwargs.get(name) is not None}
    tokens |= ledger.pieces or {}
    if "position_ids" not in tokens:  # a bare forward: the model made them
        made = torch.arange(tokens["input_ids"].shape[1], device=ledger.kinds.device)[None]
        tokens["position_ids"] = made if frame.positions is None else frame.positions
    copies = rows // (call.rows or rows)
    given = call.vision if call.vision else vision_arguments(session.model, kwargs)
    prompt = Prompt(
        info=session.info,
        ids=tokens["input_ids"][::copies, :length],
        real=(ledger.kinds[::copies, :length] != PAD),
        visual=ledger.visual()[::copies, :length],
        vision={name: value for name, value in given.items() if name != "mm_encoder_outputs"},
        seen={layer: row[::copies] for layer, row in ledger.seen.get(method, {}).items()},
        placeholders=call.placeholders,
    )
    if call.branches is None:  # without a cache every step is a prompt, and the branches hold
        call.branches = tuple(method.branches(prompt))
    encoded = given
    if copies == 1 and kwargs.get("mm_encoder_outputs") and not frame.past:
        encoded = {"mm_encoder_outputs": kwargs["mm_encoder_outputs"]}
    following = _following(tokens["position_ids"], length)
    logits, caches, visible, shifts = [], [], [_left(prompt.real, length)], []
    # Without a cache every row has a tail of its own: a copy of each prompt runs at a time.
    turns = [slice(first, None, copies) for first in range(copies if cache is None else 1)]
    for branch in call.branches:
        ran = [
            _forward(session, prompt, branch, encoded, call.reductions, cache, tokens, turn, kept)
            for turn in turns
        ]
        call.extra_passes += len(ran)
        if cache is None:
            merged = ran[0].logits.new_empty(rows, *ran[0].logits.shape[1:])
            for turn, one in zip(turns, ran, strict=True):
                merged[turn] = one.logits
            logits.append(merged)
            continue
        one = ran[0]
        if copies > 1:
            one.cache.batch_repeat_interleave(copies)
        logits.append(one.logits.repeat_interleave(copies, 0))
        caches.append(one.cache)
        visible.append(_left(one.visible, length))
        shifts.append(one.shift)
    if cache is not None:
        _join(cache, caches, rows)
        as_base = all(torch.equal(seen, visible[0]) for seen in visible[1:])
        ledger.streams = Streams(
            branches=len(caches),
            visible=torch.cat([seen.repeat_interleave(copies, 0) for seen in visible]),
            following=following.expand(rows, 1),
            shift=torch.cat([shift.repeat_interleave(copies, 0) for shift in shifts]),
            as_base=as_base,
            first=tuple(int(seen.any(0).to(torch.uint8).argmax()) for seen in visible[1:]),
        )
    return logits


@dataclass(frozen=True)
class _Ran:
    """One branch, prefilled: logits (B, kept, V), its cache, its visible keys and its shift."""

    logits: torch.Tensor
    cache: Any
    visible: torch.Tensor
    shift: torch.Tensor


def _forward(
    session: Session,
    prompt: Prompt,
    branch: Branch,
    encoded: Mapping[str, Any],
    cut: Any,
    cache: Cache | None,
    tokens: Mapping[str, torch.Tensor],
    chosen: slice,
    kept: int,
) -> _Ran:
    """Prefill one branch on the prompts, and on the tokens behind them, of the chosen rows."""
    model: Any = session.model
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
        following = _following(mine["position_ids"], length)
        inputs = prompt_without_images(model, session.info, inputs)
        visible = inputs["attention_mask"].bool()
        shift = inputs["position_ids"][:, -1:] + 1 - following
    else:
        inputs |= _image_inputs(session, encoded if branch.vision is None else branch.vision, cut)
    if total > length:
        _append(inputs, mine, length)
    text = session.model.config.get_text_config(decoder=True)  # type: ignore[union-attr,operator]
    own = DynamicCache(config=text) if cache is not None else None
    if cache is not None and any(map(cache.is_recording_past, range(len(cache.layers)))):
        own.activate_past_recording()  # type: ignore[union-attr]
    inputs |= {"past_key_values": own, "use_cache": own is not None, "return_dict": True}
    inputs |= last_logits(model, kept)
    plain = Stack((), session.info)
    filling = session.filling(branch) if branch.filled is not None else nullcontext()
    with session.apart(plain, Call(methods=())), module_state(model), torch.no_grad(), filling:
        output = model(**inputs)
    return _Ran(output.logits[:, -kept:], own, visible, shift)


def _image_inputs(session: Session, vision: Mapping[str, Any], cut: Any) -> Mapping[str, Any]:
    """Pixels, or encoded and cut as those of the base were."""
    if cut is None or "mm_encoder_outputs" in vision:
        return vision
    return encode_reduced(session, vision, cut)


def _append(inputs: dict[str, Any], tokens: Mapping[str, torch.Tensor], length: int) -> None:
    """Put the tokens behind the prompt (drafts, or all that was generated) behind the branch's."""
    ids = tokens["input_ids"][:, length:]
    extra = ids.shape[1]
    mask = inputs["attention_mask"]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], dim=1)
    inputs["attention_mask"] = torch.cat([mask, mask.new_ones(ids.shape)], dim=1)
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


def _following(positions: torch.Tensor, length: int) -> torch.Tensor:
    """Position of the first token behind prompts of `length` columns: (B or 1, 1).

    Behind text the axes of M-RoPE agree, so the last one speaks for all.
    """
    axes = positions.reshape(-1, *positions.shape[-2:])
    return axes[-1][:, length - 1 : length] + 1


def _left(mask: torch.Tensor, length: int) -> torch.Tensor:
    return torch.nn.functional.pad(mask, (length - mask.shape[1], 0))


def _cache(kwargs: Mapping[str, Any]) -> Cache | None:
    cache = kwargs.get("past_key_values")
    return cache if isinstance(cache, Cache) else None


# -- the cache -------------------------------------------------------------------------------------


def _join(cache: Cache, branches: Sequence[DynamicCache], rows: int) -> None:
    """Put the rows of branches behind the base rows of a cache, shorter ones padded on the left."""
    groups = 1 + len(branches)
    for layer, *others in zip(cache.layers, *(b.layers for b in branches), strict=True):
        if layer.is_compileable:
            length = min(int(layer.get_seq_length()), layer.max_cache_len)
            for name in ("keys", "values"):
                base = getattr(layer, name)
                joined = base.new_zeros(groups * rows, *base.shape[1:])
                joined[:rows] = base
                for group, other in enumerate(others, 1):
                    own = getattr(other, name)
                    start = length - own.shape[2]
                    joined[group * rows : (group + 1) * rows, :, start:length] = own
                torch._dynamo.mark_static_address(joined)
                setattr(layer, name, joined)
            layer.batch_size = groups * rows
        else:
            for name in ("keys", "values"):
                base = getattr(layer, name)
                own = (getattr(other, name) for other in others)
                pad = torch.nn.functional.pad
                left = [pad(x, (0, 0, base.shape[2] - x.shape[2], 0)) for x in own]
                setattr(layer, name, torch.cat([base, *left]))
        for other in others:  # or all branches would be held twice
            del other.keys, other.values
    kind: Any = type(cache)
    joined_cache: Any = cache
    joined_cache.__class__ = _with_streams(kind)
    joined_cache.streams = (groups, rows)


@functools.cache
def _with_streams(kind: Any) -> Any:
    """A class of cache that reorders the rows of every stream as it is told for the base's.

    Its objects are those of `kind`, which a copy of them stays, too, until they are reset. Nothing
    else that generate() does to a cache names rows.
    """

    class WithStreams(kind):  # type: ignore[misc]  # a class made at run time
        streams: tuple[int, int]

        def update(self, key_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            groups, rows = self.streams
            if len(key_states) != groups * rows:
                raise StateError(
                    f"this KV cache holds {groups * rows} rows, {rows} of prompts and the others "
                    "of a contrastive method's branches, and a forward without them has come. Go "
                    "on with the same method, or start from the prompt without this cache."
                )
            return super().update(key_states, *args, **kwargs)

        def reset(self) -> None:
            super().reset()
            for layer in self.layers:  # what comes next has other rows
                layer.is_initialized = False
            self.__class__ = kind

        def reorder_cache(self, beam_idx: torch.Tensor) -> None:
            groups, rows = self.streams
            starts = torch.arange(groups, device=beam_idx.device) * rows
            super().reorder_cache((starts[:, None] + beam_idx).flatten())

    WithStreams.__name__ = WithStreams.__qualname__ = f"{kind.__name__}WithStreams"
    return WithStreams


# -- embeddings ------------------------------------------------------------------------------------


def replace_embeddings(branch: Branch, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a decoder's forward with the embeddings of some visual tokens replaced.

    Features that enter deeper layers at visual tokens (DeepStack) are 0 at the same ones.
    """
    embeddings, filled = kwargs["inputs_embeds"], branch.filled
    assert filled is not None
    extra = embeddings.shape[1] - filled.shape[1]  # tokens behind the prompt
    place = torch.nn.functional.pad(filled, (0, extra)).to(embeddings.device)
    fill = torch.as_tensor(branch.fill).to(embeddings)
    if fill.ndim:
        fill = torch.nn.functional.pad(fill, (0, 0, 0, extra))
    changed = {**kwargs, "inputs_embeds": torch.where(place[..., None], fill, embeddings)}
    deep = kwargs.get("deepstack_visual_embeds")
    if deep is not None:
        gone = place[kwargs["visual_pos_masks"]]
        changed["deepstack_visual_embeds"] = [
            features.masked_fill(gone.to(features.device)[:, None], 0.0) for features in deep
        ]
    return changed
