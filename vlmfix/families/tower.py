"""The vision tower of a model: its layers, and which visual token comes from which patches.

How patches become visual tokens, by family (`_FAMILIES`):

    LLaVA, PaliGemma, DeepSeek-VL     one patch, one token; the class token, if any, is left out
    LLaVA-NeXT                        the same per tile, then unpadded, with a newline per row
    InternVL, SmolVLM, Gemma 3,
    Llama 4                           a square of patches (pixel shuffle, average pooling)
    Qwen2-VL to Qwen3.5, GLM-4V,
    PaddleOCR-VL, Kimi, Muse,
    LFM3-VL, Nemotron Omni            a square of patches, images of any size, several in a row
    HunYuan                           the same, with a newline per row and a mark at both ends
    MiniCPM-V                         the same; squares become patches between two layers, too
    Gemma 4, LFM2-VL                  the same, one image to a row of the batch, with padding
    Pixtral, Mistral 3, LightOnOCR    one patch or a square; pictures padded to one size, whose
                                      patches the tower puts in a row, behind a block mask

Everything else is refused (`_REFUSED` has reasons): where a token is a mixture of patches, as
behind a Q-Former, a perceiver or an interpolation, no value can be given to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch

from vlmfix.errors import BadInput, UnsupportedModel
from vlmfix.families import ModelInfo

__all__ = [
    "EncodedImage",
    "Order",
    "Received",
    "Tile",
    "Tower",
    "describe_tower",
    "grid_index",
    "grid_shapes",
    "last_entry",
    "packed_index",
    "patch_grids",
    "places",
    "require_readable",
    "square_sides",
    "tile_shape",
]


Layout = Literal["tiles", "packed", "patches", "sized", "placed"]
Order = Literal["squares", "rows"]


class _Family(NamedTuple):
    """How a family encodes images; read from its configuration, never from a checkpoint's name.

    layout: "tiles" (B, channels, height, width), each one image; "packed": such tiles, several to
        an image, put together by the model's pack_image_features; "patches": the patches of all
        images on one axis, in squares that become one token, with a grid per image; "sized":
        pictures padded to one size, with the size of each in pixels, whose patches the tower puts
        on one axis; "placed": (images, patches, width), padded, with the place of each patch or
        the shape of each image.
    merge: configuration -> side of the square of patches that becomes one visual token.
    order: of patches on one axis, how they lie there: square by square, or row by row.
    towers: the `model_type`s of the vision tower that were checked; empty: the family has its own.
    grid: of layout "patches", the argument whose last two columns are rows and columns of patches.
    cls_last: whether the class token comes behind the patches, and is gone where the tower ends.
    framed: whether a newline ends each row of tokens, and a mark stands before and behind them.
    whole: which of the tiles of a picture, where they fill one run of placeholders, is the picture
        as a whole at low resolution; None: pictures are one tile, or text parts their tiles.
    """

    layout: Layout
    merge: Callable[[Any], int]
    towers: tuple[str, ...] = ()
    whole: Literal["first", "last"] | None = None
    order: Order = "squares"
    grid: str = "image_grid_thw"
    framed: bool = False
    cls_last: bool = False


def _one(config: Any) -> int:
    return 1


def _spatial_merge(config: Any) -> int:
    return int(config.vision_config.spatial_merge_size)


def _pooled(config: Any) -> int:
    # Gemma3MultiModalProjector: average pooling down to mm_tokens_per_image.
    side = config.vision_config.image_size // config.vision_config.patch_size
    return int(side // math.isqrt(config.mm_tokens_per_image))


_PLAIN_TOWERS = ("clip_vision_model", "siglip_vision_model")


def _merged_between(config: Any) -> int:
    # MiniCPM: one layer hands on squares of two by two; "4x" leaves that out.
    side = int(config.merge_kernel_size[0] ** config.merger_times)
    return side if config.downsample_mode == "4x" else 2 * side


_QWEN = _Family("patches", _spatial_merge)
_MINICPM = _Family("patches", _merged_between, order="rows", grid="target_sizes")
_MUSE = _Family("patches", lambda config: int(config.vision_config.merge_size), order="rows")
_INTERNVL = _Family("tiles", lambda config: round(1 / config.downsample_ratio), whole="last")
_LLAVA_NEXT = _Family("packed", _one, _PLAIN_TOWERS, whole="first")
_PIXTRAL = _Family(
    "sized", lambda config: int(config.spatial_merge_size), ("pixtral",), order="rows"
)
_SHUFFLED = _Family("tiles", lambda config: int(config.downsample_factor), _PLAIN_TOWERS)
_SCALED = _Family("tiles", lambda config: int(config.scale_factor))


#: By `model_type`, followed by that of the tower where this one differs from the family's others.
#: Each row is proven by painting spots of an image: tests/families/test_tower.py.
_FAMILIES: dict[str, _Family] = {
    "llava": _Family("tiles", _one, _PLAIN_TOWERS),
    "llava_pixtral": _Family("sized", _one, ("pixtral",), order="rows"),
    "vipllava": _Family("tiles", _one, _PLAIN_TOWERS),
    "paligemma": _Family("tiles", _one, _PLAIN_TOWERS),
    "deepseek_vl": _Family("tiles", _one, _PLAIN_TOWERS),
    "video_llava": _Family("tiles", _one, _PLAIN_TOWERS),
    "janus": _Family("tiles", _one),
    "llava_next": _LLAVA_NEXT,
    "llava_next_video": _LLAVA_NEXT,
    "internvl": _INTERNVL,
    "qianfan_ocr": _INTERNVL,
    "gemma3": _Family("tiles", _pooled, _PLAIN_TOWERS),
    "smolvlm": _SCALED,
    "idefics3": _SCALED,
    "granite_docling": _Family("tiles", lambda config: int(config.vision_config.scale_factor)),
    "aya_vision": _SHUFFLED,
    "cohere2_vision": _SHUFFLED,
    "ovis2": _Family("tiles", lambda config: int(config.vision_config.hidden_stride)),
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN,
    "qwen3_vl_moe": _QWEN,
    "qwen3_5": _QWEN,
    "qwen3_5_moe": _QWEN,
    "qwen4_exp": _QWEN,
    "qwen2_5_omni_thinker": _QWEN,
    "qwen3_omni_moe_thinker": _QWEN,
    "cosmos3_omni": _QWEN,
    "cohere_compass": _QWEN,
    "exaone4_5": _QWEN,
    "hyperclovax_vision_v2": _QWEN,
    "ernie4_5_vl_moe": _QWEN,
    "minimax_m3_vl": _QWEN,
    "glm4v": _QWEN,
    "glm46v": _QWEN,
    "glm4v_moe": _QWEN,
    "glm_ocr": _QWEN,
    "glm5_next": _QWEN,
    "gemma4": _Family("placed", lambda config: int(config.vision_config.pooling_kernel_size)),
    "lfm2_vl": _Family("placed", lambda config: int(config.downsample_factor)),
    "mistral3": _PIXTRAL,
    "mistral_large4": _PIXTRAL,
    "lighton_ocr": _PIXTRAL,
    # Each image says how its patches are merged, see square_sides().
    "video_llama_3": _Family("patches", _one),
    "paddleocr_vl": _Family("patches", _spatial_merge, order="rows"),
    "cosmos3_edge": _QWEN,
    "kimi_k25": _Family(
        "patches", lambda c: int(c.vision_config.merge_kernel_size[0]), order="rows"
    ),
    "llama4": _Family(
        "tiles", lambda c: round(1 / c.vision_config.pixel_shuffle_ratio), cls_last=True
    ),
    "lfm3_vl": _QWEN,
    "hunyuan_vl": _Family("patches", _spatial_merge, order="rows", framed=True),
    "nemotron_h_omni": _Family(
        "patches", lambda c: round(1 / c.downsample_ratio), order="rows", grid="image_grid_hw"
    ),
    "minicpmv4_6": _MINICPM,
    "minicpmv4_7": _MINICPM,
    "minicpm_ocr": _MINICPM,
    "muse_glimmer": _MUSE,
    "muse_spark": _MUSE,
}


_MIXED = "learned queries (a Q-Former or the like) mix all patches into each visual token"
_CONVOLUTIONS = "its tower is a convolutional network, or ends in one"
_NO_TOWER = "its images do not pass through a vision tower with attention"
_SAM = "convolutions behind SAM mix neighbouring patches into each visual token"
_TIMM = "its tower is timm's, whose attention transformers does not dispatch"

_REFUSED: dict[str, str] = {
    "llava_onevision": "it interpolates the features of large images between patches",
    "mllama": "its images enter through cross-attention and fill no placeholders",
    "idefics2": "a perceiver mixes all patches into each visual token",
    "aria": _MIXED,
    "blip-2": _MIXED,
    "instructblip": _MIXED,
    "instructblipvideo": _MIXED,
    "granite4_vision": _MIXED,
    "molmo2": "attention mixes the patches of a square into each visual token",
    "gemma3n": _CONVOLUTIONS,
    "fast_vlm": _CONVOLUTIONS,
    "got_ocr2": _CONVOLUTIONS,
    "pp_chart2table": _CONVOLUTIONS,
    "step3p7": _CONVOLUTIONS,
    "deepseek_vl_hybrid": _SAM,
    "unlimited_ocr": _SAM,
    "deepseek_ocr2": _MIXED,
    "perception_lm": _TIMM,
    "gemma4_unified": _NO_TOWER,
    "chameleon": _NO_TOWER,
    "emu3": _NO_TOWER,
    "fuyu": _NO_TOWER,
}


@dataclass(frozen=True, eq=False)
class Tower:
    """The vision tower of one model.

    Attributes:
        model_type: the model's family.
        layers: its attention modules, in order.
        full_attention: indices of the layers in which every patch attends to its whole image; the
            others attend within windows, so that values of different windows do not compare.
        feature_layer: the layer, of those with full attention, whose output the projector gets, or
            the last one before it.
        has_cls: whether there is a class token: before the patches, or behind them (`cls_last`).
        merge: side of the square of patches that becomes one visual token.
        prefix: of layout "patches", how many tokens come before the patches of each image.
        layout, whole, order, grid, framed, cls_last: see `_Family`.
        module: the tower itself.
        host: the module whose `get_image_features` runs it.
    """

    model_type: str
    layers: tuple[torch.nn.Module, ...] = field(repr=False)
    full_attention: tuple[int, ...]
    feature_layer: int
    has_cls: bool
    merge: int
    layout: Layout
    whole: Literal["first", "last"] | None
    order: Order
    grid: str
    framed: bool
    cls_last: bool
    prefix: int
    module: torch.nn.Module = field(repr=False)
    host: torch.nn.Module = field(repr=False)


@dataclass(frozen=True)
class Received:
    """What the N visual tokens of one tile receive in one layer; a merged token has the mean.

    The tensors are on the device of that layer.

    Attributes:
        column: (N,) float32, attention received per patch, mean over heads and over the queries of
            its image (the class token asks, too). Over all keys of an image it sums to 1.
        cls: (N,) float32, attention received from the class token, mean over heads; None where
            the tower has no class token.
        key: (N, D) float32, the key vector as the attention gets it (rotated where the tower has
            rotary positions), mean over heads.
    """

    column: torch.Tensor
    cls: torch.Tensor | None
    key: torch.Tensor


@dataclass(frozen=True)
class Tile:
    """What the tower saw as one image: a grid of visual tokens, row by row."""

    rows: int
    columns: int
    received: dict[int, Received]
    """By layer."""
    cls_output: torch.Tensor | None = None
    """(d,) float32, the class token behind the tower's last block; None where there is none.

    Of Llama 4 it is None, too: the tower does not hand it out.
    """


@dataclass(frozen=True)
class EncodedImage:
    """One image: its tiles, and which of their tokens stand where in the prompt.

    Families that hand their crops over as images of their own (InternVL, SmolVLM, Idefics3) have
    one tile per crop in one `EncodedImage` each; LLaVA-NeXT has all crops of an image in one.

    Attributes:
        tiles: in the order of the encoder; LLaVA-NeXT's whole view first.
        index: (n,) int64, for each placeholder of the image in the prompt: its token within the
            tiles put one after the other, or -1 for a newline, which comes from no patch. Tokens
            that the model drops (padding of an image that does not fill its tiles) are absent.
    """

    tiles: tuple[Tile, ...]
    index: torch.Tensor

    def to_visual_tokens(self, values: Sequence[torch.Tensor]) -> torch.Tensor:
        """Bring one value per token of each tile to the placeholders of the prompt.

        Args:
            values: one (N,) tensor per tile, in the order of `tiles`.

        Returns:
            (n,) float32, NaN at newlines.

        Raises:
            BadInput: not one value per token and tile.
        """
        sizes = [tile.rows * tile.columns for tile in self.tiles]
        given = [tuple(value.shape) for value in values]
        if given != [(size,) for size in sizes]:
            raise BadInput(
                f"values of shapes {given} for tiles of {sizes} visual tokens: give one value per "
                "token, one tensor per tile."
            )
        # A newline's index, -1, takes the NaN at the end.
        flat = torch.cat([*values, values[0].new_full((1,), math.nan, dtype=torch.float32)])
        return flat[self.index]


def describe_tower(model: Any, info: ModelInfo) -> Tower:
    """Find the vision tower's attention and how its patches become visual tokens.

    Args:
        model: the model that `info` describes.
        info: its description.

    Raises:
        UnsupportedModel: a family, or a tower in it, whose visual tokens cannot be traced to
            patches, or that was never checked.
    """
    family = _FAMILIES.get(info.model_type)
    if family is None:
        reason = _REFUSED.get(info.model_type, "which patches make its tokens was never checked")
        raise _refusal(info, reason)
    module = model.get_encoder(modality="image")
    kind = str(module.config.model_type)
    family = _FAMILIES.get(f"{info.model_type}_{kind}", family)
    if family.towers and kind not in family.towers:
        raise _refusal(info, f"its vision tower is of type {kind!r}, which was not checked")
    names = [name for name, _ in module.named_parameters()]
    has_cls = any(name.endswith(("class_embedding", "cls_token")) for name in names)
    strategy = getattr(model.config, "vision_feature_select_strategy", None)
    if strategy is not None and has_cls != (strategy == "default"):
        raise _refusal(
            info,
            f"vision_feature_select_strategy={strategy!r} on a tower "
            f"{'with' if has_cls else 'without'} a class token leaves no token per patch",
        )
    layers = _attention_layers(module)
    if not layers:
        raise _refusal(info, _NO_TOWER)
    full = _full_attention(module.config, len(layers))
    used = _feature_layer(getattr(model.config, "vision_feature_layer", -1), len(layers))
    return Tower(
        model_type=info.model_type,
        layers=layers,
        full_attention=full,
        feature_layer=max((layer for layer in full if layer <= used), default=full[0]),
        has_cls=has_cls,
        merge=family.merge(model.config),
        layout=family.layout,
        whole=family.whole,
        order=family.order,
        grid=family.grid,
        framed=family.framed,
        cls_last=family.cls_last,
        prefix=int(getattr(module.config, "num_summary_tokens", 0)),
        module=module,
        host=model.base_model,
    )


def _attention_layers(module: Any) -> tuple[torch.nn.Module, ...]:
    """The attention modules of a vision tower, in order."""
    # CLIP, SigLIP and the like record the outputs of this class when asked for attentions.
    kind = (module._can_record_outputs or {}).get("attentions", ())
    # Attention of a merger, within what becomes one patch, is no layer.
    layers = tuple(
        child
        for name, child in module.named_modules()
        if isinstance(child, kind) and "merger" not in name
    )
    if layers:
        return layers
    # Some name the class of a module that was copied, not their own, or none (Llama 4).
    return tuple(
        child
        for child in module.modules()
        if type(child).__name__.endswith("Attention") and hasattr(child, "config")
    )


def require_readable(tower: Tower, layers: Iterable[int] | None = None) -> None:
    """Refuse a tower whose attention cannot be read while it runs.

    Args:
        tower: described.
        layers: those to read; None: all.

    Raises:
        UnsupportedModel: it runs flash or flex attention.
    """
    for layer in range(len(tower.layers)) if layers is None else layers:
        module: Any = tower.layers[layer]
        implementation = module.config._attn_implementation
        recorded = str(implementation).startswith("vlmfix")  # it was found readable before
        if implementation not in ("sdpa", "eager", None) and not recorded:
            raise UnsupportedModel(
                f"the vision tower runs {implementation!r} attention, which the recorder "
                "cannot stand in for. Switch the tower, the language model may stay as it is: "
                'model.set_attn_implementation({"vision_config": "sdpa"}).'
            )


def _full_attention(config: Any, count: int) -> tuple[int, ...]:
    """The layers of a vision tower in which a patch attends to its whole image."""
    indices = getattr(config, "fullatt_block_indexes", None)  # Qwen2.5-VL
    if indices is not None:
        return tuple(sorted(indices))
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * count  # Muse
    attending = [kind for kind in kinds if kind != "conv"]  # LFM3
    return tuple(at for at, kind in enumerate(attending) if kind == "full_attention")


def last_entry(config: Any) -> int:
    """The last decoder layer before which image features enter (DeepStack); 0: all are embedded."""
    deep = getattr(getattr(config, "vision_config", None), "deepstack_visual_indexes", None) or ()
    entries = [layer for _, layer in getattr(config, "deepstack_layer_map", None) or ()]
    entries += getattr(config, "spatial_target_layers", None) or ()
    return max([len(deep), *map(int, entries)])


def _feature_layer(hidden: int | Sequence[int], count: int) -> int:
    """The layer that makes the hidden states of this index, of which 0 are the embeddings.

    Of several indices, whose hidden states go to the projector side by side, the last layer.
    """
    indices = [hidden] if isinstance(hidden, int) else hidden
    return max(0, max(index % (count + 1) for index in indices) - 1)


def _refusal(info: ModelInfo, reason: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"the vision tower of model type {info.model_type!r} cannot be read: {reason}. Use a "
        "method that does not ask for encoder attention, or add the family to _FAMILIES in "
        "vlmfix/families/tower.py."
    )


def tile_shape(tower: Tower, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of visual tokens in a tile of so many pixels: layouts "tiles", "packed"."""
    config: Any = tower.module.config
    size = config.patch_size
    patch = (size, size) if isinstance(size, int) else size
    return height // patch[0] // tower.merge, width // patch[1] // tower.merge


