"""The store's blocks among live rows and what is kept of ended ones: who gets room, and what need not be computed."""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterable, Sequence as Items
from dataclasses import dataclass, field
from itertools import takewhile

from unspool.cache.blocks import GONE
from unspool.cache.paged import PagedStore
from unspool.cache.prefix import Node, PrefixIndex
from unspool.cache.swap import Shelf, SwapArea
from unspool.decode.opened import Ledger
from unspool.decode.sequence import Sequence

__all__ = ["Room"]

Promise = tuple[Node, tuple[int, ...]]


@dataclass(slots=True, eq=False)
class _Trail:
    """Where a row stands in the prefix index.

    Attributes:
        nodes: its root and the nodes of its full blocks so far.
        promise: the next block, when its tokens are known and being computed.
        moved: the clock when the row last got on.
        frozen: nothing more of the row is indexed, and the nodes are not its own any more.
    """

    nodes: list[Node]
    promise: Promise | None = None
    moved: int = 0
    frozen: bool = False


@dataclass(slots=True, eq=False)
class Room:
    """Blocks of a store of fixed size, shared by rows with the same beginning while they live and afterwards.

    Full blocks of rows stay findable after their rows ended, until their room is needed. A row whose next block is just
    being computed by another one is told to wait for it rather than compute it again.

    Attributes:
        store: keys and values.
        sharing: whether rows may share blocks; a model whose keys depend on a row's whole length cannot.
        clock: steps so far. Owner: the scheduler.
        hits: tokens that need not be computed because they were found, ever.
        swap: where rows that are put back may leave what is stored of them; without it, it is computed again.
        swaps: how often one did.
        asked: tokens that were looked for, ever.
    """

    store: PagedStore
    sharing: bool
    clock: int = 0
    hits: int = 0
    swap: SwapArea | None = None
    swaps: int = 0
    asked: int = 0
    index: PrefixIndex = field(init=False)
    _trails: dict[Sequence, _Trail] = field(default_factory=dict)
    _promises: dict[Promise, Sequence] = field(default_factory=dict)
    _shelves: dict[Sequence, Shelf] = field(default_factory=dict)  # by the first of the rows

    def __post_init__(self) -> None:
        self.index = PrefixIndex(self.store.blocks, self.store.groups, self.store.block_size)

    @property
    def capacity(self) -> int:
        """Tokens of one row that fit; one that can only look back so far may be of any length."""
        size = self.store.block_size
        return min(
            sys.maxsize
            if group.window is not None and pool.count >= self._window_blocks(group.window)
            else pool.count * size
            for group, pool in zip(self.store.groups, self.store.blocks, strict=True)
        )

    def holds(self, *parts: tuple[int, int, int]) -> bool:
        """Whether rows fit when nothing else is there.

        Args:
            parts: `(tokens, rows, shared)`: so many rows of so many tokens, the first `shared` of them in common.
        """
        return all(
            pool.count >= sum(self._blocks(group.window, *part) for part in parts)
            for group, pool in zip(self.store.groups, self.store.blocks, strict=True)
        )

    def _blocks(self, window: int | None, tokens: int, rows: int, shared: int) -> int:
        """Blocks that rows need in layers with that window."""
        every = self.store.blocks_for(tokens)
        whole = every + (rows - 1) * (every - shared // self.store.block_size)
        return whole if window is None else min(whole, rows * self._window_blocks(window))

    @property
    def share_available(self) -> float:
        """The share of blocks that no live row holds, 0 to 1, in the layer group where it is least."""
        return min((pool.free + pool.idle) / max(1, pool.count) for pool in self.store.blocks)

    @property
    def past_bytes(self) -> int:
        """Bytes that a module's own pasts take; 0 where the store has all there is."""
        return self.store.past_bytes() if isinstance(self.store, Ledger) else 0

    def has_memory(self, margin: float, begun: Iterable[Sequence]) -> bool:
        """Whether so large a share of the memory for pasts beside the store would be left with one more.

        Args:
            margin: of 0 to 1.
            begun: rows that may come to have such a past, and have none yet.
        """
        return (
            not isinstance(self.store, Ledger) or self.store.share_held(1 + sum(map(self.opens, begun))) <= 1 - margin
        )

    def opens(self, row: Sequence) -> bool:
        """Whether a row has, or will have, a past beside the store."""
        return isinstance(self.store, Ledger) and (row.inputs is not None or self.store.opens_all)

    @property
    def overfull(self) -> bool:
        """Whether several pasts take more memory than they should."""
        store = self.store
        return isinstance(store, Ledger) and len(store.opened) > 1 and store.share_held() > 1

    @property
    def share_kept(self) -> float:
        """The share of blocks that are kept although no live row holds them, in the layer group where it is most."""
        return max(pool.idle / max(1, pool.count) for pool in self.store.blocks)

    def spare(self, row: Sequence) -> int:
        """Tokens that a row can be extended by."""
        held = len(row.blocks[0]) if row.blocks else 0
        available = min(pool.free + pool.idle for pool in self.store.blocks)
        return (held + available) * self.store.block_size - row.computed

    def lacks(self, row: Sequence, tokens: int) -> bool:
        """Whether a row could not get to `tokens` tokens now, in chunks as small as need be."""
        held = len(row.blocks[0]) if row.blocks else 0
        need = self.store.blocks_for(tokens) - held
        return any(
            (need if group.window is None else min(need, self._window_blocks(group.window))) > pool.free + pool.idle
            for group, pool in zip(self.store.groups, self.store.blocks, strict=True)
        )

    def chunk(self, row: Sequence, tokens: int) -> int:
        """As many of the next `tokens` tokens of a row as layers with a window have room for, and at least one.

        They need room for what one step computes and what that sees, and not for the whole text.
        """
        store = self.store
        store.leave_behind(row)
        held = len(row.blocks[0]) if row.blocks else 0
        for group, pool in zip(store.groups, store.blocks, strict=True):
            if group.window is not None:
                tokens = min(tokens, (held + pool.free + pool.idle) * store.block_size - row.computed)
        return max(1, tokens)

    def _window_blocks(self, window: int) -> int:
        """Blocks that a row needs in layers with a window: what the next token sees, and two that are begun."""
        return self.store.blocks_for(window) + 2

    def admit(self, row: Sequence, key: Hashable, most: int | None = None) -> bool:
        """Give a row without blocks those that hold its beginning already; `False` when it should wait for some.

        At least one token is left to compute, since its logits are wanted; and all after the first `most`.
        """
        assert not row.blocks, "the row holds blocks"
        if not self.sharing or row.inputs is not None:  # what follows a picture is not another row's
            return True
        size, last = self.store.block_size, len(row.tokens) - 1
        last = last if most is None else min(last, most)
        root = self.index.root(key)
        found = self.index.find(root, row.tokens, last)
        nodes = [root, *found]
        reach = len(found) * size
        if reach + size <= last and self._is_promised((nodes[-1], tuple(row.tokens[reach : reach + size]))):
            return False
        self.index.use(nodes)
        row.blocks = self.index.tables(found)
        row.computed = reach
        trail = self._trails[row] = _Trail(nodes, moved=self.clock)
        self._promise(row, trail)
        return True

    def count(self, row: Sequence) -> None:
        """Note that a row begins with what it was given by `admit`."""
        self.asked += len(row.tokens)
        self.hits += row.computed

    def extend(self, row: Sequence, tokens: int) -> bool:
        """Make the next `tokens` positions of `row` writable, if need be with room of what is kept of ended rows.

        What no later token of the row sees is dropped.
        """
        store = self.store
        store.leave_behind(row)
        if store.extend(row, tokens):
            return True
        short = [more - pool.free for more, pool in zip(store.missing(row, tokens), store.blocks, strict=True)]
        if any(more > pool.idle for more, pool in zip(short, store.blocks, strict=True)):
            return False
        for index, more in enumerate(short):
            self.index.give_up(index, more)
        return store.extend(row, tokens)

    def advance(self, row: Sequence, most: int = sys.maxsize) -> None:
        """Index the blocks that a row has filled with tokens that are certain, its first `most` at most."""
        trail = self._trails.get(row)
        if trail is None or trail.frozen:
            return
        trail.moved = self.clock
        size, stored = self.store.block_size, min(row.computed, len(row.tokens), most)
        at = len(trail.nodes) - 1
        while (at + 1) * size <= stored:
            tokens = tuple(row.tokens[at * size : (at + 1) * size])
            blocks = [table[at] for table in row.blocks]
            node = self.index.add(trail.nodes[-1], tokens, blocks)
            if node.blocks != blocks:  # another row was first: one copy is enough
                for index, (own, block) in enumerate(zip(blocks, node.blocks, strict=True)):
                    if own not in (block, GONE):
                        self.store.exchange(row, index, at, block)
            trail.nodes.append(node)
            at += 1
        self._promise(row, trail)

    def freeze(self, row: Sequence) -> None:
        """From now on the row may come to hold other rows' blocks (it is one of several beams): index no more of it."""
        trail = self._trails.get(row)
        if trail is not None and not trail.frozen:
            self._unpromise(trail)
            self.index.leave(trail.nodes)
            trail.frozen = True

    def release(self, row: Sequence) -> list[Node]:
        """Take a row's blocks; what is indexed of them stays findable. Gives their nodes, a path downwards."""
        self.store.release(row)
        row.computed = 0
        trail = self._trails.pop(row, None)
        if trail is None:
            return []
        if not trail.frozen:
            self._unpromise(trail)
            self.index.leave(trail.nodes)
        return trail.nodes[1:]

    def forget(self, nodes: Items[Node], tables: Items[list[list[int]]] = ()) -> None:
        """Forget what is indexed at `nodes`, and zero what is free then of it and of `tables` of rows; see `release`.

        What others use stays.
        """
        every = [{node.blocks[index] for node in nodes} for index in range(len(self.store.groups))]
        for table in tables:
            for blocks, held in zip(every, table, strict=False):  # a row may have no blocks
                blocks.update(held)
        self.index.forget(nodes)
        for index, blocks in enumerate(every):
            self.store.wipe(index, blocks)

    def put_aside(self, rows: Items[Sequence]) -> None:
        """Copy what is stored of a request's rows, which are to be released, into the swap area if there is room.

        A block that others left there is not copied again.
        """
        if self.swap is None or not rows[0].blocks or rows[0] in self._shelves or rows[0].inputs is not None:
            return
        shelf = self.swap.put(rows, self.index.at)
        if shelf is not None:
            self._shelves[rows[0]] = shelf
            self.swaps += 1

    def is_aside(self, row: Sequence) -> bool:
        """Whether what is stored of a request, whose first row this is, lies in the swap area."""
        return row in self._shelves

    def bring_back(self, rows: Items[Sequence], key: Hashable) -> bool:
        """Give rows without blocks what was put aside of them; `False`, with nothing done, when there is no room.

        What is indexed of their texts is used, and only the rest is copied; that is then indexed again.
        """
        shelf, swap = self._shelves[rows[0]], self.swap
        assert swap is not None
        certain = [self._certain(shelf, place) for place in range(len(rows))]
        paths: list[list[Node]] = [[] for _ in rows]
        if self.sharing:
            for place, row in enumerate(rows):
                if certain[place] or len(rows) == 1:
                    root = self.index.root(key)
                    paths[place] = [root, *self.index.find(root, row.tokens, min(certain[place], len(row.tokens)))]
                    self.index.use(paths[place])  # at once: what is given up below must not take them out of the tree
        found = [self._found(shelf, index, paths) for index in range(len(self.store.groups))]
        for pool, at in zip(self.store.blocks, found, strict=True):
            pool.share(at.values())
        lists = [[b for b in shelf.blocks(index) if b not in found[index]] for index in range(len(found))]
        if any(len(some) > pool.free + pool.idle for some, pool in zip(lists, self.store.blocks, strict=True)):
            for pool, at in zip(self.store.blocks, found, strict=True):
                pool.drop(list(at.values()))
            for path in paths:
                self.index.leave(path)
            return False
        for index, (some, pool) in enumerate(zip(lists, self.store.blocks, strict=True)):
            self.index.give_up(index, len(some) - pool.free)
            taken = pool.take(len(some))
            assert taken is not None
            swap.fetch(shelf, index, some, taken)
            found[index] |= zip(some, taken, strict=True)
        self._restore(rows, shelf, found)
        for row, path, most in zip(rows, paths, certain, strict=True):
            if path:
                self._trails[row] = _Trail(path, moved=self.clock)
                self.advance(row, most)
            if len(rows) > 1:
                self.freeze(row)
        for index, (some, at) in enumerate(zip(lists, found, strict=True)):
            for block in some:  # where others left it too
                swap.rename(index, block, self.index.at(index, at[block]))
        return True

    def _certain(self, shelf: Shelf, place: int) -> int:
        """How many tokens of a shelf's row its blocks are known to hold: of one of several, what was indexed before."""
        assert self.swap is not None
        if len(shelf.tables) == 1:
            return shelf.computed[0]
        named = [[self.swap.is_named(i, b) for b in table] for i, table in enumerate(shelf.tables[place])]
        return sum(takewhile(bool, map(any, zip(*named, strict=True)))) * self.store.block_size

    def _found(self, shelf: Shelf, index: int, paths: Items[Items[Node]]) -> dict[int, int]:
        """Blocks of a shelf's rows that are indexed too, and where; the rows' texts are found at `paths`."""
        return {
            block: node.blocks[index]
            for tables, path in zip(shelf.tables, paths, strict=True)
            for block, node in zip(tables[index] if path else (), path[1:], strict=False)
            if GONE not in (block, node.blocks[index])
        }

    def _restore(self, rows: Items[Sequence], shelf: Shelf, found: Items[dict[int, int]]) -> None:
        """Make tables of the places found for a shelf's blocks, each with a reference so far."""
        for row, computed, tables in zip(rows, shelf.computed, shelf.tables, strict=True):
            row.computed = computed
            row.blocks = [[at.get(b, GONE) for b in table] for at, table in zip(found, tables, strict=False)]
        for index, (pool, at) in enumerate(zip(self.store.blocks, found, strict=True)):
            every = [b for row in rows for b in (row.blocks[index] if row.blocks else ()) if b != GONE]
            pool.share(every)
            pool.drop(list(at.values()))
        self.discard(rows[0])

    def discard(self, row: Sequence) -> None:
        """Forget what was put aside of a request, whose first row this is."""
        shelf = self._shelves.pop(row, None)
        if shelf is not None and self.swap is not None:
            self.swap.drop(shelf)

    def _promise(self, row: Sequence, trail: _Trail) -> None:
        """Let others know which block the row computes next."""
        size, at = self.store.block_size, len(trail.nodes) - 1
        self._unpromise(trail)
        if (at + 1) * size <= len(row.tokens):
            promise = (trail.nodes[-1], tuple(row.tokens[at * size : (at + 1) * size]))
            if promise not in self._promises:
                self._promises[promise] = row
                trail.promise = promise

    def _unpromise(self, trail: _Trail) -> None:
        if trail.promise is not None:
            del self._promises[trail.promise]
            trail.promise = None

    def _is_promised(self, promise: Promise) -> bool:
        """Whether a row that gets on computes this block; one that is held up is not waited for."""
        row = self._promises.get(promise)
        return row is not None and self.clock - self._trails[row].moved <= 1
