"""Short greedy answers to a batch of chats, and the attention of their tokens to the images.

Prompts with the same beginning, up to the end of their last image, share it: it runs once, and each
prompt continues from a copy of its keys and values. After the answers, the cache is cut back to the
prompts, and the rows that predicted the answers run once more, all in one forward, under an
observer: with any attention implementation, and without a full attention matrix.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad
from transformers.cache_utils import DynamicCache, DynamicLayer

from vlmfix.analysis.maps import (
    AttentionMap,
    RowKeeper,
    attention_map,
    maps_of,
    placed_images,
    traceable_tower,
)
from vlmfix.chat import chat_inputs, chat_text, end_tokens, split_chat
from vlmfix.engine.call import Call
from vlmfix.engine.ledger import Ledger
from vlmfix.engine.observe import internal_pass
from vlmfix.engine.session import SESSION, Session
from vlmfix.engine.stack import PLAIN
from vlmfix.errors import BadInput
from vlmfix.families import ModelInfo, last_logits
from vlmfix.families.kinds import IMAGE
from vlmfix.families.prompt import prompt_kinds
from vlmfix.families.surgeon import TOKEN_TYPES, compact, module_state, real_tokens

__all__ = ["Look", "look", "look_from_start", "look_whole"]


@dataclass(frozen=True, eq=False)
class Look:
    """A greedy answer, and the attention of the rows that predicted its tokens.

    Attributes:
        tokens: the T ids of the answer, with the one that ended it if one did.
        maps: for each image as the vision tower gets it, weights (L, 1, T, n): the mean over heads
            of the rows that predicted the tokens, the first being the prompt's last.
        shared: whether the beginning of the prompt ran once for all prompts that share it.
    """

    tokens: list[int]
    maps: list[AttentionMap]
    shared: bool


def look(
    model: Any,
    processor: Any,
    chats: Sequence[Any],
    layers: Sequence[int],
    max_new_tokens: int,
    complete: Sequence[int] | None = None,
) -> list[Look]:
    """Let the plain model answer chats about images greedily, and read its attention to them.

    Prompts run whole where sharing their beginnings would not be exact: if prompt tokens see later
    ones (PaliGemma), or if a layer does not keep all keys (Gemma 3, whose sliding windows also
    count padding).

    Args:
        model: a wrapped model; its methods do not run.
        processor: its processor.
        chats: chats with an image each; equal ones are answered once.
        layers: the L decoder layers to read.
        max_new_tokens: longest answer, at least 1.
        complete: the chats whose answers are needed whole; the others may stop when these are
            written. None: all.

    Returns:
        A `Look` per chat.

    Raises:
        BadInput: messages or an image that cannot be used; a prompt that ends with its image.
        UnsupportedModel: a family whose visual tokens cannot be traced to places.
    """
    info: ModelInfo = model.__dict__[SESSION].host.info
    keys = [_identity(processor, chat) for chat in chats]
    asked = dict(zip(keys, chats, strict=True))
    inputs = chat_inputs(model, processor, list(asked.values()))
    prompts = _prompts(info, inputs)
    keeps_all = all(type(layer) is DynamicLayer for layer in _new_cache(model).layers)
    if info.sees_whole_prompt or not keeps_all:
        looks = look_whole(model, inputs, layers, max_new_tokens)
    else:
        starts = [
            (images, tuple(ids)) for (images, _), (ids, _) in zip(asked, prompts, strict=True)
        ]
        first: dict[Any, Any] = {}
        for start, chat in zip(starts, asked.values(), strict=True):
            first.setdefault(start, chat)
        if len(first) < len(asked):
            inputs = chat_inputs(model, processor, list(first.values()))
        number = {start: at for at, start in enumerate(first)}
        matters = {keys[at] for at in complete} if complete is not None else asked.keys()
        looks = look_from_start(
            model,
            inputs,
            [number[start] for start in starts],
            [ending for _, ending in prompts],
            layers,
            max_new_tokens,
            [at for at, key in enumerate(asked) if key in matters],
        )
    found = dict(zip(asked, looks, strict=True))
    return [found[key] for key in keys]


def look_whole(
    model: Any, inputs: Mapping[str, Any], layers: Sequence[int], max_new_tokens: int
) -> list[Look]:
    """Run `look` on arguments of the model's generate(), every prompt as a whole."""
    session: Session = model.__dict__[SESSION]
    with session.use(PLAIN), module_state(model), torch.no_grad():
        generated = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            suppress_tokens=_never(session.host.info),
        )
        maps = attention_map(model, inputs, rows="answer", layers=layers, generated=generated)
    answers = generated[:, inputs["input_ids"].shape[1] :].tolist()
    return [
        Look(answer[: len(own[0].rows)], own, shared=False)
        for answer, own in zip(answers, maps, strict=True)
    ]


