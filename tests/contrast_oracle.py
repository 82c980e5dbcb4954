"""What a contrastive method should generate, worked out without vlmfix's engine.

`Oracle.processor` makes generate() on the plain model decode by it. At every step the prompt as it
is and every branch run from scratch, row by row, without padding and without a KV cache, and the
method's own `contrast` is asked. Branches are made by hand: pixels are swapped in the arguments,
image tokens are left out of the ids, embeddings are overwritten and tokens are cut out at the
decoder's door, with their neighbours' positions kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tiny import PER_POSITION, TinyFamily
from tiny_configs import IMAGE
from transformers import LogitsProcessor

import vlmfix
from vlmfix.base.attention import AttentionMethod
from vlmfix.base.contrast import Branch, ContrastMethod, Prompt
from vlmfix.engine.session import SESSION
from vlmfix.families import describe_model
from vlmfix.families.surgeon import module_state

Inputs = dict[str, Any]


class Oracle:
    """The logits of each prompt behind each answer, kept once they have been worked out.

    Args:
        tiny: the family, its model plain.
        rows: the prompts, each alone and without padding (`TinyFamily.single`).
        method: the contrastive method, prepared.
        edit: a method that edits the attention of the prompts as they are, and of no branch.
        earlier: (T,) what stands between each prompt and the answer, if this is a later turn.
    """

    def __init__(
        self,
        tiny: TinyFamily,
        rows: Sequence[Inputs],
        method: ContrastMethod,
        edit: AttentionMethod | None = None,
        earlier: torch.Tensor | None = None,
    ) -> None:
        self.tiny, self.rows, self.method, self.edit = tiny, rows, method, edit
        self.earlier = torch.empty(0, dtype=torch.long) if earlier is None else earlier
        self.branches = [self._branches(row) for row in rows]
        self.known: dict[tuple[int, ...], torch.Tensor] = {}

    def processor(self, *rows: int) -> LogitsProcessor:
        """For generate() on the plain model and these prompts, or on all of them."""
        return _Processor(self, rows or tuple(range(len(self.rows))))

    def logits(self, index: int, answer: torch.Tensor) -> torch.Tensor:
        """(V,) of a prompt behind an answer so far, combined."""
        assert SESSION not in self.tiny.model.__dict__, "the oracle runs the plain model"
        key = (index, *answer.tolist())
        if key not in self.known:
            row, behind = self.rows[index], torch.cat([self.earlier, answer])
            base = self.base(index, behind)
            others = [self._run(row, branch, behind)[None, None] for branch in self.branches[index]]
            token = torch.tensor([len(answer) + 1])
            # Prompts without an image are not combined.
            combined = bool((row["input_ids"] == IMAGE).any())
            self.known[key] = (
                self.method.contrast(base[None, None], others, token)[0, 0] if combined else base
            )
        return self.known[key]

    def base(self, index: int, behind: torch.Tensor) -> torch.Tensor:
        """(V,) of a prompt as it is, and of what stands behind it."""
        row = self.rows[index]
        inputs = _longer(self.tiny, row, behind)
        if self.edit is None:
            return self._forward(inputs)
        with vlmfix.wrapped(self.tiny.model, self.edit):
            return self._forward(inputs, prompt_length=row["input_ids"].shape[1])

    def _forward(self, inputs: Inputs, **kwargs: Any) -> torch.Tensor:
        with torch.no_grad(), module_state(self.tiny.model):
            output = self.tiny.model(**inputs, **kwargs, use_cache=False)
        logits: torch.Tensor = output.logits[0, -1].float()
        return logits

    def _branches(self, row: Inputs) -> Sequence[Branch]:
        """What the method wants for one prompt alone."""
        ids = row["input_ids"]
        if not self.method.streams() or not (ids == IMAGE).any():
            return ()
        info = describe_model(self.tiny.model)
        seen = {}
        if watched := self.method.watched(info):
            maps = attention_maps(self.tiny.model, row)
            seen = {layer: maps[layer][:, :, -1].mean(1) for layer in watched}
        vision = {name: value for name, value in row.items() if name not in PER_POSITION}
        real = torch.ones_like(ids, dtype=torch.bool)
        return self.method.branches(Prompt(info, ids, real, ids == IMAGE, vision, seen))

    def _run(self, row: Inputs, branch: Branch, behind: torch.Tensor) -> torch.Tensor:
        if not branch.image:
            return self._forward(_longer(self.tiny, _without_image(self.tiny, row), behind))
        inputs = _longer(self.tiny, {**row, **(branch.vision or {})}, behind)
        with _at_the_decoder(self.tiny.model, branch):
            return self._forward(inputs)


class _Processor(LogitsProcessor):
    def __init__(self, oracle: Oracle, rows: tuple[int, ...]) -> None:
        self.oracle, self.rows = oracle, rows
        self.width = max(oracle.rows[row]["input_ids"].shape[1] for row in rows)

    def __call__(self, ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        # Beams and returned sequences of a prompt lie side by side.
        copies = len(ids) // len(self.rows)
        logits = [
            self.oracle.logits(self.rows[index // copies], row[self.width :])
            for index, row in enumerate(ids)
        ]
        # A beam search adds up log-probabilities, which are logits up to a constant.
        return torch.stack(logits).log_softmax(-1)


def _longer(tiny: TinyFamily, row: Inputs, behind: torch.Tensor) -> Inputs:
    """A prompt with more tokens behind it."""
    longer = dict(row)
    longer["input_ids"] = torch.cat([row["input_ids"], behind[None]], 1)
    longer["attention_mask"] = torch.ones_like(longer["input_ids"])
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in row:
            # PaliGemma's prompt is a prefix that sees ahead; type 1 begins what does not.
            kind = 1 if tiny.name == "paligemma" else 0
            longer[name] = torch.nn.functional.pad(row[name], (0, len(behind)), value=kind)
    if "cross_attention_mask" in row:  # what follows sees what the last token sees
        last = row["cross_attention_mask"][:, -1:].expand(-1, len(behind), -1, -1)
        longer["cross_attention_mask"] = torch.cat([row["cross_attention_mask"], last], 1)
    return longer


def _without_image(tiny: TinyFamily, row: Inputs) -> Inputs:
    """The text of a prompt, without the tokens that open and close its image if they are known."""
    config = vars(tiny.model.config)
    known = {value for name, value in config.items() if "token" in name and type(value) is int}
    gone = torch.tensor([IMAGE, *known.intersection(tiny.layout.before + tiny.layout.after)])
    keep = ~torch.isin(row["input_ids"][0], gone)
    text = {name: value[:, keep] for name, value in row.items() if name in PER_POSITION}
    for name in ("mm_token_type_ids", "cross_attention_mask"):  # of no use without an image
        text.pop(name, None)
    return text


def attention_maps(model: Any, row: Inputs) -> tuple[torch.Tensor, ...]:
    """Attention of every layer, (1, H, L, L), as transformers itself returns it."""
    before = model.config.get_text_config()._attn_implementation
    model.set_attn_implementation({"text_config": "eager"})
    try:
        with torch.no_grad(), module_state(model):
            output = model(**row, use_cache=False, output_attentions=True)
    finally:
        model.set_attn_implementation({"text_config": before})
    maps: tuple[torch.Tensor, ...] = getattr(output, "language_model_outputs", output).attentions
    return maps


@contextmanager
def _at_the_decoder(model: Any, branch: Branch) -> Iterator[None]:
    """Overwrite embeddings, and cut tokens out of the sequence, where it enters the decoder."""

    def edit(module: Any, args: Any, kwargs: Inputs) -> tuple[Any, Inputs]:
        return args, _edited(branch, kwargs)

    handle = model.get_decoder().register_forward_pre_hook(edit, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _edited(branch: Branch, kwargs: Inputs) -> Inputs:
    if branch.filled is None and branch.hidden is None:
        return kwargs
    embeddings = kwargs["inputs_embeds"].clone()
    total = embeddings.shape[1]
    filled = [] if branch.filled is None else branch.filled[0].nonzero().flatten().tolist()
    for column in filled:
        fill = branch.fill
        embeddings[0, column] = fill[0, column] if isinstance(fill, torch.Tensor) else fill
    hidden = [] if branch.hidden is None else branch.hidden[0].nonzero().flatten().tolist()
    keep = [column for column in range(total) if column not in hidden]
    positions = kwargs.get("position_ids")
    if positions is None:
        positions = torch.arange(total)[None]
    edited = {
        **kwargs,
        "inputs_embeds": embeddings[:, keep],
        "position_ids": positions[..., keep],
        "attention_mask": _cut(kwargs["attention_mask"], keep),
    }
    if kwargs.get("deepstack_visual_embeds") is not None:
        visual = kwargs["visual_pos_masks"]
        columns = visual[0].nonzero().flatten().tolist()
        features = [layer.clone() for layer in kwargs["deepstack_visual_embeds"]]
        for layer in features:
            for place, column in enumerate(columns):
                if column in filled:
                    layer[place] = 0
        stay = [place for place, column in enumerate(columns) if column in keep]
        edited["deepstack_visual_embeds"] = [layer[stay] for layer in features]
        edited["visual_pos_masks"] = visual[:, keep]
    return edited


def _cut(mask: Any, keep: list[int]) -> Any:
    """A mask of (1, L), (1, 1, L, L), or several by kind of layer, without some tokens."""
    if isinstance(mask, dict):
        return {kind: _cut(one, keep) for kind, one in mask.items()}
    return mask[..., keep] if mask.ndim == 2 else mask[:, :, keep][..., keep]
