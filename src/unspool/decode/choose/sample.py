"""Greedy and multinomial choice for rows that advance in step."""

from __future__ import annotations

from collections.abc import Sequence as Items

import torch
from torch import Tensor

from unspool.decode.choose.noise import Noise
from unspool.decode.sequence import Choice, Sequence
from unspool.logits import LogitsProcessorList
from unspool.logits.ops import greatest


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
        self._added: list[tuple[Tensor, Tensor | None]] = []

    def ids(self, rows: Tensor | None = None) -> Tensor:
        """`[rows, width]`, a contiguous copy for the given row numbers, or for all."""
        for column, (tokens, places) in enumerate(self._added, self.width - len(self._added)):
            if places is None:
                self._ids[:, column] = tokens
            else:
                self._ids[places, column] = tokens
        self._added.clear()
        ids = self._ids[:, : self.width]
        return ids.contiguous() if rows is None else ids[rows]

    def append(self, tokens: Tensor, rows: Tensor | None = None) -> None:
        """Add one column: `tokens` at the given row numbers (default all), the filler elsewhere."""
        self._added.append((tokens, rows))  # written when somebody looks, which few do
        self.width += 1


class SampleChooser:
    """Greedy (`noise=None`) or multinomial choice.

    Sampling takes the largest of `p / e` with exponential noise `e`, which is what `torch.multinomial(p, 1)` computes,
    without its synchronisation with the host.

    Args:
        history: the columns that `process` sees; this chooser appends to them.
        process: logits processors, or `None` when there are none.
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
        self._reads = process is not None and process.reads_width
        before = history.ids()
        self._rows, self._nothing = before.shape[0], before.new_empty(1, 0)

    def choose(self, logits: Tensor, rows: Items[Sequence]) -> Choice:
        """Decide one token for each of `rows` from `logits` `[rows, vocab]`; see `Chooser`."""
        places = None if len(rows) == self._rows else torch.tensor([row.row for row in rows], device=logits.device)
        # the greatest of logits is at the same place in any dtype: nothing is converted for it alone
        plain = self._noise is None and self._process is None and not self._keep_scores and not self._keep_logits
        scores = logits if plain else logits.float()
        raw = (scores.clone() if self._process else scores) if self._keep_logits else None
        if self._process is not None:
            ids = self.history.ids(places) if self._reads else self._nothing.expand(len(rows), 0)
            scores = self._process(ids, scores) if places is None else self._process.on_rows(ids, scores, places)
        if self._noise is None:
            found = greatest(scores)
        else:
            found = self._noise.draw(scores.softmax(dim=-1), rows)
        # A step on a CPU is committed, and refuses -1, before anything looks at its tokens.
        seen = found if found.device.type == "cpu" else found.clamp_min(0)
        ended = [row.finish is not None for row in rows]
        if any(ended):
            seen = seen.masked_fill(torch.tensor(ended, device=seen.device), self.history.filler)
        self.history.append(seen, places)
        tokens = seen if seen is found else seen.where(found >= 0, -1)
        return Choice(tokens, scores if self._keep_scores else None, raw)
