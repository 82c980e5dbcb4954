"""Attention maps, against eager attention, decode steps, and changed pixels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from matrix import ROWS, family
from prompts import encode, noise, qwen_images, state, two_images
from tiny import FAMILIES, TinyFamily, build, generate_kwargs
from tiny_configs import IMAGE, VIDEO
from torch import Tensor

import vlmfix
import vlmfix.engine.edits
from vlmfix import AttentionMap, attention_map
from vlmfix.base.attention import AttentionMethod, Keys, Plan
from vlmfix.chat import chat_inputs
from vlmfix.errors import BadInput, StateError, UnsupportedModel
from vlmfix.families import describe_model
from vlmfix.families.tower import describe_tower

Inputs = dict[str, Any]

TRACED = (*FAMILIES, "qwen2_vl", "glm4v", "idefics3", "aya_vision", "mistral3")
METHODS = {row.name: row.strong for row in ROWS if isinstance(row.strong, AttentionMethod)}


def eager_attentions(name: str, inputs: Inputs) -> tuple[Tensor, ...]:
    """Per layer, the model's own softmax (B, H, Q, K)."""
    model = build(name).model
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(**inputs, use_cache=False, output_attentions=True)
    return tuple(output.attentions)


def visual_keys(inputs: Inputs, row: int) -> Tensor:
    return (inputs["input_ids"][row] == IMAGE).nonzero().flatten()


def same(one: AttentionMap, other: AttentionMap, atol: float = 1e-5) -> None:
    assert torch.allclose(one.weights, other.weights, atol=atol)
    assert (one.layers, one.heads) == (other.layers, other.heads)
    assert all(torch.equal(a, b) for a, b in zip(one.views, other.views, strict=True))


# -- the weights ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRACED)
def test_weights_equal_eager_attention(name: str) -> None:
    tiny = family(name)
    inputs = tiny.inputs(batch=3)
    eager = eager_attentions(name, inputs)
    rows = (-5, -1)  # of text in each prompt
    mean = attention_map(tiny.model, inputs, rows=rows)
    every = attention_map(tiny.model, inputs, rows=rows, heads="all")
    one = attention_map(tiny.model, inputs, rows=rows, heads=2, layers=[1])
    width = inputs["input_ids"].shape[1]
    for row in range(3):
        (a,), (b,), (c,) = mean[row], every[row], one[row]
        weights = torch.stack([layer[row] for layer in eager])  # (L, H, Q, K)
        expected = weights[:, :, list(rows)][..., visual_keys(inputs, row)]
        assert b.weights.shape == (3, 4, 2, tiny.image_tokens)
        assert b.weights.dtype == a.weights.dtype == torch.float32
        assert torch.allclose(b.weights, expected, atol=1e-5)
        assert torch.allclose(a.weights, expected.mean(1, keepdim=True), atol=1e-5)
        assert torch.allclose(c.weights, expected[1:2, 2:3], atol=1e-5)
        assert (a.layers, a.heads, a.rows) == ((0, 1, 2), None, (width - 5, width - 1))
        assert (b.heads, c.heads, c.layers) == ((0, 1, 2, 3), (2,), (1,))
        assert expected.std() > 1e-3  # flat rows would prove nothing


@pytest.mark.parametrize("name", FAMILIES)
def test_batch_equals_singles(name: str) -> None:
    tiny = family(name)
    inputs = tiny.inputs(batch=3)
    together = attention_map(tiny.model, inputs, rows="question", heads="all")
    for row in range(3):
        ((alone,),) = attention_map(
            tiny.model, tiny.single(inputs, row), rows="question", heads="all"
        )
        same(together[row][0], alone)
        padding = int((inputs["attention_mask"][row] == 0).sum())
        assert together[row][0].rows == tuple(at + padding for at in alone.rows)


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_of_an_answer_equal_the_steps_that_wrote_it(name: str) -> None:
    tiny = build(name)
    tiny.model.set_attn_implementation("eager")
    inputs = tiny.inputs(batch=2)
    output = tiny.model.generate(
        **inputs, **generate_kwargs(output_attentions=True, return_dict_in_generate=True)
    )
    sequences = output.sequences
    maps = attention_map(
        family(name).model, inputs, rows="answer", heads="all", generated=sequences
    )
    length = inputs["input_ids"].shape[1]
    for row, (found,) in enumerate(maps):
        assert found.rows == tuple(range(length - 1, length + 5))
        keys = visual_keys(inputs, row)
        for step, layers in enumerate(output.attentions):
            for layer, weights in enumerate(layers):
                # A sliding layer's cache has dropped what it cannot see.
                shown = weights[row, :, -1]
                full = torch.nn.functional.pad(shown, (length + step - shown.shape[-1], 0))
                assert torch.allclose(found.weights[layer, :, step], full[:, keys], atol=1e-5)


