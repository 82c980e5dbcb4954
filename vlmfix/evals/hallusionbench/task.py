"""HallusionBench: yes/no questions about figures and about altered copies of them.

Paper: Guan et al. 2024 (arXiv 2310.14566). Reference: tianyi-lab/HallusionBench, utils.py (BSD-3).
aAcc is accuracy over questions; a question counts for qAcc if it is right on all figures of its
set, a figure for fAcc if all questions about it are answered right. Questions of category VS come
without any figure, too ("figure 0"); they count for qAcc, but are no figure.

The authors' judge is a language model that compares answers with a reference text; here answers are
read as yes or no (`parsers.PARSERS`), as lmms-eval and VLMEvalKit do, and an answer that is neither
is wrong, also where the judge would accept "unclear" because no figure is given. The place "visual"
holds the questions that have a picture, the variant that VLMEvalKit runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from vlmfix.errors import BadInput
from vlmfix.evals.inputs.folder import ImageFolder
from vlmfix.evals.inputs.pairing import answer_text, pair
from vlmfix.evals.inputs.parsers import get_parser
from vlmfix.evals.inputs.rows import Row, read_rows, refuse_repeats, short
from vlmfix.evals.scoring.groups import summarise_places
from vlmfix.evals.scoring.metrics import Arm, Ratio, counts_table
from vlmfix.evals.tasks import Column, Options, Sample
from vlmfix.evals.yesno import YesNoTask, complete, count_groups, read_answers

__all__ = [
    "SUFFIX",
    "HallusionBench",
    "HallusionData",
    "HallusionQuestion",
    "answer_key",
    "score_answers",
]

SUFFIX = " Answer yes or no."
PARSER = "strict"
NEEDS = (
    "HallusionBench.json from github.com/tianyi-lab/HallusionBench, and the folders VD and VS of "
    "hallusion_bench.zip, which its README links"
)

COUNTS = (
    "n",
    "correct",
    "questions",
    "right_questions",
    "figures",
    "right_figures",
    "yes",
    "unparsed",
    "empty",
)
RATIOS = (
    Ratio("aacc", {"correct": 1}, {"n": 1}, proportion=True),
    Ratio("qacc", {"right_questions": 1}, {"questions": 1}, proportion=True),
    Ratio("facc", {"right_figures": 1}, {"figures": 1}, proportion=True),
    Ratio("yes_ratio", {"yes": 1}, {"n": 1}, proportion=True),
)


@dataclass(frozen=True)
class HallusionQuestion:
    """One row of the benchmark.

    Args:
        category: "VD" (the figure is needed) or "VS" (it only adds to what can be known).
        subcategory: such as "chart".
        set_id: figures and questions that belong together.
        figure_id: "0" is the original figure, or none at all where the category is VS.
        question_id: number of the question in its set.
        text: the question.
        label: "yes" or "no".
        image: name of the picture; None without one.
    """

    category: str
    subcategory: str
    set_id: str
    figure_id: str
    question_id: str
    text: str
    label: str
    image: str | None

    @property
    def key(self) -> str:
        """What names the row."""
        return "_".join((*self.set_key, self.figure_id, self.question_id))

    @property
    def set_key(self) -> tuple[str, str, str]:
        """What names the set; questions and figures never leave it."""
        return self.category, self.subcategory, self.set_id


class HallusionData(ImageFolder):
    """A folder with HallusionBench.json and the pictures.

    Args:
        root: the folder, or the .json file itself under any name.

    Raises:
        BadInput: no such file, or a broken row.
    """

    task = "hallusionbench"
    needs = NEEDS

    def __init__(self, root: str | Path) -> None:
        path = Path(root)
        if not path.is_file():
            folder = self.existing(root)
            path = folder / "HallusionBench.json"
            if not path.is_file():
                raise BadInput(
                    f"hallusionbench: {folder} holds no HallusionBench.json. It needs {NEEDS}"
                )
        super().__init__(path.parent, [path])
        self.questions = [_question(row) for row in read_rows(path, "HallusionBench questions")]
        refuse_repeats([question.key for question in self.questions], f"{path}: rows")


def _question(row: Row) -> HallusionQuestion:
    ids = ("category", "subcategory", "set_id", "figure_id", "question_id")
    names = {key: str(row.number(key)) if key.endswith("_id") else row.text(key) for key in ids}
    label = {"0": "no", "1": "yes"}.get(str(row.first("gt_answer")))
    if label is None:
        raise BadInput(f"{row.where}: gt_answer is {short(row.first('gt_answer'))}, not 0 or 1")
    image = row.answer("filename")
    return HallusionQuestion(
        **names,
        text=row.text("question"),
        label=label,
        image=image and PurePosixPath(image).as_posix(),
    )


def score_answers(
    questions: HallusionData,
    answers: Sequence[Row | Mapping[str, Any]],
    parser: str = PARSER,
    seed: int = 0,
) -> dict[str, Any]:
    """Score answers without a model.

    Args:
        questions: the questions.
        answers: rows with the answer and with `sample_id` (`HallusionQuestion.key`), or with
            `category`, `subcategory`, `set_id`, `figure_id` and `question_id`.
        parser: a key of `parsers.PARSERS`.
        seed: of the bootstrap.

    Returns:
        {"scores", "counts", "flags"} as `metrics.summarise` gives them for one arm, with the places
        "all", "VD", "VS" and "visual"; and "n_unparsed".

    Raises:
        BadInput: answers that are missing, repeated, or to no question; no such parser.
    """
    get_parser(parser)
    asked = questions.questions
    rows = pair([question.key for question in asked], answers, answer_key, "HallusionBench answers")
    texts = [answer_text(row) for row in rows]
    entry: dict[str, Any] = _score({"": texts}, asked, parser, seed)[""]
    return {**entry, "parser": parser}


def answer_key(row: Row) -> str:
    """The `HallusionQuestion.key` that a row answers."""
    if "sample_id" in row.values:
        return row.text("sample_id")
    names = [row.text(key) for key in ("category", "subcategory")]
    return "_".join([*names, *(str(row.number(f"{k}_id")) for k in ("set", "figure", "question"))])


def _score(
    arms: Mapping[str, Sequence[str]],
    questions: Sequence[HallusionQuestion],
    parser: str,
    seed: int,
    draws: Sequence[int] | None = None,
) -> dict[str, Any]:
    everything = range(len(questions))
    places = {
        "all": list(everything),
        "VD": [i for i in everything if questions[i].category == "VD"],
        "VS": [i for i in everything if questions[i].category == "VS"],
        "visual": [i for i in everything if questions[i].image is not None],
    }
    # Which rows make up a question depends on the place: "visual" leaves some of them out.
    result: dict[str, Any] = {}
    for place, at in places.items():
        chosen = [questions[i] for i in at]
        kept = draws and [draws[i] for i in at]
        scored = {
            arm: _arm([texts[i] for i in at], chosen, parser, kept) for arm, texts in arms.items()
        }
        sets = [question.set_key for question in chosen]
        here = {place: range(len(at))}
        found = summarise_places(scored, COUNTS, RATIOS, here, sets, seed, kept)
        for arm, entry in found.items():
            into = result.setdefault(arm, {"scores": {}, "counts": {}, "flags": []})
            for key, value in entry.items():
                if isinstance(value, list):
                    into[key] += value
                else:
                    into.setdefault(key, {}).update(value)
            if place == "all":
                into["n_unparsed"] = int(scored[arm].counts[:, COUNTS.index("unparsed")].sum())
    return result


def _arm(
    answers: Sequence[str],
    questions: Sequence[HallusionQuestion],
    parser: str,
    draws: Sequence[int] | None,
) -> Arm:
    rows, right = read_answers(answers, [q.label for q in questions], get_parser(parser))

    def question(i: int) -> tuple[str, ...]:
        return (*questions[i].set_key, questions[i].question_id)

    def figure(i: int) -> tuple[str, ...] | None:
        no_figure = (questions[i].category, questions[i].figure_id) == ("VS", "0")
        return None if no_figure else (*questions[i].set_key, questions[i].figure_id)

    # Groups lie in one set each, and sets are what the bootstrap draws.
    count_groups(rows, draws, question, "questions", "right_questions")
    count_groups(rows, draws, figure, "figures", "right_figures")
    return Arm(counts_table(rows, COUNTS), right)


class HallusionBench(YesNoTask):
    """The HallusionBench task, without a judge."""

    name = "hallusionbench"
    columns = (
        Column("aacc", "aAcc", tested=True),
        Column("qacc", "qAcc"),
        Column("facc", "fAcc"),
        Column("yes_ratio", "yes"),
    )
    several_parsers = False
    open = HallusionData.open
    answer_key = staticmethod(answer_key)

    def __init__(self, data: HallusionData, options: Options) -> None:
        super().__init__(data, options)
        self.parser = get_parser(PARSER)
        self._by_key = {question.key: question for question in data.questions}
        # A set without some of its questions would count for neither qAcc nor fAcc as meant.
        self.images = list(dict.fromkeys(question.set_key for question in data.questions))

    @cached_property
    def samples(self) -> list[Sample]:
        """The questions of the first sets, whole."""
        asked = set(self.images[: self.options.limit])
        return [
            Sample(
                task=self.name,
                split=question.category,
                sample_id=question.key,
                image=question.image,
                image_id="_".join(question.set_key),
                prompt=question.text + SUFFIX,
                target=question.label,
            )
            for question in self.data.questions
            if question.set_key in asked
        ]

    @property
    def facts(self) -> dict[str, Any]:
        """Ending of the prompt, and parser."""
        return {"prompt_suffix": SUFFIX, "parser": PARSER, "judge": None}

    def scores(
        self,
        samples: Sequence[Sample],
        arms: Mapping[str, Sequence[str]],
        draws: Sequence[int] | None,
    ) -> dict[str, Any]:
        """aAcc, qAcc and fAcc of all questions, of VD, of VS, and of those with a picture.

        A set of which one question failed is left out: its groups would look easier than they are.
        """
        questions = [self._by_key[sample.sample_id] for sample in samples]
        sizes = Counter(self._by_key[sample.sample_id].set_key for sample in self.samples)
        kept = complete([question.set_key for question in questions], sizes, draws)
        return _score(
            {arm: [answers[i] for i in kept] for arm, answers in arms.items()},
            [questions[i] for i in kept],
            PARSER,
            self.options.seed,
            draws and [draws[i] for i in kept],
        )
