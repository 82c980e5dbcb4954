"""InstructBLIP and BLIP-2, whose own generate() runs the language model inside on embeddings."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers as hf
from contrast_oracle import Inputs, Oracle
from matrix import MODES, ROWS, family, logits
from prompts import state
from tiny import PER_POSITION, build, generate_kwargs
from tiny_configs import IMAGE
from transformers import CompileConfig, DynamicCache, LogitsProcessorList
from transformers.generation import SuppressTokensLogitsProcessor

import vlmfix
import vlmfix.engine.attention
from vlmfix.base.contrast import ContrastMethod
from vlmfix.errors import BadInput, UnsupportedModel
from vlmfix.families import describe_model
from vlmfix.methods.pai import PayAttentionToImage

STRONG: dict[str, Any] = {row.name: row.strong for row in ROWS}
NAMES = ("instructblip", "blip_2")
METHODS = [
    row for row in ROWS if row.name not in ("hiprune", "imba", "ptp", "uniform", "visionzip")
]
"""Those that need no token per patch, which a Q-Former does not make."""

CONTRASTS = ("avc", "m3id", "rbd", "vcd")
NEVER = [2, *range(90, 100)]


def _generate(model: Any, inputs: Inputs, **kwargs: Any) -> Any:
    torch.manual_seed(5)
    wanted = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}
    arguments = generate_kwargs(suppress_tokens=NEVER, **wanted)
    return model.generate(**inputs, **(arguments | kwargs))


def _same(one: Any, other: Any) -> bool:
    return torch.equal(one.sequences, other.sequences) and all(
        torch.equal(a, b) for a, b in zip(one.logits, other.logits, strict=True)
    )


@cache
def _plain(name: str, mode: str) -> Any:
    return _generate(family(name).model, family(name).inputs(3), **MODES[mode])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_tokens_and_logits_are_those_of_the_models_own_generate(name: str, mode: str) -> None:
    tiny = family(name)
    inputs, plain = tiny.inputs(3), _plain(name, mode)
    identity = [row.identity for row in METHODS if row.name in ("pai", "vcd", "divprune")]
    with vlmfix.wrapped(tiny.model, identity):
        passes = []
        hook = tiny.model.register_forward_hook(lambda *_: passes.append(1))
        assert _same(_generate(tiny.model, inputs, **MODES[mode]), plain)
        assert len(passes) == vlmfix.last_call(tiny.model).passes == 6
        with vlmfix.using(tiny.model, None):
            assert _same(_generate(tiny.model, inputs, **MODES[mode]), plain)
        assert len(passes) == 6  # the model's own generate() runs no forward of the model
        hook.remove()


@pytest.mark.rotated
@pytest.mark.parametrize("row", METHODS, ids=lambda row: row.name)
@pytest.mark.parametrize("name", NAMES)
def test_a_method(name: str, row: Any) -> None:
    """Identity, a strong setting, rows alone, with and without a cache, and unwrapped again."""
    tiny = family(name)
    inputs = tiny.inputs(2)
    before, plain = state(tiny.model), logits(tiny.model, inputs)
    tokens = _generate(tiny.model, inputs)
    with vlmfix.wrapped(tiny.model, row.identity):
        assert torch.equal(logits(tiny.model, inputs), plain)
        assert _same(_generate(tiny.model, inputs), tokens)
    with vlmfix.wrapped(tiny.model, row.strong):
        strong = logits(tiny.model, inputs)
        assert (strong - plain).abs().max() > 1e-2
        alone = torch.cat([logits(tiny.model, tiny.single(inputs, index)) for index in range(2)])
        assert torch.allclose(
            alone, strong, rtol=0, atol=1e-3
        )  # of 1e4, where a token is ruled out
        got = _generate(tiny.model, inputs)
        assert torch.allclose(got.logits[0], strong, rtol=0, atol=1e-3)
        ones = inputs["attention_mask"].new_ones(2, 5)
        longer = {
            **inputs,
            "input_ids": got.sequences[:, :-1],
            "attention_mask": torch.cat([inputs["attention_mask"], ones], 1),
        }
        uncached = logits(
            tiny.model, longer, prompt_length=inputs["input_ids"].shape[1], use_cache=False
        )
        assert torch.allclose(uncached, got.logits[-1], rtol=0, atol=1e-3)
    assert torch.equal(logits(tiny.model, inputs), plain)
    assert _same(_generate(tiny.model, inputs), tokens)
    assert state(tiny.model) == before


@pytest.mark.rotated
@pytest.mark.parametrize("method", ["pai", "var", "vhr", "gift", "divprune", "fastv", *CONTRASTS])
@pytest.mark.parametrize("name", NAMES)
def test_placeholders_in_front_of_the_padding_as_the_processor_puts_them(
    name: str, method: str
) -> None:
    tiny = family(name)
    inputs = tiny.inputs(2)
    image = inputs["input_ids"] == IMAGE
    order = image.long().argsort(dim=1, descending=True, stable=True)
    for part in ("input_ids", "attention_mask"):
        inputs[part] = inputs[part].gather(1, order)
    assert inputs["attention_mask"][0, 4:8].sum() < 4 <= inputs["attention_mask"][0, :4].sum()
    with vlmfix.wrapped(tiny.model, STRONG[method]):
        got = _generate(tiny.model, inputs)
        beams = _generate(tiny.model, inputs, num_beams=2)
        for row in range(2):
            single = tiny.single(inputs, row)
            alone = _generate(tiny.model, single)
            for one, other in zip(alone.logits, got.logits, strict=True):
                _close(one[0], other[row])
            length = len(single["input_ids"][0])
            wanted = _generate(tiny.model, single, num_beams=2).sequences[0, length:]
            assert torch.equal(beams.sequences[row, inputs["input_ids"].shape[1] :], wanted)


@pytest.mark.parametrize("rows", [2, 3, 64])
def test_rows_behind_such_padding_in_pieces_and_where_every_prompt_has_some(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GIFT compares each row of the question with the one before it."""
    tiny = family("instructblip")
    inputs = tiny.inputs(1)
    image = inputs["input_ids"][:, 2:6]  # behind the first token and one of text
    gap = torch.zeros(1, 5, dtype=torch.long)
    apart = {
        **inputs,
        "input_ids": torch.cat([image, gap, inputs["input_ids"][:, 6:]], 1),
        "attention_mask": torch.cat([gap[:, :4] + 1, gap, inputs["attention_mask"][:, 6:]], 1),
    }
    alone = tiny.single(apart, 0)
    with vlmfix.wrapped(tiny.model, STRONG["gift"]):
        wanted = _generate(tiny.model, alone)
        monkeypatch.setattr(vlmfix.engine.attention, "_chunk", lambda inputs: rows)
        got = _generate(tiny.model, apart)
    for one, other in zip(got.logits, wanted.logits, strict=True):
        _close(one, other)