def test_an_answer_ends_with_its_end_token() -> None:
    tiny = build("llava")
    tiny.model.generation_config.eos_token_id = [2, 7]
    inputs = tiny.inputs(batch=2)
    length = inputs["input_ids"].shape[1]
    answers = torch.tensor([[20, 21, 7, 0, 0], [30, 31, 32, 33, 2]])
    generated = torch.cat((inputs["input_ids"], answers), dim=1)
    short, long = attention_map(tiny.model, inputs, rows="answer", generated=generated)
    assert short[0].rows == tuple(range(length - 1, length + 2))
    assert long[0].rows == tuple(range(length - 1, length + 4))
    alone = tiny.single(inputs, 0)
    generated = torch.cat((alone["input_ids"], answers[:1, :3]), dim=1)
    ((cut,),) = attention_map(tiny.model, alone, rows="answer", generated=generated)
    same(short[0], cut)
    # Rows beyond an answer are padding, and the prompt's own rows stay where they were.
    with pytest.raises(BadInput, match="of prompt 0 is padding"):
        attention_map(
            tiny.model, inputs, rows=[-1], generated=torch.cat((inputs["input_ids"], answers), 1)
        )
    ((last,), _) = attention_map(
        tiny.model, inputs, generated=torch.cat((inputs["input_ids"], answers), dim=1)
    )
    same(last, attention_map(tiny.model, inputs)[0][0])


def test_rows_of_the_question() -> None:
    model, processor = vlmfix.load("emoji")
    texts = ("Is there a bed?", "Please describe this image in detail.")
    chats = []
    for number, text in enumerate(texts, start=1):
        image = {"type": "image", "image": f"emoji:{number}"}
        chats.append([{"role": "user", "content": [image, {"type": "text", "text": text}]}])
    inputs = chat_inputs(model, processor, chats)
    known = attention_map(model, inputs, rows="question", processor=processor)
    unknown = attention_map(model, inputs, rows="question")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        eager = model(**inputs, output_attentions=True).attentions
    visual = inputs["input_ids"] == model.config.image_token_id
    for row, text in enumerate(texts):
        (found,), (template,) = known[row], unknown[row]
        assert processor.decode(inputs["input_ids"][row, list(found.rows)]).strip() == text
        # Without the processor, the template's tail counts as well.
        assert set(found.rows) < set(template.rows)
        expected = torch.stack([w[row].mean(0)[list(found.rows)][:, visual[row]] for w in eager])
        assert torch.allclose(found.weights[:, 0], expected, atol=1e-5)


def test_rows_come_in_the_order_asked() -> None:
    tiny = family("llava")
    inputs = tiny.inputs()
    width = inputs["input_ids"].shape[1]
    ((one,),) = attention_map(tiny.model, inputs, rows=[-1, -4, width - 1])
    ((other,),) = attention_map(tiny.model, inputs, rows=[-4, -1])
    assert one.rows == (width - 1, width - 4, width - 1)
    assert torch.equal(one.weights, other.weights[:, :, [1, 0, 1]])


def test_pieces_of_a_long_prompt_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = family("llava")
    inputs = tiny.inputs(batch=2)
    whole = attention_map(tiny.model, inputs, rows="question")
    for size in (2, 3):
        monkeypatch.setattr("vlmfix.engine.attention._chunk", lambda *sizes, size=size: size)
        for (one,), (other,) in zip(
            attention_map(tiny.model, inputs, rows="question"), whole, strict=True
        ):
            same(one, other, atol=1e-6)
            assert one.rows == other.rows


# -- where the tokens are --------------------------------------------------------------------------


def prompts(tiny: TinyFamily, images: Inputs, counts: list[int]) -> Inputs:
    """One prompt per image, with as many placeholders as it has."""
    layout = tiny.layout
    rows = [[1, *layout.before, *[IMAGE] * n, *layout.after, 20, 21] for n in counts]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long(), **images}
    return inputs if layout.extra is None else {**inputs, **layout.extra(inputs["input_ids"])}