def look_from_start(
    model: Any,
    inputs: Mapping[str, Any],
    owner: Sequence[int],
    endings: Sequence[Sequence[int]],
    layers: Sequence[int],
    max_new_tokens: int,
    complete: Sequence[int] | None = None,
) -> list[Look]:
    """Run `look` on prompts of which several may share a beginning.

    Args:
        model: a wrapped model; its methods do not run.
        inputs: arguments of its generate() for the U prompts whose beginnings are shared. Tokens
            after their last visual token are not read.
        owner: for each of the N prompts to answer, the one in `inputs` with the same beginning.
        endings: for each of them, its ids after the last visual token, at least one.
        layers: the L decoder layers to read.
        max_new_tokens: longest answer, at least 1.
        complete: as for `look`, of the endings.

    Returns:
        A `Look` per ending.
    """
    session: Session = model.__dict__[SESSION]
    info = session.host.info
    with session.use(PLAIN), module_state(model), torch.no_grad():
        cache = _new_cache(model)
        ids, mask, shift = _run_start(model, info, inputs, cache)
        kinds = prompt_kinds(info, ids, 0, {**inputs, "attention_mask": mask})
        ledger = Ledger(len(owner), ids.shape[1], ids.device)
        ledger.write(0, kinds[owner], ids.shape[1])
        visual = kinds[owner] == IMAGE
        cache.batch_select_indices(torch.tensor(owner, device=ids.device))
        mask, shift = mask[owner], shift[owner]
        # At least two columns: an observer sees the rows of a forward after its first one.
        rows, seen = (pad(x, (1, 0)) for x in _padded(endings, ids.device, left=True))
        mask = torch.cat([mask, seen], dim=1)
        wanted = range(len(owner)) if complete is None else complete
        answers = _write(model, info, cache, rows, mask, shift, max_new_tokens, wanted)
        last = mask.shape[1] - 1  # of every prompt
        cache.crop(last - 1 - cache.get_seq_length())
        added, real = _padded([answer[:-1] for answer in answers], ids.device, left=False)
        rows, mask = torch.cat([rows[:, -2:], added], dim=1), torch.cat([mask, real], dim=1)
        keeper = RowKeeper(
            tuple(layers),
            wanted=tuple(tuple(range(last, last + len(answer))) for answer in answers),
            visual=pad(visual, (0, mask.shape[1] - visual.shape[1])).cpu(),
        )
        # The prompts ran plain and left no ledger, which a forward on their cache needs.
        session.caches.remember(cache, ledger)
        call = Call(prompt_length=ids.shape[1], rows=len(owner))
        inputs_behind = _behind(model, cache, rows, mask, shift)
        internal_pass(session.host, inputs_behind, call=call, observers=[keeper])
    images = placed_images(traceable_tower(model, info), inputs, (kinds == IMAGE).sum(1).tolist())
    return [
        Look(answer, list(maps_of(keeper, at, images[owner[at]], tuple(layers), None)), shared=True)
        for at, answer in enumerate(answers)
    ]


# -- prompts ---------------------------------------------------------------------------------------


def _identity(processor: Any, chat: Any) -> tuple[tuple[Any, ...], str]:
    """The identity of a chat: the pixels of its images, and its text."""
    images, plain = split_chat(chat)
    pixels = tuple((image.size, hashlib.sha256(image.tobytes()).digest()) for image in images)
    return pixels, chat_text(processor, plain)


