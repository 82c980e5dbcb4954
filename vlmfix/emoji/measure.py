"""Measurements inside the bundled model: `python -m vlmfix.emoji.measure`.

On pictures of the evaluation split, with plain hooks: the attention sinks, the heads that depend on
the picture, the fall of the yes-logit without it, and the attention to it.
"""

from __future__ import annotations

__all__ = ["SINK_SHARE", "main", "measure"]

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import torch

from vlmfix.emoji import draw, language, model_path
from vlmfix.emoji.catalogue import NAMES
from vlmfix.emoji.dataset import split_scenes
from vlmfix.emoji.training.batches import BLANK, class_grid, to_pixels
from vlmfix.emoji.training.build import VISUAL_TOKENS
from vlmfix.emoji.training.tokenizer import IMAGE_TOKEN
from vlmfix.emoji.world import Scene
from vlmfix.errors import VlmfixError

SINK_SHARE = 0.3125
"""A token is a sink where max |x_d| / rms(x) exceeds this share of sqrt(width) (20 at 4096)."""


@contextmanager
def _recorded(model: Any) -> Iterator[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """Per decoder layer: residual stream at its input (B, L, D), head outputs (B, L, H * d)."""
    inputs: list[torch.Tensor] = []
    heads: list[torch.Tensor] = []
    handles = []
    for layer in model.model.language_model.layers:
        handles.append(layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0])))
        handles.append(
            layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: heads.append(args[0]))
        )
    try:
        yield inputs, heads
    finally:
        for handle in handles:
            handle.remove()


def _mean(values: list[float]) -> float:
    return round(sum(values) / len(values), 4) if values else float("nan")


def _outliers(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens,) of max |x_d| / (rms sqrt(D)), a number in 1/sqrt(D)..1, and the channel d."""
    value, channel = x.abs().max(-1)
    return value / (x.square().mean(-1).sqrt() * x.shape[-1] ** 0.5), channel


class _Sinks:
    """Collects outliers of one layer over the pictures."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {"bos": [], "text": [], "visual": []}
        self.channels: dict[str, Counter[int]] = {name: Counter() for name in self.values}
        self.visual_sinks, self.blank_sinks, self.shared_sinks = 0, 0, 0

    def add(self, x: torch.Tensor, is_patch: torch.Tensor, blank: torch.Tensor) -> None:
        share, channel = _outliers(x)
        first = torch.zeros_like(is_patch)
        first[0] = True
        kinds = {"bos": first, "text": ~is_patch & ~first, "visual": is_patch}
        for name, mask in kinds.items():
            self.values[name] += share[mask].tolist()
            self.channels[name].update(channel[mask].tolist())
        sinks = share[is_patch] > SINK_SHARE
        self.visual_sinks += int(sinks.sum())
        self.blank_sinks += int((sinks & blank).sum())
        self.shared_sinks += int((sinks & (channel[is_patch] == channel[0])).sum())

    def report(self, pictures: int) -> dict[str, Any]:
        rows: dict[str, Any] = {}
        for name, values in self.values.items():
            channel, count = self.channels[name].most_common(1)[0]
            rows[name] = {
                "mean": _mean(values),
                "max": round(max(values), 4),
                "over_threshold": _mean([float(value > SINK_SHARE) for value in values]),
                "channel": channel,
                "channel_share": round(count / len(values), 4),
            }
        rows["visual_sinks_per_picture"] = round(self.visual_sinks / pictures, 2)
        rows["visual_sinks_on_blank_patches"] = self._share(self.blank_sinks)
        rows["visual_sinks_in_channel_of_bos"] = self._share(self.shared_sinks)
        return rows

    def _share(self, number: int) -> float | None:
        return round(number / self.visual_sinks, 4) if self.visual_sinks else None


def _spread(divergence: torch.Tensor) -> dict[str, Any]:
    """Summary of VHD (layers, heads), averaged over pictures."""
    return {
        "per_head": [[round(value, 4) for value in row] for row in divergence.tolist()],
        "layer_mean": [round(value, 4) for value in divergence.mean(1).tolist()],
        "layer_std": [round(value, 4) for value in divergence.std(1).tolist()],
        "max_over_median": round(float(divergence.max() / divergence.median()), 3),
    }


