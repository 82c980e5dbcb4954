"""The stage of contrastive methods: branches run next to the prompts, and logits are combined.

The prompts run as generate() runs them. When they are through, each branch prefills in an internal
pass, and its keys and values are joined, padded on the left, behind the base rows of the very cache
that generate() holds (branches.py). From then on one forward serves all rows: its inputs are
widened before and its logits combined after, so that the caller of the model sees base rows alone.

docs/experiments/contrast.md holds the experiment that chose this over a second forward per step.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from transformers.cache_utils import Cache

from vlmfix.base.contrast import Branch, ContrastMethod, Prompt
from vlmfix.base.method import Method
from vlmfix.engine.branches import Branches
from vlmfix.engine.encoded import CallImages
from vlmfix.engine.frame import Frame
from vlmfix.engine.hooks import Host
from vlmfix.engine.joined import join_rows, repeat_rows, unjoinable
from vlmfix.engine.ledger import Memory
from vlmfix.engine.observe import LastRow
from vlmfix.engine.prefill import (
    DecoderPositions,
    decoder_hook,
    first_layer_hook,
    following_position,
    padded_left,
    prefill_branch,
)
from vlmfix.engine.refusals import check_cross_attention, check_model, check_prompt, check_turn
from vlmfix.engine.stage import DecodeStep, Forward, Generation, Stage
from vlmfix.engine.state import Implementation
from vlmfix.errors import BadInput, CompositionError
from vlmfix.families import ModelInfo, vision_arguments
from vlmfix.families.kinds import PAD
from vlmfix.families.prompt import made_positions
from vlmfix.families.surgeon import PER_TOKEN

__all__ = ["ContrastStage"]


@dataclass(eq=False)
class _Notes(Memory):
    """What the prompts of one ledger need for their branches.

    Attributes:
        method: the method that has run its branches of the prompts.
        pieces: {name: tensor}, per-token inputs of prompts whose branches are still to run.
        seen: what `ContrastMethod.watched` layers paid attention to, see `Prompt.seen`.
    """

    method: ContrastMethod | None = None
    pieces: dict[str, torch.Tensor] | None = None
    seen: dict[int, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class _Vision:
    """What a generate() call was given of images, before it encoded them."""

    given: dict[str, Any]


@dataclass(frozen=True)
class _CallBranches:
    """What the branches of a call see, once the method has been asked."""

    all: tuple[Branch, ...]


@dataclass(frozen=True)
class _Token:
    """Of a compiled step: (1,) int64, the token to be chosen, counted from 1 in the answer."""

    number: torch.Tensor


@dataclass(frozen=True, eq=False)
class ContrastStage(Stage):
    """Runs the branches of one method, and lets it combine their logits with those of the base."""

    method: ContrastMethod

    name: ClassVar[str] = "contrast"

    @classmethod
    def of(cls, methods: Sequence[Method], info: ModelInfo) -> ContrastStage | None:
        own = [method for method in methods if isinstance(method, ContrastMethod)]
        return cls(own[0]) if own else None

    @classmethod
    def check(cls, methods: Sequence[Method], info: ModelInfo, impl: Implementation) -> None:
        own = [method.name for method in methods if isinstance(method, ContrastMethod)]
        if len(own) > 1:
            raise CompositionError(
                f"{' and '.join(own)} both combine the logits, each against branches of its own, "
                "and no paper says how two such combinations add up. Keep one of them; methods "
                "that edit attention or change images stack with it."
            )

    def examine(self, model: Any, info: ModelInfo) -> None:
        check_model(self.method, model, info)

    def reach(self, host: Host) -> None:
        decoder = host.model.get_decoder()
        host.add_hook("decoder", decoder, decoder_hook(host.state), pre=True)
        host.add_hook("embeddings", host.info.layers[0], first_layer_hook(host.state), pre=True)
        # The rows of a decode step are faster in two products on a CPU, see attention.py.
        layers = host.info.attention
        host.reach_attention(at for at in layers if host.device(at).type == "cpu")

    def check_cache(self, cache: Cache) -> None:
        what = unjoinable(cache) or ("offloaded layers" if cache.offloading else "")
        if self.method.streams() and what:
            raise CompositionError(
                f"{self.method.name} runs its branches in the rows of one KV cache, which it "
                f"cannot do with {what}. Generate with a dynamic cache."
            )

    def before_generate(self, generation: Generation) -> None:
        # generate() encodes images before the first forward.
        vision = vision_arguments(generation.host.model, generation.given)
        if features := vision.get("mm_encoder_outputs"):  # which beams repeat in place
            vision["mm_encoder_outputs"] = {kind: copy.copy(x) for kind, x in features.items()}
        generation.call.keep(_Vision(vision))

    def before_forward(self, forward: Forward) -> None:
        method, frame, kwargs = self.method, forward.frame, forward.kwargs
        ledger, config = frame.ledger, forward.host.model.config
        notes, branches = ledger.of(_Notes), ledger.get(Branches)
        by_name = kwargs.get("return_dict")
        if not (config.return_dict if by_name is None else by_name):
            raise BadInput(f"{method.name} combines logits by name: leave return_dict=False out.")
        if kwargs.get("labels") is not None:
            raise BadInput(
                f"{method.name} combines logits after the model has made its loss of them. Leave "
                "labels out, and take the loss from the logits."
            )
        behind_prompt = bool(frame.past) and notes.pieces is None
        if behind_prompt:
            check_turn(method, notes.method, branches, frame, kwargs)
        if not method.streams():
            return
        check_cross_attention(method, forward)
        if behind_prompt:
            if branches is not None:
                forward.kwargs = branches.widen(kwargs, frame)
            return
        check_prompt(method, frame)
        if forward.cache is not None:
            self.check_cache(forward.cache)
            _keep_pieces(notes, kwargs, frame.queries)
        known = frame.call.get(_CallBranches)
        if frame.past + frame.queries < ledger.prompt_length or known is not None:
            return
        watched = tuple(method.watched(forward.host.info))
        if watched:
            observer = LastRow(watched, row=ledger.prompt_length - 1)
            forward.host.reach_attention(set(watched) & set(forward.host.info.attention))
            frame.observe([observer])
            notes.seen = observer.seen

    def after_forward(self, forward: Forward, output: Any) -> Any:
        return combine(self.method, forward, output)

    def before_step(self, step: DecodeStep) -> None:
        ledger = step.frame.ledger
        # The length of a static cache may be a tensor, which the step will change.
        past = torch.as_tensor(step.cache.get_seq_length(), device=step.host.device(0))
        step.frame.keep(_Token((past - ledger.prompt_length + 2).reshape(1)))
        branches = ledger.get(Branches)
        if branches is not None:
            step.kwargs = branches.widen(step.kwargs, step.frame)

    def after_step(self, step: DecodeStep, output: Any) -> Any:
        token = step.frame.get(_Token)
        assert token is not None  # before_step() keeps it
        return combine_decoded(self.method, step.frame, output, token.number)


# -- before a forward ------------------------------------------------------------------------------


def _keep_pieces(notes: _Notes, kwargs: Mapping[str, Any], queries: int) -> None:
    """Collect what belongs to each token of a prompt, which may come in chunks."""
    pieces = notes.pieces = notes.pieces or {}
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


def combine(method: ContrastMethod, forward: Forward, output: Any) -> Any:
    """Combine the branches of a forward that has run; after a prompt, run them first.

    Args:
        method: combines.
        forward: with the arguments as `before_forward` left them.
        output: what it returned.

    Returns:
        The output, with float32 logits (R, Q, V) and nothing of the branches.
    """
    frame = forward.frame
    ledger, notes = frame.ledger, frame.ledger.of(_Notes)
    end, length = frame.past + frame.queries, ledger.prompt_length
    if end < length:  # a chunk of the prompt: nothing is sampled from it
        return output
    # The rows that predict: of a prompt the last one, and drafts behind it.
    kept = min(output.logits.shape[1], end - max(length - 1, frame.past))
    token = torch.arange(end - kept, end, device=output.logits.device) - length + 2
    prompt = frame.past == 0 or notes.pieces is not None
    if not (prompt and method.streams()):
        return combine_decoded(method, frame, output, token)
    if bool(ledger.visual()[:, :length].any()):
        branches = _run_branches(method, forward, kept)
        output = _fold(method, frame, output, [output.logits, *branches], token)
    notes.pieces, notes.method = None, method
    return output


def combine_decoded(method: ContrastMethod, frame: Frame, output: Any, token: torch.Tensor) -> Any:
    """Combine the branches of a decode step; `token` (R,) as in `ContrastMethod.contrast`."""
    branches = frame.ledger.get(Branches)
    if not method.streams():
        return _fold(method, frame, output, [output.logits], token)
    if branches is None:  # prompts without an image have none
        return output
    logits = output.logits.chunk(1 + branches.count)
    for name in ("hidden_states", "attentions"):
        if output.get(name) is not None:
            output[name] = tuple(x if x is None else x[: branches.rows] for x in output[name])
    return _fold(method, frame, output, logits, token)


def _fold(
    method: ContrastMethod,
    frame: Frame,
    output: Any,
    logits: Sequence[torch.Tensor],
    token: torch.Tensor,
) -> Any:
    """Put the combination of base and branch logits into an output."""
    kept = len(token)
    base, *branches = (own[:, -kept:].float() for own in logits)
    # A branch that overflowed says nothing; its row then speaks for itself.
    branches = [torch.where(x.isnan().any(-1, keepdim=True), base, x) for x in branches]
    has_image = frame.ledger.visual().any(1).to(base.device)
    combined = method.contrast(base, branches, token.to(base.device))
    combined = torch.where(has_image[:, None, None], combined, base)
    frame.call.contrasted.append(has_image.sum() * kept)
    frame.call.streams = max(frame.call.streams, len(logits))
    output.logits = torch.cat([logits[0][:, :-kept].float(), combined], dim=1)
    return output


def _run_branches(method: ContrastMethod, forward: Forward, kept: int) -> list[torch.Tensor]:
    """Prefill the branches of a prompt that has just run: (R, kept, V) logits of each."""
    host, frame, kwargs = forward.host, forward.frame, forward.kwargs
    ledger, call, cache = frame.ledger, frame.call, forward.cache
    notes, images = ledger.of(_Notes), call.of(CallImages)
    length, rows = ledger.prompt_length, len(ledger.kinds)
    tokens = {name: kwargs[name] for name in PER_TOKEN if kwargs.get(name) is not None}
    tokens |= notes.pieces or {}
    if "position_ids" not in tokens:  # a bare forward: the model made them
        real = ledger.kinds[:, : tokens["input_ids"].shape[1]] != PAD
        positions = frame.get(DecoderPositions)
        known = None if positions is None else positions.ids
        tokens["position_ids"] = made_positions(host.info, real) if known is None else known
    copies = rows // (call.rows or rows)
    vision = call.get(_Vision)
    given = vision.given if vision else {}
    given = given or vision_arguments(host.model, forward.given)
    prompt = Prompt(
        info=host.info,
        ids=tokens["input_ids"][::copies, :length],
        real=(ledger.kinds[::copies, :length] != PAD),
        visual=ledger.visual()[::copies, :length],
        vision={name: value for name, value in given.items() if name != "mm_encoder_outputs"},
        seen={layer: row[::copies] for layer, row in notes.seen.items()},
        placeholders=images.placeholders,
    )
    branches = call.get(_CallBranches)
    if branches is None:  # without a cache every step is a prompt, and the branches hold
        branches = call.keep(_CallBranches(tuple(method.branches(prompt))))
    encoded = given
    if copies == 1 and kwargs.get("mm_encoder_outputs") and not frame.past:
        encoded = {"mm_encoder_outputs": kwargs["mm_encoder_outputs"]}
    following = following_position(tokens["position_ids"], length)
    logits, caches, visible, shifts = [], [], [padded_left(prompt.real, length)], []
    # Without a cache every row has a tail of its own: a copy of each prompt runs at a time.
    turns = [slice(first, None, copies) for first in range(copies if cache is None else 1)]
    for branch in branches.all:
        ran = [
            prefill_branch(host, prompt, branch, encoded, images, cache, tokens, turn, kept)
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
            repeat_rows(one.cache, len(prompt.ids), copies)
        logits.append(one.logits.repeat_interleave(copies, 0))
        caches.append(one.cache)
        visible.append(padded_left(one.visible, length))
        shifts.append(one.shift)
    if cache is not None:
        join_rows(cache, caches, rows)
        as_base = all(torch.equal(seen, visible[0]) for seen in visible[1:])
        ledger.keep(
            Branches(
                count=len(caches),
                visible=torch.cat([seen.repeat_interleave(copies, 0) for seen in visible]),
                following=following.expand(rows, 1),
                shift=torch.cat([shift.repeat_interleave(copies, 0) for shift in shifts]),
                as_base=as_base,
                first=tuple(int(seen.any(0).to(torch.uint8).argmax()) for seen in visible[1:]),
                blind=tuple(not branch.image for branch in branches.all),
            )
        )
    return logits
