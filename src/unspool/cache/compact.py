"""Keys and values in 8 bits: each head's vector of a token is scaled by its largest number.

The scale stands behind the vector in the same row of bytes, so that a pool of them is copied, shared and laid out like
any other.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCALE_BYTES = 4


def encode(x: Tensor) -> Tensor:
    """`[..., dim]` in int8, followed by the scale: `[..., dim + 4]`. Off by at most 1/254 of the largest number."""
    x = x.float()
    scale = x.abs().amax(dim=-1, keepdim=True).div_(127.0)
    whole = (x / scale.clamp_min(torch.finfo(torch.float32).tiny)).round_().to(torch.int8)
    return torch.cat([whole, scale.view(torch.int8)], dim=-1)


def decode(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """What `encode` took, `[..., dim]`, from `[..., dim + 4]`."""
    dim = rows.shape[-1] - SCALE_BYTES
    scale = rows[..., dim:].contiguous().view(torch.float32)
    return (rows[..., :dim].float() * scale).to(dtype)
