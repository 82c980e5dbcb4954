"""CARVE: the property tests and worked numbers of its specification, and whole runs."""

from __future__ import annotations

import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_folders
import torch
from matrix import family
from PIL import Image
from prompts import ask, picture, tiny_model
from scipy import ndimage
from scipy.stats import rankdata
from tiny_processor import TinyProcessor

import vlmfix
from vlmfix import emoji
from vlmfix.analysis.maps import AttentionMap
from vlmfix.analysis.passes import Look
from vlmfix.chat import split_chat
from vlmfix.emoji.language import question
from vlmfix.errors import BadInput, UnsupportedModel
from vlmfix.families import describe_model
from vlmfix.methods.carve import (
    ContrastiveAttentionRefinement,
    bounding_box,
    components_kept,
    contrast_attention,
    counted_steps,
    cut_out,
    default_layers,
    relevant_mask,
    spread,
)
from vlmfix.methods.refinement import Refinement

PUBLISHED: dict[str, Any] = {
    "layers": (0,),
    "p": 0.2,
    "steps": "all",
    "final": "both",
    "background": "black",
}


def made_map(*weights: torch.Tensor, grid: tuple[int, int]) -> AttentionMap:
    """A map of one layer: one (n,) per step, in a grid."""
    rows = torch.stack(weights)[None, None].float()
    view = torch.arange(grid[0] * grid[1]).view(grid)
    return AttentionMap(rows, (0,), None, tuple(range(len(weights))), (view,))


def made_look(*maps: AttentionMap) -> Look:
    return Look([5] * maps[0].weights.shape[2], list(maps), shared=True)


def pixels(width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(1, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def whole(image: Image.Image) -> list[list[tuple[int, int, int, int]]]:
    return [[(0, 0, *image.size)]]


# -- the maths -------------------------------------------------------------------------------------


def test_worked_ratio() -> None:
    question = torch.tensor([0.10, 0.05, 0.05, 0.20], dtype=torch.float64)
    general = torch.tensor([0.20, 0.05, 0.10, 0.05], dtype=torch.float64)
    for lam, expected in (
        (1e-8, [0.5, 1.0, 0.5, 3.999999]),
        (0.05, [0.4, 0.5, 0.333333, 2.0]),
    ):
        got = contrast_attention(question, general, lam)
        assert torch.allclose(got, torch.tensor(expected).double(), atol=1e-6)
    nothing = contrast_attention(torch.tensor([0.0, 0.5]), torch.tensor([0.0, 0.0]), 0.0)
    assert nothing.tolist() == [0.0, 0.0]


def test_steps() -> None:
    question = torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(0))
    general = torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(1))
    one, other, weights = counted_steps(question, general, "all")
    assert weights.tolist() == [1, 2, 3]
    assert torch.equal(one, question.double()) and torch.equal(other, general[:, :3].double())
    one, other, weights = counted_steps(question, general, "first")
    assert weights.tolist() == [1]
    assert torch.equal(one, question[:, :1].double())
    assert torch.equal(other, general[:, :1].double())
    one, other, weights = counted_steps(question, general, "last")
    assert weights.tolist() == [1]
    assert torch.equal(one, question[:, 2:].double())
    assert torch.equal(other, general[:, 3:].double())


WORKED = np.ones((6, 6), dtype=np.float32)
for _row, _column, _value in (
    (0, 2, 9), (1, 2, 8), (1, 5, 5), (2, 5, 6), (3, 0, 4), (4, 3, 7), (5, 4, 7.5),
):  # fmt: skip
    WORKED[_row, _column] = _value


@pytest.mark.parametrize(
    ("at_most", "kept", "box"), [(1, 2, (2, 0, 3, 2)), (2, 3, (2, 0, 5, 6)), (3, 4, (2, 0, 5, 6))]
)
def test_worked_regions(at_most: int, kept: int, box: tuple[int, ...]) -> None:
    assert np.quantile(WORKED, 0.9) == pytest.approx(6.5)
    labels, count = ndimage.label(WORKED >= 6.5)
    assert sorted(ndimage.sum_labels(WORKED, labels, range(1, count + 1))) == [7, 7.5, 17]
    mask = relevant_mask(WORKED, 0.1, at_most)
    assert mask.sum() == kept
    assert bounding_box(mask) == box


