"""The Triton kernels against the float64 specification, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from kernels_cases import Call, Case, make

from vlmfix.errors import BadInput
from vlmfix.kernels import ops, reference
from vlmfix.kernels.reference import FusedEdit, RowsOutput

pytest.importorskip("triton", reason="Triton is not installed")
rows = pytest.importorskip("vlmfix.kernels.rows")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALF)
# Float32 numbers that are sums of up to hundreds of terms, and exponentials of scores around 5.
MASS_ERROR = 3e-6


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Buffers that a kernel does not fill show: NaN, and True for booleans."""
    empty = torch.empty

    def filled(*arguments: Any, **options: Any) -> torch.Tensor:
        tensor = empty(*arguments, **options)
        return tensor.fill_(torch.nan if tensor.is_floating_point() else 1)

    monkeypatch.setattr(rows.torch, "empty", filled)
    yield


def on_device(value: Any) -> Any:
    return value.to(DEVICE) if isinstance(value, torch.Tensor) else value


def triton(call: Call, splits: int | None = None) -> RowsOutput:
    """What the kernels compute, back on the CPU."""
    query, key, value, edit = call.arguments()
    edit = replace(edit, **{name: on_device(item) for name, item in vars(edit).items()})
    options = {name: on_device(item) for name, item in call.options.items()}
    tensors = [on_device(tensor) for tensor in (query, key, value)]
    if splits is None:
        output = ops.attend_rows(*tensors, edit, impl="triton", **options)
    else:
        output, launches = rows.launches(*tensors, edit, splits=splits, **options)
        for launch in launches:
            launch()
    return RowsOutput(*(tensor.cpu() for tensor in output))


def eager_error(call: Call, exact: RowsOutput, monkeypatch: pytest.MonkeyPatch) -> float:
    """Largest error of the plain torch path in the dtype of the call, as a model would run it.

    It depends on the order of the sums, so the largest of a few orders is taken.
    """
    monkeypatch.setattr(reference, "_SMALL", 0)  # else small half-precision products are cast up
    clean = call.clean(call.query.dtype)
    random = torch.Generator().manual_seed(0)
    worst = 0.0
    for _ in range(4):
        order = torch.randperm(call.key.shape[2], generator=random)
        shuffled = clean.permuted(order)
        output = reference.attend_rows(*shuffled.arguments(), **shuffled.options)
        same = (output.edited == exact.edited)[..., None]  # a row may fall on either side of a rule
        worst = max(worst, float(((output.out - exact.out).abs() * same).max()))
    return worst


def bound(call: Call, exact: RowsOutput, monkeypatch: pytest.MonkeyPatch) -> float:
    rounding = torch.finfo(call.query.dtype).eps / 2 * float(exact.out.abs().max())
    return 2 * eager_error(call, exact, monkeypatch) + rounding


def check(
    call: Call,
    monkeypatch: pytest.MonkeyPatch,
    splits: int | None = None,
    idle: bool = False,
) -> RowsOutput:
    """Outputs, masses and decisions, within what the dtype allows; unless idle, the edit shows."""
    exact, found = call.exact(), triton(call, splits)
    assert found.out.dtype == call.query.dtype
    assert torch.equal(found.edited, exact.edited)
    assert (found.masses - exact.masses).abs().max() <= MASS_ERROR
    error = float((found.out - exact.out).abs().max())
    assert error <= bound(call, exact, monkeypatch)
    edit = call.edit
    acts = edit.gain is not None or edit.log_weight is not None or edit.head_scale is not None
    if not idle and (acts or edit.epilogue != "plain"):
        assert (exact.out - call.plain().out).abs().max() > 8 * error, "an idle edit"
    return found


EDITS = (
    (),
    ("groups",),
    ("gain",),
    ("gain", "rows"),
    ("log_weight",),
    ("log_weight", "groups", "rows"),
    ("head_scale",),
    ("head_scale", "rows"),
    ("var",),
    ("var", "rows"),
    ("var", "gain", "log_weight"),
    ("drop",),
    ("drop", "rows", "head_scale"),
    ("softcap",),
    ("softcap", "gain"),
    ("var", "gain", "log_weight", "head_scale", "rows", "softcap"),
)


