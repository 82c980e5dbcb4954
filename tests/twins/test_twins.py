"""Twins of published checkpoints, tried as a user tries the checkpoint."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import twin_folders
from PIL import Image, ImageDraw
from twin_chats import KINDS, QUESTION, Kind, kinds, picture, user
from twin_folders import Twin
from twin_recipes import SIZES

import vlmfix
import vlmfix.evals
from vlmfix.analysis.calibrate import PARTS, calibrate
from vlmfix.analysis.doctor import examine
from vlmfix.analysis.geometry import piece_places
from vlmfix.analysis.maps import placed_images
from vlmfix.chat import chat_inputs, encode_chats
from vlmfix.errors import BadInput, MissingDependency, UnsupportedModel
from vlmfix.families.question import find_question
from vlmfix.families.tower import describe_tower

GREEDY = {"do_sample": False, "max_new_tokens": 2, "repetition_penalty": 1.0}
"""Few tokens, and not the checkpoint's own sampling."""

chat_kinds = pytest.mark.parametrize("kind", KINDS)
# transformers hands tensors to numpy 2 in an old way.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@contextmanager
def pictures_with(twin: Twin, options: Mapping[str, Any]) -> Iterator[None]:
    """Other options of the image processor."""
    pictures = twin.processor.image_processor
    with pytest.MonkeyPatch.context() as patch:
        for name, value in options.items():
            whole = type(getattr(pictures, name))
            patch.setattr(pictures, name, whole(**value) if isinstance(value, dict) else value)
        yield


def few_tokens(twin: Twin) -> AbstractContextManager[None]:
    """Pictures with few visual tokens, by the options that the image processor has for it."""
    return pictures_with(twin, twin.recipe.frugal)


def pictures_of(twin: Twin, kind: str) -> AbstractContextManager[None]:
    """The checkpoint's own pictures for one kind of chat, cheap ones for the others."""
    return nullcontext() if kind == "wide" else few_tokens(twin)


def refused_by_template(twin: Twin, kind: str) -> bool:
    """Whether the checkpoint's own template takes no chat of this kind."""
    recipe = twin.recipe
    return (
        (kind == "system" and not recipe.system)
        or (kind in ("second turn", "begun") and not recipe.turns)
        or (kind == "two" and recipe.images == 1)
    )


def test_a_folder_of_the_hub_loads(twin: Twin) -> None:
    model, processor = twin_folders.load(twin.folder, twin.recipe)
    config = twin.recipe.config
    assert [type(model).__name__] == config["architectures"]
    wanted = twin.recipe.tokenizer_config.get("processor_class")
    assert wanted is None or type(processor).__name__ == wanted
    assert str(model.dtype) == f"torch.{config.get('torch_dtype', config.get('dtype'))}"
    assert not model.training


def test_without_torchvision_the_way_out_is_said(twin: Twin) -> None:
    if not twin_folders.lacks(twin.recipe):
        pytest.skip("everything that the processor needs is installed")
    with pytest.raises(MissingDependency, match="torchvision|num2words"):
        vlmfix.load(twin.folder)


def test_placeholders_are_as_many_as_written_down(twin: Twin) -> None:
    counts = []
    for width, height in SIZES:
        ids = encode_chats(twin.processor, [[user([picture(width, height)], QUESTION)]])
        counts.append(int(twin.visual(ids["input_ids"]).sum()))
    assert tuple(counts) == twin.recipe.placeholders


