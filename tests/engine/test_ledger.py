"""The ledger: what every key position is."""

from __future__ import annotations

import pytest
import torch

from vlmfix.engine.call import Call
from vlmfix.engine.frame import Frame
from vlmfix.engine.ledger import Ledger, Memory
from vlmfix.engine.lifetime import Lifetime
from vlmfix.engine.plans import AttentionNotes
from vlmfix.errors import StateError
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


def test_flags_of_a_prompt_void_what_was_derived_and_those_of_an_answer_do_not() -> None:
    ledger = Ledger(1, 4, CPU)
    ledger.write(0, _kinds([TEXT, IMAGE, TEXT, TEXT]), prompt_length=2)
    notes = ledger.of(AttentionNotes)
    notes.plans |= {0: {}, 1: {}}
    notes.flag(METHOD, 0, frame(ledger), torch.ones(1, 2, dtype=torch.bool))
    assert notes.flags[METHOD, 0].nonzero().tolist() == [[0, 0], [0, 1]]
    assert notes.plans == {1: {}}
    notes.plans |= {0: {}}
    notes.flag(METHOD, 0, frame(ledger, past=2), torch.ones(1, 1, dtype=torch.bool))
    assert notes.flags[METHOD, 0].sum() == 3 and notes.plans == {0: {}, 1: {}}
    notes.flag(METHOD, 0, frame(ledger, past=4), torch.ones(1, 1, dtype=torch.bool))
    assert notes.flags[METHOD, 0].sum() == 3 and notes.flagged[METHOD, 0] == 3  # one was missed
    ledger.write(2, _kinds([TEXT]), prompt_length=3)
    assert not notes.plans


def test_a_ledger_is_cut_with_its_cache() -> None:
    ledger = Ledger(1, 6, CPU)
    ledger.write(0, _kinds([TEXT, IMAGE, TEXT, IMAGE, TEXT]), prompt_length=5)
    ledger.length = 8
    notes = ledger.of(AttentionNotes)
    notes.flag(METHOD, 0, frame(ledger), torch.ones(1, 5, dtype=torch.bool))
    notes.image_values[METHOD] = torch.ones(1, ledger.capacity)
    notes.seen[METHOD] = {}
    mask = torch.ones(1, 5, dtype=torch.bool)
    ledger.say_question(mask, mask)
    ledger.cut(6)  # of the answer alone
    assert ledger.length == 6 and ledger.written == 5 and notes.flagged[METHOD, 0] == 5
    ledger.cut(3)
    assert ledger.kinds[0, :5].tolist() == [TEXT, IMAGE, TEXT, GENERATED, GENERATED]
    assert (ledger.length, ledger.written, ledger.prompt_length) == (3, 3, 0)
    assert notes.flags[METHOD, 0].sum() == 3 and notes.flagged[METHOD, 0] == 3
    assert notes.image_values[METHOD].sum() == 3 and not notes.seen and not ledger.knows_question


def test_a_forward_that_never_ended_is_undone() -> None:
    ledger = Ledger(1, 4, CPU)
    ledger.begin()
    ledger.write(0, _kinds([TEXT, IMAGE, TEXT]), prompt_length=3)
    ledger.length = 3
    mask = torch.tensor([[True, False, True]])
    ledger.say_question(mask, mask)
    ledger.end()
    ledger.begin()
    ledger.write(3, torch.full((1, 300), IMAGE, dtype=torch.uint8), prompt_length=303)
    ledger.length = 303
    notes = ledger.of(AttentionNotes)
    notes.plans[0] = {}
    ledger.begin()
    assert (ledger.length, ledger.written, ledger.prompt_length) == (3, 3, 3)
    assert ledger.visual().sum() == 1 and ledger.last_prompt.tolist() == [2] and not notes.plans
    assert ledger.capacity > 303 and ledger.question.shape == ledger.kinds.shape
    ledger.end()
    ledger.begin()
    assert ledger.length == 3


def test_what_cannot_be_cut_leaves_the_ledger_as_it_was() -> None:
    class Whole(Memory):
        def cut(self, length: int) -> None:
            raise StateError("whole")

    ledger = Ledger(1, 4, CPU)
    ledger.write(0, _kinds([TEXT, IMAGE, TEXT]), prompt_length=3)
    ledger.keep(Whole())
    for _ in range(2):
        with pytest.raises(StateError, match="whole"):
            ledger.cut(1)
        assert ledger.written == 3


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
