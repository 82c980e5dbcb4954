"""MME's files: questions, answers, and where the pictures lie."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from vlmfix.errors import BadInput
from vlmfix.evals.inputs.folder import ImageFolder
from vlmfix.evals.inputs.rows import Row, few, read_rows, read_text, refuse_repeats

__all__ = [
    "SUBSETS",
    "WHAT",
    "MmeData",
    "MmeQuestion",
    "Questions",
    "answer_key",
    "load_answers",
    "refuse_odd",
]

#: VCD and RITUAL call the first two "object-level", the others "attribute-level".
SUBSETS = ("existence", "count", "position", "color")

NEEDS = (
    "one of: eval_tool/Your_Results/existence.txt, count.txt, position.txt and color.txt (image, "
    "question and answer with tabs between), or folders of these names with a .txt per image; and "
    "the pictures. MME's authors send them on request: "
    "github.com/BradyFU/Awesome-Multimodal-Large-Language-Models, branch Evaluation"
)

WHAT = "MME answers"

# Every question of the benchmark ends so, one of them without a question mark before.
_ENDING = re.compile(r"Please answer yes or no\.?$", re.IGNORECASE)


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

    task = "mme"
    needs = NEEDS

    def __init__(self, root: str | Path) -> None:
        folder = self.existing(root)
        self.questions: list[MmeQuestion] = []
        files: list[Path] = []
        for subset in SUBSETS:
            paths, per_image = _files(folder, subset)
            files += paths
            for path in paths:
                for row in _lines(path):
                    self.questions.append(_question(row, subset, path.stem if per_image else None))
        super().__init__(folder, files)

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


def answer_key(row: Row) -> tuple[str, str]:
    """The question that a row answers: its image, and its text without any ending."""
    image, text = row.text("image"), row.text("question", "prompt")
    return image, MmeQuestion("", image, text, "").asked


def refuse_odd(questions: Sequence[MmeQuestion]) -> None:
    numbers: dict[str, int] = {}
    for question in questions:
        numbers[question.image] = numbers.get(question.image, 0) + 1
    if odd := [f"{image} ({n})" for image, n in numbers.items() if n != 2]:
        raise BadInput(
            f"MME: {len(odd)} of {len(numbers)} images have not exactly two questions: {few(odd)}: "
            "accuracy+ is about pairs; complete the question files"
        )
    refuse_repeats([f"{q.image}: {q.asked}" for q in questions], "MME questions")
