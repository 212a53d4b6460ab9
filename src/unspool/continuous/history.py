"""Tokens of live rows as tensors, kept only for rows in which somebody reads them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class History:
    """A table with a line for each place in the batch, which grows as rows do.

    Args:
        places: lines.
        device: where scores are.
    """

    def __init__(self, places: int, device: torch.device) -> None:
        self._ids = torch.zeros(places, 0, dtype=torch.int64, device=device)

    def write(self, place: int, tokens: list[int], begin: int = 0) -> None:
        """Put `tokens` into a line from column `begin` on."""
        self._widen(begin + len(tokens))
        self._ids[place, begin : begin + len(tokens)] = torch.tensor(tokens, device=self._ids.device)

    def append(self, places: list[int], columns: list[int], tokens: list[int]) -> None:
        """Put one token into each of some lines, each at its own column."""
        self._widen(max(columns) + 1)
        device = self._ids.device
        self._ids[torch.tensor(places, device=device), torch.tensor(columns, device=device)] = torch.tensor(
            tokens, device=device
        )

    def line(self, place: int, width: int) -> Tensor:
        """`[1, width]`, a row's tokens, in a copy that may be changed."""
        return self._ids[place : place + 1, :width].clone()

    def rectangle(self, places: Sequence[int], widths: Sequence[int], filler: int) -> Tensor:
        """`[rows, longest]`, filled up on the right."""
        device = self._ids.device
        longest = max(widths)
        ids = self._ids[torch.tensor(places, device=device), :longest]
        if min(widths) < longest:
            past = torch.arange(longest, device=device) >= torch.tensor(widths, device=device)[:, None]
            ids = ids.masked_fill(past, filler)
        return ids

    def _widen(self, width: int) -> None:
        have = self._ids.shape[1]
        if width > have:
            wider = self._ids.new_zeros(self._ids.shape[0], max(width, 2 * have, 256))
            wider[:, :have] = self._ids
            self._ids = wider