def test_ties_are_all_kept() -> None:
    assert np.quantile(WORKED, 0.8) == 1.0
    assert relevant_mask(WORKED, 0.2, 1).all()


def test_components_of_the_code_and_the_paper() -> None:
    counts = (3, 10, 15, 20, 40)
    assert [components_kept(count, None, 0.2) for count in counts] == [3, 3, 3, 4, 8]
    # The share of regions is that of the pixels.
    assert [components_kept(count, None, 0.4) for count in counts] == [3, 4, 6, 8, 16]
    assert [components_kept(count, 2, 0.2) for count in counts] == [2] * 5


def test_adding_on_the_tokens_equals_adding_resized_maps() -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(6, 5, 7, 9, generator=generator, dtype=torch.float64)
    weights = torch.arange(1.0, 6.0, dtype=torch.float64)
    view = torch.arange(63).view(7, 9)
    fused = spread(torch.einsum("ltn,t->n", maps.flatten(2), weights), [view], 101, 64)
    apart = np.zeros((64, 101))
    for layer in maps.flatten(2):
        for step, weight in zip(layer, weights, strict=True):
            apart += float(weight) * spread(step, [view], 101, 64)
    assert np.abs(fused - apart).max() / np.abs(apart).max() < 1e-4
    assert fused.std() > 1


def test_views_of_one_place_add_up_and_newlines_lie_nowhere() -> None:
    tokens = torch.tensor([1.0, 2.0, 3.0, 4.0, 10.0, 99.0, 20.0, 99.0])
    base, tiles = torch.tensor([[0, 1], [2, 3]]), torch.tensor([[4], [6]])
    both = spread(tokens, [base, tiles], 8, 8)
    assert np.allclose(both, spread(tokens, [base], 8, 8) + spread(tokens, [tiles], 8, 8))
    assert both.max() < 30


def test_scale_of_the_cut() -> None:
    image = pixels(100, 60)
    mask = np.zeros((60, 100), dtype=bool)
    mask[10:40, 20:30] = True
    mask[10, 20] = False
    box = bounding_box(mask)
    assert box == (20, 10, 30, 40)
    black, kept = (cut_out(image, mask, box, black) for black in (True, False))
    assert black.size == kept.size == (100, 300)  # ten times 10 x 30
    assert np.array_equal(
        np.asarray(kept), np.asarray(image.crop(box).resize((100, 300), Image.Resampling.LANCZOS))
    )
    # Ten thirds of 30 x 26 are 100 x 86.7: whole pixels, not rounded.
    assert cut_out(image, mask, (20, 10, 50, 36), False).size == (100, 86)
    corner = np.asarray(black)[:5, :5].astype(int)
    assert corner.max() < np.asarray(kept)[:5, :5].max()
    inside = np.asarray(black)[100:, 50:]
    assert np.array_equal(inside, np.asarray(kept)[100:, 50:])


# -- one chat, from made maps ----------------------------------------------------------------------


