"""Reading the attention of chosen vision-tower layers, without changing what the tower returns.

Methods that weigh or drop visual tokens by what the image encoder itself looks at (IMBA, HiPrune,
VisionZip) need, per patch, how much attention it receives in one or two layers, or its key there.
A `VisionRecorder` computes that next to the tower's own attention: no eager mode, no more than
64 MiB of attention rows at once, and the tower's output stays bit for bit the same. It then says
which visual token each value belongs to.

How: the chosen attention modules get a copy of their configuration that names a function
registered here, which reads queries and keys and then calls the attention that was there before;
`get_image_features` is shadowed on the model, so that a recorder knows where an encoding starts and
ends, what its images are, and how many visual tokens came out. Videos are encoded unread.
families/tower.py says how patches become visual tokens.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from transformers import AttentionInterface

from vlmfix.engine.dispatch import AttentionOutput, base_attention, in_python
from vlmfix.errors import BadInput, StateError, UnsupportedModel
from vlmfix.families.tower import (
    EncodedImage,
    Received,
    Tile,
    Tower,
    grid_shapes,
    packed_index,
    tile_shape,
)
from vlmfix.kernels import reference

__all__ = ["VisionRecorder", "received_attention"]

NAME = "vlmfix_recorder"  # the name under which transformers dispatches to _recorded_attention
SLOT = "_vlmfix_recorder"  # where an attention module keeps its _Slot
_CHUNK_BYTES = 64 * 2**20  # attention rows are computed in chunks of at most this many bytes


@torch.no_grad()
def received_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    scaling: float,
    mask: torch.Tensor | None = None,
    chunk_bytes: int = _CHUNK_BYTES,
) -> tuple[torch.Tensor, torch.Tensor]:
    """How much attention each key receives, and how much from the first query.

    Args:
        query: (B, H, Q, D).
        key: (B, Hkv, K, D), not repeated.
        scaling: factor on the dot products.
        mask: (B, 1, Q or 1, K), bool (True: visible) or additive, on keys that are padding; the
            same positions then do not count as queries. None: no padding.
        chunk_bytes: size of the softmax rows that are held at once.

    Returns:
        Two (B, K) float32: the mean over heads and queries, and the mean over heads of query 0.
    """
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    asks: torch.Tensor | None = None
    if mask is not None:
        mask = mask.expand(batch, mask.shape[1], queries, keys)
        visible = mask if mask.dtype == torch.bool else mask == 0
        asks = visible[:, 0].diagonal(dim1=1, dim2=2)
    key = key.float()
    total = torch.zeros(batch, keys, device=query.device)
    first = total
    step = max(1, chunk_bytes // (4 * batch * heads * keys))
    for start in range(0, queries, step):
        rows = slice(start, start + step)
        scores = reference.row_scores(query[:, :, rows].float(), key, scaling)
        scores = reference.mask_scores(scores, None if mask is None else mask[:, :, rows])
        weights = torch.softmax(scores, dim=-1)
        if start == 0:
            first = weights[:, :, 0].mean(1)
        if asks is not None:
            weights = weights * asks[:, None, rows, None]
        total += weights.sum(dim=(1, 2))
    count = queries if asks is None else asks.sum(1, keepdim=True)
    return total / (heads * count), first


@dataclass(frozen=True)
class _Slot:
    """What a recorded attention module needs: its recorder, its index, its own attention."""

    recorder: VisionRecorder
    layer: int
    base: Callable[..., AttentionOutput]


#: Per layer and call of the attention function, the pair of `received_attention` and the keys
#: (B, K, D), mean over heads.
_Calls = dict[int, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]


class VisionRecorder:
    """Reads the attention of some layers of a vision tower, each time images are encoded.

    While attached, an encoding costs the attention rows of the chosen layers once more; nothing
    else is slower. Results belong to the thread that encoded:

        tower = describe_tower(model, info)
        with VisionRecorder(tower, (0, len(tower.layers) - 2)) as recorder:
            model.generate(**inputs)
            for image in recorder.take(): ...

    generate() encodes all images of its batch once, before beams are expanded; a bare forward
    encodes inside itself, before the decoder runs. Images come in the order of the prompts, row by
    row, as their placeholders do.

    Args:
        tower: from `describe_tower`.
        layers: indices of the layers to read, from 0.

    Raises:
        BadInput: no layer, or one that the tower does not have.
    """

    def __init__(self, tower: Tower, layers: Iterable[int]) -> None:
        self.tower = tower
        self.layers = tuple(sorted(set(layers)))
        last = len(tower.layers) - 1
        if not self.layers or self.layers[0] < 0 or self.layers[-1] > last:
            raise BadInput(
                f"recorded layers {self.layers} of the vision tower of {tower.model_type!r}: give "
                f"at least one index from 0 to {last}."
            )
        self._local = threading.local()
        self._configs: dict[int, Any] = {}
        self._shadowed: dict[str, Any] = {}

    def attach(self) -> None:
        """Put the recorder in; where it cannot, the model is left as it was.

        Raises:
            StateError: this tower has a recorder already.
            UnsupportedModel: the tower runs flash or flex attention.
        """
        tower = self.tower
        if any(SLOT in layer.__dict__ for layer in tower.layers):
            raise StateError(
                f"the vision tower of this {tower.model_type!r} model has a recorder already. "
                "Detach it first, or attach one recorder with the layers of both."
            )
        for layer in self.layers:
            module: Any = tower.layers[layer]
            implementation = module.config._attn_implementation
            if implementation not in ("sdpa", "eager", None):
                raise UnsupportedModel(
                    f"the vision tower runs {implementation!r} attention, which the recorder "
                    "cannot stand in for. Switch the tower, the language model may stay as it is: "
                    'model.set_attn_implementation({"vision_config": "sdpa"}).'
                )
        host: Any = tower.host
        shadows = {"get_image_features": self._reading(host.get_image_features)}
        if hasattr(host, "get_video_features"):
            shadows["get_video_features"] = self._unread(host.get_video_features)
        for layer in self.layers:
            module = tower.layers[layer]
            module.__dict__[SLOT] = _Slot(self, layer, base_attention(module))
            self._configs[layer] = module.config
            # The tower keeps its own configuration, so it goes on making its native masks.
            override = copy.copy(module.config)
            override._attn_implementation_internal = NAME
            module.config = override
        for name, shadow in shadows.items():
            self._shadowed[name] = host.__dict__.get(name)
            host.__dict__[name] = shadow

    def detach(self) -> None:
        """Take the recorder out; the model is then bit for bit what it was. Twice does no harm."""
        for layer, config in self._configs.items():
            module: Any = self.tower.layers[layer]
            module.config = config
            del module.__dict__[SLOT]
        self._configs.clear()
        for name, own in self._shadowed.items():
            if own is None:
                del self.tower.host.__dict__[name]
            else:
                self.tower.host.__dict__[name] = own
        self._shadowed.clear()

    def __enter__(self) -> VisionRecorder:
        self.attach()
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def take(self) -> list[EncodedImage]:
        """The images of this thread's last encoding, which is then forgotten; [] if none."""
        images: list[EncodedImage] = self._local.__dict__.pop("images", [])
        return images

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise StateError(
            "a model with a recorder in its vision tower cannot be copied or pickled. Call "
            "detach() (or vlmfix.unwrap(model)) first."
        )

    def __reduce__(self) -> NoReturn:
        self.__deepcopy__({})

    def _reading(self, encode: Callable[..., Any]) -> Callable[..., Any]:
        """A stand-in for get_image_features; generate() reads its signature, hence `wraps`."""
        signature = inspect.signature(encode)

        @functools.wraps(encode)
        def encode_and_read(*args: Any, **kwargs: Any) -> Any:
            if getattr(self._local, "video", False):
                return encode(*args, **kwargs)
            calls: _Calls = {layer: [] for layer in self.layers}
            self._local.images = []
            self._local.calls = calls
            try:
                output = encode(*args, **kwargs)
            finally:
                self._local.calls = None
            arguments = signature.bind(*args, **kwargs).arguments
            hidden, features = (
                output[:2]
                if isinstance(output, tuple)
                else (output.last_hidden_state, output.pooler_output)
            )
            self._local.images = _images(self.tower, calls, arguments, features, hidden)
            return output

        return in_python(encode_and_read)

    def _unread(self, encode: Callable[..., Any]) -> Callable[..., Any]:
        """A stand-in for get_video_features, which in Qwen3-VL calls get_image_features."""

        @functools.wraps(encode)
        def encode_unread(*args: Any, **kwargs: Any) -> Any:
            self._local.video = True
            try:
                return encode(*args, **kwargs)
            finally:
                self._local.video = False

        return in_python(encode_unread)

    def _record(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float | None,
    ) -> None:
        calls: _Calls | None = getattr(self._local, "calls", None)
        if calls is not None:  # None: a video, or a tower that somebody runs by itself
            scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
            column, first = received_attention(query, key, scaling, mask)
            calls[layer].append((column, first, key.detach().mean(1, dtype=torch.float32)))


