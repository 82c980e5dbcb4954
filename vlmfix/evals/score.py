"""`vlmfix score`: files of answers, by a run of ours or by any other project, without a model.

A task that is given its questions can score answers whoever made them, so what a file goes through
is what a run goes through: the same metrics, intervals, tests and controls, in the same results.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlmfix._version import __version__
from vlmfix.errors import BadInput
from vlmfix.evals.amber import task as amber
from vlmfix.evals.chair.files import image_id_of, last_captions
from vlmfix.evals.hallusionbench import task as hallusionbench
from vlmfix.evals.inputs.pairing import answer_text, pair
from vlmfix.evals.inputs.parsers import PARSERS, get_parser
from vlmfix.evals.inputs.rows import Row, few, read_rows, short
from vlmfix.evals.mme import task as mme
from vlmfix.evals.pope.builder import Question
from vlmfix.evals.pope.files import answer_splits, pair_rows, question_splits
from vlmfix.evals.pope.tables import QuestionTable
from vlmfix.evals.running.arms import BASE
from vlmfix.evals.scoring.controls import add_controls
from vlmfix.evals.tasks import Answer, Options, Sample, get_task

__all__ = ["ALL_PARSERS", "FORMATS", "Format", "score"]

ALL_PARSERS = "all"


Pair = Callable[[Sequence[Sample], Sequence[Row]], list[Row]]


@dataclass(frozen=True)
class Format:
    """How answers to one task are written.

    Args:
        pair: (samples, rows) -> the row of every sample, in order. Raises BadInput for answers that
            are missing, repeated or to no question, with a list of them.
        load: (file, what it holds) -> its rows.
        options: what the answers say about the options of the task.
        parsers: the answers are yes or no, and `--parser` says how they are read.
    """

    pair: Pair
    load: Callable[[str | Path, str], list[Row]] = read_rows
    options: Callable[[Sequence[Row]], dict[str, Any]] = lambda rows: {}
    parsers: bool = False


def _by(key: Callable[[Row], Hashable]) -> Pair:
    """Paired by the key that our own record of a sample would have."""

    def pair_rows(samples: Sequence[Sample], rows: Sequence[Row]) -> list[Row]:
        wanted = [key(_record(sample)) for sample in samples]
        return pair(wanted, rows, key, f"{samples[0].task} answers" if samples else "answers")

    return pair_rows


def _record(sample: Sample) -> Row:
    names = ("sample_id", "image_id", "image", "prompt")
    return Row(sample.sample_id, {name: getattr(sample, name) for name in names})


def _by_question(samples: Sequence[Sample], rows: Sequence[Row]) -> list[Row]:
    """POPE's answers, by image and object, id or order (`pope_files.pair_rows`)."""
    asked: dict[str, list[Question]] = {}
    for sample in samples:
        number = int(sample.sample_id.rpartition(":")[2])
        question = Question(number, str(sample.image), sample.prompt, sample.target)
        asked.setdefault(sample.split, []).append(question)
    answered = answer_splits(rows, list(asked))
    return [row for split in asked for row in pair_rows(asked[split], answered[split])]


def _image(row: Row) -> int:
    return image_id_of(row.first("image_id", "image"), row.where)


#: One row per task.
FORMATS: dict[str, Format] = {
    "amber": Format(_by(amber.answer_key)),
    "amber_d": Format(_by(amber.answer_key), parsers=True),
    "amber_g": Format(_by(amber.answer_key)),
    "chair": Format(
        _by(_image),
        load=lambda path, what: last_captions(read_rows(path, what)),
        options=lambda rows: {"image_ids": list(dict.fromkeys(map(_image, rows)))},
    ),
    "hallusionbench": Format(_by(hallusionbench.answer_key)),
    "mme": Format(_by(mme.answer_key), load=lambda path, what: mme.load_answers(path)),
    "pope": Format(_by_question, parsers=True),
    **dict.fromkeys(
        ("rope", "rope_single", "rope_student", "rope_teacher"),
        Format(_by(lambda row: row.text("sample_id"))),
    ),
}


