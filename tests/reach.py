"""Which methods are right on which families: every method on one tiny model, and how it was judged.

A cell is one method on one family:

    right      every check below passes
    refused    `wrap` refuses, and doctor gives the same reason
    late       `wrap` takes it and a run refuses it
    wrong      a check fails: another answer than it should be, and nothing is said
    crash      an error that is not vlmfix's own

The checks: the identity is bit-equal, in a forward and in generate(); the null edit leaves logits
alone; the strong setting changes them, by its own count too; generate()'s first step equals the
forward; a left-padded batch of two equals the prompts alone; no cache equals a cache; the plain
model is bit-equal afterwards; and, where there is one, an oracle that shares no code with vlmfix's
engine. What the plain model itself does not keep (transformers' own faults) is not asked for.

docs/models.md shows the outcomes, docs/models/cells.json holds them, and tests/test_reach.py runs
them: `python docs/generate.py --models` writes both.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from matrix import ROWS, Row, changed
from reach_oracles import Edit, oracle
from tiny import BUILDERS, TinyFamily, build
from tiny_configs import IMAGE

import vlmfix
from vlmfix.analysis.doctor import examine
from vlmfix.base.contrast import Prompt
from vlmfix.errors import UnsupportedModel, VlmfixError
from vlmfix.families import ModelInfo, describe_model, vision_arguments
from vlmfix.methods.avc import AttentionalVisionCalibration
from vlmfix.methods.noise import noised
from vlmfix.methods.steer import SteeringVectors

State = Literal["right", "refused", "late", "wrong", "crash"]
METHODS = tuple(row.name for row in ROWS)
#: Families that are no vision-language model, or only a second name of the same code.
LEFT_OUT = ("llama",)
NAMES = tuple(name for name in BUILDERS if name not in LEFT_OUT)

_LENGTHS = {"gemma3": (2, 3), "aya_vision": (2, 3)}  # their windows must still hold the image
_STEPS = 4


@dataclass(frozen=True)
class Cell:
    """The outcome of one method on one family; `why` is "" where it is right."""

    state: State
    why: str = ""


@dataclass(frozen=True)
class Reached:
    """The outcomes of all methods on one family.

    model_type: as its configuration says.
    plain: checks that the plain model does not pass, so that no method is asked to.
    """

    model_type: str
    plain: tuple[str, ...]
    cells: dict[str, Cell]


class _Wrong(Exception):
    """A check failed."""


# -- running -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Answer:
    """Greedy: tokens (B, T), and float32 logits (T, B, V) as they were sampled from."""

    tokens: torch.Tensor
    logits: torch.Tensor


def _fresh(inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if torch.is_tensor(v) else copy.copy(v) for k, v in inputs.items()}


def _forward(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """(B, V) float32 logits of the last row."""
    with torch.no_grad():
        logits: torch.Tensor = model(**_fresh(inputs)).logits[:, -1].float()
    return logits


def _generate(model: Any, inputs: dict[str, Any], **kwargs: Any) -> _Answer:
    with torch.no_grad():
        output = model.generate(
            **_fresh(inputs),
            max_new_tokens=_STEPS,
            min_new_tokens=_STEPS,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=2,
            suppress_tokens=list(range(90, 100)),
            return_dict_in_generate=True,
            output_logits=True,
            **kwargs,
        )
    tokens = output.sequences[:, -_STEPS:]
    return _Answer(tokens, torch.stack([step.float() for step in output.logits]))


def _far(one: torch.Tensor, other: torch.Tensor, tolerance: float = 2e-3) -> str | None:
    """How far two sets of logits are apart, in words; None: alike within rounding."""
    # Tokens that a method or the model rules out are at minus infinity, or nearly there.
    scale = max(1.0, float(other[other.abs() < 5e3].abs().max()))
    one, other = one.clamp(-5e3, 5e3), other.clamp(-5e3, 5e3)
    if not bool(one.isfinite().all()):
        return "not finite"
    apart = float((one - other).abs().max()) / scale
    return None if apart <= tolerance else f"logits are {apart:.2g} of their scale apart"


def _differs(one: _Answer, other: _Answer, row: int, other_row: int) -> str | None:
    """Where two answers part, in words, compared as far as they wrote the same tokens."""
    for step in range(_STEPS):
        far = _far(one.logits[step, row], other.logits[step, other_row])
        if far:
            return f"step {step}: {far}"
        if int(one.tokens[row, step]) != int(other.tokens[other_row, step]):
            return None  # a tie
    return None


def _require(far: str | None, what: str) -> None:
    if far:
        raise _Wrong(f"{what}: {far}")


# -- a family ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Case:
    """One family, its inputs, and what the plain model answers."""

    tiny: TinyFamily
    inputs: dict[str, Any]
    singles: tuple[dict[str, Any], ...]
    plain: torch.Tensor
    answer: _Answer
    faults: frozenset[str]

    @property
    def model(self) -> Any:
        return self.tiny.model

    @property
    def image(self) -> torch.Tensor:
        """(B, L) bool, the visual tokens."""
        mask = self.inputs.get("image_embeds_position_mask")
        return self.inputs["input_ids"] == IMAGE if mask is None else mask.bool()

    def batch(self, seed: int) -> dict[str, Any]:
        return self.tiny.inputs(2, seed=seed, lengths=_LENGTHS.get(self.tiny.name))


def _case(name: str) -> _Case:
    tiny = build(name)
    inputs = tiny.inputs(2, seed=0, lengths=_LENGTHS.get(name))
    singles = tuple(tiny.single(inputs, row) for row in range(2))
    plain, answer = _forward(tiny.model, inputs), _generate(tiny.model, inputs)
    case = _Case(tiny, inputs, singles, plain, answer, frozenset())
    # A shorter prompt, too: sparse attention chooses other keys once padding is among them.
    inputs = tiny.inputs(2, seed=0, lengths=(3, 5))
    singles = tuple(tiny.single(inputs, row) for row in range(2))
    shorter = dataclasses.replace(
        case,
        inputs=inputs,
        singles=singles,
        plain=_forward(tiny.model, inputs),
        answer=_generate(tiny.model, inputs),
    )
    faults = {
        check.__name__
        for check in (batch, no_cache, first_step)
        if _fails(check, case) or _fails(check, shorter)
    }
    return dataclasses.replace(case, faults=frozenset(faults))


def _fails(check: _Check, case: _Case) -> bool:
    try:
        check(case, case.plain, case.answer)
    except Exception:  # an error of the plain model's own, as without a cache on some families
        return True
    return False


_Check = Callable[[_Case, torch.Tensor, _Answer], None]


def batch(case: _Case, logits: torch.Tensor, answer: _Answer) -> None:
    """The left-padded batch says what the prompts alone say."""
    for row, single in enumerate(case.singles):
        _require(_far(logits[row], _forward(case.model, single)[0]), f"row {row} alone")
        _require(_differs(answer, _generate(case.model, single), row, 0), f"row {row} alone")


def no_cache(case: _Case, logits: torch.Tensor, answer: _Answer) -> None:
    """The same without a KV cache."""
    bare = _generate(case.model, case.inputs, use_cache=False)
    for row in range(2):
        _require(_differs(answer, bare, row, row), "without a cache")


def first_step(case: _Case, logits: torch.Tensor, answer: _Answer) -> None:
    """generate() starts with what the forward says."""
    _require(_far(answer.logits[0], logits), "generate() against the forward")


def reach(name: str) -> Reached:
    """Run every method on one family of `tiny.BUILDERS`."""
    case = _case(name)
    return Reached(str(case.model.config.model_type), tuple(sorted(case.faults)), _cells(case))


def _cells(case: _Case) -> dict[str, Cell]:
    try:
        report = examine(case.model)
        info = describe_model(case.model)
    except VlmfixError as error:
        return {row.name: _refused_whole(case, row, str(error), report) for row in ROWS}
    except Exception as error:
        return dict.fromkeys(METHODS, Cell("crash", f"doctor: {_where(error)}"))
    told = {fit["name"]: fit for fit in report["methods"]}
    return {row.name: _cell(case, info, _fitted(case, info, row), told[row.name]) for row in ROWS}


def _refused_whole(case: _Case, row: Row, why: str, report: dict[str, Any]) -> Cell:
    try:
        vlmfix.wrap(case.model, row.strong)
    except VlmfixError as error:
        same = not report["supported"] and report["reason"] == why == str(error)
        return Cell("refused", why) if same else Cell("late", f"doctor: {report['reason']}")
    vlmfix.unwrap(case.model)
    return Cell("wrong", "wrap takes a model that describe_model refuses")


def _fitted(case: _Case, info: ModelInfo, row: Row) -> Row:
    """The row's settings for the layers, heads and width of this family."""
    at = sorted(info.attention)
    fields: dict[str, Any] = {}
    match row.name:
        case "ad_hh":
            fields["heads"] = tuple(
                f"{i}.{head}" for i in at[-2:] for head in range(info.heads_of(i))
            )
        case "head_pursuit":
            fields["heads"] = (f"{at[0]}.0", f"{at[-1]}.{info.heads_of(at[-1]) - 1}")
        case "gift":
            fields |= {"saliency_layer": at[0], "edited_layers": tuple(at)}
        case "ptp":
            fields["instruction_layer"] = at[min(1, len(at) - 1)]
        case "vaf":
            fields |= {"start_layer": 0, "end_layer": info.num_layers}
        case "steer":
            fields["vectors"] = _vectors(info)
        case "avc" | "m3id" | "pai_guidance" | "rbd" | "vcd":
            # Whether a token is plausible is a step: near it, rounding would look like a fault.
            fields["beta"] = 0.0
        case "var":
            return _with_sinks(case, row)
    settings = {
        name: dataclasses.replace(getattr(row, name), **fields)
        for name in ("strong", "identity", "null")
    }
    return dataclasses.replace(row, **settings)


