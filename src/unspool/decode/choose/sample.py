"""Greedy and multinomial choice for rows that advance in step."""

from __future__ import annotations

from collections.abc import Callable, Sequence as Items

import torch
from torch import Tensor

from unspool.decode.sequence import Choice, Sequence
from unspool.logits import LogitsProcessorList
from unspool.logits.ops import greatest

Noise = Callable[[Items[Sequence], int], Tensor]
"""`(rows, vocab) -> [rows, vocab]` of exponential noise."""


class Rectangle:
    """The padded columns that processors and criteria see: prompts filled on the left, outputs appended.

    Attributes:
        width: columns filled so far.
        filler: what stands in the columns of rows that ended.
    """

    def __init__(self, prompts: Tensor, capacity: int, filler: int) -> None:
        """`prompts` `[rows, columns]`; room for `capacity` columns; rows that ended are filled with `filler`."""
        self.width = prompts.shape[1]
        self.filler = filler
        self._ids = torch.full((prompts.shape[0], max(capacity, self.width)), filler, device=prompts.device)
        self._ids[:, : self.width] = prompts

    def ids(self, rows: Tensor | None = None) -> Tensor:
        """`[rows, width]`, a contiguous copy for the given row numbers, or for all."""
        ids = self._ids[:, : self.width]
        return ids.contiguous() if rows is None else ids[rows]

    def append(self, tokens: Tensor, rows: Tensor | None = None) -> None:
        """Add one column: `tokens` at the given row numbers (default all), the filler elsewhere."""
        if rows is None:
            self._ids[:, self.width] = tokens
        else:
            self._ids[rows, self.width] = tokens
        self.width += 1


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
        noise = torch.empty(self._rows, vocab, device=self._device).exponential_(1)
        if len(rows) == self._rows:
            return noise
        return noise[torch.tensor([row.row for row in rows], device=self._device)]

    def ahead(self, rows: Items[Sequence], vocab: int) -> Tensor:
        """The same for rows with drafts: `1 + len(row.draft)` rows of noise for each."""
        return torch.empty(sum(1 + len(row.draft) for row in rows), vocab, device=self._device).exponential_(1)


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
        return self._draw([(row, row.known) for row in rows], vocab)

    def ahead(self, rows: Items[Sequence], vocab: int) -> Tensor:
        """The same for rows with drafts: `1 + len(row.draft)` rows of noise for each."""
        return self._draw([(row, row.known + i) for row in rows for i in range(1 + len(row.draft))], vocab)

    def _draw(self, places: Items[tuple[Sequence, int]], vocab: int) -> Tensor:
        noise = torch.empty(len(places), vocab, device=self._generator.device)
        for (row, position), out in zip(places, noise, strict=True):
            self._generator.manual_seed(key(self._seed, self._first + row.row % self._samples, position))
            out.exponential_(1, generator=self._generator)
        return noise


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


class SampleChooser:
    """Greedy (`noise=None`) or multinomial choice.

    Sampling takes the largest of `p / e` with exponential noise `e`, which is what `torch.multinomial(p, 1)` computes,
    without its synchronisation with the host.

    Args:
        history: the columns that `process` sees; this chooser appends to them.
        process: logits processors, or `None` when there are none.
        reads_history: `process` needs the columns' contents.
        noise: where sampling noise comes from; `None` chooses greedily.
        keep_scores, keep_logits: hand the processed scores, the raw logits on with the choice.
    """

    def __init__(
        self,
        history: Rectangle,
        process: LogitsProcessorList | None,
        noise: Noise | None,
        *,
        keep_scores: bool = False,
        keep_logits: bool = False,
    ) -> None:
        self.history = history
        self._process = process
        self._noise = noise
        self._keep_scores = keep_scores
        self._keep_logits = keep_logits
        self._rows = history.ids().shape[0]

    def choose(self, logits: Tensor, rows: Items[Sequence]) -> Choice:
        """Decide one token for each of `rows` from `logits` `[rows, vocab]`; see `Chooser`."""
        places = None if len(rows) == self._rows else torch.tensor([row.row for row in rows], device=logits.device)
        # the greatest of logits is at the same place in any dtype: nothing is converted for it alone
        plain = self._noise is None and self._process is None and not self._keep_scores and not self._keep_logits
        scores = logits if plain else logits.float()
        raw = (scores.clone() if self._process else scores) if self._keep_logits else None
        if self._process is not None:
            ids = self.history.ids(places)
            scores = self._process(ids, scores) if places is None else self._process.on_rows(ids, scores, places)
        if self._noise is None:
            tokens = greatest(scores)
            fine = tokens >= 0
            tokens = tokens.clamp_min(0)
        else:
            ratio = scores.softmax(dim=-1).div_(self._noise(rows, scores.shape[1]))
            tokens = ratio.argmax(dim=-1)
            value = ratio.gather(1, tokens[:, None])[:, 0]
            fine = value.isfinite() & (value > 0)
        ended = [row.finish is not None for row in rows]
        if any(ended):
            tokens = tokens.masked_fill(torch.tensor(ended, device=tokens.device), self.history.filler)
        self.history.append(tokens, places)
        return Choice(tokens.where(fine, -1), scores if self._keep_scores else None, raw)
