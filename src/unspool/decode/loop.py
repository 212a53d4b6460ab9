"""The loop: one step, whole. The host commits one step behind the device, so a GPU never waits for Python."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from unspool.cache.paged import PagedStore
from unspool.decode.batch import build_batch
from unspool.decode.plan import Scheduler
from unspool.decode.sequence import Choice, Group, Sequence, Work
from unspool.models.base import Batch, ModelSpec


class Runnable(Protocol):
    """The part of a model the loop uses."""

    spec: ModelSpec

    def step(self, batch: Batch) -> Tensor:
        """Logits of the kept tokens, `[kept, vocab]`."""
        ...


Watch = Callable[[list[Work], list[list[Tensor]], list[Tensor]], None]
"""`(work, weights per layer and row, hidden states per layer)` of one step, for callers that record them."""


@dataclass(slots=True)
class Flight:
    """A step that was launched and not yet committed."""

    rows: list[Sequence]
    choice: Choice
    host: Tensor
    ready: torch.cuda.Event | None

    def tokens(self) -> list[int]:
        """The chosen tokens; waits for the device when they are not there yet."""
        if self.ready is not None:
            self.ready.synchronize()
        values: list[int] = self.host.tolist()
        return values


class Loop:
    """Runs a group's steps until its scheduler has nothing left.

    Args:
        model: gives logits.
        store: has room for the rows; the loop extends, copies and releases.
        group: rows, chooser, sink.
        scheduler: says what to feed.
        twins: for each row, the row whose prompt it shares (itself where it shares none), when the scheduler feeds only
            the latter in the prompt's steps; the others get copies of its keys, values and logits.
        forks: the others refer to its blocks instead of copying them.
        in_step: commit each step before the next is planned, because something on the host must see it first.
        watch: called after each step with attention weights and hidden states.
    """

    def __init__(
        self,
        model: Runnable,
        store: PagedStore,
        group: Group,
        scheduler: Scheduler,
        *,
        device: torch.device,
        twins: list[Sequence] | None = None,
        forks: bool = False,
        in_step: bool = False,
        watch: Watch | None = None,
    ) -> None:
        self.model = model
        self.store = store
        self.group = group
        self.scheduler = scheduler
        self.device = device
        self.in_step = in_step or device.type == "cpu"
        self._twins = twins
        self._forks = forks
        self._watch = watch
        self._flight: Flight | None = None

    def run(self) -> None:
        """Step until the scheduler has nothing to feed and nothing is in flight. The caller turns gradients off."""
        while self.step():
            pass

    def step(self) -> bool:
        """Launch the next step and commit the one before (or, in step, itself); `False` when nothing was left to do."""
        work = self.scheduler.plan()
        before, self._flight = self._flight, self._launch(work) if work else None
        if before is not None:
            self._commit(before)
        if self.in_step and self._flight is not None:
            flight, self._flight = self._flight, None
            self._commit(flight)
        return bool(work)

    def _launch(self, work: list[Work]) -> Flight | None:
        for row, feed, _ in work:
            if not self.store.extend(row, feed):
                self.store.enlarge([row for row in self.group.rows if row.blocks], 2 * (row.computed + feed))
                made = self.store.extend(row, feed)
                assert made, "enlarge makes room for every row"
        weights: list[list[Tensor]] | None = None if self._watch is None else []
        trace: list[Tensor] | None = None if self._watch is None else []
        batch = build_batch(work, self.group, self.store, self.model.spec, self.device, weights, trace)
        logits = self.model.step(batch)
        for row, feed, _ in work:
            row.computed += feed
        if self._watch is not None:
            self._watch(work, weights or [], trace or [])
        rows = sorted((item.seq for item in work if item.keep), key=lambda row: row.row)
        if not rows:
            return None
        if self._twins is not None:
            rows, logits = self._spread(rows, logits)
        choice = self.group.chooser.choose(logits, rows)
        self._advance(rows, choice.tokens)
        return self._fly(rows, choice)

    def _spread(self, leaders: list[Sequence], logits: Tensor) -> tuple[list[Sequence], Tensor]:
        """Give the rows that share a leader's prompt its keys, values and logits."""
        assert self._twins is not None
        place = {id(leader): i for i, leader in enumerate(leaders)}
        if self._forks:
            self.store.reparent(self.group.rows, [other.row for other in self._twins])
        else:
            pairs = list(zip(self.group.rows, self._twins, strict=True))
            for leader in leaders:
                self.store.copy(leader, [row for row, other in pairs if other is leader and row is not leader])
        index = torch.tensor([place[id(other)] for other in self._twins], device=self.device)
        self._twins = None
        return self.group.rows, logits.index_select(0, index)

    def _advance(self, rows: list[Sequence], tokens: Tensor) -> None:
        """Make the chosen tokens what the next step feeds, still on the device."""
        for row in rows:
            row.pending += 1
        if self.in_step:  # they are on the host before the next step is built
            return
        if len(rows) == len(self.group.rows):
            self.group.last = tokens.clamp_min(0)
        else:
            self.group.last = self.group.last.index_copy(
                0, torch.tensor([row.row for row in rows], device=self.device), tokens.clamp_min(0)
            )

    def _fly(self, rows: list[Sequence], choice: Choice) -> Flight:
        if self.device.type != "cuda":
            return Flight(rows, choice, choice.tokens, None)
        host = torch.empty(choice.tokens.shape, dtype=torch.int64, pin_memory=True)
        host.copy_(choice.tokens, non_blocking=True)
        ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        ready.record()
        return Flight(rows, choice, host, ready)

    def _commit(self, flight: Flight) -> None:
        for row in flight.rows:
            row.pending -= 1
        if flight.choice.parents is not None:
            self._fork(flight.rows, flight.choice.parents.tolist())
        self.group.sink.commit(flight.rows, flight.tokens(), flight.choice)

    def _fork(self, rows: list[Sequence], parents: list[int]) -> None:
        """Make each row what its parent is, in tokens and in what is stored."""
        tokens = [row.tokens for row in rows]
        self.store.reparent(rows, parents)
        for i, parent in enumerate(parents):
            if parent != i:
                rows[i].tokens = list(tokens[parent])