#: Name -> family, images, placeholders of each.
CASES: dict[str, tuple[str, Inputs, list[int]]] = {
    **{
        name: (name, family(name).inputs(batch=2), [family(name).image_tokens] * 2)
        for name in TRACED
    },
    "windows": ("qwen2_5_vl", qwen_images((8, 12), (12, 8), (4, 4)), [24, 24, 4]),
    "grids": ("qwen3_vl", qwen_images((4, 8), (8, 4)), [8, 8]),
    "tilings": (
        "llava_next",
        {
            "pixel_values": noise(4, 5, 3, 16, 16),
            "image_sizes": torch.tensor([[32, 32], [16, 32], [20, 32], [30, 12]]),
        },
        [88, 52, 70, 56],
    ),
}
PIXELS = ("pixel_values", "image_sizes", "image_grid_thw")


def places(name: str, inputs: Inputs) -> Iterator[tuple[tuple[Any, ...], int, int, int, int]]:
    """Every patch of 4 x 4 pixels: (index into pixel_values, image, view, row, column of patches).

    Written from what processors do, with nothing of vlmfix: Qwen's patches come in squares of two
    by two, LLaVA-NeXT's tiles behind the whole view, line by line, padded to their grid.
    """
    if "image_grid_thw" in inputs:
        at = 0
        for image, (_, height, width) in enumerate(inputs["image_grid_thw"].tolist()):
            for top in range(0, height, 2):
                for left in range(0, width, 2):
                    for y, x in ((0, 0), (0, 1), (1, 0), (1, 1)):
                        yield (at,), image, 0, top + y, left + x
                        at += 1
        return
    #: Tile columns, and lines and columns of patches that padding takes at the top and left.
    packed = {(32, 32): (2, 0, 0), (16, 32): (2, 0, 0), (20, 32): (2, 1, 0), (30, 12): (1, 0, 0)}
    pixels = inputs["pixel_values"]
    for image in range(len(pixels)):
        for tile in range(pixels.shape[1] if pixels.ndim == 5 else 1):
            for y in range(4):
                for x in range(4):
                    here = (..., slice(4 * y, 4 * y + 4), slice(4 * x, 4 * x + 4))
                    if pixels.ndim == 4:
                        yield (image, *here), image, 0, y, x
                    elif tile == 0:
                        yield (image, tile, *here), image, 0, y, x
                    else:
                        size = tuple(inputs["image_sizes"][image].tolist())
                        columns, top, left = packed[size]
                        line, column = divmod(tile - 1, columns)
                        place = (4 * line + y - top, 4 * column + x - left)
                        yield (image, tile, *here), image, 1, *place


@pytest.mark.parametrize("name", CASES)
def test_views_show_the_tokens_that_change_with_the_pixels(name: str) -> None:
    """With the tower's attention silenced, a patch reaches no token but its own."""
    of, images, counts = CASES[name]
    tiny = build(of)
    images = {key: images[key] for key in PIXELS if key in images}
    found = attention_map(tiny.model, prompts(tiny, images, counts))
    maps = [image for prompt in found for image in prompt]
    tower = describe_tower(tiny.model, describe_model(tiny.model))
    for layer in tower.layers:
        layer.register_forward_hook(_silence)
    plain = encode(tiny.model, images)
    assert len(plain) == sum(counts) == sum(image.weights.shape[-1] for image in maps)
    starts = [sum(counts[:image]) for image in range(len(counts))]
    shown: set[int] = set()
    for index, image, view, row, column in places(name, images):
        changed = {**images, "pixel_values": images["pixel_values"].clone()}
        part = changed["pixel_values"][index]
        changed["pixel_values"][index] = part + noise(*part.shape)
        tokens = (encode(tiny.model, changed) != plain).any(-1).nonzero().flatten().tolist()
        views = maps[image].views
        row, column = row // tower.merge, column // tower.merge
        inside = view < len(views) and 0 <= row < len(views[view]) and column >= 0
        if not inside or column >= views[view].shape[1]:
            assert name == "tilings" and not tokens  # padding
            continue
        assert tokens == [starts[image] + int(views[view][row, column])]
        shown.update(tokens)
    # What is in no view is a newline, whatever its pixels.
    newlines = set(range(len(plain))) - shown
    assert len(newlines) == {"llava_next": 16, "tilings": 8 + 4 + 6 + 8}.get(name, 0)
    assert sum(view.numel() for image in maps for view in image.views) == len(shown)


def _silence(module: Any, args: Any, output: Any) -> Any:
    return (output[0] * 0, *output[1:]) if isinstance(output, tuple) else output * 0


