"""The recorder in the vision tower, against eager attention and against the models' own packing."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from matrix import family
from prompts import encode, noise, qwen_images, state, two_images
from tiny import FAMILIES, OTHERS, TinyFamily, build, generate_kwargs
from tiny_configs import IMAGE, VIDEO, VISION_END, VISION_START
from torch import Tensor

import vlmfix.engine.patches
import vlmfix.engine.recorder
import vlmfix.families.tower
from vlmfix.engine.patches import _square_tiles
from vlmfix.engine.recorder import VisionRecorder, received_attention
from vlmfix.errors import BadInput, StateError, UnsupportedModel
from vlmfix.families import describe_model
from vlmfix.families.tower import EncodedImage, Tower, describe_tower

Inputs = dict[str, Any]

SUPPORTED = (*FAMILIES, "qwen2_vl", "glm4v", "idefics3", "aya_vision", "mistral3")
WITH_CLS = ("llava", "llava_next", "internvl")
LAYERS = (0, 1)


def tower_of(tiny: TinyFamily) -> Tower:
    return describe_tower(tiny.model, describe_model(tiny.model))


def ragged_smolvlm() -> Inputs:
    pixels = noise(2, 2, 3, 16, 16)
    pixels[1, 1] = 0  # the processor pads the shorter row with an empty image
    return {"pixel_values": pixels}


#: Images that the tiny inputs do not have: several windows, several sizes, padding.
SPECIAL: dict[str, tuple[str, Inputs]] = {
    "windows": ("qwen2_5_vl", qwen_images((8, 12), (12, 8), (4, 4))),
    "grids": ("qwen3_vl", qwen_images((4, 8), (8, 4))),
    "tilings": (
        "llava_next",
        {
            "pixel_values": noise(4, 5, 3, 16, 16),
            "image_sizes": torch.tensor([[32, 32], [16, 32], [20, 32], [30, 12]]),
        },
    ),
    "ragged": ("smolvlm", ragged_smolvlm()),
    "sizes": (
        "mistral3",
        {"pixel_values": noise(2, 3, 32, 32), "image_sizes": torch.tensor([[16, 32], [32, 16]])},
    ),
}
CASES = [*SUPPORTED, *SPECIAL]
#: Pictures of other sizes, padded to one; the last has a row of patches that fills no square.
SIZES = ((16, 32), (32, 16), (20, 24))


def case(name: str) -> tuple[TinyFamily, Inputs]:
    if name in SPECIAL:
        return family(SPECIAL[name][0]), SPECIAL[name][1]
    return family(name), family(name).inputs(batch=2)


def eager_calls(
    name: str, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> list[list[tuple[Tensor, Tensor]]]:
    """Per layer, softmax (b, H, Q, K) and keys (b, H, K, D) of each call of the tower, eager."""
    model = build(name).model
    model.set_attn_implementation("eager")
    layers = tower_of(family(name)).layers
    found: dict[int, list[tuple[Tensor, Tensor]]] = {}
    home = sys.modules[type(layers[0]).__module__]
    original = home.eager_attention_forward

    def recording(module: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(module, *args, **kwargs)
        found.setdefault(id(module), []).append((output[1], args[1]))
        return output

    monkeypatch.setattr(home, "eager_attention_forward", recording)
    encode(model, inputs)
    monkeypatch.undo()
    return list(found.values())


@contextmanager
def shifted(tower: Tower, patch: int) -> Iterator[None]:
    """Change one patch (of all tiles, counted through) behind the last attention of the tower."""

    def on_block(module: Any, args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        # Not by one number: a LayerNorm behind would take it out again.
        output[patch] += torch.linspace(-1, 2, output.shape[1])
        return output

    def on_tower(module: Any, args: Any, output: Any) -> Any:
        def shift(hidden: Tensor | None) -> Tensor | None:
            if hidden is None:
                return None
            tile, place = divmod(patch, hidden.shape[1] - tower.has_cls)
            hidden = hidden.clone()
            hidden[tile, place + tower.has_cls] += torch.linspace(-1, 2, hidden.shape[2])
            return hidden

        output.last_hidden_state = shift(output.last_hidden_state)
        if output.hidden_states is not None:
            output.hidden_states = tuple(map(shift, output.hidden_states))
        return output

    blocks = getattr(tower.module, "blocks", None)
    hooked: Any = blocks[-1] if blocks is not None else tower.module
    handle = hooked.register_forward_hook(on_block if blocks is not None else on_tower)
    try:
        yield
    finally:
        handle.remove()


def patches_of_tokens(tiny: TinyFamily, inputs: Inputs, patches: int) -> list[list[int]]:
    """For each visual token the patches that it is made of, found by changing them one by one."""
    tower, plain = tower_of(tiny), encode(tiny.model, inputs)
    found: list[list[int]] = [[] for _ in plain]
    for patch in range(patches):
        with shifted(tower, patch):
            changed = (encode(tiny.model, inputs) != plain).any(-1)
        for token in changed.nonzero().flatten().tolist():
            found[token].append(patch)
    return found


def placed(images: list[EncodedImage], layer: int, what: str) -> Tensor:
    """The values of one layer at all visual tokens of the batch."""
    return torch.cat(
        [
            image.to_visual_tokens([getattr(tile.received[layer], what) for tile in image.tiles])
            for image in images
        ]
    )


def placed_keys(images: list[EncodedImage], layer: int) -> Tensor:
    """The keys of one layer at all visual tokens of the batch, (n, D), without newlines."""
    return torch.cat(
        [
            torch.cat([tile.received[layer].key for tile in image.tiles])[
                image.index[image.index >= 0]
            ]
            for image in images
        ]
    )


def read(tiny: TinyFamily, inputs: Inputs) -> list[EncodedImage]:
    with VisionRecorder(tower_of(tiny), LAYERS) as recorder:
        encode(tiny.model, inputs)
        return recorder.take()


def same(one: list[EncodedImage], other: list[EncodedImage]) -> None:
    assert len(one) == len(other)
    for left, right in zip(one, other, strict=True):
        assert torch.equal(left.index, right.index)
        for a, b in zip(left.tiles, right.tiles, strict=True):
            assert (a.rows, a.columns, set(a.received)) == (b.rows, b.columns, set(b.received))
            for layer in a.received:
                assert torch.allclose(a.received[layer].column, b.received[layer].column, atol=1e-6)
                assert torch.allclose(a.received[layer].key, b.received[layer].key, atol=1e-5)
                x, y = a.received[layer].cls, b.received[layer].cls
                assert (x is None) == (y is None)
                assert x is None or torch.allclose(x, y, atol=1e-6)


# -- what is read ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_tokens_have_the_eager_attention_of_their_patches(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny, inputs = case(name)
    tower = tower_of(tiny)
    images = read(tiny, inputs)
    recorded = eager_calls(tiny.name, inputs, monkeypatch)
    assert len(recorded) == len(tower.layers) == 2
    first = int(tower.has_cls)
    for layer, calls in enumerate(recorded):
        # Images in one sequence do not see each other: the mean is over the queries of their own.
        means = [w.mean(1).sum(1) / (w > 0).any(1).sum(1) for w, _ in calls]
        column = torch.cat([mean[:, first:].flatten() for mean in means])
        row = torch.cat([w[:, :, 0].mean(1)[:, first:].flatten() for w, _ in calls])
        keys = torch.cat([key.mean(1)[:, first:].flatten(0, 1) for _, key in calls])
        if layer == 0:
            sources = patches_of_tokens(tiny, inputs, len(column))
            # Every patch is somewhere, unless LLaVA-NeXT cut it off with the padding.
            assert name == "tilings" or sorted(sum(sources, [])) == list(range(len(column)))
        for what, per_patch in (("column", column), ("cls", row)):
            if what == "cls" and not tower.has_cls:
                assert all(t.received[layer].cls is None for i in images for t in i.tiles)
                continue
            expected = torch.stack([per_patch[patches].mean() for patches in sources])  # [] -> NaN
            actual = placed(images, layer, what)
            assert actual.dtype == torch.float32
            assert torch.allclose(actual, expected, atol=1e-6, equal_nan=True)
            assert expected.nan_to_num().std() > 1e-4  # flat values would prove nothing
        merged = torch.stack([keys[patches].mean(0) for patches in sources if patches])
        assert torch.allclose(placed_keys(images, layer), merged, atol=1e-6)
        assert merged.std(0).min() > 1e-3
    assert tower.has_cls == (tiny.name in WITH_CLS)


@pytest.mark.parametrize("base", ["sdpa", "eager"])
def test_keys_are_what_the_layers_key_projection_gives(base: str) -> None:
    tiny = build("llava")
    tiny.model.set_attn_implementation(base)
    tower, projected = tower_of(tiny), []
    hook: Any = tower.layers[1].k_proj
    hook.register_forward_hook(lambda module, args, output: projected.append(output))
    images = read(tiny, tiny.inputs(batch=2))
    (keys,) = projected
    assert keys.shape == (2, 17, 32)
    expected = keys.view(2, 17, 2, 16).mean(2)[:, 1:]  # the class token goes, heads are averaged
    for image, own in zip(images, expected, strict=True):
        key = image.tiles[0].received[1].key
        assert key.dtype == torch.float32 and not key.requires_grad
        assert torch.allclose(key, own, atol=1e-6)


@pytest.mark.parametrize(
    ("hidden", "layer"), [(-2, 22), (-1, 23), (1, 0), (0, 0), (24, 23), ([-2, -5, 16], 22)]
)
def test_the_layer_whose_output_is_projected(hidden: Any, layer: int) -> None:
    assert vlmfix.families.tower._feature_layer(hidden, 24) == layer


def test_feature_layers_of_families() -> None:
    found = {name: tower_of(family(name)).feature_layer for name in SUPPORTED}
    assert found == dict.fromkeys(SUPPORTED, 1) | {"llava": 0, "llava_next": 0}
    tiny = build("qwen2_5_vl")
    tower: Any = tiny.model.get_encoder(modality="image")
    for full, layer in (((0,), 0), ((0, 1), 1), ((1,), 1)):
        tower.config.fullatt_block_indexes = list(full)
        assert tower_of(tiny).feature_layer == layer


@pytest.mark.parametrize("name", CASES)
def test_the_class_token_behind_the_last_block(name: str) -> None:
    tiny, inputs = case(name)
    tower = tower_of(tiny)
    tiles = [tile for image in read(tiny, inputs) for tile in image.tiles]
    if not tower.has_cls:
        assert all(tile.cls_output is None for tile in tiles)
        return
    blocks: Any = tower.module.encoder
    outputs: list[Tensor] = []
    block = (blocks.layers if hasattr(blocks, "layers") else blocks.layer)[-1]
    handle = block.register_forward_hook(lambda *args: outputs.append(args[-1]))
    encode(tiny.model, inputs)
    handle.remove()
    for tile, hidden in zip(tiles, outputs[0], strict=True):
        assert tile.cls_output is not None and tile.cls_output.dtype == torch.float32
        assert torch.equal(tile.cls_output, hidden[0])
        assert tile.cls_output.untyped_storage().nbytes() <= len(tiles) * hidden.shape[1] * 4


def test_which_families_fill_one_run_of_placeholders_with_tiles() -> None:
    found = {name: tower_of(family(name)).whole for name in SUPPORTED}
    assert {name: whole for name, whole in found.items() if whole} == {
        "llava_next": "first",
        "internvl": "last",
    }


def test_windows_are_really_reordered() -> None:
    """The case "windows" would be empty if its patches came in raster order anyway."""
    tiny, inputs = case("windows")
    sources = patches_of_tokens(tiny, inputs, 96 + 96 + 16)
    assert [patches[0] for patches in sources] != sorted(patches[0] for patches in sources)
    assert tower_of(tiny).full_attention == (1,)
    assert tower_of(family("qwen3_vl")).full_attention == (0, 1)


def test_tiles_of_llava_next() -> None:
    tiny, inputs = case("tilings")
    images = read(tiny, inputs)
    assert [len(image.tiles) for image in images] == [5, 3, 5, 3]
    for image, height in zip(images, [8, 4, 6, None], strict=True):
        values = image.to_visual_tokens(
            [torch.full((16,), float(i)) for i, _ in enumerate(image.tiles)]
        )
        assert values[:16].tolist() == [0] * 16  # the whole view has no newline
        if height is not None:
            assert int(values.isnan().sum()) == height
            assert values[16:].view(height, 9)[:, 8].isnan().all()


def test_grids() -> None:
    for name, grids in {
        "windows": [(4, 6), (6, 4), (2, 2)],
        "grids": [(2, 4), (4, 2)],
        "sizes": [(2, 4), (4, 2)],
        "internvl": [(2, 2)] * 2,
        "llava": [(4, 4)] * 2,
    }.items():
        images = read(*case(name))
        assert [(tile.rows, tile.columns) for i in images for tile in i.tiles] == grids


@pytest.mark.parametrize("name", ["mistral3", "llava_pixtral", "lighton_ocr"])
@pytest.mark.parametrize("base", ["sdpa", "eager"])
def test_images_of_other_sizes_in_one_sequence_are_read_as_if_alone(name: str, base: str) -> None:
    tiny = build(name)
    tiny.model.set_attn_implementation(base)
    pixels = noise(3, 3, 32, 32)
    together = read(tiny, {"pixel_values": pixels, "image_sizes": torch.tensor(SIZES)})
    side = tower_of(tiny).merge
    for number, (image, (height, width)) in enumerate(zip(together, SIZES, strict=True)):
        own = {
            "pixel_values": pixels[number : number + 1, :, :height, :width],
            "image_sizes": torch.tensor([[height, width]]),
        }
        same([image], read(tiny, own))
        (tile,) = image.tiles
        assert (tile.rows, tile.columns) == (height // 4 // side, width // 4 // side)
        if height // 4 % side == 0:
            for received in tile.received.values():
                assert float(received.column.sum()) * side**2 == pytest.approx(1)


def test_pixtral_in_llava_without_sizes_has_pictures_that_fill_their_tensor() -> None:
    tiny, inputs = family("llava_pixtral"), family("llava_pixtral").inputs(batch=2)
    same(read(tiny, inputs), read(tiny, {"pixel_values": inputs["pixel_values"]}))


def test_squares_of_a_tile_that_is_wider_than_high() -> None:
    """2 x 6 patches of 4 pixels, 2 x 2 of which are a token: 1 x 3 tokens."""
    patches = torch.arange(12.0)[None]
    config = SimpleNamespace(patch_size=4)
    tower: Any = SimpleNamespace(merge=2, has_cls=False, module=SimpleNamespace(config=config))
    calls = {5: [(patches, patches[:, 0], torch.stack([patches, -patches], dim=-1))]}
    (tile,) = _square_tiles(tower, calls, {"pixel_values": torch.zeros(1, 3, 8, 24)})
    means = [3.5, 5.5, 7.5]
    assert (tile.rows, tile.columns) == (1, 3)
    assert tile.received[5].column.tolist() == means
    assert tile.received[5].key.tolist() == [[mean, -mean] for mean in means]


def test_padded_patches_neither_ask_nor_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = family("smolvlm")
    mask = torch.ones(2, 1, 16, 16, dtype=torch.bool)
    mask[1, :, :, 8:] = False
    inputs = {"pixel_values": noise(2, 1, 3, 16, 16), "pixel_attention_mask": mask}
    images = read(tiny, inputs)
    real = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool().repeat_interleave(4, 0).view(2, 16)
    calls = eager_calls("smolvlm", inputs, monkeypatch)
    for layer, ((w, _),) in enumerate(calls):
        for index, image in enumerate(images):
            column = w[index][:, real[index]].mean(dim=(0, 1))
            expected = column.view(2, 2, 2, 2).mean(dim=(1, 3)).flatten()
            actual = image.tiles[0].received[layer].column
            assert torch.allclose(actual, expected, atol=1e-6)
    assert images[1].tiles[0].received[0].column.view(2, 2)[:, 1].tolist() == [0, 0]


def test_received_attention_of_a_worked_example() -> None:
    query = torch.tensor([[1.0, 0], [0, 1], [1, 1]])[None, None]
    key = torch.tensor([[1.0, 0], [0, 2], [1, -1]])[None, None]
    column, first = received_attention(query, key, 0.5)
    assert torch.allclose(column, torch.tensor([[0.3074, 0.4559, 0.2367]]), atol=1e-4)
    assert torch.allclose(first, torch.tensor([[0.3837, 0.2327, 0.3837]]), atol=1e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_chunks_do_not_matter(masked: bool) -> None:
    query, key = noise(2, 4, 37, 8), noise(2, 2, 37, 8)
    mask = (torch.arange(37) < torch.tensor([[37], [20]]))[:, None, None] if masked else None
    whole = received_attention(query, key, 0.3, mask)
    for chunk_bytes in (1, 4 * 2 * 4 * 37 * 5):
        parts = received_attention(query, key, 0.3, mask, chunk_bytes)
        assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(whole, parts, strict=True))
    assert torch.allclose(whole[0].sum(1), torch.ones(2))
    if mask is not None:
        additive = torch.zeros(2, 1, 37, 37).masked_fill(~mask, torch.finfo(torch.float32).min)
        again = received_attention(query, key, 0.3, additive)
        assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(whole, again, strict=True))
        assert whole[0][1, 20:].tolist() == [0] * 17


def test_rows_are_held_in_bounded_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    original = vlmfix.engine.recorder.reference.row_scores

    def measured(*args: Any) -> Tensor:
        scores: Tensor = original(*args)
        sizes.append(scores.numel() * scores.element_size())
        return scores

    monkeypatch.setattr(vlmfix.engine.recorder.reference, "row_scores", measured)
    received_attention(noise(1, 16, 2048, 8), noise(1, 16, 2048, 8), 0.3)
    assert sizes == [64 * 2**20] * 4


@pytest.mark.parametrize("name", SUPPORTED)
def test_batch_equals_singles(name: str) -> None:
    tiny = family(name)
    inputs = tiny.inputs(batch=3)
    singles = [image for row in range(3) for image in read(tiny, tiny.single(inputs, row))]
    same(read(tiny, inputs), singles)


@pytest.mark.parametrize("kwargs", [{}, {"num_beams": 3}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_two_images_in_a_prompt(name: str, kwargs: Inputs) -> None:
    tiny = family(name)
    together, apart = two_images(tiny)
    with VisionRecorder(tower_of(tiny), LAYERS) as recorder:
        tiny.model.generate(**together, **generate_kwargs(**kwargs))
        one = recorder.take()
        tiny.model.generate(**apart, **generate_kwargs(**kwargs))
        other = recorder.take()
    same(one, other)
    assert int((together["input_ids"] == IMAGE).sum()) == sum(len(image.index) for image in one)
    values = placed(one, 0, "column").view(2, -1).nan_to_num()
    assert (values[0] - values[1]).abs().max() > 1e-4  # the two images are told apart


# -- what is left alone ---------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["sdpa", "eager"])
@pytest.mark.parametrize("name", SUPPORTED)
def test_a_tapped_model_is_bit_identical(name: str, base: str) -> None:
    tiny = family(name) if base == "sdpa" else build(name)
    model, inputs = tiny.model, tiny.inputs(batch=3)
    model.set_attn_implementation(base)
    kwargs = generate_kwargs(output_logits=True, return_dict_in_generate=True)

    def outputs() -> tuple[Tensor, ...]:
        result = model.generate(**inputs, **kwargs)
        with torch.no_grad():
            logits = model(**inputs).logits
        return (result.sequences, *result.logits, logits, encode(model, inputs))

    plain = outputs()
    with VisionRecorder(tower_of(tiny), LAYERS) as recorder:
        tapped = outputs()
        from_eager = recorder.take()
    assert all(torch.equal(a, b) for a, b in zip(plain, tapped, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(plain, outputs(), strict=True))
    same(from_eager, read(family(name), inputs))


@pytest.mark.parametrize("name", FAMILIES)
def test_detach_restores_everything(name: str) -> None:
    tiny = build(name)
    before, tower = state(tiny.model), tower_of(tiny)
    with pytest.raises(RuntimeError, match="boom"), VisionRecorder(tower, LAYERS):
        assert state(tiny.model) != before
        raise RuntimeError("boom")
    assert state(tiny.model) == before
    recorder = VisionRecorder(tower, (1,))
    for _ in range(2):
        recorder.attach()
        recorder.detach()
        recorder.detach()
        assert state(tiny.model) == before


def test_only_chosen_layers_are_touched() -> None:
    tiny = build("llava")
    tower = tower_of(tiny)
    first: Any = tower.layers[0]
    config = first.config
    with VisionRecorder(tower, (1,)) as recorder:
        assert first.config is config and tower.layers[1].config is not config
        encode(tiny.model, tiny.inputs())
        assert [set(tile.received) for image in recorder.take() for tile in image.tiles] == [{1}]


def test_a_get_image_features_of_the_users_comes_back() -> None:
    tiny = build("llava")
    host = tiny.model.model
    own = host.get_image_features
    host.__dict__["get_image_features"] = own
    with VisionRecorder(tower_of(tiny), LAYERS):
        assert host.get_image_features is not own
    assert host.__dict__["get_image_features"] is own


def test_a_failed_encoding_leaves_nothing_behind() -> None:
    tiny = build("llava")
    good = tiny.inputs()
    with VisionRecorder(tower_of(tiny), LAYERS) as recorder:
        encode(tiny.model, good)
        with pytest.raises(ValueError, match="doesn't match model"):
            encode(tiny.model, {"pixel_values": torch.zeros(1, 3, 20, 20)})
        assert recorder.take() == []
        tower_of(tiny).module(good["pixel_values"])  # the tower alone is no encoding
        assert recorder.take() == []
        encode(tiny.model, good)
        assert len(recorder.take()) == 1
        assert recorder.take() == []


def test_outside_an_encoding_nothing_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = build("llava")
    inputs = tiny.inputs()

    def forbidden(*_: Any) -> None:
        raise AssertionError("attention was read")

    with VisionRecorder(tower_of(tiny), LAYERS) as recorder:
        encode(tiny.model, inputs)
        monkeypatch.setattr(vlmfix.engine.recorder, "received_attention", forbidden)
        tower_of(tiny).module(inputs["pixel_values"])
        assert len(recorder.take()) == 1


def test_the_last_encoding_counts_and_text_has_none() -> None:
    tiny = build("qwen2_5_vl")
    one, other = tiny.inputs(batch=1, seed=1), tiny.inputs(batch=2, seed=2)
    text = torch.tensor([[1, 20, 21, 22]])
    with VisionRecorder(tower_of(tiny), LAYERS) as recorder:
        tiny.model.generate(text, **generate_kwargs())
        assert recorder.take() == []
        encode(tiny.model, one)
        encode(tiny.model, other)
        assert len(recorder.take()) == 2


def test_videos_are_not_read() -> None:
    tiny = build("qwen3_vl")
    spans = [[VISION_START, *[kind] * 4, VISION_END] for kind in (IMAGE, VIDEO)]
    ids = torch.tensor([[1, 9, *spans[0], 20, *spans[1], 21, 22]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE).long() + 2 * (ids == VIDEO).long(),
        **qwen_images((4, 4)),
        "pixel_values_videos": noise(16, 96) * 2,
        "video_grid_thw": torch.tensor([[1, 4, 4]]),
    }
    plain = tiny.model.generate(**inputs, **generate_kwargs())
    with VisionRecorder(tower_of(tiny), LAYERS) as recorder:
        assert torch.equal(tiny.model.generate(**inputs, **generate_kwargs()), plain)
        with_video = recorder.take()
        encode(tiny.model, inputs)
        alone = recorder.take()
    same(with_video, read(tiny, qwen_images((4, 4))))
    same(with_video, alone)


def test_threads_read_their_own_images() -> None:
    tiny = build("qwen2_5_vl")
    prompts = [qwen_images((4, 4), (8, 4)), qwen_images((4, 8))]
    prompts[1]["pixel_values"] = prompts[1]["pixel_values"] * 3
    expected = [read(tiny, prompt) for prompt in prompts]
    failures: list[BaseException] = []
    with VisionRecorder(tower_of(tiny), LAYERS) as recorder:
        barrier = threading.Barrier(2)

        def work(index: int) -> None:
            try:
                for _ in range(20):
                    barrier.wait(timeout=60)
                    encode(tiny.model, prompts[index])
                    same(recorder.take(), expected[index])
            except BaseException as failure:
                failures.append(failure)
                barrier.abort()

        threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert recorder.take() == []
    assert not failures


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("llava_onevision", "interpolates"),
        ("idefics2", "perceiver"),
        ("instructblip", "Q-Former"),
    ],
)
def test_families_without_a_token_per_patch_are_refused(name: str, reason: str) -> None:
    tiny = build(name)
    with pytest.raises(UnsupportedModel, match=f"'{name}' cannot be read: .*{reason}.*_FAMILIES"):
        tower_of(tiny)


def test_every_tiny_family_is_supported_or_refused() -> None:
    refused = {"llava_onevision", "instructblip"}
    assert set(OTHERS) - set(SUPPORTED) == refused | {"mllama", "kosmos2", "llama"}


def test_unknown_families_towers_and_settings_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = build("llava")
    monkeypatch.delitem(vlmfix.families.tower._FAMILIES, "llava")
    with pytest.raises(UnsupportedModel, match="was never checked"):
        tower_of(tiny)
    monkeypatch.undo()
    tiny.model.config.vision_feature_select_strategy = "full"
    with pytest.raises(UnsupportedModel, match="'full' on a tower with a class token"):
        tower_of(tiny)
    tiny.model.config.vision_feature_select_strategy = "default"
    tiny.model.model.vision_tower.config.model_type = "dinov2"
    with pytest.raises(UnsupportedModel, match="type 'dinov2', which was not checked"):
        tower_of(tiny)


@pytest.mark.parametrize("layers", [(), (2,), (-1, 0)])
def test_layers_that_are_not_there(layers: tuple[int, ...]) -> None:
    with pytest.raises(BadInput, match="from 0 to 1"):
        VisionRecorder(tower_of(family("llava")), layers)


def test_one_tap_at_a_time_and_no_copies() -> None:
    tiny = build("llava")
    tower = tower_of(tiny)
    with VisionRecorder(tower, (0,)) as recorder:
        inside = state(tiny.model)
        for layers in ((0,), (1,)):
            with pytest.raises(StateError, match="has a recorder already"):
                VisionRecorder(tower_of(tiny), layers).attach()
        assert state(tiny.model) == inside
        with pytest.raises(StateError, match="cannot be copied"):
            copy.deepcopy(tiny.model)
        encode(tiny.model, tiny.inputs())
        assert len(recorder.take()) == 1
    copy.deepcopy(tiny.model)


def test_flash_attention_in_the_tower_is_refused() -> None:
    tiny = build("llava")
    tower = tower_of(tiny)
    for layer in tower.layers:
        layer.config._attn_implementation_internal = "flash_attention_2"
    before = state(tiny.model)
    with pytest.raises(UnsupportedModel, match="flash_attention_2.*vision_config"):
        VisionRecorder(tower, LAYERS).attach()
    assert state(tiny.model) == before
    tiny.model.set_attn_implementation({"vision_config": "sdpa"})  # the way out that it names
    assert len(read(tiny, tiny.inputs())) == 1


def test_features_that_do_not_fit_the_rule_are_refused() -> None:
    tiny = build("llava")
    pixels = tiny.inputs()["pixel_values"]
    with VisionRecorder(tower_of(tiny), LAYERS) as recorder:
        with pytest.raises(UnsupportedModel, match="17 visual tokens where the recorder counts 16"):
            tiny.model.get_image_features(
                pixel_values=pixels, vision_feature_select_strategy="full", return_dict=True
            )
        assert recorder.take() == []


def test_a_layer_that_does_not_run_is_named() -> None:
    tiny = build("llava")
    tower = tower_of(tiny)
    tower.module.encoder.layers[1].forward = lambda hidden, *args, **kwargs: hidden
    with (
        VisionRecorder(tower, LAYERS),
        pytest.raises(UnsupportedModel, match=r"layers \[1\] .* did not run"),
    ):
        encode(tiny.model, tiny.inputs())


def test_patches_that_make_no_whole_squares() -> None:
    tower = tower_of(family("gemma3"))
    calls = {0: [(torch.zeros(1, 25), torch.zeros(1, 25), torch.zeros(1, 25, 2))]}
    with pytest.raises(UnsupportedModel, match="25 patches in 20 x 20 pixels.* 2 x 2 squares"):
        vlmfix.engine.patches.recorded_images(
            tower,
            calls,
            {"pixel_values": torch.zeros(1, 3, 20, 20)},
            torch.zeros(1, 4, 64),
            torch.zeros(1, 25, 32),
        )


def test_values_must_match_the_tiles() -> None:
    image = read(*case("tilings"))[0]
    for values in ([torch.zeros(16)] * 4, [torch.zeros(15)] * 5, []):
        with pytest.raises(BadInput, match="one value per token"):
            image.to_visual_tokens(values)


# -- the bundled model ----------------------------------------------------------------------------


def test_the_bundled_model() -> None:
    from vlmfix import emoji

    model, processor = emoji.load()
    pictures = [picture for _, picture in emoji.example_images(2)]
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe."}]}],
        add_generation_prompt=True,
    )
    inputs = processor(images=pictures, text=[text] * 2, return_tensors="pt", padding=True)
    plain = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    tower = describe_tower(model, describe_model(model))
    layers = (0, len(tower.layers) - 2)
    with VisionRecorder(tower, layers) as recorder:
        tapped = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        images = recorder.take()
    assert torch.equal(plain, tapped)
    assert tower.has_cls
    assert [(t.rows, t.columns) for image in images for t in image.tiles] == [(8, 8), (8, 8)]
    outputs = eager_attentions(model, inputs["pixel_values"])
    for index, image in enumerate(images):
        for layer in layers:
            received = image.tiles[0].received[layer]
            weights = outputs[layer][index]
            assert received.cls is not None
            assert torch.allclose(received.column, weights.mean((0, 1))[1:], atol=1e-6)
            assert torch.allclose(received.cls, weights[:, 0].mean(0)[1:], atol=1e-6)


def eager_attentions(model: Any, pixels: Tensor) -> tuple[Tensor, ...]:
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions: tuple[Tensor, ...] = model.model.vision_tower(
            pixels, output_attentions=True
        ).attentions
    return attentions
