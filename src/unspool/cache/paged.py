"""The paged store: keys and values of many rows, in blocks of slots that rows refer to by table."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from unspool.cache.blocks import GONE, Blocks, run_start
from unspool.cache.compact import SCALE_BYTES
from unspool.cache.layout import LayerGroup
from unspool.errors import CacheFull, OutOfMemory

BLOCK_SIZE = 16


class Row(Protocol):
    """What the store keeps of a row: how many tokens are stored, and in which blocks, per layer group.

    Tables are values: a change makes a new `blocks`, so that who has read one can tell. Block `i` holds the tokens from
    `i * block_size` on; it is `GONE` where no layer of the group sees them any more.
    """

    computed: int
    blocks: list[list[int]]


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros. On a CPU, pages cost memory only once they are written (calloc), so room may be asked for generously."""
    if device.type == "cpu":
        size = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(dtype).view(shape)
    return torch.zeros(shape, dtype=dtype, device=device)


def refuse_if_too_large(size: int, device: torch.device, what: str = "keys and values") -> None:
    """Raise `OutOfMemory` when `size` bytes of `what` can never fit on `device`.

    A CPU would promise the memory and end the process later, so it is compared with what the machine has.
    """
    if device.type == "cuda":
        have = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    elif device.type == "cpu" and hasattr(os, "sysconf"):
        have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        return
    if size > have:
        raise OutOfMemory(
            f"{what} need {size / 2**30:.1f} GiB and {device} has {have / 2**30:.1f} GiB; "
            "lower max_new_tokens (or max_length), the number of prompts, num_return_sequences or num_beams"
        )


