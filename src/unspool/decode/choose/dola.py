"""Greedy and multinomial choice on the contrast between layers (DoLa)."""

from __future__ import annotations

from collections.abc import Callable, Sequence as Items
from itertools import accumulate

import torch
from torch import Tensor

from unspool.decode.sequence import Choice, Chooser, Sequence, Want, Watch, Work
from unspool.logits.dola import DolaLogitsProcessor


class DolaChooser:
    """Lets a chooser decide, whose processors begin with a contrast; see `decode.sequence.Chooser`.

    It is its group's watch too, and computes the early layers' logits of the tokens that choose, and no others.

    Args:
        inner: decides.
        contrast: gets the early layers' logits.
        layers: the early layers, by the number of the hidden states that enter them.
        head: logits `[n, vocab]` of hidden states `[n, hidden]`.
        copies: rows that share a prompt, of which the first alone may have been fed.
        watch: another watch of the group's, or `None`.
    """

    def __init__(
        self,
        inner: Chooser,
        contrast: DolaLogitsProcessor,
        layers: Items[int],
        head: Callable[[Tensor], Tensor],
        copies: int,
        watch: Watch | None,
    ) -> None:
        self._inner = inner
        self._contrast = contrast
        self._layers = layers
        self._head = head
        self._copies = copies
        self._watch = watch
        self._fed: dict[int, int] = {}  # numbers of the rows that choose, and their places
        self._hidden = torch.empty(0)  # [layers, those rows, hidden]

    @property
    def want(self) -> Want:
        """See `Watch`."""
        own = Want(layers=frozenset(self._layers))
        return own if self._watch is None else own | self._watch.want

    def __call__(self, work: list[Work], weights: list[list[Tensor]], hidden: list[Tensor]) -> None:
        """See `Watch`."""
        if self._watch is not None:
            self._watch(work, weights, hidden)
        ends = accumulate(item.feed for item in work)
        kept = [(item.seq.row, end - 1) for item, end in zip(work, ends, strict=True) if item.keep]
        self._fed = {row: place for place, (row, _) in enumerate(kept)}
        index = torch.tensor([end for _, end in kept], dtype=torch.int64, device=hidden[-1].device)
        self._hidden = torch.stack([hidden[layer].index_select(0, index) for layer in self._layers])

    def choose(self, logits: Tensor, rows: Items[Sequence]) -> Choice:
        """See `Chooser`."""
        premature = self._head(self._hidden.flatten(0, 1)).view(*self._hidden.shape[:2], -1)
        places = [self._fed.get(row.row, self._fed.get(row.row - row.row % self._copies)) for row in rows]
        if places != list(range(len(self._fed))):
            premature = premature[:, torch.tensor(places, device=premature.device)]
        self._contrast.premature = premature
        return self._inner.choose(logits, rows)
