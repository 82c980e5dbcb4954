"""The ledger: what every key position is."""

from __future__ import annotations

import torch

from vlmfix.engine.ledger import Ledger
from vlmfix.families.kinds import GENERATED, IMAGE, PAD, TEXT

CPU = torch.device("cpu")


def _kinds(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.uint8)


def test_positions_beyond_the_prompt_are_generated() -> None:
    ledger = Ledger(1, 3, CPU)
    ledger.write(0, _kinds([TEXT, IMAGE, TEXT, TEXT, TEXT]), prompt_length=3)
    assert ledger.kinds[0, :5].tolist() == [TEXT, IMAGE, TEXT, GENERATED, GENERATED]
    assert (ledger.kinds[0, 5:] == GENERATED).all() and ledger.prompt_length == 3


def test_chunks_append_and_the_last_prompt_token_skips_padding() -> None:
    ledger = Ledger(3, 4, CPU)
    ledger.write(0, _kinds([PAD, TEXT], [TEXT, IMAGE], [PAD, PAD]), prompt_length=4)
    ledger.write(2, _kinds([IMAGE, TEXT], [TEXT, PAD], [PAD, PAD]), prompt_length=4)
    assert ledger.kinds[0, :4].tolist() == [PAD, TEXT, IMAGE, TEXT]
    assert ledger.last_prompt.tolist() == [3, 2, -1]
    assert ledger.visual()[:, :4].int().tolist() == [[0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]]


def test_growth_keeps_kinds_and_flags() -> None:
    ledger = Ledger(1, 2, CPU)
    ledger.write(0, _kinds([TEXT, IMAGE]), prompt_length=2)
    ledger.flag("method", 0, 0, torch.tensor([[False, True]]))
    ledger.derived[0] = "stale"
    before = ledger.capacity
    ledger.reserve(before)
    assert ledger.derived and ledger.capacity == before
    ledger.reserve(before + 1)
    assert ledger.capacity > before and not ledger.derived
    assert ledger.kinds[0, :2].tolist() == [TEXT, IMAGE]
    assert (ledger.kinds[0, 2:] == GENERATED).all()
    assert ledger.flags["method", 0].nonzero().tolist() == [[0, 1]]
    assert ledger.flags["method", 0].shape == ledger.kinds.shape


def test_flags_are_noted_for_prompt_tokens_only_and_void_what_was_derived() -> None:
    ledger = Ledger(1, 4, CPU)
    ledger.write(0, _kinds([TEXT, IMAGE, TEXT, TEXT]), prompt_length=2)
    ledger.derived |= {0: "stale", 1: "kept"}
    ledger.flag("method", 0, 0, torch.ones(1, 4, dtype=torch.bool))
    assert ledger.flags["method", 0].nonzero().tolist() == [[0, 0], [0, 1]]
    assert ledger.derived == {1: "kept"}
    ledger.flag("method", 0, 3, torch.ones(1, 1, dtype=torch.bool))
    assert ledger.flags["method", 0].sum() == 2
