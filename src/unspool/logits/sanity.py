"""Processors that repair or normalise scores."""

from __future__ import annotations

import torch
from torch import Tensor

from unspool.logits.base import LogitsProcessor


class InfNanRemoveLogitsProcessor(LogitsProcessor):
    """Replace NaN by 0, and infinities by the greatest and least finite value of the type."""

    reads_history = False
    reads_width = False
    row_independent = True

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores, all finite."""
        return torch.nan_to_num(scores, nan=0.0)


class LogitNormalization(LogitsProcessor):
    """Turn scores into log-probabilities, so that scores of different steps can be summed."""

    reads_history = False
    reads_width = False
    row_independent = True

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return `log_softmax` of the scores."""
        return scores.log_softmax(dim=-1)