def as_the_model_card_does(twin: Twin, case: Kind, begun: bool) -> Any:
    """The inputs without vlmfix: contents as the template wants them, or the text itself."""
    if getattr(twin.processor, "chat_template", None) is None:
        text = twin.recipe.image_text * len(case.images) + case.texts[0]
        return twin.processor(text=text, images=case.images, return_tensors="pt")
    chat = []
    for message in case.chat:
        content = message["content"]
        if isinstance(content, str) and twin.recipe.contents == "lists":
            content = [{"type": "text", "text": content}]
        chat.append({"role": message["role"], "content": content})
    return twin.processor.apply_chat_template(
        [chat],
        add_generation_prompt=not begun,
        continue_final_message=begun,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


@chat_kinds
def test_the_prompt_is_the_templates(twin: Twin, kind: str) -> None:
    if refused_by_template(twin, kind):
        pytest.skip(f"the template of {twin.name} takes no such chat")
    case = kinds()[kind]
    with pictures_of(twin, kind):
        found = encode_chats(twin.processor, [case.chat])
        own = as_the_model_card_does(twin, case, begun=kind == "begun")
    assert found["input_ids"].tolist() == own["input_ids"].tolist()
    for name in set(found) | (set(own) - {"labels"}):
        assert torch.equal(torch.as_tensor(found[name]), torch.as_tensor(own[name])), name
    # Each text stands in the prompt once, and no Python list does.
    row = found["input_ids"][0]
    text = twin.processor.tokenizer.decode(row[~twin.visual(row[None])[0]])
    assert all(text.count(said) == 1 for said in case.texts), text
    assert "[{" not in text and "'type'" not in text


@chat_kinds
def test_question_and_content(twin: Twin, kind: str) -> None:
    if refused_by_template(twin, kind):
        pytest.skip(f"the template of {twin.name} takes no such chat")
    case = kinds()[kind]
    with few_tokens(twin):
        ids = encode_chats(twin.processor, [case.chat])["input_ids"]
    question, content = find_question(twin.processor, twin.info, ids)
    tokenizer = twin.processor.tokenizer
    # A newline that the tokenizer joins with the last mark belongs to that token.
    assert tokenizer.decode(ids[question]).rstrip("\n").strip(" ") == case.question
    # Content tokens that are no neighbours are no word together.
    runs: list[list[int]] = []
    for at in content[0].nonzero().flatten().tolist():
        if not (runs and content[0, at - 1]):
            runs.append([])
        runs[-1].append(ids[0, at])
    assert " ".join(tokenizer.decode(run).strip() for run in runs) == case.content


def test_doctor_describes_the_twin(twin: Twin) -> None:
    report = examine(twin.model)
    small = twin.model.config.get_text_config(decoder=True)
    assert report["supported"] and report["reason"] is None
    assert report["layers"] == small.num_hidden_layers
    assert report["heads"] == small.num_attention_heads
    assert report["kv_heads"] == small.num_key_value_heads
    assert report["image_token_id"] == twin.info.image_token_ids[0]
    assert sum(method["fits"] for method in report["methods"]) >= 9


def test_what_doctor_calls_fitting_runs(twin: Twin) -> None:
    chat, failed = kinds()["one"].chat, {}
    with few_tokens(twin):
        inputs = chat_inputs(twin.model, twin.processor, [chat])
        for method in examine(twin.model)["methods"]:
            if not method["fits"]:
                continue
            try:
                with vlmfix.wrapped(twin.model, method["name"]):
                    if method["name"] == "carve":  # it cuts the pictures of chats
                        vlmfix.generate(twin.model, twin.processor, chat, **GREEDY)
                    else:
                        twin.model.generate(**inputs, processor=twin.processor, **GREEDY)
                    report = vlmfix.last_call(twin.model)
                did = (report.edited_rows, report.contrasted_rows, report.visual_tokens)
                if not any(did) and not report.pixels:
                    failed[method["name"]] = "did nothing"
            except Exception as error:  # every promise that is not kept is listed
                failed[method["name"]] = f"{type(error).__name__}: {error}"
    assert failed == {}


@pytest.mark.parametrize("kind", ["two", "wide", "tiny", "system", "second turn", "text first"])
def test_a_method_edits_the_answer(twin: Twin, kind: str) -> None:
    if refused_by_template(twin, kind):
        pytest.skip(f"the template of {twin.name} takes no such chat")
    chat = kinds()[kind].chat
    with pictures_of(twin, kind), vlmfix.wrapped(twin.model, "pai"):
        vlmfix.generate(twin.model, twin.processor, chat, **GREEDY)
        assert vlmfix.last_call(twin.model).edited_rows > 0


def test_unwrapped_the_model_answers_as_before(twin: Twin) -> None:
    chat = kinds()["one"].chat
    with few_tokens(twin):
        inputs = chat_inputs(twin.model, twin.processor, [chat])
        before = twin.model(**inputs, logits_to_keep=1).logits
        with vlmfix.wrapped(twin.model, "pai"):
            during = twin.model(**inputs, logits_to_keep=1).logits
        after = twin.model(**inputs, logits_to_keep=1).logits
    assert torch.equal(before, after) and not torch.equal(before, during)


def test_a_chat_without_an_image(twin: Twin) -> None:
    if not twin.recipe.without_images:
        with pytest.raises(BadInput, match="takes (no such prompt|one image)"):
            vlmfix.generate(twin.model, twin.processor, [user([], "Say hello.")], **GREEDY)
        return
    answer = vlmfix.generate(twin.model, twin.processor, [user([], "Say hello.")], **GREEDY)
    assert isinstance(answer, str)


def test_a_batch_is_answered_like_its_rows(twin: Twin) -> None:
    chats = [
        kinds()["one"].chat,
        [user([picture(300, 100, 2)], "Describe the image.")],
    ]
    if twin.recipe.without_images:
        chats.append([user([], "Say hello.")])
    with few_tokens(twin):
        for method in ("pai", "m3id"):
            with vlmfix.wrapped(twin.model, method):
                alone = [vlmfix.generate(twin.model, twin.processor, c, **GREEDY) for c in chats]
                assert vlmfix.generate(twin.model, twin.processor, chats, **GREEDY) == alone


#: Checkpoints that make fewer tokens of a bundled picture (112 pixels wide) than of a usual one.
FEW_OF_A_BUNDLED_PICTURE = {
    *("Qwen2-VL-7B-Instruct", "Qwen2.5-VL-7B-Instruct", "Qwen2.5-VL-3B-Instruct"),
    *("GLM-4.1V-9B-Thinking", "pixtral-12b", "Mistral-Small-3.1-24B-Instruct-2503"),
}


def test_eval_asks_every_item(twin: Twin, tmp_path: Path) -> None:
    with few_tokens(twin), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        vlmfix.evals.evaluate(
            ["pope"],
            model=(twin.model, twin.processor),
            limit=1,
            splits=["random"],
            max_new_tokens=2,
            output=tmp_path,
            quiet=True,
        )
    lines = [line for file in tmp_path.glob("**/*.jsonl") for line in file.read_text().splitlines()]
    assert [json.loads(line)["error"] for line in lines] == [None] * 6
    texts = [str(warning.message) for warning in told]
    assert any("112 x 112" in text for text in texts) == (twin.name in FEW_OF_A_BUNDLED_PICTURE)


def test_calibrate_measures_every_part(twin: Twin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmfix.analysis.calibrate._PICTURES", 2)
    with few_tokens(twin):
        found = calibrate(twin.model, twin.processor, only=PARTS, save=False, allow_none=True)
    assert found.magnitudes is not None
    assert found.vision_heads is not None and len(found.vision_heads) == twin.info.num_layers
    assert found.gift_saliency_layer is not None


def refused_tower(twin: Twin) -> bool:
    """Whether doctor says that places cannot be read off this vision tower."""
    report = {method["name"]: method for method in examine(twin.model)["methods"]}["hiprune"]
    return not report["fits"] and "vision tower" in report["why"]


def test_maps_of_the_question(twin: Twin) -> None:
    with few_tokens(twin):
        chat = kinds()["one" if twin.recipe.images == 1 else "two"].chat
        inputs = chat_inputs(twin.model, twin.processor, [chat])

    def maps() -> Any:
        return vlmfix.attention_map(twin.model, inputs, rows="question", processor=twin.processor)

    if refused_tower(twin):
        with pytest.raises(UnsupportedModel, match="vision tower"):
            maps()
        return
    [found] = maps()
    visual = int(twin.visual(inputs["input_ids"]).sum())
    assert sum(one.weights.shape[-1] for one in found) == visual
    for one in found:
        assert one.weights.shape[0] == len(twin.info.attention)
        assert 0 < float(one.weights.sum(-1).max()) <= 1.0001
        for grid, view in zip(one.grids(), one.views, strict=True):
            assert grid.shape[-2:] == view.shape


def test_visual_tokens_that_hiprune_keeps(twin: Twin) -> None:
    with few_tokens(twin):
        inputs = chat_inputs(twin.model, twin.processor, [kinds()["one"].chat])

    def tokens() -> Any:
        return vlmfix.visual_tokens(twin.model, inputs, "hiprune", processor=twin.processor)

    if refused_tower(twin):
        with pytest.raises(UnsupportedModel, match="vision tower"):
            tokens()
        return
    for kept in tokens()[0]:
        assert len(kept.index) == kept.budget <= kept.count
        assert sum(int(mask.sum()) for mask in kept.masks()) == len(kept.index)


def layer_input(twin: Twin, inputs: Any) -> torch.Tensor:
    """(n, D): the visual tokens as the first decoder layer gets them."""
    seen = {}

    def look(module: Any, args: Any, kwargs: Any) -> None:
        seen["x"] = (args[0] if args else kwargs["hidden_states"])[0].detach().float()

    hook = twin.info.layers[0].register_forward_pre_hook(look, with_kwargs=True)
    try:
        with torch.no_grad():
            twin.model(**inputs, logits_to_keep=1)
    finally:
        hook.remove()
    return seen["x"][twin.visual(inputs["input_ids"])[0]]


@pytest.mark.parametrize(
    ("size", "share_x", "share_y"), [((480, 640), 0.15, 0.3), ((1000, 200), 0.7, 0.6)], ids=str
)
def test_a_painted_spot_moves_the_token_named(
    twin: Twin, size: tuple[int, int], share_x: float, share_y: float
) -> None:
    if refused_tower(twin):
        pytest.skip("doctor says that no place can be read off this tower")
    with pictures_with(twin, twin.recipe.few_tiles):
        paint_and_look(twin, size, share_x, share_y)


def paint_and_look(twin: Twin, size: tuple[int, int], share_x: float, share_y: float) -> None:
    width, height = size
    plain = picture(width, height, 5)

    def inputs(image: Image.Image) -> Any:
        return chat_inputs(twin.model, twin.processor, [[user([image], QUESTION)]])

    given = inputs(plain)
    before = layer_input(twin, given)
    tower = describe_tower(twin.model, twin.info)
    [images] = placed_images(tower, given, [len(before)])
    boxes = [(0, 0, width, height)] * len(images)
    if tower.layout == "tiles":
        boxes = piece_places(twin.processor, width, height)
    # A processor may cut the sides off (LLaVA-1.5); a spot there is no token's.
    left, top = min(box[0] for box in boxes), min(box[1] for box in boxes)
    right, bottom = max(box[2] for box in boxes), max(box[3] for box in boxes)
    radius = min(size) / 24
    x, y = left + share_x * (right - left), top + share_y * (bottom - top)
    corners = [x - radius, y - radius, x + radius, y + radius]
    painted = plain.copy()
    ImageDraw.Draw(painted).rectangle(corners, fill=(255, 0, 255))
    moved = (layer_input(twin, inputs(painted)) - before).norm(dim=1)
    found = 0
    pieces = torch.split(moved, [tokens for tokens, _ in images])
    for (_, views), piece, box in zip(images, pieces, boxes, strict=True):
        for view in views:
            grid = piece[view]
            if grid.max() < 0.25 * moved.max():
                continue  # a tile that does not show the spot
            rows, columns = grid.shape
            row, column = divmod(int(grid.argmax()), columns)
            wide, tall = (box[2] - box[0]) / columns, (box[3] - box[1]) / rows
            assert abs(box[0] + (column + 0.5) * wide - x) <= 1.5 * wide + radius
            assert abs(box[1] + (row + 0.5) * tall - y) <= 1.5 * tall + radius
            found += 1
    assert found
