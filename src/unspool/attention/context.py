"""What attention must know of one step: where new keys and values go, and where each row's past lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from unspool.cache.blocks import GONE, run_start
from unspool.cache.layout import LayerGroup


class Span(Protocol):
    """One row of the step, as attention sees it."""

    computed: int
    blocks: list[list[int]]


@dataclass(slots=True)
class Single:
    """Consecutive rows with one query each, answered by one call over a rectangle of stored tokens.

    Attributes:
        first, count: the rows' place among the step's tokens.
        start, stride: slot of the first row's oldest token read, and slots from row to row, when the rows' blocks lie
            as equal strides in the pool; `slots` is then `None`.
        slots: `[count * length]` where to gather from otherwise.
        length: width of the rectangle.
        seen: per row, first and one past the last place in the rectangle that it may look at.
        mask: `[count, length]` added to the scores, 0 where a row may look and -inf elsewhere; `None` when every row
            sees all of the rectangle.
    """

    first: int
    count: int
    start: int
    stride: int
    slots: Tensor | None
    length: int
    seen: list[tuple[int, int]]
    mask: Tensor | None


@dataclass(slots=True)
class Multi:
    """One row with several queries (a prompt, a chunk of one, or a draft to verify).

    Attributes:
        first, count: the row's place among the step's tokens.
        start: slot of the oldest token read when its blocks are one run, else -1.
        slots: `[length]` where to gather from otherwise.
        length: tokens read, the new ones included.
        mask: `[count, length]` added to the scores, 0 where a query may look and -inf elsewhere; `None` when plain
            causal masking over exactly the new tokens says the same.
    """

    first: int
    count: int
    start: int
    slots: Tensor | None
    length: int
    mask: Tensor | None


@dataclass(slots=True)
class GroupContext:
    """One layer group's share of a step.

    Attributes:
        slots: `[tokens]` where each new token's key and value is written.
        run: the first of them when they are consecutive, else -1; lets the write be a plain slice.
        parts: the reads, in the order of the step's tokens.
    """

    slots: Tensor
    run: int
    parts: list[Single | Multi]


# A rectangle may hold this many slots that no row looks at before it is worth a call of its own to the kernel.
_WASTE = 512


def build_context(
    group: LayerGroup,
    index: int,
    rows: Sequence[Span],
    feeds: Sequence[int],
    block_size: int,
    like: Tensor,
) -> GroupContext:
    """Describe one step for layer group number `index`: row `i` gets `feeds[i]` new tokens after its `computed`.

    Masks get the dtype, and everything the device, of `like`.
    """
    starts = [run_start(row.blocks[index]) for row in rows]
    slots: list[int] = []
    parts: list[Single | Multi] = []
    pending: list[int] = []
    first = 0
    for i, (row, feed) in enumerate(zip(rows, feeds, strict=True)):
        start = starts[i]
        if start is not None:
            slots.extend(range(start * block_size + row.computed, start * block_size + row.computed + feed))
        else:
            table = row.blocks[index]
            slots.extend(
                table[p // block_size] * block_size + p % block_size for p in range(row.computed, row.computed + feed)
            )
        if feed == 1:
            pending.append(i)
        else:
            parts += _singles(group, index, rows, starts, pending, first, block_size, like)
            pending = []
            parts.append(_multi(group, row.blocks[index], row.computed, feed, first, block_size, like))
        first += feed
    parts += _singles(group, index, rows, starts, pending, first, block_size, like)
    run = slots[0] if slots[-1] - slots[0] == len(slots) - 1 and slots == list(range(slots[0], slots[-1] + 1)) else -1
    return GroupContext(torch.tensor(slots, device=like.device), run, parts)


def _singles(
    group: LayerGroup,
    index: int,
    rows: Sequence[Span],
    starts: Sequence[int | None],
    pending: Sequence[int],
    end: int,
    block_size: int,
    like: Tensor,
) -> list[Single]:
    """Cut rows with one query each, whose tokens end before place `end`, into rectangles with little waste."""
    parts: list[Single] = []
    first = end - len(pending)
    at = 0
    while at < len(pending):
        members = [pending[at]]
        lengths = [rows[pending[at]].computed + 1]
        waste, stride = 0, 0
        for i in pending[at + 1 :]:
            length = rows[i].computed + 1
            longest = max(max(lengths), length)
            waste = sum(longest - other for other in lengths) + longest - length
            before, here = starts[members[-1]], starts[i]
            if before is None or here is None:
                step, joins = 0, before is None and here is None
            else:  # every row's own blocks must cover the rectangle: nobody reads what is another's, or past the end
                step = (here - before) * block_size
                joins = step > 0 and stride in (0, step) and len(rows[i].blocks[index]) * block_size >= longest
            if waste > _WASTE or not joins:
                break
            stride = step
            members.append(i)
            lengths.append(length)
        parts.append(_single(group, index, [rows[i] for i in members], lengths, starts[members[0]], stride,
                             first + at, block_size, like))  # fmt: skip
        at += len(members)
    return parts


def _single(
    group: LayerGroup,
    index: int,
    rows: Sequence[Span],
    lengths: list[int],
    start: int | None,
    stride: int,
    first: int,
    block_size: int,
    like: Tensor,
) -> Single:
    begins = [group.first_seen(length - 1) for length in lengths]
    low, high = min(begins), max(lengths)
    mask = None
    if any(length != high or begin != low for length, begin in zip(lengths, begins, strict=True)):
        places = torch.arange(low, high, device=like.device)
        ends = torch.tensor(lengths, device=like.device)[:, None]
        mask = _additive((places < ends) & (places >= torch.tensor(begins, device=like.device)[:, None]), like)
    seen = [(begin - low, length - low) for begin, length in zip(begins, lengths, strict=True)]
    if start is not None:
        return Single(first, len(rows), start * block_size + low, stride, None, high - low, seen, mask)
    first_block = low // block_size
    width = -(-high // block_size) - first_block
    tables = torch.tensor([_filled(row.blocks[index][first_block:], width) for row in rows], device=like.device)
    places = torch.arange(low, high, device=like.device)
    slots = (tables[:, places // block_size - first_block] * block_size + places % block_size).flatten()
    return Single(first, len(rows), 0, 0, slots, high - low, seen, mask)


def _multi(
    group: LayerGroup, table: list[int], computed: int, feed: int, first: int, block_size: int, like: Tensor
) -> Multi:
    end = computed + feed
    low = group.first_seen(computed)
    mask = None
    if computed or (group.window is not None and feed > group.window):
        queries = torch.arange(computed, end, device=like.device)[:, None]
        places = torch.arange(low, end, device=like.device)
        mask = places <= queries
        if group.window is not None:
            mask &= places > queries - group.window
        mask = _additive(mask, like)
    start = run_start(table)
    if start is not None:
        return Multi(first, feed, start * block_size + low, None, end - low, mask)
    places = torch.arange(low, end, device=like.device)
    slots = torch.tensor(table, device=like.device)[places // block_size] * block_size + places % block_size
    return Multi(first, feed, -1, slots, end - low, mask)


def _additive(visible: Tensor, like: Tensor) -> Tensor:
    return torch.zeros(visible.shape, dtype=like.dtype, device=like.device).masked_fill_(~visible, float("-inf"))


def _filled(table: list[int], length: int) -> list[int]:
    """`table` cut or filled to `length`, with the row's own last block; what fills it is masked."""
    own = table[-1]
    return [own if block == GONE else block for block in table[:length]] + [own] * (length - len(table))