@pytest.mark.parametrize("name", NAMES)
def test_an_edit_of_nearly_nothing_changes_nearly_nothing(name: str) -> None:
    tiny = family(name)
    inputs = tiny.inputs(2)
    with vlmfix.wrapped(tiny.model, PayAttentionToImage(alpha=1e-6, start_layer=0)):
        got = _generate(tiny.model, inputs)
        assert vlmfix.last_call(tiny.model).edited_rows > 0
    plain = _generate(tiny.model, inputs)
    for one, other in zip(got.logits, plain.logits, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-4)


# -- branches, against an oracle that runs the model's own forward ---------------------------------


class InnerOracle(Oracle):
    """Without an image the language model inside runs, which the model's own forward refuses."""

    def _forward(self, inputs: Inputs, **kwargs: Any) -> torch.Tensor:
        if "pixel_values" in inputs:
            return super()._forward(inputs, **kwargs)
        inputs = {name: value for name, value in inputs.items() if name in PER_POSITION}
        with torch.no_grad():
            output = self.tiny.model.language_model(**inputs, use_cache=False)
        found: torch.Tensor = output.logits[0, -1].float()
        return found


@cache
def _oracle(name: str, contrast: str) -> Oracle:
    tiny = family(name)
    inputs = tiny.inputs(3)
    method = STRONG[contrast].prepared(describe_model(tiny.model), tiny.model)
    assert isinstance(method, ContrastMethod)
    return InnerOracle(tiny, [tiny.single(inputs, row) for row in range(3)], method)


