"""Find the heads that write a concept: matching pursuit over the unembedding of its words.

"Head Pursuit: Probing Attention Specialization in Multimodal Transformers", NeurIPS 2025, arXiv
2510.21518. A head writes a concept if few word directions reconstruct what it adds to the residual
stream. This is the offline half; `vlmfix.methods.head_pursuit` edits the heads that were found.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch

from vlmfix.engine.session import SESSION
from vlmfix.errors import BadInput, StateError, UnsupportedModel
from vlmfix.families import ModelInfo, describe_model
from vlmfix.families.surgeon import module_state, real_tokens
from vlmfix.wrapper import suspended

__all__ = ["Pursuit", "RankedHead", "concept_tokens", "head_contributions", "pursue", "rank_heads"]

#: Names of the output projection in transformers' attention modules.
_PROJECTIONS = ("o_proj", "out_proj", "dense", "wo")


class Pursuit(NamedTuple):
    """The result of `pursue` in T = min(steps, words) steps.

    Attributes:
        atoms: (..., T) int64, rows of the dictionary in the order in which they were picked.
        explained: (..., T) share of the energy, 1 - ||R||^2 / ||H||^2, explained after each step.
    """

    atoms: torch.Tensor
    explained: torch.Tensor


class RankedHead(NamedTuple):
    """One query head (0-based), and the share of its output that the concept explains."""

    layer: int
    head: int
    explained: float


def pursue(heads: torch.Tensor, dictionary: torch.Tensor, steps: int = 50) -> Pursuit:
    """Simultaneous orthogonal matching pursuit: reconstruct all samples of a head from few atoms.

    Each step picks the atom whose correlations with the residuals, summed over samples without
    sign, are largest, and refits all samples on the atoms so far by least squares. The paper's
    text leaves open: samples are not centred here, atoms have unit norm.

    Args:
        heads: (..., n, d_model) contributions of each head to the residual stream in n samples.
        dictionary: (words, d_model) directions of the concept.
        steps: the most atoms to pick; the number of words bounds it, too.

    Raises:
        BadInput: no words, no steps, or widths that differ.
    """
    if not len(dictionary) or steps < 1 or heads.shape[-1] != dictionary.shape[-1]:
        raise BadInput(
            f"pursue got heads of width {heads.shape[-1]}, a dictionary of shape "
            f"{tuple(dictionary.shape)} and steps={steps}; give at least one word of the same "
            "width and at least one step."
        )
    atoms = torch.nn.functional.normalize(dictionary, dim=-1)
    tolerance = 100 * torch.finfo(heads.dtype).eps
    energy, residual = heads.square().sum((-2, -1)), heads
    basis = heads.new_zeros(*heads.shape[:-2], 0, heads.shape[-1])
    picked: list[torch.Tensor] = []
    explained: list[torch.Tensor] = []
    for _ in range(min(steps, len(atoms))):
        correlation = (residual @ atoms.mT).abs().sum(-2)
        if picked:
            correlation = correlation.scatter(-1, torch.stack(picked, -1), -1.0)
        picked.append(correlation.argmax(-1))
        # With an orthonormal basis of the atoms so far, the refit is one projection. It runs twice,
        # because one pass leaves rounding where an atom lies almost in their span.
        direction = atoms[picked[-1]][..., None, :]
        for _ in range(2):
            direction = direction - direction @ basis.mT @ basis
        norm = torch.linalg.vector_norm(direction, dim=-1, keepdim=True)
        direction = torch.where(norm > tolerance, direction / norm.clamp_min(tolerance), 0.0)
        basis = torch.cat([basis, direction], dim=-2)
        residual = residual - residual @ direction.mT @ direction
        left = residual.square().sum((-2, -1)) / energy
        explained.append(torch.where(energy > 0, 1 - left, 0.0))
    return Pursuit(torch.stack(picked, -1), torch.stack(explained, -1))


def concept_tokens(processor: Any, words: Sequence[str]) -> tuple[int, ...]:
    """Token ids of a concept: the first piece of "word" and of " word" that is not blank.

    Raises:
        BadInput: no word has a piece.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    found = set()
    for text in (prefix + word.strip() for word in words for prefix in ("", " ")):
        pieces = tokenizer(text, add_special_tokens=False)["input_ids"]
        found.update([piece for piece in pieces if tokenizer.decode([piece]).strip()][:1])
    if not found:
        raise BadInput(f"the words {list(words)} give no token of this tokenizer.")
    return tuple(sorted(found))