def patch_grids(tower: Tower, arguments: Mapping[str, Any]) -> torch.Tensor:
    """Per image, its patches: (images, 3) int64, as frames, rows and columns.

    Args:
        tower: of layout "patches" or "sized".
        arguments: those of the model's image encoder, by name.
    """
    if tower.layout == "patches":
        grids = torch.as_tensor(arguments[tower.grid])
        return torch.nn.functional.pad(grids, (3 - grids.shape[1], 0), value=1)
    pixels, sizes = arguments["pixel_values"], arguments.get("image_sizes")
    if sizes is None:  # LLaVA: without padding
        sizes = [pixels.shape[-2:]] * len(pixels)
    config: Any = tower.module.config
    return torch.nn.functional.pad(torch.as_tensor(sizes) // config.patch_size, (1, 0), value=1)


def square_sides(tower: Tower, arguments: Mapping[str, Any]) -> list[int]:
    """Per image, the side of the square of patches that becomes one visual token.

    Arguments are those of `patch_grids`.
    """
    merges = arguments.get("image_merge_sizes")  # VideoLLaMA 3: per image
    count = len(patch_grids(tower, arguments))
    return [tower.merge] * count if merges is None else merges.tolist()


def places(arguments: Mapping[str, Any]) -> torch.Tensor:
    """Where the patches of layout "placed" are: (images, patches, 2) as (x, y), -1 for padding."""
    known = arguments.get("image_position_ids")
    if known is not None:  # Gemma 4
        return torch.as_tensor(known)
    shapes = arguments["spatial_shapes"]  # LFM2: rows and columns
    number = torch.arange(arguments["pixel_values"].shape[1], device=shapes.device)
    rows, columns = (size[:, None] for size in shapes.unbind(1))
    found = torch.stack([number % columns, number // columns], dim=-1)
    return found.masked_fill((number >= rows * columns)[..., None], -1)


def grid_shapes(tower: Tower, arguments: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Rows and columns of visual tokens per image: layouts "patches", "sized" and "placed"."""
    if tower.layout == "placed":
        ends = (places(arguments).amax(1) + 1) // tower.merge
        return [(rows, columns) for columns, rows in ends.tolist()]
    sides, grids = square_sides(tower, arguments), patch_grids(tower, arguments).tolist()
    return [(h // side, w // side) for (_, h, w), side in zip(grids, sides, strict=True)]


def grid_index(tower: Tower, rows: int, columns: int) -> torch.Tensor:
    """`EncodedImage.index` of one grid of visual tokens, newlines and marks included."""
    index = torch.arange(rows * columns)
    if not tower.framed:
        return index
    lines = torch.nn.functional.pad(index.view(rows, columns), (0, 1), value=-1).flatten()
    return torch.nn.functional.pad(lines, (1, 1), value=-1)


def packed_index(tower: Tower, size: torch.Tensor, tokens: int) -> tuple[int, torch.Tensor]:
    """How LLaVA-NeXT packs one image: the model's own packing, run on numbers.

    Args:
        tower: of layout "packed".
        size: (2,) height and width of the image in pixels.
        tokens: visual tokens of one tile.

    Returns:
        The number of its tiles, and `EncodedImage.index`.
    """
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    host: Any = tower.host
    config = host.config
    count = image_size_to_num_patches(
        size, config.image_grid_pinpoints, config.vision_config.image_size
    )
    numbers = torch.arange(count * tokens).view(count, tokens, 1)
    (index,), _ = host.pack_image_features(
        [numbers],
        [size],
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        image_newline=torch.tensor([-1]),
    )
    return count, index[:, 0]
