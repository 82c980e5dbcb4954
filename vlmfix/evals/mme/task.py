"""MME, hallucination subset: existence, count, position and colour, two questions per image.

Paper: Fu et al. 2023 (arXiv 2306.13394). Reference: the benchmark's own eval_tool, as RITUAL and
VCD run it on four subsets: 30 images with a "yes" and a "no" question each. The score of a subset
is 100 (accuracy + accuracy+), from 0 to 200, where accuracy+ counts images with both answers right;
the four add up to at most 800. Where we differ: questions are grouped by image, not by the order of
lines, and an image without exactly two questions is an error.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from vlmfix.errors import BadInput
from vlmfix.evals.inputs.folder import ImageFolder, existing_folder
from vlmfix.evals.inputs.pairing import answer_text, pair
from vlmfix.evals.inputs.parsers import Parser, Verdict, get_parser
from vlmfix.evals.inputs.prompts import suffix
from vlmfix.evals.inputs.rows import Row, few, read_rows, read_text, refuse_repeats
from vlmfix.evals.scoring.groups import by_draw
from vlmfix.evals.scoring.metrics import Arm, Ratio, counts_table, summarise
from vlmfix.evals.tasks import Answer, Column, Options, Sample

if TYPE_CHECKING:
    from vlmfix.evals.mme.emoji import EmojiMme

__all__ = [
    "MME",
    "SUBSETS",
    "Mme",
    "MmeData",
    "MmeQuestion",
    "answer_key",
    "load_answers",
    "load_questions",
    "score_answers",
]

#: VCD and RITUAL call the first two "object-level", the others "attribute-level".
SUBSETS = ("existence", "count", "position", "color")

NEEDS = (
    "one of: eval_tool/Your_Results/existence.txt, count.txt, position.txt and color.txt (image, "
    "question and answer with tabs between), or folders of these names with a .txt per image; and "
    "the pictures. MME's authors send them on request: "
    "github.com/BradyFU/Awesome-Multimodal-Large-Language-Models, branch Evaluation"
)

# Every question of the benchmark ends so, one of them without a question mark before.
_ENDING = re.compile(r"Please answer yes or no\.?$", re.IGNORECASE)

COUNTS = ("n", "correct", "images", "both", "yes", "unparsed", "empty")
RATIOS = (
    # Both accuracies share a denominator, because an image has two questions.
    Ratio("score", {"correct": 100, "both": 200}, {"n": 1}),
    Ratio("accuracy", {"correct": 1}, {"n": 1}, proportion=True),
    Ratio("accuracy_plus", {"both": 1}, {"images": 1}, proportion=True),
    Ratio("yes_ratio", {"yes": 1}, {"n": 1}, proportion=True),
)


def _mme(answer: str, label: str) -> Verdict:
    word = answer.lower().strip()
    if word in ("yes", "no"):
        return "yes" if word == "yes" else "no"
    # So "not", "nope", "none" and "know" say no, and "i think no" says nothing.
    return "yes" if "yes" in word[:4] else "no" if "no" in word[:4] else None


MME = Parser("mme", _mme)
"""The benchmark's reading of an answer."""


@dataclass(frozen=True)
class MmeQuestion:
    """One question.

    Args:
        subset: existence, count, position or color.
        image: name of its picture.
        text: the question as the file has it.
        label: "yes" or "no".
    """

    subset: str
    image: str
    text: str
    label: str

    @property
    def asked(self) -> str:
        """The question without its ending, which may be worded differently."""
        return _ENDING.sub("", self.text.partition("\n")[0].rstrip()).strip()


class Questions(Protocol):
    """Data that the task can ask about."""

    @property
    def questions(self) -> Sequence[MmeQuestion]:
        """Two per image and subset."""


