"""Steering: add a given vector to hidden states, or project a given subspace out of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from vlmfix.base.hidden import Direction, HiddenMethod, Site
from vlmfix.base.method import option
from vlmfix.base.observer import Rows
from vlmfix.errors import BadInput, CalibrationNeeded
from vlmfix.families import ModelInfo

__all__ = ["Steer", "SteeringVectors"]


class SteeringVectors(dict[int, torch.Tensor]):
    """Vectors by decoder layer: (D,) to add, or orthonormal rows (k, D) to project out.

    A file of them is a safetensors file with a tensor `layer.N` for each layer N, counted from 0.
    """

    def __init__(self, vectors: Mapping[int, torch.Tensor], source: str) -> None:
        super().__init__(vectors)
        self.source = source

    def __str__(self) -> str:
        return self.source

    def __hash__(self) -> int:  # type: ignore[override]  # one object is one set of vectors
        return id(self)

    @classmethod
    def read(cls, path: str) -> SteeringVectors:
        """Read a file.

        Raises:
            BadInput: no such file, no safetensors file, or other tensors in it.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if not Path(path).is_file():
            raise BadInput(f"steer: no file {path!r}. Give vectors=FILE, a safetensors file.")
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise BadInput(f"steer: {path!r} is no safetensors file ({error}).") from error
        named = {name.removeprefix("layer."): tensor for name, tensor in tensors.items()}
        if not named or not all(name.isdecimal() for name in named):
            raise BadInput(
                f"steer: {path!r} holds tensors {sorted(tensors)[:5]}; name each after its decoder "
                'layer, counted from 0: "layer.12".'
            )
        return cls({int(name): tensor for name, tensor in named.items()}, path)


@dataclass(frozen=True)
class Steer(HiddenMethod):
    """Add a given vector to the hidden states of some layers, or project a subspace out.

    The edit that steering methods share, without their way to find vectors: Li et al., "VISTA",
    ICML 2025, arXiv 2502.03628 (MLP outputs are turned towards a vector), and Yang et al.,
    "Nullu", CVPR 2025, arXiv 2412.13817 (a subspace is projected out of them). Whether it helps
    depends on the vectors, and vlmfix ships none: a vector from another model, layer or site has no
    meaning here.

    With `relative` a vector counts in lengths of the row that it is added to, and with `keep_norm`
    the row gets its own length back: both together turn the row towards the vector (VISTA's form).
    """

    vectors: Any = option(None, "safetensors file with a tensor layer.N for every decoder layer N")
    strength: float = option(
        1.0, "factor on the vector, or on the projection; 0 changes nothing", -1000.0, 1000.0
    )
    operation: Literal["add", "project"] = option("add", "add the vector, or project it out")
    site: Site = option(
        "layer", "output that is edited: layer (the whole decoder layer) or mlp (its MLP alone)"
    )
    edited: Rows = option(
        "predicting",
        "rows whose hidden states are edited: generated, predicting, text or all (whole prompt)",
    )
    keep_norm: bool = option(False, "whether an edited hidden state keeps its length")
    relative: bool = option(
        False, "whether the vector counts in lengths of the hidden state that it is added to"
    )
    only_with_image: bool = option(False, "whether prompts without an image stay as they are")

    name: ClassVar[str] = "steer"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.vectors, Mapping) and not isinstance(self.vectors, SteeringVectors):
            object.__setattr__(self, "vectors", SteeringVectors(self.vectors, "given vectors"))

    def prepared(self, info: ModelInfo, model: torch.nn.Module) -> Steer:
        given = self.vectors
        if given is None:
            raise CalibrationNeeded(
                "steer needs a vector: vectors=FILE, a safetensors file with a tensor "
                "layer.N for each decoder layer N to edit, or a mapping {N: tensor} in Python."
            )
        found = given if isinstance(given, SteeringVectors) else SteeringVectors.read(str(given))
        for layer, vector in found.items():
            self._check(info, layer, vector, found.source)
        return replace(self, vectors=found)

    def _check(self, info: ModelInfo, layer: int, vector: torch.Tensor, source: str) -> None:
        where = f"steer: layer.{layer} of {source}"
        if not 0 <= layer < info.num_layers:
            raise BadInput(f"{where}: the model has the decoder layers 0 to {info.num_layers - 1}.")
        wanted = "(k, D)" if self.operation == "project" else "(D,)"
        if vector.ndim != 1 + (self.operation == "project") or vector.shape[-1] != info.hidden_size:
            raise BadInput(
                f"{where} has shape {tuple(vector.shape)}; operation={self.operation} on this "
                f"model needs {wanted} with D = {info.hidden_size}."
            )
        if not bool(vector.isfinite().all()):
            raise BadInput(f"{where} holds numbers that are not finite.")
        if self.operation == "project":
            products = vector.double() @ vector.double().mT
            if not torch.allclose(products, torch.eye(len(vector)).double(), atol=1e-3):
                raise BadInput(
                    f"{where}: the rows are not orthonormal; a projection needs them so."
                )

    def neutral(self) -> bool:
        return self.strength == 0

    def idle(self) -> str | None:
        return None if self.vectors else "it has no vectors"

    def layers(self, info: ModelInfo) -> Sequence[int]:
        return sorted(self.vectors)

    def edited_site(self) -> Site:
        return self.site

    def edited_rows(self) -> Rows:
        return self.edited

    def direction(self, layer: int, has_image: torch.Tensor) -> Direction:
        vectors = self.vectors[layer].to(has_image.device, torch.float32)
        live = has_image if self.only_with_image else torch.ones_like(has_image)
        return Direction(
            self.operation,
            vectors if self.operation == "project" else vectors[None],
            self.strength * live.float(),
            self.keep_norm,
            self.relative,
        )
