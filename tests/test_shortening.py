"""Prompts that are cut before generate(): what methods are told, and what the model then gets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from matrix import family
from tiny import FAMILIES, TinyFamily, build, generate_kwargs
from tiny_configs import IMAGE
from torch import Tensor

import vlmfix
from vlmfix.errors import BadInput
from vlmfix.families import ModelInfo
from vlmfix.pruning import Kept, TokenMethod, VisualTokens
from vlmfix.session import SESSION
from vlmfix.shortening import shorten

Inputs = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Probe(TokenMethod):
    """Keeps every other token, and what it was told."""

    layer: int | None = None
    told: list[VisualTokens] = field(default_factory=list)

    name: ClassVar[str] = "probe"
    __hash__ = object.__hash__

    def relevance_layer(self, info: ModelInfo) -> int | None:
        return self.layer

    def keep(self, visual: VisualTokens, budget: int) -> Kept:
        self.told.append(visual)
        return Kept(torch.arange(len(visual))[::2][:budget])


@dataclass(frozen=True, eq=False)
class Pictures(Probe):
    """The same, with the tiles of a picture joined."""

    whole_pictures: ClassVar[bool] = True


@dataclass(frozen=True)
class Ragged(TokenMethod):
    """Keeps one token of the first image of a prompt, two of the second, and so on."""

    name: ClassVar[str] = "ragged"

    def keep(self, visual: VisualTokens, budget: int) -> Kept:
        return Kept(torch.arange(min(budget, 1 + visual.number)))


# -- relevance ------------------------------------------------------------------------------------


def told(model: Any, inputs: Inputs, layer: int) -> list[Tensor]:
    probe = Probe(layer=layer, ratio=0.5)
    with vlmfix.wrapped(model, probe), torch.no_grad():
        model(**inputs)
    found = [visual.relevance for visual in probe.told]
    assert all(each is not None and each.dtype == torch.float32 for each in found)
    return [each for each in found if each is not None]


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_relevance_is_what_the_question_attends_to(name: str, layer: int) -> None:
    """Of a left-padded batch: the largest of the question's rows, of their means over heads."""
    tiny = build(name)
    inputs = tiny.inputs(batch=3)
    found = told(tiny.model, inputs, layer)
    tiny.model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = tiny.model(**inputs, output_attentions=True).attentions[layer].mean(1)
    for row, relevance in enumerate(found):
        visual = (inputs["input_ids"][row] == IMAGE).nonzero().flatten()
        # Qwen's span ends with a token of its own, which is text like any other.
        rows = weights[row, int(visual[-1]) + 1 :]
        assert len(rows) == 6 + 2 * row + (name == "qwen2_5_vl")
        expected = rows[:, visual].amax(0)
        assert torch.allclose(relevance, expected, atol=1e-6)
        assert not torch.allclose(relevance, rows[:, visual].mean(0), atol=1e-3)
        assert float(relevance.std()) > 1e-3