def test_equal_or_uniform_maps_leave_the_image_alone() -> None:
    image = pixels(90, 70)
    generator = torch.Generator().manual_seed(0)
    unequal = [torch.rand(12, generator=generator) + 0.1 for _ in range(2)]
    flat = [torch.full((12,), value) for value in (0.02, 0.07)]
    for weights, lam in ((unequal, 0.0), (flat, 0.0), (flat, 1e-8), (flat, 0.3)):
        method = ContrastiveAttentionRefinement(lam=lam, **PUBLISHED)
        seen = made_look(made_map(*weights, grid=(3, 4)))
        found = method.refine([image], whole(image), seen, seen)
        assert found.scores.shape == (70, 90)
        assert np.ptp(found.scores) <= 1e-5 * found.scores.max()
        assert found.mask.all() and found.box == (0, 0, 90, 70)
        assert found.refined is image and not found.changed
        assert found.reason == "every pixel is kept"
    # lambda makes the ratio of equal maps uneven, and the quantile takes its share: no identity.
    seen = made_look(made_map(*unequal, grid=(3, 4)))
    found = ContrastiveAttentionRefinement(lam=1e-2, **PUBLISHED).refine(
        [image], whole(image), seen, seen
    )
    assert found.changed and found.mask.mean() == pytest.approx(0.2, abs=0.01)


