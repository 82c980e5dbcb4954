"""What commands do before they load a model."""

from __future__ import annotations

import sys

__all__ = ["quiet_transformers", "set_threads"]


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