def test_relevance_reads_the_question_that_it_is_told() -> None:
    tiny = build("llava")
    inputs = tiny.inputs(batch=2)
    asked = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    asked[0, -4:-2] = True
    asked[1, -1] = True
    probe = Probe(layer=1, ratio=0.5)
    with vlmfix.wrapped(tiny.model, probe), torch.no_grad():
        shorten(tiny.model.__dict__[SESSION], probe, inputs, (asked, asked))
    tiny.model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = tiny.model(**inputs, output_attentions=True).attentions[1].mean(1)
    for row, visual in enumerate(probe.told):
        keys = inputs["input_ids"][row] == IMAGE
        assert visual.relevance is not None
        expected = weights[row, asked[row]][:, keys].amax(0)
        assert torch.allclose(visual.relevance, expected, atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_relevance_of_a_batch_equals_singles(name: str) -> None:
    tiny = family(name)
    inputs = tiny.inputs(batch=3)
    together = told(tiny.model, inputs, 1)
    alone = [found for row in range(3) for found in told(tiny.model, tiny.single(inputs, row), 1)]
    assert len(together) == len(alone) == 3
    for one, other in zip(together, alone, strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    assert not torch.allclose(together[0], together[1], atol=1e-4)


@pytest.mark.parametrize("generate", [False, True])
@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_look_ends_with_its_layer(name: str, layer: int, generate: bool) -> None:
    """The layers behind do not run; the one that is watched ends at its attention."""
    tiny = build(name)
    inputs = tiny.inputs(batch=2)
    entered, left = [0] * 3, [0] * 3
    for index, module in enumerate(tiny.model.get_decoder().layers):

        def enter(*_: Any, index: int = index) -> None:
            entered[index] += 1

        def leave(*_: Any, index: int = index) -> None:
            left[index] += 1

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)
    with vlmfix.wrapped(tiny.model, Probe(layer=layer, ratio=0.5)), torch.no_grad():
        if generate:
            tiny.model.generate(**inputs, **generate_kwargs(max_new_tokens=1, min_new_tokens=1))
        else:
            tiny.model(**inputs)
        report = vlmfix.last_call(tiny.model)
    assert entered == [1 + (index <= layer) for index in range(3)]
    assert left == [1 + (index < layer) for index in range(3)]
    assert report.passes == 1


def test_a_look_runs_through_where_accelerate_moves_weights() -> None:
    tiny = build("llava")
    inputs = tiny.inputs(batch=2)
    expected = told(tiny.model, inputs, 0)
    tiny.model.hf_device_map = {"": "cpu"}
    runs = []
    tiny.model.get_decoder().layers[2].register_forward_hook(lambda *_: runs.append(1))
    found = told(tiny.model, inputs, 0)
    assert len(runs) == 2
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_look_leaves_the_model_as_it_was() -> None:
    tiny = build("qwen2_5_vl")
    other, inputs = tiny.inputs(batch=1, lengths=[9]), tiny.inputs(batch=2)
    with torch.no_grad():
        tiny.model(**other)
    before = tiny.model.model.rope_deltas.clone()
    probe = Probe(layer=1, ratio=0.5)
    with vlmfix.wrapped(tiny.model, probe), torch.no_grad():
        session = tiny.model.__dict__[SESSION]
        cut = shorten(session, probe, inputs)
        assert cut is not None and session.frame is None and session.last is None
        assert session.stack.tokens is probe
        given = cut.kwargs["mm_encoder_outputs"]["image"].pooler_output
    assert [len(part) for part in given] == [2, 2]
    # What it leaves is what the shorter prompts need, not what the look or the prompt before had.
    length = cut.kwargs["input_ids"].shape[1]
    deltas = tiny.model.model.rope_deltas
    assert torch.equal(deltas[:, 0], cut.kwargs["position_ids"][1:].amax(dim=(0, 2)) + 1 - length)
    assert deltas.shape != before.shape


def test_a_prompt_that_asks_nothing_behind_its_image() -> None:
    tiny = family("llava")
    inputs = tiny.inputs(batch=2, lengths=[0, 4])
    with (
        vlmfix.wrapped(tiny.model, Probe(layer=1)),
        torch.no_grad(),
        pytest.raises(BadInput, match="probe weighs .* no text behind its image"),
    ):
        tiny.model(**inputs)


# -- pictures that come as tiles ------------------------------------------------------------------


def internvl_prompt(runs: list[list[int]], seed: int = 0) -> Inputs:
    """Prompts of InternVL, per row a list of pictures of so many tiles, padded on the left."""
    rows = []
    for row, pictures in enumerate(runs):
        ids = [1, 9]
        for tiles in pictures:
            ids += [20, *[IMAGE] * (4 * tiles), 21]
        rows.append(ids + [30 + row, 31, 32, *range(40, 40 + row)])
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    generator = torch.Generator().manual_seed(seed)
    count = sum(map(sum, runs))
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "pixel_values": torch.randn(count, 3, 16, 16, generator=generator),
    }


def test_tiles_of_a_picture_come_joined_if_a_method_wants_it() -> None:
    tiny = family("internvl")
    inputs = internvl_prompt([[3, 1], [4]])
    with torch.no_grad():
        features = tiny.model.get_image_features(inputs["pixel_values"]).pooler_output.flatten(0, 1)
    apart, joined = Probe(layer=1, ratio=0.5), Pictures(layer=1, ratio=0.5)
    for probe in (apart, joined):
        with vlmfix.wrapped(tiny.model, probe), torch.no_grad():
            tiny.model(**inputs)
            report = vlmfix.last_call(tiny.model)
        assert torch.equal(torch.cat([visual.features for visual in probe.told]), features)
    assert report.visual_tokens == ((6, 12), (2, 4), (8, 16))
    assert [len(visual) for visual in apart.told] == [4] * 8
    assert [visual.number for visual in apart.told] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert all(visual.whole is None for visual in apart.told)
    assert [len(visual) for visual in joined.told] == [12, 4, 16]
    assert [visual.number for visual in joined.told] == [0, 1, 0]
    assert [visual.whole for visual in joined.told] == [2, None, 3]
    for visual in joined.told:
        assert visual.place is not None
        tile, row, column = visual.grid()
        assert tile.tolist() == [at for at in range(len(visual.tiles)) for _ in range(4)]
        assert (row * 2 + column).tolist() == [0, 1, 2, 3] * len(visual.tiles)
        assert torch.equal(
            visual.received(0, "cls"),
            torch.cat(
                [tile.received[0].cls for tile in visual.tiles if tile.received[0].cls is not None]
            ),
        )
    for what in ("received", "relevance"):
        values = [
            torch.cat([getattr(v, what) if what == "relevance" else v.received(0) for v in told_])
            for told_ in (apart.told, joined.told)
        ]
        assert torch.equal(*values)