def two_looks(
    grid: tuple[int, int], seed: int = 0
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    count = grid[0] * grid[1]
    rows = [torch.rand(count, generator=generator).softmax(0) for _ in range(5)]
    return rows[:2], rows[2:]


def test_a_factor_on_the_question_changes_no_pixel() -> None:
    image = pixels(90, 70)
    question, general = two_looks((3, 4))
    method = ContrastiveAttentionRefinement(**PUBLISHED)
    found = [
        method.refine(
            [image],
            whole(image),
            made_look(made_map(*(factor * row for row in question), grid=(3, 4))),
            made_look(made_map(*general, grid=(3, 4))),
        )
        for factor in (1.0, 0.25, 8.0, 3.7)
    ]
    assert found[0].changed and 0.15 < found[0].mask.mean() <= 0.2
    for other in found[1:]:
        assert np.array_equal(found[0].mask, other.mask)
        assert found[0].box == other.box
        assert np.array_equal(np.asarray(found[0].refined), np.asarray(other.refined))
    assert found[1].scores.max() == pytest.approx(0.25 * found[0].scores.max())


@pytest.mark.parametrize("hot", [(0, 0), (2, 11), (7, 31), (5, 20)])
def test_a_grid_that_is_not_square_lies_right(hot: tuple[int, int]) -> None:
    """Qwen's 8 x 32 tokens, which the authors' table would take for 16 x 16."""
    image = pixels(960, 240)
    question, general = torch.full((256,), 1e-3), torch.full((256,), 1e-3)
    question[hot[0] * 32 + hot[1]] = 0.5
    found = ContrastiveAttentionRefinement(**{**PUBLISHED, "p": 0.01}).refine(
        [image],
        whole(image),
        made_look(made_map(question, grid=(8, 32))),
        made_look(made_map(general, grid=(8, 32))),
    )
    row, column = np.unravel_index(found.scores.argmax(), found.scores.shape)
    assert abs(row - (hot[0] + 0.5) * 30) <= 30 and abs(column - (hot[1] + 0.5) * 30) <= 30
    left, top, right, bottom = found.box
    assert left - 15 <= (hot[1] + 0.5) * 30 <= right + 15
    assert top - 15 <= (hot[0] + 0.5) * 30 <= bottom + 15


def test_tiles_lie_where_the_processor_cut_and_what_it_cut_off_is_dark() -> None:
    image = pixels(300, 200)
    places = [[(150, 0, 250, 100), (0, 0, 300, 200)]]
    flat = torch.full((4,), 0.1)
    hot = torch.tensor([0.1, 0.1, 0.1, 0.9])
    method = ContrastiveAttentionRefinement(**PUBLISHED)

    def refine(tile: torch.Tensor, view: torch.Tensor, where: Any = places) -> Refinement:
        count = len(where[0])
        question = made_look(*(made_map(w, grid=(2, 2)) for w in (tile, view)[:count]))
        general = made_look(*(made_map(flat, grid=(2, 2)) for _ in range(count)))
        return method.refine([image], where, question, general)

    found = refine(hot, flat)
    row, column = np.unravel_index(found.scores.argmax(), found.scores.shape)
    assert 50 <= row <= 100 and 200 <= column <= 250  # the lower right quarter of the tile
    assert found.scores[150, 20] == pytest.approx(1.0, rel=1e-5)  # the view of the whole alone
    assert found.scores[20, 170] == pytest.approx(2.0, rel=1e-5)  # both
    alone = refine(hot, flat, [[(50, 0, 250, 200)]])
    assert not alone.scores[:, :50].any() and not alone.scores[:, 250:].any()
    assert alone.box[0] >= 50 and alone.box[2] <= 250
    with pytest.raises(UnsupportedModel, match="counts 1 pieces .* got 2"):
        method.refine([image], whole(image), *[made_look(*[made_map(flat, grid=(2, 2))] * 2)] * 2)


def test_of_several_images_the_one_that_draws_more_attention_is_refined() -> None:
    images = [pixels(60, 60, 1), pixels(80, 40, 2), pixels(50, 70, 3)]
    places = [place for image in images for place in whole(image)]
    base, other = two_looks((4, 4))[1][:2]
    general = made_look(*(made_map(base, grid=(4, 4)) for _ in images))
    # The first image has most attention, the second one grew most.
    question = made_look(
        made_map(1.1 * other, grid=(4, 4)),
        made_map(1.6 * other, grid=(4, 4)),
        made_map(0.3 * other, grid=(4, 4)),
    )
    general.maps[0] = made_map(3 * base, grid=(4, 4))
    question.maps[0] = made_map(3.3 * other, grid=(4, 4))
    found = ContrastiveAttentionRefinement(**PUBLISHED).refine(images, places, question, general)
    assert found.number == 1 and found.image is images[1]
    assert found.scores.shape == (40, 80)


def test_when_the_image_stays_as_it_was() -> None:
    image = pixels(80, 80)
    question, general = two_looks((8, 8))
    looks = (
        made_look(made_map(*question, grid=(8, 8))),
        made_look(made_map(*general, grid=(8, 8))),
    )

    def refine(**options: Any) -> Refinement:
        method = ContrastiveAttentionRefinement(**{**PUBLISHED, **options})
        return method.refine([image], whole(image), *looks)

    sure = refine()
    assert sure.changed and sure.reason is None and sure.refined is not image
    for options, reason in (
        ({"minimum_contrast": 50.0}, "max/mean of the map is below 50"),
        ({"p": 1.0}, "every pixel is kept"),
        ({"p": 0.5, "components": 9, "background": "keep"}, "every pixel is kept"),
        ({"p": 0.001}, "the box is smaller than a visual token"),
    ):
        found = refine(**options)
        assert found.reason == reason
        assert not found.changed and found.refined is image
    assert refine(p=0.5, components=9).changed  # the same box, blacked out
    contrast = sure.scores.max() / sure.scores.mean()
    assert refine(minimum_contrast=float(contrast) - 0.01).changed
    assert not refine(minimum_contrast=float(contrast) + 0.01).changed


def test_findings_on_disk(tmp_path: Path) -> None:
    image = pixels(80, 80)
    question, general = two_looks((8, 8))
    found = ContrastiveAttentionRefinement(**PUBLISHED).refine(
        [image],
        whole(image),
        made_look(made_map(*question, grid=(8, 8))),
        made_look(made_map(*general, grid=(8, 8))),
    )
    paths = found.save(tmp_path / "new", "a")
    assert [path.name for path in paths] == ["a-map.png", "a-mask.png", "a-refined.png"]
    shown, mask, refined = (vlmfix.load_image(path) for path in paths)
    assert shown.size == mask.size == image.size
    assert np.array_equal(np.asarray(mask)[..., 0] > 0, found.mask)
    assert np.array_equal(np.asarray(refined), np.asarray(found.refined))
    facts = found.facts()
    assert facts["box"] == found.box and facts["changed"] is True
    assert not {"scores", "mask", "image", "refined"} & facts.keys()


# -- options ---------------------------------------------------------------------------------------


def test_defaults_by_source_and_by_model() -> None:
    llava = family("llava")
    info = describe_model(llava.model)
    code = ContrastiveAttentionRefinement().prepared(info, llava.model)
    assert (code.p, code.components, code.steps, code.final) == (0.2, None, "all", "both")
    assert (code.background, code.lam, code.max_new_tokens) == ("black", 1e-8, 32)
    assert code.general == "Write a general description of the image."
    assert code.suffix == "Answer the question using a single word or phrase."
    assert code.layers == (2,)
    paper = ContrastiveAttentionRefinement(preset="paper").prepared(info, llava.model)
    assert (paper.p, paper.components, paper.steps, paper.final) == (0.4, 2, "last", "refined")
    own = ContrastiveAttentionRefinement(preset="paper", p=0.3, final="both", components=5)
    own = own.prepared(info, llava.model)
    assert (own.p, own.components, own.steps, own.final) == (0.3, 5, "last", "both")
    model, _ = vlmfix.load("emoji")
    bundled = ContrastiveAttentionRefinement().prepared(describe_model(model), model)
    assert (bundled.background, bundled.general, bundled.suffix) == (
        "keep", "Describe the image.", "",
    )  # fmt: skip
    assert (bundled.layers, bundled.final, bundled.p) == ((4, 5), "both", 0.2)
    like = replace(describe_model(model), vocab_size=32000)
    assert ContrastiveAttentionRefinement().prepared(like, model).background == "black"


def test_layers_by_depth() -> None:
    for count in (27, 28, 32, 36, 40, 80):
        assert default_layers(count) == (20, 21, 22, 23, 24, 25)
    assert default_layers(26) == (18, 19, 20, 21, 22, 23)
    assert default_layers(24) == (16, 17, 18, 19, 20, 21)
    assert default_layers(6) == (4, 5) and default_layers(1) == (0,)
    for count in range(1, 27):
        layers = default_layers(count)
        assert layers and max(layers) < count


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("carve:p=1.5", "out of range"),
        ("carve:lam=-1", "out of range"),
        ("carve:components=0", "out of range"),
        ("carve:max_new_tokens=0", "out of range"),
        ("carve:steps=middle", "must be one of"),
        ("carve:layers=7", "must be layers of this model"),
        ("carve:layers=()", "must be layers of this model"),
    ],
)
def test_bad_options(spec: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        vlmfix.wrap(family("llava").model, spec)


def test_families_that_cannot_be_placed_are_refused_when_wrapped() -> None:
    with pytest.raises(UnsupportedModel, match="interpolates the features"):
        vlmfix.wrap(family("llava_onevision").model, "carve")


def test_keeping_every_pixel_warns() -> None:
    with (
        pytest.warns(UserWarning, match="carve will change nothing: p=1 keeps every pixel"),
        vlmfix.wrapped(family("llava").model, "carve:p=1"),
    ):
        pass


# -- requests --------------------------------------------------------------------------------------


class Spy(TinyProcessor):
    """Notes every prompt that it is asked to encode."""

    def __init__(self) -> None:
        super().__init__(family("llava"))
        self.prompts: list[str] = []

    def __call__(self, text: list[str], images: Any, **kwargs: Any) -> Any:
        self.prompts += text
        return super().__call__(text, images, **kwargs)


def requests(chat: Any, **options: Any) -> set[str]:
    model, processor = tiny_model("llava"), Spy()
    with vlmfix.wrapped(model, None), pytest.MonkeyPatch.context() as patch:
        patch.setattr("vlmfix.methods.carve.piece_places", lambda p, w, h: [(0, 0, w, h)])
        method = ContrastiveAttentionRefinement(general="w1", suffix="w2", **options)
        method = method.prepared(describe_model(model), model)
        method.rewrite(model, processor, [chat])
    return {prompt.strip() for prompt in processor.prompts}


def test_what_the_two_looks_are_asked() -> None:
    assert requests(ask(picture(1), "is there a dog ?")) == {
        "user <image> is there a dog ? w2 assistant",
        "user <image> w1 w2 assistant",
    }
    # A question that ends so gets no second suffix, and other texts of the message are the user's.
    image = {"type": "image", "image": picture(1)}
    texts = [{"type": "text", "text": text} for text in ("w5", "w6 w2 ")]
    asked = requests([{"role": "user", "content": [texts[0], image, texts[1]]}])
    assert {" ".join(prompt.split()) for prompt in asked} == {
        "user w5 <image> w6 w2 assistant",
        "user <image> w1 w2 assistant",
    }


def test_only_the_last_text_of_the_user_is_replaced() -> None:
    chat = [
        *ask(picture(1), "w5"),
        {"role": "assistant", "content": "w6"},
        {"role": "user", "content": "w7"},
    ]
    assert requests(chat) == {
        "user <image> w5 assistant w6 user w7 w2 assistant",
        "user <image> w5 assistant w6 user w1 w2 assistant",
    }


def test_chats_without_image_or_question_go_through_as_they_are() -> None:
    model, processor = tiny_model("llava"), Spy()
    chats = [
        [{"role": "user", "content": "is there a dog ?"}],
        [{"role": "user", "content": [{"type": "image", "image": picture(1)}]}],
    ]
    with vlmfix.wrapped(model, None):
        method = ContrastiveAttentionRefinement().prepared(describe_model(model), model)
        new, found = method.rewrite(model, processor, chats)
    assert new == chats and found == [None, None] and not processor.prompts


# -- whole runs ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundled() -> Any:
    return vlmfix.load("emoji")


@pytest.fixture(scope="module")
def chats() -> list[Any]:
    pictures = [image for _, image in emoji.example_images(3)]
    asked = [
        (pictures[0], "Is there a dog in the image?"),
        (pictures[1], "Please describe this image in detail."),
        (pictures[0], "Is there a car in the image?"),
        (pictures[2], "Describe the image."),
    ]
    return [ask(image, text) for image, text in asked]


SETTINGS: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12}


