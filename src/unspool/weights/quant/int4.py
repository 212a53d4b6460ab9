"""Four bits, evenly spaced: a group of inputs has a scale, and weights are -8 to 7 times it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from unspool.models.layers.quantised import Codes

__all__ = ["encode"]

# Parts of the scale that takes up the largest weight: a little less cuts that one off and is closer to the others.
_TRIED = (1.0, 0.93, 0.86)


def encode(rows: Tensor, group: int) -> Codes:
    """Quantise `rows` `[n, in]` in groups of `group` inputs, each with the scale of least squared error of a few."""
    count, inputs = rows.shape
    grouped = F.pad(rows.float(), (0, -inputs % group)).view(count, -1, group)
    # The largest weight becomes -8: that is one step more than 7.
    largest = grouped.gather(2, grouped.abs().argmax(dim=2, keepdim=True)) / -8
    best = steps = scales = None
    for part in _TRIED:
        scale = largest * part
        tried = (grouped / torch.where(scale != 0, scale, 1.0)).round_().clamp_(-8, 7)
        error = torch.addcmul(grouped, tried, scale, value=-1).square_().sum(dim=2, keepdim=True)
        if best is None or steps is None or scales is None:
            best, steps, scales = error, tried, scale
            continue
        better = error < best
        best, scales = torch.where(better, error, best), torch.where(better, scale, scales)
        steps = torch.where(better, tried, steps)
    assert steps is not None and scales is not None
    codes = steps.add_(8).to(torch.uint8).view(count, -1)[:, :inputs]
    return Codes(codes, scales[:, :, 0])
