"""What a pruning method keeps of each image, against what generate() then does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from matrix import family
from prompts import internvl_prompt, state
from pruning_oracle import FixedTokens, MergedPairs, one_prompt, pairs, prompts
from test_maps import CASES, PIXELS
from test_maps import prompts as prompts_with
from tiny import FAMILIES, build, generate_kwargs
from tiny_configs import IMAGE, VIDEO
from torch import Tensor

import vlmfix
from vlmfix import KeptTokens, visual_tokens
from vlmfix.base.method import Method
from vlmfix.chat import chat_inputs
from vlmfix.engine.encoded import CallImages
from vlmfix.engine.layer_pruning import KeptPlaceholders
from vlmfix.engine.session import SESSION
from vlmfix.errors import BadInput, StateError
from vlmfix.methods.fastv import FastV
from vlmfix.methods.random_tokens import RandomTokens
from vlmfix.registry import build as method_from

Inputs = dict[str, Any]

METHODS: tuple[Method, ...] = (
    *(
        method_from(spec)
        for spec in (
            "cluster:ratio=0.5",
            "divprune:ratio=0.5",
            "hiprune:ratio=0.5",
            "random:ratio=0.5",
            "uniform:ratio=0.5",
            "visionzip:ratio=0.5",
        )
    ),
    FastV(ratio=0.5),
)


def placeholders(name: str, kept: KeptTokens) -> list[int]:
    """Of one image of a tiny family, the kept tokens as placeholders; newlines are not among them.

    LLaVA-NeXT: 16 of the whole view, then 8 lines of 8 and a newline.
    """
    if name != "llava_next":
        return kept.index.tolist()
    return [at if at < 16 else at + (at - 16) // 8 for at in kept.index.tolist()]


def is_newline(name: str, place: int) -> bool:
    return name == "llava_next" and place >= 16 and (place - 16) % 9 == 8


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_it_tells_what_generate_keeps(name: str, method: Method) -> None:
    tiny = family(name)
    images = (0, 2, 1)
    inputs = prompts(tiny, images)
    told = visual_tokens(tiny.model, inputs, method)
    assert [len(own) for own in told] == list(images)
    with vlmfix.wrapped(tiny.model, method):
        assert str(visual_tokens(tiny.model, inputs)) == str(told)
        tiny.model.generate(**inputs, **generate_kwargs(num_beams=2))
        call = tiny.model.__dict__[SESSION].last_call()
    n, count = tiny.image_tokens, {"llava_next": 80}.get(name, tiny.image_tokens)
    if isinstance(method, FastV):
        stays = (
            call.get(KeptPlaceholders).kept[inputs["input_ids"] == IMAGE].view(3, n)
        )  # per image
        kept = [image.nonzero().flatten().tolist() for image in stays]
        budgets = [n, n, n // 2]  # of two images, and of one
    else:
        kept = [reduction.positions.tolist() for reduction in call.of(CallImages).reductions]
        budgets = [count // 2] * 3
    assert [image.budget for own in told for image in own] == budgets
    for image, places in zip((image for own in told for image in own), kept, strict=True):
        real = [place for place in places if not is_newline(name, place)]
        assert placeholders(name, image) == real
        assert image.count == count
        masks = image.masks()
        assert [tuple(mask.shape) for mask in masks] == {
            "llava": [(4, 4)],
            "llava_next": [(4, 4), (8, 8)],
        }.get(name, [(2, 2)])
        assert torch.equal(
            torch.cat([mask.flatten() for mask in masks]).nonzero()[:, 0], image.index
        )
        merged = method.name in ("cluster", "visionzip")
        assert (image.weights is not None) == merged
        groups = image.groups()
        assert len(groups) == len(image.index)
        if not merged:
            assert [group.tolist() for group in groups] == [[at] for at in image.index.tolist()]
    if method.name == "cluster":  # each token goes into one group
        assert all(
            torch.cat(image.groups()).sort().values.tolist() == list(range(count))
            for own in told
            for image in own
        )


@pytest.mark.parametrize("name", CASES)
def test_masks_lie_where_the_tokens_are(name: str) -> None:
    """Images of any size; tests/analysis/test_maps.py holds the views against pixels."""
    of, images, counts = CASES[name]
    tiny = family(of)
    images = {key: images[key] for key in PIXELS if key in images}
    told = visual_tokens(
        tiny.model, prompts_with(tiny, images, counts), FixedTokens(index=((1, 3),))
    )
    grids = {
        "windows": [[(4, 6)], [(6, 4)], [(2, 2)]],
        "grids": [[(2, 4)], [(4, 2)]],
        "llava_next": [[(4, 4), (8, 8)]] * 2,
        "tilings": [[(4, 4), grid] for grid in ((8, 8), (4, 8), (6, 8), (8, 4))],
        "llava": [[(4, 4)]] * 2,
        "paligemma": [[(4, 4)]] * 2,
    }.get(name, [[(2, 2)]] * 2)
    for (image,), shapes in zip(told, grids, strict=True):
        masks = image.masks()
        assert [tuple(mask.shape) for mask in masks] == shapes
        assert image.count == sum(rows * columns for rows, columns in shapes)
        columns = shapes[0][1]
        assert masks[0].nonzero().tolist() == [
            [1 // columns, 1 % columns],
            [3 // columns, 3 % columns],
        ]
        assert not any(mask.any() for mask in masks[1:])


@pytest.mark.parametrize(
    ("token", "view", "row", "column"),
    [(0, 0, 0, 0), (15, 0, 3, 3), (16, 1, 0, 0), (20, 1, 1, 0), (47, 1, 7, 3)],
)
def test_views_of_llava_next(token: int, view: int, row: int, column: int) -> None:
    """30 x 12 pixels: the whole in 4 x 4 tokens, then 8 lines of 4 and a newline."""
    tiny = family("llava_next")
    pixels = CASES["tilings"][1]["pixel_values"][3:]
    inputs = prompts_with(
        tiny, {"pixel_values": pixels, "image_sizes": torch.tensor([[30, 12]])}, [56]
    )
    ((image,),) = visual_tokens(tiny.model, inputs, FixedTokens(index=((token,),)))
    assert image.index.tolist() == [token] and image.count == 48
    assert image.masks()[view].nonzero().tolist() == [[row, column]]
    assert not image.masks()[1 - view].any()


def test_tokens_that_are_merged() -> None:
    tiny = family("llava_next")
    for (image,) in visual_tokens(tiny.model, tiny.inputs(batch=2), MergedPairs()):
        assert image.index.tolist() == list(range(0, 80, 2))
        assert torch.equal(image.weights, pairs(40, 80))
        assert [group.tolist() for group in image.groups()] == [[i, i + 1] for i in range(0, 80, 2)]


def test_a_picture_of_several_tiles_has_a_view_for_each() -> None:
    tiny = family("internvl")
    inputs = internvl_prompt([[3, 1], [4]])
    told = visual_tokens(tiny.model, inputs, method_from("ptp:ratio=0.5;alpha=0;thumbnail=keep"))
    sizes = [[(image.count, image.budget, len(image.views)) for image in own] for own in told]
    assert sizes == [[(12, 6, 3), (4, 2, 1)], [(16, 8, 4)]]
    for own in told:
        for image in own:
            assert torch.equal(
                torch.cat([v.flatten() for v in image.views]), torch.arange(image.count)
            )
            assert (
                sum(int(mask.sum()) for mask in image.masks()) == len(image.index) == image.budget
            )
    assert told[1][0].masks()[3].all()  # the thumbnail


def test_a_family_whose_tokens_have_no_known_place() -> None:
    tiny = family("llava_onevision")
    images = (2, 0, 1)
    inputs = prompts(tiny, images)
    for method in (RandomTokens(tokens=5), FastV(tokens=5)):
        told = visual_tokens(tiny.model, inputs, method)
        assert [[image.count for image in own] for own in told] == [[88, 88], [], [88]]
        kept = [sum(len(image.index) for image in own) for own in told]
        assert kept == ([5, 0, 5] if isinstance(method, FastV) else [10, 0, 5])
        assert all(image.views == image.masks() == () for own in told for image in own)
        alone = visual_tokens(tiny.model, one_prompt(inputs, images, 2), method)
        assert str(alone) == str(told[2:])


@pytest.mark.parametrize("spec", [RandomTokens, FastV])
@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl"])
def test_settings_that_keep_everything(name: str, spec: Any) -> None:
    tiny = family(name)
    count = {"llava_next": 80}.get(name, tiny.image_tokens)
    for method in (spec(ratio=1.0), spec(tokens=1000)):
        for (image,) in visual_tokens(tiny.model, tiny.inputs(batch=2), method):
            assert image.index.tolist() == list(range(count))
            assert all(mask.all() for mask in image.masks())


def test_the_method_is_the_one_given_or_that_of_the_stack() -> None:
    tiny = family("llava")
    inputs = tiny.inputs()

    def kept(*method: Any) -> list[int]:
        ((image,),) = visual_tokens(tiny.model, inputs, *method)
        found: list[int] = image.index.tolist()
        return found

    with vlmfix.wrapped(tiny.model, [FixedTokens(index=((1, 2),)), "pai:alpha=0.5"]):
        assert kept() == [1, 2]
        assert len(kept("random:tokens=3")) == 3
        with vlmfix.using(tiny.model, FixedTokens(index=((5,),))):
            assert kept() == [5]
        with vlmfix.using(tiny.model, "pai"), pytest.raises(BadInput, match="pai:.* holds no"):
            kept()
        assert kept() == [1, 2]
    with pytest.raises(BadInput, match=r"the stack \[\] holds no method that prunes"):
        kept()


def test_a_method_that_reads_the_question_gets_the_processor() -> None:
    model, processor = vlmfix.load("emoji")
    content = [{"type": "image", "image": "emoji:1"}, {"type": "text", "text": "Is there a bed?"}]
    inputs = chat_inputs(model, processor, [[{"role": "user", "content": content}]])
    spec = "ptp:ratio=0.25;alpha=1;instruction_layer=1"
    ((known,),) = visual_tokens(model, inputs, spec, processor=processor)
    ((unknown,),) = visual_tokens(model, inputs, spec)
    assert known.index.tolist() != unknown.index.tolist()
    for more, told in (({"processor": processor}, known), ({}, unknown)):
        with vlmfix.wrapped(model, spec):
            model.generate(**inputs, max_new_tokens=1, do_sample=False, **more)
            (reduction,) = model.__dict__[SESSION].last_call().of(CallImages).reductions
        assert reduction.positions.tolist() == told.index.tolist()


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    page = Path(__file__).resolve().parents[2] / "docs" / "pruning.md"
    names: Inputs = {}
    monkeypatch.chdir(tmp_path)
    exec(page.read_text().split("```python\n")[1].split("```")[0], names)
    assert names["report"].visual_tokens == ((16, 64),)
    assert names["text"] and len(names["kept"].index) == int(names["kept"].masks()[0].sum()) == 16
    assert (tmp_path / "tokens.png").stat().st_size > 0


# -- what is left alone, what is refused -----------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_is_left_as_it_was(name: str) -> None:
    tiny = build(name)
    inputs = tiny.inputs(batch=2)
    copies = {key: value.clone() for key, value in inputs.items()}
    methods: list[Any] = [RandomTokens(ratio=0.5), method_from("ptp:ratio=0.5;instruction_layer=1")]
    if name != "gemma3":
        methods.append(FastV(ratio=0.5))
    plain = tiny.model.generate(**tiny.inputs(), **generate_kwargs())
    before = state(tiny.model)
    for method in methods:
        visual_tokens(tiny.model, inputs, method)
        assert state(tiny.model) == before
    with vlmfix.wrapped(tiny.model, "pai:alpha=0.5"):
        tiny.model.generate(**tiny.inputs(), **generate_kwargs())
        report, deltas = vlmfix.last_call(tiny.model), remembered(tiny.model)
        for method in methods:
            visual_tokens(tiny.model, inputs, method)
        assert vlmfix.last_call(tiny.model) == report
        assert remembered(tiny.model) is deltas
    assert torch.equal(tiny.model.generate(**tiny.inputs(), **generate_kwargs()), plain)
    assert inputs.keys() == copies.keys()
    assert all(torch.equal(inputs[key], copies[key]) for key in copies)


def remembered(model: Any) -> Tensor | None:
    return getattr(model.base_model, "rope_deltas", None)


def test_pixels_by_another_name() -> None:
    """Video-LLaVA's are pixel_values_images."""
    tiny = family("video_llava")
    found = vlmfix.visual_tokens(tiny.model, tiny.inputs(2), "divprune:ratio=0.5")
    assert [len(own[0].index) for own in found] == [8, 8]