def test_joined_tiles_are_cut_as_single_tiles_are() -> None:
    """Every other token of a picture is every other token of its tiles, which are even."""
    tiny = family("internvl")
    inputs = internvl_prompt([[3, 1], [4]])
    answers = []
    for method in (Probe(ratio=0.5), Pictures(ratio=0.5)):
        with vlmfix.wrapped(tiny.model, method):
            answers.append(tiny.model.generate(**inputs, **generate_kwargs(num_beams=3)))
    assert torch.equal(*answers)
    with vlmfix.wrapped(tiny.model, Pictures(ratio=0.25)):
        first = tiny.model.generate(**inputs, **generate_kwargs())
    assert not torch.equal(first, answers[0])


def test_a_run_that_is_no_whole_number_of_tiles() -> None:
    tiny = family("internvl")
    inputs = internvl_prompt([[2, 1]])
    ids = inputs["input_ids"][0].tolist()
    ids.insert(ids.index(IMAGE) + 2, 25)
    broken = torch.tensor([ids])
    inputs |= {"input_ids": broken, "attention_mask": torch.ones_like(broken)}
    with (
        vlmfix.wrapped(tiny.model, Pictures()),
        torch.no_grad(),
        pytest.raises(BadInput, match="2 image placeholders in a row, but the next 1 tiles make 4"),
    ):
        tiny.model(**inputs)


def test_which_tile_of_llava_next_is_the_whole() -> None:
    tiny = family("llava_next")
    probe = Probe()
    with vlmfix.wrapped(tiny.model, probe), torch.no_grad():
        tiny.model(**tiny.inputs())
    (visual,) = probe.told
    assert (len(visual), len(visual.tiles), visual.whole) == (80, 5, 0)


# -- images of which different numbers stay -------------------------------------------------------


def one_and_two_images(tiny: TinyFamily) -> tuple[Inputs, list[Inputs]]:
    """A prompt with one image and one with two, as a batch and each alone."""
    source = tiny.inputs(batch=3, lengths=[5, 5, 5])
    image = [*tiny.layout.before, *[IMAGE] * tiny.image_tokens, *tiny.layout.after]
    rows = [[1, *image, 20, 21, 22], [1, *image, 23, 24, *image, 25, 26]]
    pixels = {
        key: source[key]
        for key in ("pixel_values", "image_sizes", "image_grid_thw")
        if key in source
    }

    def prompt(rows: list[list[int]], first: int, last: int) -> Inputs:
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        made = {"input_ids": ids, "attention_mask": (ids != 0).long()}
        for key, value in pixels.items():
            size = len(value) // 3
            made[key] = value[first * size : last * size]
        if tiny.name == "smolvlm":  # (rows, images of a row, ...), padded with images of zeros
            counts = [row.count(IMAGE) // tiny.image_tokens for row in rows]
            per_row = made["pixel_values"][:, 0].split(counts)
            made["pixel_values"] = torch.nn.utils.rnn.pad_sequence(per_row, batch_first=True)
        for key in ("token_type_ids", "mm_token_type_ids"):
            if key in source:
                made[key] = (ids == IMAGE).long() * int(source[key].max())
        return made

    return prompt(rows, 0, 3), [prompt(rows[:1], 0, 1), prompt(rows[1:], 1, 3)]


@pytest.mark.parametrize("name", FAMILIES)
def test_beams_of_images_that_keep_different_numbers(name: str) -> None:
    """generate() copies features for beams; each prompt must get those of its own images."""
    tiny = family(name)
    batch, alone = one_and_two_images(tiny)
    method = Ragged(tokens=3)
    kwargs = generate_kwargs(num_beams=3, num_return_sequences=2)
    with vlmfix.wrapped(tiny.model, method):
        together = tiny.model.generate(**batch, **kwargs)[:, batch["input_ids"].shape[1] :]
        report = vlmfix.last_call(tiny.model)
        count = tiny.image_tokens - 8 * (name == "llava_next")
        assert report.visual_tokens == ((1, count), (1, count), (2, count))
        for row, inputs in enumerate(alone):
            length = inputs["input_ids"].shape[1]
            single = tiny.model.generate(**inputs, **kwargs)[:, length:]
            assert torch.equal(together[2 * row : 2 * row + 2], single)