@pytest.mark.parametrize(
    ("spec", "black", "both"),
    [
        ("carve", False, True),
        ("carve:background=black;final=refined", True, False),
        ("carve:preset=paper", False, False),
    ],
)
def test_it_equals_refining_by_hand_and_asking_the_plain_model(
    bundled: Any, chats: list[Any], spec: str, black: bool, both: bool
) -> None:
    model, processor = bundled
    settings = {**SETTINGS, "max_new_tokens": 40, "return_details": True}
    with vlmfix.wrapped(model, spec):
        answers = vlmfix.generate(model, processor, chats, **settings)
        found = vlmfix.last_call(model).pixels["carve"]
    assert all(one.shared for one in found) and sum(one.changed for one in found) > 1
    by_hand = []
    for chat, one in zip(chats, found, strict=True):
        if not one.changed:
            by_hand.append(chat)
            continue
        (image,), _ = split_chat(chat)
        refined = cut_out(image, one.mask, one.box, black)
        assert np.array_equal(np.asarray(refined), np.asarray(one.refined))
        shown = [image, refined] if both else [refined]
        content = [{"type": "image", "image": picture} for picture in shown]
        by_hand.append([{"role": "user", "content": [*content, chat[0]["content"][1]]}])
    assert vlmfix.generate(model, processor, by_hand, **settings) == answers
    plain = vlmfix.generate(model, processor, chats, **settings)
    more = [
        answer.prompt_tokens - one.prompt_tokens for answer, one in zip(answers, plain, strict=True)
    ]
    assert [tokens > 64 for tokens in more] == [one.changed and both for one in found]
    assert all(tokens == 0 for tokens in more if tokens <= 64)
    assert [answer.text for answer in answers] != [answer.text for answer in plain]


