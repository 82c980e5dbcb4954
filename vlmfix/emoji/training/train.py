"""Train the bundled model from scratch: `python -m vlmfix.emoji.training.train --output DIR`.

An interrupted run continues from its last checkpoint, and ends with the same weights as an
uninterrupted one (same machine, same thread count).
"""

from __future__ import annotations

__all__ = ["main", "train"]

import argparse
import json
import os
import platform
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from vlmfix.emoji.training.recipe import QUICK, RECIPE, STAGES, Recipe
from vlmfix.errors import BadInput, VlmfixError

_CHECKPOINT = "checkpoint.pt"
_LOG_EVERY = 50


def _save(path: Path, state: dict[str, Any]) -> None:
    """Write a temporary file and rename it, so that a kill never leaves half a checkpoint."""
    import torch

    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def _load(path: Path, recipe: Recipe) -> dict[str, Any]:
    import torch

    try:
        state: dict[str, Any] = torch.load(path, weights_only=True)
        found = state["recipe"]
    except Exception as error:  # torch raises many kinds for a damaged file
        raise BadInput(
            f"cannot read checkpoint {path}: {error}. Remove it to start over"
        ) from error
    if found != recipe.digest():
        raise BadInput(
            f"checkpoint {path} belongs to recipe {found}, this run is recipe {recipe.digest()}. "
            "Give another --output folder, or remove the checkpoint to start over"
        )
    return state


class _Progress:
    """A bar with the loss on a terminal, plain lines in a log."""

    def __init__(self, stage: str, start: int, steps: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeRemainingColumn as Remaining

        self.stage, self.steps, self.smooth = stage, steps, float("nan")
        self.since, self.start = time.monotonic(), start
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.3f}"))
        self.bar = Progress(
            TextColumn(f"{stage:6}"),
            *columns,
            Remaining(),
            disable=not sys.stdout.isatty(),
            console=Console(),
        )
        self.task = self.bar.add_task(stage, total=steps, completed=start, loss=float("nan"))
        self.bar.start()

    def update(self, step: int, loss: float) -> None:
        self.smooth = loss if self.smooth != self.smooth else 0.95 * self.smooth + 0.05 * loss
        self.bar.update(self.task, completed=step, loss=self.smooth)
        if self.bar.disable and (step % _LOG_EVERY == 0 or step == self.steps):
            each = (time.monotonic() - self.since) / (step - self.start)
            print(
                f"{time.strftime('%H:%M:%S')} {self.stage} step {step}/{self.steps} "
                f"loss {self.smooth:.4f} {each:.2f} s/step",
                flush=True,
            )

    def close(self) -> None:
        self.bar.stop()


def train(recipe: Recipe, output: Path, threads: int = 1, resume: bool = True) -> Path:
    """Run all stages, or what is left of them.

    Args:
        recipe: what to train.
        output: folder for checkpoint, log.jsonl and, at the end, the model.
        threads: torch threads; another number may change the last bits of the weights.
        resume: continue from the checkpoint in `output`; False starts over.

    Returns:
        The model's folder, `output / "model"`, in save_pretrained form with bfloat16 weights.

    Raises:
        BadInput: the checkpoint is damaged or belongs to another recipe.
    """
    import torch

    from vlmfix.emoji.dataset import split_scenes
    from vlmfix.emoji.training.batches import Batches
    from vlmfix.emoji.training.build import build_model, build_processor
    from vlmfix.emoji.training.quick_eval import evaluate
    from vlmfix.emoji.training.stages import Stage

    torch.set_num_threads(threads)
    output.mkdir(parents=True, exist_ok=True)
    checkpoint = output / _CHECKPOINT
    processor = build_processor()
    tokenizer = processor.tokenizer
    torch.manual_seed(recipe.seed)
    model = build_model(recipe, tokenizer).train()
    batches = Batches(recipe, tokenizer)
    first, first_step, seconds = 0, 0, dict.fromkeys(STAGES, 0.0)
    state: dict[str, Any] | None = None
    if resume and checkpoint.exists():
        state = _load(checkpoint, recipe)
        first, first_step, seconds = STAGES.index(state["stage"]), state["step"], state["seconds"]
        model.load_state_dict(state["model"])
        print(f"continuing after step {first_step} of stage {state['stage']!r}", flush=True)
    scenes = [scene for _, scene in split_scenes("tuning", recipe.evaluation_images)]

    def report(stage: str, step: int) -> dict[str, Any]:
        figures: dict[str, Any] = {
            "stage": stage,
            "step": step,
            **evaluate(model, tokenizer, scenes),
        }
        with (output / "log.jsonl").open("a") as log:
            log.write(json.dumps(figures) + "\n")
        print(json.dumps(figures), flush=True)
        return figures

    for name in STAGES[first:]:
        stage = Stage(name, recipe, model, batches)
        start = 0
        if state is not None:
            start = first_step
            stage.optimiser.load_state_dict(state["optimiser"])
            stage.head.load_state_dict(state["head"])
            state = None
        progress = _Progress(name, start, stage.plan.steps)
        clock = time.monotonic()
        for step in range(start + 1, stage.plan.steps + 1):
            progress.update(step, stage.step(step - 1))
            last = step == stage.plan.steps
            if last or step % recipe.checkpoint_every == 0:
                seconds[name] += time.monotonic() - clock
                _save(
                    checkpoint,
                    {
                        "recipe": recipe.digest(),
                        "stage": name,
                        "step": step,
                        "seconds": seconds,
                        "model": model.state_dict(),
                        "optimiser": stage.optimiser.state_dict(),
                        "head": stage.head.state_dict(),
                    },
                )
                if name == "joint" and not last and step % recipe.evaluate_every == 0:
                    report(name, step)
                clock = time.monotonic()
        progress.close()
    return _finish(recipe, output, model, processor, scenes, seconds, threads)


def _finish(
    recipe: Recipe,
    output: Path,
    model: Any,
    processor: Any,
    scenes: list[Any],
    seconds: dict[str, float],
    threads: int,
) -> Path:
    """Store the model in bfloat16, and evaluate the stored weights."""
    import torch
    import transformers

    from vlmfix.emoji.training.quick_eval import evaluate

    folder = output / "model"
    model.eval().to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)
    stored = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    record = {
        "recipe": asdict(recipe),
        "digest": recipe.digest(),
        "parameters": sum(p.numel() for p in stored.parameters()),
        "seconds": {name: round(value) for name, value in seconds.items()},
        "threads": threads,
        "machine": platform.machine(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "tuning_images": len(scenes),
        "tuning": evaluate(stored.eval(), processor.tokenizer, scenes),
    }
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record["tuning"]), flush=True)
    return folder


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code (2 for unusable input)."""
    parser = argparse.ArgumentParser(description="Train the bundled EmojiCOCO model from scratch.")
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for checkpoint, log and model"
    )
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default 2)")
    parser.add_argument(
        "--seed", type=int, help=f"random seed of the weights and the data (default {RECIPE.seed})"
    )
    parser.add_argument(
        "--quick", action="store_true", help="train for a few steps only, for tests"
    )
    parser.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="continue from the checkpoint in --output if there is one (default)",
    )
    given = parser.parse_args(arguments)
    try:
        recipe = QUICK if given.quick else RECIPE
        if given.seed is not None:
            recipe = replace(recipe, seed=given.seed)
        folder = train(recipe, given.output, given.threads, given.resume)
    except VlmfixError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"model written to {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
