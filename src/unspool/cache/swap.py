"""A second memory, on the host, for what is stored of rows that had to make room: copied out, and back later."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from unspool.cache.blocks import GONE, Blocks
from unspool.cache.paged import PagedStore, Row, allocate

__all__ = ["Shelf", "SwapArea"]


@dataclass(slots=True, eq=False)
class Shelf:
    """What was put aside of some rows.

    Attributes:
        computed: of each row, how many tokens are stored.
        tables: of each row and layer group, blocks of the swap area; `GONE` where the row had none any more. Blocks
            that rows shared, also with rows of other requests, are there once.
        ready: when the device has copied them; `None` on a CPU.
    """

    computed: list[int]
    tables: list[list[list[int]]]
    ready: torch.cuda.Event | None

    def blocks(self, index: int) -> list[int]:
        """The different blocks of a layer group."""
        return list(dict.fromkeys(b for tables in self.tables for b in (tables[index] if tables else ()) if b != GONE))


class SwapArea:
    """Blocks like those of a `PagedStore`, in memory of the host.

    On a GPU nothing here waits: blocks are gathered in the order of the device's work, so that they may be written
    again at once, and travel to pinned memory on a stream of their own, beside the computation. What reads them later
    waits on the device for their arrival.

    Args:
        store: whose blocks are put aside.
        counts: blocks of each layer group.
    """

    def __init__(self, store: PagedStore, counts: Sequence[int]) -> None:
        self._store = store
        self._side: torch.cuda.Stream | None = None
        if store.device.type == "cuda":
            self._side = torch.cuda.Stream(store.device)  # type: ignore[no-untyped-call]
        self.blocks = [Blocks(count) for count in counts]
        self._block_of: list[dict[Hashable, int]] = [{} for _ in counts]  # by name
        self._name_of: list[dict[int, Hashable]] = [{} for _ in counts]
        self._pools: dict[int, tuple[Tensor, Tensor]] = {}
        for layer, index in store.group_of.items():
            shape = (counts[index], store.block_size, *store.keys[layer].shape[1:])
            dtype = store.keys[layer].dtype
            self._pools[layer] = (self._allocate(shape, dtype), self._allocate(shape, dtype))

    def put(
        self, rows: Sequence[Row], name: Callable[[int, int], Hashable] = lambda index, block: None
    ) -> Shelf | None:
        """Copy what is stored of `rows`; `None`, with nothing done, when there is no room for all of it.

        Args:
            rows: of one request.
            name: gives what tells the contents of block `block` of layer group number `index` from all others, or
                `None`. What lies here under its name already is not copied again.
        """
        store = self._store
        every = [
            list(dict.fromkeys(b for row in rows for b in (row.blocks[index] if row.blocks else ()) if b != GONE))
            for index in range(len(store.groups))
        ]
        names = [{b: name(index, b) for b in some} for index, some in enumerate(every)]
        here = [
            {b: known[called] for b, called in some.items() if called in known}
            for some, known in zip(names, self._block_of, strict=True)
        ]
        if any(len(some) - len(at) > pool.free for some, at, pool in zip(every, here, self.blocks, strict=True)):
            return None
        places: list[dict[int, int]] = []
        for index, (some, at, pool) in enumerate(zip(every, here, self.blocks, strict=True)):
            pool.share(at.values())
            fresh = [b for b in some if b not in at]
            taken = pool.take(len(fresh))
            assert taken is not None
            self._copy_out(index, fresh, taken)
            for source, block in zip(fresh, taken, strict=True):
                self.rename(index, block, names[index][source])
            places.append({GONE: GONE} | at | dict(zip(fresh, taken, strict=True)))
        tables = [[[at[b] for b in table] for at, table in zip(places, row.blocks, strict=False)] for row in rows]
        return Shelf([row.computed for row in rows], tables, self._mark())

    def fetch(self, shelf: Shelf, index: int, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy blocks `sources` of a shelf into blocks `targets` of the store, in layer group number `index`."""
        if not sources:
            return
        store = self._store
        if shelf.ready is not None:
            torch.cuda.current_stream(store.device).wait_event(shelf.ready)
        into = torch.tensor(targets, device=store.device)
        for layer in store.groups[index].layers:
            for host, pool in zip(self._pools[layer], (store.keys[layer], store.values[layer]), strict=True):
                staged = torch.empty((len(sources), *host.shape[1:]), dtype=host.dtype, device=store.device)
                for first, last, start in _runs(sources):
                    staged[first:last].copy_(host[start : start + last - first], non_blocking=True)
                pool.view(-1, store.block_size, *pool.shape[1:])[into] = staged

    def drop(self, shelf: Shelf) -> None:
        """Give back the room of a shelf."""
        for index, pool in enumerate(self.blocks):
            blocks = shelf.blocks(index)
            pool.drop(blocks)
            for block in blocks:
                if not pool.references(block):
                    self._block_of[index].pop(self._name_of[index].pop(block, None), None)

    def rename(self, index: int, block: int, name: Hashable) -> None:
        """Let what lies in `block` go by another name from now on, unless it is on no shelf or that name is taken."""
        if name is None or name in self._block_of[index] or not self.blocks[index].references(block):
            return
        self._block_of[index].pop(self._name_of[index].get(block), None)
        self._block_of[index][name] = block
        self._name_of[index][block] = name

    def is_named(self, index: int, block: int) -> bool:
        """Whether `block` was told a name."""
        return block in self._name_of[index]

    def _copy_out(self, index: int, sources: Sequence[int], targets: Sequence[int]) -> None:
        if not sources:
            return
        store = self._store
        chosen = torch.tensor(sources, device=store.device)
        for layer in store.groups[index].layers:
            for host, pool in zip(self._pools[layer], (store.keys[layer], store.values[layer]), strict=True):
                staged = pool.view(-1, store.block_size, *pool.shape[1:]).index_select(0, chosen)
                with self._beside(staged):
                    for first, last, start in _runs(targets):
                        host[start : start + last - first].copy_(staged[first:last], non_blocking=True)

    def _beside(self, staged: Tensor) -> AbstractContextManager[object]:
        """Run on the stream of copies, once `staged` is there; also after all that was fetched so far was read."""
        if self._side is None:
            return nullcontext()
        self._side.wait_stream(torch.cuda.current_stream(self._store.device))
        staged.record_stream(self._side)
        return torch.cuda.stream(self._side)

    def _mark(self) -> torch.cuda.Event | None:
        if self._side is None:
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._side)
        return event

    def _allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Pinned where a GPU copies; on a CPU, memory is taken as it is written."""
        if self._side is not None:
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        return allocate(shape, dtype, torch.device("cpu"))


def _runs(blocks: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Stretches of consecutive ids: first and one past the last place, and the first id."""
    first = 0
    for i in range(1, len(blocks) + 1):
        if i == len(blocks) or blocks[i] != blocks[i - 1] + 1:
            yield first, i, blocks[first]
            first = i
