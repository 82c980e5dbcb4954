"""The ledger: what every key position is."""

from __future__ import annotations

import pytest
import torch

from vlmfix.engine.call import Call
from vlmfix.engine.frame import Frame
from vlmfix.engine.ledger import Ledger
from vlmfix.engine.lifetime import Lifetime
from vlmfix.engine.plans import AttentionNotes
from vlmfix.families.kinds import GENERATED, IMAGE, PAD, TEXT
from vlmfix.methods.pai import PayAttentionToImage

CPU = torch.device("cpu")
METHOD = PayAttentionToImage()


def frame(ledger: Ledger, past: int = 0) -> Frame:
    return Frame(Call(), ledger, past=past, queries=2, offsets={})


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
    notes = ledger.of(AttentionNotes)
    notes.flag(METHOD, 0, frame(ledger), torch.tensor([[False, True]]))
    notes.plans[0] = {}
    before = ledger.capacity
    ledger.reserve(before)
    assert notes.plans and ledger.capacity == before
    ledger.reserve(before + 1)
    assert ledger.capacity > before and not notes.plans
    assert ledger.kinds[0, :2].tolist() == [TEXT, IMAGE]
    assert (ledger.kinds[0, 2:] == GENERATED).all()
    assert notes.flags[METHOD, 0].nonzero().tolist() == [[0, 1]]
    assert notes.flags[METHOD, 0].shape == ledger.kinds.shape


def test_flags_are_noted_for_prompt_tokens_only_and_void_what_was_derived() -> None:
    ledger = Ledger(1, 4, CPU)
    ledger.write(0, _kinds([TEXT, IMAGE, TEXT, TEXT]), prompt_length=2)
    notes = ledger.of(AttentionNotes)
    notes.plans |= {0: {}, 1: {}}
    notes.flag(METHOD, 0, frame(ledger), torch.ones(1, 4, dtype=torch.bool))
    assert notes.flags[METHOD, 0].nonzero().tolist() == [[0, 0], [0, 1]]
    assert notes.plans == {1: {}}
    notes.flag(METHOD, 0, frame(ledger, past=3), torch.ones(1, 1, dtype=torch.bool))
    assert notes.flags[METHOD, 0].sum() == 2
    ledger.write(2, _kinds([TEXT]), prompt_length=3)
    assert not notes.plans


def test_a_lifetime_keeps_one_object_of_a_class() -> None:
    life = Lifetime()
    assert life.get(list) is None and life.of(list) == [] and life.of(list) is life.get(list)
    kept = life.of(list)
    with life.keeping([1]):
        assert life.get(list) == [1]
        with life.keeping([2]):
            assert life.kept() == ([2],)
        assert life.get(list) == [1]
    assert life.get(list) is kept
    life.forget(list)
    assert life.get(list) is None
    with pytest.raises(ValueError), life.keeping([3]):
        raise ValueError
    assert life.get(list) is None
