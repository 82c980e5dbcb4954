"""The operator: choice of implementation, checks, torch.compile."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kernels_cases import Call, Case, make

from vlmfix.errors import BadInput
from vlmfix.kernels import ops

ROOT = Path(__file__).resolve().parents[2]
EVERYTHING = ("var", "gain", "log_weight", "head_scale", "rows", "softcap")


@pytest.fixture(params=["torch", "triton"])
def impl(request: pytest.FixtureRequest) -> ops.Implementation:
    name: ops.Implementation = request.param
    if name == "triton":
        pytest.importorskip("triton", reason="Triton is not installed")
    return name


def flat(call: Call, impl: ops.Implementation) -> tuple[Any, ...]:
    options = [call.options[name] for name in ("scaling", "mask", "rows", "softcap")]
    return ops._flatten(*call.arguments(), *options, impl)


@pytest.mark.rotated
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", ["none", "full"])
def test_opcheck(impl: ops.Implementation, dtype: torch.dtype, mask: str) -> None:
    clean = make(Case(("var",), dtype, keys=20, queries=2, mask=mask)).clean(dtype)
    operator = torch.ops.vlmfix.attend_rows.default
    results = torch.library.opcheck(operator, flat(clean, impl))
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("edits", [(), EVERYTHING, ("drop",)], ids="+".join)
@pytest.mark.parametrize("queries", [1, 3])
def test_the_operator_computes_what_the_function_does(
    impl: ops.Implementation, edits: tuple[str, ...], queries: int
) -> None:
    case = Case(edits, torch.bfloat16, shared=4, keys=30, queries=queries, mask="full")
    clean = make(case).clean(torch.bfloat16)
    found = torch.ops.vlmfix.attend_rows(*flat(clean, impl))
    expected = ops.attend_rows(*clean.arguments(), **clean.options, impl=impl)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other) and one.stride() == other.stride()


def test_compiled_code_keeps_one_graph(impl: ops.Implementation) -> None:
    clean = make(Case(("var", "rows"), keys=30, queries=2, mask="full")).clean(torch.float32)

    def layer(query: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
        edit = replace(clean.edit, groups=groups)
        found = ops.attend_rows(
            query * 2,
            clean.key,
            clean.value,
            edit,
            impl=impl,
            **clean.options,
        )
        return found.out.transpose(1, 2).flatten(2) + found.masses.sum() + found.edited.sum()

    seen: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        seen.append(graph)
        return graph

    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    groups = clean.edit.groups
    assert groups is not None
    # Other groups are other numbers, not another graph.
    with torch.no_grad():
        for ids in (groups, groups.flip(1), torch.zeros_like(groups)):
            assert torch.equal(compiled(clean.query, ids), layer(clean.query, ids))
    assert len(seen) == 1
    assert any("vlmfix.attend_rows" in str(node.target) for node in seen[0].graph.nodes)


def test_eager_mode_calls_the_implementation_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "ops", None)
    clean = make(Case(("var",))).clean(torch.float32)
    clean.query.requires_grad_()
    ops.attend_rows(*clean.arguments(), **clean.options, impl="torch").out.sum().backward()
    assert clean.query.grad is not None and clean.query.grad.any()  # the operator has no gradient


def test_bad_calls_say_what_is_wrong() -> None:
    clean = make(Case(("var",), shared=4, mask="padded")).clean(torch.float32)
    query, key, value, edit = clean.arguments()
    options = clean.options

    def fails(message: str, *tensors: Any, **changed: Any) -> None:
        arguments = tensors or (query, key, value, edit)
        with pytest.raises(BadInput, match=message):
            ops.attend_rows(*arguments, **{**options, "impl": "torch", **changed})

    fails("use 'torch' or 'triton'", impl="auto")
    fails("are not", query, key[:1], value, edit)
    fails("are not", query, key, value[:, :, :-1], edit)
    fails("3 query heads cannot share 2", query[:, :3], key.repeat(1, 2, 1, 1),
          value.repeat(1, 2, 1, 1), edit)  # fmt: skip
    fails("same", query.half(), key, value, edit)
    fails("mask is", mask=options["mask"][..., :-1])
    fails("it must be bool", mask=options["mask"].float())
    fails("rows is", rows=torch.ones(2, 2, dtype=torch.bool))
    fails("groups is .* it must cover", query, key, value,
          replace(edit, groups=edit.groups[:, :64]))  # fmt: skip
    fails("head_scale is", query, key, value, replace(edit, head_scale=torch.ones(2, 3)))
    drop = replace(edit, epilogue="drop", heads=torch.ones(3, dtype=torch.bool))
    fails("heads is", query, key, value, drop)


def test_triton_is_imported_only_when_asked_for() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from vlmfix.errors import MissingDependency\n"
        "from vlmfix.kernels import ops\n"
        "x = torch.ones(1, 1, 1, 16)\n"
        "edit = ops.FusedEdit()\n"
        "ops.attend_rows(x, x, x, edit, scaling=1.0, impl='torch')\n"
        "try: ops.attend_rows(x, x, x, edit, scaling=1.0, impl='triton')\n"
        "except MissingDependency as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ, capture_output=True, text=True
    )
    assert "vlmfix[kernels]" in done.stdout, done.stderr


def test_what_triton_can_do_is_asked_before_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """impl="auto" asks; what the kernels cannot do stays in torch."""
    query, key = torch.randn(2, 4, 1, 32), torch.randn(2, 2, 9, 32)
    assert ops.runs_on_triton(query, key, key)
    assert not ops.runs_on_triton(query.double(), key.double(), key.double())
    wide = torch.randn(2, 2, 9, 512)
    assert not ops.runs_on_triton(query, key, wide)
    assert not ops.runs_on_triton(torch.randn(2, 4, 33, 32), key, key)  # 66 rows per key head
    assert not ops.runs_on_triton(query, key.mT.contiguous().mT, key)
    assert not ops.runs_on_triton(query.requires_grad_(), key, key)
    monkeypatch.setitem(sys.modules, "vlmfix.kernels.rows", None)  # as where Triton is missing
    monkeypatch.delattr("vlmfix.kernels.rows", raising=False)
    assert not ops.runs_on_triton(query.detach(), key, key)


def test_asking_is_no_graph_break() -> None:
    query, key = torch.randn(2, 4, 1, 32), torch.randn(2, 2, 9, 32)

    def step(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        if not ops.runs_on_triton(query, key, key):
            return query
        edit = ops.FusedEdit()
        return ops.attend_rows(query, key, key, edit, scaling=0.2, impl="triton").out

    compiled = torch.compile(step, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(query, key), step(query, key), atol=1e-6)
    assert torch.equal(compiled(query.double(), key.double()), query.double())
