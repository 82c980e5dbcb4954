"""Run the real lmms-eval on a tiny task in a folder; prints what it answered as JSON.

Arguments: the folder, then for each run the name of the model ("vlmfix", "given") and its
model_args.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import get_model_manifest
from lmms_eval.tasks import TaskManager

import vlmfix
from vlmfix.integrations.lmms_eval import wrap

BATCH = 4


def answers(folder: str, model: Any, **arguments: Any) -> dict[str, Any]:
    manager = TaskManager(include_path=[folder], include_defaults=False, model_name="vlmfix")
    found = simple_evaluate(
        model=model, tasks=["emoji_tiny"], task_manager=manager, batch_size=BATCH, **arguments
    )
    samples = sorted(found["samples"]["emoji_tiny"], key=lambda sample: sample["doc_id"])
    return {
        "answers": [sample["filtered_resps"][0] for sample in samples],
        "tokens": [sample["token_counts"][0] for sample in samples],
        "score": found["results"]["emoji_tiny"]["words,none"],
        "backend": found["config"]["model_backend"],
    }


def main(folder: str, *runs: str) -> None:
    loaded = vlmfix.load("emoji", device="cpu")
    given = wrap(*loaded, batch_size=BATCH)
    rows: list[dict[str, Any]] = [{"manifest": get_model_manifest("vlmfix").chat_class_path}]
    for run in runs:
        name, _, model_args = run.partition(" ")
        if name == "given":
            with vlmfix.wrapped(loaded[0], model_args or None):
                rows.append(answers(folder, given))
        else:
            rows.append(answers(folder, name, model_args=model_args))
    Path(folder, "rows.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