def test_grids_of_llava_next() -> None:
    of, images, counts = CASES["tilings"]
    tiny = family(of)
    maps = attention_map(tiny.model, prompts(tiny, images, counts), heads="all")
    shapes = [[tuple(grid.shape) for grid in image.grids()] for (image,) in maps]
    lead = (3, 4, 1)
    assert shapes == [
        [(*lead, 4, 4), (*lead, *packed)] for packed in ((8, 8), (4, 8), (6, 8), (8, 4))
    ]
    ((image,), *_) = maps
    base, packed = image.grids()
    lines = image.weights[..., 16:].unflatten(-1, (8, 9))
    assert torch.equal(base.flatten(-2), image.weights[..., :16])
    assert torch.equal(packed, lines[..., :8])
    # The newlines' own attention is in the weights, and in no grid.
    total = base.sum((-2, -1)) + packed.sum((-2, -1)) + lines[..., 8].sum(-1)
    assert torch.allclose(total, image.weights.sum(-1), atol=1e-6)
    assert lines[..., 8].sum() > 1e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_two_images_in_a_prompt(name: str) -> None:
    tiny = family(name)
    together, _ = two_images(tiny)
    ((first, second),) = attention_map(tiny.model, together, heads="all")
    weights = torch.stack([layer[0, :, -1:] for layer in eager_attentions(name, together)])
    keys, n = visual_keys(together, 0), tiny.image_tokens
    assert torch.allclose(first.weights, weights[..., keys[:n]], atol=1e-5)
    assert torch.allclose(second.weights, weights[..., keys[n:]], atol=1e-5)
    # A row between the two cannot see the second, unless the prompt is read in both directions.
    between = int(keys[n]) - 2 - len(tiny.layout.before) + 1
    ((first, second),) = attention_map(tiny.model, together, rows=[between])
    assert float(first.weights.sum()) > 0
    assert (float(second.weights.sum()) > 0) == (name == "paligemma")


def test_a_prompt_without_an_image_has_no_map() -> None:
    tiny = family("llava")
    inputs = tiny.inputs(batch=2)
    ids, mask = inputs["input_ids"].clone(), inputs["attention_mask"]
    ids[0][ids[0] == IMAGE] = 30
    mixed = {"input_ids": ids, "attention_mask": mask, "pixel_values": inputs["pixel_values"][1:]}
    none, (image,) = attention_map(tiny.model, mixed)
    assert none == []
    same(image, attention_map(tiny.model, tiny.single(inputs, 1))[0][0])


# -- wrapped models --------------------------------------------------------------------------------


@dataclass(frozen=True)
class DoubledImage(AttentionMethod):
    """Twice the attention for the image in layer 0, renormalised."""

    name: ClassVar[str] = "doubled"
    rows: ClassVar[Literal["predicting", "text"]] = "predicting"

    def layers(self, info: Any) -> list[int]:
        return [0]

    def plan(self, keys: Keys) -> Plan:
        return Plan({"gain": 1 + keys.visual.float()}, [True] * len(keys.kinds))

    def edit_weights(self, weights: Tensor, *, gain: Tensor) -> tuple[Tensor, Tensor]:
        edited = weights * gain[:, None, None, :]
        everywhere = torch.ones(weights.shape[:3], dtype=torch.bool)
        return edited / edited.sum(-1, keepdim=True), everywhere


@pytest.mark.parametrize("name", FAMILIES)
def test_a_methods_edit_is_in_the_map(name: str) -> None:
    tiny = family(name)
    inputs = tiny.inputs(batch=2)
    plain = attention_map(tiny.model, inputs, rows=[-3, -1], heads="all")
    with vlmfix.wrapped(tiny.model, DoubledImage()):
        edited = attention_map(tiny.model, inputs, rows=[-3, -1], heads="all")
        with vlmfix.suspended(tiny.model):
            paused = attention_map(tiny.model, inputs, rows=[-3, -1], heads="all")
    later = []
    for (before,), (after,), (off,) in zip(plain, edited, paused, strict=True):
        same(before, off, atol=0)
        old, new = before.weights[0], after.weights[0]
        mass = old.sum(-1, keepdim=True)
        # Rows summed to one over all keys before, and do so after: 1 + mass is the norm.
        assert torch.allclose(new[:, 1:], (2 * old / (1 + mass))[:, 1:], atol=1e-5)
        assert torch.allclose(new[:, :1], old[:, :1], atol=1e-6)  # a row that predicts nothing
        later.append((before.weights[1:, :, 1] - after.weights[1:, :, 1]).abs().max())
    assert max(later) > 1e-4  # Gemma 3's window hides the image from one of the two


