"""`vlmfix score`: files of answers, by a run of ours or by any other project, without a model.

A task that is given its questions can score answers of any origin, so what a file goes through
is what a run goes through: the same metrics, intervals, tests and controls, in the same results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlmfix._version import __version__
from vlmfix.errors import BadInput
from vlmfix.evals.inputs.pairing import answer_text
from vlmfix.evals.inputs.parsers import PARSERS, get_parser
from vlmfix.evals.inputs.rows import Row, few, short
from vlmfix.evals.options import SCORING, Options
from vlmfix.evals.running.arms import BASE
from vlmfix.evals.scoring.controls import add_controls
from vlmfix.evals.tasks import Answer, Task, get_task, list_tasks

__all__ = ["ALL_PARSERS", "score"]

ALL_PARSERS = "all"


def score(
    task: str,
    answers: Mapping[str, str | Path],
    baseline: Mapping[str, str | Path] | None = None,
    *,
    annotations: str | Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Score answers that stand in files; with a baseline, compare the two as a pair.

    Args:
        task: name.
        answers: split -> file; "" for one file of all splits. JSON Lines, a JSON list or .tsv; what
            else a task reads, its `load_answers` says.
        baseline: the answers of another model or method to the same items, in the same form.
        annotations: the data of the task, as `vlmfix eval --data` takes it; None: bundled images.
        options: fields of `Options`, those of `SCORING` and these two. `questions`: POPE question
            files by split, "all" for the splits that a file names itself; left out, the answers
            must hold their truth, as our own records do. `parser`: of yes/no answers, or "all" to
            compare all of them.

    Returns:
        As `evaluate` returns it, without what only a run knows. The arms are "base" and "method",
        or "answers" if there is one alone. With parser "all" the task's entry is that of the
        official one, and its "parsers" holds parser -> arm -> scores.

    Raises:
        BadInput: unknown task or parser, files that cannot be read, answers that do not fit the
            questions.
    """
    kind = get_task(task)
    if strange := sorted(set(options) - {"questions", "parser", *SCORING}):
        raise BadInput(f"{', '.join(strange)}: these options do not concern answers in files")
    parser = options.get("parser", Options.parser)
    every = parser == ALL_PARSERS
    if parser != Options.parser and not kind.several_parsers:
        names = ", ".join(name for name in list_tasks() if get_task(name).several_parsers)
        raise BadInput(
            f"--parser {parser}: {task} has one way to read answers; {names} have several"
        )
    first_parser = get_parser(Options.parser if every else parser).name
    chosen = Options(
        **{**options, "n_images": None, "prompt_style": "bare", "parser": first_parser}
    )
    files = {"answers": answers} if baseline is None else {BASE: baseline, "method": answers}
    rows = {arm: _rows(kind, given) for arm, given in files.items()}
    first = next(iter(rows))
    data, chosen = kind.open_answered(rows[first], _names(files[first]), annotations, chosen)
    ready = kind(data, chosen)
    samples = ready.samples
    draws, arms = _answers(ready, rows)
    rows.clear()  # of millions, scoring needs the room
    repeated = [sample for _ in range(draws) for sample in samples]
    seeds = [draw for draw in range(draws) for _ in samples]
    scored = ready.score(repeated, arms, seeds)
    add_controls(scored, ready, repeated, arms, seeds, chosen.seed)
    entry = {
        # How the answers were asked for is not in their files.
        **{key: fact for key, fact in ready.facts.items() if not key.startswith("prompt")},
        "partial": False,
        "data": getattr(data, "name", None) or _names(chosen.questions),
        "n_samples": len(samples),
        "n_images": len({sample.image_id for sample in samples}),
        "splits": list(dict.fromkeys(sample.split for sample in samples)),
        "arms": scored,
    }
    if every:
        entry["parsers"] = {
            name: kind(data, replace(chosen, parser=name)).score(repeated, arms, seeds)
            for name in PARSERS
        }
    return {
        "partial": False,
        "errors": 0,
        "config": {
            "answers": {arm: _names(given) for arm, given in files.items()},
            "seed": chosen.seed,
            "versions": {"vlmfix": __version__},
        },
        "tasks": {task: entry},
    }


def _rows(kind: type[Task], files: Mapping[str, str | Path]) -> list[Row]:
    found = []
    for split, path in files.items():
        rows = kind.load_answers(path)
        found += [Row(row.where, {**row.values, "split": split}) if split else row for row in rows]
    return found


def _names(files: Mapping[str, str | Path] | None) -> str:
    return ", ".join(Path(path).name for path in (files or {}).values())


def _answers(task: Task, rows: Mapping[str, Sequence[Row]]) -> tuple[int, dict[str, list[Answer]]]:
    """Number of sampling seeds (1: greedy), and arm -> answers to all samples, seed by seed."""
    by_seed: dict[str, dict[Any, list[Row]]] = {}
    for arm, found in rows.items():
        for row in found:
            seed = row.first("sampling_seed")
            if seed is not None and type(seed) is not int:
                raise BadInput(f"{row.where}: `sampling_seed` is {short(seed)}, no whole number")
            by_seed.setdefault(arm, {}).setdefault(seed, []).append(row)
    seeds = [sorted(one, key=str) for one in by_seed.values()]
    if any(one != seeds[0] for one in seeds):
        raise BadInput(
            f"the files hold answers of different sampling seeds ({'; '.join(map(few, seeds))}): "
            "compare equal seeds"
        )
    arms = {
        arm: [_answer(row) for seed in seeds[0] for row in task.pair_answers(found[seed])]
        for arm, found in by_seed.items()
    }
    return len(seeds[0]), arms


def _answer(row: Row) -> Answer:
    p_yes = row.first("p_yes")
    if p_yes is not None and (isinstance(p_yes, bool) or not isinstance(p_yes, (int, float))):
        raise BadInput(f"{row.where}: `p_yes` is {short(p_yes)}, which is no number")
    if p_yes is not None and not 0 <= p_yes <= 1:
        raise BadInput(f"{row.where}: `p_yes` is {p_yes}, which is no probability")
    finish = "length" if row.first("finish") == "length" else "eos"
    return Answer(answer_text(row), finish=finish, p_yes=p_yes)