def head_contributions(
    model: torch.nn.Module, inputs: Mapping[str, Any]
) -> dict[int, torch.Tensor]:
    """Contributions of all heads to the residual stream (A_h W_h), averaged over image tokens.

    Args:
        model: a supported VLM in eval mode. Methods of a wrapped model do not run.
        inputs: keyword arguments of its forward, for a batch of prompts with images.

    Returns:
        {layer: (B, H, d_model) float32}, without the bias of the output projection.

    Raises:
        BadInput: no `input_ids`, or a sample without an image.
        UnsupportedModel: a model whose output projections were not found.
        StateError: a model in training mode.
    """
    info = describe_model(model)
    if model.training:
        raise StateError("the model is in training mode; call model.eval() first.")
    shares = _image_shares(info, inputs)
    means: dict[int, torch.Tensor] = {}
    projections = {layer: _projection(info, layer) for layer in info.attention}

    def keep(layer: int) -> Any:
        def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            outputs = args[0]  # (B, Q, H * D)
            mean = torch.einsum("bq,bqw->bw", shares.to(outputs.device), outputs.float())
            means[layer] = mean.to(outputs.dtype)

        return hook

    handles = [
        projection.register_forward_pre_hook(keep(layer))
        for layer, projection in projections.items()
    ]
    arguments = {name: value for name, value in inputs.items() if name != "labels"}
    plain = suspended(model) if SESSION in model.__dict__ else nullcontext()
    try:
        with plain, module_state(model), torch.no_grad():
            model(**{**arguments, "use_cache": False})
    finally:
        for handle in handles:
            handle.remove()
    with torch.no_grad():
        return {
            layer: _alone(projections[layer], mean, info.heads_of(layer))
            for layer, mean in means.items()
        }


def _image_shares(info: ModelInfo, inputs: Mapping[str, Any]) -> torch.Tensor:
    """(B, Q) weights that average over the visual tokens of each sample."""
    ids = inputs.get("input_ids")
    if not isinstance(ids, torch.Tensor):
        raise BadInput("head_contributions needs input_ids to find the image tokens.")
    visual = torch.isin(ids, ids.new_tensor(info.image_token_ids + info.video_token_ids))
    visual &= real_tokens(ids, inputs.get("attention_mask"))
    if not bool(visual.any(1).all()):
        raise BadInput("head_contributions averages over image tokens; give each sample an image.")
    return visual / visual.sum(1, keepdim=True)


def _projection(info: ModelInfo, layer: int) -> torch.nn.Module:
    module = info.attention[layer]
    for name, child in module.named_children():
        if name in _PROJECTIONS:
            return child
    raise UnsupportedModel(
        f"no output projection ({', '.join(_PROJECTIONS)}) in {type(module).__name__} of layer "
        f"{layer}, so the outputs of its heads cannot be separated."
    )


def _alone(projection: torch.nn.Module, mean: torch.Tensor, heads: int) -> torch.Tensor:
    """Head outputs (B, H * D) through the projection one head at a time: (B, H, d_model)."""
    outputs = mean.view(len(mean), 1, heads, -1)
    single = torch.eye(heads, dtype=mean.dtype, device=mean.device)[None, :, :, None]
    separate = (single * outputs).flatten(2)
    # Through the module, not its weight: that may be quantised.
    written: torch.Tensor = projection(separate).float()
    bias: torch.Tensor = projection(torch.zeros_like(mean[:1])).float()
    return written - bias


def rank_heads(
    model: torch.nn.Module,
    processor: Any,
    inputs: Iterable[Mapping[str, Any]],
    words: Sequence[str],
    *,
    steps: int = 50,
) -> list[RankedHead]:
    """Rank all heads of a model, those first that the words of a concept explain best.

    The paper edits the first 8, 16 or 32 of 1024:

        ranking = rank_heads(model, processor, batches, ["red", "green", "blue"])
        heads = head_names((head.layer, head.head) for head in ranking[:16])
        vlmfix.wrap(model, HeadPursuit(heads=heads, alpha=-1))

    Args:
        model: a supported VLM in eval mode.
        processor: its processor or tokenizer.
        inputs: batches of prompts with images, as for `head_contributions`; a few hundred images.
        words: the concept, e.g. colour names.
        steps: atoms per head, see `pursue`.

    Raises:
        BadInput: no batches, or inputs that `head_contributions` or `concept_tokens` refuses.
        UnsupportedModel: a model without an unembedding matrix.
    """
    tokens = concept_tokens(processor, words)
    unembedding = getattr(model.get_output_embeddings(), "weight", None)  # type: ignore[operator]
    if unembedding is None:
        raise UnsupportedModel(
            f"{type(model).__name__} has no output embeddings, which give words a direction."
        )
    dictionary = unembedding[list(tokens)].detach().float()
    collected: dict[int, list[torch.Tensor]] = {}
    for batch in inputs:
        for layer, written in head_contributions(model, batch).items():
            collected.setdefault(layer, []).append(written.to(dictionary.device))
    if not collected:
        raise BadInput("rank_heads got no inputs; give batches of prompts with images.")
    ranking = []
    for layer, parts in sorted(collected.items()):
        found = pursue(torch.cat(parts).transpose(0, 1), dictionary, steps)
        for head, explained in enumerate(found.explained[:, -1].tolist()):
            ranking.append(RankedHead(layer, head, explained))
    return sorted(ranking, key=lambda ranked: -ranked.explained)
