"""What commands do before they load a model."""

from __future__ import annotations

import sys

__all__ = ["print_anything", "quiet_transformers", "set_threads"]


def print_anything() -> None:
    """Let stdout and stderr take every text: what their encoding lacks is written as an escape.

    Answers are in any language, tables have signs, and a terminal or a pipe may be in latin-1.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's or a test's may be another object
            stream.reconfigure(errors="backslashreplace")


def set_threads(threads: int | None) -> None:
    """Let torch use so many threads on the CPU; None: as many as it likes."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def quiet_transformers() -> None:
    """Errors only, and progress bars only where a person watches."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
