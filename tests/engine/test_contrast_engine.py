"""The engine of contrastive branches at its edges, and stacked with methods that edit attention."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar

import pytest
import torch
from contrast_oracle import Oracle
from matrix import ROWS, family, logits, prompt
from tiny import PER_POSITION, TinyFamily, build
from tiny_configs import IMAGE
from transformers import (
    CompileConfig,
    DynamicCache,
    LogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StaticCache,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import Cache, Fp8QuantizedLayer
from transformers.generation.streamers import BaseStreamer

import vlmfix
from vlmfix.analysis.teacher_forcing import answer_greedily
from vlmfix.base.contrast import Branch, ContrastMethod, Prompt
from vlmfix.errors import BadInput, CompositionError, StateError
from vlmfix.families import ModelInfo, describe_model
from vlmfix.families.surgeon import module_state

STRONG: dict[str, Any] = {row.name: row.strong for row in ROWS}
CONTRASTS = ("avc", "vcd", "m3id")
EDITS = ("pai", "var", "vhr", "gift", "imba")
PAIRS = [(contrast, edit) for contrast in CONTRASTS for edit in EDITS] + [("rbd", "var")]

STATIC = {"cache_implementation": "static", "disable_compile": True}
LOOKUP = {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}
MODES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "greedy": ({}, {}),
    "beams": ({"num_beams": 3}, {}),
    "static": ({}, STATIC),
    "static beams": ({"num_beams": 3}, STATIC),
    "no cache": ({}, {"use_cache": False}),
    "lookup": ({}, LOOKUP),
}
"""How tokens are chosen, and how the forwards are made."""

NEVER = [2, *range(90, 100)]
"""The end and the special ids, which no answer holds unless a test says so."""

NEW = 6


several_ways = pytest.mark.parametrize(
    "choice", [{}, {"num_beams": 3}, STATIC], ids=["greedy", "beams", "static"]
)


def _inputs(name: str) -> dict[str, Any]:
    """Three prompts of different lengths, padded on the left."""
    inputs = prompt(family(name))
    assert (inputs["attention_mask"] == 0).any()
    return inputs


def _generate(model: Any, inputs: dict[str, Any], **kwargs: Any) -> Any:
    arguments = {
        "max_new_tokens": NEW,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": 2,
        "suppress_tokens": NEVER,
        "return_dict_in_generate": True,
        "output_logits": True,
        "output_scores": True,
        **kwargs,
    }
    with warnings.catch_warnings():
        # transformers warns of its own argument names when a mode is asked for by keyword.
        warnings.simplefilter("ignore", UserWarning)
        return model.generate(**inputs, **arguments)


def _close(one: torch.Tensor, other: torch.Tensor, atol: float = 1e-4) -> None:
    """Logits up to a constant per row; tokens far below have no chance, whatever their number."""
    one, other = one.log_softmax(-1), other.log_softmax(-1)
    likely = other > -1e3
    assert torch.equal(one > -1e3, likely)
    assert torch.allclose(one[likely], other[likely], rtol=0, atol=atol)


def _raw(output: Any) -> torch.Tensor:
    """(steps, rows, V) logits as the forwards gave them."""
    return torch.stack(output.logits)


def _later(turn: Any, tokens: Sequence[int] = (11, 12, 13)) -> dict[str, Any]:
    """Arguments of a second turn on the cache of a first one without padding."""
    new = torch.tensor([tokens]).expand(len(turn.sequences), -1)
    ids = torch.cat([turn.sequences, new], 1)
    mask = torch.ones_like(ids)
    return {"input_ids": ids, "attention_mask": mask, "past_key_values": turn.past_key_values}


def _new_cache(model: Any) -> DynamicCache:
    return DynamicCache(config=model.config.get_text_config())


# -- stacked with methods that edit attention ------------------------------------------------------


class EditedOracle(Oracle):
    """Branches by the plain model, of prompts whose attention one method edits.

    What a branch is made of is read by `attention_map`, which runs attention methods alone.
    """

    def _branches(self, row: dict[str, Any]) -> Sequence[Branch]:
        if self.edit is None or not self.method.watched(describe_model(self.tiny.model)):
            return super()._branches(row)
        ids = row["input_ids"]
        visual = ids == IMAGE
        with vlmfix.wrapped(self.tiny.model, self.edit):
            ((found,),) = vlmfix.attention_map(self.tiny.model, row)
        seen = {layer: torch.zeros(ids.shape) for layer in found.layers}
        for layer, weights in zip(found.layers, found.weights, strict=True):
            seen[layer][visual] = weights[0, 0]
        vision = {name: value for name, value in row.items() if name not in PER_POSITION}
        info = describe_model(self.tiny.model)
        real = torch.ones_like(visual)
        return self.method.branches(Prompt(info, ids, real, visual, vision, seen))


class ByHand(LogitsProcessor):  # type: ignore[misc]  # transformers' is untyped
    """Contrasts what generate() found with what the plain model makes of the branches."""

    def __init__(self, oracle: Oracle, rows: Sequence[int], width: int) -> None:
        self.oracle, self.rows, self.width = oracle, rows, width
        self.known: dict[tuple[int, ...], list[torch.Tensor]] = {}

    def __call__(self, ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        copies = len(ids) // len(self.rows)  # beams of a prompt lie side by side
        combined = []
        for index, (tokens, base) in enumerate(zip(ids, scores, strict=True)):
            row, behind = self.rows[index // copies], tokens[self.width :]
            branches = self._branches(row, behind)
            token = torch.tensor([len(behind) + 1])
            combined.append(self.oracle.method.contrast(base[None, None], branches, token)[0, 0])
        result = torch.stack(combined).log_softmax(-1)  # a beam search adds up log-probabilities
        result[:, NEVER] = -torch.inf
        return result

    def _branches(self, row: int, behind: torch.Tensor) -> list[torch.Tensor]:
        key = (row, *behind.tolist())
        if key not in self.known:
            oracle = self.oracle
            with vlmfix.using(oracle.tiny.model, None):
                self.known[key] = [
                    oracle._run(oracle.rows[row], branch, behind)[None, None]
                    for branch in oracle.branches[row]
                ]
        return self.known[key]


@cache
def _by_hand(name: str, contrast: str, edit: str, rows: tuple[int, ...]) -> ByHand:
    tiny, inputs = family(name), _inputs(name)
    info = describe_model(tiny.model)
    method = STRONG[contrast].prepared(info, tiny.model)
    singles = [tiny.single(inputs, row) for row in range(3)]
    widths = [singles[row]["input_ids"].shape[1] for row in rows]
    return ByHand(EditedOracle(tiny, singles, method, STRONG[edit]), rows, max(widths))


_known: dict[Any, Any] = {}


def _wanted(name: str, contrast: str, edit: str, mode: str) -> Any:
    """What the model generates under the edit alone, without a cache, with the contrast by hand."""
    choice, forwards = MODES[mode]
    rows = (0,) if forwards is LOOKUP else (0, 1, 2)
    key = (name, contrast, edit, str(choice), rows)
    if key not in _known:
        processor = _by_hand(name, contrast, edit, rows)
        with vlmfix.wrapped(family(name).model, STRONG[edit]) as model:
            _known[key] = _generate(
                model, _prompts(name, mode), **choice, use_cache=False,
                logits_processor=[processor], suppress_tokens=None, eos_token_id=None,
            )  # fmt: skip
    return _known[key]


def _prompts(name: str, mode: str) -> dict[str, Any]:
    """Prompt lookup takes one prompt."""
    inputs = _inputs(name)
    return family(name).single(inputs, 0) if MODES[mode][1] is LOOKUP else inputs


CELLS = [
    (name, contrast, edit, mode)
    for name in ("llava", "qwen2_5_vl")
    for contrast, edit in PAIRS
    for mode in MODES
]
CELLS += [("gemma3", contrast, "var", mode) for contrast in CONTRASTS for mode in MODES]


@pytest.mark.rotated
@pytest.mark.parametrize(
    ("name", "contrast", "edit", "mode"), CELLS, ids=["-".join(cell) for cell in CELLS]
)
def test_edits_act_on_the_prompt_as_it_is_and_branches_are_of_the_plain_model(
    name: str, contrast: str, edit: str, mode: str
) -> None:
    wanted = _wanted(name, contrast, edit, mode)
    choice, forwards = MODES[mode]
    with vlmfix.wrapped(family(name).model, [STRONG[edit], STRONG[contrast]]) as model:
        got = _generate(model, _prompts(name, mode), **choice, **forwards)
        report = vlmfix.last_call(model)
    assert got.sequences.tolist() == wanted.sequences.tolist()
    for one, other in zip(got.scores, wanted.scores, strict=True):
        _close(one, other)
    assert report.streams == 1 + STRONG[contrast].streams()
    assert report.edited_rows > 0 and report.contrasted_rows > 0


@pytest.mark.parametrize(
    ("name", "contrast", "edit"),
    [("llava", "avc", "imba"), ("qwen2_5_vl", "vcd", "var"), ("gemma3", "m3id", "var")],
)
def test_lookup_takes_drafts(name: str, contrast: str, edit: str) -> None:
    """Or its cells above would be greedy ones."""
    queries: list[int] = []
    with vlmfix.wrapped(family(name).model, [STRONG[edit], STRONG[contrast]]) as model:
        handle = model.register_forward_pre_hook(
            lambda module, args, kwargs: queries.append(kwargs["input_ids"].shape[1]),
            with_kwargs=True,
        )
        _generate(model, _prompts(name, "lookup"), **LOOKUP)
        handle.remove()
    assert max(queries[2:]) > 1  # behind the prompt and its branch


@pytest.mark.rotated
@pytest.mark.parametrize(("contrast", "edit"), PAIRS)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_a_stack_is_neither_of_its_parts(name: str, contrast: str, edit: str) -> None:
    """Or the cells above would be empty."""
    model, inputs = family(name).model, _inputs(name)
    one, other = STRONG[contrast], STRONG[edit]
    found = []
    for stack in (one, other, [one, other], [other, one]):
        with vlmfix.wrapped(model, stack):
            found.append(logits(model, inputs).softmax(-1))
    contrasted, edited, stacked, reversed_ = found
    assert torch.equal(stacked, reversed_)
    for part in (contrasted, edited):
        assert ((stacked - part).abs().amax(-1) > 1e-3).any()


@dataclass(frozen=True)
class Onlooker(ContrastMethod):
    """Keeps what it is shown of the prompts."""

    shown: list[Prompt] = field(default_factory=list, compare=False)

    name: ClassVar[str] = "onlooker"

    def streams(self) -> int:
        return 1

    def neutral(self) -> bool:
        return False

    def watched(self, info: ModelInfo) -> Sequence[int]:
        return tuple(info.attention)

    def branches(self, prompt: Prompt) -> Sequence[Branch]:
        self.shown.append(prompt)
        return [Branch()]

    def contrast(
        self, base: torch.Tensor, branches: Sequence[torch.Tensor], token: torch.Tensor
    ) -> torch.Tensor:
        return base


@pytest.mark.rotated
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_the_attention_shown_to_a_contrast_is_the_edited_one(name: str, edit: str) -> None:
    model, inputs = family(name).model, _inputs(name)
    method, modes = Onlooker(), [{}, {"num_beams": 3}, STATIC, {"use_cache": False}]
    if edit not in ("vhr", "gift") and name != "gemma3":
        modes.append({"prefill_chunk_size": 7})
    plain = vlmfix.attention_map(model, inputs)
    with vlmfix.wrapped(model, STRONG[edit]):
        maps = vlmfix.attention_map(model, inputs)
    with vlmfix.wrapped(model, [STRONG[edit], method]):
        for kwargs in modes:
            _generate(model, inputs, max_new_tokens=2, **kwargs)
        first = min(vlmfix.last_call(model).rows_by_layer)
    assert len(method.shown) == len(modes)  # once a prompt, also where each step is one
    for prompts in method.shown:
        assert torch.equal(prompts.visual, inputs["input_ids"] == IMAGE)
        assert torch.equal(prompts.real, inputs["attention_mask"].bool())
        for row, (found,) in enumerate(maps):
            for layer, weights in zip(found.layers, found.weights, strict=True):
                seen = prompts.seen[layer][row, prompts.visual[row]]
                assert torch.allclose(seen, weights[0, 0], rtol=0, atol=1e-5)
    if STRONG[edit].edits_rows():  # and not only scales heads
        one, other = ([found.weights[first] for (found,) in each] for each in (maps, plain))
        assert max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True)) > 1e-2


@pytest.mark.rotated
@pytest.mark.parametrize("stack", [("avc", "pai"), ("m3id", "vhr"), ("rbd", "var")], ids="+".join)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_compiled_stack_equals_eager(name: str, stack: tuple[str, str]) -> None:
    from torch._dynamo.utils import counters

    tiny = build(name)
    inputs, other = prompt(tiny), prompt(tiny, seed=5)
    config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    config._compile_all_devices = True
    compiled = {"cache_implementation": "static", "compile_config": config}
    torch.compiler.reset()
    with vlmfix.wrapped(tiny.model, [STRONG[method] for method in stack]) as model:
        wanted = [_generate(model, prompts) for prompts in (inputs, other)]
        rows = vlmfix.last_call(model)
        first = _generate(model, inputs, **compiled)
        graphs = counters["stats"]["unique_graphs"]
        second = _generate(model, other, **compiled)
        assert counters["stats"]["unique_graphs"] == graphs > 0
        report = vlmfix.last_call(model)
    for got, eager in zip((first, second), wanted, strict=True):
        assert torch.equal(got.sequences, eager.sequences)
        _close(_raw(got), _raw(eager))
    assert report.edited_rows == rows.edited_rows > 0
    assert report.contrasted_rows == rows.contrasted_rows == 3 * NEW


def test_two_contrastive_methods_are_refused() -> None:
    model = family("llava").model
    for one, other in (("avc", "vcd"), ("m3id", "pai_guidance")):
        with pytest.raises(CompositionError, match=f"{one} and {other} both combine"):
            vlmfix.wrap(model, [STRONG[one], STRONG["pai"], STRONG[other]])
    with vlmfix.wrapped(model, STRONG["avc"]):
        with vlmfix.using(model, STRONG["vcd"]):  # in its place, and not on top of it
            _generate(model, _inputs("llava"))
        with pytest.raises(CompositionError, match="avc and rbd"):
            vlmfix.using(model, [STRONG["avc"], STRONG["rbd"]]).__enter__()


# -- rows --------------------------------------------------------------------------------------


def _without_image(tiny: TinyFamily, inputs: dict[str, Any], row: int) -> dict[str, Any]:
    """The same batch with text in place of one row's image."""
    image = torch.tensor([IMAGE, *tiny.layout.before, *tiny.layout.after])
    changed = {name: value.clone() for name, value in inputs.items()}
    changed["input_ids"][row][torch.isin(changed["input_ids"][row], image)] = 33
    batch = len(changed["input_ids"])
    kept = [index for index in range(batch) if index != row]
    for name, value in changed.items():
        if name in ("token_type_ids", "mm_token_type_ids"):
            value[row] = 0
        elif name not in PER_POSITION:
            changed[name] = value.unflatten(0, (batch, -1))[kept].flatten(0, 1)
    return changed