def test_a_batch_finds_what_each_chat_finds_alone(bundled: Any, chats: list[Any]) -> None:
    model, processor = bundled
    with vlmfix.wrapped(model, "carve"):
        together = vlmfix.generate(model, processor, chats, **SETTINGS)
        found = vlmfix.last_call(model).pixels["carve"]
        for index, chat in enumerate(chats):
            assert vlmfix.generate(model, processor, chat, **SETTINGS) == together[index]
            (alone,) = vlmfix.last_call(model).pixels["carve"]
            assert alone.facts() == found[index].facts()
            assert np.allclose(alone.scores, found[index].scores, rtol=1e-3)


def test_it_stacks_with_attention_methods_and_contrast(bundled: Any, chats: list[Any]) -> None:
    model, processor = bundled
    with vlmfix.wrapped(model, ["carve", "pai:alpha=2", "vcd:seed=0"]):
        answers = vlmfix.generate(model, processor, chats, **SETTINGS)
        both = vlmfix.last_call(model)
        assert both.edited_rows > 0 and both.contrasted_rows > 0
        assert any(one.changed for one in both.pixels["carve"])
        with vlmfix.using(model, "carve"):
            alone = vlmfix.generate(model, processor, chats, **SETTINGS)
            assert vlmfix.last_call(model).edited_rows == 0
            seen = vlmfix.last_call(model).pixels["carve"]
        with vlmfix.using(model, "pai:alpha=2"):
            assert vlmfix.generate(model, processor, chats, **SETTINGS) != answers
            assert not vlmfix.last_call(model).pixels
    assert alone != answers
    # The looks are the plain model's, whatever else is in the stack.
    for one, other in zip(seen, both.pixels["carve"], strict=True):
        assert np.array_equal(one.scores, other.scores)