def _close(one: torch.Tensor, other: torch.Tensor) -> None:
    one, other = one.log_softmax(-1), other.log_softmax(-1)
    likely = other > -1e3
    assert torch.equal(one > -1e3, likely)
    assert torch.allclose(one[likely], other[likely], rtol=0, atol=1e-4)


@pytest.mark.rotated
@pytest.mark.parametrize("mode", ["greedy", "beam", "sampling", "returns", "static cache"])
@pytest.mark.parametrize("contrast", CONTRASTS)
@pytest.mark.parametrize("name", NAMES)
def test_branches_equal_the_oracle(name: str, contrast: str, mode: str) -> None:
    """With VCD the noised image goes through the vision model and the Q-Former."""
    tiny, oracle, arguments = family(name), _oracle(name, contrast), dict(MODES[mode])
    inputs = tiny.inputs(3)
    with vlmfix.wrapped(tiny.model, STRONG[contrast]):
        got = _generate(tiny.model, inputs, **arguments)
        report = vlmfix.last_call(tiny.model)
    assert report.streams == 1 + STRONG[contrast].streams() and report.contrasted_rows > 0
    processors = LogitsProcessorList([oracle.processor(), SuppressTokensLogitsProcessor(NEVER)])
    arguments.pop("cache_implementation", None)
    wanted = _generate(
        tiny.model, inputs, logits_processor=processors, suppress_tokens=None, **arguments
    )
    assert torch.equal(got.sequences, wanted.sequences)
    for one, other in zip(got.scores, wanted.scores, strict=True):
        _close(one, other)


@pytest.mark.parametrize("contrast", CONTRASTS)
@pytest.mark.parametrize("name", NAMES)
def test_forwards_behind_each_other_outside_of_generate(name: str, contrast: str) -> None:
    """Prompts are padded, and OPT counts positions by the mask where it is given none."""
    tiny, oracle = family(name), _oracle(name, contrast)
    inputs = tiny.inputs(3)
    mask = inputs["attention_mask"]
    with vlmfix.wrapped(tiny.model, STRONG[contrast]):
        cache = DynamicCache(config=tiny.model.config.get_text_config())
        got = [logits(tiny.model, inputs, past_key_values=cache)]
        for token in (11, 12):
            ids = torch.full((3, 1), token)
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
            step = {"input_ids": ids, "attention_mask": mask}
            got.append(logits(tiny.model, step, past_key_values=cache))
    for length, one in enumerate(got):
        answer = torch.tensor([11, 12])[:length]
        _close(one, torch.stack([oracle.logits(row, answer) for row in range(3)]))


# -- how it is called ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_arguments_by_position_in_the_models_own_order(name: str) -> None:
    tiny = family(name)
    inputs = tiny.inputs(2)
    order = ["pixel_values", "qformer_input_ids", "qformer_attention_mask"]
    args = [inputs[key] for key in (*order, "input_ids", "attention_mask") if key in inputs]
    for stack in ("pai:alpha=0.5;start_layer=0", None):
        with vlmfix.wrapped(tiny.model, stack):
            named, by_position = logits(tiny.model, inputs), tiny.model(*args).logits[:, -1]
            assert torch.equal(named, by_position)
            wanted = tiny.model.generate(**inputs, **generate_kwargs())
            assert torch.equal(tiny.model.generate(*args, **generate_kwargs()), wanted)