def score(
    task: str,
    answers: Mapping[str, str | Path],
    baseline: Mapping[str, str | Path] | None = None,
    *,
    questions: Mapping[str, str | Path] | None = None,
    annotations: str | Path | None = None,
    parser: str = "official",
    truncate: str = "none",
    chair_engine: str = "builtin",
    chair_mode: str = "compat",
    amber_similarity: str = "exact",
    seed: int = 0,
) -> dict[str, Any]:
    """Score answers that stand in files; with a baseline, compare the two as a pair.

    Args:
        task: a key of `FORMATS`.
        answers: split -> file; "" for one file of all splits. JSON Lines, a JSON list or .tsv.
        baseline: the answers of another model or method to the same items, in the same form.
        questions: POPE question files by split; "all" for the splits that a file names itself. Left
            out, the answers must hold their truth, as our own records do.
        annotations: the data of the task, as `vlmfix eval --data` takes it; None: bundled images.
        parser: of yes/no answers, a key of `parsers.PARSERS`; "all" compares all of them.
        truncate: "sentence" drops the sentence of a caption that the token limit cut.
        chair_engine: finds objects in captions, of `chair_objects.ENGINES`.
        chair_mode: "compat", or "fixed" for repaired rules.
        amber_similarity: as in `evaluate`.
        seed: of the bootstrap.

    Returns:
        As `evaluate` returns it, without what only a run knows. The arms are "base" and "method",
        or "answers" if there is one alone. With parser "all" the task's entry is that of the
        official one, and its "parsers" holds parser -> arm -> scores.

    Raises:
        BadInput: unknown task or parser, files that cannot be read, answers that do not fit the
            questions.
    """
    if task not in FORMATS:
        get_task(task)  # an unknown task says which there are
        raise BadInput(f"the answers of {task} cannot be scored alone: choose {', '.join(FORMATS)}")
    form = FORMATS[task]
    every = parser == ALL_PARSERS
    if parser != "official" and not form.parsers:
        names = ", ".join(name for name, one in FORMATS.items() if one.parsers)
        raise BadInput(
            f"--parser {parser}: {task} has one way to read answers; {names} have several"
        )
    files = {"answers": answers} if baseline is None else {BASE: baseline, "method": answers}
    rows = {arm: _rows(task, given) for arm, given in files.items()}
    first = next(iter(rows))
    options = Options(
        seed=seed,
        n_images=None,
        prompt_style="bare",
        parser=get_parser("official" if every else parser).name,
        truncate=truncate,
        chair_engine=chair_engine,
        chair_mode=chair_mode,
        amber_similarity=amber_similarity,
        questions={k: Path(v) for k, v in questions.items()} if questions else None,
        **form.options(rows[first]),
    )
    data = _data(task, rows[first], _names(files[first]), options, annotations)
    ready = get_task(task)(data, options)
    samples = ready.samples
    draws, arms = _answers(form, samples, rows)
    repeated = [sample for _ in range(draws) for sample in samples]
    seeds = [draw for draw in range(draws) for _ in samples]
    scored = ready.score(repeated, arms, seeds)
    add_controls(scored, ready, repeated, arms, seeds, seed)
    entry = {
        # How the answers were asked for is not in their files.
        **{key: fact for key, fact in ready.facts.items() if not key.startswith("prompt")},
        "partial": False,
        "data": getattr(data, "name", None) or _names(questions),
        "n_samples": len(samples),
        "n_images": len({sample.image_id for sample in samples}),
        "splits": list(dict.fromkeys(sample.split for sample in samples)),
        "arms": scored,
    }
    if every:
        entry["parsers"] = {
            name: get_task(task)(data, replace(options, parser=name)).score(repeated, arms, seeds)
            for name in PARSERS
        }
    return {
        "partial": False,
        "errors": 0,
        "config": {
            "answers": {arm: _names(given) for arm, given in files.items()},
            "seed": seed,
            "versions": {"vlmfix": __version__},
        },
        "tasks": {task: entry},
    }


class _OwnQuestions(QuestionTable):
    """POPE questions that stand beside their answers, as in our own records.

    Args:
        rows: one answer to each question.
        name: of their file.

    Raises:
        BadInput: rows that do not hold their truth.
    """

    def __init__(self, rows: Sequence[Row], name: str) -> None:
        self.name, self._pictures = name, {}
        if without := [row.where for row in rows if "target" not in row.values]:
            raise BadInput(
                f"{len(without)} answers do not say what is true, first {without[0]}: name the "
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


def _rows(task: str, files: Mapping[str, str | Path]) -> list[Row]:
    found = []
    for split, path in files.items():
        rows = FORMATS[task].load(path, f"{task} answers")
        found += [Row(row.where, {**row.values, "split": split}) if split else row for row in rows]
    return found


def _names(files: Mapping[str, str | Path] | None) -> str:
    return ", ".join(Path(path).name for path in (files or {}).values())


def _data(
    task: str, rows: Sequence[Row], name: str, options: Options, annotations: str | Path | None
) -> Any:
    if options.questions and task != "pope":
        raise BadInput(f"--questions are POPE's; the truth of {task} comes with --annotations PATH")
    if options.questions and annotations is not None:
        raise BadInput("POPE: --questions and --annotations both say what is true: keep one")
    if task != "pope" or annotations is not None:
        return get_task(task).open(annotations)
    if options.questions:
        return None
    first = rows[0].first("sampling_seed")
    return _OwnQuestions([row for row in rows if row.first("sampling_seed") == first], name)


def _answers(
    form: Format, samples: Sequence[Sample], rows: Mapping[str, Sequence[Row]]
) -> tuple[int, dict[str, list[Answer]]]:
    """Number of sampling seeds (1: greedy), and arm -> answers to all samples, seed by seed."""
    by_seed: dict[str, dict[Any, list[Row]]] = {}
    for arm, found in rows.items():
        for row in found:
            seed = row.first("sampling_seed")
            by_seed.setdefault(arm, {}).setdefault(seed, []).append(row)
    seeds = [sorted(one, key=str) for one in by_seed.values()]
    if any(one != seeds[0] for one in seeds):
        raise BadInput(
            f"the files hold answers of different sampling seeds ({'; '.join(map(few, seeds))}): "
            "compare equal seeds"
        )
    arms = {
        arm: [_answer(row) for seed in seeds[0] for row in form.pair(samples, found[seed])]
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
