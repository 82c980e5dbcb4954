"""Compile the row kernels for sm_90 without a GPU, and report what ptxas says.

Run as a program, in a process of its own: Triton is either a compiler or an interpreter, for the
whole life of a process. Reads a JSON list of variants (see `Variant`) on stdin, writes a JSON list
of {kernel, registers, spilled, shared} lists on stdout.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TARGET = ("cuda", 90, 32)


@dataclass(frozen=True)
class Variant:
    """One way of calling `attend_rows`; what it says decides how the kernels are compiled."""

    dtype: str = "bfloat16"
    width: int = 128
    shared: int = 1  # query heads per key head
    queries: int = 1
    mask: str = "none"  # none, flat (one row), full (a row per query)
    edits: tuple[str, ...] = ()  # of groups, gain, log_weight, rows, softcap, head_scale, var, drop


def compiler() -> Path | None:
    """The ptxas that knows the PTX version Triton emits, if this Triton brings one."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas-blackwell"
    return path if path.is_file() else None


def launches(variant: Variant) -> Any:
    """The launches of a variant, on CPU tensors of small shapes with realistic strides."""
    import torch

    from vlmfix.kernels import rows
    from vlmfix.kernels.reference import FusedEdit

    batch, key_heads, keys = 2, 2, 1024
    heads, count, width = key_heads * variant.shared, variant.queries, variant.width
    dtype = getattr(torch, variant.dtype)
    query = torch.zeros(batch, count, heads, width, dtype=dtype).transpose(1, 2)
    cache = torch.zeros(2, batch, key_heads, keys, width, dtype=dtype)
    has = set(variant.edits).__contains__
    epilogue = next((name for name in ("var", "drop") if has(name)), "plain")
    edit = FusedEdit(
        groups=torch.zeros(batch, keys, dtype=torch.uint8) if has("groups") else None,
        gain=torch.ones(4, 2) if has("gain") else None,
        log_weight=torch.zeros(batch, keys) if has("log_weight") else None,
        epilogue=epilogue,
        heads=torch.ones(heads, dtype=torch.bool) if epilogue == "drop" else None,
        head_scale=torch.ones(batch, heads) if has("head_scale") else None,
    )
    mask = {
        "none": None,
        "flat": torch.ones(batch, 1, 1, keys, dtype=torch.bool),
        "full": torch.ones(batch, 1, count, keys, dtype=torch.bool),
    }[variant.mask]
    if variant.mask == "full" and count == 1:
        mask = torch.ones(batch, heads, 1, keys, dtype=torch.bool)
    return rows.launches(
        query,
        cache[0],
        cache[1],
        edit,
        scaling=0.1,
        mask=mask,
        rows=torch.ones(batch, count, dtype=torch.bool) if has("rows") else None,
        softcap=30.0 if has("softcap") else None,
    )[1]


def compiled(variant: Variant) -> list[dict[str, Any]]:
    """What ptxas says of both kernels of a variant."""
    found = []
    for launch in launches(variant):
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            kernel = launch.kernel.warmup(*launch.arguments, grid=launch.grid, **launch.options)
        numbers = re.findall(r"(\d+) bytes spill (?:stores|loads)", log.getvalue())
        registers = re.search(r"Used (\d+) registers", log.getvalue())
        found.append(
            {
                "kernel": launch.kernel.__name__,
                # An equal variant was compiled before and comes from memory, without a log.
                "registers": int(registers[1]) if registers else None,
                "spilled": sum(map(int, numbers)),
                "shared": kernel.metadata.shared,
            }
        )
    return found


def main() -> None:
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    class NoDevice:
        """A driver that can name its target and nothing more."""

        def get_current_target(self) -> Any:
            return GPUTarget(*TARGET)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    driver.set_active(NoDevice())
    path = compiler()
    assert path is not None
    os.environ["TRITON_PTXAS_PATH"] = str(path)
    knobs.nvidia.dump_ptxas_log = True
    variants = [Variant(**{**item, "edits": tuple(item["edits"])}) for item in json.load(sys.stdin)]
    json.dump([compiled(variant) for variant in variants], sys.stdout)


if __name__ == "__main__":
    main()
