"""Every variant of the Triton kernels compiles for an H100 and fits it; no GPU is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from itertools import product
from pathlib import Path

import pytest
from kernels_ptxas import Variant, compiler

triton = pytest.importorskip("triton", reason="Triton is not installed")

ROOT = Path(__file__).resolve().parents[2]
SHARED_MEMORY = 227 * 1024  # bytes that one program may have on sm_90
REGISTERS = 255
# Bytes that a thread may spill. In float32, which is no dtype for decoding, a few of the variants
# spill up to 28: ptxas stops at 48 to 80 registers there, for more threads at a time, far from the
# limit. Triton 3.7, which torch 2.13 for CUDA brings, spills more, and in one variant of bfloat16.
OLD = triton.__version__.startswith("3.7.")
SPILLED = {"bfloat16": 24, "float32": 44} if OLD else {"float32": 32}

SCORES = ("groups", "gain", "log_weight", "rows", "softcap")
# What methods use, on the shapes of real models, and the heaviest of each kind.
USUAL = (
    Variant(),
    Variant(edits=("groups", "var"), mask="flat"),
    Variant(shared=7, edits=("groups", "var", "rows"), mask="flat"),
    Variant(shared=7, edits=("groups", "gain"), mask="flat"),
    Variant(edits=("log_weight", "rows", "head_scale"), mask="flat"),
    Variant(shared=7, edits=(*SCORES, "var", "head_scale"), mask="flat"),
    Variant(shared=7, queries=3, edits=(*SCORES, "drop"), mask="full"),
    Variant(shared=4, width=256, edits=(*SCORES, "var"), mask="full"),
    Variant(dtype="float32", shared=7, edits=(*SCORES, "var"), mask="flat"),
    Variant(dtype="float16", width=80, edits=("groups", "var"), mask="flat"),
)
OPTIONS = ((), ("groups", "var"), ("groups", "drop", "rows"), ("groups", "gain"), SCORES)
ALL = [
    Variant(dtype, width, shared, 3 if mask == "full" else 1, mask, edits)
    for (dtype, width), mask, edits, large in product(
        (*product(("bfloat16", "float32"), (32, 80, 128, 256)), ("float16", 128)),
        ("none", "flat", "full"),
        OPTIONS,
        (False, True),  # the smaller and the larger block of rows
    )
    for shared in ((7 if edits else 20) if large else 1,)
]


def compile_all(variants: list[Variant], cache: Path) -> None:
    if compiler() is None:
        pytest.skip("this Triton brings no ptxas-blackwell")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("kernels_ptxas.py"))],
        input=json.dumps([asdict(variant) for variant in variants]),
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    measured = 0
    for variant, kernels in zip(variants, json.loads(done.stdout), strict=True):
        assert [kernel["kernel"] for kernel in kernels] == ["_partials", "_combine"]
        for kernel in kernels:
            assert kernel["spilled"] <= SPILLED.get(variant.dtype, 0), (variant, kernel)
            assert kernel["shared"] < SHARED_MEMORY, (variant, kernel)
            if kernel["registers"] is not None:
                measured += 1
                assert 16 < kernel["registers"] < REGISTERS, (variant, kernel)
    assert measured > len(variants) // 2, "the compiler's report was not understood"


@pytest.mark.slow
def test_usual_variants_fit_an_h100(tmp_path: Path) -> None:
    compile_all(list(USUAL), tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)  # a few minutes on an idle machine
def test_all_variants_fit_an_h100(tmp_path: Path) -> None:
    compile_all(ALL, tmp_path)
