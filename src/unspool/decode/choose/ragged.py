"""Greedy and multinomial choice for rows that do not advance in step, because drafts of theirs are checked.

A row with a draft of `k` tokens has `1 + k` rows of logits, and gets as many tokens as would have been chosen one by
one: the draft's as far as they agree, and one more.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence as Items
from itertools import pairwise

import torch
from torch import Tensor

from unspool.decode.choose.noise import Noise, SeededNoise
from unspool.decode.sequence import Choice, Sequence
from unspool.kernels.draw import draw
from unspool.logits import LogitsProcessorList
from unspool.logits.guidance import GuidanceLogitsProcessor
from unspool.logits.ops import greatest

Proposals = Callable[[Sequence], Tensor | None]
"""The distributions `[draft, vocab]` that a row's draft was drawn from; `None` where it was not drawn."""


class Columns:
    """What processors and criteria see of each row: its padded prompt and then its own tokens.

    Args:
        prompts: `[rows, columns]`, padding included.
        begin: how many of each row's tokens are its prompt's.
    """

    def __init__(self, prompts: Tensor, begin: Items[int]) -> None:
        self._prompts = prompts
        self._begin = begin

    def width(self, row: Sequence) -> int:
        """Columns of a row, its draft not counted."""
        return self._prompts.shape[1] + len(row.tokens) - self._begin[row.row]

    def ids(self, row: Sequence) -> Tensor:
        """`[width + draft]`, the draft last."""
        new = row.tokens[self._begin[row.row] :] + row.draft
        return torch.cat([self._prompts[row.row], torch.tensor(new, dtype=torch.int64, device=self._prompts.device)])


