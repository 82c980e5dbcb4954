"""Statistics against published figures."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from vlmfix.evals.scoring.stats import Resamples, mcnemar, wilson


def test_mcnemar_of_59_and_38() -> None:
    base = [True] * 59 + [False] * 38 + [True] * 100
    method = [False] * 59 + [True] * 38 + [True] * 100
    test = mcnemar(base, method)
    assert (test.worse, test.better) == (59, 38)
    assert test.p == pytest.approx(0.041729, abs=5e-7)


def test_wilson_of_2693_in_3000() -> None:
    assert wilson(2693, 3000) == pytest.approx((0.886308, 0.908009), abs=5e-7)


def test_questions_of_one_image_are_one_cluster(golden: Path) -> None:
    """With errors that cluster by image, the clustered interval is wider than the plain one."""
    text = (golden / "pope" / "coco_pope_random.json").read_text()
    images = [json.loads(line)["image"] for line in text.splitlines()]
    number = {image: i for i, image in enumerate(dict.fromkeys(images))}
    correct = np.array([[float(number[image] % 10 > 0)] for image in images])
    clustered = Resamples(images, seed=1).sums(correct)[:, 0].std() / len(images)
    plain = Resamples(range(len(images)), seed=1).sums(correct)[:, 0].std() / len(images)
    assert clustered == pytest.approx(math.sqrt(0.09 / 500), rel=0.06)
    assert plain == pytest.approx(math.sqrt(0.09 / 3000), rel=0.06)