class MmeData(ImageFolder):
    """A folder with MME's questions and pictures.

    Args:
        root: the folder.

    Raises:
        BadInput: a subset has no file, several, or a broken line.
    """

    def __init__(self, root: str | Path) -> None:
        folder = existing_folder(root, "mme", NEEDS)
        self.questions: list[MmeQuestion] = []
        files: list[Path] = []
        for subset in SUBSETS:
            paths, per_image = _files(folder, subset)
            files += paths
            for path in paths:
                for row in _lines(path):
                    self.questions.append(_question(row, subset, path.stem if per_image else None))
        super().__init__(folder, files)

    @classmethod
    def open(cls, path: str | Path | None) -> MmeData:
        """The data in a folder; there is none bundled (`Task.open`).

        Raises:
            BadInput: None, no folder, or files that are missing or broken.
        """
        return cls(existing_folder(path, "mme", NEEDS))

    def find(self, name: str) -> Path | None:
        """Where the picture of that name lies: in the subset's folder, or in its images/."""
        # A text file per image does not tell the format of its picture.
        subset, _, file = name.partition("/")
        stem = Path(file).stem
        names = [f"{subset}/{inner}{stem}" for inner in ("", "images/")]
        suffixes = [Path(file).suffix, ".jpg", ".png"]
        paths = (super(MmeData, self).find(base + end) for base in names for end in suffixes)
        return next((path for path in paths if path is not None), None)


def _files(folder: Path, subset: str) -> tuple[list[Path], bool]:
    """The files of one subset, and whether each of them is about one image."""
    places = ("", "eval_tool/Your_Results", "Your_Results")
    # Answer files put a model's name in front: LaVIN_color.txt.
    lists = [p for place in places for p in sorted((folder / place).glob(f"*{subset}.txt"))]
    if len(lists) > 1:
        raise BadInput(f"mme: {few(lists)} are all lists of {subset}: keep one of them")
    if lists:
        return lists, False
    inner = [folder / subset, folder / subset / "questions_answers_YN"]
    single = [path for place in inner for path in sorted(place.glob("*.txt"))]
    if not single:
        raise BadInput(f"mme: {folder} has no questions about {subset}. It needs {NEEDS}")
    return single, True


def _lines(path: Path) -> list[tuple[str, list[str]]]:
    """The lines of a table with tabs, blank ones left out, each with its place."""
    lines = enumerate(read_text(path, "MME questions").split("\n"), start=1)
    rows = [
        (f"{path}, line {n}", line.rstrip("\r").split("\t")) for n, line in lines if line.strip()
    ]
    if not rows:
        raise BadInput(f"MME questions: {path} is empty. It needs {NEEDS}")
    return rows


def _question(row: tuple[str, list[str]], subset: str, stem: str | None) -> MmeQuestion:
    where, fields = row
    if stem is not None:
        fields = [f"{stem}.jpg", *fields]
    if len(fields) < 3:
        raise BadInput(
            f"{where} has {len(fields)} fields with tabs between: expected image, question and "
            "Yes or No" + (", the image being the file's name" if stem is not None else "")
        )
    image, text, label = (field.strip() for field in fields[:3])
    if label.lower() not in ("yes", "no"):
        raise BadInput(f"{where}: the truth {label!r} is neither Yes nor No")
    return MmeQuestion(subset, f"{subset}/{image}", text, label.lower())


def load_questions(path: str | Path) -> MmeData:
    """The questions in MME's folder; scoring needs no pictures.

    Raises:
        BadInput: no folder, or files that are missing or broken.
    """
    return MmeData.open(path)


def load_answers(path: str | Path) -> list[Row]:
    """Answers as MME's eval_tool takes them, or rows of JSON.

    Args:
        path: a folder with a table per subset, whose lines are image, question, truth and answer
            with tabs between; or a file of rows with `image`, `question` (or `prompt`) and the
            answer, as our runs record them.

    Raises:
        BadInput: a file that is missing or broken; the message names the line.
    """
    path = Path(path)
    if not path.is_dir():
        return read_rows(path, WHAT)
    answers = []
    for subset in SUBSETS:
        paths, per_image = _files(path, subset)
        if per_image:
            raise BadInput(f"{WHAT}: {path} holds questions alone: name the folder of the answers")
        for row in _lines(paths[0]):
            if len(row[1]) < 4:
                raise BadInput(f"{row[0]} has no fourth field, the answer")
            question = _question(row, subset, None)
            values = {"image": question.image, "question": question.text}
            # An answer may hold tabs itself.
            answers.append(Row(row[0], {**values, "answer": "\t".join(row[1][3:])}))
    return answers


