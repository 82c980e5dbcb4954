"""VAR against rows recorded from the authors' code, through the functions of the model path."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from made_keys import make_keys
from safetensors import safe_open

from vlmfix.base.attention import Plan
from vlmfix.families.kinds import IMAGE, TEXT
from vlmfix.methods.var import VisualAttentionRedistribution


@pytest.mark.parametrize("number", [0, 1, 2])
def test_rows_equal_the_authors_code(golden: Path, number: int) -> None:
    with safe_open(golden / "var" / f"var_{number}.safetensors", "pt") as file:
        facts = file.metadata()
        data = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    method = VisualAttentionRedistribution(
        keep=float(facts["p"]),
        rho=1 - float(facts["rho"]),  # the code bounds the complement
        minimum_visual_mass=float(facts["minimum_visual_mass"]),
        tau=float(facts["tau"]),
        sink_channels=tuple(map(int, facts["sink_dims"].split(","))),
    )
    flags = method.flag_tokens(data["hidden_states"])
    assert flags[0].nonzero().flatten().tolist() == data["sink_indices"].tolist()

    start, length = int(facts["image_start"]), int(facts["image_length"])
    prompt = flags.shape[1]
    kinds = torch.full((1, prompt + 8), TEXT, dtype=torch.uint8)
    kinds[:, start : start + length] = IMAGE
    kinds[:, prompt:] = 4
    plan = method.plan(make_keys(kinds, torch.nn.functional.pad(flags, (0, 8))))
    assert isinstance(plan, Plan)

    # The prefill edits the rows after the image; the rows before it stay.
    first = start + length
    rows = data["prefill_attention"][:, :, first:]
    edited, changed = method.edit_weights(
        rows, **{name: t[:, :prompt] for name, t in plan.tensors.items()}
    )
    expected = data["prefill_expected"]
    assert torch.allclose(edited, expected[:, :, first:], atol=1e-5)
    assert torch.equal(data["prefill_attention"][:, :, :first], expected[:, :, :first])
    assert changed.any() and not changed.all()
    assert (edited - rows).abs().max() > 1e-3

    for step in range(3):
        row = data[f"decode{step}_attention"]
        edited, _ = method.edit_weights(
            row, **{n: t[:, : row.shape[-1]] for n, t in plan.tensors.items()}
        )
        assert torch.allclose(edited, data[f"decode{step}_expected"], atol=1e-5)
        assert (edited - row).abs().max() > 1e-3