def _prompts(info: ModelInfo, inputs: Mapping[str, Any]) -> list[tuple[list[int], list[int]]]:
    """The ids of every prompt in two parts: up to its last visual token, and after it."""
    ids = inputs["input_ids"]
    real = real_tokens(ids, inputs.get("attention_mask"))
    found = []
    for row, own in zip(ids, real, strict=True):
        tokens = row[own].tolist()
        cut = 1 + max(at for at, token in enumerate(tokens) if token in info.image_token_ids)
        if cut == len(tokens):
            raise BadInput(
                "a prompt ends with its image, so no text after it can attend to it. Put the "
                "question after the image, or use a chat template that opens the answer."
            )
        found.append((tokens[:cut], tokens[cut:]))
    return found


def _padded(
    rows: Sequence[Sequence[int]], device: torch.device, left: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ids as one tensor, and its mask: two (N, width) int64."""
    width = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
    for at, row in enumerate(rows):
        where = slice(width - len(row), width) if left else slice(0, len(row))
        ids[at, where] = torch.tensor(row, dtype=torch.long)
        mask[at, where] = 1
    return ids.to(device), mask.to(device)


def _never(info: ModelInfo) -> list[int]:
    """Tokens that no answer may hold: a placeholder would require one more image."""
    return [*info.image_token_ids, *info.video_token_ids]


# -- forwards --------------------------------------------------------------------------------------


def _new_cache(model: Any) -> DynamicCache:
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def _run_start(
    model: Any, info: ModelInfo, inputs: Mapping[str, Any], cache: DynamicCache
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run prompts up to their last visual token, on the images of `inputs`.

    Returns:
        ids and mask (U, P), padded on the left, and (U, 1) the difference between the position of
        a later token and the number of tokens before it (M-RoPE counts an image by its sides).
    """
    ids = inputs["input_ids"]
    visual = torch.isin(ids, ids.new_tensor(info.image_token_ids))
    keep = real_tokens(ids, inputs.get("attention_mask")) & (visual.flip(1).cumsum(1).flip(1) > 0)
    tokens = {
        name: (inputs[name], 0)
        for name in ("input_ids", *TOKEN_TYPES)
        if inputs.get(name) is not None
    }
    kept, mask = compact(keep, tokens)
    arguments = {**inputs, **kept, "attention_mask": mask, "past_key_values": cache}
    # M-RoPE makes its own positions, and records their difference from counting.
    makers = [module for module in model.modules() if "rope_deltas" in module.__dict__]
    for module in makers:
        module.rope_deltas = None
    if not makers:
        arguments["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    model(**arguments, use_cache=True, return_dict=True, **last_logits(model, 1))
    shift = torch.zeros(len(ids), 1, dtype=torch.long, device=ids.device)
    for module in makers:
        if module.rope_deltas is None:
            raise BadInput(
                "the inputs do not tell the positions of text after an image: they lack the image "
                "grids or mm_token_type_ids, which this model's own processor returns."
            )
        shift = module.rope_deltas.to(shift)
    return kept["input_ids"], mask, shift


def _behind(
    model: Any, cache: DynamicCache, ids: torch.Tensor, mask: torch.Tensor, shift: torch.Tensor
) -> dict[str, Any]:
    """Arguments of a forward on the ids (N, Q) that follow those in the cache."""
    positions = (mask.cumsum(1) - 1 + shift)[:, -ids.shape[1] :].clamp(min=0)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": positions,
        "past_key_values": cache,
        "use_cache": True,
        "return_dict": True,
        **last_logits(model, 1),
    }


def _write(
    model: Any,
    info: ModelInfo,
    cache: DynamicCache,
    ids: torch.Tensor,
    mask: torch.Tensor,
    shift: torch.Tensor,
    max_new_tokens: int,
    complete: Sequence[int],
) -> list[list[int]]:
    """Answer greedily, without the penalties of a generation configuration."""
    ends = end_tokens(model, {})
    never = ids.new_tensor(_never(info))
    answers: list[list[int]] = [[] for _ in ids]
    for _ in range(max_new_tokens):
        logits = model(**_behind(model, cache, ids, mask, shift)).logits[:, -1]
        ids = logits.index_fill(1, never, -torch.inf).argmax(-1, keepdim=True)
        for answer, token in zip(answers, ids[:, 0].tolist(), strict=True):
            if not answer or answer[-1] not in ends:
                answer.append(token)
        if all(answers[at][-1] in ends for at in complete):
            break
        mask = pad(mask, (0, 1), value=1)
    return answers