def _vectors(info: ModelInfo) -> SteeringVectors:
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(2, info.hidden_size, generator=generator)
    one, other = torch.nn.functional.normalize(directions, dim=1)
    return SteeringVectors({0: one, info.num_layers - 1: other}, "random")


def _with_sinks(case: _Case, row: Row) -> Row:
    """VAR with the first threshold under which this random model has sinks, and tokens beside."""
    for tau in (1.5, 1.8, 2.1, 2.4, 1.2):
        fields = {"tau": tau, "rho": 0.0, "minimum_visual_mass": 0.0}
        settings = {
            name: dataclasses.replace(getattr(row, name), **fields)
            for name in ("strong", "identity", "null")
        }
        found = dataclasses.replace(row, **settings)
        with contextlib.suppress(Exception), vlmfix.wrapped(case.model, found.strong):
            moved = (_forward(case.model, case.inputs) - case.plain).abs().amax(1)
            if changed(case.model) > 0 and float(moved.min()) > 1e-3:
                return found
    return row


# -- a cell --------------------------------------------------------------------------------------


def _cell(case: _Case, info: ModelInfo, row: Row, told: dict[str, Any]) -> Cell:
    try:
        with vlmfix.wrapped(case.model, row.strong):
            pass
    except VlmfixError as error:
        if told["fits"]:
            return Cell("late", f"wrap: {error}; doctor: {told['why']}")
        return Cell("refused", str(error))
    except Exception as error:
        return Cell("crash", _where(error))
    try:
        for check in (_identity, _null, _strong):
            check(case, info, row)
        _untouched(case)
    except _Wrong as error:
        return Cell("wrong", str(error))
    except VlmfixError as error:
        return Cell("late", f"{type(error).__name__}: {error}")
    except Exception as error:
        return Cell("crash", _where(error))
    return Cell("right")


