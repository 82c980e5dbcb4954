"""One generate call (or one chain of bare forwards over a cache): what it was, what was done."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from vlmfix.engine.lifetime import Lifetime

__all__ = ["Call", "CallReport"]


@dataclass(frozen=True)
class CallReport:
    """What the methods did in one call; read it with `vlmfix.last_call(model)`.

    Attributes:
        methods: the stack, as specs.
        batch: rows of the batch as the model saw them (beams included).
        prompt_length: positions of the prompt, padding included.
        new_tokens: length of the returned sequences beyond the prompt; 0 for bare forwards.
        passes: forward passes of the model.
        extra_passes: passes on top of these that methods asked for, e.g. VHR's text-only prompt.
        seconds: wall time of the call; None for bare forwards.
        edited_rows: attention rows that were changed, counted per head and layer.
        rows_by_layer: the same, by layer.
        contrasted_rows: rows of logits that a contrastive method combined.
        streams: rows that a pass runs per row of the batch: 1, and 1 for each branch.
        notes: {method: {what: {layer: counts per sample}}}, e.g. VAR's sinks.
        visual_tokens: (kept, all) of each image that was pruned, without newlines; of each prompt
            with an image where layers drop tokens.
        pixels: {method: [one finding per prompt]} of methods that change images, e.g. CARVE's
            boxes and refined images.
    """

    methods: tuple[str, ...]
    batch: int
    prompt_length: int
    new_tokens: int
    passes: int
    extra_passes: int
    seconds: float | None
    edited_rows: int
    rows_by_layer: dict[int, int]
    contrasted_rows: int
    streams: int
    notes: dict[str, dict[str, dict[int, list[int]]]]
    visual_tokens: tuple[tuple[int, int], ...] = ()
    pixels: dict[str, list[Any]] = field(default_factory=dict, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: everything but `pixels`."""
        return asdict(replace(self, pixels={}))


class Call(Lifetime):
    """The running record of one call. Counts stay on the device until the report is asked for.

    What stages have to know of a call beyond its report, they keep with it (see `Lifetime`).

    Attributes:
        methods: the stack, as specs.
        prompt_length: positions of the prompt as the model gets it; None: not known yet.
        rows: rows of the prompt before beams and returned sequences multiplied them; None: as they
            come.
        question: (rows, L) question and content masks of the prompts, where the processor is known.
        batch, passes, extra_passes, visual_tokens, streams, pixels: see `CallReport`.
        contrasted: rows of logits that were combined, one entry per forward.
    """

    def __init__(
        self,
        methods: tuple[str, ...] = (),
        prompt_length: int | None = None,
        rows: int | None = None,
        question: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.methods, self.prompt_length, self.rows = methods, prompt_length, rows
        self.question = question
        self.batch = self.passes = self.extra_passes = 0
        self.visual_tokens: tuple[tuple[int, int], ...] = ()
        self.contrasted: list[torch.Tensor] = []
        self.streams = 1
        self.pixels: dict[str, list[Any]] = {}
        self._announced: torch.Tensor | None = None
        self._new_tokens = 0
        self._seconds: float | None = None
        self._started = time.perf_counter()
        self._counts: dict[int, list[torch.Tensor | int]] = {}
        self._notes: dict[str, dict[str, dict[int, list[int]]]] = {}

    def announce(self, ids: Any) -> None:
        """The next forward of this call gets these ids."""
        self._announced = ids

    def runs(self, ids: Any) -> bool:
        """Whether a forward with these ids is one of this call's own.

        What a logits processor or a stopping criterion asks the model meanwhile is not.
        """
        return self._announced is None or self._announced is ids

    def count(self, layer: int, rows: torch.Tensor | int) -> None:
        """Add edited rows: a number, or a bool tensor that is summed when the report is read."""
        self._counts.setdefault(layer, []).append(rows)

    def note(self, method: str, layer: int, notes: dict[str, list[int]]) -> None:
        """Keep the counts that a plan found in a layer."""
        for what, counts in notes.items():
            self._notes.setdefault(method, {}).setdefault(what, {})[layer] = counts

    def finish(self, output: Any) -> None:
        """Take the wall time, and the length of what generate() returned."""
        self._seconds = time.perf_counter() - self._started
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        self._new_tokens = max(0, sequences.shape[1] - (self.prompt_length or 0))

    def report(self) -> CallReport:
        """Read the counts (this waits for the device) and freeze them."""
        by_layer = {
            layer: sum(int(rows.sum()) if isinstance(rows, torch.Tensor) else rows for rows in all_)
            for layer, all_ in sorted(self._counts.items())
        }
        return CallReport(
            methods=self.methods,
            batch=self.batch,
            prompt_length=self.prompt_length or 0,
            new_tokens=self._new_tokens,
            passes=self.passes,
            extra_passes=self.extra_passes,
            seconds=self._seconds,
            edited_rows=sum(by_layer.values()),
            rows_by_layer={layer: rows for layer, rows in by_layer.items() if rows},
            contrasted_rows=sum(int(rows) for rows in self.contrasted),
            streams=self.streams,
            notes=self._notes,
            visual_tokens=self.visual_tokens,
            pixels=self.pixels,
        )
