"""Tiles of a picture joined to one image, and images of which different numbers of tokens stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from matrix import family
from prompts import Probe, internvl_prompt
from tiny import FAMILIES, TinyFamily, generate_kwargs
from tiny_configs import IMAGE

import vlmfix
from vlmfix.base.pruning import Kept, TokenMethod, VisualTokens
from vlmfix.errors import BadInput

Inputs = dict[str, Any]


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


# -- pictures that come as tiles ------------------------------------------------------------------


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
