"""Root mean square normalisation (Zhang and Sennrich, 2019)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["RMSNorm"]


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight` over the last axis, accumulated in fp32.

    Args:
        width: length of the last axis.
        eps: added to the mean square.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` `[..., width]`."""
        width = self.weight.shape[0]
        if x.numel() != width or x.dtype == torch.float32 or torch.is_grad_enabled() or x.device.type != "cpu":
            return F.rms_norm(x, (width,), self.weight, self.eps)
        # One row: the calls cost more than the numbers, and the layer norm of (x, -x), whose mean is 0, needs fewer.
        mirrored = F.layer_norm(torch.cat((x, x.neg()), dim=-1), (2 * width,), None, None, self.eps)
        return mirrored[..., :width] * self.weight

    def extra_repr(self) -> str:
        """Width and epsilon, for `print(model)`."""
        return f"{self.weight.shape[0]}, eps={self.eps}"
