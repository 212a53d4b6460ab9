"""Blocks of rows that share beginnings, end in any order and are pushed out: exact accounts, no wrong hit."""

from __future__ import annotations

from collections import Counter
from itertools import count, product
from typing import Any

import pytest
import torch
from accounts import check_accounts, check_all_given_back, check_swapped, nodes_of
from hypothesis import given, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from unspool.cache import LayerGroup, PagedStore
from unspool.cache.blocks import GONE, Blocks
from unspool.cache.prefix import PrefixIndex
from unspool.cache.swap import SwapArea
from unspool.continuous.room import Room
from unspool.decode.sequence import Sequence

GROUPS = (LayerGroup((0,), kv_heads=1, head_dim=2), LayerGroup((1,), kv_heads=1, head_dim=2, window=5))
SIZE = 4


class RoomMachine(RuleBasedStateMachine):
    """Rows over two tokens and two tenants, whose stored "keys" are written as the tokens themselves."""

    blocks: tuple[int, int] = (14, 8)

    def __init__(self) -> None:
        super().__init__()
        self.store = PagedStore(GROUPS, self.blocks, dtype=torch.float32, device=torch.device("cpu"), block_size=SIZE)
        self.room = Room(self.store, sharing=True, swap=SwapArea(self.store, self.blocks))
        self.rows: dict[Sequence, str] = {}
        self.aside: dict[tuple[Sequence, ...], str] = {}
        self.left: dict[tuple[Sequence, ...], list[dict[Any, int]]] = {}  # of each group, nodes and where they lie
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
        tokens = self.room.chunk(row, tokens)
        held, need = len(row.blocks[0]) if row.blocks else 0, self.store.blocks_for(row.computed + tokens)
        if not self.room.extend(row, tokens):
            assert any(need - held > pool.free + pool.idle for pool in self.store.blocks), "there was room"
            return
        seen = max(0, row.computed - 4) // SIZE
        assert row.blocks[1][:seen] == [GONE] * seen, "what nobody sees is dropped"
        assert GONE not in row.blocks[1][seen:] and GONE not in row.blocks[0]
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
            self.room.forget(nodes)

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), most=st.integers(1, 3))
    def put_aside(self, data: st.DataObject, most: int) -> None:
        """A request of one or several rows; those are not indexed any more."""
        first = data.draw(st.sampled_from(list(self.rows)))
        tenant = self.rows[first]
        others = [row for row in self.rows if row is not first and self.rows[row] == tenant]
        rows = (first, *others[: most - 1])
        index, area = self.room.index, self.room.swap
        held = [{b for row in rows for b in (row.blocks[i] if row.blocks else ()) if b != GONE} for i in range(2)]
        nodes = [{index.at(i, b): b for b in held[i] if index.at(i, b) is not None} for i in range(2)]
        there = [set().union(*(left[i] for left in self.left.values())) for i in range(2)]
        free = [pool.free for pool in area.blocks]
        self.room.put_aside(rows)
        taken = [before - pool.free for before, pool in zip(free, area.blocks, strict=True)]
        if self.room.is_aside(first):
            for i in range(2):
                assert taken[i] <= len(held[i]) - len(nodes[i].keys() & there[i]), (
                    "what was left there is not left twice"
                )
            shelf = self.room._shelves[first]
            places = [
                {
                    b: put
                    for row, tables in zip(rows, shelf.tables, strict=True)
                    if tables
                    for b, put in zip(row.blocks[i], tables[i], strict=True)
                }
                for i in range(2)
            ]
            self.left[rows] = [{node: places[i][b] for node, b in nodes[i].items()} for i in range(2)]
            self.aside[rows] = tenant
        else:
            assert taken == [0, 0]
        for row in rows:
            del self.rows[row]
            self.room.release(row)

    @precondition(lambda self: self.aside)
    @rule(data=st.data())
    def bring_back(self, data: st.DataObject) -> None:
        rows = data.draw(st.sampled_from(list(self.aside)))
        self.room.clock += 1
        if self.room.bring_back(rows, self.aside[rows]):
            del self.left[rows]
            self.rows |= dict.fromkeys(rows, self.aside.pop(rows))
        else:
            assert not any(row.blocks for row in rows) and self.room.is_aside(rows[0])

    @invariant()
    def every_row_reads_its_own_text(self) -> None:
        for row, tenant in self.rows.items():
            for group in range(2):
                for place in range(row.computed):
                    if row.blocks[group][place // SIZE] == GONE:
                        assert group == 1 and place < row.computed - 4, "it cannot be seen"
                        continue
                    slot = row.blocks[group][place // SIZE] * SIZE + place % SIZE
                    assert float(self.store.keys[group][slot, 0, 0]) == 10.0 * ord(tenant) + row.tokens[place]

    @invariant()
    def blocks_are_accounted_for(self) -> None:
        check_accounts(self.room, list(self.rows))
        trails = [trail for row in self.rows if (trail := self.room._trails.get(row)) and not trail.frozen]
        users = Counter(node for trail in trails for node in trail.nodes)
        for node in nodes_of(self.room.index):
            assert node.users == users[node]

    @invariant()
    def what_was_put_aside_is_there_once(self) -> None:
        check_swapped(self.room)
        area = self.room.swap
        for group in range(2):
            places: dict[Any, int] = {}
            for left in self.left.values():
                for node, block in left[group].items():
                    assert places.setdefault(node, block) == block
        for rows, tenant in self.aside.items():
            shelf = self.room._shelves[rows[0]]
            for row, computed, tables in zip(rows, shelf.computed, shelf.tables, strict=True):
                for group, place in product(range(2) if tables else (), range(computed)):
                    block = tables[group][place // SIZE]
                    if block != GONE:
                        stored = float(area._pools[group][0][block, place % SIZE, 0, 0])
                        assert stored == 10.0 * ord(tenant) + row.tokens[place]

    def teardown(self) -> None:
        for row in self.rows:
            self.room.release(row)
        for rows in self.aside:
            self.room.discard(rows[0])
        check_all_given_back(self.room)


RoomMachine.TestCase.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
test_room = RoomMachine.TestCase


def test_a_row_that_comes_back_pushes_out_the_beginning_that_it_was_found_by() -> None:
    """Its own window is past that block, which is therefore given up for it."""
    store = PagedStore(
        (LayerGroup((0,), kv_heads=1, head_dim=2, window=5),),
        4,
        dtype=torch.float32,
        device=torch.device("cpu"),
        block_size=SIZE,
    )
    room = Room(store, sharing=True, swap=SwapArea(store, [8]))

    def compute(row: Sequence, tokens: int) -> None:
        assert row.blocks or room.admit(row, None)
        while row.computed < tokens:
            assert room.extend(row, SIZE)
            row.computed += SIZE
            room.advance(row)

    first, other = Sequence(0, list(range(20))), Sequence(0, [20])
    compute(first, 16)
    room.put_aside([first])
    room.release(first)
    shorter = Sequence(0, [0, 1, 2, 3, 4])
    compute(shorter, 8)
    room.release(shorter)
    room.index.give_up(0, store.blocks[0].idle - 1)
    assert room.index.find(room.index.root(None), first.tokens, 16), "its first block is the one that is left"
    assert store.extend(other, (store.blocks[0].free - 1) * SIZE)
    assert room.bring_back([first], None)
    check_accounts(room, [first, other])
    compute(first, 20)
    check_accounts(room, [first, other])
    for row in (first, other):
        room.release(row)
    check_all_given_back(room)


@pytest.mark.parametrize("several", [False, True])
def test_a_block_that_two_requests_share_is_out_once_and_comes_back_shared(several: bool) -> None:
    store = PagedStore(GROUPS[:1], 9, dtype=torch.float32, device=torch.device("cpu"), block_size=SIZE)
    room = Room(store, sharing=True, swap=SwapArea(store, [8]))
    text = [1] * 8
    requests = [[Sequence(0, [*text, 2 + i, 7]) for _ in range(1 + several)] for i in range(2)]

    def compute(row: Sequence) -> None:
        assert room.extend(row, len(row.tokens) - row.computed)
        for place in range(10):
            store.keys[0][row.blocks[0][place // SIZE] * SIZE + place % SIZE] = float(row.tokens[place])
        row.computed = 10
        room.advance(row)

    def used() -> int:
        return store.blocks[0].count - store.blocks[0].free - store.blocks[0].idle

    for rows in requests:
        for row in rows:
            assert room.admit(row, None)
            compute(row)
            if several:
                room.freeze(row)
    every = [row for rows in requests for row in rows]
    together = 2 + len(every)
    assert used() == together
    for round in range(3):
        for rows in requests:
            room.put_aside(rows)
            for row in rows:
                room.release(row)
        assert room.swap is not None and 8 - room.swap.blocks[0].free == together, "the two they share are there once"
        check_swapped(room)
        room.index.give_up(0, 9)
        assert room.bring_back(requests[round % 2], None)
        if round == 1:  # one alone goes out and in again
            room.put_aside(requests[1])
            for row in requests[1]:
                room.release(row)
            assert 8 - room.swap.blocks[0].free == together
            assert room.bring_back(requests[1], None)
        assert room.bring_back(requests[1 - round % 2], None)
        assert used() == together, "and here"
        assert room.swap.blocks[0].free == 8
        check_accounts(room, every)
        for row in every:
            slots = [row.blocks[0][place // SIZE] * SIZE + place % SIZE for place in range(10)]
            assert store.keys[0][slots, 0, 0].tolist() == row.tokens
    for row in every:
        room.release(row)
    check_all_given_back(room)


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
    (full, window) = (table[:2] for table in first.blocks)
    assert second.blocks == [full, [GONE, window[1]]], "the ninth token sees the last five"


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
    index = PrefixIndex(pools, GROUPS[:1], 1)
    root = index.root(None)
    leaves = []
    for token in range(4):
        (block,) = pools[0].take(1) or ()
        node = index.add(root, (token,), (block,))
        index.leave([node])
        pools[0].drop([block])
        assert pools[0].is_idle(block)
        leaves.append(node)
    for use in uses:
        pools[0].share(leaves[use].blocks)
        pools[0].drop(leaves[use].blocks)
    order = [token for token in range(4) if token not in uses] + list(dict.fromkeys(reversed(uses)))[::-1]
    for token in order:
        assert leaves[token].parent is not None and leaves[token] in root.children.values()
        assert index.give_up(0, 1) == 1
        assert leaves[token] not in root.children.values()


def test_a_beginning_is_found_as_far_as_windows_reach_back() -> None:
    """The layer with a window of 5 may give up blocks in the middle: then a row goes on before or behind the gap."""
    store = PagedStore(GROUPS, 20, dtype=torch.float32, device=torch.device("cpu"), block_size=SIZE)
    room = Room(store, sharing=True)
    text = list(range(24))
    first = Sequence(0, text)
    assert room.admit(first, None) and room.extend(first, 24)
    first.computed = 24
    room.advance(first)
    room.release(first)
    assert [pool.idle for pool in store.blocks] == [6, 6]
    assert room.index.give_up(1, 6) == 6 and [pool.idle for pool in store.blocks] == [6, 0]
    row = Sequence(0, [*text, 1])
    assert room.admit(row, None) and row.computed == 0, "nothing to look back at"
    assert room.extend(row, 24)
    row.computed = 24
    room.advance(row)
    assert [pool.count - pool.free for pool in store.blocks] == [6, 6], "what was there is used, the rest filled in"
    room.release(row)
    gone = room.index.find(room.index.root(None), text, 24)[3]
    room.index._let_go(gone, 1)
    for length, reach in ((24, 24), (23, 20), (20, 20), (19, 12), (16, 12), (12, 12)):  # after 20: from 16
        assert len(room.index.find(room.index.root(None), text, length)) * SIZE == reach


def test_a_model_of_windows_alone_keeps_what_the_next_token_sees() -> None:
    store = PagedStore(GROUPS[1:], 5, dtype=torch.float32, device=torch.device("cpu"), block_size=SIZE)
    room = Room(store, sharing=True)
    assert room.capacity > 10**9 and room.holds((10**6, 1, 0))
    row = Sequence(0, list(range(100)))
    assert room.admit(row, None)
    while row.computed < 100:
        feed = room.chunk(row, 100 - row.computed)
        assert room.extend(row, feed)
        row.computed += feed
        room.advance(row)
        check_accounts(room, [row])
    assert sum(block != GONE for block in row.blocks[0]) <= 5
    again = Sequence(0, [*range(100), 7])
    assert room.admit(again, None) and again.computed == 100
    room.release(row)
    room.release(again)
    check_all_given_back(room)