@pytest.mark.rotated
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("edits", EDITS, ids="+".join)
def test_every_edit(
    edits: tuple[str, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = make(Case(edits, dtype, shared=4, mask="padded"))
    found = check(call, monkeypatch)
    if {"var", "drop"} & set(edits):
        assert found.edited.any() and not found.edited.all()


SHAPES = (
    Case(("var",), keys=1, mask="tail"),
    Case(("gain",), keys=1, queries=3, width=64),
    Case(("var",), keys=63, shared=7, width=64, mask="tail"),
    Case(("drop", "head_scale"), keys=64, key_heads=2, shared=1, width=64, mask="padded"),
    Case(("var", "gain"), keys=100, key_heads=2, shared=2, width=80),
    Case(("var",), keys=131, shared=7, width=128, mask="padded"),
    Case(("gain",), keys=131, shared=7, width=80, mask="tail"),
    Case(("log_weight", "groups"), keys=100, key_heads=2, shared=1, width=128, mask="tail"),
    Case(("var", "rows"), keys=100, shared=7, queries=3, mask="full"),
    Case(("drop", "rows"), keys=65, key_heads=2, queries=3, width=80, mask="full"),
    Case(("gain", "rows", "head_scale"), keys=131, shared=2, queries=3, width=64, mask="full"),
    Case(("head_scale",), keys=131, key_heads=2, shared=1, queries=3, mask="full"),
    Case(("var",), keys=577, batch=1, shared=7, mask="none"),
    Case(("var",), keys=65, width=80, value_width=32),
    Case(("gain",), keys=65, width=32, value_width=80, mask="padded"),
    Case((), keys=40, batch=1, shared=8, queries=5, mask="full"),  # 40 rows: two blocks of 32
    Case(("var",), keys=5, batch=1, shared=8, queries=8),  # the most: 64 rows, blocks of 8
)


@pytest.mark.rotated
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_shapes(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    # One key has all the weight, whatever its score.
    check(make(replace(case, dtype=dtype)), monkeypatch, idle=case.keys == 1)


@pytest.mark.parametrize("splits", [1, 2, 3])
def test_splits_change_nothing(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # With three runs of 64 keys, the first one of the second sample is masked as a whole.
    case = Case(("var", "gain"), torch.bfloat16, shared=4, keys=180, mask="padded", seed=1)
    call = make(case)
    call.options["mask"] = call.options["mask"].clone()
    call.options["mask"][1, ..., :70] = False
    whole = check(call, monkeypatch, splits=1)
    split = check(call, monkeypatch, splits)
    assert (split.masses - whole.masses).abs().max() <= 1e-6


def test_more_splits_than_are_merged_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    check(make(Case(("var",), batch=1, shared=1, keys=577, seed=2)), monkeypatch, splits=37)


@pytest.mark.parametrize("edits", [("var",), ("gain", "log_weight"), ("head_scale",)])
@pytest.mark.parametrize("queries", [1, 3])
def test_a_row_that_sees_nothing_gives_zeros(
    edits: tuple[str, ...], queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = make(Case(edits, queries=queries, mask="full" if queries > 1 else "padded"))
    mask = call.options["mask"].clone()
    mask[1, :, 0] = False
    call.options["mask"] = mask
    found = check(call, monkeypatch)
    assert not found.out[1, :, 0].any() and not found.masses[1, :, 0].any()
    assert not found.edited[1, :, 0].any()
    assert found.out[0].any()


def test_a_mask_per_head(monkeypatch: pytest.MonkeyPatch) -> None:
    call = make(Case(("var",), key_heads=2, shared=2))
    mask = torch.rand(2, 4, 1, 65, generator=torch.Generator().manual_seed(5)) < 0.6
    call.options["mask"] = mask
    check(call, monkeypatch)


def test_a_mask_for_the_whole_batch_with_any_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    call = make(Case(("var",), mask="none"))
    mask = torch.rand(1, 1, 1, 130, generator=torch.Generator().manual_seed(5)) < 0.6
    call.options["mask"] = mask[..., ::2]
    check(call, monkeypatch)


def test_small_inputs_of_any_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    edits = ("drop", "gain", "log_weight", "head_scale", "rows")
    call = make(Case(edits, shared=4, queries=3, mask="full"))

    def spread(tensor: torch.Tensor) -> torch.Tensor:
        wide = tensor.repeat_interleave(2, -1)
        wide[..., 1::2] = 0
        return wide[..., ::2]

    tensors = {n: spread(t) for n, t in vars(call.edit).items() if isinstance(t, torch.Tensor)}
    assert len(tensors) == 5
    call.edit = replace(call.edit, **tensors)
    call.options["rows"] = call.options["rows"].repeat(1, 2)[:, :3]
    call.options["mask"] = spread(call.options["mask"])
    check(call, monkeypatch)
    same = call.edit.head_scale[:1].expand(2, 4)
    check(replace(call, edit=replace(call.edit, head_scale=same)), monkeypatch)


@pytest.mark.parametrize("edits", [("gain", "log_weight"), ("var",), ("drop",)], ids="+".join)
def test_zero_groups_mean_plain_attention(edits: tuple[str, ...]) -> None:
    call = make(Case((*edits, "groups"), torch.bfloat16, mask="padded"))
    assert call.edit.groups is not None
    neutral = replace(call, edit=replace(call.edit, groups=torch.zeros_like(call.edit.groups)))
    plain = replace(call, edit=FusedEdit(groups=torch.zeros_like(call.edit.groups)))
    found, expected = triton(neutral), triton(plain)
    assert torch.equal(found.out, expected.out) and not found.edited.any()
    assert not torch.equal(triton(call).out, expected.out)


@pytest.mark.parametrize(
    ("edits", "groups"), [(("var",), (0, 1)), (("var",), (0, 2)), (("drop",), (0, 1))], ids=str
)
def test_rows_with_nothing_to_take_or_to_give_stay(
    edits: tuple[str, ...], groups: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = make(Case(edits, torch.bfloat16))
    assert call.edit.groups is not None
    ids = torch.tensor(groups, dtype=torch.uint8)[call.edit.groups.long() % 2]
    open_rules = {"rho": 0.0, "minimum_visual_mass": 0.0, "threshold": 0.0}
    call.edit = replace(call.edit, groups=ids, **open_rules)
    found = check(call, monkeypatch, idle=True)
    plain = triton(replace(call, edit=FusedEdit(groups=ids)))
    assert torch.equal(found.out, plain.out) and not found.edited.any()


def test_rows_that_may_not_be_edited_equal_plain_attention() -> None:
    edits = ("var", "gain", "log_weight", "head_scale", "rows")
    call = make(Case(edits, torch.bfloat16, queries=3, mask="full"))
    plain = replace(call, edit=FusedEdit(groups=call.edit.groups))
    found, expected = triton(call), triton(plain)
    chosen = call.options["rows"][:, None].expand(found.edited.shape)
    assert torch.equal(found.out[~chosen], expected.out[~chosen])
    assert not found.edited[~chosen].any()
    moved = (found.out - expected.out)[chosen].abs().amax(-1)
    assert (moved > 1e-3).all()


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_the_output_is_rounded_to_nearest(dtype: torch.dtype) -> None:
    call = make(Case(("head_scale",), dtype, keys=1))
    assert call.edit.head_scale is not None
    product = call.edit.head_scale[:, :, None, None] * call.value.float()  # all weight on one key
    assert torch.equal(triton(call).out, product.to(dtype))


def test_keep_everything_is_plain_attention() -> None:
    call = make(Case(("var",), torch.bfloat16))
    kept = replace(call, edit=replace(call.edit, keep=1.0))
    plain = replace(call, edit=FusedEdit(groups=call.edit.groups))
    found = triton(kept)
    assert torch.equal(found.out, triton(plain).out) and found.edited.any()


@pytest.mark.parametrize(
    ("edits", "change"),
    [
        (("var",), {"keep": 0.61}),
        (("var",), {"rho": 0.55}),
        (("var",), {"minimum_visual_mass": 0.5}),
        (("drop",), {"threshold": 0.4}),
        (("gain",), {"gain": torch.tensor([[1, 1], [0.62, 1.5], [1.8, 0.3], [1.4, 0.8]])}),
        (("gain",), {"gain": torch.tensor([[1, 1], [0.6, 1.5], [1.8, 0.35], [1.4, 0.8]])}),
        (("head_scale",), {"head_scale": 1.01}),
        (("log_weight",), {"log_weight": 1.02}),
    ],
    ids=str,
)
def test_the_comparison_sees_a_slightly_different_constant(
    edits: tuple[str, ...], change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = make(Case(edits, shared=4))
    for name, value in change.items():  # a factor on a tensor, or the new value
        old = getattr(call.edit, name)
        scaled = isinstance(old, torch.Tensor) and isinstance(value, float)
        wrong = replace(call, edit=replace(call.edit, **{name: old * value if scaled else value}))
    exact = call.exact()
    error = (triton(wrong).out - exact.out).abs().max()
    assert error > 100 * bound(call, exact, monkeypatch)


@pytest.mark.skipif(DEVICE == "cuda", reason="needs Triton's interpreter")
def test_addresses_beyond_two_billion_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    # Row 2 of this cache is 2**31 elements after row 0. Pages that nobody touches take no memory,
    # and there are as many in front, so that a wrapped address reads zeros.
    monkeypatch.undo()  # do not fill them
    no_reserve = 0x4000
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    pages = mmap.mmap(-1, 2 * (2**32 + 64), flags=flags)
    storage = torch.frombuffer(pages, dtype=torch.float16)
    call = make(Case(("var",), torch.float16, batch=1, keys=3))
    for name, offset in (("key", 2**31), ("value", 2**31 + 32)):
        far = storage.as_strided((1, 1, 3, 32), (1, 1, 2**30, 1), offset)
        setattr(call, name, far.copy_(getattr(call, name)))
    check(call, monkeypatch)


@pytest.mark.skipif(DEVICE == "cuda", reason="needs Triton's interpreter")
@pytest.mark.parametrize("mask", ["none", "padded", "tail", "full"])
def test_every_visible_key_is_read_once_and_no_other(
    mask: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    builder = pytest.importorskip("triton.runtime.interpreter").InterpreterBuilder
    load, read = builder.create_masked_load, []

    def recorded(self: Any, pointers: Any, loaded: Any, *rest: Any) -> Any:
        read.append(pointers.data[loaded.data])
        return load(self, pointers, loaded, *rest)

    monkeypatch.setattr(builder, "create_masked_load", recorded)
    queries = 2 if mask == "full" else 1
    call = make(Case(("var",), torch.float16, shared=4, queries=queries, keys=100, mask=mask))
    triton(call)
    addresses = np.concatenate([item.ravel() for item in read])
    visible = call.options["mask"]
    seen = torch.ones(2, 100, dtype=torch.bool) if visible is None else visible.any((1, 2))
    for cache in (call.key, call.value):
        first, storage = cache.data_ptr(), cache.untyped_storage().nbytes()
        element = torch.arange(storage // 2).as_strided(cache.shape, cache.stride())[:, 0]
        expected = first + 2 * element[seen].flatten().numpy()
        found = addresses[(addresses >= first) & (addresses < first + storage)]
        assert np.array_equal(np.sort(found), expected)


def test_the_output_is_laid_out_for_the_projection() -> None:
    found = triton(make(Case(queries=3, shared=4, mask="full")))
    assert found.out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (Case(dtype=torch.float64), "does not support torch.float64"),
        (Case(width=272), "up to 256 wide, not 272"),
        (Case(shared=13, queries=5, keys=5), "64 rows per key head at a time, not 65"),
    ],
    ids=str,
)
def test_what_the_kernels_cannot_do_is_an_error(case: Case, message: str) -> None:
    with pytest.raises(BadInput, match=f"{message}.*impl='torch' can do it"):
        triton(make(case))


def test_no_silent_loss_of_gradients() -> None:
    call = make(Case())
    call.query = call.query.detach().requires_grad_()
    with pytest.raises(BadInput, match="no gradient"):
        triton(call)
    with torch.no_grad():
        triton(call)


def test_a_head_width_that_is_not_contiguous() -> None:
    call = make(Case())
    call.key = call.key.mT.contiguous().mT
    with pytest.raises(BadInput, match="stride 1"):
        triton(call)


def test_a_cpu_tensor_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_INTERPRETED", False)
    call = make(Case())
    with pytest.raises(BadInput, match="needs CUDA tensors, not cpu"):
        ops.attend_rows(*call.arguments(), impl="triton", **call.options)
