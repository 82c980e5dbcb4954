"""CHAIR's files: captions that any project wrote, and lists of the images that a paper took."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from vlmfix.errors import BadInput
from vlmfix.evals.pairing import located
from vlmfix.evals.rows import Row, few, read_rows, read_text, refuse_repeats, short

__all__ = ["choose_captions", "image_id_of", "load_captions", "read_image_ids"]

_ID = re.compile(r"(\d{1,12})$")


def load_captions(path: str | Path) -> list[Row]:
    """Caption rows, to be scored by `chair.score_answers`.

    Raises:
        BadInput: as `rows.read_rows`.
    """
    return read_rows(path, "CHAIR captions")


def choose_captions(
    answers: Sequence[Row | Mapping[str, Any]], repeats: str = "last"
) -> list[tuple[int, str]]:
    """(image id, caption) of every row; no caption reads as an empty one.

    Args:
        answers: rows with `image_id` (or `image`) and `caption` (or `response`, `answer`, `text`).
        repeats: of one image the "last" caption counts, with a warning, or "all" do.

    Raises:
        BadInput: a row without image or caption, one that records a failure, an unknown choice.
    """
    if repeats not in ("last", "all"):
        raise BadInput(f"CHAIR: repeats={repeats!r}: choose 'last' or 'all'")
    found = []
    for row in located(answers, "CHAIR captions"):
        if row.values.get("error"):
            raise BadInput(
                f"{row.where} records a failure ({short(row.values['error'])}): answer it first"
            )
        image = row.first("image_id", "image")
        found.append(
            (
                image_id_of(image, row.where),
                row.answer("caption", "response", "answer", "text") or "",
            )
        )
    if repeats == "all":
        return found
    last = dict(found)
    if len(last) < len(found):
        counts = Counter(image for image, _ in found)
        again = [image for image in last if counts[image] > 1]
        warnings.warn(
            f"CHAIR: {len(found)} captions of {len(last)} images: only the last of each counts "
            f"(images {few(sorted(again))})",
            stacklevel=2,
        )
    return list(last.items())


def image_id_of(value: object, where: str) -> int:
    """The id of an image from its id, or from its file name: its last 12 digits.

    Raises:
        BadInput: neither; the message begins with `where`.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and (found := _ID.search(PurePosixPath(value.strip()).stem[-300:])):
        return int(found[1])
    raise BadInput(
        f"{where}: the image is {short(value)}: give its id, or a file name that ends in its id"
    )


def read_image_ids(path: str | Path) -> list[int]:
    """Ids of images in the order of the file: one id or file name per line, or caption rows.

    Raises:
        BadInput: an empty file, a line that names no image, or an image that comes twice.
    """
    path = Path(path)
    text = read_text(path, "image ids")
    if text.lstrip()[:1] == "{":
        named = [
            (row.where, row.first("image_id", "image")) for row in read_rows(path, "image ids")
        ]
    else:
        # A JSON list of numbers or names reads as lines without its punctuation.
        words = enumerate(re.split(r"[\n,]", re.sub(r"[\[\]\"]", " ", text)), start=1)
        named = [(f"{path}, entry {n}", word) for n, word in words if word.strip()]
    ids = [image_id_of(value, where) for where, value in named]
    if not ids:
        raise BadInput(f"{path} names no image: write one id per line")
    refuse_repeats(ids, f"{path}: image ids")
    return ids
