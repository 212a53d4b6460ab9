"""The paged store against a plain dictionary of what each row has written."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from unspool.attention.reference import PagedAttention
from unspool.cache import Blocks, LayerGroup, PagedStore
from unspool.cache.blocks import GONE, run_start

GROUPS = (LayerGroup((0, 2), kv_heads=1, head_dim=2), LayerGroup((1,), kv_heads=2, head_dim=2, window=5))


@dataclass(eq=False)
class Row:
    computed: int = 0
    blocks: list[list[int]] = field(default_factory=list)
    known: list[float] = field(default_factory=list)


class BlocksMachine(RuleBasedStateMachine):
    """Random take, share and drop: counts are exact and no block is handed out twice."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = Blocks(12)
        self.held: dict[int, int] = {}

    @rule(count=st.integers(1, 6), data=st.data())
    def take(self, count: int, data: st.DataObject) -> None:
        after = data.draw(st.sampled_from([None, *self.held]))
        taken = self.blocks.take(count, after)
        if taken is None:
            assert count > 12 - len(self.held)
            return
        assert len(taken) == count
        assert not set(taken) & set(self.held)
        if after is not None and after + 1 < 12 and after + 1 not in self.held:
            assert taken[0] == after + 1
        self.held |= dict.fromkeys(taken, 1)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(list(self.held)))
        self.blocks.share([block])
        self.held[block] += 1

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(list(self.held)))
        self.blocks.drop([block])
        self.held[block] -= 1
        if not self.held[block]:
            del self.held[block]

    @invariant()
    def counts_agree(self) -> None:
        assert self.blocks.free == 12 - len(self.held)
        assert [self.blocks.references(b) for b in range(12)] == [self.held.get(b, 0) for b in range(12)]
        intervals = sorted(self.blocks._length_at.items())
        free = [b for start, length in intervals for b in range(start, start + length)]
        assert free == [b for b in range(12) if b not in self.held]
        assert all(a + n < b for (a, n), (b, _) in pairwise(intervals)), "intervals are joined"


TestBlocks = BlocksMachine.TestCase
TestBlocks.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


