"""What a free-text answer to a yes/no question counts as: five published rules and a strict one.

The rules disagree on the same text, so a POPE figure means nothing without the name of its parser.
Each rule returns "yes", "no" or None (unparsed: wrong, never silently yes).

Sources: RUCAIBox/POPE evaluate.py (official; LLaVA's eval_pope is the same), shikiw/OPERA and
LALBJ/PAI (opera), EvolvingLMMs-Lab/lmms-eval (lmms_eval), open-compass/VLMEvalKit (vlmevalkit),
DAMO-NLP-SG/VCD (vcd).
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from vlmfix.errors import BadInput

__all__ = ["PARSERS", "Parser", "Verdict", "get_parser"]

Verdict = Literal["yes", "no"] | None

_MARKUP = re.compile(r"<[^<>]*>|[*_#`~>\"]+")
_SENTENCE_END = re.compile(r"[.!?\n]")
_WORD = re.compile(r"[a-z0-9]+(?:'[a-z]+)*")
_LEADING = {"yes": "yes", "yeah": "yes", "y": "yes", "no": "no", "nope": "no", "n": "no"}
_NEGATIONS = {"no", "not", "none", "never", "cannot"}


def _official(answer: str, label: str) -> Verdict:
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def _opera(answer: str, label: str) -> Verdict:
    words = answer.replace(".", "").replace(",", "").split(" ")
    negative = any(w in ("No", "not", "no", "NO") or w.endswith("n't") for w in words)
    return "no" if negative else "yes"


def _lmms_eval(answer: str, label: str) -> Verdict:
    word = answer.lower().strip()
    return "yes" if word == "yes" else "no" if word == "no" else None


def _vlmevalkit(answer: str, label: str) -> Verdict:
    # A mark next to a space vanishes, any other becomes a gap; ":" and "*" stay, so "No: none" is
    # unknown. A full stop vanishes unless a digit follows.
    lowered = text = answer.lower()
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        beside_space = mark + " " in lowered or " " + mark in lowered
        text = text.replace(mark, "" if beside_space else " ")
    words = re.sub(r"\.(?!\d)", "", text).split()
    if ("yes" in words) == ("no" in words):
        return None
    return "yes" if "yes" in words else "no"


def _vcd(answer: str, label: str) -> Verdict:
    other: Verdict = "no" if label == "yes" else "yes"
    same: Verdict = "yes" if label == "yes" else "no"
    return same if label in answer.lower() else other


def _strict(answer: str, label: str) -> Verdict:
    text = _MARKUP.sub(" ", answer.replace("\u2019", "'")).lower().strip()
    text = text.lstrip(string.punctuation + string.whitespace)
    words = _WORD.findall(_SENTENCE_END.split(text, maxsplit=1)[0])
    if words and words[0] in _LEADING:
        return "yes" if _LEADING[words[0]] == "yes" else "no"
    if any(w in _NEGATIONS or w.endswith("n't") for w in words):
        return "no"
    return "yes" if "yes" in words else None


@dataclass(frozen=True)
class Parser:
    """One rule and how its unparsed answers count.

    Args:
        name: the key in `PARSERS`.
        rule: (answer, label) -> verdict; only `vcd` looks at the label.
        unparsed_is_miss: an unparsed answer to a "yes" question is a false negative. lmms-eval
            leaves it out of recall.
    """

    name: str
    rule: Callable[[str, str], Verdict]
    unparsed_is_miss: bool = True

    def __call__(self, answer: str | None, label: str) -> Verdict:
        """The verdict on `answer` (None reads as empty) to a question whose truth is `label`."""
        return self.rule(answer or "", label)


PARSERS: dict[str, Parser] = {
    parser.name: parser
    for parser in (
        Parser("official", _official),
        Parser("opera", _opera),
        Parser("lmms_eval", _lmms_eval, unparsed_is_miss=False),
        Parser("vlmevalkit", _vlmevalkit),
        Parser("vcd", _vcd),
        Parser("strict", _strict),
    )
}


def get_parser(name: str) -> Parser:
    """The parser of that name.

    Raises:
        BadInput: there is none; the message lists the names.
    """
    if name not in PARSERS:
        raise BadInput(f"no answer parser {name!r}: choose one of {', '.join(PARSERS)}")
    return PARSERS[name]
