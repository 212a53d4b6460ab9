"""Tables with a row per token or position."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Embedding"]


class Embedding(nn.Module):
    """A table `[count, width]`. Its memory is not filled: weights come from a checkpoint or `registry.build`.

    (`torch.nn.Embedding` draws random numbers even where there is no memory yet, and for that imports the compiler.)
    """

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, width))

    def forward(self, indexes: Tensor) -> Tensor:
        """Rows `[n, width]` of `indexes` `[n]`."""
        return F.embedding(indexes, self.weight)

    def extra_repr(self) -> str:
        """Size, for `print(model)`."""
        return f"{self.weight.shape[0]} x {self.weight.shape[1]}"
