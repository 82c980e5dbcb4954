"""`attend_rows` as the engine calls it: checks, choice of implementation, torch.compile.

In eager mode the implementation is called directly: torch's dispatcher costs more than the checks.
While torch.compile traces, the call becomes the operator `vlmfix::attend_rows`, so that the graph
stays whole.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch

from vlmfix.errors import BadInput, MissingDependency
from vlmfix.kernels import reference
from vlmfix.kernels.reference import GROUPS, FusedEdit, RowsOutput

__all__ = ["Implementation", "attend_rows", "runs_on_triton"]

Implementation = Literal["torch", "triton"]


def attend_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    edit: FusedEdit,
    *,
    scaling: float,
    mask: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    softcap: float | None = None,
    impl: Implementation,
) -> RowsOutput:
    """Attention of few query rows with an edit; `reference.attend_rows` says what it computes.

    Args:
        query: (B, H, Q, D).
        key: (B, Hkv, K, D), not repeated; a view into a larger cache is fine.
        value: (B, Hkv, K, Dv), likewise.
        edit: the edit of the rows.
        scaling: factor on the dot products, usually D ** -0.5.
        mask: (1 or B, 1 or H, 1 or Q, K) bool, True = visible.
        rows: (B, Q) bool, rows that may be edited; None for all of them.
        softcap: if given, scores become softcap * tanh(scores / softcap).
        impl: "torch" runs anywhere and has gradients. "triton" is one fused pass over the cache;
            it never falls back: what it does not support is an error.

    Raises:
        BadInput: shapes or dtypes that do not match, or that `impl` does not support.
        MissingDependency: impl="triton" where Triton is not installed.
    """
    _check(query, key, value, edit, mask, rows, impl)
    if torch.compiler.is_compiling():
        arguments = _flatten(query, key, value, edit, scaling, mask, rows, softcap, impl)
        return RowsOutput(*torch.ops.vlmfix.attend_rows(*arguments))
    return _run(query, key, value, edit, scaling, mask, rows, softcap, impl)


def _run(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    edit: FusedEdit,
    scaling: float,
    mask: torch.Tensor | None,
    rows: torch.Tensor | None,
    softcap: float | None,
    impl: str,
) -> RowsOutput:
    function = reference.attend_rows if impl == "torch" else _triton().attend_rows
    return function(query, key, value, edit, scaling=scaling, mask=mask, rows=rows, softcap=softcap)


def runs_on_triton(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether impl="triton" is installed and supports these tensors."""
    try:
        rows = _triton()
    except MissingDependency:
        return False
    return rows.unsupported(query, key, value) is None


def _triton() -> Any:
    """The module with the kernels; importing it imports Triton."""
    try:
        from vlmfix.kernels import rows
    except ImportError as error:
        raise MissingDependency(
            "impl='triton' needs Triton, which runs on Linux: pip install 'vlmfix[kernels]', or "
            "use impl='torch'."
        ) from error
    return rows


def _check(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    edit: FusedEdit,
    mask: torch.Tensor | None,
    rows: torch.Tensor | None,
    impl: str,
) -> None:
    """Check shapes and dtypes, on the host alone: this runs in every layer of every step."""
    if impl not in get_args(Implementation):
        raise BadInput(f"impl={impl!r}: use 'torch' or 'triton'")
    batch, heads, queries, width = query.shape
    key_heads, keys = key.shape[1], key.shape[2]
    if key.shape != (batch, key_heads, keys, width) or value.shape[:3] != key.shape[:3]:
        shapes = [tuple(tensor.shape) for tensor in (query, key, value)]
        raise BadInput(f"query, key, value {shapes} are not (B, H, Q, D), (B, Hkv, K, D or Dv)")
    if heads % key_heads:
        raise BadInput(f"{heads} query heads cannot share {key_heads} key heads evenly")
    if not query.dtype == key.dtype == value.dtype:
        dtypes = (query.dtype, key.dtype, value.dtype)
        raise BadInput(f"query, key and value have dtypes {dtypes}; they must be the same")
    if mask is not None:
        fits = mask.ndim == 4 and mask.shape[0] in (1, batch) and mask.shape[3] == keys
        if not fits or mask.shape[1] not in (1, heads) or mask.shape[2] not in (1, queries):
            wanted = f"(1 or {batch}, 1 or {heads}, 1 or {queries}, {keys})"
            raise BadInput(f"mask is {tuple(mask.shape)}; it must be {wanted}")
        if mask.dtype != torch.bool:
            raise BadInput(f"mask is {mask.dtype}; it must be bool, True where a key is visible")
    if rows is not None and (rows.shape != (batch, queries) or rows.dtype != torch.bool):
        found = f"{tuple(rows.shape)} {rows.dtype}"
        raise BadInput(f"rows is {found}; it must be {(batch, queries)} bool")
    for name, per_key in (("groups", edit.groups), ("log_weight", edit.log_weight)):
        if per_key is not None and (per_key.shape[0] != batch or per_key.shape[1] < keys):
            raise BadInput(f"{name} is {tuple(per_key.shape)}; it must cover ({batch}, {keys})")
    if edit.head_scale is not None and edit.head_scale.shape != (batch, heads):
        raise BadInput(f"head_scale is {tuple(edit.head_scale.shape)}, not {(batch, heads)}")
    if edit.heads is not None and edit.heads.shape != (heads,):
        raise BadInput(f"heads is {tuple(edit.heads.shape)}, not {(heads,)}")


_SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor? groups, Tensor? gain, Tensor? log_weight, "
    "str epilogue, float keep, float rho, float minimum_visual_mass, float threshold, "
    "Tensor? heads, Tensor? head_scale, float scaling, Tensor? mask, Tensor? rows, "
    "float? softcap, str impl) -> (Tensor, Tensor, Tensor)"
)


def _flatten(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    edit: FusedEdit,
    scaling: float,
    mask: torch.Tensor | None,
    rows: torch.Tensor | None,
    softcap: float | None,
    impl: str,
) -> tuple[Any, ...]:
    """Arguments in the order of the operator's schema, which has no dataclasses."""
    before = (query, key, value, edit.groups, edit.gain, edit.log_weight, edit.epilogue)
    return (*before, *edit.numbers, edit.heads, edit.head_scale, scaling, mask, rows, softcap, impl)


def _operator(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    groups: torch.Tensor | None,
    gain: torch.Tensor | None,
    log_weight: torch.Tensor | None,
    epilogue: Literal["plain", "var", "drop"],
    keep: float,
    rho: float,
    minimum_visual_mass: float,
    threshold: float,
    heads: torch.Tensor | None,
    head_scale: torch.Tensor | None,
    scaling: float,
    mask: torch.Tensor | None,
    rows: torch.Tensor | None,
    softcap: float | None,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    edit = FusedEdit(
        groups, gain, log_weight, epilogue, keep, rho, minimum_visual_mass, threshold, heads,
        head_scale,
    )  # fmt: skip
    out, masses, edited = _run(query, key, value, edit, scaling, mask, rows, softcap, impl)
    return out, masses, edited


def _fake(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Outputs without values; strides equal the real ones, or compiled code misreads them."""
    batch, heads, queries, _ = query.shape
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    out = query.new_empty(batch, queries, heads, value.shape[3]).transpose(1, 2)
    masses = query.new_empty(batch, heads, queries, GROUPS, dtype=dtype)
    return out, masses, query.new_empty(batch, heads, queries, dtype=torch.bool)


torch.library.custom_op("vlmfix::attend_rows", mutates_args=(), schema=_SCHEMA)(
    _operator
).register_fake(_fake)
