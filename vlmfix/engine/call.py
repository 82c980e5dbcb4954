"""One generate call (or one chain of bare forwards over a cache): what it was, what was done."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from vlmfix.families.tower import EncodedImage

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


@dataclass
class Call:
    """The running record of one call. Counts stay on the device until the report is asked for."""

    methods: tuple[str, ...]
    prompt_length: int | None = None
    batch: int = 0
    new_tokens: int = 0
    passes: int = 0
    extra_passes: int = 0
    seconds: float | None = None
    started: float = field(default_factory=time.perf_counter)
    counts: dict[int, list[torch.Tensor | int]] = field(default_factory=dict)
    notes: dict[str, dict[str, dict[int, list[int]]]] = field(default_factory=dict)
    #: Rows of the prompt before beams and returned sequences multiplied them; None: as they come.
    rows: int | None = None
    #: The images of the call as the vision tower saw them, once a method asked.
    images: list[EncodedImage] | None = None
    #: (B0, L) question and content masks of the prompts, where the processor is known.
    question: tuple[torch.Tensor, torch.Tensor] | None = None
    #: What generate() was given of images, before it encoded them.
    vision: dict[str, Any] = field(default_factory=dict)
    #: (kept, all) visual tokens of each image or prompt that was pruned.
    visual_tokens: tuple[tuple[int, int], ...] = ()
    #: What became of the visual tokens of each image, if the prompt was cut (shortening.Reduction).
    reductions: list[Any] | None = None
    #: Visual tokens of each prompt before it was cut.
    placeholders: list[int] | None = None
    #: (B0, L) bool, the visual tokens that later layers keep, where they drop some.
    kept: torch.Tensor | None = None
    #: What the branches of a contrastive method see (contrast.Branch), once it has been asked.
    branches: tuple[Any, ...] | None = None
    #: Rows of logits that were combined, one entry per forward.
    contrasted: list[torch.Tensor] = field(default_factory=list)
    streams: int = 1
    #: What methods found that changed the images of the prompts.
    pixels: dict[str, list[Any]] = field(default_factory=dict)
    #: {method: {layer: tensor}}, what a watcher kept, for calls without a cache.
    seen: dict[Any, dict[int, torch.Tensor]] = field(default_factory=dict)
    #: {layer: edited rows}, to which compiled steps add; the session lends them for one call.
    counters: dict[int, torch.Tensor] = field(default_factory=dict)

    def count(self, layer: int, rows: torch.Tensor | int) -> None:
        """Add edited rows: a number, or a bool tensor that is summed when somebody asks."""
        self.counts.setdefault(layer, []).append(rows)

    def note(self, method: str, layer: int, notes: dict[str, list[int]]) -> None:
        """Keep the counts that a plan found in a layer."""
        for what, counts in notes.items():
            self.notes.setdefault(method, {}).setdefault(what, {})[layer] = counts

    def finish(self, output: Any) -> None:
        """Take the wall time, the length of what generate() returned, and the lent counters."""
        for layer, counter in self.counters.items():
            self.count(layer, counter.clone())
        self.counters.clear()
        self.seconds = time.perf_counter() - self.started
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        self.new_tokens = max(0, sequences.shape[1] - (self.prompt_length or 0))

    def report(self) -> CallReport:
        """Read the counts (this waits for the device) and freeze them."""
        by_layer = {
            layer: sum(int(rows.sum()) if isinstance(rows, torch.Tensor) else rows for rows in all_)
            for layer, all_ in sorted(self.counts.items())
        }
        return CallReport(
            methods=self.methods,
            batch=self.batch,
            prompt_length=self.prompt_length or 0,
            new_tokens=self.new_tokens,
            passes=self.passes,
            extra_passes=self.extra_passes,
            seconds=self.seconds,
            edited_rows=sum(by_layer.values()),
            rows_by_layer={layer: rows for layer, rows in by_layer.items() if rows},
            contrasted_rows=sum(int(rows) for rows in self.contrasted),
            streams=self.streams,
            notes=self.notes,
            visual_tokens=self.visual_tokens,
            pixels=self.pixels,
        )
