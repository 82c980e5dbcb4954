"""The tasks of this package as tasks of lmms-eval: same questions, same scorers.

A task file names one of `vlmfix.evals.tasks.TASKS`, its options, and the figures to report:

    task: pope_official
    class: !function vlmfix.integrations.lmms_tasks.HarnessTask
    evaluate: pope
    options: {parser: official}
    figures: {accuracy: true, f1: true}    # name: whether higher is better, or null

The data come from the folder in the environment variable VLMFIX_DATA, or are the bundled pictures.
A figure covers all items ("pooled"), without interval; `vlmfix score` gives the full scores.

Interface: EvolvingLMMs-Lab/lmms-eval 0.7.3, api/task.py and tasks/__init__.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from lmms_eval.api.task import ConfigurableMessagesTask

from vlmfix.errors import BadInput
from vlmfix.evals.tasks import Answer, Options, get_task

__all__ = ["HarnessTask"]

#: Keys of the score over all items in the results of a task, most common first.
_OVERALL = ("pooled", "discriminative")


class HarnessTask(ConfigurableMessagesTask):  # type: ignore[misc]  # lmms-eval is untyped
    """One task of this package, for models with lmms-eval's chat interface.

    Args:
        config: the task file, see above.

    Raises:
        UnknownTask, BadInput: no such task or option, data that cannot be used, or a task whose
            questions follow one another.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        kind = get_task(config["evaluate"])
        self._data = kind.open(os.environ.get("VLMFIX_DATA"))
        self._asked = kind(self._data, Options(**config.get("options", {})))
        self._samples = list(self._asked.samples)
        if any(sample.follows or sample.prefix for sample in self._samples):
            raise BadInput(
                f"{config['task']}: its questions follow one another, which lmms-eval's requests "
                "do not support; run it with `vlmfix eval`"
            )
        self._data.require_images(
            list(dict.fromkeys(sample.image for sample in self._samples if sample.image))
        )
        self._results: tuple[tuple[tuple[int, str], ...], Mapping[str, Any]] = ((), {})
        super().__init__(config=self._config_of(config))

    def _config_of(self, config: Mapping[str, Any]) -> dict[str, Any]:
        # Functions, because lmms-eval deep-copies its configuration: a method would copy the data.
        def pictures(doc: Mapping[str, Any]) -> list[Any]:
            return [] if doc["image"] is None else [self._data.image(doc["image"])]

        return {
            "task": config["task"],
            "metadata": config.get("metadata"),
            "test_split": "test",
            "output_type": "generate_until",
            "generation_kwargs": {
                "max_new_tokens": self._asked.max_new_tokens,
                "temperature": 0,
                "do_sample": False,
                "until": [],
            },
            "doc_to_visual": pictures,
            "doc_to_text": _prompt,
            "doc_to_target": "target",
            "process_results": partial(_answer, figures=tuple(config["figures"])),
            "metric_list": [
                {
                    "metric": name,
                    "aggregation": self._figure(name),
                    "higher_is_better": higher,
                }
                for name, higher in config["figures"].items()
            ],
        }

    def download(self, dataset_kwargs: Any = None) -> None:
        """Make the table of questions; the pictures stay where they are."""
        from datasets import Dataset, DatasetDict

        rows = [
            {
                "index": index,
                "sample_id": sample.sample_id,
                "image": sample.image,
                "question": sample.prompt,
                "target": str(sample.target),
            }
            for index, sample in enumerate(self._samples)
        ]
        self.dataset = self.dataset_no_image = DatasetDict(test=Dataset.from_list(rows))

    def _figure(self, name: str) -> Callable[[Sequence[Mapping[str, Any]]], float]:
        def figure(answers: Sequence[Mapping[str, Any]]) -> float:
            given = tuple(sorted({(row["index"], row["text"]) for row in answers}))
            if self._results[0] != given:
                samples = [self._samples[index] for index, _ in given]
                texts = [Answer(text) for _, text in given]
                scored = self._asked.score(samples, {"answers": texts})["answers"]
                self._results = given, scored["scores"]
            places = self._results[1]
            overall = next((place for place in _OVERALL if place in places), None)
            # With one split there is no pooled score.
            place = overall or next(iter(places))
            return float(places[place][name]["value"])

        return figure


def _prompt(doc: Mapping[str, Any]) -> str:
    return str(doc["question"])


def _answer(
    doc: Mapping[str, Any], results: Sequence[str], figures: Sequence[str]
) -> dict[str, Any]:
    return {name: {"index": doc["index"], "text": results[0]} for name in figures}
