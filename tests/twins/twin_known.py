"""Faults of vlmfix that the twins show and that are not mended yet, as marks for their tests.

A mark is strict: a test that passes has to leave this list.
"""

from __future__ import annotations

from twin_chats import KINDS
from twin_recipes import RECIPES

PALIGEMMA = "paligemma-3b-mix-448"

NO_TEMPLATE = "checkpoints without a chat template are not written a prompt"
LISTS = "contents become lists of parts, where the template wants a text"
SPAN = "the question span: earlier turns, the begun answer, newlines, text before the image"

_OTHERS = [name for name in RECIPES if name != PALIGEMMA]
_SPAN_KINDS = {"second turn", "one word", "begun", "text first"}
_IMAGES_FIRST = {name for name in _OTHERS if name.startswith("llava")}


def known() -> dict[tuple[str, str], str]:
    """{(test, twin and kind as pytest writes them): why it fails}."""
    found = {}
    for kind in [k for k in KINDS if k not in ("system", "second turn", "begun")]:
        for test in ("the_prompt_is_the_templates", "question_and_content"):
            found[test, f"{PALIGEMMA}-{kind}"] = NO_TEMPLATE
        found["a_method_edits_the_answer", f"{PALIGEMMA}-{kind}"] = NO_TEMPLATE
    for test in (
        "placeholders_are_as_many_as_written_down",
        "what_doctor_calls_fitting_runs",
        "unwrapped_the_model_answers_as_before",
        "a_chat_without_an_image",
        "a_batch_is_answered_like_its_rows",
        "eval_asks_every_item",
        "calibrate_measures_every_part",
        "maps_of_the_question",
        "visual_tokens_that_hiprune_keeps",
    ):
        found[test, PALIGEMMA] = NO_TEMPLATE
    for size in ("(640, 480)", "(480, 640)", "(1000, 200)"):
        found["a_painted_spot_moves_the_token_named", f"{PALIGEMMA}-{size}"] = NO_TEMPLATE
    for test in ("the_prompt_is_the_templates", "a_method_edits_the_answer"):
        found[test, "pixtral-12b-system"] = LISTS
    for kind in ("system", "second turn", "begun"):
        found["the_prompt_is_the_templates", f"GLM-4.1V-9B-Thinking-{kind}"] = LISTS
    for name in _OTHERS:
        spoilt = set(_SPAN_KINDS)
        if RECIPES[name].tokenizer == "byte_level":
            spoilt.add("newlines")
        if name in _IMAGES_FIRST:
            spoilt.remove("text first")
        if name in ("InternVL3-8B-hf", "gemma-3-4b-it"):
            spoilt = set(KINDS)
        if name == "pixtral-12b":
            spoilt.add("system")
        for kind in spoilt:
            found["question_and_content", f"{name}-{kind}"] = SPAN
    return found
