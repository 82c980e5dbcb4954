"""AMBER's files: annotations, associations, safe words and queries.

Reference: junyangwang0410/AMBER, folder data/ (Apache-2.0).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vlmfix.errors import BadInput
from vlmfix.evals.inputs.folder import ImageFolder
from vlmfix.evals.inputs.rows import (
    Row,
    few,
    read_object,
    read_rows,
    read_text,
    refuse_repeats,
    short,
)

__all__ = ["GENERATIVE", "GROUPS", "AmberData", "AmberItem", "Lexicon", "answer_key"]

GENERATIVE = "generative"

#: What the types of the annotations are called here.
DIMENSIONS = {
    "generative": GENERATIVE,
    "discriminative-hallucination": "existence",
    "discriminative-attribute-state": "state",
    "discriminative-attribute-number": "number",
    "discriminative-attribute-action": "action",
    "discriminative-relation": "relation",
    "relation": "relation",
}

#: Places of the discriminative figures, in the order of the official script, and their dimensions.
GROUPS = {
    "discriminative": ("existence", "state", "number", "action", "relation"),
    "existence": ("existence",),
    "attribute": ("state", "number", "action"),
    "state": ("state",),
    "number": ("number",),
    "action": ("action",),
    "relation": ("relation",),
}

#: The file that repeats all other query files.
WHOLE = "query_all.json"

NEEDS = (
    "annotations.json, relation.json and safe_words.txt, the queries (query/query_all.json), and "
    "the pictures AMBER_1.jpg to AMBER_1004.jpg; all from github.com/junyangwang0410/AMBER"
)


@dataclass(frozen=True)
class AmberItem:
    """One annotated query.

    Args:
        number: AMBER's id.
        dimension: "generative", or of a question: existence, state, number, action, relation.
        label: of a question: "yes" or "no".
        truth: of a description: the objects in the picture, with repeats.
        hallucinations: of a description: objects that people would imagine there.
    """

    number: int
    dimension: str
    label: str = ""
    truth: tuple[str, ...] = ()
    hallucinations: tuple[str, ...] = ()


@dataclass(frozen=True)
class Lexicon:
    """The closed vocabulary of descriptions.

    Args:
        associations: word -> words that may stand for it.
        safe: words that are never a hallucination.
    """

    associations: Mapping[str, Sequence[str]]
    safe: frozenset[str]

    @cached_property
    def vocabulary(self) -> frozenset[str]:
        """The words that count as objects."""
        return frozenset(self.associations).union(*self.associations.values())


class AmberData(ImageFolder):
    """A folder with AMBER's files, at the top or in data/.

    Attributes:
        items: by AMBER's id, in the order of the annotations.
        queries: id -> (picture, question); empty where the folder has no query file. Scoring needs
            none, but cannot tell then which questions share a picture.

    Args:
        root: the folder.

    Raises:
        BadInput: annotations or queries are missing or broken; the message names file and line.
    """

    task = "amber"
    needs = NEEDS

    def __init__(self, root: str | Path) -> None:
        folder = self.existing(root)
        annotations = _one_of(folder, "annotations.json")
        queries = sorted(
            {
                p
                for place in ("", "query", "data", "data/query")
                for p in (folder / place).glob("query*.json")
            }
        )
        optional = [_find(folder, name) for name in ("relation.json", "safe_words.txt")]
        self._relation, self._safe_words = optional
        super().__init__(folder, [annotations, *queries, *(p for p in optional if p)])
        self.items = _items(annotations)
        self.queries = _queries(queries, self.items)

    @cached_property
    def lexicon(self) -> Lexicon:
        """What scoring descriptions needs.

        Raises:
            BadInput: relation.json or safe_words.txt is missing or broken, or an annotated object
                has no entry in relation.json.
        """
        if self._relation is None or self._safe_words is None:
            absent = "safe_words.txt" if self._relation else "relation.json"
            raise BadInput(f"amber: {self.root} holds no {absent}. It needs {NEEDS}")
        associations = read_object(self._relation, "AMBER associations")
        for word, words in associations.items():
            if not isinstance(words, list) or not all(isinstance(one, str) for one in words):
                raise BadInput(f"{self._relation}: {word!r} has {short(words)}, no list of words")
        used = {w for item in self.items.values() for w in (*item.truth, *item.hallucinations)}
        if unknown := sorted(used - set(associations)):
            raise BadInput(
                f"{self._relation} has no entry for {few(unknown)}, which the annotations use: "
                "take both files from one version of AMBER"
            )
        safe = read_text(self._safe_words, "AMBER safe words").split("\n")
        return Lexicon(associations, frozenset(word.strip() for word in safe if word.strip()))

    def picture(self, number: int) -> str | None:
        """The picture that the item of this id shows, where it is known."""
        if number in self.queries:
            return self.queries[number][0]
        # Description k is about picture k; questions are numbered on from there.
        return f"AMBER_{number}.jpg" if self.items[number].dimension == GENERATIVE else None


def _find(folder: Path, name: str) -> Path | None:
    places = (folder / name, folder / "data" / name)
    return next((path for path in places if path.is_file()), None)


def _one_of(folder: Path, name: str) -> Path:
    path = _find(folder, name)
    if path is None:
        raise BadInput(f"amber: {folder} holds no {name}. It needs {NEEDS}")
    return path


def _items(path: Path) -> dict[int, AmberItem]:
    items = [_item(row) for row in read_rows(path, "AMBER annotations")]
    refuse_repeats([item.number for item in items], f"{path}: id")
    return {item.number: item for item in items}


def _item(row: Row) -> AmberItem:
    kind = row.text("type")
    if kind not in DIMENSIONS:
        raise BadInput(f"{row.where}: type {short(kind)} is none of {', '.join(DIMENSIONS)}")
    number, dimension, truth = row.number("id"), DIMENSIONS[kind], row.first("truth")
    if dimension == GENERATIVE:
        return AmberItem(
            number,
            dimension,
            truth=_words(truth, f"{row.where}: truth"),
            hallucinations=_words(row.first("hallu"), f"{row.where}: hallu"),
        )
    if truth not in ("yes", "no"):
        raise BadInput(f"{row.where}: truth {short(truth)} is neither yes nor no")
    return AmberItem(number, dimension, label=truth)


def _words(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise BadInput(f"{where} is {short(value)}, which is no list of words")
    return tuple(value)


def _queries(paths: Sequence[Path], items: Mapping[int, AmberItem]) -> dict[int, tuple[str, str]]:
    """Id -> (picture, question). What query_all.json says holds: the official files disagree."""
    found: dict[int, tuple[str, str]] = {}
    every = [path for path in paths if path.name == WHOLE]
    for path in [*every, *(path for path in paths if path not in every)]:
        rows = read_rows(path, "AMBER queries")
        asked = [(row.number("id"), (row.text("image"), row.text("query"))) for row in rows]
        refuse_repeats([number for number, _ in asked], f"{path}: id")
        other = []
        for row, (number, query) in zip(rows, asked, strict=True):
            if number not in items:
                raise BadInput(f"{row.where}: id {number} is not among the annotations")
            if found.setdefault(number, query) != query:
                if not every:
                    raise BadInput(f"{row.where}: id {number} asks something else in another file")
                other.append(number)
        if other:
            warnings.warn(
                f"AMBER: {path.name} asks something else than {WHOLE} at id {few(other)}: {WHOLE} "
                "holds",
                stacklevel=2,
            )
    return found


def answer_key(row: Row) -> int:
    """AMBER's id of what a row answers."""
    return row.number("id", "sample_id")
