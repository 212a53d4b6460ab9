"""Tables with a row per token or position."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unspool.models.layers.packed import Packable, TableForm

__all__ = ["Embedding"]


class Embedding(Packable):
    """A table `[count, width]`. Its memory is not filled: weights come from a checkpoint or `registry.build`.

    A head that shares the table may pack it for both.

    (`torch.nn.Embedding` draws random numbers even where there is no memory yet, and for that imports the compiler.)
    """

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, width))

    def forward(self, indexes: Tensor) -> Tensor:
        """Rows `[n, width]` of `indexes` `[n]`."""
        if self._packed is not None:
            if not (torch.is_grad_enabled() and self.weight.requires_grad):
                return cast(TableForm, self._packed).rows(indexes)
            self.unpack()
        return F.embedding(indexes, self.weight)

    def extra_repr(self) -> str:
        """Size, for `print(model)`."""
        return f"{self.weight.shape[0]} x {self.weight.shape[1]}"
