"""Top-p without sorting a vocabulary, alone and after top-k: bit for bit the filters of `ops`.

Nucleus filtering sorts the vocabulary, which costs milliseconds, although only some of the best tokens remain.

Alone, the best tokens and the sum of all say where the nucleus ends, but for rounding: a row whose end is so close to
another token's that rounding could decide, or lies among equals or beyond the best, is sorted in full (`top_p`).

After top-k only some fifty tokens can remain, and the survivors alone are sorted (`top_k_top_p`). Two things keep the
result exact:

* The softmax over the sorted row sums in vector lanes. A short row whose length is the same modulo the widest lane
  count, survivors at its end, adds the same numbers in the same lanes: leading zeros change nothing.
* Where a cut falls inside a group of equal scores, the order that the full sort gives them decides, so that row is
  sorted in full, for the order alone. Where more ties of the k-th score exist than were fetched, or scores are not
  finite, the row goes through the two filters.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from unspool.kernels.best import best as best_of
from unspool.logits import ops
from unspool.logits.ops import NEG_INF, Parameter, top_k

__all__ = ["top_k_top_p", "top_p"]

LANES = 64
"""A multiple of every CPU vector's float count."""

SPARE = 64
"""Tokens fetched past k, so that ties of the k-th score are all seen."""

NUCLEUS = 1024
"""Best tokens among which a nucleus is looked for."""

ROUNDING = 1e-5
"""More than sums of a vocabulary's probabilities in fp32 can be off."""


def top_p(scores: Tensor, p: Parameter, *, filter_value: float = NEG_INF, min_keep: int = 1) -> Tensor:
    """`ops.top_p`, with the same bits.

    Args:
        scores: `[rows, vocab]`. The short way is taken for wide rows of float32 on a CPU, where there are compiled
            kernels.
        p, filter_value, min_keep: see there.
    """
    found = best_of(scores, NUCLEUS) if scores.shape[-1] >= 8 * NUCLEUS and min_keep < NUCLEUS else None
    if found is None:
        return ops.top_p(scores, p, filter_value=filter_value, min_keep=min_keep)
    best, index = found
    chances = (best - scores.logsumexp(dim=-1, keepdim=True)).double().exp()
    better = chances.cumsum(dim=-1) - chances  # what all before a token come to
    limit = p.double().unsqueeze(-1) if isinstance(p, Tensor) else p
    kept = better < limit
    unsure = kept[:, -1] | ((better - limit).abs() <= ROUNDING).any(dim=-1) | ~better[:, -1].isfinite()
    kept[:, :min_keep] = True
    unsure |= (kept[:, :-1] & ~kept[:, 1:] & (best[:, :-1] == best[:, 1:])).any(dim=-1)
    out = torch.full_like(scores, filter_value).scatter_(1, index, best.masked_fill(~kept, filter_value))
    for row in _rows(unsure):
        own = p[row] if isinstance(p, Tensor) else p
        out[row] = ops.top_p(scores[row], own, filter_value=filter_value, min_keep=min_keep)
    return out


def top_k_top_p(scores: Tensor, k: int, p: Parameter, *, min_keep: int = 1) -> Tensor:
    """`ops.top_p(ops.top_k(scores, k), p)`, with the same bits.

    Args:
        scores: `[rows, vocab]`. The short way is taken for float32 on a CPU; other tensors take the two filters.
        k: tokens that top-k keeps, at least 1.
        p: probability that top-p keeps, a number or a column `[rows]`.
        min_keep: best tokens that top-p never removes.
    """
    fetched = k + SPARE
    vocab = scores.shape[-1]
    if scores.device.type != "cpu" or scores.dtype is not torch.float32 or vocab < 8 * fetched:
        return ops.top_p(top_k(scores, k), p, min_keep=min_keep)
    best, index = best_of(scores, fetched) or torch.topk(scores, fetched)
    kth = best[:, k - 1 : k]
    survivors = torch.where(best >= kth, best, NEG_INF)
    removed = _outside_nucleus(survivors, vocab, p, min_keep)
    cut_in_ties = (removed[:, 1:] & ~removed[:, :-1] & (survivors[:, 1:] == survivors[:, :-1])).any(dim=-1)
    for row in _rows(cut_in_ties):
        index[row] = torch.sort(top_k(scores[row], k))[1][:, -fetched:].flip(-1)
    out = torch.full_like(scores, NEG_INF).scatter_(1, index, torch.where(removed, NEG_INF, survivors))
    ties_unseen = (best[:, -1] == kth[:, 0]) & (kth[:, 0] > NEG_INF)
    for row in _rows(ties_unseen | ~best[:, 0].isfinite()):
        out[row] = ops.top_p(top_k(scores[row], k), p[row] if isinstance(p, Tensor) else p, min_keep=min_keep)
    return out


def _rows(flags: Tensor) -> list[slice]:
    """The rows flagged in a CPU tensor, whose memory can be read without waiting for anything."""
    return [slice(row, row + 1) for row in flags.numpy().nonzero()[0].tolist()]


def _outside_nucleus(survivors: Tensor, vocab: int, p: Parameter, min_keep: int) -> Tensor:
    """Which of `survivors` `[rows, n]`, best first and padded with -inf, top-p removes."""
    fetched = survivors.shape[1]
    length = fetched + (vocab - fetched) % LANES
    ascending = F.pad(survivors.flip(-1), (length - fetched, 0), value=NEG_INF)
    limit = (1 - p).to(survivors.dtype).unsqueeze(-1) if isinstance(p, Tensor) else 1 - p
    removed = ascending.softmax(dim=-1).cumsum(dim=-1) <= limit
    removed[:, -min_keep:] = False
    return removed[:, length - fetched :].flip(-1)
