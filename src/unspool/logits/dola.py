"""DoLa: scores of what the last layer knows beyond an earlier one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from unspool.logits.base import LogitsProcessor

__all__ = ["DolaLogitsProcessor", "contrast_layers"]

_RELATIVE_TOP = math.log(0.1)
"""Tokens less likely than a tenth of the likeliest are out: there the contrast says nothing."""


class DolaLogitsProcessor(LogitsProcessor):
    """Contrast with early layers' logits, which are computed beside the row's own; see `contrast_layers`.

    Attributes:
        premature: `[layers, rows, vocab]` logits that the early layers would give in this step; set before each call.
    """

    reads_history = False
    row_independent = True

    def __init__(self) -> None:
        self.premature: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Contrasted scores `[rows, vocab]`."""
        assert self.premature is not None, "the chooser gives them"
        return contrast_layers(scores, self.premature)


def contrast_layers(final: Tensor, premature: Tensor) -> Tensor:
    """Log probabilities of the last layer less those of the early layer that differs most from it, `[rows, vocab]`.

    Each row has its own early layer: the one with the largest Jensen-Shannon divergence from the last. Tokens less
    likely than a tenth of the likeliest get -inf.

    Args:
        final: `[rows, vocab]` fp32 logits of the last layer.
        premature: `[layers, rows, vocab]` logits of the early ones.

    Source: Chuang et al., 2023, https://arxiv.org/abs/2309.03883, in the arithmetic of transformers 4.
    """
    last = final.log_softmax(dim=-1)
    early = premature.float()
    if len(early) > 1:
        apart = torch.stack([_divergence(last, layer.log_softmax(dim=-1)) for layer in early])
        early = early[apart.argmax(dim=0), torch.arange(len(last), device=last.device)]
    else:
        early = early[0]
    unlikely = last < last.amax(dim=-1, keepdim=True) + _RELATIVE_TOP
    return (last - early.log_softmax(dim=-1)).masked_fill(unlikely, -torch.inf)


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """How far log probabilities `p` and `q` `[rows, vocab]` are from their mean, `[rows]`, up to a common factor."""
    mean = 0.5 * (p.exp() + q.exp())
    entropy: Tensor = torch.special.entr(mean)
    return (-2.0 * entropy - mean * (p + q)).mean(dim=-1)
