"""Question and answer files that others wrote: their rows, and where each of them stands.

The files come from many scripts, so each of these ends in rows or in an error that names file and
line: a byte order mark, JSON Lines called .json, a list over many lines, UTF-16, torn and empty
files, values of a wrong type, numbers that are no numbers, nesting without end.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from reprlib import Repr
from sys import intern
from typing import Any, NamedTuple

from vlmfix.errors import BadInput

#: An answer longer than this was written by no model, and some rules would take minutes to read it.
LONGEST_ANSWER = 200_000

__all__ = [
    "Row",
    "decode_text",
    "few",
    "parse_json",
    "read_object",
    "read_rows",
    "read_text",
    "refuse_repeats",
    "short",
]

_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
_BYTE_ORDER_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


class Row(NamedTuple):
    """One row of a file.

    Args:
        where: file and line, for messages.
        values: what the row holds.
    """

    where: str
    values: Mapping[str, Any]

    def first(self, *keys: str) -> Any:
        """The value under the first of these keys that the row has; None without any."""
        for key in keys:
            if key in self.values:
                return self.values[key]
        return None

    def answer(self, *keys: str) -> str | None:
        """The text under the first of these keys that the row has; null reads as no answer.

        Raises:
            BadInput: none of the keys, something that is neither text nor null, or a text that is
                longer than `LONGEST_ANSWER`.
        """
        found = [key for key in keys if key in self.values]
        if not found:
            names = " or ".join(f"`{key}`" for key in keys)
            raise BadInput(f"{self.where} has no {names}: {short(self.values)}")
        value = self.values[found[0]]
        if value is not None and not isinstance(value, str):
            raise BadInput(
                f"{self.where}: `{found[0]}` is {short(value)}, a {type(value).__name__}: answers "
                "are text (null: no answer)"
            )
        if value is not None and len(value) > LONGEST_ANSWER:
            raise BadInput(
                f"{self.where}: `{found[0]}` has {len(value):,} characters; an answer has at most "
                f"{LONGEST_ANSWER:,}"
            )
        return value

    def text(self, *keys: str) -> str:
        """The text under the first of these keys that the row has.

        Raises:
            BadInput: none of the keys, or something that is not text.
        """
        value = self.answer(*keys)
        if value is None:
            raise BadInput(f"{self.where}: the text under {' or '.join(keys)} is null")
        return value

    def number(self, *keys: str) -> int:
        """The whole number under the first of these keys that the row has, digits included.

        Raises:
            BadInput: none of the keys, or no whole number.
        """
        value = self.first(*keys)
        if type(value) is int:  # nearly always
            return value
        if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,18}", value.strip()):
            return int(value)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value // 1:
            raise BadInput(
                f"{self.where}: {' or '.join(keys)} is {short(value)}, which is no whole number"
            )
        return int(value)


def read_rows(path: str | Path, what: str) -> list[Row]:
    """The rows of a JSON Lines file, a JSON list, or a table with tabs (.tsv), as UTF-8.

    Blank lines are skipped.

    Args:
        path: the file.
        what: what it holds, for messages: "POPE answers".

    Raises:
        BadInput: a file that cannot be read, is empty, is not UTF-8 or not JSON, a row that is no
            object, or an object that has a key twice; the message names the line.
    """
    path = Path(path)
    text = read_text(path, what)
    start = text.lstrip()[:1]
    if not start:
        raise BadInput(f"{what}: {path} is empty: expected one JSON object per line")
    if path.suffix == ".tsv":
        rows = _table(path, text)
    elif start == "[":
        whole = parse_json(text, f"{path}")
        rows = [Row(f"{path}, item {n}", row) for n, row in enumerate(whole, start=1)]
    else:
        places = ((f"{path}, line {n}", line) for n, line in _lines(text) if line.strip())
        rows = [Row(where, parse_json(line, where)) for where, line in places]
    for row in rows:
        if not isinstance(row.values, dict):
            raise BadInput(f"{row.where} is no JSON object but {short(row.values)}")
    if not rows:
        raise BadInput(f"{what}: {path} holds no rows: expected one JSON object per line")
    return rows


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """The lines of a text and their numbers, one at a time.

    Not splitlines(): it also breaks at characters that may stand inside a JSON string.
    """
    start, number = 0, 1
    while (end := text.find("\n", start)) >= 0:
        yield number, text[start:end]
        start, number = end + 1, number + 1
    yield number, text[start:]


def read_object(path: str | Path, what: str) -> dict[str, Any]:
    """What a JSON file holds that is one object, as UTF-8.

    Raises:
        BadInput: a file that cannot be read, is not UTF-8 or not JSON, or holds something else.
    """
    path = Path(path)
    found = parse_json(read_text(path, what), f"{path}")
    if not isinstance(found, dict):
        raise BadInput(f"{what}: {path} holds no JSON object but {short(found)}")
    return found


def read_text(path: Path, what: str) -> str:
    """The text of a UTF-8 file.

    Raises:
        BadInput: it cannot be read, or is not UTF-8; the message names the line.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BadInput(f"{what}: cannot read {path} ({error.strerror})") from None
    return decode_text(content, f"{path}", what)


