"""Block ids: which are free, and how many rows refer to each. Plain integers, no tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

GONE = -1
"""Stands in a table where a row had a block that it cannot see any more."""


class Blocks:
    """An allocator of `count` numbered blocks with reference counts.

    It hands out consecutive ids where it can, since a row whose blocks form one run can be read without gathering.
    Free ids are kept as maximal intervals, so that finding a run and joining neighbours cost a dictionary access each.

    A block may be marked to be kept: when nobody refers to it any more it is idle rather than free, may be shared
    again, and becomes free when it is let go.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.free = count
        self._kept: set[int] = set()
        self._idle: dict[int, None] = {}  # kept and without references, the one idle for longest first
        self._references = [0] * count
        self._length_at = {0: count} if count else {}  # first id of a free interval -> its length
        self._start_of = {count: 0} if count else {}  # one past a free interval -> its first id

    def references(self, block: int) -> int:
        """How many rows refer to `block`; 0 when it is free."""
        return self._references[block]

    @property
    def idle(self) -> int:
        """How many blocks are kept although nobody refers to them."""
        return len(self._idle)

    def is_idle(self, block: int) -> bool:
        """Whether `block` is kept although nobody refers to it."""
        return block in self._idle

    @property
    def longest_idle(self) -> int | None:
        """The block that has been idle for longest, or `None`."""
        return next(iter(self._idle), None)

    def keep(self, block: int) -> None:
        """Mark `block`, which is in use, to be kept when nobody refers to it any more."""
        assert self._references[block] > 0, f"block {block} is free"
        self._kept.add(block)

    def is_kept(self, block: int) -> bool:
        """Whether `block` is marked to be kept."""
        return block in self._kept

    def let_go(self, block: int) -> None:
        """Keep `block` no longer; it is free when nobody refers to it."""
        self._kept.discard(block)
        if block in self._idle:
            del self._idle[block]
            self._release(block)

    def take(self, count: int, after: int | None = None) -> list[int] | None:
        """Take `count` blocks with one reference each, or nothing (`None`) when fewer are free.

        Args:
            count: how many.
            after: a block the caller already has; ids that continue it are preferred.
        """
        if count > self.free:
            return None
        taken: list[int] = []
        if after is not None and after + 1 in self._length_at:
            taken += self._carve(after + 1, count)
        while len(taken) < count:
            need = count - len(taken)
            fitting = (start for start, length in self._length_at.items() if length >= need)
            start = next(fitting, None)
            if start is None:  # no run is long enough: the longest ones first
                start = max(self._length_at, key=self._length_at.__getitem__)
            taken += self._carve(start, need)
        return taken

    def share(self, blocks: Iterable[int]) -> None:
        """Add one reference to each of `blocks`, which must be in use or idle; `GONE` ones are passed over."""
        for block in blocks:
            if block == GONE:
                continue
            if not self._references[block]:
                assert block in self._idle, f"block {block} is free"
                del self._idle[block]
            self._references[block] += 1

    def drop(self, blocks: Sequence[int]) -> None:
        """Take one reference from each of `blocks`; those left without one are free, or idle where they are kept.

        The last comes first, so that blocks of a text are idle before those that they follow. `GONE` ones are
        passed over.
        """
        for block in reversed(blocks):
            if block == GONE:
                continue
            assert self._references[block] > 0, f"block {block} is free already"
            self._references[block] -= 1
            if self._references[block]:
                continue
            if block in self._kept:
                self._idle[block] = None
            else:
                self._release(block)

    def grow(self, count: int) -> None:
        """Add `count` free blocks behind the last one; ids in use stay as they are."""
        end = self.count
        self.count += count
        self.free += count
        self._references += [0] * count
        start = self._start_of.pop(end, end)
        length = count + (self._length_at.pop(start) if start < end else 0)
        self._length_at[start] = length
        self._start_of[start + length] = start

    def _carve(self, start: int, count: int) -> list[int]:
        """Take up to `count` ids from the free interval that begins at `start`."""
        length = self._length_at.pop(start)
        taken = min(length, count)
        if taken < length:
            self._length_at[start + taken] = length - taken
            self._start_of[start + length] = start + taken
        else:
            del self._start_of[start + length]
        self.free -= taken
        for block in range(start, start + taken):
            self._references[block] = 1
        return list(range(start, start + taken))

    def _release(self, block: int) -> None:
        """Make one id free and join it with the free intervals beside it."""
        start, length = block, 1
        if block in self._start_of:
            start = self._start_of.pop(block)
            length += self._length_at.pop(start)
        if block + 1 in self._length_at:
            behind = self._length_at.pop(block + 1)
            del self._start_of[block + 1 + behind]
            length += behind
        self._length_at[start] = length
        self._start_of[start + length] = start
        self.free += 1


def run_start(blocks: list[int]) -> int | None:
    """First id when `blocks` are consecutive and ascending, else `None`."""
    first = blocks[0] if blocks else 0
    return first if blocks == list(range(first, first + len(blocks))) else None
