"""From work to the model's input: flat true tokens, their positions, and attention over the store."""

from __future__ import annotations

from collections.abc import Sequence as Items
from itertools import accumulate

import torch
from torch import Tensor

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
        embeds=_embeds(placed) if any(row.embeds is not None for row in rows) else None,
        adapters=mixer.select([row.adapter for row in rows], feeds, device),
    )


def _tokens(work: list[Work], device: torch.device) -> Tensor:
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
            known = row.tokens[row.computed :]
            flat += known + row.draft[: feed - len(known)]
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


def _embeds(work: list[Work]) -> tuple[Tensor, Tensor] | None:
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
