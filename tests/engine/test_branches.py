"""Contrastive streams against an oracle that knows nothing of the engine.

Every family, kind of branch and way of generating; tests/contrast_oracle.py is the oracle.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, ClassVar, get_args

import pytest
import torch
from contrast_oracle import Oracle
from matrix import family, logits, prompt
from tiny import FAMILIES, PER_POSITION, build
from tiny_configs import IMAGE
from transformers import DynamicCache, LogitsProcessorList, SuppressTokensLogitsProcessor

import vlmfix
import vlmfix.engine.branches
import vlmfix.engine.contrast
import vlmfix.engine.joined
from vlmfix.base.attention import AttentionMethod
from vlmfix.base.contrast import Branch, ContrastMethod, Prompt
from vlmfix.families import describe_model
from vlmfix.methods.avc import AttentionalVisionCalibration, Scheme
from vlmfix.methods.m3id import MutualInformationDecoding
from vlmfix.methods.pai import PayAttentionToImage
from vlmfix.methods.pai_guidance import ImageGuidance
from vlmfix.methods.rbd import ReBalancingContrastiveDecoding
from vlmfix.methods.vcd import VisualContrastiveDecoding

# -- methods ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Strong(ContrastMethod):
    """Contrasts with weights that grow with the token, so that counting wrongly is seen."""

    weights: tuple[float, ...] = (1.5,)

    def streams(self) -> int:
        return len(self.weights)

    def neutral(self) -> bool:
        return False

    def contrast(
        self, base: torch.Tensor, branches: Sequence[torch.Tensor], token: torch.Tensor
    ) -> torch.Tensor:
        z = base
        for weight, branch in zip(self.weights, branches, strict=True):
            z = z + weight * (1 + 0.2 * token[:, None]) * (base - branch)
        return z


@dataclass(frozen=True)
class OtherPixels(Strong):
    name: ClassVar[str] = "other pixels"

    def branches(self, prompt: Prompt) -> Sequence[Branch]:
        return [Branch(vision=_negative(prompt))]


@dataclass(frozen=True)
class NoImage(Strong):
    name: ClassVar[str] = "no image"

    def branches(self, prompt: Prompt) -> Sequence[Branch]:
        return [Branch(image=False)]


@dataclass(frozen=True)
class Overwritten(Strong):
    """Every other visual token becomes a vector of its own."""

    name: ClassVar[str] = "overwritten"

    def branches(self, prompt: Prompt) -> Sequence[Branch]:
        place = prompt.visual.cumsum(1)
        fill = (place[..., None] * torch.arange(1, 1 + prompt.info.hidden_size)).sin()
        return [Branch(filled=_every_other(prompt), fill=fill)]


@dataclass(frozen=True)
class Hidden(Strong):
    """Every other visual token, and the first token behind the image, are seen by no one."""

    name: ClassVar[str] = "hidden"

    def branches(self, prompt: Prompt) -> Sequence[Branch]:
        behind = prompt.visual.roll(1, 1) & ~prompt.visual
        return [Branch(hidden=_every_other(prompt) | behind)]


@dataclass(frozen=True)
class TwoBranches(Strong):
    """Streams of different lengths, and all that a branch can be at once in one of them."""

    weights: tuple[float, ...] = (1.0, 1.0)

    name: ClassVar[str] = "two branches"

    def branches(self, prompt: Prompt) -> Sequence[Branch]:
        chosen = _every_other(prompt)
        changed = Branch(
            vision=_negative(prompt), hidden=chosen, filled=prompt.visual & ~chosen, fill=0.5
        )
        return [Branch(image=False), changed]


def _negative(prompt: Prompt) -> dict[str, Any]:
    return {**prompt.vision, "pixel_values": -2 * prompt.vision["pixel_values"]}


def _every_other(prompt: Prompt) -> torch.Tensor:
    return prompt.visual & (prompt.visual.cumsum(1) % 2 == 1)


STRONG = (OtherPixels(), NoImage(), Overwritten(), Hidden(), TwoBranches())
PUBLISHED = (
    MutualInformationDecoding(decay=0.3),
    ImageGuidance(gamma=3.0),
    VisualContrastiveDecoding(alpha=2.0, noise_step=999, seed=0),
    ReBalancingContrastiveDecoding(a_t=2.0, a_v=2.0, noise_step=999, seed=0),
    *(
        AttentionalVisionCalibration(alpha=2.5, deviations=0.3, scheme=scheme, seed=1)
        for scheme in get_args(Scheme)
    ),
)

# -- ways of generating ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Mode:
    """How tokens are chosen, which the oracle follows, and how the forwards are made."""

    choice: dict[str, Any] = field(default_factory=dict)
    forwards: dict[str, Any] = field(default_factory=dict)
    rows: tuple[int, ...] = (0, 1, 2)


_BEAMS = {"num_beams": 3}
_SAMPLING = {"do_sample": True, "temperature": 0.9}
_STATIC = {"cache_implementation": "static", "disable_compile": True}
_CHUNKS = {"prefill_chunk_size": 7}
_LOOKUP = {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}

MODES = {
    "greedy": Mode(),
    "sampling": Mode(_SAMPLING),
    "sampling twice": Mode({**_SAMPLING, "num_return_sequences": 2}),
    "beams": Mode(_BEAMS),
    "beams twice": Mode({**_BEAMS, "num_return_sequences": 2}),
    "static": Mode({}, _STATIC),
    "static beams": Mode(_BEAMS, _STATIC),
    "no cache": Mode({}, {"use_cache": False}),
    "no cache beams": Mode(_BEAMS, {"use_cache": False}),
    "lookup": Mode({"max_new_tokens": 12}, _LOOKUP, (2,)),
    "chunks": Mode({}, _CHUNKS),
    "chunks beams": Mode(_BEAMS, _CHUNKS),
    "early ends": Mode({"eos_token_id": list(range(2, 50))}),
    "early ends, beams": Mode({"eos_token_id": list(range(2, 20)), **_BEAMS}),
}

CELLS = [(name, method, mode) for name in FAMILIES for method in STRONG for mode in MODES]
CELLS += [(name, method, "sampling") for name in FAMILIES for method in PUBLISHED]
CELLS += [(name, method, "beams") for name in ("llava", "qwen2_5_vl") for method in PUBLISHED]


_NOTHING = torch.empty(0, dtype=torch.long)


def _inputs(name: str) -> dict[str, Any]:
    """Three prompts of different lengths, padded on the left."""
    inputs = prompt(family(name), seed=3)
    # The last row ends with a token that came before, so that prompt lookup starts with drafts.
    inputs["input_ids"][2, -1] = inputs["input_ids"][2, -3]
    assert (inputs["attention_mask"] == 0).any()
    return inputs


@cache
def _oracle(name: str, method: ContrastMethod, edit: AttentionMethod | None = None) -> Oracle:
    tiny, inputs = family(name), _inputs(name)
    prepared = method.prepared(describe_model(tiny.model), tiny.model)
    assert isinstance(prepared, ContrastMethod)
    return Oracle(tiny, [tiny.single(inputs, row) for row in range(3)], prepared, edit)


def _generate(model: Any, inputs: dict[str, Any], **kwargs: Any) -> Any:
    torch.manual_seed(5)  # sampling draws from the global generator
    arguments = {
        "max_new_tokens": 5,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": 2,
        "return_dict_in_generate": True,
        "output_scores": True,
        **kwargs,
    }
    with warnings.catch_warnings():
        # transformers warns of its own argument names when a mode is asked for by keyword.
        warnings.simplefilter("ignore", UserWarning)
        return model.generate(**inputs, **arguments)


def _never(mode: Mode) -> list[int]:
    """Ids that no answer holds: special ones, and the end unless the mode names its own."""
    return list(range(90, 100)) + ([] if "eos_token_id" in mode.choice else [2])


_known: dict[Any, Any] = {}


def _wanted(name: str, oracle: Oracle, inputs: dict[str, Any], mode: Mode) -> Any:
    """What the oracle generates; its scores must not be those of the plain model."""
    key = (oracle, str(mode.choice), mode.rows)
    if key not in _known:
        # The contrast comes first, as a forward's, and what forbids tokens after it.
        suppress = SuppressTokensLogitsProcessor(_never(mode))
        processors = LogitsProcessorList([oracle.processor(*mode.rows), suppress])
        model = family(name).model
        plain = _generate(model, inputs, **mode.choice, suppress_tokens=_never(mode))
        _known[key] = wanted = _generate(
            model, inputs, **mode.choice, use_cache=False, logits_processor=processors
        )
        for one, other in zip(plain.scores, wanted.scores, strict=False):
            one, other = one.log_softmax(-1), other.log_softmax(-1)
            likely = other > -1e3
            assert (one[likely] - other[likely]).abs().max() > 0.1, "the cell is empty"
    return _known[key]


def _check(name: str, oracle: Oracle, mode: Mode, stack: Any, model: Any = None) -> None:
    """Generate with the stack, on this model or the family's own, and compare."""
    tiny, inputs = family(name), _inputs(name)
    if len(mode.rows) == 1:
        inputs = tiny.single(inputs, mode.rows[0])
    wanted = _wanted(name, oracle, inputs, mode)
    with vlmfix.wrapped(model or tiny.model, stack) as wrapped:
        got = _generate(
            wrapped, inputs, **mode.choice, **mode.forwards, suppress_tokens=_never(mode)
        )
    _compare(got, wanted)


