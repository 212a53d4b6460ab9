"""From work to the model's input: flat true tokens, their positions, and attention over the store."""

from __future__ import annotations

from collections.abc import Sequence as Items
from itertools import accumulate

import torch
from torch import Tensor

from unspool.attention.native import NativeAttention
from unspool.attention.registry import paged_attention
from unspool.cache.paged import PagedStore
from unspool.decode.sequence import Group, Work
from unspool.models.adapters import Mixer
from unspool.models.base import Batch, ModelSpec


def build_batch(
    work: list[Work],
    order: Items[int],
    store: PagedStore,
    spec: ModelSpec,
    device: torch.device,
    mixer: Mixer,
    weights: list[list[Tensor]] | None = None,
    trace: list[Tensor] | None = None,
) -> Batch:
    """The model's input for one step; the store has already made room.

    Args:
        work: what to feed; a row whose tokens are still in flight feeds `group.last`.
        order: in which order to feed it; the logits come in the order of the work all the same.
        mixer: brings the rows' adapters together.
        weights, trace: lists that collect attention weights and hidden states, when they are wanted.
    """
    placed = [work[i] for i in order]
    rows = [item.seq for item in placed]
    feeds = [item.feed for item in placed]
    positions: list[int] = []
    for row, feed in zip(rows, feeds, strict=True):
        positions.extend(range(row.computed, row.computed + feed))
    extents = None
    if spec.needs_extents:
        known = [row.known for row, feed in zip(rows, feeds, strict=True) for _ in range(feed)]
        # a draft's tokens as if they had come one by one
        extents = torch.tensor([max(n, p + 1) for n, p in zip(known, positions, strict=True)], device=device)
    return Batch(
        tokens=_tokens(placed, device),
        positions=torch.tensor(positions, device=device),
        attend=paged_attention(store, rows, feeds, weights),
        keep=_kept(work, order, device),
        extents=extents,
        trace=trace,
        embeds=embeds_of(placed) if any(row.embeds is not None for row in rows) else None,
        adapters=mixer.select([row.adapter for row in rows], feeds, device),
    )


class Steady:
    """The batch of a step in which every row feeds one token, kept for the next one.

    While the same rows go on, a step differs from the one before in little: tokens are others, positions are one on,
    and few rows have another block.

    Args:
        work: of the step.
        batch: its batch.
    """

    def __init__(self, work: list[Work], batch: Batch) -> None:
        self._work = work
        self._batch = batch
        self._tables = [item.seq.blocks for item in work]

    @classmethod
    def of(cls, work: list[Work], batch: Batch) -> Steady | None:
        """`None` where the next batch must be made from the start in any case."""
        if any(part is not None for part in (batch.keep, batch.extents, batch.trace, batch.embeds)):
            return None
        if not isinstance(batch.attend, NativeAttention) or len(batch.tokens) != len(work):
            return None
        return cls(work, batch) if all(item.seq.embeds is None for item in work) else None

    def next(self, work: list[Work], device: torch.device) -> Batch | None:
        """The batch of the next step, where it has the same rows; else this is of no use any more."""
        if work != self._work:
            return None
        rows = [item.seq for item in work]
        positions = [row.computed for row in rows]
        tables, before = [row.blocks for row in rows], self._tables
        changed = [(i, rows[i]) for i, (new, old) in enumerate(zip(tables, before, strict=True)) if new is not old]
        attend, self._tables = self._batch.attend, tables
        assert isinstance(attend, NativeAttention)
        if not attend.advance([place + 1 for place in positions], changed):
            return None
        adapters = self._batch.adapters
        return Batch(_tokens(work, device), torch.tensor(positions, device=device), attend, adapters=adapters)


def _tokens(work: list[Work], device: torch.device) -> Tensor:
    """The same, short where every row feeds one known token."""
    if max([item.feed + item.seq.pending for item in work]) == 1:
        return torch.tensor([item.seq.tokens[item.seq.computed] for item in work], device=device)
    return tokens_of(work, device)


def tokens_of(work: list[Work], device: torch.device) -> Tensor:
    """The tokens to feed; those in flight are taken from where the device holds them."""
    flat: list[int] = []
    flying: dict[int, tuple[Group, list[int], list[int]]] = {}  # group, places among the tokens, numbers of the rows
    for row, feed, _, group in work:
        if row.pending:
            _, places, numbers = flying.setdefault(id(group), (group, [], []))
            places.append(len(flat))
            numbers.append(row.row)
            flat.append(0)
        elif row.draft:
            known = row.tokens[row.computed : row.computed + feed]
            begin = max(0, row.computed - len(row.tokens))
            flat += known + row.draft[begin : begin + feed - len(known)]
        else:
            flat += row.tokens[row.computed : row.computed + feed]
    if len(flying) == 1:
        group, places, numbers = next(iter(flying.values()))
        if len(places) == len(flat) and numbers == list(range(len(group.rows))):
            return group.last
    tokens = torch.tensor(flat, device=device)
    for group, places, numbers in flying.values():
        tokens[torch.tensor(places, device=device)] = group.last[torch.tensor(numbers, device=device)]
    return tokens


def embeds_of(work: list[Work]) -> tuple[Tensor, Tensor] | None:
    """Places and values of the fed tokens that have embeddings of their own."""
    places: list[int] = []
    values: list[Tensor] = []
    first = 0
    for row, feed, *_ in work:
        if row.embeds is not None:
            some = row.embeds[row.computed : row.computed + feed]
            places += range(first, first + len(some))
            values.append(some)
        first += feed
    if not places:
        return None
    joined = torch.cat(values)
    return torch.tensor(places, device=joined.device), joined


def _kept(work: list[Work], order: Items[int], device: torch.device) -> Tensor | None:
    """Places of the tokens whose logits are wanted, in the order of the work; `None` when it is all, in that order."""
    ends = [0] * len(work)
    for i, end in zip(order, accumulate(work[i].feed for i in order), strict=True):
        ends[i] = end
    kept = [place for end, item in zip(ends, work, strict=True) for place in range(end - item.keep, end)]
    if kept == list(range(sum(item.feed for item in work))):
        return None
    return torch.tensor(kept, dtype=torch.int64, device=device)
