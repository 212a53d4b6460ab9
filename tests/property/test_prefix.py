"""Blocks of rows that share beginnings, end in any order and are pushed out: exact accounts, no wrong hit."""

from __future__ import annotations

from collections import Counter
from itertools import count

import torch
from hypothesis import given, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from unspool.cache import LayerGroup, PagedStore
from unspool.cache.blocks import Blocks
from unspool.cache.prefix import PrefixIndex
from unspool.continuous.room import Room
from unspool.decode.sequence import Sequence

GROUPS = (LayerGroup((0,), kv_heads=1, head_dim=2), LayerGroup((1,), kv_heads=1, head_dim=2, window=5))
SIZE = 4


class RoomMachine(RuleBasedStateMachine):
    """Rows over two tokens and two tenants, whose stored "keys" are written as the tokens themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.store = PagedStore(GROUPS, 14, dtype=torch.float32, device=torch.device("cpu"), block_size=SIZE)
        self.room = Room(self.store, sharing=True)
        self.rows: dict[Sequence, str] = {}
        self.texts = count()

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=20), tenant=st.sampled_from("ab"))
    def admit(self, tokens: list[int], tenant: str) -> None:
        self.room.clock += 1
        row = Sequence(0, list(tokens))
        if self.room.admit(row, tenant):
            assert row.computed < len(tokens) and row.computed % SIZE == 0
            self.rows[row] = tenant
        else:
            assert not row.blocks and any(other.computed < len(other.tokens) for other in self.rows)

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), tokens=st.integers(1, 9))
    def compute(self, data: st.DataObject, tokens: int) -> None:
        row = data.draw(st.sampled_from(list(self.rows)))
        tokens = min(tokens, len(row.tokens) - row.computed)
        if not tokens:
            row.tokens.append(data.draw(st.integers(0, 1)))
            tokens = 1
        before = self.room.available
        if not self.room.extend(row, tokens):
            held = [len(table) for table in row.blocks] or [0, 0]
            need = self.store.blocks_for(row.computed + tokens)
            assert any(need - have > before for have in held), "there was room"
            return
        for place in range(row.computed, row.computed + tokens):
            for group in range(2):
                block = row.blocks[group][place // SIZE]
                assert self.store.blocks[group].references(block) == 1, "what is written is nobody else's"
                self.store.keys[group][block * SIZE + place % SIZE] = 10.0 * ord(self.rows[row]) + row.tokens[place]
        row.computed += tokens
        self.room.advance(row)

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), forget=st.booleans())
    def end(self, data: st.DataObject, forget: bool) -> None:
        row = data.draw(st.sampled_from(list(self.rows)))
        del self.rows[row]
        nodes = self.room.release(row)
        if forget:
            self.room.index.forget(nodes)

    @invariant()
    def every_row_reads_its_own_text(self) -> None:
        for row, tenant in self.rows.items():
            for group in range(2):
                for place in range(row.computed):
                    slot = row.blocks[group][place // SIZE] * SIZE + place % SIZE
                    assert float(self.store.keys[group][slot, 0, 0]) == 10.0 * ord(tenant) + row.tokens[place]

    @invariant()
    def blocks_are_accounted_for(self) -> None:
        index = self.room.index
        for group, pool in enumerate(self.store.blocks):
            held = Counter(block for row in self.rows for block in row.blocks[group : group + 1] for block in block)
            indexed = {node.blocks[group] for node in _nodes(index)}
            assert len(indexed) == len(index)
            for block in range(pool.count):
                assert pool.references(block) == held[block] + (block in indexed)
        users = Counter(node for row in self.rows for node in self.room._trails[row].nodes)
        for node in _nodes(index):
            assert node.users == users[node]
            assert (node in index._idle) == (not node.users)

    def teardown(self) -> None:
        for row in list(self.rows):
            self.room.release(row)
        index = self.room.index
        assert index.idle == len(index) == self.store.blocks[0].count - self.store.blocks[0].free
        index.give_up(len(index))
        assert all(pool.free == pool.count for pool in self.store.blocks)
        assert not index._roots and not self.room._promises


def _nodes(index: PrefixIndex) -> list:  # type: ignore[type-arg]
    found, ahead = [], list(index._roots.values())
    while ahead:
        node = ahead.pop()
        ahead += node.children.values()
        found += [node] if node.blocks else []
    return found


RoomMachine.TestCase.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
test_room = RoomMachine.TestCase


def test_a_row_waits_for_a_beginning_that_is_just_being_computed() -> None:
    store = PagedStore(GROUPS, 20, dtype=torch.float32, device=torch.device("cpu"), block_size=SIZE)
    room = Room(store, sharing=True)
    first, second = Sequence(0, [1] * 10), Sequence(0, [1] * 10 + [2])
    assert room.admit(first, None)
    assert not room.admit(second, None), "its first block is promised"
    assert room.admit(Sequence(0, [1] * 10), "another tenant")
    room.clock += 1
    assert room.extend(first, 4)
    first.computed = 4
    room.advance(first)
    room.clock += 1
    assert not room.admit(second, None), "the next one is"
    assert room.extend(first, 6)
    first.computed = 10
    room.advance(first)
    assert room.admit(second, None)
    assert second.computed == 8
    assert second.blocks == [table[:2] for table in first.blocks]


def test_a_row_that_is_held_up_is_not_waited_for() -> None:
    store = PagedStore(GROUPS, 20, dtype=torch.float32, device=torch.device("cpu"), block_size=SIZE)
    room = Room(store, sharing=True)
    assert room.admit(Sequence(0, [1] * 10), None)
    room.clock += 2
    assert room.admit(Sequence(0, [1] * 10), None)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=30))
def test_what_was_used_last_is_given_up_last(uses: list[int]) -> None:
    pools = [Blocks(8)]
    index = PrefixIndex(pools)
    root = index.root(None)
    leaves = []
    for token in range(4):
        (block,) = pools[0].take(1) or ()
        node = index.add(root, (token,), (block,))
        index.leave([node])
        pools[0].drop([block])
        leaves.append(node)
    for use in uses:
        index.use([leaves[use]])
        index.leave([leaves[use]])
    order = [token for token in range(4) if token not in uses] + list(dict.fromkeys(reversed(uses)))[::-1]
    for token in order:
        assert leaves[token].parent is not None and leaves[token] in root.children.values()
        assert index.give_up(1) == 1
        assert leaves[token] not in root.children.values()