class RaggedChooser:
    """Greedy (`noise=None`) or multinomial choice, draft by draft; see `decode.sequence.Chooser`.

    With a seed, the noise of a position is the same whoever asks, so the draft model and the model that checks it pick
    the same token where they agree, and the text is the one that plain sampling with this seed gives. Without, drafts
    that come with their distributions are accepted with probability `p / q`, and the first rejected token is drawn from
    what is left of `p` (Leviathan et al., 2023, algorithm 1); other drafts are compared with draws from `p`. All three
    keep the distribution of plain sampling.

    Args:
        columns: what `process` sees.
        process: logits processors, or `None` when there are none.
        noise: where sampling noise comes from; `None` chooses greedily.
        guidance: takes all positions at once, before `process`; see `decode.choose.guided`.
        proposals: distributions of the drafts, or `None` when no draft has any.
        ensemble: drafts are accepted against this share of `p` and the rest of `q` (arXiv 2604.07622); `None` is exact.
        keep_scores, keep_logits: hand the processed scores, the raw logits of all positions on with the choice.
    """

    def __init__(
        self,
        columns: Columns,
        process: LogitsProcessorList | None,
        noise: Noise | None,
        *,
        guidance: GuidanceLogitsProcessor | None = None,
        proposals: Proposals | None = None,
        ensemble: float | None = None,
        keep_scores: bool = False,
        keep_logits: bool = False,
    ) -> None:
        self._columns = columns
        self._process = process
        self._noise = noise
        self._guidance = guidance
        self._proposals = proposals
        self._ensemble = ensemble
        self._keep_scores = keep_scores
        self._keep_logits = keep_logits

    def choose(self, logits: Tensor, rows: Items[Sequence]) -> Choice:
        """Decide what follows each of `rows`; see `Chooser`."""
        # the greatest of logits is at the same place in any dtype: nothing is converted for it alone
        changed = self._process is not None or self._guidance is not None
        plain = self._noise is None and not changed and self._ensemble is None
        scores = logits if plain and not self._keep_scores and not self._keep_logits else logits.float()
        raw = (scores.clone() if changed else scores) if self._keep_logits else None
        if self._guidance is not None:
            scores = self._guidance(torch.empty(scores.shape[0], 0), scores)
        if self._process is not None:
            scores = self._processed(scores, rows, self._process)
        tokens: list[int] = []
        counts: list[int] = []
        for some in self._chosen(scores, rows):
            tokens += some
            counts.append(len(some))
        return Choice(
            torch.tensor(tokens, dtype=torch.int64, device=logits.device),
            scores if self._keep_scores else None,
            raw,
            counts=counts,
        )

    def _chosen(self, scores: Tensor, rows: Items[Sequence]) -> list[list[int]]:
        """Each row's tokens."""
        drawn = [None if self._proposals is None or not row.draft else self._proposals(row) for row in rows]
        if isinstance(self._noise, SeededNoise) or all(q is None for q in drawn):
            return [_agreed(some, row.draft) for some, row in zip(self._independent(scores, rows), rows, strict=True)]
        parts = torch.split(scores, [1 + len(row.draft) for row in rows])
        return [
            self._against(part, row, q) if q is not None else _agreed(self._independent(part, [row])[0], row.draft)
            for part, row, q in zip(parts, rows, drawn, strict=True)
        ]

    def _independent(self, scores: Tensor, rows: Items[Sequence]) -> list[list[int]]:
        """What each position of each row would choose, -1 where there is nothing to choose."""
        if self._noise is None:
            tokens = greatest(scores)
        else:
            tokens = self._noise.draw_ahead(scores.softmax(dim=-1), rows)
        flat: list[int] = tokens.tolist()
        ends = [0]
        for row in rows:
            ends.append(ends[-1] + 1 + len(row.draft))
        return [flat[begin:end] for begin, end in pairwise(ends)]

    def _against(self, scores: Tensor, row: Sequence, q: Tensor) -> list[int]:
        """Check a draft against the distributions `q` `[draft, vocab]` it was drawn from."""
        draft = torch.tensor(row.draft, device=scores.device)[:, None]
        p = scores.softmax(dim=-1)
        if self._noise is None:
            assert self._ensemble is not None, "greedy drafts need no distributions otherwise"
            mixed = self._ensemble * p[:-1] + (1.0 - self._ensemble) * q
            return _agreed(torch.cat([mixed, p[-1:]]).argmax(dim=-1).tolist(), row.draft)
        if not bool(p.isfinite().all()):
            return [-1]
        ratio = p[:-1].gather(1, draft)[:, 0] / q.gather(1, draft)[:, 0]
        if self._ensemble is not None:
            ratio = 1.0 - self._ensemble + self._ensemble * ratio
        accepted = torch.rand_like(ratio) <= ratio
        count = int(accepted.int().cumprod(0).sum())
        rest = p[count]
        if count < len(row.draft):
            rest = (rest - q[count]).clamp_min(0)
            total = rest.sum()
            negligible = bool(total <= torch.finfo(p.dtype).tiny)
            rest = p[count] if negligible else rest / total
        return [*row.draft[:count], int(draw(rest[None]))]

    def _processed(self, scores: Tensor, rows: Items[Sequence], process: LogitsProcessorList) -> Tensor:
        """Run the processors on all positions, those of one width together; on all at once where no one looks at it."""
        if not process.reads_width:
            each = [row.row for row in rows for _ in range(1 + len(row.draft))]
            ids = torch.empty(len(each), 0, dtype=torch.int64, device=scores.device)
            return process.on_rows(ids, scores, torch.tensor(each, device=scores.device))
        by_width: defaultdict[int, list[tuple[int, int, Tensor]]] = defaultdict(list)
        place = 0
        for row in rows:
            ids, width = self._columns.ids(row), self._columns.width(row)
            for i in range(1 + len(row.draft)):
                by_width[width + i].append((place + i, row.row, ids[: width + i]))
            place += 1 + len(row.draft)
        out = torch.empty_like(scores)
        for items in by_width.values():
            places = torch.tensor([item[0] for item in items], device=scores.device)
            numbers = torch.tensor([item[1] for item in items], device=scores.device)
            out[places] = process.on_rows(torch.stack([item[2] for item in items]), scores[places], numbers)
        return out


def _agreed(chosen: list[int], draft: list[int]) -> list[int]:
    """The chosen tokens up to and including the first that is not the draft's."""
    count = next((i for i, token in enumerate(draft) if chosen[i] != token), len(draft))
    return chosen[: count + 1]
