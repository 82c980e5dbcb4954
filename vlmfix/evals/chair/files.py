"""CHAIR's files: captions that any project wrote, and lists of the images that a paper took."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from vlmfix.errors import BadInput
from vlmfix.evals.inputs.pairing import located
from vlmfix.evals.inputs.rows import Row, few, read_rows, read_text, refuse_repeats, short

__all__ = ["choose_captions", "image_id_of", "last_captions", "read_image_ids"]

_ID = re.compile(r"(\d{1,12})$")


def last_captions(rows: Sequence[Row]) -> list[Row]:
    """The last row of every image and sampling seed; a warning says how many others there were.

    Scripts that append to their output write an image again when they are run again.

    Raises:
        BadInput: a row that names no image.
    """
    answered = [
        (str(row.first("sampling_seed")), image_id_of(row.first("image_id", "image"), row.where))
        for row in rows
    ]
    last = dict(zip(answered, rows, strict=True))
    if len(last) < len(rows):
        counts = Counter(answered)
        again = {image for (_, image), count in counts.items() if count > 1}
        images = {image for _, image in answered}
        warnings.warn(
            f"CHAIR: {len(rows)} captions of {len(images)} images: only the last of each counts "
            f"(images {few(sorted(again))})",
            stacklevel=2,
        )
    return list(last.values())


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
    rows = located(answers, "CHAIR captions")
    found = []
    for row in last_captions(rows) if repeats == "last" else rows:
        if row.values.get("error"):
            raise BadInput(
                f"{row.where} records a failure ({short(row.values['error'])}): answer it first"
            )
        image = image_id_of(row.first("image_id", "image"), row.where)
        found.append((image, row.answer("caption", "response", "answer", "text") or ""))
    return found


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