class StoreMachine(RuleBasedStateMachine):
    """Random extend, share, truncate and release; every row always reads back what it wrote, and nothing leaks."""

    @initialize()
    def start(self) -> None:
        self.store = PagedStore(GROUPS, 24, dtype=torch.float32, device=torch.device("cpu"), block_size=2)
        self.rows: list[Row] = []
        self.counter = 0.0

    @rule()
    def admit(self) -> None:
        if len(self.rows) < 5:
            self.rows.append(Row())

    @precondition(lambda self: self.rows)
    @rule(tokens=st.integers(1, 7), data=st.data())
    def feed(self, tokens: int, data: st.DataObject) -> None:
        row = data.draw(st.sampled_from(self.rows))
        before = (row.computed, [list(table) for table in row.blocks])
        if not self.store.extend(row, tokens):
            assert (row.computed, [list(table) for table in row.blocks]) == before, "nothing changed"
            return
        new = [self.counter + i + 1 for i in range(tokens)]
        self.counter += tokens
        attend = PagedAttention(self.store, [row], [tokens])
        for index, group in enumerate(GROUPS):
            for layer in group.layers:
                shape = (tokens, group.kv_heads, group.head_dim)
                vectors = torch.tensor(new)[:, None, None].expand(shape) + index
                attend(layer, torch.ones(shape), vectors, -vectors, 1.0)
        row.computed += tokens
        row.known += new

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        source = data.draw(st.sampled_from(self.rows))
        if source.blocks and len(self.rows) < 5:
            twin = Row(known=list(source.known))
            self.store.share(source, twin)
            self.rows.append(twin)

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def reparent(self, data: st.DataObject) -> None:
        some = [row for row in self.rows if row.blocks]
        if not some:
            return
        fresh = [Row() for _ in range(data.draw(st.integers(0, 5 - len(self.rows))))]
        family = some + fresh  # rows without blocks may only be given some
        parents = data.draw(st.lists(st.sampled_from(range(len(some))), min_size=len(family), max_size=len(family)))
        known = [row.known for row in family]
        free = [pool.free for pool in self.store.blocks]
        self.store.reparent(family, parents)
        for row, parent in zip(family, parents, strict=True):
            row.known = list(known[parent])
        self.rows += fresh
        for index, pool in enumerate(self.store.blocks):
            tails = [row.blocks[index][-1] for row in family if row.computed % 2]
            assert not pool.free or all(pool.references(block) == 1 for block in tails), "tails are private"
            assert free[index] - pool.free <= len(tails), "a row costs its tail at most"

    @rule(data=st.data())
    def enlarge(self, data: st.DataObject) -> None:
        rows = [row for row in self.rows if row.blocks and row.blocks[0]]
        pools = self.store.blocks
        if not any(pools[0].references(block) > 1 for row in rows for block in row.blocks[0]) or pools[0].count > 60:
            return  # laying out anew is for rows that were reserved, all with blocks; it has a test of its own
        tokens = max(row.computed for row in rows) + data.draw(st.integers(1, 5))
        tables = [[list(table) for table in row.blocks] for row in self.rows]
        self.store.enlarge(rows, tokens)
        assert tables == [row.blocks for row in self.rows], "rows that share keep their tables"
        missing = [tokens - row.computed for row in rows]
        assert all(self.store.extend(row, more) for row, more in zip(rows, missing, strict=True) if more)

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), keep=st.integers(0, 10))
    def truncate(self, data: st.DataObject, keep: int) -> None:
        row = data.draw(st.sampled_from(self.rows))
        if row.blocks and (keep == 0 or GONE not in row.blocks[1]):  # a window does not move back
            self.store.truncate(row, keep)
            del row.known[keep:]

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def leave_behind(self, data: st.DataObject) -> None:
        row = data.draw(st.sampled_from(self.rows))
        self.store.leave_behind(row)
        if row.blocks:
            unseen = max(0, row.computed - 4) // 2
            assert row.blocks[1][:unseen] == [GONE] * unseen and GONE not in row.blocks[0]

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        row = data.draw(st.sampled_from(self.rows))
        self.store.release(row)
        self.rows.remove(row)

    @invariant()
    def rows_read_back(self) -> None:
        for row in self.rows:
            for index, group in enumerate(GROUPS):
                for layer in group.layers if row.blocks else ():
                    gone = row.blocks[index].count(GONE)
                    slots = [row.blocks[index][p // 2] * 2 + p % 2 for p in range(2 * gone, row.computed)]
                    known = row.known[2 * gone :]
                    assert (self.store.keys[layer][slots, 0, 0] - index).tolist() == known
                    assert (self.store.values[layer][slots, -1, -1] + index).tolist() == [-x for x in known]

    @invariant()
    def nothing_leaks(self) -> None:
        for index, pool in enumerate(self.store.blocks):
            counted = [0] * pool.count
            for row in self.rows:
                for block in row.blocks[index] if row.blocks else ():
                    if block != GONE:
                        counted[block] += 1
            assert counted == [pool.references(block) for block in range(pool.count)]


TestStore = StoreMachine.TestCase
TestStore.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


def test_a_shared_block_is_copied_before_it_is_written() -> None:
    store = PagedStore(GROUPS[:1], 8, dtype=torch.float32, device=torch.device("cpu"), block_size=4)
    first, second = Row(), Row()
    assert store.extend(first, 6)
    first.computed = 6
    store.share(first, second)
    assert second.blocks == first.blocks
    assert store.extend(second, 1)
    assert second.blocks[0][0] == first.blocks[0][0], "the full block stays shared"
    assert second.blocks[0][1] != first.blocks[0][1]


@settings(max_examples=40, deadline=None)
@given(
    stored=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    feeds=st.lists(st.integers(1, 6), min_size=6, max_size=6),
    singles=st.booleans(),
    window=st.sampled_from([None, 1, 3, 7]),
    fold=st.sampled_from([1, 3]),
    softcap=st.sampled_from([None, 2.0]),
    scatter=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_attention_equals_one_row_at_a_time(
    stored: list[int],
    feeds: list[int],
    singles: bool,
    window: int | None,
    fold: int,
    softcap: float | None,
    scatter: bool,
    seed: int,
) -> None:
    """Any mix of rows, in runs or scattered blocks, gives what plain softmax attention gives row by row."""
    generator = torch.Generator().manual_seed(seed)
    kv, dim = 2, 4
    group = LayerGroup((0,), kv, dim, window)
    store = PagedStore((group,), 80, dtype=torch.float32, device=torch.device("cpu"), block_size=2)
    rows = [Row() for _ in stored]
    if scatter:
        for i in range(20):  # take turns, so that no row's blocks are one run
            assert store.extend(rows[i % len(rows)], 1)
            rows[i % len(rows)].computed += 2
        for row in rows:
            row.computed = 0
    else:
        for row in rows:
            store.reserve(row, 16)
    pasts = [torch.randn(2, n, kv, dim, generator=generator) for n in stored]
    for row, past in zip(rows, pasts, strict=True):
        for k, v in past.transpose(0, 1):
            assert store.extend(row, 1)
            PagedAttention(store, [row], [1])(0, torch.zeros(1, kv * fold, dim), k[None], v[None], 1.0)
            row.computed += 1
    feeds = [1 if singles else n for n in feeds[: len(rows)]]
    for row, feed in zip(rows, feeds, strict=True):
        assert store.extend(row, feed)
    total = sum(feeds)
    q = torch.randn(total, kv * fold, dim, generator=generator)
    k, v = torch.randn(2, total, kv, dim, generator=generator)
    weights: list[list[torch.Tensor]] = []
    out = PagedAttention(store, rows, feeds)(0, q, k, v, 0.5, softcap)
    recorded = PagedAttention(store, rows, feeds, weights)(0, q, k, v, 0.5, softcap)
    torch.testing.assert_close(out, recorded)
    end = 0
    for number, (past, feed) in enumerate(zip(pasts, feeds, strict=True)):
        keys = torch.cat([past[0], k[end : end + feed]]).repeat_interleave(fold, 1)
        values = torch.cat([past[1], v[end : end + feed]]).repeat_interleave(fold, 1)
        for j in range(feed):
            here = past.shape[1] + j
            low = 0 if window is None else max(0, here + 1 - window)
            scores = torch.einsum("hd,lhd->hl", q[end + j], keys[low : here + 1]) * 0.5
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            expected = torch.einsum("hl,lhd->hd", scores.softmax(-1), values[low : here + 1]).flatten()
            torch.testing.assert_close(out[end + j], expected, atol=1e-5, rtol=1e-5)
        assert weights[0][number].shape[:2] == (kv * fold, feed)
        torch.testing.assert_close(weights[0][number].sum(-1), torch.ones(kv * fold, feed))
        end += feed


def test_compaction_keeps_every_live_row_and_makes_one_rectangle() -> None:
    store = PagedStore(GROUPS[:1], 12, dtype=torch.float32, device=torch.device("cpu"), block_size=2)
    rows = [Row() for _ in range(6)]
    for number, row in enumerate(rows):
        store.reserve(row, 4)
        slots = [row.blocks[0][p // 2] * 2 + p % 2 for p in range(3)]
        store.keys[0][slots] = float(number)
        row.computed = 3
    live, ended = [rows[1], rows[4], rows[5]], [rows[0], rows[2], rows[3]]
    store.compact(live, ended)
    assert sorted(row.blocks[0][0] for row in live) == [0, 2, 4]
    for number in (1, 4, 5):
        slots = [rows[number].blocks[0][p // 2] * 2 + p % 2 for p in range(3)]
        assert store.keys[0][slots].unique().tolist() == [number]
    assert sorted(block for row in rows for block in row.blocks[0]) == list(range(12))


def test_enlarging_keeps_what_is_stored() -> None:
    store = PagedStore(GROUPS, 4, dtype=torch.float32, device=torch.device("cpu"), block_size=2)
    rows = [Row(), Row()]
    for number, row in enumerate(rows):
        store.reserve(row, 4)
        for index, group in enumerate(GROUPS):
            for layer in group.layers:
                store.keys[layer][[row.blocks[index][0] * 2, row.blocks[index][0] * 2 + 1]] = float(number + 1)
        row.computed = 2
    assert not store.extend(rows[0], 5)
    store.enlarge(rows, 20)
    assert store.extend(rows[0], 18)
    for number, row in enumerate(rows):
        assert run_start(row.blocks[0]) is not None
        for layer in (0, 1, 2):
            assert store.keys[layer][row.blocks[store.group_of[layer]][0] * 2].unique().tolist() == [number + 1]


def test_a_store_too_large_says_what_to_lower() -> None:
    with pytest.raises(MemoryError, match="max_new_tokens"):
        PagedStore((LayerGroup((0,), 8, 128),), 2**44, dtype=torch.float32, device=torch.device("cpu"), block_size=16)
