"""Scores of the chosen tokens, recomputed from what a call recorded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def compute_transition_scores(
    sequences: Tensor,
    scores: Sequence[Tensor],
    beam_indices: Tensor | None = None,
    normalize_logits: bool = False,
) -> Tensor:
    """Score of each generated token, `[rows, new tokens]`.

    Args:
        sequences: `[rows, columns]`, prompts included.
        scores: per step, `[rows, vocab]` (or `[rows * beams, vocab]`).
        beam_indices: `[rows, generated columns]` row of `scores` that each token came from, -1 past a row's end;
            without it every token came from its own row.
        normalize_logits: take the log-softmax of each step's scores first.

    Raises:
        ValueError: more score steps than columns (a beam search may have gone on after its best outputs ended, so with
            `beam_indices` there may be), or none at all.

    Source: `compute_transition_scores` of transformers.
    """
    if not scores or (beam_indices is None and len(scores) > sequences.shape[1]):
        raise ValueError(
            f"scores has {len(scores)} steps for sequences of {sequences.shape[1]} columns; pass `outputs.scores` of "
            "the call that made `sequences` (it needs output_scores=True and return_dict_in_generate=True)"
        )
    by_step = torch.stack(tuple(scores)).float()  # [steps, rows, vocab]
    if normalize_logits:
        by_step = by_step.log_softmax(dim=-1)
    if beam_indices is None:
        origin = torch.arange(by_step.shape[1], device=sequences.device)[:, None].expand(-1, len(scores))
        ended = torch.zeros_like(origin, dtype=torch.bool)
        begin = sequences.shape[1] - len(scores)
    else:
        begin = sequences.shape[1] - beam_indices.shape[1]
        steps = int((beam_indices >= 0).sum(dim=1).max())
        origin = beam_indices[:, :steps].long()
        ended = origin < 0
        origin = origin.clamp_min(0)
    steps = origin.shape[1]
    tokens = sequences[:, begin : begin + steps].masked_fill(ended, 0)
    picked = by_step[torch.arange(steps, device=sequences.device), origin, tokens]
    return picked.masked_fill(ended, 0.0)
