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


def early_layers(asked: str | Items[int], layers: int, tied: bool) -> list[int]:
    """The layers that the last of `layers` may be contrasted with, by the number of what enters them.

    `"low"` and `"high"` are every other layer of the lower and upper half, or of the first and last 20 where there are
    more than 40. With a tied head, the embeddings are left out: they would give each token itself.

    Raises:
        ValueError: a number that the model has not.
    """
    first = 0 if not tied or layers == 1 else min(layers, 3) - 1
    if asked == "low":
        return list(range(first, layers // 2 if layers <= 40 else 20, 2)) or [first]
    if asked == "high":
        return list(range(layers // 2 if layers <= 40 else layers - 20, layers, 2))
    wrong = [layer for layer in asked if int(layer) >= layers]
    if wrong:
        raise ValueError(
            f"dola_layers={list(asked)!r} names layer {wrong[0]}; the model has {layers}, and those that the last one "
            f"can be contrasted with are 0 to {layers - 1}"
        )
    return [int(layer) for layer in asked]