class PagedStore:
    """Keys and values of one model for any number of rows.

    Each layer has one pool of keys and one of values, `[slots, kv_heads, head_dim]`; block `b` is the slots
    `[b * block_size, (b + 1) * block_size)`. Layers of one group share the rows' block tables. Full blocks may be
    shared by several rows; a shared block that is about to be written is copied first.

    Args:
        groups: the model's layer groups.
        blocks: how many blocks each group gets, one number or one for each.
        dtype, device: of keys and values.
        block_size: tokens in a block.
        quantized: keep them in 8 bits (see `cache.compact`), in half the memory of 16.

    Attributes:
        keys, values: the pools, by layer.
        group_of: the group of each layer.
        layouts: how often the pools have been exchanged for larger ones.

    Raises:
        OutOfMemory: the pools do not fit on the device.
    """

    def __init__(
        self,
        groups: tuple[LayerGroup, ...],
        blocks: int | Sequence[int],
        *,
        dtype: torch.dtype,
        device: torch.device,
        block_size: int = BLOCK_SIZE,
        quantized: bool = False,
    ) -> None:
        self.dtype = dtype
        self.device = device
        self.quantized = quantized
        self.groups = groups
        self.block_size = block_size
        counts = [blocks] * len(groups) if isinstance(blocks, int) else list(blocks)
        self._refuse_if_too_large(counts)
        self.blocks = [Blocks(count) for count in counts]
        self._windows = any(group.window is not None for group in groups)
        self.layouts = 0
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.group_of: dict[int, int] = {}
        stored = torch.int8 if quantized else dtype
        for index, group in enumerate(groups):
            for layer in group.layers:
                shape = (counts[index] * block_size, group.kv_heads, self._width(group))
                self.keys[layer] = allocate(shape, stored, device)
                self.values[layer] = allocate(shape, stored, device)
                self.group_of[layer] = index

    def blocks_for(self, tokens: int) -> int:
        """Blocks that `tokens` tokens of one row need."""
        return -(-tokens // self.block_size)

    def reserve(self, row: Row, tokens: int) -> None:
        """Give `row` room for `tokens` tokens at once, as one run where there is one.

        Raises:
            CacheFull: not enough blocks are free; the row is left as it was.
        """
        if not self._grow(row, tokens):
            raise CacheFull(f"a row of {tokens} tokens needs more blocks than are free")

    def extend(self, row: Row, tokens: int) -> bool:
        """Make the next `tokens` positions of `row` writable; `False`, with nothing changed, when blocks run out."""
        first, need = row.computed // self.block_size, self.blocks_for(row.computed + tokens)
        if row.blocks and first >= len(
            row.blocks[0]
        ):  # none of its blocks is to be written: the next of a decoding row
            return self._grow(row, row.computed + tokens)
        if self._writable(row, first, need):
            return True
        if any(more > pool.free for more, pool in zip(self.missing(row, tokens), self.blocks, strict=True)):
            return False
        self._grow(row, row.computed + tokens)
        self._own(row, first)
        return True

    def missing(self, row: Row, tokens: int) -> list[int]:
        """Blocks that `extend` would take, of each group: new ones, and copies of shared ones."""
        first, need = row.computed // self.block_size, self.blocks_for(row.computed + tokens)
        tables = row.blocks or [[] for _ in self.groups]
        return [
            max(0, need - len(table)) + sum(pool.references(block) > 1 for block in table[first:])
            for pool, table in zip(self.blocks, tables, strict=True)
        ]

    def leave_behind(self, row: Row) -> None:
        """Drop the blocks that no layer of their group can see from the next token of `row` on."""
        if not self._windows:
            return
        tables = list(row.blocks)
        for index, (group, table) in enumerate(zip(self.groups, row.blocks, strict=False)):  # a row may have no blocks
            unseen = min(group.first_seen(row.computed) // self.block_size, len(table))
            if unseen and table[unseen - 1] != GONE:
                self.blocks[index].drop(table[:unseen])
                tables[index] = [GONE] * unseen + table[unseen:]
                row.blocks = tables

    def exchange(self, row: Row, index: int, place: int, block: int) -> None:
        """Let `row` refer to `block`, which holds the same, in place `place` of its table number `index`."""
        pool, table = self.blocks[index], row.blocks[index]
        pool.share((block,))
        pool.drop((table[place],))
        self._put(row, index, [*table[:place], block, *table[place + 1 :]])

    def truncate(self, row: Row, tokens: int) -> None:
        """Forget all but the first `tokens` tokens of `row`; blocks it no longer needs are dropped."""
        row.computed = min(row.computed, tokens)
        keep = self.blocks_for(row.computed)
        for pool, table in zip(self.blocks, row.blocks, strict=True):
            pool.drop(table[keep:])
        row.blocks = [table[:keep] for table in row.blocks]

    def share(self, source: Row, target: Row) -> None:
        """Let `target`, which has no blocks, refer to all blocks of `source`."""
        assert not any(target.blocks), "the target holds blocks"
        used = self.blocks_for(source.computed)
        target.blocks = [list(table[:used]) for table in source.blocks]
        target.computed = source.computed
        for pool, table in zip(self.blocks, target.blocks, strict=True):
            pool.share(table)

    def copy(self, source: Row, targets: Iterable[Row]) -> None:
        """Copy the stored tokens of `source` into blocks that `targets` already hold."""
        for target in targets:
            for index, group in enumerate(self.groups):
                used = self.blocks_for(source.computed)
                self._copy_blocks(group, source.blocks[index][:used], target.blocks[index][:used])
            target.computed = source.computed

    def reparent(self, rows: Sequence[Row], parents: Sequence[int]) -> None:
        """Make every row of `rows` a fork of the row at place `parents[i]` among them (itself where that is `i`).

        Full blocks are shared by reference. A block that is partly filled, and so about to be written, stays with one
        of the rows that refer to it, and the others get copies, all in one operation per layer; where no block is free
        for one, it stays shared until `extend` copies it. Blocks beyond what the parent has computed are dropped.
        """
        before = [(row.computed, row.blocks) for row in rows]
        moved = [i for i, parent in enumerate(parents) if parent != i]
        for i in moved:
            computed, tables = before[parents[i]]
            used = self.blocks_for(computed)
            rows[i].computed, rows[i].blocks = computed, [table[:used] for table in tables]
            for pool, table in zip(self.blocks, rows[i].blocks, strict=True):
                pool.share(table)
        for i in moved:
            for pool, table in zip(self.blocks, before[i][1], strict=False):  # a row may have come without any
                pool.drop(table)
        self._part_tails([row for row in rows if row.computed % self.block_size])

    def _part_tails(self, rows: Sequence[Row]) -> None:
        """Give each row, whose last used block is partly filled, that block for itself."""
        for index, pool in enumerate(self.blocks):
            sources: list[int] = []
            targets: list[int] = []
            for row in rows:
                table, last = row.blocks[index], row.computed // self.block_size
                taken = pool.take(1) if pool.references(table[last]) > 1 else None
                if taken is not None:
                    sources.append(table[last])
                    targets += taken
                    pool.drop([table[last]])
                    self._put(row, index, [*table[:last], *taken, *table[last + 1 :]])
            self._copy_blocks(self.groups[index], sources, targets)

    def compact(self, live: Sequence[Row], ended: Sequence[Row]) -> None:
        """Move live rows into lower blocks that ended rows held, so that the live ones lie side by side again.

        Rows must have been reserved alike. What the ended rows had stored is given up; they keep the exchanged blocks.
        """
        by_place = sorted([*live, *ended], key=lambda row: row.blocks[0][0])
        gone = {id(row) for row in ended}
        holes = [row for row in by_place[: len(live)] if id(row) in gone]
        movers = [row for row in by_place[len(live) :] if id(row) not in gone]
        for hole, mover in zip(holes, movers, strict=True):
            used = self.blocks_for(mover.computed)
            if used > len(hole.blocks[0]):
                continue
            for index, group in enumerate(self.groups):
                self._copy_blocks(group, mover.blocks[index][:used], hole.blocks[index][:used])
            hole.blocks, mover.blocks = mover.blocks, hole.blocks

    def adopt(self, row: Row, other: PagedStore, source: Row, tokens: int) -> None:
        """Copy the first `tokens` stored tokens of `source`, a row of an `other` store, into the reserved `row`."""
        assert (self.block_size, self.quantized) == (other.block_size, other.quantized)
        used = self.blocks_for(tokens)
        for index, group in enumerate(self.groups):
            ours, theirs = row.blocks[index][:used], source.blocks[index][:used]
            for layer in group.layers:
                for pool, old in ((self.keys[layer], other.keys[layer]), (self.values[layer], other.values[layer])):
                    self._by_block(pool)[ours] = other._by_block(old)[theirs].to(pool.device, pool.dtype)
        row.computed = tokens

    def enlarge(self, rows: Sequence[Row], tokens: int) -> None:
        """Make room so that each of the store's `rows` can be extended to `tokens` tokens.

        Rows with blocks of their own are laid out anew, in order, each as one run. Rows that share blocks keep their
        tables, and the store gets more blocks. Works layer by layer, so that memory for one layer is all it needs
        besides the larger store.

        Raises:
            OutOfMemory: the larger store does not fit on the device.
        """
        if any(
            pool.references(b) > 1 for row in rows for pool, t in zip(self.blocks, row.blocks, strict=True) for b in t
        ):
            self._append(rows, tokens)
        else:
            self._lay_out(rows, tokens)
        self.layouts += 1

    def _append(self, rows: Sequence[Row], tokens: int) -> None:
        """Add blocks behind the last: what rows of `tokens` tokens need more, and one for each block to be unshared."""
        need = self.blocks_for(tokens)
        more = 0
        for index, pool in enumerate(self.blocks):
            tables = [(row.blocks[index], row.computed // self.block_size) for row in rows]
            shared = sum(pool.references(block) > 1 for table, first in tables for block in table[first:])
            more = max(more, shared + sum(max(0, need - len(table)) for table, _ in tables))
        self._refuse_if_too_large([pool.count + more for pool in self.blocks])
        for layer in self.keys:
            for pools in (self.keys, self.values):
                old = pools[layer]
                new = allocate((old.shape[0] + more * self.block_size, *old.shape[1:]), old.dtype, old.device)
                new[: old.shape[0]] = old
                pools[layer] = new
        for pool in self.blocks:
            pool.grow(more)

    def _lay_out(self, rows: Sequence[Row], tokens: int) -> None:
        """Lay rows out anew, each as one run with room for `tokens` tokens, keeping order and contents."""
        need = self.blocks_for(tokens)
        self._refuse_if_too_large([len(rows) * need] * len(self.groups))
        order = sorted(rows, key=lambda row: row.blocks[0][0])
        tables = [list(range(i * need, (i + 1) * need)) for i in range(len(order))]
        for index, group in enumerate(self.groups):
            for layer in group.layers:
                for pools in (self.keys, self.values):
                    old = pools[layer]
                    new = allocate((len(order) * need * self.block_size, *old.shape[1:]), old.dtype, old.device)
                    for row, table in zip(order, tables, strict=True):
                        used = self.blocks_for(row.computed)
                        self._by_block(new)[table[:used]] = self._by_block(old)[row.blocks[index][:used]]
                    pools[layer] = new
            self.blocks[index] = Blocks(len(order) * need)
            self.blocks[index].take(len(order) * need)
        for row, table in zip(order, tables, strict=True):
            row.blocks = [list(table) for _ in self.groups]

    def wipe(self, index: int, blocks: Iterable[int]) -> None:
        """Zero those of `blocks` of layer group number `index` that are free.

        Attention over a rectangle masks what lies behind a row's end, but a masked NaN is still a NaN.
        """
        pool = self.blocks[index]
        free = [b for b in blocks if b != GONE and not pool.references(b) and not pool.is_kept(b)]
        for layer in self.groups[index].layers if free else ():
            self._by_block(self.keys[layer])[free] = 0
            self._by_block(self.values[layer])[free] = 0

    def release(self, row: Row) -> None:
        """Drop every block of `row`."""
        for index, table in enumerate(row.blocks):
            self.blocks[index].drop(table)
        row.blocks = []

    def _width(self, group: LayerGroup) -> int:
        """Elements that one head's vector takes in a pool."""
        return group.head_dim + (SCALE_BYTES if self.quantized else 0)

    def _refuse_if_too_large(self, counts: Sequence[int]) -> None:
        size = sum(map(operator.mul, counts, self.block_bytes()))
        refuse_if_too_large(size, self.device)

    def block_bytes(self) -> list[int]:
        """Bytes that one block takes, of each group."""
        size = self.block_size * (1 if self.quantized else self.dtype.itemsize)
        return [2 * len(group.layers) * group.kv_heads * self._width(group) * size for group in self.groups]

    def _writable(self, row: Row, first: int, need: int) -> bool:
        """Whether `row` has `need` blocks already, from index `first` on for itself alone: the case of most steps."""
        if not row.blocks:
            return False
        for pool, table in zip(self.blocks, row.blocks, strict=True):
            if need > len(table):
                return False
            for block in table[first:need]:
                if pool.references(block) > 1:
                    return False
        return True

    def _grow(self, row: Row, tokens: int) -> bool:
        if not row.blocks:
            row.blocks = [[] for _ in self.groups]
        need = self.blocks_for(tokens)
        for pool, table in zip(self.blocks, row.blocks, strict=True):
            if need - len(table) > pool.free:
                return False
        tables = []
        for pool, table in zip(self.blocks, row.blocks, strict=True):
            if need > len(table):
                taken = pool.take(need - len(table), after=table[-1] if table else None)
                assert taken is not None
                table = table + taken
            tables.append(table)
        row.blocks = tables
        return True

    def _put(self, row: Row, index: int, table: list[int]) -> None:
        row.blocks = [*row.blocks[:index], table, *row.blocks[index + 1 :]]

    def _own(self, row: Row, first: int) -> None:
        """Copy the blocks of `row` from index `first` on that other rows refer to as well."""
        for index, (pool, old) in enumerate(zip(self.blocks, row.blocks, strict=True)):
            table = list(old)
            for i in range(first, len(table)):
                if pool.references(table[i]) > 1:
                    taken = pool.take(1, after=table[i - 1] if i else None)
                    assert taken is not None
                    self._copy_blocks(self.groups[index], [table[i]], taken)
                    pool.drop([table[i]])
                    table[i] = taken[0]
            if table != old:
                self._put(row, index, table)

    def _copy_blocks(self, group: LayerGroup, source: list[int], target: list[int]) -> None:
        if not source:
            return
        one_run = run_start(source) is not None and run_start(target) is not None
        for layer in group.layers:
            for pool in (self.keys[layer], self.values[layer]):
                by_block = self._by_block(pool)
                if one_run:
                    by_block[target[0] : target[-1] + 1] = by_block[source[0] : source[-1] + 1]
                else:
                    by_block[target] = by_block[source]

    def _by_block(self, pool: Tensor) -> Tensor:
        """`pool` as `[blocks, block_size, kv_heads, head_dim]`."""
        return pool.view(-1, self.block_size, *pool.shape[1:])