@torch.no_grad()
def measure(model: Any, tokenizer: Any, scenes: list[Scene]) -> dict[str, Any]:
    """Measure a model with eager attention in eval mode on scenes.

    Each scene gets two questions in the "lmms" style, about a present object and about an absent
    one; sinks, heads and attention are measured on the first.

    Returns:
        "sinks" per layer, "vhd" (L2 distance of a head's output at the last prompt row between
        the prompt and the same prompt without its image tokens), "yes_minus_no" logits with and
        without picture, "attention_on_image" of the last row per layer (0..1).
    """
    config = model.config.text_config
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    yes, no = (tokenizer(f" {w}", add_special_tokens=False).input_ids[0] for w in ("Yes", "No"))
    sinks = [_Sinks() for _ in range(layers)]
    divergence = torch.zeros(layers, heads)
    attention = torch.zeros(layers)
    shift: dict[str, list[float]] = {
        f"{there}_{with_}": [] for there in ("present", "absent") for with_ in ("image", "no_image")
    }
    rng = Random(0)
    for scene in scenes:
        pixels = to_pixels([draw.paint(scene)])
        blank = torch.from_numpy(class_grid(scene.items) == BLANK)
        absent = rng.choice([name for name in NAMES if name not in scene.names])
        for there, name in (("present", scene.items[0].name), ("absent", absent)):
            text = f"{language.question(name)}{language.QUESTION_STYLES['lmms']} ASSISTANT:"
            prompt = tokenizer(
                f"USER: {IMAGE_TOKEN * VISUAL_TOKENS}\n{text}", return_tensors="pt"
            ).input_ids
            is_patch = prompt[0] == model.config.image_token_id
            with _recorded(model) as (inputs, outputs):
                seen = model(input_ids=prompt, pixel_values=pixels, output_attentions=True)
            with _recorded(model) as (_, blind_outputs):
                blind = model(input_ids=prompt[:, ~is_patch])
            for with_, result in (("image", seen), ("no_image", blind)):
                logits = result.logits[0, -1]
                shift[f"{there}_{with_}"].append(float(logits[yes] - logits[no]))
            if there == "absent":
                continue
            for layer in range(layers):
                sinks[layer].add(inputs[layer][0], is_patch, blank)
                gap = outputs[layer][0, -1] - blind_outputs[layer][0, -1]
                divergence[layer] += gap.view(heads, -1).norm(dim=-1) / len(scenes)
                mass = seen.attentions[layer][0, :, -1, is_patch].sum(-1).mean()
                attention[layer] += float(mass) / len(scenes)
    return {
        "pictures": len(scenes),
        "width": config.hidden_size,
        "threshold": SINK_SHARE,
        "sinks": [layer.report(len(scenes)) for layer in sinks],
        "vhd": _spread(divergence),
        "yes_minus_no": {name: _mean(values) for name, values in shift.items()},
        "attention_on_image": [round(value, 4) for value in attention.tolist()],
    }


def _print(figures: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="max |x_d| / (rms sqrt(D)) at the input of each layer")
    for column in ("layer", "BOS", "text max", "visual mean", "visual max", "visual sinks"):
        table.add_column(column)
    for column in ("in blank patches", "attention on image", "VHD mean", "VHD std"):
        table.add_column(column)
    for number, row in enumerate(figures["sinks"]):
        table.add_row(
            str(number),
            f"{row['bos']['mean']:.3f} (ch {row['bos']['channel']})",
            f"{row['text']['max']:.3f}",
            f"{row['visual']['mean']:.3f} (ch {row['visual']['channel']})",
            f"{row['visual']['max']:.3f}",
            str(row["visual_sinks_per_picture"]),
            str(row["visual_sinks_on_blank_patches"]),
            str(figures["attention_on_image"][number]),
            str(figures["vhd"]["layer_mean"][number]),
            str(figures["vhd"]["layer_std"][number]),
        )
    Console(width=140).print(table)
    print("VHD max/median:", figures["vhd"]["max_over_median"])
    print("yes minus no:", figures["yes_minus_no"])


def main(arguments: list[str] | None = None) -> int:
    """Command line; writes measurements.json next to the model. Exit code 2 for unusable input."""
    from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

    parser = argparse.ArgumentParser(description="Measure sinks, heads and image dependence.")
    parser.add_argument("--model", type=Path, default=model_path(), help="default: the bundled one")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    try:
        scenes = [scene for _, scene in split_scenes("evaluation", given.images)]
    except VlmfixError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    model = LlavaForConditionalGeneration.from_pretrained(
        given.model, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    figures = measure(model, PreTrainedTokenizerFast.from_pretrained(given.model), scenes)
    (given.model / "measurements.json").write_text(json.dumps(figures, indent=1) + "\n")
    _print(figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
