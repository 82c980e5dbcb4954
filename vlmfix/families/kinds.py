"""What a position of a prompt, or of a KV cache, holds: the values of `Ledger.kinds`."""

from __future__ import annotations

__all__ = ["GENERATED", "IMAGE", "PAD", "TEXT", "VIDEO"]

PAD, TEXT, IMAGE, VIDEO, GENERATED = range(5)