WHAT = "MME answers"


def score_answers(
    questions: Questions,
    answers: Sequence[Row | Mapping[str, Any]],
    parser: str = "mme",
    seed: int = 0,
) -> dict[str, Any]:
    """Score answers without a model.

    Args:
        questions: the questions.
        answers: rows with `image` (subset/name), `question` or `prompt` with any ending, and the
            answer.
        parser: "mme", or a key of `parsers.PARSERS`.
        seed: of the bootstrap.

    Returns:
        {"scores", "counts", "flags"} as `metrics.summarise` gives them for one arm, with the place
        "total" for the sum of the four scores; "n_unparsed"; "strict": the same by the strict
        parser.

    Raises:
        BadInput: answers that are missing, repeated, or to no question; an image without exactly
            two questions; no such parser.
    """
    asked = list(questions.questions)
    _refuse_odd(asked)
    rule = MME if parser == "mme" else get_parser(parser)
    rows = pair([(q.image, q.asked) for q in asked], answers, answer_key, WHAT)
    entry: dict[str, Any] = _score({"": [answer_text(row) for row in rows]}, asked, rule, seed)[""]
    return {**entry, "parser": parser}


def answer_key(row: Row) -> tuple[str, str]:
    """The question that a row answers: its image, and its text without any ending."""
    image, text = row.text("image"), row.text("question", "prompt")
    return image, MmeQuestion("", image, text, "").asked


def _refuse_odd(questions: Sequence[MmeQuestion]) -> None:
    numbers: dict[str, int] = {}
    for question in questions:
        numbers[question.image] = numbers.get(question.image, 0) + 1
    if odd := [f"{image} ({n})" for image, n in numbers.items() if n != 2]:
        raise BadInput(
            f"MME: {len(odd)} of {len(numbers)} images have not exactly two questions: {few(odd)}: "
            "accuracy+ is about pairs; complete the question files"
        )
    refuse_repeats([f"{q.image}: {q.asked}" for q in questions], "MME questions")


def _arm(
    answers: Sequence[str],
    questions: Sequence[MmeQuestion],
    parser: Parser,
    draws: Sequence[int] | None,
) -> Arm:
    verdicts = [parser(a, q.label) for a, q in zip(answers, questions, strict=True)]
    right = [v == q.label for v, q in zip(verdicts, questions, strict=True)]
    rows = [
        {
            "n": 1,
            "correct": correct,
            "yes": verdict == "yes",
            "unparsed": verdict is None,
            "empty": not answer.strip(),
        }
        for answer, verdict, correct in zip(answers, verdicts, right, strict=True)
    ]
    for at in by_draw(draws, len(questions)):
        pairs: dict[str, list[int]] = {}
        for i in at:
            pairs.setdefault(questions[i].image, []).append(i)
        for members in pairs.values():
            # What belongs to the image is written to the first of its questions.
            rows[members[0]] |= {"images": 1, "both": all(right[i] for i in members)}
    return Arm(counts_table(rows, COUNTS), right)


def _score(
    arms: Mapping[str, Sequence[str]],
    questions: Sequence[MmeQuestion],
    parser: Parser,
    seed: int,
    draws: Sequence[int] | None = None,
) -> dict[str, Any]:
    subsets = [question.subset for question in questions]
    # Subsets share pictures of COCO, by the same file name.
    pictures = [question.image.rpartition("/")[2] for question in questions]

    def by(rule: Parser) -> dict[str, Any]:
        scored = {arm: _arm(answers, questions, rule, draws) for arm, answers in arms.items()}
        found = summarise(scored, COUNTS, RATIOS, subsets, pictures, seed=seed, draws=draws)
        for arm, entry in found.items():
            entry["n_unparsed"] = int(scored[arm].counts[:, COUNTS.index("unparsed")].sum())
            if set(subsets) == set(SUBSETS):
                for part in (entry["scores"], entry.get("delta")):
                    if part is not None:
                        part["total"] = {"score": _times_four(part["mean"]["score"])}
        return found

    result, strict = by(parser), by(get_parser("strict"))
    for arm, entry in result.items():
        entry["strict"] = strict[arm]
    return result


