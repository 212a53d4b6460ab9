"""Models over a paged store as a call's backend: a store made for exactly the call's rows."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from unspool.cache import PagedStore, PastKeyValues
from unspool.cache.past import PastRow
from unspool.decode.fault import find_fault
from unspool.decode.runner import Decoder, PagedRunner, Runner, Steps
from unspool.decode.sequence import Sequence
from unspool.generate.call import Abilities
from unspool.generate.outputs import GenerateOutput

__all__ = ["PagedBackend"]

# New tokens a store has room for at first; it doubles when they are used up, so that a generous limit costs nothing.
_FIRST_ROOM = 1024
_BLOCK = 16


class PagedBackend:
    """The part of a `generate.call.Backend` that is the same for every model whose keys and values we store.

    Args:
        model: what computes.
        steps: computes instead, as a part of it; `None` takes the whole.
        quantized: keep keys and values in 8 bits.
    """

    abilities = Abilities()
    recompute_past: int | None = None

    def __init__(self, model: Decoder, steps: Steps | None = None, *, quantized: bool = False) -> None:
        self._decoder = model
        self._steps = model if steps is None else steps
        self._quantized = quantized
        self.device = model.device
        self.vocab = model.spec.vocab_size
        self.positions: int | float = model.spec.max_positions if model.spec.hard_limit else math.inf
        self.recompute_past = model.spec.recompute_past

    def runner(
        self,
        rows: list[Sequence],
        copies: int,
        new: int,
        past: PastKeyValues | None,
        *,
        forks: bool,
        drafts: bool = False,
        alike: bool = False,
    ) -> PagedRunner:
        """See `Backend`. Rows that fork refer to their prompt's blocks; the others each get a run of their own."""
        room = min(new, _FIRST_ROOM)
        store = self._shared(rows, copies, room, alike) if forks else self._separate(rows, room)
        if past is not None and past.store.quantized == store.quantized:
            for i, old in enumerate(past.rows):
                served = rows[i * copies : i * copies + (1 if forks else copies)]
                for row in served:
                    if row.adapter is old.adapter:
                        store.adopt(row, past.store, old, _common(row.tokens, old.tokens[: old.computed]))
        return PagedRunner(self._steps, store, self.device, rows, forks=forks, alike=copies if alike else 1)

    @property
    def windows(self) -> list[int | None]:
        """See `Backend`."""
        of = {layer: group.window for group in self._decoder.spec.groups for layer in group.layers}
        return [of[layer] for layer in sorted(of)]

    def unseen(self) -> AbstractContextManager[Any]:
        """See `Backend`."""
        return torch.inference_mode()

    def past(self, rows: list[Sequence], runner: Runner, width: int) -> PastKeyValues | None:
        """See `Backend`."""
        assert isinstance(runner, PagedRunner)
        stored = [PastRow(row.tokens[: row.computed], row.computed, row.blocks, row.adapter) for row in rows]
        return PastKeyValues(runner.store, stored, width)

    def dress(self, result: Tensor | GenerateOutput) -> Tensor | GenerateOutput:
        """See `Backend`: nothing to add."""
        return result

    def fault(self, row: Sequence) -> str:
        """See `Backend`."""
        return find_fault(self._decoder, row)

    def _separate(self, rows: list[Sequence], room: int) -> PagedStore:
        """A run of blocks for every row, longest first."""
        tokens = max(len(row.tokens) for row in rows) + room
        store = self._empty(-(-tokens // _BLOCK) * len(rows))
        for row in sorted(rows, key=lambda row: -len(row.tokens)):
            store.reserve(row, tokens)
        return store

    def _shared(self, rows: list[Sequence], copies: int, room: int, alike: bool) -> PagedStore:
        """Blocks for each prompt once, and for each row's output, of which `alike` rows have but the last apart."""
        blocks = 0
        for row in rows[::copies]:
            full, every = len(row.tokens) // _BLOCK, -(-(len(row.tokens) + room) // _BLOCK)
            blocks += every + copies if alike else full + copies * (every - full)
        store = self._empty(blocks)
        for row in rows[::copies]:
            store.reserve(row, len(row.tokens))
        return store

    def _empty(self, blocks: int) -> PagedStore:
        return PagedStore(
            self._steps.spec.groups,
            blocks,
            dtype=self._decoder.dtype,
            device=self.device,
            block_size=_BLOCK,
            quantized=self._quantized,
        )


def _common(tokens: list[int], stored: list[int]) -> int:
    """How many leading tokens agree; at least one token of the new prompt is left to compute."""
    limit = min(len(tokens) - 1, len(stored))
    return next((i for i in range(limit) if tokens[i] != stored[i]), limit)