def _where(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return (
        f"{type(error).__name__}: {str(error)[:200]} ({Path(frame.filename).name}:{frame.lineno})"
    )


def _untouched(case: _Case) -> None:
    if not torch.equal(_forward(case.model, case.inputs), case.plain):
        raise _Wrong("the model is not what it was before wrap")


def _identity(case: _Case, info: ModelInfo, row: Row) -> None:
    with vlmfix.wrapped(case.model, row.identity):
        if not torch.equal(_forward(case.model, case.inputs), case.plain):
            raise _Wrong("identity: the forward differs")
        answer = _generate(case.model, case.inputs)
    if not torch.equal(answer.logits, case.answer.logits):
        raise _Wrong("identity: generate() differs")


def _null(case: _Case, info: ModelInfo, row: Row) -> None:
    with vlmfix.wrapped(case.model, row.null):
        logits, answer = _forward(case.model, case.inputs), _generate(case.model, case.inputs)
    # Contrastive methods may return log-probabilities: the same up to a constant per row.
    _require(_far(logits.log_softmax(-1), case.plain.log_softmax(-1)), "null edit, forward")
    edited = dataclasses.replace(answer, logits=answer.logits.log_softmax(-1))
    plain = dataclasses.replace(case.answer, logits=case.answer.logits.log_softmax(-1))
    for at in range(2):
        _require(_differs(edited, plain, at, at), "null edit, generate()")


def _strong(case: _Case, info: ModelInfo, row: Row) -> None:
    model = case.model
    with vlmfix.wrapped(model, row.strong):
        logits = _forward(model, case.inputs)
        counted = changed(model)
        answer = _generate(model, case.inputs)
        counted = min(counted, changed(model))
        if not counted:
            raise _Wrong("nothing is edited, by its own count")
        for name, moved in (
            ("forward", logits - case.plain),
            ("generate()", answer.logits[0] - case.answer.logits[0]),
        ):
            if float(moved.abs().max()) < 1e-3:
                raise _Wrong(f"{name}: the logits are those of the plain model")
        for check in (batch, no_cache, first_step):
            if check.__name__ not in case.faults:
                check(case, logits, answer)
    own = _ORACLES.get(row.name)
    if own is not None:
        own(case, info, row, logits, answer)


# -- oracles -------------------------------------------------------------------------------------


def _against_eager(case: _Case, info: ModelInfo, edit: Edit, logits: torch.Tensor) -> None:
    """Logits (B, V) of a method are those of the edit, where eager attention is the model's own."""
    with oracle(case.model, info, Edit(case.image)):
        plain = _forward(case.model, case.inputs)
    with oracle(case.model, info, edit):
        wanted = _forward(case.model, case.inputs)
    for at in range(2):
        # A row that sees nothing but padding is not the same in eager and in sdpa attention.
        if not _far(plain[at], case.plain[at]):
            _require(_far(logits[at], wanted[at]), f"row {at} against eager attention with a mask")


def _pai(case: _Case, info: ModelInfo, row: Row, logits: torch.Tensor, answer: _Answer) -> None:
    edit = Edit(case.image, lift=row.strong.alpha)  # type: ignore[attr-defined]
    _against_eager(case, info, edit, logits)


def _fastv(case: _Case, info: ModelInfo, row: Row, logits: torch.Tensor, answer: _Answer) -> None:
    layer = row.strong.prepared(info, case.model).layer  # type: ignore[attr-defined]
    _against_eager(case, info, Edit(case.image, first=layer, choose=0.5), logits)


def _selection(
    case: _Case, info: ModelInfo, row: Row, logits: torch.Tensor, answer: _Answer
) -> None:
    text = case.model.config.get_text_config(decoder=True)
    kinds = set(getattr(text, "layer_types", None) or ())
    if len(info.attention) < info.num_layers or kinds - {"full_attention"}:
        return  # what is dropped there cannot be hidden by a mask
    method = dataclasses.replace(row.strong, positions="original")  # type: ignore[type-var]
    try:
        with vlmfix.wrapped(case.model, method):
            pass
    except UnsupportedModel:
        return  # a mask leaves positions where they are, and this model cannot
    hidden = torch.zeros_like(case.image)
    for at, images in enumerate(vlmfix.visual_tokens(case.model, case.inputs, method)):
        places, first = case.image[at].nonzero().flatten(), 0
        gone = torch.ones(len(places), dtype=torch.bool)
        for image in images:
            gone[first + image.index] = False
            first += image.count
        if first != len(places):
            return  # newlines among the placeholders, which stay with their rows
        hidden[at, places[gone]] = True
    if not bool(hidden.any()):
        raise _Wrong("no visual token is dropped")
    with vlmfix.wrapped(case.model, method):
        own = _forward(case.model, case.inputs)
    _against_eager(case, info, Edit(case.image, hidden=hidden), own)


def _vcd(case: _Case, info: ModelInfo, row: Row, logits: torch.Tensor, answer: _Answer) -> None:
    ids, mask = case.inputs["input_ids"], case.inputs["attention_mask"].bool()
    vision = vision_arguments(case.model, case.inputs)
    prompt = Prompt(info, ids, mask, case.image, vision)
    noisy = _forward(case.model, {**case.inputs, **noised(prompt, 999, 0)})
    if float((noisy - case.plain).abs().max()) < 1e-3:
        raise _Wrong("the noise does not reach the model")
    method = dataclasses.replace(row.strong, beta=0.0)  # type: ignore[type-var]
    with vlmfix.wrapped(case.model, method):
        own = _forward(case.model, case.inputs)
    _require(_far(own, 2 * case.plain - noisy), "against two plain forwards")


def _m3id(case: _Case, info: ModelInfo, row: Row, logits: torch.Tensor, answer: _Answer) -> None:
    layout, blind = case.tiny.layout, []
    marks = torch.tensor((*layout.before, *layout.after), dtype=torch.long)
    for with_marks in (True, False):
        rows = []
        for single, image in zip(case.singles, case.image, strict=True):
            ids = single["input_ids"][0]
            keep = ~image[-len(ids) :]
            keep &= with_marks | ~torch.isin(ids, marks)
            text = {name: value[:, keep] for name, value in single.items() if name in _TEXT}
            rows.append(_forward(_reader(case.model), {**text, **_no_image(text)})[0])
        blind.append(torch.stack(rows).log_softmax(-1))
    method = dataclasses.replace(row.strong, beta=0.0)  # type: ignore[type-var]
    with vlmfix.wrapped(case.model, method):
        own = _forward(case.model, case.inputs)
    weight = float(torch.expm1(torch.tensor(method.decay)))  # type: ignore[attr-defined]
    plain = case.plain.log_softmax(-1)
    # A marker without its image stays in the prompt or goes; both are prompts without an image.
    far = [_far(own, plain + weight * (plain - other)) for other in blind]
    if all(far):
        raise _Wrong(f"against the prompt without its image: {far[0]}")


def _reader(model: Any) -> Any:
    """What runs a prompt without an image: where the model itself cannot, its language model."""
    pixels = inspect.signature(model.forward).parameters.get("pixel_values")
    required = pixels is not None and pixels.default is inspect.Parameter.empty
    return model.language_model if required else model


_TEXT = (
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "mm_token_type_ids",
    "moe_mm_token_type_ids",
)


def _no_image(text: dict[str, Any]) -> dict[str, Any]:
    return {name: torch.zeros_like(value) for name, value in text.items() if "type" in name}


def _avc(case: _Case, info: ModelInfo, row: Row, logits: torch.Tensor, answer: _Answer) -> None:
    """A branch in which every visual token is masked must not depend on the pixels."""
    pixels = {
        k: v for k, v in case.batch(5).items() if torch.is_tensor(v) and v.is_floating_point()
    }
    both = (case.inputs, {**case.inputs, **pixels})
    plain = [_forward(case.model, inputs) for inputs in both]
    if float((plain[0] - plain[1]).abs().max()) < 1e-3:
        raise _Wrong("the plain model does not see the pixels")
    blind = AttentionalVisionCalibration(alpha=1.0, beta=0.0, deviations=1000.0)
    with vlmfix.wrapped(case.model, blind):
        contrasted = [_forward(case.model, inputs) for inputs in both]
    one, other = (2 * base - own for base, own in zip(plain, contrasted, strict=True))
    _require(_far(one, other, 5e-3), "the branch without visual tokens sees the image")


_Oracle = Callable[[_Case, ModelInfo, Row, torch.Tensor, _Answer], None]
_ORACLES: dict[str, _Oracle] = {
    "pai": _pai,
    "fastv": _fastv,
    "divprune": _selection,
    "hiprune": _selection,
    "random": _selection,
    "uniform": _selection,
    "ptp": _selection,
    "vcd": _vcd,
    "m3id": _m3id,
    "avc": _avc,
}


def outcomes(names: tuple[str, ...] = NAMES) -> Iterator[tuple[str, Reached]]:
    """Run these families, one after the other."""
    for name in names:
        yield name, reach(name)
