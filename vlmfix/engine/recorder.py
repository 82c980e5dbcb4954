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
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from transformers import AttentionInterface

from vlmfix.engine.dispatch import AttentionOutput, base_attention, in_python
from vlmfix.engine.patches import RecordedCalls, recorded_images
from vlmfix.errors import BadInput, StateError
from vlmfix.families.tower import EncodedImage, Tower, require_readable
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
        mask: (B, 1, Q or 1, K), bool (True: visible) or additive, on keys that are padding, which
            then do not count as queries, or that belong to other images. None: all see all.
        chunk_bytes: size of the softmax rows that are held at once.

    Returns:
        Two (B, K) float32: the mean over heads and over the queries that see the key, 0 where none
        does, and the mean over heads of query 0.
    """
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    seen: torch.Tensor | None = None
    if mask is not None:
        mask = mask.expand(batch, mask.shape[1], queries, keys)
        visible = (mask if mask.dtype == torch.bool else mask == 0)[:, 0]
        asks = visible.diagonal(dim1=1, dim2=2)
        seen = torch.zeros(batch, keys, dtype=torch.long, device=query.device)
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
        if seen is not None:
            weights = weights * asks[:, None, rows, None]
            seen += (visible[:, rows] & asks[:, rows, None]).sum(1)
        total += weights.sum(dim=(1, 2))
    count = queries if seen is None else seen.clamp(min=1)
    return total / (heads * count), first


@dataclass(frozen=True)
class _Slot:
    """What a recorded attention module needs: its recorder, its index, its own attention."""

    recorder: VisionRecorder
    layer: int
    base: Callable[..., AttentionOutput]


def _known_layers(tower: Tower, layers: Iterable[int]) -> tuple[int, ...]:
    known, last = tuple(sorted(set(layers))), len(tower.layers) - 1
    if not known or known[0] < 0 or known[-1] > last:
        raise BadInput(
            f"recorded layers {known} of the vision tower of {tower.model_type!r}: give "
            f"at least one index from 0 to {last}."
        )
    return known


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
        self.layers = _known_layers(tower, layers)
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
        require_readable(tower, self.layers)
        host: Any = tower.host
        shadows = {"get_image_features": self._reading(host.get_image_features)}
        if hasattr(host, "get_video_features"):
            shadows["get_video_features"] = self._unread(host.get_video_features)
        self._hook(self.layers)
        for name, shadow in shadows.items():
            self._shadowed[name] = host.__dict__.get(name)
            host.__dict__[name] = shadow

    def add(self, layers: Iterable[int]) -> None:
        """Read more layers, each from the next encoding on; those that run now are left alone.

        Raises:
            BadInput: a layer that the tower does not have.
            UnsupportedModel: the tower runs flash or flex attention.
        """
        wanted = _known_layers(self.tower, layers)
        new = [layer for layer in wanted if layer not in self._configs]
        require_readable(self.tower, new)
        self._hook(new)
        self.layers = tuple(sorted({*self.layers, *wanted}))

    def _hook(self, layers: Iterable[int]) -> None:
        for layer in layers:
            module: Any = self.tower.layers[layer]
            module.__dict__[SLOT] = _Slot(self, layer, base_attention(module))
            self._configs[layer] = module.config
            # The tower keeps its own configuration, so it goes on making its native masks.
            override = copy.copy(module.config)
            override._attn_implementation_internal = NAME
            module.config = override

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
        self._local.took_video = self._local.__dict__.pop("encoded_video", False)
        return images

    @property
    def took_video(self) -> bool:
        """Whether a video was encoded next to the images that this thread took last."""
        return getattr(self._local, "took_video", False)

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
            calls: RecordedCalls = {layer: [] for layer in self.layers}
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
            features = hidden if features is None else features  # Llama 4 projects them later
            self._local.images = recorded_images(self.tower, calls, arguments, features, hidden)
            return output

        return in_python(encode_and_read)

    def _unread(self, encode: Callable[..., Any]) -> Callable[..., Any]:
        """A stand-in for get_video_features, which in Qwen3-VL calls get_image_features."""

        @functools.wraps(encode)
        def encode_unread(*args: Any, **kwargs: Any) -> Any:
            self._local.video = self._local.encoded_video = True
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
        calls: RecordedCalls | None = getattr(self._local, "calls", None)
        # None: a video, or a tower that the user runs by itself. A layer that is not among them
        # was added while this encoding ran.
        if calls is not None and layer in calls:
            scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
            if self.tower.cls_last:  # the first is what asks for itself
                query, key = query.roll(1, 2), key.roll(1, 2)
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
