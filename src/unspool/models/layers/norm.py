"""Root mean square normalisation (Zhang and Sennrich, 2019)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unspool.kernels.elementwise import add_rms_norm, rms_norm
from unspool.models.layers.watched import Watched

__all__ = ["RMSNorm"]


class RMSNorm(Watched):
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
        return rms_norm(x, self.weight, self.eps)

    def of_sum(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        """`x + branch` and its norm; the sum is written over `branch` where no gradient needs it."""
        return add_rms_norm(x, branch, self.weight, self.eps)

    def extra_repr(self) -> str:
        """Width and epsilon, for `print(model)`."""
        return f"{self.weight.shape[0]}, eps={self.eps}"
