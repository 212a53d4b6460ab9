"""The loop: one step, whole. The host commits one step behind the device, so a GPU never waits for Python."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from unspool.decode.plan import Scheduler
from unspool.decode.runner import Output, Runner
from unspool.decode.sequence import Choice, Group, Sequence, Want, Work

Failed = Callable[[list[Sequence], Exception], None]
"""Told of rows whose group's chooser, sink or watch raised; other rows go on, also those of its step before."""


@dataclass(slots=True)
class Flight:
    """A group's step that was launched and not yet committed; `ahead` when the next one may be launched before."""

    group: Group
    rows: list[Sequence]
    choice: Choice
    host: Tensor
    ready: torch.cuda.Event | None
    ahead: bool

    def tokens(self) -> list[int]:
        """The chosen tokens; waits for the device when they are not there yet."""
        if self.ready is not None:
            self.ready.synchronize()
        values: list[int] = self.host.tolist()
        return values


class Loop:
    """Runs the steps of any number of groups until the scheduler has nothing left.

    Args:
        runner: computes.
        scheduler: says what to feed; work of one group stands side by side, by ascending row.
        device: where tokens are chosen.
        in_step: commit each step before the next is planned, because something on the host must see it first. It may be
            set anew before each step, also by the plan for the step it makes.
        failed: told of rows whose group fails in its own chooser, sink or watch; without it, such an error ends all.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        *,
        device: torch.device,
        in_step: bool = False,
        failed: Failed | None = None,
    ) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self.device = device
        self.in_step = in_step or device.type == "cpu"
        self._failed = failed
        self._flights: list[Flight] = []
        self._steps = 0

    def run(self) -> None:
        """Step until the scheduler has nothing to feed and nothing is in flight. The caller turns gradients off."""
        while self.step():
            pass

    def step(self) -> bool:
        """Launch the next step and commit the one before (or, in step, itself); `False` when nothing was left to do."""
        work = self.scheduler.plan()
        self._steps += 1
        before, self._flights = self._flights, self._launch(work) if work else []
        self._commit(before)
        if self.in_step:
            self.settle()
        return bool(work)

    def settle(self) -> None:
        """Commit what is in flight."""
        flights, self._flights = self._flights, []
        self._commit(flights)

    def _launch(self, work: list[Work]) -> list[Flight]:
        parts = _by_group(work)
        want = Want()
        for items in parts:
            if items[0].group.watch is not None:
                want |= items[0].group.watch.want
        try:
            output = self.runner.run(work, want)
        except Exception as error:
            self._note(error)
            raise
        for item in work:
            item.seq.computed += item.feed
        flights: list[Flight] = []
        place, token, first = 0, 0, 0
        for items in parts:
            mine = output
            if len(parts) > 1:
                kept, fed = sum(item.keep for item in items), sum(item.feed for item in items)
                mine = _part(output, place, place + kept, token, token + fed, first, first + len(items))
                place, token, first = place + kept, token + fed, first + len(items)
            try:
                flight = self._choose(items, mine)
            except Exception as error:
                self._blame([item.seq for item in items], error)
            else:
                flights += flight
        return flights

    def _choose(self, items: list[Work], output: Output) -> list[Flight]:
        """Let one group see its part of the step and decide; nothing is in flight when none of its rows chooses."""
        group = items[0].group
        if group.watch is not None:
            group.watch(items, output.weights, output.hidden)
        rows = [item.seq for item in items if item.keep]
        if not rows:
            return []
        logits = output.logits
        if group.twins is not None:
            rows, logits = self._spread(group, rows, logits)
        choice = group.chooser.choose(logits, rows)
        self._advance(group, rows, choice.tokens)
        return [self._fly(group, rows, choice)]

    def _spread(self, group: Group, leaders: list[Sequence], logits: Tensor) -> tuple[list[Sequence], Tensor]:
        """Give the rows that share a leader's prompt its keys, values and logits."""
        assert group.twins is not None
        place = {id(leader): i for i, leader in enumerate(leaders)}
        number = {id(row): i for i, row in enumerate(group.rows)}
        self.runner.fork(group.rows, [number[id(other)] for other in group.twins])
        index = torch.tensor([place[id(other)] for other in group.twins], device=self.device)
        group.twins = None
        return group.rows, logits.index_select(0, index)

    def _advance(self, group: Group, rows: list[Sequence], tokens: Tensor) -> None:
        """Make the chosen tokens what the next step feeds, still on the device."""
        if self.in_step:  # they are on the host before the next step is built
            return
        for row in rows:
            row.pending += 1
        if len(rows) == len(group.rows):
            group.last = tokens.clamp_min(0)
        else:
            group.last = group.last.index_copy(
                0, torch.tensor([row.row for row in rows], device=self.device), tokens.clamp_min(0)
            )

    def _fly(self, group: Group, rows: list[Sequence], choice: Choice) -> Flight:
        if self.device.type != "cuda":
            return Flight(group, rows, choice, choice.tokens, None, not self.in_step)
        host = torch.empty(choice.tokens.shape, dtype=torch.int64, pin_memory=True)
        host.copy_(choice.tokens, non_blocking=True)
        ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        ready.record()
        return Flight(group, rows, choice, host, ready, not self.in_step)

    def _commit(self, flights: list[Flight]) -> None:
        for flight in flights:
            if flight.ahead:
                for row in flight.rows:
                    row.pending -= 1
            try:
                self._land(flight)
            except Exception as error:
                self._blame(flight.rows, error)

    def _land(self, flight: Flight) -> None:
        """Give one group its tokens, and make the rows what the choice says they are."""
        rows, choice = flight.rows, flight.choice
        if choice.parents is not None:
            parents: list[int] = choice.parents.tolist()
            tokens = [row.tokens for row in rows]
            self.runner.fork(rows, parents)
            for i, parent in enumerate(parents):
                if parent != i:
                    rows[i].tokens = list(tokens[parent])
        flight.group.sink.commit(rows, flight.tokens(), choice)
        if choice.counts is not None:
            for row in rows:
                if row.computed >= len(row.tokens):  # what was fed of a draft and not accepted
                    self.runner.rewind(row, len(row.tokens) - 1)
                row.draft = []

    def _blame(self, rows: list[Sequence], error: Exception) -> None:
        self._note(error)
        if self._failed is None:
            raise error
        self._failed(rows, error)

    def _note(self, error: Exception) -> None:
        error.add_note(f"raised in step {self._steps} of decoding")


def _by_group(work: list[Work]) -> list[list[Work]]:
    """The work of each group, which stands side by side."""
    if work[0].group is work[-1].group:
        return [work]
    return [list(items) for _, items in groupby(work, key=lambda item: id(item.group))]


def _part(output: Output, place: int, end: int, token: int, last: int, first: int, behind: int) -> Output:
    """One group's share of a step."""
    return Output(
        output.logits[place:end],
        [layer[first:behind] for layer in output.weights],
        [layer[token:last] for layer in output.hidden],
    )
