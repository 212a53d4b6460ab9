"""The likeliest tokens of each step, kept in place of whole distributions (`output_top_logprobs`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence as Items
from typing import NamedTuple

import torch
from torch import Tensor


class TopLogprobs(NamedTuple):
    """The `k` likeliest tokens of each generated position, by the distribution they were chosen from.

    Attributes:
        values: `[rows, new, k]` fp32 log probabilities, largest first; -inf past a row's end, and for tokens that
            cannot be chosen.
        ids: `[rows, new, k]` int64 token ids; -1 past a row's end.
    """

    values: Tensor
    ids: Tensor


class Tops:
    """What `output_top_logprobs` asked for, gathered while rows are decided.

    Args:
        number: tokens of each step; cut to the vocabulary.
        rows: of the call.
    """

    def __init__(self, number: int, rows: int) -> None:
        self._number = number
        self._steps: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(rows)]
        self._chosen: list[list[Tensor]] = [[] for _ in range(rows)]
        self._looked_at: list[dict[tuple[int, int], float]] = []

    def add(self, rows: Items[int], scores: Tensor, tokens: Tensor) -> None:
        """Take positions of the rows numbered `rows`, of which `tokens` `[positions]` were chosen.

        Args:
            rows: the row of each position; several of one row follow each other.
            scores: `[positions, vocab]` processed scores.
            tokens: negative where nothing could be chosen.
        """
        logprobs = self._add(rows, scores)
        for row, value in zip(rows, logprobs.gather(1, tokens.clamp_min(0)[:, None])[:, 0].unbind(), strict=True):
            self._chosen[row].append(value)

    def add_candidates(self, rows: Items[int], scores: Tensor, candidates: Tensor) -> None:
        """Take one step of beams, whose results may hold any of the `candidates`; see `Choice`."""
        values = self._add(rows, scores).flatten()[candidates].tolist()
        vocab = scores.shape[1]
        keys = ((rows[key // vocab], key % vocab) for key in candidates.tolist())
        self._looked_at.append(dict(zip(keys, values, strict=True)))

    def at(self, step: int, row: int, token: int) -> tuple[float, dict[int, float]]:
        """Of a `token` that a beam took after so many steps, chosen for `row`, and of the likeliest tokens there."""
        values, ids = self._steps[row][step]
        known = self._looked_at[step].get((row, token), float("nan"))
        return known, dict(zip(ids.tolist(), values.tolist(), strict=True))

    def _add(self, rows: Items[int], scores: Tensor) -> Tensor:
        logprobs = scores.float().log_softmax(dim=-1)
        values, ids = logprobs.topk(min(self._number, scores.shape[1]))
        for row, value, best in zip(rows, values.unbind(), ids.unbind(), strict=True):
            self._steps[row].append((value, best))
        return logprobs

    def result(self) -> tuple[TopLogprobs, Tensor]:
        """Of every row, and the log probability of each token `[rows, new]` (0 past a row's end)."""
        width = max(map(len, self._steps))
        chosen = [[*row, *[torch.zeros_like(self._chosen[0][0])] * (width - len(row))] for row in self._chosen]
        return self._stacked(self._steps, width), torch.stack([torch.stack(row) for row in chosen])

    def of_beams(self, tokens: Tensor, origins: Tensor) -> tuple[TopLogprobs, Tensor]:
        """Of outputs `[outputs, new]` whose tokens were chosen for the rows `origins`; see `result`."""
        rows: list[list[tuple[Tensor, Tensor]]] = []
        chosen = torch.zeros(tokens.shape, dtype=torch.float32, device=tokens.device)
        for output, (mine, beams) in enumerate(zip(tokens.tolist(), origins.tolist(), strict=True)):
            length = sum(beam >= 0 for beam in beams)
            rows.append([self._steps[beam][step] for step, beam in enumerate(beams[:length])])
            known = (self._looked_at[i].get((beams[i], mine[i]), float("nan")) for i in range(length))
            chosen[output, :length] = chosen.new_tensor(list(known))
        return self._stacked(rows, tokens.shape[1]), chosen

    def _stacked(self, rows: Iterable[list[tuple[Tensor, Tensor]]], width: int) -> TopLogprobs:
        first = next(step for row in self._steps for step in row)
        nothing = (torch.full_like(first[0], float("-inf")), torch.full_like(first[1], -1))
        filled = [[*row, *[nothing] * (width - len(row))] for row in rows]
        return TopLogprobs(
            torch.stack([torch.stack([value for value, _ in row]) for row in filled]),
            torch.stack([torch.stack([ids for _, ids in row]) for row in filled]),
        )


def told_logprobs(scores: Tensor, tokens: Tensor, numbers: Items[int]) -> list[tuple[float, dict[int, float]]]:
    """Log probabilities of each position's token, and of its so many likeliest ones by their ids.

    Args:
        scores: `[positions, vocab]`.
        tokens: `[positions]`.
        numbers: for each position.
    """
    logprobs = scores.log_softmax(dim=-1)
    chosen: list[float] = logprobs.gather(1, tokens[:, None])[:, 0].tolist()
    most = min(max(numbers), logprobs.shape[1])
    if not most:
        return [(value, {}) for value in chosen]
    values, ids = logprobs.topk(most)
    told: list[tuple[float, dict[int, float]]] = []
    for value, best, names, number in zip(chosen, values.tolist(), ids.tolist(), numbers, strict=True):
        told.append((value, dict(zip(names[:number], best[:number], strict=True))))
    return told
