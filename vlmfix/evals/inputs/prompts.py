"""What yes/no questions end with; figures under different endings do not compare."""

from __future__ import annotations

from vlmfix.errors import BadInput

__all__ = ["PROMPT_STYLES", "suffix"]

#: Endings by the project that made each of them common: POPE asks the bare question, LLaVA and
#: lmms-eval, VCD and ClearSight add a sentence.
PROMPT_STYLES: dict[str, str] = {
    "bare": "",
    "lmms": "\nAnswer the question using a single word or phrase.",
    "vcd": " Please answer this question with one word.",
    "clearsight": " Please just answer yes or no.",
}


def suffix(style: str) -> str:
    """What is added to a question.

    Raises:
        BadInput: no such style; the message lists them.
    """
    if style not in PROMPT_STYLES:
        raise BadInput(f"no prompt style {style!r}: choose from {', '.join(PROMPT_STYLES)}")
    return PROMPT_STYLES[style]