@pytest.mark.parametrize(
    "choice", [{}, {"num_beams": 3}, STATIC], ids=["greedy", "beams", "static"]
)
@pytest.mark.parametrize("contrast", CONTRASTS)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_row_without_an_image_stays_as_it_is_beside_rows_with_one(
    name: str, contrast: str, choice: dict[str, Any]
) -> None:
    """Close to the plain model and not its bits: a wider batch rounds differently."""
    tiny = family(name)
    inputs = _without_image(tiny, _inputs(name), 1)
    plain = _generate(tiny.model, inputs, **choice)
    with vlmfix.wrapped(tiny.model, STRONG[contrast]):
        got = _generate(tiny.model, inputs, **choice)
    copies = choice.get("num_beams", 1)
    rows = slice(copies, 2 * copies)
    assert torch.equal(got.sequences[1], plain.sequences[1])
    assert torch.allclose(_raw(got)[:, rows], _raw(plain)[:, rows], rtol=0, atol=1e-5)
    for row in (0, 2 * copies):
        assert (_raw(got)[0, row] - _raw(plain)[0, row]).abs().max() > 0.1


@pytest.mark.parametrize(
    "choice", [{}, {"num_beams": 3}, STATIC], ids=["greedy", "beams", "static"]
)
@pytest.mark.parametrize("contrast", [*CONTRASTS, "rbd"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_prompts_without_any_image_run_no_branch(
    name: str, contrast: str, choice: dict[str, Any]
) -> None:
    tiny = family(name)
    ids = torch.tensor([[0, 0, 1, 5, 9, 20, 31], [1, 7, 11, 30, 41, 52, 63]])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    with module_state(tiny.model):
        plain = _generate(tiny.model, inputs, **choice)
        with vlmfix.wrapped(tiny.model, STRONG[contrast]):
            got = _generate(tiny.model, inputs, **choice)
            report = vlmfix.last_call(tiny.model)
    assert torch.equal(got.sequences, plain.sequences)
    assert torch.equal(_raw(got), _raw(plain))
    assert report.streams == 1 and report.extra_passes == report.contrasted_rows == 0


@dataclass(frozen=True)
class Filled(ContrastMethod):
    """Contrasts with the image blotted out, in the first row with a number of its own."""

    first: float = 0.3
    weight: float = 1.0

    name: ClassVar[str] = "filled"

    def streams(self) -> int:
        return 1

    def neutral(self) -> bool:
        return False

    def branches(self, prompt: Prompt) -> Sequence[Branch]:
        fill = torch.full((*prompt.ids.shape, prompt.info.hidden_size), 0.3)
        fill[0] = self.first
        return [Branch(filled=prompt.visual, fill=fill)]

    def contrast(
        self, base: torch.Tensor, branches: Sequence[torch.Tensor], token: torch.Tensor
    ) -> torch.Tensor:
        return base + self.weight * (base - branches[0])


@pytest.mark.parametrize(
    "choice", [{}, {"num_beams": 3}, STATIC], ids=["greedy", "beams", "static"]
)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_a_branch_that_overflows_says_nothing_and_harms_no_other_row(
    name: str, choice: dict[str, Any]
) -> None:
    model, inputs = family(name).model, _inputs(name)
    plain = _generate(model, inputs, **choice)
    with vlmfix.wrapped(model, Filled()):
        sound = _generate(model, inputs, **choice)
    with vlmfix.wrapped(model, Filled(first=torch.nan)):
        got = _generate(model, inputs, **choice)
    copies = choice.get("num_beams", 1)
    assert not _raw(got).isnan().any()
    assert torch.equal(_raw(got)[:, copies:], _raw(sound)[:, copies:])
    assert torch.equal(got.sequences[1:], sound.sequences[1:])
    assert torch.equal(got.sequences[0], plain.sequences[0])
    assert torch.allclose(_raw(got)[:, :copies], _raw(plain)[:, :copies], rtol=0, atol=1e-5)
    assert not torch.allclose(_raw(sound)[0, 0], _raw(plain)[0, 0], atol=0.1)


@pytest.mark.parametrize("contrast", [*CONTRASTS, "rbd"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_prompts_in_another_order_give_the_same_answers(name: str, contrast: str) -> None:
    tiny, inputs, order = family(name), _inputs(name), [2, 0, 1]
    turned = {
        key: value.unflatten(0, (3, -1))[order].flatten(0, 1) for key, value in inputs.items()
    }
    with vlmfix.wrapped(tiny.model, STRONG[contrast]):
        one, other = (_generate(tiny.model, prompts) for prompts in (inputs, turned))
    assert torch.equal(one.sequences[order], other.sequences)
    _close(_raw(one)[:, order], _raw(other), atol=2e-5)


@dataclass(frozen=True)
class Same(ContrastMethod):
    """Contrasts with two branches that see what the base sees."""

    weights: tuple[float, float] = (4.0, -2.5)

    name: ClassVar[str] = "same"

    def streams(self) -> int:
        return 2

    def neutral(self) -> bool:
        return False

    def branches(self, prompt: Prompt) -> Sequence[Branch]:
        return [Branch(), Branch()]

    def contrast(
        self, base: torch.Tensor, branches: Sequence[torch.Tensor], token: torch.Tensor
    ) -> torch.Tensor:
        pairs = zip(self.weights, branches, strict=True)
        return base + sum(weight * (base - branch) for weight, branch in pairs)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_branches_that_see_the_same_change_nothing(name: str, mode: str) -> None:
    model, inputs = family(name).model, _prompts(name, mode)
    choice, forwards = MODES[mode]
    plain = _generate(model, inputs, **choice)
    with vlmfix.wrapped(model, Same()):
        got = _generate(model, inputs, **choice, **forwards)
    assert torch.equal(got.sequences, plain.sequences)
    assert torch.allclose(_raw(got), _raw(plain), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_reordering_a_cache_moves_every_stream_alike(kind: str) -> None:
    tiny, inputs = family("llava"), _inputs("llava")
    config = tiny.model.config.get_text_config()
    held = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config, 40)
    with vlmfix.wrapped(tiny.model, STRONG["rbd"]):
        logits(tiny.model, inputs, past_key_values=held)
    before = [entry.clone() for layer in held.layers for entry in (layer.keys, layer.values)]
    index = torch.tensor([2, 0, 0])
    held.reorder_cache(index)
    after = [entry for layer in held.layers for entry in (layer.keys, layer.values)]
    for one, other in zip(before, after, strict=True):
        assert len(one) == len(other) == 9
        for group in range(3):
            assert torch.equal(other[3 * group : 3 * group + 3], one[3 * group + index])


# -- a cache that comes back -------------------------------------------------------------------


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("contrast", ["vcd", "m3id"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_later_turn_equals_the_whole_conversation(name: str, contrast: str, static: bool) -> None:
    """Where branches do not depend on the question; tokens are counted anew in each turn."""
    tiny = family(name)
    first = tiny.single(_inputs(name), 1)
    held: Any = StaticCache(tiny.model.config.get_text_config(), 64) if static else None
    with vlmfix.wrapped(tiny.model, STRONG[contrast]):
        turn = _generate(tiny.model, first, past_key_values=held, disable_compile=True)
        later = _later(turn)
        got = _generate(tiny.model, later, disable_compile=True)
        report = vlmfix.last_call(tiny.model)
        whole = {**first, **{k: v for k, v in later.items() if k != "past_key_values"}}
        if "mm_token_type_ids" in whole:
            extra = whole["input_ids"].shape[1] - whole["mm_token_type_ids"].shape[1]
            whole["mm_token_type_ids"] = torch.nn.functional.pad(
                whole["mm_token_type_ids"], (0, extra)
            )
        wanted = _generate(tiny.model, whole)
    assert torch.equal(got.sequences, wanted.sequences)
    _close(_raw(got), _raw(wanted))
    assert report.streams == 2 and report.extra_passes == 0 and report.contrasted_rows == NEW
    plain = _generate(tiny.model, whole)
    assert (_raw(plain)[0] - _raw(got)[0]).abs().max() > 0.1


OTHERS: list[tuple[Any, str]] = [
    (None, "also holds the rows of a contrastive method's branches"),
    (STRONG["pai"], "also holds the rows of a contrastive method's branches"),
    ("vcd:alpha=0;beta=0", "also holds the rows of a contrastive method's branches"),
    (STRONG["m3id"], "branches of 'vcd.*', not those of 'm3id"),
    ("vcd:alpha=0", "branches of 'vcd.*', not those of 'vcd:alpha=0"),
    ("vcd:alpha=2;noise_step=999;seed=0", "branches of 'vcd.*', not those of 'vcd:alpha=2"),
]


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_a_cache_with_branches_goes_on_under_its_own_method_only(static: bool) -> None:
    model, first = family("llava").model, family("llava").inputs(1)
    held: Any = StaticCache(model.config.get_text_config(), 64) if static else None
    way_out = "start from the prompt"
    with vlmfix.wrapped(model, STRONG["vcd"]):
        turn = _generate(model, first, past_key_values=held, disable_compile=True)
        for stack, message in OTHERS:
            with vlmfix.using(model, stack), pytest.raises(StateError, match=message) as caught:
                _generate(model, _later(turn), disable_compile=True)
            assert way_out in str(caught.value)
        twin = copy.deepcopy(turn.past_key_values)
        alike = {**_later(turn), "past_key_values": twin}
        with pytest.raises(StateError, match="no method has seen"):
            _generate(model, alike, disable_compile=True)
        with vlmfix.using(model, None), pytest.raises(StateError, match="holds 2 rows"):
            _generate(model, alike, disable_compile=True)
    with pytest.raises(StateError, match="holds 2 rows"):  # unwrapped
        _generate(model, _later(turn), disable_compile=True)
    with vlmfix.wrapped(model, STRONG["vcd"]), pytest.raises(StateError, match="no method has"):
        _generate(model, _later(turn), disable_compile=True)


def test_a_refusal_leaves_the_cache_as_it_was() -> None:
    model, first = family("llava").model, family("llava").inputs(1)
    with vlmfix.wrapped(model, STRONG["vcd"]):
        wanted = _generate(model, _later(_generate(model, first)))
        turn = _generate(model, first)
        for stack, _ in OTHERS:
            with vlmfix.using(model, stack), pytest.raises(StateError):
                _generate(model, _later(turn))
        again = _generate(model, _later(turn))
    assert torch.equal(_raw(again), _raw(wanted))


@pytest.mark.parametrize("before", ["pai:alpha=0.5;start_layer=0", "vcd:alpha=0"])
def test_a_cache_that_was_filled_without_branches_is_refused(before: str) -> None:
    model, first = family("llava").model, family("llava").inputs(1)
    with vlmfix.wrapped(model, before):
        turn = _generate(model, first)
        for stack in (STRONG["vcd"], [STRONG["avc"], STRONG["pai"]]):
            with vlmfix.using(model, stack), pytest.raises(StateError, match="was off, so its b"):
                _generate(model, _later(turn))
        _generate(model, _later(turn))
        assert vlmfix.last_call(model).streams == 1


def test_a_first_turn_without_an_image_has_no_branches_and_neither_has_the_next() -> None:
    model = family("llava").model
    first = {"input_ids": torch.tensor([[1, 7, 11, 30, 41]])}
    plain = _generate(model, _later(_generate(model, first)))
    with vlmfix.wrapped(model, STRONG["avc"]):
        got = _generate(model, _later(_generate(model, first)))
        assert vlmfix.last_call(model).contrasted_rows == 0
    assert torch.equal(_raw(got), _raw(plain))


@pytest.mark.parametrize("choice", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_a_cache_that_is_reset_takes_another_prompt(static: bool, choice: dict[str, Any]) -> None:
    """Of another number of rows, with branches, and without."""
    tiny = family("llava")
    model, config = tiny.model, tiny.model.config.get_text_config()
    one, three = tiny.inputs(1), _inputs("llava")
    kind = StaticCache if static else DynamicCache
    held: Any = StaticCache(config, 64) if static else DynamicCache(config=config)
    kwargs = {**choice, "disable_compile": True}
    plain = _generate(model, one, **kwargs)
    with vlmfix.wrapped(model, STRONG["vcd"]):
        wanted = _generate(model, three, **kwargs)
        _generate(model, one, past_key_values=held, **kwargs)
        assert isinstance(held, kind) and type(held) is not kind
        held.reset()
        got = _generate(model, three, past_key_values=held, **kwargs)
        held.reset()
        assert type(held) is kind
    unbranched = _generate(model, one, past_key_values=held, **kwargs)
    assert torch.equal(got.sequences, wanted.sequences)
    assert torch.equal(unbranched.sequences, plain.sequences)


def test_images_in_a_later_turn_are_refused() -> None:
    tiny = family("llava")
    first, second = tiny.inputs(1), tiny.inputs(1, seed=4)
    with vlmfix.wrapped(tiny.model, STRONG["m3id"]):
        turn = _generate(tiny.model, first)
        later = _later(turn, second["input_ids"][0].tolist())
        with pytest.raises(StateError, match="in a later turn.*without past_key_values"):
            _generate(tiny.model, {**later, "pixel_values": second["pixel_values"]})
        held = _new_cache(tiny.model)
        logits(tiny.model, first, past_key_values=held)
        with pytest.raises(StateError, match="in a later turn"):
            logits(tiny.model, second, past_key_values=held)


# -- what cannot be run is refused before the prompt runs ------------------------------------------


@pytest.fixture
def decoder_runs() -> Iterator[list[int]]:
    """One entry per forward of llava's first decoder layer."""
    runs: list[int] = []
    layer = describe_model(family("llava").model).layers[0]
    handle = layer.register_forward_pre_hook(lambda module, args: runs.append(1))
    yield runs
    handle.remove()


def test_caches_that_rows_cannot_be_joined_to(decoder_runs: list[int]) -> None:
    model, inputs = family("llava").model, family("llava").inputs(1)
    quantised = Cache(layers=[Fp8QuantizedLayer() for _ in range(3)])
    offloaded = DynamicCache(config=model.config.get_text_config())
    offloaded.offloading = True  # made as one, it would ask for an accelerator
    with vlmfix.wrapped(model, STRONG["avc"]):
        with pytest.raises(CompositionError, match="Fp8QuantizedLayer.*with a dynamic cache"):
            _generate(model, inputs, past_key_values=quantised)
        with pytest.raises(CompositionError, match="offloaded layers.*with a dynamic cache"):
            _generate(model, inputs, past_key_values=offloaded)
    assert not decoder_runs


def test_padding_on_the_right(decoder_runs: list[int]) -> None:
    model, inputs = family("llava").model, _inputs("llava")
    for row, count in enumerate((inputs["attention_mask"] == 0).sum(1).tolist()):
        for name in ("input_ids", "attention_mask"):
            inputs[name][row] = inputs[name][row].roll(-count)
    with vlmfix.wrapped(model, STRONG["m3id"]):
        for ask in (_generate, logits):
            with pytest.raises(BadInput, match='padding_side = "left"'):
                ask(model, inputs)
    assert not decoder_runs


def test_outputs_as_a_tuple(decoder_runs: list[int]) -> None:
    model, inputs = family("llava").model, _inputs("llava")
    with vlmfix.wrapped(model, STRONG["m3id"]):
        with pytest.raises(BadInput, match="leave return_dict=False out"):
            model(**inputs, return_dict=False)
        model.config.return_dict = False
        try:
            with pytest.raises(BadInput, match="leave return_dict=False out"):
                model(**inputs)
        finally:
            model.config.return_dict = True
    assert not decoder_runs


def test_a_prompt_in_pieces_of_ones_own(decoder_runs: list[int]) -> None:
    model, inputs = family("llava").model, family("llava").inputs(1)
    length = inputs["input_ids"].shape[1]
    piece = {**inputs, "input_ids": inputs["input_ids"][:, :20]}
    piece["attention_mask"] = inputs["attention_mask"][:, :20]
    message = r"20 of its 24 tokens.*prefill_chunk_size"
    with vlmfix.wrapped(model, STRONG["avc"]), pytest.raises(CompositionError, match=message):
        logits(model, piece, past_key_values=_new_cache(model), prompt_length=length)
    assert not decoder_runs


@pytest.mark.parametrize("choice", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_features_that_were_encoded_before(name: str, choice: dict[str, Any]) -> None:
    """They serve branches that see the same pixels, or none; other pixels need pixels."""
    tiny, inputs = family(name), _inputs(name)
    vision = {key: value for key, value in inputs.items() if key not in PER_POSITION}
    with torch.no_grad():
        features = tiny.model.get_image_features(**vision, return_dict=True)
    given = {key: value for key, value in inputs.items() if key != "pixel_values"}

    def again() -> dict[str, Any]:  # a beam search repeats features in place
        return {**given, "mm_encoder_outputs": {"image": copy.copy(features)}}

    for contrast in ("avc", "m3id"):
        with vlmfix.wrapped(tiny.model, STRONG[contrast]):
            wanted = _generate(tiny.model, inputs, **choice)
            got = _generate(tiny.model, again(), **choice)
        assert torch.equal(_raw(got), _raw(wanted))
    for contrast in ("vcd", "rbd"):
        with (
            vlmfix.wrapped(tiny.model, STRONG[contrast]),
            pytest.raises(BadInput, match="no pixel_values.*Pass what the model's processor"),
        ):
            _generate(tiny.model, again(), **choice)


# -- what comes back -------------------------------------------------------------------------------


def _shapes(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_shapes(one) for one in value]
    return tuple(value.shape) if isinstance(value, torch.Tensor) else value


@pytest.mark.rotated
@pytest.mark.parametrize(
    "choice",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 2},
        {"use_cache": False},
        STATIC,
    ],
    ids=["greedy", "beams", "beams twice", "sampling twice", "no cache", "static"],
)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_outputs_have_the_rows_of_the_prompts_alone(name: str, choice: dict[str, Any]) -> None:
    model, inputs = _eager(name), _inputs(name)
    asked = {"output_hidden_states": True, "output_attentions": True, **choice}
    names = ("sequences", "logits", "scores", "hidden_states", "attentions")
    outputs = []
    for edit, contrast in ((None, "rbd"), (STRONG["pai"], "avc")):
        for stack in (edit, [*([edit] if edit else []), STRONG[contrast]]):
            with vlmfix.wrapped(model, stack):
                outputs.append(_generate(model, inputs, **asked))
        wanted, got = outputs[-2:]
        for part in names:
            assert _shapes(got[part]) == _shapes(wanted[part])
        for part in ("hidden_states", "attentions"):  # of the base, in the prompt
            for one, other in zip(got[part][0], wanted[part][0], strict=True):
                assert torch.allclose(one, other, rtol=0, atol=1e-5)
    assert all(len(step) == len(outputs[0].attentions[0]) for step in outputs[1].attentions)


@cache
def _eager(name: str) -> Any:
    model = build(name).model
    model.set_attn_implementation({"text_config": "eager"})
    return model


def test_the_report_of_a_call() -> None:
    model, inputs = family("llava").model, _inputs("llava")
    beams = {"num_beams": 3}
    sampling = {"do_sample": True, "num_return_sequences": 2}
    expected: list[tuple[Any, dict[str, Any], int, int, int]] = [
        # stack, kwargs, rows of the batch, extra passes, streams
        ("m3id", {}, 3, 1, 2),
        ("m3id", beams, 9, 1, 2),
        ("vcd", sampling, 6, 1, 2),
        ("avc", STATIC, 3, 1, 2),
        ("avc", {"prefill_chunk_size": 7}, 3, 1, 2),
        ("rbd", beams, 9, 2, 3),
        ("m3id", {"use_cache": False}, 3, NEW, 2),
        ("m3id", {**beams, "use_cache": False}, 9, 3 * NEW, 2),
        (("m3id", "vhr"), {}, 3, 2, 2),
        (("avc", "gift"), {}, 3, 2, 2),
    ]
    for names, kwargs, rows, extra, streams in expected:
        stack = [STRONG[name] for name in ((names,) if isinstance(names, str) else names)]
        with vlmfix.wrapped(model, stack):
            _generate(model, inputs, **kwargs)
            report = vlmfix.last_call(model)
        passes = NEW if "prefill_chunk_size" not in kwargs else NEW + 3
        assert report.batch == rows and report.passes == passes
        assert report.extra_passes == extra and report.streams == streams
        assert report.contrasted_rows == rows * NEW and report.new_tokens == NEW


@pytest.mark.parametrize("contrast", [*CONTRASTS, "rbd"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_attention_maps_are_those_without_the_contrast(
    name: str, contrast: str, decoder_runs: list[int]
) -> None:
    model, inputs = family(name).model, _inputs(name)
    plain = vlmfix.attention_map(model, inputs)
    with vlmfix.wrapped(model, STRONG["pai"]):
        wanted = vlmfix.attention_map(model, inputs)
    with vlmfix.wrapped(model, [STRONG[contrast], STRONG["pai"]]):
        sequences = _generate(model, inputs).sequences
        before = vlmfix.last_call(model)
        decoder_runs.clear()
        maps = vlmfix.attention_map(model, inputs)
        answers = vlmfix.attention_map(model, inputs, rows="answer", generated=sequences)
        assert len(decoder_runs) == (2 if name == "llava" else 0)  # no branch
        assert vlmfix.last_call(model) == before
    for rows in zip(plain, wanted, maps, answers, strict=True):
        without, one, other, answer = (images[0].weights for images in rows)
        assert torch.equal(one, other) and not torch.allclose(one, without, atol=1e-2)
        assert torch.allclose(answer[:, :, 0], one[:, :, 0], atol=1e-5)
        assert answer.shape[2] == NEW


class Forced(LogitsProcessor):  # type: ignore[misc]  # transformers' is untyped
    """Lets generate() write one answer and no other."""

    def __init__(self, answer: list[int], width: int) -> None:
        self.answer, self.width = answer, width

    def __call__(self, ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.answer[ids.shape[1] - self.width]] = 0
        return forced


@pytest.mark.parametrize("contrast", CONTRASTS)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_answers_read_in_one_forward_equal_answers_token_by_token(name: str, contrast: str) -> None:
    tiny, inputs = family(name), _inputs(name)
    forced = answer_greedily(tiny.model, inputs, NEW)
    with vlmfix.wrapped(tiny.model, STRONG[contrast]):
        read = forced.read(tiny.model)
        for row, answer in enumerate(forced.answers):
            alone = tiny.single(inputs, row)
            processor = Forced(answer, alone["input_ids"].shape[1])
            output = _generate(
                tiny.model, alone, logits_processor=[processor], suppress_tokens=None,
                max_new_tokens=len(answer), eos_token_id=None,
            )  # fmt: skip
            steps = _raw(output)[:, 0].log_softmax(-1)
            wanted = steps.gather(1, torch.tensor(answer)[:, None])[:, 0]
            assert torch.allclose(read[row], wanted, rtol=0, atol=1e-4)
            assert (read[row] - forced.log_probabilities[row]).abs().max() > 1e-2


class Watch:
    """A forward pre-hook that notes the positions of each forward of generate()."""

    def __init__(self, model: Any) -> None:
        self.positions: list[torch.Tensor] = []
        # Before the session's own hook, so that it sees what generate() gave.
        self.handle = model.register_forward_pre_hook(self.note, with_kwargs=True, prepend=True)
        self.model = model

    def note(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        session = module.__dict__["_vlmfix_session"]
        if session.stack.methods:  # not a branch
            self.positions.append(kwargs["position_ids"])


@pytest.mark.parametrize("contrast", [*CONTRASTS, "rbd"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_forwards_of_ones_own_equal_generate(name: str, contrast: str) -> None:
    """One prompt, without positions; and a padded batch, with those that generate() gives."""
    tiny = family(name)
    batch, alone = _inputs(name), tiny.single(_inputs(name), 1)
    with vlmfix.wrapped(tiny.model, STRONG[contrast]):
        watch = Watch(tiny.model)
        wanted = _generate(tiny.model, batch)
        watch.handle.remove()
        assert len(watch.positions) == NEW
        _follow(tiny.model, batch, wanted, watch.positions)
        wanted = _generate(tiny.model, alone)
        for mask in (True, False):
            _follow(tiny.model, alone, wanted, None, mask)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_forwards_of_ones_own_on_a_padded_batch_without_positions(name: str) -> None:
    with vlmfix.wrapped(family(name).model, STRONG["m3id"]) as model:
        _follow(model, _inputs(name), _generate(model, _inputs(name)), None)


def _follow(
    model: Any,
    inputs: dict[str, Any],
    wanted: Any,
    positions: list[torch.Tensor] | None,
    with_mask: bool = True,
) -> None:
    """Feed an answer token by token to bare forwards on a cache, and compare the logits."""
    step: dict[str, Any] = {**inputs, "past_key_values": _new_cache(model)}
    mask, length = inputs["attention_mask"], inputs["input_ids"].shape[1]
    for index, scores in enumerate(wanted.logits):
        if positions is not None:
            step["position_ids"] = positions[index]
        _close(logits(model, step), scores)
        tokens = wanted.sequences[:, length + index, None]
        mask = torch.cat([mask, torch.ones_like(tokens)], 1)
        step = {"input_ids": tokens, "past_key_values": step["past_key_values"]}
        if with_mask:
            step["attention_mask"] = mask
    assert vlmfix.last_call(model).contrasted_rows == len(tokens) * len(wanted.logits)


# -- interrupted -----------------------------------------------------------------------------------


class Interrupt(BaseStreamer):  # type: ignore[misc]  # transformers' is untyped
    """Stops at the third token, as somebody at the keyboard would."""

    def __init__(self) -> None:
        self.puts = 0

    def put(self, value: torch.Tensor) -> None:
        self.puts += 1
        if self.puts == 4:
            raise KeyboardInterrupt

    def end(self) -> None:
        pass


def _state(model: Any) -> list[Any]:
    """Hooks and attributes of every module, and their configurations."""
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_forward_hooks_always_called")
    return [
        (
            name,
            sorted(module.__dict__),
            [list(getattr(module, kind)) for kind in kinds],
            id(getattr(module, "config", None)),
        )
        for name, module in model.named_modules()
    ]


@pytest.mark.rotated
@pytest.mark.parametrize("contrast", CONTRASTS)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_model_survives_what_stops_its_branches(
    name: str, contrast: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = build(name)
    model, inputs = tiny.model, _inputs(name)
    alone = tiny.single(inputs, 0)
    plain = _generate(model, inputs)
    _generate(model, inputs, **STATIC)  # generate() notes the size of its cache on the model
    before = _state(model)
    layer = describe_model(model).layers[1]

    def explode(*args: Any) -> None:
        raise RuntimeError("boom")

    def in_the_branch(module: Any, args: Any) -> None:
        if not model.__dict__["_vlmfix_session"].stack.methods:
            explode()

    vlmfix.wrap(model, STRONG[contrast])
    wanted, single = _generate(model, inputs), _generate(model, alone)
    usual = _state(model)
    for kwargs in ({}, {"num_beams": 3}, STATIC, {"use_cache": False}):
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="boom"):
            patch.setattr(type(STRONG[contrast]), "branches", explode)
            _generate(model, inputs, **kwargs)
        handle = layer.register_forward_pre_hook(in_the_branch)
        with pytest.raises(RuntimeError, match="boom"):
            _generate(model, inputs, **kwargs)
        with pytest.raises(RuntimeError, match="boom"):
            logits(model, inputs)
        handle.remove()
        if "num_beams" not in kwargs:
            with pytest.raises(KeyboardInterrupt):
                _generate(model, alone, streamer=Interrupt(), **kwargs)
        assert _state(model) == usual
        with vlmfix.using(model, None):
            assert torch.equal(_raw(_generate(model, inputs)), _raw(plain))
        assert torch.equal(_raw(_generate(model, inputs)), _raw(wanted))
        assert torch.equal(_raw(_generate(model, alone)), _raw(single))
    vlmfix.unwrap(model)
    assert _state(model) == before
    assert torch.equal(_raw(_generate(model, inputs)), _raw(plain))


@pytest.mark.parametrize("choice", [{}, {"num_beams": 3}, STATIC, {"use_cache": False}], ids=str)
@pytest.mark.parametrize("contrast", [*CONTRASTS, "rbd"])
def test_what_mrope_leaves_on_the_model_is_the_prompts(
    contrast: str, choice: dict[str, Any]
) -> None:
    tiny, inputs = family("qwen2_5_vl"), _inputs("qwen2_5_vl")
    _generate(tiny.model, inputs, **choice)
    plain = tiny.model.model.rope_deltas.clone()
    with vlmfix.wrapped(tiny.model, STRONG[contrast]):
        _generate(tiny.model, inputs, **choice)
        assert torch.equal(tiny.model.model.rope_deltas, plain)
        logits(tiny.model, inputs)
        assert torch.equal(tiny.model.model.rope_deltas, plain[:: len(plain) // 3])
    assert (plain != 0).all()


def test_threads_with_different_contrasts_do_not_mix() -> None:
    tiny = build("llava")
    inputs = {name: tiny.inputs(2, seed=index) for index, name in enumerate(CONTRASTS)}
    vlmfix.wrap(tiny.model, None)
    expected = {}
    for name in CONTRASTS:
        with vlmfix.using(tiny.model, STRONG[name]):
            expected[name] = _raw(_generate(tiny.model, inputs[name]))
    got: dict[str, list[torch.Tensor]] = {name: [] for name in CONTRASTS}
    reports: dict[str, Any] = {}
    barrier = threading.Barrier(len(CONTRASTS))

    def run(name: str) -> None:
        with vlmfix.using(tiny.model, STRONG[name]):
            for _ in range(5):
                barrier.wait(30)
                got[name].append(_raw(_generate(tiny.model, inputs[name])))
            reports[name] = vlmfix.last_call(tiny.model)

    threads = [threading.Thread(target=run, args=(name,)) for name in CONTRASTS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for name in CONTRASTS:
        assert len(got[name]) == 5
        assert all(torch.equal(out, expected[name]) for out in got[name])
        assert reports[name].methods[0].startswith(name)
        assert reports[name].streams == 2 and reports[name].contrasted_rows == 2 * NEW


# -- processors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("contrast", [*CONTRASTS, "rbd"])
def test_penalties_and_warpers_see_contrasted_logits(contrast: str) -> None:
    """The order of the authors' code: contrast, then processors, then warpers."""
    tiny = family("llava")
    inputs = tiny.inputs(1, seed=3)
    length = inputs["input_ids"].shape[1]
    settings = {"repetition_penalty": 1.4, "temperature": 0.7, "top_p": 0.8, "top_k": 0}
    sampling = {"do_sample": True, "num_return_sequences": 3}
    torch.manual_seed(5)
    with vlmfix.wrapped(tiny.model, STRONG[contrast]):
        output = _generate(tiny.model, inputs, **sampling, **settings)
    method = STRONG[contrast].prepared(describe_model(tiny.model), tiny.model)
    oracle = Oracle(tiny, [inputs], method)
    steps = (
        RepetitionPenaltyLogitsProcessor(1.4),
        SuppressTokensLogitsProcessor(NEVER),
        TemperatureLogitsWarper(0.7),
        TopPLogitsWarper(0.8),
    )
    for index, (raw, scores) in enumerate(zip(output.logits, output.scores, strict=True)):
        ids = output.sequences[:, : length + index]
        combined = torch.stack([oracle.logits(0, answer) for answer in ids[:, length:]])
        _close(raw, combined)
        for step in steps:
            raw = step(ids, raw)
        assert torch.equal(raw, scores)
        assert (scores == -torch.inf).any()


@pytest.mark.parametrize(
    "choice", [{}, {"do_sample": True, "top_p": 0.9}, {"num_beams": 4}], ids=str
)
@pytest.mark.parametrize("contrast", ["vcd:alpha=0;beta=0.999", "vcd:beta=0.999;seed=0"])
def test_where_the_end_is_the_only_plausible_token_and_forbidden(
    contrast: str, choice: dict[str, Any]
) -> None:
    tiny, inputs = family("llava"), _inputs("llava")
    ends = logits(tiny.model, inputs).argmax(-1).tolist()
    torch.manual_seed(5)
    with vlmfix.wrapped(tiny.model, contrast):
        output = _generate(
            tiny.model, inputs, **choice, suppress_tokens=None,
            eos_token_id=ends, min_new_tokens=NEW,
        )  # fmt: skip
    raw, scores = _raw(output), torch.stack(output.scores)
    copies = choice.get("num_beams", 1)
    for row, end in enumerate(ends):
        first = raw[0, row * copies]
        assert first.argmax() == end and (first > first.max() - 1e3).sum() == 1
    answers = output.sequences[:, inputs["input_ids"].shape[1] :]
    assert answers.shape == (3, NEW) and not torch.isin(answers, torch.tensor(ends)).any()
    assert not raw.isnan().any() and not scores.isnan().any()
    # Twice as many candidates as beams, that a beam search wants, and chances that add up to 1.
    assert ((scores > -torch.inf).sum(-1) >= (1 if "top_p" in choice else 2 * copies)).all()
    if copies == 1:
        chances = scores.softmax(-1)
        assert torch.allclose(chances.sum(-1), torch.ones(NEW, 3))
        assert (chances.gather(2, answers.T[:, :, None]) > 0).all()


def test_every_plausibility_leaves_a_beam_search_its_candidates() -> None:
    model, inputs = family("llava").model, _inputs("llava")
    for contrast in CONTRASTS:
        with vlmfix.wrapped(model, f"{contrast}:beta=0.999"):
            output = _generate(model, inputs, num_beams=4, suppress_tokens=None)
        finite = torch.stack(output.scores).isfinite().sum(-1)
        assert (finite >= 8).all()