def _compare(got: Any, wanted: Any) -> None:
    assert got.sequences.tolist() == wanted.sequences.tolist()
    assert len(got.scores) == len(wanted.scores)
    for one, other in zip(got.scores, wanted.scores, strict=True):
        one, other = one.log_softmax(-1), other.log_softmax(-1)
        # Far below are tokens that a method rules out, and forbidden ones at minus infinity.
        likely = other > -1e3
        assert torch.equal(one > -1e3, likely)
        assert torch.allclose(one[likely], other[likely], rtol=0, atol=1e-4)


@pytest.mark.rotated
@pytest.mark.parametrize(
    ("name", "method", "mode"),
    CELLS,
    ids=[f"{name}-{method.spec()}-{mode}" for name, method, mode in CELLS],
)
def test_equals_the_oracle(name: str, method: ContrastMethod, mode: str) -> None:
    if "prefill_chunk_size" in MODES[mode].forwards and name in ("gemma3", "paligemma"):
        pytest.skip("plain transformers gives other logits: chunks cut its bidirectional image")
    chosen = MODES[mode]
    if mode == "lookup" and name == "paligemma":
        # Plain transformers lets its prompt see the drafts of the first forward: a row without.
        chosen = replace(chosen, rows=(1,))
    _check(name, _oracle(name, method), chosen, method)