def _times_four(mean: Mapping[str, Any]) -> dict[str, Any]:
    """The sum over the subsets, from their mean."""
    total = {"value": 4 * mean["value"], "ci": mean["ci"] and [4 * end for end in mean["ci"]]}
    if "by_seed" in mean:
        total |= {"by_seed": [4 * value for value in mean["by_seed"]], "sd": 4 * mean["sd"]}
    return total


class Mme:
    """The MME task, on its hallucination subset."""

    name = "mme"
    max_new_tokens = 16
    columns = (
        Column("score", "score", percent=False),
        Column("accuracy", "accuracy", tested=True),
        Column("accuracy_plus", "accuracy+"),
        Column("yes_ratio", "yes"),
    )
    wants_p_yes = True

    @classmethod
    def open(cls, path: str | Path | None) -> MmeData | EmojiMme:
        """The folder of the benchmark; None: questions of the same kind about bundled images."""
        if path is None:
            from vlmfix.evals.mme.emoji import EmojiMme

            return EmojiMme()
        return MmeData.open(path)

    def __init__(self, data: Questions, options: Options) -> None:
        self._style, self._limit, self._seed = options.prompt_style, options.limit, options.seed
        self._suffix = suffix(options.prompt_style)
        self._questions = list(data.questions)
        _refuse_odd(self._questions)
        self._of_image: dict[str, list[MmeQuestion]] = {}
        # Limited to a few images, there should still be some of every subset.
        self._images: dict[str, list[str]] = {}
        for question in self._questions:
            if question.image not in self._of_image:
                self._images.setdefault(question.subset, []).append(question.image)
            self._of_image.setdefault(question.image, []).append(question)

    @property
    def partial(self) -> bool:
        """Whether the limit left out images."""
        most = max(len(images) for images in self._images.values())
        return self._limit is not None and self._limit < most

    @cached_property
    def samples(self) -> list[Sample]:
        """The questions about the first images of every subset."""
        asked = {image for images in self._images.values() for image in images[: self._limit]}
        chosen = [question for question in self._questions if question.image in asked]
        return [
            Sample(
                task=self.name,
                split=question.subset,
                sample_id=f"{question.image}:{self._of_image[question.image].index(question)}",
                image=question.image,
                image_id=question.image.rpartition("/")[2],
                prompt=question.text if self._style == "bare" else question.asked + self._suffix,
                target=question.label,
            )
            for question in chosen
        ]

    @property
    def facts(self) -> dict[str, Any]:
        """Prompt style, where "bare" is the file's own ending, and parser."""
        return {"prompt_style": self._style, "parser": MME.name}

    def parse(self, sample: Sample, answer: Answer) -> tuple[str | None, bool]:
        """The benchmark's verdict and whether it is the label."""
        verdict = MME(answer.text, sample.target)
        return verdict, verdict == sample.target

    def score(
        self,
        samples: Sequence[Sample],
        arms: Mapping[str, Sequence[Answer]],
        draws: Sequence[int] | None = None,
    ) -> dict[str, Any]:
        """Scores by the benchmark's parser, with those of the strict one beside them.

        An image of which one question failed is left out: accuracy+ is about pairs.
        """
        keys = [(draws[i] if draws else 0, sample.image) for i, sample in enumerate(samples)]
        answered = Counter(keys)
        whole = [i for i, key in enumerate(keys) if answered[key] == 2]
        kept = [samples[i] for i in whole]
        questions = [MmeQuestion(s.split, s.image or "", s.prompt, s.target) for s in kept]
        texts = {arm: [answers[i].text for i in whole] for arm, answers in arms.items()}
        return _score(texts, questions, MME, self._seed, draws and [draws[i] for i in whole])
