"""Running a tiny model under a method that prunes visual tokens, and what it kept."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from tiny import TinyFamily, generate_kwargs
from torch import Tensor

import vlmfix
from vlmfix.base.method import Method
from vlmfix.engine.encoded import CallImages
from vlmfix.engine.session import SESSION


class Answer(NamedTuple):
    """What generate() returned, and which placeholders of each image were kept."""

    sequences: Tensor
    logits: tuple[Tensor, ...]
    kept: list[list[int]]


def answer(tiny: TinyFamily, method: Method | str | None, inputs: dict[str, Any]) -> Answer:
    """A short greedy answer; no placeholders are reported where nothing was cut."""
    kwargs = generate_kwargs(output_logits=True, return_dict_in_generate=True)
    with vlmfix.wrapped(tiny.model, method) as model:
        output = model.generate(**inputs, **kwargs)
        call = model.__dict__[SESSION].last_call()
        reductions = () if call is None else call.of(CallImages).reductions or ()
        kept = [reduction.positions.tolist() for reduction in reductions]
    return Answer(output.sequences, output.logits, kept)


def same_answer(one: Answer, other: Answer, *, exactly: bool = True) -> bool:
    """Whether two answers have the same tokens and the same (or nearly the same) logits."""
    if not torch.equal(one.sequences, other.sequences):
        return False
    pairs = zip(one.logits, other.logits, strict=True)
    if exactly:
        return all(torch.equal(a, b) for a, b in pairs)
    return all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)


def check_batch_equals_singles(tiny: TinyFamily, method: Method | str) -> None:
    """A left-padded batch of two keeps the same tokens, and says the same, as each prompt alone."""
    inputs = tiny.inputs(batch=2, lengths=[3, 7])
    length = inputs["input_ids"].shape[1]
    together = answer(tiny, method, inputs)
    images = len(together.kept) // 2
    assert images and len(together.kept) == 2 * images
    for row in range(2):
        alone = answer(tiny, method, tiny.single(inputs, row))
        assert alone.kept == together.kept[row * images : (row + 1) * images]
        for a, b in zip(alone.logits, together.logits, strict=True):
            assert torch.allclose(a[0], b[row], atol=1e-5)
        new = together.sequences[row, length:]
        assert torch.equal(alone.sequences[0, -len(new) :], new)


def check_text_only_is_untouched(tiny: TinyFamily, method: Method | str) -> None:
    """A prompt without an image is answered bit for bit as by the plain model."""
    ids = torch.tensor([[1, 20, 21, 22, 23]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    pruned = answer(tiny, method, inputs)
    assert pruned.kept == [] and same_answer(pruned, answer(tiny, None, inputs))


def check_a_row_without_image(tiny: TinyFamily, method: Method | str) -> None:
    """A text-only row beside a row with an image is answered as if it were alone."""
    inputs = tiny.inputs(batch=1)
    length = inputs["input_ids"].shape[1]
    text = torch.tensor([[1, 20, 21, 22, 23]])
    padded = torch.nn.functional.pad(text, (length - text.shape[1], 0))
    mixed = {
        **inputs,
        "input_ids": torch.cat([inputs["input_ids"], padded]),
        "attention_mask": torch.cat([inputs["attention_mask"], (padded != 0).long()]),
    }
    together = answer(tiny, method, mixed)
    alone = answer(tiny, None, {"input_ids": text, "attention_mask": torch.ones_like(text)})
    image = answer(tiny, method, inputs)
    assert together.kept == image.kept
    for mix, words, seen in zip(together.logits, alone.logits, image.logits, strict=True):
        assert torch.allclose(mix[1], words[0], atol=1e-5)
        assert torch.allclose(mix[0], seen[0], atol=1e-5)


def check_keep_all_is_identity(tiny: TinyFamily, keep_all: list[str]) -> None:
    """Budgets that keep every token leave sequences and logits bit for bit alone."""
    inputs = tiny.inputs(batch=2)
    plain = answer(tiny, None, inputs)
    for method in keep_all:
        assert same_answer(answer(tiny, method, inputs), plain)