@in_python
def _recorded_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> AttentionOutput:
    """transformers' attention signature: query (B, H, Q, D), key and value (B, Hkv, K, D)."""
    slot: _Slot = module.__dict__[SLOT]
    slot.recorder._record(slot.layer, query, key, attention_mask, kwargs.get("scaling"))
    return slot.base(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(NAME, _recorded_attention)


# -- from patches to visual tokens ----------------------------------------------------------------


def _images(
    tower: Tower,
    calls: _Calls,
    arguments: dict[str, Any],
    features: Any,
    hidden: torch.Tensor,
) -> list[EncodedImage]:
    """What one encoding gave, image by image.

    Args:
        tower: the tower.
        calls: what its attention modules recorded.
        arguments: those of `get_image_features`, by name.
        features: the projected features: a list of (n, D), or one (images, n, D) tensor.
        hidden: what the last block of the tower made of its tokens; only read where it has a class
            token, and then (tiles, 1 + patches, d).

    Raises:
        UnsupportedModel: a layer that did not run, or another number of visual tokens than the
            family's rule gives.
    """
    silent = [layer for layer, found in calls.items() if not found]
    if silent:
        raise UnsupportedModel(
            f"layers {silent} of the vision tower of {tower.model_type!r} did not run attention "
            "that the recorder could read. Ask for other layers."
        )
    images = _LAYOUTS[tower.layout](tower, calls, arguments)
    expected = sum(len(image.index) for image in images)
    tokens = sum(math.prod(part.shape[:-1]) for part in features)
    if tokens != expected:
        raise UnsupportedModel(
            f"the vision tower of {tower.model_type!r} made {tokens} visual tokens where the "
            f"recorder counts {expected}, so its values would go to the wrong tokens. Call the "
            "model with the arguments of its processor and the feature settings of its "
            "configuration."
        )
    if not tower.has_cls:
        return images
    # A copy: a view would keep the hidden states of all patches.
    outputs = iter(hidden.detach()[:, 0].to(torch.float32, copy=True))
    return [
        replace(one, tiles=tuple(replace(t, cls_output=next(outputs)) for t in one.tiles))
        for one in images
    ]


def _tiles(tower: Tower, calls: _Calls, arguments: dict[str, Any]) -> list[EncodedImage]:
    """Every tile is an image of its own."""
    return [
        EncodedImage((tile,), torch.arange(tile.rows * tile.columns, device=_device(calls)))
        for tile in _square_tiles(tower, calls, arguments)
    ]


def _packed(tower: Tower, calls: _Calls, arguments: dict[str, Any]) -> list[EncodedImage]:
    """LLaVA-NeXT: several tiles per image."""
    tiles = _square_tiles(tower, calls, arguments)
    images = []
    for size in arguments["image_sizes"]:
        count, index = packed_index(tower, size, tiles[0].rows * tiles[0].columns)
        own, tiles = tuple(tiles[:count]), tiles[count:]
        images.append(EncodedImage(own, index.to(_device(calls))))
    return images


def _patches(tower: Tower, calls: _Calls, arguments: dict[str, Any]) -> list[EncodedImage]:
    """Patches of all images on one axis, in squares; the tower calls attention per segment."""
    config: Any = tower.module.config
    grids = arguments["image_grid_thw"]
    order: torch.Tensor | None = None
    if hasattr(config, "window_size"):  # Qwen2.5-VL sorts its patches by window
        from transformers.vision_utils import get_vision_window_index

        window_index, _ = get_vision_window_index(
            grids,
            spatial_merge_size=tower.merge,
            window_size=config.window_size,
            patch_size=config.patch_size,
        )
        order = torch.argsort(window_index).to(_device(calls))
    shapes = grid_shapes(tower, grids)
    sizes = [rows * columns for rows, columns in shapes]

    def fold(values: Iterable[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        patches = torch.cat([value.flatten(0, 1) for value in values])
        tokens = patches.view(-1, tower.merge**2, *patches.shape[1:]).mean(1)
        return torch.split(tokens if order is None else tokens[order], sizes)

    by_layer = {}
    for layer, found in calls.items():
        columns, _, keys = zip(*found, strict=True)
        by_layer[layer] = [
            Received(column, None, key)
            for column, key in zip(fold(columns), fold(keys), strict=True)
        ]
    return [
        EncodedImage(
            (Tile(rows, columns, dict(zip(by_layer, received, strict=True))),),
            torch.arange(rows * columns, device=_device(calls)),
        )
        for (rows, columns), *received in zip(shapes, *by_layer.values(), strict=True)
    ]


_LAYOUTS = {"tiles": _tiles, "packed": _packed, "patches": _patches}


def _square_tiles(tower: Tower, calls: _Calls, arguments: dict[str, Any]) -> list[Tile]:
    """The tiles of one call per layer, without the class token, folded to visual tokens."""
    height, width = arguments["pixel_values"].shape[-2:]
    merge, has_cls = tower.merge, int(tower.has_cls)
    rows, columns = tile_shape(tower, height, width)

    def fold(values: torch.Tensor) -> torch.Tensor:
        if values.shape[1] != has_cls + rows * columns * merge**2:
            raise UnsupportedModel(
                f"the vision tower of {tower.model_type!r} sees {values.shape[1] - has_cls} "
                f"patches in {height} x {width} pixels, which are no {rows} x {columns} squares "
                f"of {merge} x {merge}. Give it images of the size that its processor makes."
            )
        patches = values[:, has_cls:]
        squares = patches.view(-1, rows, merge, columns, merge, *values.shape[2:])
        return squares.mean(dim=(2, 4)).flatten(1, 2)

    by_layer = {}
    for layer, ((column, first, key),) in calls.items():  # one call: all tiles are one batch
        heard = [None] * len(first) if not has_cls else list(fold(first))
        by_layer[layer] = [
            Received(*values) for values in zip(fold(column), heard, fold(key), strict=True)
        ]
    return [
        Tile(rows, columns, dict(zip(by_layer, received, strict=True)))
        for received in zip(*by_layer.values(), strict=True)
    ]


def _device(calls: _Calls) -> torch.device:
    """Where the tower computes."""
    return next(iter(calls.values()))[0][0].device