def test_inputs_that_cannot_be_used() -> None:
    tiny = build("qwen2_5_vl")
    inputs = tiny.inputs()
    method = RandomTokens(ratio=0.5)
    text = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    with pytest.raises(BadInput, match="pass input_ids"):
        visual_tokens(tiny.model, {"pixel_values": inputs["pixel_values"]}, method)
    with pytest.raises(BadInput, match="no past_key_values"):
        visual_tokens(tiny.model, {**inputs, "past_key_values": object()}, method)
    with pytest.raises(BadInput, match="no prompt has an image"):
        visual_tokens(tiny.model, text, method)
    with pytest.raises(BadInput, match="no prompt has an image"):
        visual_tokens(tiny.model, {**inputs, "input_ids": text["input_ids"].clamp(max=80)}, method)
    with pytest.raises(BadInput, match="holds a video"):
        more = {"pixel_values_videos": inputs["pixel_values"], "video_grid_thw": torch.ones(1, 3)}
        visual_tokens(tiny.model, {**inputs, **more}, method)
    ids = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, VIDEO)
    with pytest.raises(BadInput, match="no prompt has an image"):
        visual_tokens(tiny.model, {**inputs, "input_ids": ids}, method)
    tiny.model.train()
    with pytest.raises(StateError, match="training mode"):
        visual_tokens(tiny.model, inputs, method)
