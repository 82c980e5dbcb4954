"""Which methods are tested on which families in which modes: adding a row here tests it.

Every method is given three times: `strong`, so that a tiny random model shows its effect beyond
doubt; `identity`, which must leave the model bit for bit alone and mostly runs nothing; and `null`,
which runs all that `strong` runs and must leave logits alone within rounding. The last finds what
the model's own attention knows and ours does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tiny import FAMILIES, TinyFamily, build

import vlmfix
from vlmfix.base.method import Method
from vlmfix.methods.ad_hh import AdaptiveHeadDeactivation
from vlmfix.methods.avc import AttentionalVisionCalibration
from vlmfix.methods.cluster import ClusterAggregation
from vlmfix.methods.divprune import DivPrune
from vlmfix.methods.fastv import FastV
from vlmfix.methods.gift import GazeShiftFusion
from vlmfix.methods.head_pursuit import HeadPursuit
from vlmfix.methods.hiprune import HiPrune
from vlmfix.methods.imba import PayAttentionToInformedTokens
from vlmfix.methods.m3id import MutualInformationDecoding
from vlmfix.methods.pai import PayAttentionToImage
from vlmfix.methods.pai_guidance import ImageGuidance
from vlmfix.methods.ptp import PyramidTokenPruning
from vlmfix.methods.random_tokens import RandomTokens
from vlmfix.methods.rbd import ReBalancingContrastiveDecoding
from vlmfix.methods.spin import ImageGuidedHeadSuppression
from vlmfix.methods.steer import Steer, SteeringVectors
from vlmfix.methods.uniform import UniformGrid
from vlmfix.methods.vaf import VisualAmplificationFusion
from vlmfix.methods.var import VisualAttentionRedistribution
from vlmfix.methods.vcd import VisualContrastiveDecoding
from vlmfix.methods.vhr import VisionAwareHeadReinforcement
from vlmfix.methods.visionzip import VisionZip


@dataclass(frozen=True)
class Row:
    """One method of the matrix."""

    name: str
    strong: Method
    identity: Method
    null: Method
    families: tuple[str, ...] = FAMILIES
    #: False for methods that must see the whole prompt at once and refuse a prefill in chunks.
    chunks: bool = True
    #: The strong setting for prompts without an image, which it must leave alone; None: `strong`.
    text_only: Method | None = None
    #: False for methods that leave layers of a cache unequally long, and refuse a static one.
    static: bool = True


#: Strength of the null edits: far below what float32 can show in a logit, far above nothing.
_LITTLE = 1e-6

# Every head of the last two layers that a tiny model of three has.
_HEADS = tuple(f"{layer}.{head}" for layer in (1, 2) for head in range(4))

# Tiny models have neither trained sinks nor a fifth layer: many channels, a low threshold, and
# the last layer too.
_SINKS: dict[str, Any] = {
    "sink_channels": tuple(range(8)),
    "tau": 1.5,
    "rho": 0.2,
    "minimum_visual_mass": 0.02,
    "last_layer": "official",
}

#: A direction of length 1 for two layers of a tiny model.
VECTORS = SteeringVectors(
    {
        layer: torch.nn.functional.normalize(
            torch.randn(64, generator=torch.Generator().manual_seed(layer)), dim=0
        )
        for layer in (0, 2)
    },
    "random",
)

ROWS = (
    Row(
        "ad_hh",
        AdaptiveHeadDeactivation(heads=_HEADS, tau=0.05),
        AdaptiveHeadDeactivation(heads=_HEADS, tau=1.5),
        AdaptiveHeadDeactivation(heads=_HEADS, tau=1.01),
    ),
    Row(
        "avc",
        AttentionalVisionCalibration(alpha=2.5, deviations=0.3),
        AttentionalVisionCalibration(alpha=0.0, beta=0.0),
        AttentionalVisionCalibration(alpha=_LITTLE, deviations=0.3, beta=0.0),
    ),
    Row(
        "cluster",
        ClusterAggregation(ratio=0.5),
        ClusterAggregation(ratio=1.0),
        ClusterAggregation(ratio=1 - _LITTLE),
    ),
    Row(
        "divprune",
        DivPrune(ratio=0.5),
        DivPrune(ratio=1.0),
        DivPrune(ratio=1 - _LITTLE),
    ),
    Row(
        "fastv",
        FastV(ratio=0.5),
        FastV(ratio=1.0),
        FastV(ratio=1 - _LITTLE),
        families=tuple(name for name in FAMILIES if name != "gemma3"),  # it has sliding layers
        chunks=False,
        static=False,
    ),
    Row(
        "gift",
        GazeShiftFusion(alpha=6.0, saliency_layer=1, edited_layers=(1, 2)),
        GazeShiftFusion(alpha=0.0, saliency_layer=1, edited_layers=(1, 2)),
        GazeShiftFusion(alpha=_LITTLE, saliency_layer=1, edited_layers=(1, 2)),
        chunks=False,
    ),
    Row(
        "head_pursuit",
        HeadPursuit(heads=("1.0", "2.3"), alpha=-1.0),
        HeadPursuit(heads=("1.0", "2.3"), alpha=1.0),
        HeadPursuit(heads=("1.0", "2.3"), alpha=1 - _LITTLE),
    ),
    Row(
        "hiprune",
        HiPrune(ratio=0.5, alpha=1.0),
        HiPrune(ratio=1.0),
        HiPrune(ratio=1 - _LITTLE),
    ),
    Row(
        "imba",
        PayAttentionToInformedTokens(alpha=2.0, beta=1.0, local_ratio=0.5, start_layer=0),
        PayAttentionToInformedTokens(alpha=0.0, beta=0.0, start_layer=0),
        PayAttentionToInformedTokens(alpha=_LITTLE, beta=_LITTLE, local_ratio=0.5, start_layer=0),
    ),
    Row(
        "m3id",
        MutualInformationDecoding(decay=0.3),
        MutualInformationDecoding(decay=0.0, beta=0.0),
        MutualInformationDecoding(decay=_LITTLE, beta=0.0),
    ),
    Row(
        "pai",
        PayAttentionToImage(alpha=0.5, start_layer=0),
        PayAttentionToImage(alpha=0.0, start_layer=0),
        PayAttentionToImage(alpha=_LITTLE, start_layer=0),
    ),
    Row(
        "pai_guidance",
        ImageGuidance(gamma=3.0),
        ImageGuidance(gamma=1.0),
        ImageGuidance(gamma=1 + _LITTLE, beta=0.0),
    ),
    Row(
        "ptp",
        PyramidTokenPruning(ratio=0.5, temperature=0.25, instruction_layer=1),
        PyramidTokenPruning(ratio=1.0),
        PyramidTokenPruning(ratio=1 - _LITTLE, instruction_layer=1),
    ),
    Row(
        "random",
        RandomTokens(ratio=0.5),
        RandomTokens(ratio=1.0),
        RandomTokens(ratio=1 - _LITTLE),
    ),
    Row(
        "rbd",
        ReBalancingContrastiveDecoding(a_t=1.0, a_v=1.0, noise_step=999, seed=0),
        ReBalancingContrastiveDecoding(a_t=0.0, a_v=0.0, beta=0.0),
        ReBalancingContrastiveDecoding(a_t=_LITTLE, a_v=_LITTLE, beta=0.0, noise_step=999, seed=0),
    ),
    Row(
        "spin",
        ImageGuidedHeadSuppression(rho=0.5, epsilon=0.1),
        ImageGuidedHeadSuppression(rho=1.0),
        ImageGuidedHeadSuppression(rho=0.5, epsilon=1 - _LITTLE),
    ),
    Row(
        "steer",
        Steer(vectors=VECTORS, strength=4.0),
        Steer(vectors=VECTORS, strength=0.0),
        Steer(vectors=VECTORS, strength=_LITTLE),
        text_only=Steer(vectors=VECTORS, strength=4.0, only_with_image=True),
    ),
    Row(
        "uniform",
        UniformGrid(ratio=0.5),
        UniformGrid(ratio=1.0),
        UniformGrid(ratio=1 - _LITTLE),
    ),
    Row(
        "vaf",
        VisualAmplificationFusion(image_gain=4.0, system_gain=0.2),
        VisualAmplificationFusion(image_gain=1.0, system_gain=1.0),
        VisualAmplificationFusion(image_gain=1 + _LITTLE, system_gain=1 - _LITTLE),
    ),
    Row(
        "var",
        VisualAttentionRedistribution(keep=0.1, **_SINKS),
        VisualAttentionRedistribution(keep=1.0, **_SINKS),
        VisualAttentionRedistribution(keep=1 - _LITTLE, **_SINKS),
    ),
    Row(
        "vcd",
        VisualContrastiveDecoding(alpha=1.0, noise_step=999, seed=0),
        VisualContrastiveDecoding(alpha=0.0, beta=0.0),
        VisualContrastiveDecoding(alpha=_LITTLE, beta=0.0, noise_step=999, seed=0),
    ),
    Row(
        "vhr",
        VisionAwareHeadReinforcement(alpha=3.0),
        VisionAwareHeadReinforcement(alpha=1.0),
        VisionAwareHeadReinforcement(alpha=1 + _LITTLE),
        chunks=False,
    ),
    Row(
        "visionzip",
        VisionZip(ratio=0.5, contextual_share=0.5),
        VisionZip(ratio=1.0),
        VisionZip(ratio=1 - _LITTLE, contextual_share=0.5),
    ),
)

#: Generation modes: arguments of generate() on top of tiny.generate_kwargs().
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beam": {"num_beams": 3},
    "sampling": {"do_sample": True, "temperature": 0.9},
    "returns": {"num_beams": 3, "num_return_sequences": 2},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
}

CELLS = [(row, family) for row in ROWS for family in row.families]
IDS = [f"{row.name}-{family}" for row, family in CELLS]

#: What a method changes in the attention of a layer: the functions of which it has some.
_EDITS = ("edit_scores", "edit_weights", "score_scale", "head_scale")


def primitive(row: Row) -> tuple[str, ...]:
    """What a method is made of: its base class, and what of the attention it edits."""
    kind = type(row.strong)
    base = next(part for part in kind.__mro__ if part.__module__.startswith("vlmfix.base."))
    edits = (name for name in _EDITS if hasattr(base, name))
    return base.__name__, *(
        name for name in edits if getattr(kind, name) is not getattr(base, name)
    )


# Text tokens after the image, per row. Gemma's sliding layer is where a method edits a tiny one,
# and its window of 8 keys must still hold the image.
_LENGTHS = {"gemma3": (1, 2, 3)}

_built: dict[str, TinyFamily] = {}


def family(name: str) -> TinyFamily:
    """The tiny model of a family, built once; tests leave it unwrapped."""
    if name not in _built:
        _built[name] = build(name)
    return _built[name]


def prompt(tiny: TinyFamily, batch: int = 3, seed: int = 0) -> dict[str, Any]:
    """A ragged, left-padded batch on which every method of the matrix has something to edit."""
    lengths = _LENGTHS.get(tiny.name)
    return tiny.inputs(batch, seed=seed, lengths=None if lengths is None else lengths[:batch])


def logits(model: Any, inputs: dict[str, Any], **kwargs: Any) -> torch.Tensor:
    """Next-token logits (B, V) of one forward."""
    with torch.no_grad():
        output: torch.Tensor = model(**inputs, **kwargs).logits[:, -1]
    return output


def changed(model: Any) -> int:
    """Rows of attention or logits that methods changed in the last call, or tokens they dropped."""
    report = vlmfix.last_call(model)
    dropped = sum(count - kept for kept, count in report.visual_tokens)
    return report.edited_rows + report.contrasted_rows + dropped
