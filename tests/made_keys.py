"""Keys for tests of a method's plan, made from kinds written by hand."""

from __future__ import annotations

from typing import Any

import torch

from vlmfix.base.attention import Keys
from vlmfix.engine.ledger import Ledger


def make_keys(kinds: torch.Tensor, flags: torch.Tensor | None = None, **fields: Any) -> Keys:
    """Keys of one layer: kinds (B, K) of ledger.py; the question is what follows the image."""
    ledger = Ledger(kinds.shape[0], 0, kinds.device)
    ledger.kinds = kinds
    made = {"layer": 2, "num_heads": 4, "question": ledger.question, "content": ledger.content}
    return Keys(kinds=kinds, flags=flags, **{**made, **fields})