def test_sampling_beams_and_sequences_are_of_the_final_answer(
    bundled: Any, chats: list[Any]
) -> None:
    model, processor = bundled
    with vlmfix.wrapped(model, "carve"):
        vlmfix.generate(model, processor, chats[:2], **SETTINGS)
        plain = vlmfix.last_call(model).pixels["carve"]
        for settings in (
            {"num_beams": 3, "num_return_sequences": 2},
            {"do_sample": True, "temperature": 5.0},
        ):
            answers = vlmfix.generate(model, processor, chats[:2], **{**SETTINGS, **settings})
            assert len(answers) == 2 * settings.get("num_return_sequences", 1)
            found = vlmfix.last_call(model).pixels["carve"]
            assert [one.facts() for one in found] == [one.facts() for one in plain]


def test_generate_without_chats_names_the_way_out(bundled: Any, chats: list[Any]) -> None:
    from vlmfix.chat import chat_inputs

    model, processor = bundled
    inputs = chat_inputs(model, processor, chats[:1])
    with vlmfix.wrapped(model, "carve"), pytest.raises(BadInput, match=r"vlmfix\.generate"):
        model.generate(**inputs, **SETTINGS)


def test_steps_of_one_token(bundled: Any, chats: list[Any]) -> None:
    model, processor = bundled
    with vlmfix.wrapped(model, "carve:steps=first"):
        vlmfix.generate(model, processor, chats, **SETTINGS)
        first = vlmfix.last_call(model).pixels["carve"]
    with vlmfix.wrapped(model, "carve:max_new_tokens=1"):
        vlmfix.generate(model, processor, chats, **SETTINGS)
        short = vlmfix.last_call(model).pixels["carve"]
    with vlmfix.wrapped(model, "carve:steps=last"):
        vlmfix.generate(model, processor, chats, **SETTINGS)
        last = vlmfix.last_call(model).pixels["carve"]
    for one, other, third in zip(first, short, last, strict=True):
        assert np.array_equal(one.scores, other.scores)
        assert not np.allclose(one.scores, third.scores)
        assert len(one.general.split()) == 1 < len(third.general.split())


