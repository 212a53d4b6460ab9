"""Exact accounts of a manager's blocks."""

from __future__ import annotations

from collections import Counter
from typing import Any

from unspool.cache.blocks import GONE
from unspool.decode.opened import Ledger


def nodes_of(index: Any) -> list[Any]:
    """All nodes of a prefix index but its roots, as its tree has them."""
    found, ahead = [], list(index._roots.values())
    while ahead:
        node = ahead.pop()
        ahead += node.children.values()
        found += [node] if node.parent is not None else []
    return found


def check_accounts(room: Any, rows: Any) -> None:
    """Every block has as many references as live `rows` hold it, is findable where it is idle, and free otherwise.

    A block that several rows hold is full, so that none of them can write it.
    """
    index, size = room.index, room.store.block_size
    nodes = nodes_of(index)
    for group, pool in enumerate(room.store.blocks):
        held = Counter(b for row in rows for b in (row.blocks[group] if row.blocks else ()) if b != GONE)
        indexed = {node.blocks[group]: node for node in nodes if node.blocks[group] != GONE}
        assert indexed == index._nodes[group], "the tree and the table of blocks agree"
        assert pool._kept == set(indexed)
        assert [pool.references(block) for block in range(pool.count)] == [held[b] for b in range(pool.count)]
        assert {b for b in range(pool.count) if pool.is_idle(b)} == {b for b in indexed if not held[b]}
        assert pool.free == pool.count - len(held) - pool.idle
        for row in rows:
            for block in row.blocks[group][row.computed // size :] if row.blocks else ():
                assert block not in indexed, "what is to be written is nobody else's, nor to be found"
    for node in nodes:
        assert node.parent.children[node.tokens] is node
        assert node.users or node.children or any(block != GONE for block in node.blocks), "it stands for something"


def check_swapped(room: Any) -> None:
    """Every block of the swap area has as many references as shelves hold it; names belong to such blocks alone."""
    if room.swap is None:
        assert not room._shelves
        return
    for group, pool in enumerate(room.swap.blocks):
        held = Counter(block for shelf in room._shelves.values() for block in shelf.blocks(group))
        assert [pool.references(block) for block in range(pool.count)] == [held[b] for b in range(pool.count)]
        assert pool.free == pool.count - len(held)
        names = room.swap._name_of[group]
        assert set(names) <= set(held)
        assert {name: block for block, name in names.items()} == room.swap._block_of[group]


def check_all_given_back(room: Any) -> None:
    """No row lives: every block is free or findable, and all of them can be had."""
    check_accounts(room, [])
    assert not room._shelves
    check_swapped(room)
    assert not room._trails and not room._promises
    assert all(node.users == 0 for node in nodes_of(room.index))
    for group, pool in enumerate(room.store.blocks):
        assert pool.free + pool.idle == pool.count
        room.index.give_up(group, pool.count)
        assert pool.free == pool.count
    assert not room.index._roots and len(room.index) == 0


def check_pasts_given_back(manager: Any) -> None:
    """The same of a manager whose rows keep their past in a module's own way."""
    store = manager._engine.room.store
    assert isinstance(store, Ledger)
    assert not store.opened
    assert not store.faults
    check_all_given_back(manager._engine.room)


def staggered(manager: Any, every: list[dict[str, Any]]) -> list[Any]:
    """Outputs of requests, each what `add_request` takes, that come two steps after each other."""
    names = []
    for one in every:
        names.append(manager.add_request(**one))
        manager.step()
        manager.step()
    while manager.step():
        pass
    return [manager.get_result(name, timeout=0) for name in names]