@pytest.mark.rotated
@pytest.mark.parametrize("mode", ["greedy", "beams", "static", "static beams", "no cache"])
@pytest.mark.parametrize("method", [NoImage(), Hidden(), TwoBranches()], ids=lambda m: m.name)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_a_decoder_with_eager_attention(name: str, method: ContrastMethod, mode: str) -> None:
    """Its masks are additive."""
    model = build(name).model
    model.set_attn_implementation({"text_config": "eager"})
    _check(name, _oracle(name, method), MODES[mode], method, model)


@pytest.mark.rotated
@pytest.mark.parametrize(
    "mode", ["greedy", "beams", "static", "no cache", "lookup", "chunks beams"]
)
@pytest.mark.parametrize("method", [OtherPixels(), NoImage(), TwoBranches()], ids=lambda m: m.name)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_attention_is_edited_where_the_prompt_is_as_it_is(
    name: str, method: ContrastMethod, mode: str
) -> None:
    edit = PayAttentionToImage(alpha=0.8, start_layer=0)
    oracle = _oracle(name, method, edit)
    answer = torch.tensor([7])
    assert not torch.allclose(
        oracle.logits(0, answer), _oracle(name, method).logits(0, answer), atol=0.1
    )
    _check(name, oracle, MODES[mode], [edit, method])


