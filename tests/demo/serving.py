"""A demo in a process of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: Seconds that anything may take; a busy machine has a slow page.
PATIENCE = 60


@dataclass
class Server:
    """A running demo: its address, and the file that it writes its log to."""

    url: str
    log: Path


@contextmanager
def served(log: Path, *options: str) -> Iterator[Server]:
    """Serve the demo on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-u", "-m", "vlmfix", "demo", "--port", str(port), "--threads", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with (
        log.open("w") as file,
        subprocess.Popen(
            [*command, *options], env=environment, stdout=file, stderr=subprocess.STDOUT
        ) as process,
    ):
        try:
            end = time.monotonic() + PATIENCE
            while "the demo is at" not in log.read_text():
                assert process.poll() is None and time.monotonic() < end, log.read_text()
                time.sleep(0.2)
            yield Server(f"http://127.0.0.1:{port}/", log)
        finally:
            process.terminate()
            process.wait(20)
