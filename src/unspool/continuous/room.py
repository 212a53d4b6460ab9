"""The store's blocks among live rows and what is kept of ended ones: who gets room, and what need not be computed."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from unspool.cache.paged import PagedStore
from unspool.cache.prefix import Node, PrefixIndex
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
    """

    nodes: list[Node]
    promise: Promise | None = None
    moved: int = 0


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
    """

    store: PagedStore
    sharing: bool
    clock: int = 0
    hits: int = 0
    index: PrefixIndex = field(init=False)
    _trails: dict[Sequence, _Trail] = field(default_factory=dict)
    _promises: dict[Promise, Sequence] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.index = PrefixIndex(self.store.blocks)

    @property
    def capacity(self) -> int:
        """Tokens that fit."""
        return min(pool.count for pool in self.store.blocks) * self.store.block_size

    @property
    def available(self) -> int:
        """Blocks (of each layer group) that no live row holds."""
        return min(pool.free for pool in self.store.blocks) + self.index.idle

    @property
    def share_available(self) -> float:
        """The same as a share of all, 0 to 1."""
        return self.available / max(1, min(pool.count for pool in self.store.blocks))

    def spare(self, row: Sequence) -> int:
        """Tokens that a row can be extended by."""
        held = len(row.blocks[0]) if row.blocks else 0
        return (held + self.available) * self.store.block_size - row.computed

    def admit(self, row: Sequence, key: Hashable) -> bool:
        """Give a row without blocks those that hold its beginning already; `False` when it should wait for some.

        At least one token is left to compute, since its logits are wanted.
        """
        assert not row.blocks, "the row holds blocks"
        if not self.sharing:
            return True
        size, last = self.store.block_size, len(row.tokens) - 1
        root = self.index.root(key)
        found = self.index.find(root, row.tokens, 0, last, size)
        nodes = [root, *found]
        reach = len(found) * size
        if reach + size <= last and self._is_promised((nodes[-1], tuple(row.tokens[reach : reach + size]))):
            return False
        self.index.use(nodes)
        row.blocks = [[node.blocks[group] for node in found] for group in range(len(self.store.groups))]
        for pool, table in zip(self.store.blocks, row.blocks, strict=True):
            pool.share(table)
        row.computed = reach
        self.hits += reach
        trail = self._trails[row] = _Trail(nodes, moved=self.clock)
        self._promise(row, trail)
        return True

    def extend(self, row: Sequence, tokens: int) -> bool:
        """Make the next `tokens` positions of `row` writable, if need be with room of what is kept of ended rows."""
        store = self.store
        while not store.extend(row, tokens):
            need = store.blocks_for(row.computed + tokens)
            held = [len(table) for table in row.blocks] or [0] * len(store.groups)
            short = max(need - have - pool.free for have, pool in zip(held, store.blocks, strict=True))
            if not self.index.give_up(max(1, short)):
                return False
        return True

    def advance(self, row: Sequence) -> None:
        """Index the blocks that a row has filled with tokens that are certain."""
        trail = self._trails.get(row)
        if trail is None:
            return
        trail.moved = self.clock
        size, stored = self.store.block_size, min(row.computed, len(row.tokens))
        at = len(trail.nodes) - 1
        while (at + 1) * size <= stored:
            tokens = tuple(row.tokens[at * size : (at + 1) * size])
            blocks = tuple(table[at] for table in row.blocks)
            node = self.index.add(trail.nodes[-1], tokens, blocks)
            if node.blocks != blocks:  # another row was first: one copy is enough
                self._exchange(row, at, node)
            trail.nodes.append(node)
            at += 1
        self._promise(row, trail)

    def freeze(self, row: Sequence) -> None:
        """From now on others may write the row's blocks (it becomes one of several beams): index nothing more of it."""
        trail = self._trails.get(row)
        if trail is not None:
            self._unpromise(trail)

    def release(self, row: Sequence) -> list[Node]:
        """Take a row's blocks; what is indexed of them stays findable. Gives their nodes, a path downwards."""
        self.store.release(row)
        row.computed = 0
        trail = self._trails.pop(row, None)
        if trail is None:
            return []
        self._unpromise(trail)
        self.index.leave(trail.nodes)
        return trail.nodes[1:]

    def _exchange(self, row: Sequence, at: int, node: Node) -> None:
        for pool, table, block in zip(self.store.blocks, row.blocks, node.blocks, strict=True):
            if table[at] != block:
                pool.share((block,))
                pool.drop((table[at],))
                table[at] = block

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