@pytest.mark.parametrize("method", STRONG, ids=lambda m: m.name)
@pytest.mark.parametrize("name", FAMILIES)
def test_one_forward_outside_of_generate(name: str, method: ContrastMethod) -> None:
    tiny, oracle = family(name), _oracle(name, method)
    wanted = torch.stack([oracle.logits(row, _NOTHING) for row in range(3)])
    with vlmfix.wrapped(tiny.model, method):
        got = logits(tiny.model, _inputs(name))
    assert torch.allclose(got, wanted, rtol=0, atol=2e-4)


@pytest.mark.rotated
@pytest.mark.parametrize("method", [*STRONG, PUBLISHED[0]], ids=lambda m: m.name)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3"])
def test_a_prompt_without_an_image_in_the_batch(name: str, method: ContrastMethod) -> None:
    tiny, inputs = family(name), _inputs(name)
    image = torch.tensor([IMAGE, *tiny.layout.before, *tiny.layout.after])
    inputs["input_ids"][1][torch.isin(inputs["input_ids"][1], image)] = 33
    for kind in ("token_type_ids", "mm_token_type_ids"):
        if kind in inputs:
            inputs[kind][1] = 0
    rows = [tiny.single(inputs, row) for row in range(3)]
    for part, value in inputs.items():
        if part not in PER_POSITION:
            inputs[part] = value.unflatten(0, (3, -1))[[0, 2]].flatten(0, 1)
            del rows[1][part]
    rows[1].pop("mm_token_type_ids", None)  # refused without an image
    oracle = Oracle(tiny, rows, method)
    for mode in (Mode(), Mode({}, _STATIC), Mode({}, {"use_cache": False}), Mode(_BEAMS)):
        wanted = _wanted(name, oracle, inputs, mode)
        with vlmfix.wrapped(tiny.model, method):
            never = _never(mode)
            got = _generate(
                tiny.model, inputs, **mode.choice, **mode.forwards, suppress_tokens=never
            )
            beams = mode.choice.get("num_beams", 1)
            assert vlmfix.last_call(tiny.model).contrasted_rows == 2 * beams * 5
        _compare(got, wanted)


@pytest.mark.rotated
@pytest.mark.parametrize("method", STRONG, ids=lambda m: m.name)
@pytest.mark.parametrize("name", FAMILIES)
def test_forwards_behind_each_other_outside_of_generate(name: str, method: ContrastMethod) -> None:
    tiny, oracle, inputs = family(name), _oracle(name, method), _inputs(name)
    cache = DynamicCache(config=tiny.model.config.get_text_config())
    answer, mask = torch.tensor([11, 12, 13]), inputs["attention_mask"]
    wanted = [
        torch.stack([oracle.logits(row, answer[:length]) for row in range(3)])
        for length in range(4)
    ]
    with vlmfix.wrapped(tiny.model, method):
        got = [logits(tiny.model, inputs, past_key_values=cache)]
        for token in answer:
            ids = token.expand(3, 1)
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
            step = {"input_ids": ids, "attention_mask": mask}
            got.append(logits(tiny.model, step, past_key_values=cache))
    for one, other in zip(got, wanted, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=2e-4)


