"""Where the noise comes from that tokens are drawn with: exponential, as `torch.multinomial` uses it."""

from __future__ import annotations

from collections.abc import Sequence as Items

import torch
from torch import Tensor

from unspool.decode.sequence import Sequence
from unspool.kernels.draw import draw, draw_seeded


class GlobalNoise:
    """Draws from torch's global generator as `torch.multinomial` would for the whole rectangle.

    The numbers a row gets depend on its place in the rectangle and not on which rows are still alive, so rows that
    ended need no logits to keep `torch.manual_seed` giving transformers' text.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self._rows = rows
        self._device = device

    def __call__(self, rows: Items[Sequence], vocab: int) -> Tensor:
        """Exponential noise `[len(rows), vocab]`."""
        noise = torch.empty(self._rows, vocab, dtype=torch.float32, device=self._device).exponential_(1)
        if len(rows) == self._rows:
            return noise
        return noise[torch.tensor([row.row for row in rows], device=self._device)]

    def draw(self, probs: Tensor, rows: Items[Sequence]) -> Tensor:
        """Tokens `[len(rows)]` drawn from `probs` `[len(rows), vocab]`, -1 where there is none; see `kernels.draw`."""
        places = None if len(rows) == self._rows else [row.row for row in rows]
        return draw(probs, places, self._rows)

    def draw_ahead(self, probs: Tensor, rows: Items[Sequence]) -> Tensor:
        """The same for rows with drafts: `1 + len(row.draft)` rows of `probs` for each."""
        return draw(probs)


class SeededNoise:
    """Draws from a generator keyed by (seed, sample, position): a prompt gets the same text in any company.

    Args:
        seed: the caller's.
        samples: rows that share a prompt, side by side; a row's place among them is its sample number.
        device: where the noise is made; each kind of device has numbers of its own.
        first: sample number of the first of them.
    """

    def __init__(self, seed: int, samples: int, device: torch.device, first: int = 0) -> None:
        self._seed = seed
        self._samples = samples
        self._first = first
        self._generator = torch.Generator(device=device)

    def __call__(self, rows: Items[Sequence], vocab: int) -> Tensor:
        """Exponential noise `[len(rows), vocab]`."""
        noise = torch.empty(len(rows), vocab, dtype=torch.float32, device=self._generator.device)
        for row, out in zip(rows, noise, strict=True):
            out.exponential_(1, generator=self._generator.manual_seed(self._key(row, row.known)))
        return noise

    def draw(self, probs: Tensor, rows: Items[Sequence]) -> Tensor:
        """Tokens `[len(rows)]` drawn from `probs` `[len(rows), vocab]`, -1 where there is none; see `kernels.draw`."""
        return draw_seeded(probs, [self._key(row, row.known) for row in rows], self._generator)

    def draw_ahead(self, probs: Tensor, rows: Items[Sequence]) -> Tensor:
        """The same for rows with drafts: `1 + len(row.draft)` rows of `probs` for each."""
        keys = [self._key(row, row.known + i) for row in rows for i in range(1 + len(row.draft))]
        return draw_seeded(probs, keys, self._generator)

    def _key(self, row: Sequence, position: int) -> int:
        return key(self._seed, self._first + row.row % self._samples, position)


def key(seed: int, sample: int, position: int) -> int:
    """A 63-bit key from (seed, sample, position), by the splitmix64 finaliser (Steele et al., 2014)."""
    mask = (1 << 64) - 1
    state = seed & mask
    for part in (sample, position):
        state = (state + 0x9E3779B97F4A7C15 + part) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state >> 1


Noise = GlobalNoise | SeededNoise
