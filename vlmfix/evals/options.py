"""The options of an evaluation, each in one place: name, type, default, help.

`vlmfix eval` makes its command line from the fields of `Options`, `vlmfix score` from those that
concern answers in files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from vlmfix.errors import BadInput

__all__ = [
    "DEFAULTS",
    "SCORING",
    "Options",
    "flags",
    "from_text",
    "positive",
    "split",
    "usable_seed",
]


def _option(default: Any, help: str, *flags: str, **facts: Any) -> Any:
    """A field of `Options`.

    Args:
        default: its value where none is given.
        help: what it is, for the command line and for readers.
        flags: of the command line; none: "--" and the name.
        facts: "least", the smallest number; "metavar", how the command line calls the value;
            "kind", the value's type on the command line where it is not the field's, and "read",
            from that value to the field's; "decides" False: a resumed run may differ in it, and
            results do not hold it.
    """
    return field(default=default, metadata={"help": help, "flags": flags, **facts})


def split(text: str) -> list[str]:
    """The parts of a text between commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def _number_or_all(text: str) -> int | None:
    if text == "all":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise BadInput(f"--images {text}: give a number of images, or 'all'")
    return int(text)


def _files_by_split(pairs: Sequence[str]) -> dict[str, str] | None:
    if bad := [pair for pair in pairs if not all(pair.partition("="))]:
        raise BadInput(f"--questions {bad[0]}: write SPLIT=FILE, e.g. random=coco_random.json")
    return {name: file for name, _, file in (pair.partition("=") for pair in pairs)} or None


def positive(**values: int | None) -> None:
    """Raise BadInput unless every option that is given is a whole number, 1 or more."""
    for name, value in values.items():
        if value is not None and not (_is_whole(value) and value >= 1):
            raise BadInput(f"{name}={value!r}: must be 1 or more, a whole number")


def usable_seed(seed: int) -> None:
    """Raise BadInput unless torch's and numpy's generators both take the seed."""
    if not (_is_whole(seed) and 0 <= seed < 2**63):
        raise BadInput(f"seed={seed!r}: must be a whole number from 0 to 2**63 - 1")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class Options:
    """What the caller of an evaluation chose; tasks read what concerns them.

    Every field says what it is, here and in `vlmfix eval --help`. In Python `n_images=None` takes
    all images, `splits` is a list, `questions` a mapping from split to file, and `image_ids` may be
    a list of ids. Sampling is from all tokens (top_p 1, top_k 0). `greedy_too` adds an arm
    "<arm> greedy" for every arm, and the comparison with the greedy base (`against_greedy`): a
    method that is better than sampling only may be worse than greedy. The answers of the `noop` arm
    have to be the base's. `resume` keeps finished answers and asks errors again.

    Raises:
        BadInput: a number that is too small or too large, or no number.
    """

    limit: int | None = _option(
        None, "Ask about the first N selected images only; the results say PARTIAL.", least=1
    )
    n_images: int | None = _option(
        500,
        "How many images a task selects, or 'all' (None in Python).",
        "--images",
        least=1,
        kind=str,
        read=_number_or_all,
    )
    questions: Mapping[str, str | Path] | None = _option(
        None,
        "Ask the POPE questions of these files; SPLIT all: the splits that FILE names itself.",
        metavar="SPLIT=FILE",
        kind=list[str] | None,
        read=_files_by_split,
        decides=False,  # what they ask says it all; where the file lies may change
    )
    splits: Sequence[str] | None = _option(
        None,
        "POPE splits to build: random, popular, adversarial (these three if absent), small.",
        metavar="SPLIT[,SPLIT]",
        kind=str | None,
        read=split,
    )
    ground_truth: str | None = _option(
        None,
        "Objects that built POPE questions ask about: instances or instances+captions; the "
        "captions if absent, where there are some and all categories are COCO's.",
    )
    official_typo: bool = _option(
        False, "POPE asks 'in the imange' after 'an', as its published files do."
    )
    image_ids: str | Path | Sequence[int] | None = _option(
        None,
        "File of the images that CHAIR describes, one id per line, instead of drawing them.",
        kind=Path | None,
    )
    chair_engine: str = _option(
        "builtin", "What finds objects in CHAIR's captions: builtin or nltk."
    )
    chair_mode: str = _option("compat", "CHAIR's own rules (compat), or repaired ones (fixed).")
    amber_similarity: str = _option(
        "exact",
        "When AMBER takes two nouns for the same: equal words, or word vectors of spaCy.",
        metavar="exact|spacy|spacy:MODEL",
    )
    output: str | Path | None = _option(
        None,
        "Folder for the results; a new one under runs/ if absent.",
        "--output",
        "--output-path",
        "--output_path",
        kind=Path | None,
        decides=False,
    )
    batch_size: int = _option(
        32, "Questions per generate call.", "--batch-size", "--batch_size", least=1
    )
    seed: int = _option(
        0, "Seed of the choice of images, of built questions, intervals, sampling, and noise."
    )
    prompt_style: str = _option("lmms", "How yes/no questions end: bare, lmms, vcd or clearsight.")
    parser: str = _option(
        "official",
        "How yes/no answers are read: official, opera, lmms_eval, vlmevalkit, vcd or strict.",
    )
    truncate: str = _option(
        "none", "'sentence' drops the sentence of a caption that the token limit cut."
    )
    max_new_tokens: int | None = _option(
        None, "Longest answer in tokens; the task's own limit if absent.", least=1
    )
    temperature: float | None = _option(
        None, "Sample at this temperature; greedy decoding if absent."
    )
    seeds: int = _option(1, "Sampled answers to each item, each with its own seed.", least=1)
    greedy_too: bool = _option(False, "With --temperature: every arm decodes greedily, too.")
    noop: bool = _option(
        False, "Add a control arm that is hooked and edits nothing.", decides=False
    )
    resume: bool = _option(
        False, "Go on with the run in --output; starts one if it is empty.", decides=False
    )
    overwrite: bool = _option(False, "Replace earlier results in --output.", decides=False)

    def __post_init__(self) -> None:
        least = {item.name for item in fields(self) if "least" in item.metadata}
        positive(**{name: getattr(self, name) for name in least})
        usable_seed(self.seed)
        heat = self.temperature
        if heat is not None and (isinstance(heat, bool) or not isinstance(heat, (int, float))):
            raise BadInput(
                f"temperature={heat!r}: must be a number; leave it out for greedy decoding"
            )

    def deciding(self) -> dict[str, Any]:
        """What decides the answers and figures, and so has to be equal in a resumed run."""
        kept = {item.name for item in fields(self) if item.metadata.get("decides", True)}
        return {name: value for name, value in asdict(self).items() if name in kept}

    def changed(self) -> set[str]:
        """Names of the fields that do not have their defaults."""
        return {item.name for item in fields(self) if getattr(self, item.name) != item.default}


DEFAULTS = Options()

#: Options that concern answers that are there already, and so `vlmfix score`.
SCORING = ("truncate", "chair_engine", "chair_mode", "amber_similarity", "seed")


def flags(item: Field[Any]) -> tuple[str, ...]:
    """What the command line calls a field of `Options`."""
    own: tuple[str, ...] = item.metadata["flags"]
    return own or (f"--{item.name.replace('_', '-')}",)


def from_text(item: Field[Any], value: Any) -> Any:
    """The value of a field from what the command line gives.

    Raises:
        BadInput: it cannot be read.
    """
    read = item.metadata.get("read")
    return value if read is None or value is None else read(value)
