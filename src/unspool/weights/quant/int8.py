"""Eight bits: every output has one scale, which its largest weight takes up."""

from __future__ import annotations

import torch
from torch import Tensor

from unspool.models.layers.quantised import Codes

__all__ = ["encode"]


def encode(rows: Tensor) -> Codes:
    """Quantise `rows` `[n, in]` to the nearest of 255 steps (LLM.int8's for weights: Dettmers et al., 2022)."""
    rows = rows.float()
    scales = rows.abs().amax(dim=1, keepdim=True).div_(127)
    steps = rows / torch.where(scales > 0, scales, 1.0)
    return Codes(steps.round_().add_(128).to(torch.uint8), scales)