@pytest.mark.rotated
@pytest.mark.parametrize("method", STRONG, ids=lambda m: m.name)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_a_later_turn_on_the_same_cache(name: str, method: ContrastMethod) -> None:
    """The branches go on from their own first turn, and tokens are counted anew."""
    tiny = family(name)
    first = tiny.single(_inputs(name), 2)
    never = {"suppress_tokens": _never(Mode())}
    question = torch.tensor([[11, 12, 13]])
    with vlmfix.wrapped(tiny.model, method):
        turn = _generate(tiny.model, first, **never)
        ids = torch.cat([turn.sequences, question], 1)
        later = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        got = _generate(tiny.model, later, past_key_values=turn.past_key_values, **never)
    earlier = ids[0, first["input_ids"].shape[1] :]
    oracle = Oracle(tiny, [first], method, earlier=earlier)
    answer = _NOTHING
    for step in range(5):
        wanted = oracle.logits(0, answer)
        wanted[_never(Mode())] = -torch.inf
        assert torch.allclose(got.scores[step][0], wanted, rtol=0, atol=2e-4)
        answer = torch.cat([answer, wanted.argmax()[None]])
    assert got.sequences[0, ids.shape[1] :].tolist() == answer.tolist()


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_lookup_takes_drafts(name: str) -> None:
    """Or its cells would be greedy ones."""
    tiny, method, mode = family(name), NoImage(), MODES["lookup"]
    queries = []
    with vlmfix.wrapped(tiny.model, method):
        handle = tiny.model.register_forward_pre_hook(
            lambda module, args, kwargs: queries.append(kwargs["input_ids"].shape[1]),
            with_kwargs=True,
        )
        inputs = tiny.single(_inputs(name), *mode.rows)
        _generate(tiny.model, inputs, **mode.choice, **mode.forwards)
        handle.remove()
    assert queries[0] > inputs["input_ids"].shape[1] and max(queries[1:]) > 1


# -- the oracle sees what could go wrong -----------------------------------------------------------


def _only_the_base_is_reordered(monkeypatch: pytest.MonkeyPatch) -> None:
    make = vlmfix.engine.joined._with_branches

    def with_branches(kind: type[Any]) -> type[Any]:
        class BaseAlone(make(kind)):
            def reorder_cache(self, beam_idx: torch.Tensor) -> None:
                groups, rows = self.row_groups
                rest = torch.arange(rows, groups * rows)
                super(make(kind), self).reorder_cache(torch.cat([beam_idx, rest]))

        return BaseAlone

    monkeypatch.setattr(vlmfix.engine.joined, "_with_branches", with_branches)


def _positions_of_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    _spoil(monkeypatch, shift=lambda branches: torch.zeros_like(branches.shift))


def _mask_of_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    def base(branches: Any) -> torch.Tensor:
        visible: torch.Tensor = branches.visible[: branches.rows]
        return visible.repeat(1 + branches.count, 1)

    _spoil(monkeypatch, visible=base, as_base=lambda branches: True)


def _spoil(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Change fields of the branches at every step."""
    widen = vlmfix.engine.branches.Branches.widen

    def spoiled(branches: Any, *args: Any, **kwargs: Any) -> Any:
        made = {name: change(branches) for name, change in changes.items()}
        return widen(replace(branches, **made), *args, **kwargs)

    monkeypatch.setattr(vlmfix.engine.branches.Branches, "widen", spoiled)


def _tokens_from_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    fold = vlmfix.engine.contrast._fold

    def spoiled(method: Any, frame: Any, output: Any, logits: Any, token: torch.Tensor) -> Any:
        return fold(method, frame, output, logits, token - 1)

    monkeypatch.setattr(vlmfix.engine.contrast, "_fold", spoiled)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize(
    ("spoil", "method", "mode"),
    [
        (_only_the_base_is_reordered, NoImage(), "beams"),
        (_only_the_base_is_reordered, TwoBranches(), "static beams"),
        (_positions_of_the_base, NoImage(), "greedy"),
        (_positions_of_the_base, TwoBranches(), "static"),
        (_mask_of_the_base, NoImage(), "greedy"),
        (_mask_of_the_base, Hidden(), "static beams"),
        (_tokens_from_zero, OtherPixels(), "sampling"),
    ],
)
def test_the_oracle_sees_a_broken_engine(
    name: str, spoil: Any, method: ContrastMethod, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _check(name, _oracle(name, method), MODES[mode], method)
    spoil(monkeypatch)
    with pytest.raises(AssertionError):
        _check(name, _oracle(name, method), MODES[mode], method)
