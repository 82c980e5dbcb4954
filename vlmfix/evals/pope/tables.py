"""POPE as a table that holds its pictures: parquet files, hub data sets, VLMEvalKit's .tsv.

Formats: lmms-eval's hub set `lmms-lab/POPE`, also of the name `lmms-lab-encoder/POPE` (columns
question_id, question, answer, image_source, image, category), read by `datasets` from the hub and
from parquet files on disk alike; open-compass/VLMEvalKit POPE.tsv (index, image in base64,
question, answer, category, which may name several splits).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmfix.errors import BadInput
from vlmfix.evals.inputs.coco import CocoData
from vlmfix.evals.inputs.pictures import Pictures
from vlmfix.evals.inputs.rows import Row, read_rows
from vlmfix.evals.pope.files import QuestionFile, image_name, load_splits, question_splits

if TYPE_CHECKING:
    pass

__all__ = ["OwnQuestions", "QuestionTable", "open_images", "question_source"]

_HUB = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(?::[\w.-]+)?")
_FILES = (".json", ".jsonl", ".zip", ".tsv", ".parquet")
#: A shorter text in the image column of a .tsv is the index of the row that holds the picture.
_REFERENCE = 64


def open_images(path: str | Path | None) -> CocoData | QuestionTable:
    """Pictures for POPE and CHAIR: COCO-format data, or a table of POPE questions.

    Args:
        path: COCO-format folder or .zip; a .parquet or .tsv file, a folder of parquet files, or a
            hub name, "lmms-lab/POPE" or with its configuration "lmms-lab/POPE:Full". None: the
            bundled evaluation images.

    Raises:
        BadInput: none of these.
    """
    return QuestionTable(path) if path is not None and _is_table(path) else CocoData.open(path)


def question_source(path: str | Path) -> dict[str, QuestionFile]:
    """Split -> questions of a question file or a table; one split "" where none is named.

    Raises:
        BadInput: as `pope_files.load_splits` and `QuestionTable`.
    """
    return QuestionTable(path).splits if _is_table(path) else load_splits(path)


def _is_table(path: str | Path) -> bool:
    source = Path(path)
    if source.is_dir():
        return any(source.glob("*.parquet"))
    return source.suffix in (".tsv", ".parquet") or _is_hub_name(path)


def _is_hub_name(path: str | Path) -> bool:
    known = Path(path).exists() or Path(path).suffix in _FILES
    return not known and _HUB.fullmatch(str(path)) is not None


class QuestionTable(Pictures):
    """POPE questions with their pictures; a `tasks.DataSource`.

    Args:
        source: as `open_images` takes a table.

    Attributes:
        name: file name or hub name.
        splits: split -> questions.

    Raises:
        BadInput: not there, not such a table, or `datasets` is not installed.
    """

    remedy = "pass the pictures with --data and these questions with --questions"

    def __init__(self, source: str | Path) -> None:
        self.name = self.place = str(source) if _is_hub_name(source) else Path(source).name
        self._pictures: dict[str, Callable[[], bytes]] = {}
        tsv = Path(source).suffix == ".tsv"
        rows = self._read_tsv(Path(source)) if tsv else self._read_datasets(source)
        self.splits: dict[str, QuestionFile] = question_splits(rows, str(source))

    def _read_tsv(self, path: Path) -> list[Row]:
        rows = read_rows(path, "POPE questions")
        holders = {row.values.get("index"): row for row in rows}
        named = []
        for row in rows:
            content = row.first("image") or ""
            if 0 < len(content) <= _REFERENCE and content in holders:
                holder = holders[content]
            else:
                holder = row
            encoded = holder.first("image") or ""
            name = row.first("image_source", "image_path") or holder.first("index")
            named.append(Row(row.where, {**row.values, "image": name}))
            if len(encoded) > _REFERENCE:
                read = partial(base64.b64decode, encoded, validate=True)
                self._pictures.setdefault(image_name(name) or "", read)
        return named

    def _read_datasets(self, source: str | Path) -> list[Row]:
        rows = []
        for split, table in _load(source).items():
            # The pictures are read one at a time, when they are asked for.
            columns = [name for name in table.column_names if name != "image"]
            for number, values in enumerate(table.select_columns(columns)):
                name = image_name(values.get("image_source", values.get("image_path")))
                name = name or f"{split}-{number}"
                if not {"train", "test"} & {split}:
                    values = {"category": split, **values}
                rows.append(Row(f"{source}, {split} row {number + 1}", {**values, "image": name}))
                if "image" in table.column_names:
                    self._pictures.setdefault(name, partial(_cell, table, number))
        return rows

    @property
    def sha256(self) -> str:
        """Fingerprint of the questions and of all pictures."""
        digest = hashlib.sha256()
        for split, file in self.splits.items():
            rows = [asdict(question) for question in file.questions]
            digest.update(json.dumps([split, rows, sorted(file.follows.items())]).encode())
        for name in sorted(self._pictures):
            digest.update(self.content(name))
        return digest.hexdigest()

    def holds(self, name: str) -> bool:
        """Whether the table holds a picture of that name."""
        return name in self._pictures

    def content(self, name: str) -> bytes:
        """The bytes of a picture that is there; raises BadInput if it has none."""
        try:
            return self._pictures[name]()
        except (binascii.Error, ValueError, TypeError) as error:
            raise BadInput(f"{self.name}: {name} is not a readable image ({error})") from None


class OwnQuestions(QuestionTable):
    """POPE questions that stand next to their answers, as in our own records.

    Args:
        rows: one answer to each question.
        name: of their file.

    Raises:
        BadInput: rows that do not hold their truth.
    """

    def __init__(self, rows: Sequence[Row], name: str) -> None:
        self.name, self._pictures = name, {}
        if without := [row for row in rows if "target" not in row.values]:
            first = without[0]
            # PAI's rows have a label and no picture.
            lack = "of which picture their label" if "label" in first.values else "what"
            raise BadInput(
                f"{len(without)} answers do not say {lack} is true, first {first.where}: name the "
                "POPE file that they answer (--questions FILE)"
            )
        questions = [
            Row(
                row.where,
                {
                    "question_id": row.text("sample_id").rpartition(":")[2],
                    "image": row.first("image"),
                    "text": row.first("prompt"),
                    "label": row.first("target"),
                    "category": row.first("split"),
                },
            )
            for row in rows
        ]
        self.splits = question_splits(questions, name)


def _cell(table: Any, number: int) -> bytes:
    """The bytes of a picture as a parquet cell holds them: bare, or as {"bytes", "path"}."""
    cell = table[number]["image"]
    content = cell.get("bytes") if isinstance(cell, Mapping) else cell
    if not isinstance(content, bytes):
        raise TypeError(f"the cell holds {type(content).__name__} instead of bytes")
    return content


def _load(source: str | Path) -> Mapping[str, Any]:
    """Split -> data set, pictures not decoded."""
    try:
        import datasets
    except ImportError:
        raise BadInput(
            f"reading {source} needs the package datasets: pip install 'vlmfix[eval]'"
        ) from None
    path = Path(source)
    try:
        if _is_hub_name(source):
            repository, _, configuration = str(source).partition(":")
            tables = datasets.load_dataset(repository, configuration or None)
        else:
            files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
            if not all(file.exists() for file in files):
                raise FileNotFoundError(f"no such file: {path}")
            tables = datasets.load_dataset("parquet", data_files=[str(file) for file in files])
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).partition("\n")[0]
        if _is_hub_name(source):
            raise BadInput(
                f"no data at {source}, nor a data set of that name on the hub that can be read "
                f"from here ({reason}): pass a folder, a .zip or a parquet file that is there"
            ) from None
        raise BadInput(
            f"cannot read the questions {source} ({reason}): fetch or write the file again"
        ) from None
    return {
        split: table.cast_column("image", datasets.Image(decode=False))
        if isinstance(table.features.get("image"), datasets.Image)
        else table
        for split, table in tables.items()
    }
