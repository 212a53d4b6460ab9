"""Steps in parts of one shape: a token's bits depend on its row alone also where the compiled kernels do not fit.

PyTorch multiplies matrices in another order for another number of rows, so what a row gets depends, in its last bits,
on who is with it. Here every product has exactly `TOKENS` rows, filled up where there are fewer, and every query is
attended by itself. That each row of such a product gets the same bits, whatever the others hold, is not documented by
PyTorch; tests hold it to that.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

from unspool.attention.invariant import InvariantAttention
from unspool.attention.native import NativeAttention, serves
from unspool.decode.batch import embeds_of, tokens_of
from unspool.decode.runner import Output, PagedRunner
from unspool.decode.sequence import Want, Work
from unspool.models.adapters import Adapter
from unspool.models.base import Attend, Batch, Model, Trace

__all__ = ["TOKENS", "InvariantRunner", "head_of"]

TOKENS = 16
"""Tokens of a part. So many cost little more than one, since weights are read once for all of them."""


def head_of(model: Model, hidden: Tensor) -> Tensor:
    """Logits `[n, vocab]` of hidden states `[n, hidden]`, each the same bits whatever the others are."""
    if model.invariant:
        return model.head(hidden)
    parts = []
    for at in range(0, len(hidden), TOKENS):
        part = hidden[at : at + TOKENS]
        filled = torch.cat([part, part[-1:].expand(TOKENS - len(part), -1)])
        parts.append(model.head(filled)[: len(part)])
    return torch.cat(parts)


class InvariantRunner(PagedRunner):
    """See `PagedRunner`; steps that the kernels do not compute whole are in parts of `TOKENS` tokens of one adapter."""

    def run(self, work: list[Work], want: Want) -> Output:
        """See `Runner`; attention weights cannot be had where steps are in parts."""
        if self._whole and all(item.seq.adapter is None or item.seq.adapter.invariant for item in work):
            return super().run(work, want)
        assert not want.weights, "nobody here gives attention weights to callers"
        self._steady = None
        if self._rows is not None:
            for item in work:
                self._make_room(item.seq, item.feed, self._rows)
        begun = [item.seq.computed for item in work]
        logits: list[Tensor] = []
        hidden: list[list[Tensor]] = []
        kept: list[int] = []  # of each row of logits, the item of work
        fed: list[int] = []  # of each token, likewise
        try:
            for places, part in _parts(work):
                trace = Trace(want.layers) if want.layers is None or want.layers else None
                logits.append(self._run_part(part, trace))
                hidden.append(trace or [])
                for place, item in zip(places, part, strict=True):
                    kept += [place] * item.keep
                    fed += [place] * item.feed
                    item.seq.computed += item.feed
        finally:
            for item, computed in zip(work, begun, strict=True):
                item.seq.computed = computed
        layers = [_in_order(list(parts), fed) for parts in zip(*hidden, strict=True)]
        return Output(_in_order(logits, kept), [], layers)

    @cached_property
    def _whole(self) -> bool:
        """Whether the kernels compute all of a step, but for what adapters add."""
        with torch.no_grad():
            return isinstance(self.model, Model) and self.model.invariant and serves(self.store)

    def _run_part(self, part: list[Work], trace: Trace | None) -> Tensor:
        """Logits of the kept tokens of at most `TOKENS` tokens; the last one stands in the rows that are left."""
        rows, feeds = [item.seq for item in part], [item.feed for item in part]
        fed = [(row, row.computed + i) for row, feed in zip(rows, feeds, strict=True) for i in range(feed)]
        kept = [
            place for end, item in zip(accumulate(feeds), part, strict=True) for place in range(end - item.keep, end)
        ]
        extents = None
        if self.model.spec.needs_extents:
            extents = self._filled([max(row.known, place + 1) for row, place in fed])
        # the kernels answer each query by itself too
        attention = NativeAttention if serves(self.store) else InvariantAttention
        batch = Batch(
            tokens=self._filled(tokens_of(part, self.device).tolist()),
            positions=self._filled([place for _, place in fed]),
            attend=_Filled(attention(self.store, rows, feeds), len(fed)),
            keep=self._filled(kept) if kept else torch.empty(0, dtype=torch.int64, device=self.device),
            extents=extents,
            trace=trace,
            embeds=embeds_of(part) if any(row.embeds is not None for row in rows) else None,
            adapters=self._mixer.select([rows[0].adapter], [TOKENS], self.device),
        )
        logits = self.model.step(batch)
        if trace is not None:
            trace[:] = [state[: len(fed)] for state in trace]
        return logits[: len(kept)]

    def _filled(self, values: list[int]) -> Tensor:
        """`[TOKENS]` values, the last one again and again behind them."""
        return torch.tensor(values + values[-1:] * (TOKENS - len(values)), device=self.device)


class _Filled:
    """Attention for the first `count` tokens of a step; those behind are filler, of which nothing is stored."""

    def __init__(self, attend: Attend, count: int) -> None:
        self._attend = attend
        self._count = count

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None = None
    ) -> Tensor:
        """See `models.base.Attend`."""
        count, filler = self._count, len(q) - self._count
        if not filler:
            return self._attend(layer, q, k, v, scale, softcap)
        return F.pad(self._attend(layer, q[:count], k[:count], v[:count], scale, softcap), (0, 0, 0, filler))


def _parts(work: list[Work]) -> Iterator[tuple[list[int], list[Work]]]:
    """Cut work into parts of at most `TOKENS` tokens of one adapter: places among `work`, and the pieces there."""
    adapters: dict[Adapter | None, list[int]] = {}
    for place, item in enumerate(work):
        adapters.setdefault(item.seq.adapter, []).append(place)
    for mine in adapters.values():
        places: list[int] = []
        part: list[Work] = []
        room = TOKENS
        for place in mine:
            left = work[place].feed
            while left:
                feed = min(left, room)
                left, room = left - feed, room - feed
                places.append(place)
                # the last `keep` tokens of the item are kept, as far as they are in this piece
                part.append(work[place]._replace(feed=feed, keep=min(feed, max(0, work[place].keep - left))))
                if not room:
                    yield places, part
                    places, part, room = [], [], TOKENS
        if part:
            yield places, part


def _in_order(parts: list[Tensor], owners: list[int]) -> Tensor:
    """Rows of `parts`, one below the other, by ascending owner."""
    whole = torch.cat(parts)
    if len(whole) != len(owners) or owners == sorted(owners):  # or a layer that nobody wants, which is empty
        return whole
    return whole[torch.tensor(sorted(range(len(owners)), key=owners.__getitem__), device=whole.device)]