@pytest.mark.parametrize("name", NAMES)
def test_what_its_own_generate_reads_from_the_language_model_inside(name: str) -> None:
    tiny = build(name)
    inputs = tiny.inputs(1)
    inputs.pop("attention_mask")  # the model's own makes one of ones, padding ids or not
    inputs["input_ids"][0, -2] = 0
    ends = tiny.model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, -3:].tolist()
    tiny.model.language_model.generation_config.eos_token_id = ends
    tiny.model.generation_config.eos_token_id = 98
    plain = tiny.model.generate(**inputs, max_new_tokens=4, do_sample=False)
    with vlmfix.wrapped(tiny.model, "var:keep=1;sink_channels=0"):
        got = tiny.model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert got.tolist() == plain.tolist()
    assert got.shape[1] < inputs["input_ids"].shape[1] + 4


def test_its_own_output_still_has_what_it_had() -> None:
    tiny = family("instructblip")
    inputs = tiny.inputs(1)
    with torch.no_grad():
        plain = tiny.model(**inputs)
        with vlmfix.wrapped(tiny.model, None):
            output = tiny.model(**inputs, use_cache=True)
            pair = tiny.model(**inputs, return_dict=False)
    for part in ("vision_outputs", "qformer_outputs"):
        assert torch.equal(output[part].last_hidden_state, plain[part].last_hidden_state)
    assert torch.equal(output.logits, plain.logits) and torch.equal(pair[0], plain.logits)
    assert output.past_key_values is output.language_model_outputs.past_key_values


def test_prompts_without_an_image() -> None:
    tiny = family("instructblip")
    ids = torch.tensor([[0, 0, 1, 5, 9, 20, 31], [1, 7, 11, 30, 41, 52, 63]])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    wanted = tiny.model.language_model.generate(**inputs, **generate_kwargs())
    for stack in ("pai:alpha=0.5;start_layer=0", STRONG["m3id"]):
        with vlmfix.wrapped(tiny.model, stack):
            assert torch.equal(tiny.model.generate(**inputs, **generate_kwargs()), wanted)


def test_a_compiled_stack_equals_eager() -> None:
    tiny = build("instructblip")
    inputs = tiny.inputs(2)
    config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    config._compile_all_devices = True
    torch.compiler.reset()
    with vlmfix.wrapped(tiny.model, [STRONG["pai"], STRONG["m3id"]]):
        wanted = _generate(tiny.model, inputs)
        got = _generate(tiny.model, inputs, cache_implementation="static", compile_config=config)
    assert torch.equal(got.sequences, wanted.sequences)
    for one, other in zip(got.logits, wanted.logits, strict=True):
        _close(one, other)


# -- refused ---------------------------------------------------------------------------------------


def test_images_without_placeholders_and_captions_without_a_prompt_are_refused() -> None:
    tiny = family("instructblip")
    inputs = tiny.inputs(1)
    with vlmfix.wrapped(tiny.model, STRONG["pai"]):
        with pytest.raises(BadInput, match="no image token"):
            _generate(tiny.model, {**inputs, "input_ids": inputs["input_ids"] % IMAGE + 1})
        with pytest.raises(BadInput, match="no input_ids"):
            tiny.model.generate(pixel_values=inputs["pixel_values"])


def test_relatives_that_are_refused_and_why() -> None:
    text = hf.T5Config(
        vocab_size=100, d_model=64, d_ff=96, d_kv=16, num_layers=2, num_heads=4
    ).to_dict()
    config = build("instructblip").model.config.to_dict()
    config = hf.InstructBlipConfig(
        vision_config=config["vision_config"], qformer_config=config["qformer_config"],
        text_config=text, num_query_tokens=4, image_token_index=IMAGE,
    )  # fmt: skip
    with pytest.raises(UnsupportedModel, match="encoder-decoder"):
        vlmfix.wrap(hf.InstructBlipForConditionalGeneration(config).eval(), "pai")
    assert "videos alone" in vlmfix.families.REFUSED["instructblipvideo"]