def decode_steps(model: Any, inputs: Inputs, **kwargs: Any) -> tuple[Tensor, Inputs]:
    """What generate() returns, and {(layer, keys): (B, H, K)} rows that its edited steps use."""
    steps: Inputs = {}
    original = vlmfix.engine.edits.edited_weights

    def recording(layer: int, *args: Any) -> Any:
        result = original(layer, *args)
        if result[0].shape[2] == 1:
            steps[layer, result[0].shape[3]] = result[0][:, :, 0]
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vlmfix.engine.edits, "edited_weights", recording)
        return model.generate(**inputs, **kwargs), steps


def shows(maps: list[list[AttentionMap]], steps: Inputs, inputs: Inputs, image_id: int) -> bool:
    """Whether the rows of generated tokens in the maps are those of the steps."""
    length = inputs["input_ids"].shape[1]
    near = []
    for (layer, keys), weights in steps.items():
        for row, (image,) in enumerate(maps):
            visual = (inputs["input_ids"][row] == image_id).nonzero().flatten()
            found = image.weights[layer, :, keys - length]
            near.append(torch.allclose(found, weights[row][:, visual], atol=1e-5))
    return all(near)


@pytest.mark.parametrize("method", METHODS)
def test_the_map_is_what_decode_steps_use(method: str) -> None:
    tiny = build("llava")
    inputs = tiny.inputs(batch=2)
    with vlmfix.wrapped(tiny.model, METHODS[method]):
        sequences, steps = decode_steps(tiny.model, inputs, **generate_kwargs())
        before = vlmfix.last_call(tiny.model)
        maps = attention_map(tiny.model, inputs, rows="answer", heads="all", generated=sequences)
        assert vlmfix.last_call(tiny.model) == before
        again = tiny.model.generate(**inputs, **generate_kwargs())
        assert torch.equal(sequences, again)
    assert bool(steps) == METHODS[method].edits_rows()
    assert shows(maps, steps, inputs, IMAGE)
    plain = attention_map(tiny.model, inputs, rows="answer", heads="all", generated=sequences)
    pairs = zip(plain, maps, strict=True)
    assert max(float((a.weights - b.weights).abs().max()) for (a,), (b,) in pairs) > 1e-4
    assert not steps or not shows(plain, steps, inputs, IMAGE)


def test_a_method_that_reads_the_question_gets_the_processor() -> None:
    model, processor = vlmfix.load("emoji")
    content = [{"type": "image", "image": "emoji:1"}, {"type": "text", "text": "Is there a bed?"}]
    inputs = chat_inputs(model, processor, [[{"role": "user", "content": content}]])
    kwargs = {"max_new_tokens": 4, "do_sample": False, "processor": processor}
    with vlmfix.wrapped(model, "gift"):
        sequences, steps = decode_steps(model, inputs, **kwargs)
        asked: Inputs = {"rows": "answer", "heads": "all", "generated": sequences}
        known = attention_map(model, inputs, **asked, processor=processor)
        unknown = attention_map(model, inputs, **asked)
    assert steps
    assert shows(known, steps, inputs, model.config.image_token_id)
    assert not shows(unknown, steps, inputs, model.config.image_token_id)


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "maps.md"
    names: Inputs = {}
    monkeypatch.chdir(tmp_path)
    exec(page.read_text().split("```python\n")[1].split("```")[0], names)
    assert names["base"].shape == names["pai"].shape == (8, 8)
    assert float(names["pai"].sum()) > float(names["base"].sum())
    assert (tmp_path / "maps.png").stat().st_size > 0


# -- what is left alone ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_a_plain_model_is_left_as_it_was(name: str) -> None:
    tiny = build(name)
    inputs = tiny.inputs(batch=2)
    kwargs = generate_kwargs(output_logits=True, return_dict_in_generate=True)
    plain = tiny.model.generate(**inputs, **kwargs)
    other = tiny.inputs(batch=1, lengths=[9])
    before = state(tiny.model)
    attention_map(tiny.model, other, rows="question")
    assert state(tiny.model) == before
    after = tiny.model.generate(**inputs, **kwargs)
    assert torch.equal(plain.sequences, after.sequences)
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, after.logits, strict=True))


def test_a_failed_forward_leaves_the_model_plain() -> None:
    tiny = build("llava")
    encode(tiny.model, tiny.inputs())  # transformers hooks its own recorders in on first use
    before = state(tiny.model)
    with pytest.raises(ValueError, match="doesn't match model"):
        attention_map(tiny.model, {**tiny.inputs(), "pixel_values": torch.zeros(1, 3, 18, 18)})
    assert state(tiny.model) == before


