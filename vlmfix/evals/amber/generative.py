"""AMBER, generative: which objects of a description are not in the picture.

Paper: Wang et al. 2023 (arXiv 2311.07397). Reference: junyangwang0410/AMBER, inference.py. CHAIR is
the share of imagined objects among the named ones, Cover the share of the annotated objects that
are named, Hal the share of descriptions with an imagined object, and Cog the share of the objects
that people would imagine, too, that are named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from vlmfix.errors import BadInput
from vlmfix.evals.amber.data import GENERATIVE, AmberData, AmberItem, answer_key
from vlmfix.evals.amber.objects import Objects, get_similarity, nouns, read_objects
from vlmfix.evals.inputs.nltk_tools import require_nltk
from vlmfix.evals.inputs.rows import few
from vlmfix.evals.scoring.groups import by_draw
from vlmfix.evals.scoring.metrics import Arm, Ratio, counts_table, summarise
from vlmfix.evals.scoring.stats import Floats
from vlmfix.evals.tasks import Answer, Column, Options, Sample, Task

__all__ = [
    "CHAIR",
    "COUNTS",
    "AmberGenerative",
    "description_counts",
    "official_figures",
    "score_descriptions",
]

COUNTS = (
    "n",
    "hallucinated",
    "named",
    "imagined",
    "covered",
    "truth",
    "expected",
    "hallucinations",
    "empty",
)
CHAIR = Ratio("chair", {"imagined": 1}, {"named": 1})
RATIOS = (
    CHAIR,
    Ratio("cover", {"covered": 1}, {"truth": 1}),
    Ratio("hal", {"hallucinated": 1}, {"n": 1}, proportion=True),
    Ratio("cog", {"expected": 1}, {"hallucinations": 1}),
)


def _count(item: AmberItem, objects: Objects, text: str) -> dict[str, float]:
    return {
        "n": 1,
        "hallucinated": bool(objects.imagined),
        "named": len(objects.named),
        "imagined": len(objects.imagined),
        "covered": len(objects.covered),
        "truth": len(item.truth),
        "expected": len(objects.expected),
        "hallucinations": len(item.hallucinations),
        "empty": not text.strip(),
    }


def description_counts(
    described: Sequence[tuple[str, Objects]], items: Sequence[AmberItem]
) -> Floats:
    """(descriptions, `COUNTS`): what each (text, its objects) counts as."""
    pairs = zip(items, described, strict=True)
    return counts_table([_count(item, found, text) for item, (text, found) in pairs], COUNTS)


def official_figures(sums: Mapping[str, float]) -> dict[str, float]:
    """What the official script prints, in percent with one decimal.

    Args:
        sums: count -> its sum over the descriptions.

    Returns:
        {"chair", "cover", "hal", "cog"}; counters of trials start at 0.001, as in the script.
    """

    def percent(top: str, bottom: str) -> float:
        return sums[top] / (sums[bottom] + 0.001) * 100

    clean = (sums["n"] - sums["hallucinated"]) / (sums["n"] + 0.001) * 100
    return {
        "chair": round(percent("imagined", "named"), 1),
        "cover": round(percent("covered", "truth"), 1),
        "hal": round(100 - clean, 1),
        "cog": round(percent("expected", "hallucinations"), 1),
    }


def score_descriptions(
    arms: Mapping[str, Sequence[tuple[str, Objects]]],
    items: Sequence[AmberItem],
    seed: int = 0,
    draws: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Score descriptions whose objects have been read.

    Args:
        arms: name -> (text, its objects), one per item; the first is the base.
        items: what is annotated.
        seed: of the bootstrap.
        draws: the seed under which every item was described; None: one description each.

    Returns:
        arm -> as `metrics.summarise` gives it, with the place "generative"; also "compat"
        (`official_figures`), a list over seeds if there are several.
    """
    tables = {arm: description_counts(read, items) for arm, read in arms.items()}
    scored = {
        arm: Arm(table, [not row for row in table[:, COUNTS.index("hallucinated")]])
        for arm, table in tables.items()
    }
    numbers = [item.number for item in items]
    places = [GENERATIVE] * len(items)
    result = summarise(scored, COUNTS, RATIOS, places, numbers, seed=seed, draws=draws)
    for arm, entry in result.items():
        figures = [
            official_figures(dict(zip(COUNTS, tables[arm][at].sum(axis=0).tolist(), strict=True)))
            for at in by_draw(draws, len(items))
        ]
        entry["compat"] = figures if len(figures) > 1 else figures[0]
    return result


class AmberGenerative(Task):
    """The task: one description per picture, whose nouns NLTK finds."""

    name = "amber_g"
    max_new_tokens = 512
    columns = (
        Column("chair", "CHAIR"),
        Column("cover", "Cover"),
        Column("hal", "Hal", tested=True),
        Column("cog", "Cog"),
    )
    open = AmberData.open
    answer_key = staticmethod(answer_key)

    def __init__(self, data: AmberData, options: Options) -> None:
        super().__init__(data, options)
        self._engine = f"nltk {require_nltk()}"
        self._similarity = get_similarity(options.amber_similarity)
        self._lexicon = data.lexicon
        self.images = [item for item in data.items.values() if item.dimension == GENERATIVE]
        if unasked := [item.number for item in self.images if item.number not in data.queries]:
            raise BadInput(
                f"amber_g: {data.root} has no query for {len(unasked)} of {len(self.images)} "
                f"annotated pictures: {few(unasked)}: put AMBER's query_all.json there"
            )

    @cached_property
    def samples(self) -> list[Sample]:
        """One query per picture, in AMBER's order."""
        return [
            Sample(
                task=self.name,
                split=GENERATIVE,
                sample_id=str(item.number),
                image=picture,
                image_id=picture,
                prompt=query,
                target=list(item.truth),
            )
            for item in self.images[: self.options.limit]
            for picture, query in [self.data.queries[item.number]]
        ]

    @property
    def facts(self) -> dict[str, Any]:
        """How nouns are found and compared."""
        return {"engine": self._engine, "similarity": self.options.amber_similarity}

    def read(self, sample: Sample, answer: Answer) -> tuple[str, Objects]:
        """A description and its objects."""
        item = self.data.items[int(sample.sample_id)]
        words = nouns(answer.text)
        found = read_objects(
            words, item.truth, item.hallucinations, self._lexicon, self._similarity
        )
        return answer.text, found

    def parse(self, sample: Sample, answer: Answer) -> tuple[dict[str, list[str]], bool]:
        """The objects named, those of them that are imagined, and whether there are none."""
        _, found = self.read(sample, answer)
        named, imagined = list(found.named), list(found.imagined)
        return {"objects": named, "hallucinated": imagined}, not imagined

    def score(
        self,
        samples: Sequence[Sample],
        arms: Mapping[str, Sequence[Answer]],
        draws: Sequence[int] | None = None,
    ) -> dict[str, Any]:
        """Scores, and the figures of the official script next to them."""
        read = {
            arm: [self.read(*pair) for pair in zip(samples, answers, strict=True)]
            for arm, answers in arms.items()
        }
        items = [self.data.items[int(sample.sample_id)] for sample in samples]
        return score_descriptions(read, items, self.options.seed, draws)
