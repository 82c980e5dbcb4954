"""Facts about the machine of a benchmark: device, versions, commit."""

from __future__ import annotations

import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from vlmfix._version import __version__

__all__ = ["facts"]


def facts(device: str) -> dict[str, Any]:
    """Time (UTC), versions, commit, name of the device ("cpu", "cuda", "cuda:1"), torch threads."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "vlmfix": __version__,
        "git": _commit(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else _cpu(),
        "threads": torch.get_num_threads(),
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    """The commit of the checkout that runs, "+" if it has changes; empty if there is none."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