def test_only_the_last_step_asks_for_all_of_the_description(bundled: Any, chats: list[Any]) -> None:
    model, processor = bundled
    described = vlmfix.generate(
        model, processor, ask(split_chat(chats[0])[0][0], "Describe the image."),
        do_sample=False, max_new_tokens=32,
    )  # fmt: skip
    for steps, whole_of_it in (("last", True), ("all", False)):
        with vlmfix.wrapped(model, f"carve:steps={steps}"):
            vlmfix.generate(model, processor, chats[0], **SETTINGS)
            (found,) = vlmfix.last_call(model).pixels["carve"]
        assert (found.general == described) == whole_of_it
        assert found.answer == "No" and described.startswith(found.general)


@pytest.mark.slow
def test_the_map_lies_on_what_was_asked_for(bundled: Any) -> None:
    """On the bundled images, S is larger on the object in question than elsewhere."""
    model, processor = bundled
    with zipfile.ZipFile(emoji.evaluation_split()) as split:
        world = json.loads(split.read("annotations/instances.json"))
    names = {row["id"]: row["name"] for row in world["categories"]}
    pictures = dict(emoji.example_images(60))
    asked, places = [], []
    for row in world["images"][:60]:
        objects = [item for item in world["annotations"] if item["image_id"] == row["id"]]
        first = objects[0]["category_id"]
        image = pictures[Path(row["file_name"]).name]
        asked.append(ask(image, question(names[first])))
        inside = np.zeros((112, 112), dtype=bool)
        for item in objects:
            left, top, width, height = (round(value) for value in item["bbox"])
            if item["category_id"] == first:
                inside[top : top + height, left : left + width] = True
        places.append(inside)

    def area_under_curve(spec: str) -> float:
        areas = []
        with vlmfix.wrapped(model, spec):
            vlmfix.generate(model, processor, asked, max_new_tokens=2, do_sample=False)
            for found, inside in zip(vlmfix.last_call(model).pixels["carve"], places, strict=True):
                rank = rankdata(found.scores)[inside.ravel()]
                count = inside.sum()
                above = rank.sum() - count * (count + 1) / 2
                areas.append(above / (count * (inside.size - count)))
        return float(np.mean(areas))

    found = area_under_curve("carve")
    published = area_under_curve(
        "carve:general=Write a general description of the image.;"
        "suffix=Answer the question using a single word or phrase."
    )
    print(f"area under the curve: {found:.3f}, with the published wording {published:.3f}")
    assert found > 0.58 and found > published


def test_a_crop_of_the_processor_on_a_tiny_model() -> None:
    """LLaVA's processor cuts the middle square out of an image that is not square."""
    model, processor = tiny_model("llava"), tiny_folders.processor()
    values = np.random.default_rng(0).integers(0, 255, (40, 120, 3), dtype=np.uint8)
    chat = ask(Image.fromarray(values), "is there a dog in the image ?")
    with vlmfix.wrapped(model, "carve:layers=0/1/2"):
        vlmfix.generate(model, processor, chat, max_new_tokens=3, do_sample=False)
        (found,) = vlmfix.last_call(model).pixels["carve"]
        assert vlmfix.last_call(model).prompt_length > 2 * 16
    assert found.changed and found.shared
    assert not found.scores[:, :38].any() and not found.scores[:, 82:].any()
    assert found.scores[:, 41:79].all()
    assert found.box[0] >= 38 and found.box[2] <= 82


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "paligemma", "llava_next"])
def test_other_families_run_through(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmfix.methods.carve.piece_places", lambda p, w, h: [(0, 0, w, h)])
    model, processor = tiny_model(name), TinyProcessor(family(name))
    chats = [ask(picture(1), "is there a dog ?"), ask(picture(2), "w3")]
    with vlmfix.wrapped(model, "carve:final=refined;layers=0/1/2"):
        answers = vlmfix.generate(model, processor, chats, max_new_tokens=3, do_sample=False)
        found = vlmfix.last_call(model).pixels["carve"]
    assert len(answers) == 2
    for one in found:
        assert one.scores.shape == (16, 16) and one.scores.std() > 0
        assert one.shared == (name in ("qwen2_5_vl", "llava_next"))
