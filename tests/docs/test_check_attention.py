"""docs/check_attention.py: shares of boxes, ratios, and that its words are what the model wrote."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vlmfix
from vlmfix.chat import chat_inputs

SCRIPT = Path(__file__).resolve().parents[2] / "docs" / "check_attention.py"


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


def test_what_of_each_cell_boxes_cover(script: dict[str, Any]) -> None:
    # 4 x 4 pixels in 2 x 2 cells; the second box lies within the first.
    inside = script["covered"]([[1, 0, 2, 2], [1, 0, 1, 1]], (4, 4), (2, 2))
    assert inside.tolist() == [[0.5, 0.5], [0, 0]]


def test_ratio_of_maps_that_are_known(script: dict[str, Any]) -> None:
    """All mass in the box: one over its share of the image; a uniform map: 1; the control: 0."""
    corners = [np.zeros((2, 2)) for _ in range(4)]
    for at, corner in enumerate(corners):
        corner[at // 2, at % 2] = 1
    uniform = np.full((2, 2), 0.25)
    seen = [
        script["Seen"](image, np.stack([np.stack([corner, uniform])]), corner)
        for image, corner in enumerate(corners)
    ]
    rows = {(row["boxes"], row["head"]): row for row in script["ratios"](seen)}
    halves = [script["Seen"](one.image, one.maps, one.inside / 2) for one in seen]
    half = script["ratios"](halves)[0]
    assert (half["ratio"], half["inside"], half["uniform"]) == (2.5, 0.3125, 0.125)
    assert rows["own", "0"]["ratio"] == 4
    assert (rows["own", "1"]["ratio"], rows["own", "1"]["low"], rows["own", "1"]["high"]) == (
        1,
        1,
        1,
    )
    assert rows["own", "mean"]["ratio"] == 2.5
    assert rows["of another image", "mean"]["ratio"] == 0.5
    assert rows["own", "mean"]["words_above_uniform"] == 1
    assert (rows["own", "mean"]["words"], rows["own", "mean"]["images"]) == (4, 4)


def test_words_of_two_images(script: dict[str, Any]) -> None:
    """emoji:1 is said to show a teddy bear, a bed and a cup; all are there."""
    seen = script["look"](2)
    assert [one.image for one in seen[:3]] == [1, 1, 1]
    bear, bed, cup = seen[:3]
    for one in seen:
        assert one.maps.shape == (6, 8, 8, 8)
        assert np.allclose(one.maps.sum((2, 3)), 1, atol=1e-5)
        assert 0 < one.inside.mean() < 0.3
    model, processor = vlmfix.load("emoji")
    text = {"type": "text", "text": script["PROMPT"]}
    content = [{"type": "image", "image": "emoji:1"}, text]
    inputs = chat_inputs(model, processor, [[{"role": "user", "content": content}]])
    generated = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    length = inputs["input_ids"].shape[1]
    written = [processor.decode(token).strip() for token in generated[0, length:]]
    row = length - 1 + written.index("bed")
    ((direct,),) = vlmfix.attention_map(model, inputs, rows=[row], heads="all", generated=generated)
    grid = direct.grids()[0][:, :, 0].numpy()
    assert np.allclose(bed.maps, grid / grid.sum((2, 3), keepdims=True), atol=1e-5)
    assert not np.allclose(bed.maps, bear.maps, atol=1e-3)
    # The bear sits right of the middle, the bed below it.
    assert bear.inside[2:6, 5:8].sum() / bear.inside.sum() > 0.9
    assert bed.inside[4:8, 5:8].sum() / bed.inside.sum() > 0.9
    assert not np.array_equal(bed.inside, cup.inside)