def test_inputs_are_not_changed() -> None:
    tiny = family("qwen3_vl")
    inputs = tiny.inputs()
    copies = {key: value.clone() for key, value in inputs.items()}
    generated = torch.cat((inputs["input_ids"], torch.tensor([[20, 21]])), dim=1)
    attention_map(tiny.model, inputs, rows="answer", generated=generated)
    assert inputs.keys() == copies.keys()
    assert all(torch.equal(inputs[key], copies[key]) for key in copies)


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": [99]}, "row 99 is outside of prompt 0"),
        ({"rows": [-99]}, "is outside of prompt 0"),
        ({"rows": [0]}, "row 0 of prompt 0 is padding"),
        ({"rows": [3]}, "row 3 of prompt 0 is text before any image"),
        ({"rows": [10]}, "row 10 of prompt 0 is a visual token"),
        ({"rows": []}, "names no row of prompt 0"),
        ({"rows": "first"}, "give 'last', 'question', 'answer'"),
        ({"rows": -1}, "or a list of positions"),
        ({"rows": "answer"}, "needs generated="),
        ({"layers": [3]}, r"layers=\[3\]: give layers .* \[0, 1, 2\]"),
        ({"layers": [-1]}, r"layers=\[-1\]"),
        ({"layers": []}, r"layers=\[\]"),
        ({"heads": 4}, "heads=4: .* from 0 to 3"),
        ({"heads": "sum"}, "heads='sum'"),
        ({"generated": torch.ones(2, 3, dtype=torch.long)}, "one sequence per prompt"),
    ],
    ids=str,
)
def test_what_cannot_be_asked(arguments: Inputs, message: str) -> None:
    tiny = family("llava")
    before = state(tiny.model)
    with pytest.raises(BadInput, match=message):
        attention_map(tiny.model, tiny.inputs(batch=2), **arguments)
    assert state(tiny.model) == before


def test_inputs_that_cannot_be_used() -> None:
    tiny = family("llava")
    inputs = tiny.inputs()
    with pytest.raises(BadInput, match="pass input_ids"):
        attention_map(tiny.model, {"pixel_values": inputs["pixel_values"]})
    with pytest.raises(BadInput, match="no past_key_values"):
        attention_map(tiny.model, {**inputs, "past_key_values": object()})
    text = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    with pytest.raises(BadInput, match="no prompt has an image"):
        attention_map(tiny.model, {**text, "input_ids": text["input_ids"].clamp(max=50)})
    features = encode(tiny.model, inputs)
    with pytest.raises(BadInput, match="the inputs lack pixel_values"):
        attention_map(tiny.model, {**text, "image_embeds": features})
    short = {**inputs, "input_ids": inputs["input_ids"][:, 1:].clone()}
    short["input_ids"][0, 5] = 30
    short["attention_mask"] = inputs["attention_mask"][:, 1:]
    with pytest.raises(BadInput, match="15 placeholders, which its images do not fill"):
        attention_map(tiny.model, short)
    bare = tiny.inputs(lengths=[0])
    with pytest.raises(BadInput, match="is a visual token"):
        attention_map(tiny.model, bare)
    with pytest.raises(BadInput, match="no such text follows"):
        attention_map(tiny.model, bare, rows="question")


def test_videos_are_refused() -> None:
    tiny = family("qwen2_5_vl")
    inputs = tiny.inputs()
    ids = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, VIDEO)
    video = {
        "input_ids": ids,
        "attention_mask": inputs["attention_mask"],
        "pixel_values_videos": inputs["pixel_values"],
        "video_grid_thw": inputs["image_grid_thw"],
    }
    with pytest.raises(BadInput, match="holds a video"):
        attention_map(tiny.model, video)


@pytest.mark.parametrize("name", ["llava_onevision", "idefics2"])
def test_a_family_without_traced_tokens_is_refused(name: str) -> None:
    tiny = build(name)
    before = state(tiny.model)
    with pytest.raises(UnsupportedModel, match="no map can be drawn over its images"):
        attention_map(tiny.model, tiny.inputs())
    assert state(tiny.model) == before


def test_a_model_in_training_mode_is_refused() -> None:
    tiny = build("llava")
    tiny.model.train()
    with pytest.raises(StateError, match="training mode"):
        attention_map(tiny.model, tiny.inputs())
