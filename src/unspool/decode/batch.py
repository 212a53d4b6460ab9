"""From work to the model's input: flat true tokens, their positions, and attention over the store."""

from __future__ import annotations

import torch
from torch import Tensor

from unspool.attention.registry import paged_attention
from unspool.cache.paged import PagedStore
from unspool.decode.sequence import Group, Work
from unspool.models.base import Batch, ModelSpec


def build_batch(
    work: list[Work],
    group: Group,
    store: PagedStore,
    spec: ModelSpec,
    device: torch.device,
    weights: list[list[Tensor]] | None = None,
    trace: list[Tensor] | None = None,
) -> Batch:
    """The model's input for one step; the store has already made room.

    The logits will come in the order of the rows' numbers, whatever the order of the work.

    Args:
        work: what to feed; a row whose tokens are still in flight feeds `group.last`.
        weights, trace: lists that collect attention weights and hidden states, when they are wanted.
    """
    rows = [item.seq for item in work]
    feeds = [item.feed for item in work]
    positions: list[int] = []
    for row, feed in zip(rows, feeds, strict=True):
        positions.extend(range(row.computed, row.computed + feed))
    if any(row.pending for row in rows):
        places = [row.row for row in rows]
        every = places == list(range(len(group.rows)))
        tokens = group.last if every else group.last[torch.tensor(places, device=device)]
    else:
        flat: list[int] = []
        for row, feed in zip(rows, feeds, strict=True):
            flat += row.tokens[row.computed : row.computed + feed]
        tokens = torch.tensor(flat, device=device)
    extents = None
    if spec.needs_extents:
        lengths = torch.tensor([row.known for row in rows], device=device)
        extents = lengths.repeat_interleave(torch.tensor(feeds, device=device))
    return Batch(
        tokens=tokens,
        positions=torch.tensor(positions, device=device),
        attend=paged_attention(store, rows, feeds, weights),
        keep=_kept(work, device),
        extents=extents,
        trace=trace,
    )


def _kept(work: list[Work], device: torch.device) -> Tensor | None:
    """Places of the tokens whose logits are wanted, by ascending row; `None` when it is all of them, in that order."""
    places: list[tuple[int, int]] = []
    end = 0
    for row, feed, keep in work:
        end += feed
        places.extend((row.row, place) for place in range(end - keep, end))
    places.sort()
    order = [place for _, place in places]
    if order == list(range(end)):
        return None
    return torch.tensor(order, dtype=torch.int64, device=device)