def decode_text(content: bytes, where: str, what: str) -> str:
    """The text of the bytes of a UTF-8 file.

    Args:
        content: all bytes.
        where: file, for messages.
        what: what it holds, for messages.

    Raises:
        BadInput: they are not UTF-8; the message names the line.
    """
    if encoding := _BYTE_ORDER_MARKS.get(content[:2]):
        raise BadInput(f"{what}: {where} is {encoding}: save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise BadInput(
            f"{what}: {where}, line {line} is not UTF-8 (byte {content[error.start]:#04x}): save "
            "the file as UTF-8"
        ) from None


#: Longest value that may well stand in many rows.
_SHARED = 64


class _Repeated(ValueError):
    """An object of a JSON text has a key twice."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # The decoder makes each text again wherever it stands. Interned, a million rows share their
    # keys, names and questions.
    found = {
        intern(key): intern(value) if type(value) is str and len(value) <= _SHARED else value
        for key, value in pairs
    }
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _Repeated(f"has {twice!r} twice in one object, {short(found)}")
    return found


#: Made once: json.loads makes one per call where it is given a hook.
_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def parse_json(text: str, where: str, advice: str = "") -> Any:
    """What a JSON text says.

    Args:
        text: all of it.
        where: file and line, for messages.
        advice: the way out; empty: that of a file of rows.

    Raises:
        BadInput: no JSON, an object with a key twice, numbers or nesting beyond Python's limits.
    """
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        # Of a whole file the line in it; of one line of JSON Lines only the column is news.
        place = f"line {error.lineno} column {error.colno}" if "\n" in text else f"{error.colno}"
        advice = advice or "write one JSON object per line, or a list of them"
        raise BadInput(f"{where} is not JSON ({error.msg}, at {place}): {advice}") from None
    except _Repeated as error:
        raise BadInput(f"{where} {error}: which of them holds is not said; keep one") from None
    except ValueError as error:
        raise BadInput(f"{where} is not usable JSON ({error})") from None
    except RecursionError:
        raise BadInput(f"{where} is nested too deeply to be read") from None


def _table(path: Path, text: str) -> list[Row]:
    """Rows of a table with tabs; a field may hold a whole image."""
    limit = csv.field_size_limit(sys.maxsize)
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t", strict=True)
        rows = [Row(f"{path}, line {reader.line_num}", values) for values in reader]
    except csv.Error as error:
        raise BadInput(f"{path}, line {reader.line_num} is no row of a table ({error})") from None
    finally:
        csv.field_size_limit(limit)
    for row in rows:
        if None in row.values or None in row.values.values():
            raise BadInput(f"{row.where} has another number of fields than the head of the table")
    return rows


def short(value: object) -> str:
    """The value, short enough for a message."""
    return _SHORT.repr(dict(value) if isinstance(value, Mapping) else value)


def few(keys: Iterable[object]) -> str:
    """The first ten keys."""
    names = [key if isinstance(key, str) and len(key) < 80 else short(key) for key in keys]
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")


def refuse_repeats(keys: Sequence[object], what: str) -> None:
    """Raise BadInput if a key comes twice; the message lists such keys."""
    if repeated := list(dict.fromkeys(_repeated(keys))):
        raise BadInput(f"{what}: {len(repeated)} repeated: {few(repeated)}: remove the copies")


def _repeated(keys: Iterable[object]) -> Iterator[object]:
    seen: set[object] = set()
    for key in keys:
        if key in seen:
            yield key
        seen.add(key)
