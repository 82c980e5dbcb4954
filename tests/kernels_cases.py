"""Random inputs for `attend_rows`, with NaN wherever no implementation may look."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from vlmfix.kernels import reference
from vlmfix.kernels.reference import FusedEdit, RowsOutput


@dataclass(frozen=True)
class Case:
    """One call; `edits` names fields of `FusedEdit`, an epilogue, `rows` or `softcap`."""

    edits: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float32
    batch: int = 2
    key_heads: int = 1
    shared: int = 2
    queries: int = 1
    keys: int = 65
    width: int = 32
    value_width: int | None = None
    mask: str = "none"  # none; padded: left padding; tail: a static cache; full: causal, padded
    seed: int = 0

    def __str__(self) -> str:
        changed = [
            (field.name, getattr(self, field.name))
            for field in fields(self)
            if getattr(self, field.name) != field.default
        ]
        return ",".join(f"{name}={value}" for name, value in changed).replace("torch.", "")


@dataclass
class Call:
    """Arguments of one call, and the same with zeros instead of NaN for the reference."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    edit: FusedEdit
    options: dict[str, Any]

    def arguments(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, FusedEdit]:
        return self.query, self.key, self.value, self.edit

    def clean(self, dtype: torch.dtype) -> Call:
        key, value = (tensor.nan_to_num(0.0).to(dtype) for tensor in (self.key, self.value))
        return replace(self, query=self.query.to(dtype), key=key, value=value)

    def permuted(self, order: torch.Tensor) -> Call:
        """The same attention with its keys in another order."""
        per_key = {name: getattr(self.edit, name) for name in ("groups", "log_weight")}
        edit = replace(
            self.edit, **{n: None if t is None else t[:, order] for n, t in per_key.items()}
        )
        mask = self.options["mask"]
        return replace(
            self,
            key=self.key[:, :, order],
            value=self.value[:, :, order],
            edit=edit,
            options={**self.options, "mask": None if mask is None else mask[..., order]},
        )

    def exact(self) -> RowsOutput:
        """In float64."""
        clean = self.clean(torch.float64)
        return reference.attend_rows(*clean.arguments(), **clean.options)

    def plain(self) -> RowsOutput:
        """In float64, with no edit at all."""
        clean = replace(self.clean(torch.float64), edit=FusedEdit())
        options = {name: self.options[name] for name in ("scaling", "mask")}
        return reference.attend_rows(*clean.arguments(), **options)


def _visible(case: Case) -> torch.Tensor | None:
    batch, queries, keys = case.batch, case.queries, case.keys
    if case.mask == "none":
        return None
    index = torch.arange(keys)
    if case.mask == "tail":
        return (index < max(1, 2 * keys // 3)).expand(batch, 1, 1, keys)
    pads = torch.arange(batch) * (keys // 3)
    mask = (index[None] >= pads[:, None])[:, None, None]
    if case.mask == "padded":
        return mask
    causal = index[None] <= torch.arange(keys - queries, keys)[:, None]
    return mask & causal


def make(case: Case) -> Call:
    """The tensors of a case. Keys and values are views into a larger cache, as in decoding."""
    random = torch.Generator().manual_seed(case.seed)
    batch, queries, keys, width = case.batch, case.queries, case.keys, case.width
    heads = case.key_heads * case.shared
    mask = _visible(case)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random)

    def cache(wide: int) -> torch.Tensor:
        tensor = normal(batch, case.key_heads, keys + 5, wide).to(case.dtype)
        tensor[:, :, keys:] = torch.nan
        if mask is not None:
            unseen = ~mask.flatten(1, 2).any(1)
            tensor[:, :, :keys].masked_fill_(unseen[:, None, :, None], torch.nan)
        return tensor[:, :, :keys]

    has = set(case.edits).__contains__
    epilogue = next((name for name in ("var", "drop") if has(name)), "plain")
    grouped = has("groups") or has("gain") or epilogue != "plain"
    # Half of what a gain does to positive scores it does not do to negative ones.
    gain = torch.tensor([[7.0, 9.0], [0.6, 1.5], [1.8, 0.3], [1.4, 0.8]])
    edit = FusedEdit(
        groups=torch.randint(4, (batch, keys + 7), generator=random, dtype=torch.uint8)
        if grouped
        else None,
        gain=gain if has("gain") else None,
        log_weight=normal(batch, keys + 3) if has("log_weight") else None,
        epilogue=epilogue,
        keep=0.6,
        rho=0.45,
        minimum_visual_mass=0.4,
        threshold=0.25,
        heads=torch.rand(heads, generator=random) < 0.7 if epilogue == "drop" else None,
        head_scale=torch.rand(batch, heads, generator=random) + 0.25 if has("head_scale") else None,
    )
    if edit.heads is not None:
        edit.heads[0] = True
    rows = torch.rand(batch, queries, generator=random) < 0.5
    rows[0, 0], rows[-1, -1] = True, False
    return Call(
        # As a model gives it: a transposed view of (B, Q, H, D).
        query=(2 * normal(batch, queries, heads, width)).to(case.dtype).transpose(1, 2),
        key=cache(width),
        value=cache(width if case.value_width is None else case.value_width),
        edit=edit,
        options={
            "scaling": width**-0.5,
            "mask": mask,
            "rows": rows if has("rows") else None,
            "softcap": 2.0 if has("softcap") else None,
        },
    )
