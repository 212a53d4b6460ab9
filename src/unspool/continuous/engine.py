"""Requests in, steps, outputs out: everything of a manager that needs no thread."""

from __future__ import annotations

import logging
from collections.abc import Sequence as Items
from heapq import heappop, heappush
from time import monotonic, perf_counter
from typing import Any

import torch

from unspool.cache.prefix import Node
from unspool.continuous.metrics import Metrics, Tally
from unspool.continuous.outbox import Outbox
from unspool.continuous.plain import PlainRows
from unspool.continuous.requests import RequestState, RequestStatus
from unspool.continuous.room import Room
from unspool.continuous.scheduler import Scheduler
from unspool.decode.loop import Loop
from unspool.decode.runner import Runner
from unspool.decode.sequence import Sequence, Work
from unspool.errors import CacheFull, RequestFailed

__all__ = ["Engine"]

logger = logging.getLogger("unspool")

# Steps that may feed nothing while requests wait: a request waits for another one's prefix no longer than that.
_PATIENCE = 4

_STATUS = {
    "stop": RequestStatus.FINISHED,
    "length": RequestStatus.FINISHED,
    "deadline": RequestStatus.FINISHED,
    "cancelled": RequestStatus.CANCELLED,
}


class Engine:
    """Steps any number of requests, and answers every one of them once.

    An error in what belongs to one request (a processor, a criterion, a streamer, a callback) ends that request. One
    while computing ends the requests that were in the step; those that wait go on. One in the scheduler, which all
    share, is raised.

    Args:
        runner: computes over the room's store.
        device: where tokens are chosen.
        scheduler: orders the requests.
        plain: where greedy and sampled rows are decided.
        outbox: where outputs go.
        token_budget: most tokens fed in a step.
        ahead: launch a step before the one before is committed, where nothing on the host must see that first. A row
            that turns out to have ended is then computed once more, for nothing.

    Attributes:
        live: requests that are not answered yet.
        parents: for outputs that come of another request's rows, that request. Owner: the manager, who adds.
        remembers: keep in mind which blocks ended requests had, for `evict`.
    """

    def __init__(
        self,
        runner: Runner,
        device: torch.device,
        scheduler: Scheduler,
        plain: PlainRows,
        outbox: Outbox,
        *,
        token_budget: int,
        ahead: bool = False,
    ) -> None:
        self.scheduler = scheduler
        self.room: Room = scheduler.cache
        self.plain = plain
        self.outbox = outbox
        self.token_budget = token_budget
        self.tally = Tally()
        self.live: dict[str, RequestState] = {}
        self.remembers = False
        self.parents: dict[str, str] = {}
        self._ahead = ahead
        self._loop = Loop(runner, self, device=device, failed=self._rows_failed)
        self._loop.in_step = True
        self._scheduled: list[RequestState] = []
        self._flying: list[RequestState] = []  # requests of the step before, where it is not committed yet
        self._parts: list[list[Work]] = []  # the work of each request in the last step,
        self._work: list[Work] = []  # all of it,
        self._fed = 0  # and its tokens
        self._idle = 0  # steps in a row that fed nothing
        self._ended: dict[str, list[Node]] = {}
        self._deadlines: list[tuple[float, str]] = []  # when, and whose; some of them are over
        self._sent: dict[RequestState, int] = {}  # how many tokens those who follow a request have seen

    def take_in(self, states: Items[RequestState]) -> None:
        """Let requests wait for their turn."""
        for state in states:  # all of them before anything can go wrong with one, since all must be answered
            self.live |= {one.request_id: one for one in (state, *state.children)}
        for state in states:
            wishes = state.wishes
            if wishes.deadline is not None:
                heappush(self._deadlines, (wishes.deadline, state.request_id))
            if wishes.streaming or wishes.streamer is not None:
                self._sent[state] = 0
            if wishes.streamer is not None:
                self._stream(state, [wishes.prompt])
            if state.finish_reason is not None:  # the streamer raised, or it was cancelled before
                self._close(state)
                continue
            self.scheduler.add_waiting_request(state)

    def step(self) -> bool:
        """Take one step; `False` when there is nothing to do.

        Raises:
            Exception: the scheduler failed; nothing can go on.
        """
        self._take_out()
        if not self.scheduler.has_pending_requests():
            self._loop.settle()
            self._flying = []
            return False
        self._scheduled = []
        failed = False
        try:
            with torch.no_grad():
                moved = self._loop.step()
        except Exception as error:
            if not self._scheduled:
                raise
            self._loop.settle()  # the step before, if that is in flight, is not lost with this one
            self._fail_step(error)
            moved, failed = True, True
        self._look_after(list(dict.fromkeys([*self._flying, *self._scheduled])) if self._flying else self._scheduled)
        self._flying = [] if failed or self._loop.in_step else self._scheduled
        self._idle = 0 if moved else self._idle + 1
        if self._idle > _PATIENCE and self.scheduler.has_pending_requests():
            self._answer_stuck()
        return True

    def plan(self) -> list[Work]:
        """See `decode.plan.Scheduler`: plain rows by place, then those that are decided together."""
        self._scheduled = self.scheduler.schedule_batch(self.token_budget, self.room.capacity)
        if self._ahead:
            self._loop.in_step = True in [state.heedful for state in self._scheduled]
        parts = [state.work for state in self._scheduled]
        if parts == self._parts:
            return self._work
        group = self.plain.group
        single = [state.work[0] for state in self._scheduled if state.home.group is group]
        single.sort(key=_place)
        work = single + [item for state in self._scheduled if state.home.group is not group for item in state.work]
        self._parts, self._work = parts, work
        self._fed = sum([item.feed for item in work])
        return work

    def answer_all(self, reason: str, error: BaseException | None) -> None:
        """End every request for one reason, but those that ended in the step that is in flight."""
        self._loop.settle()
        self._flying = []
        for state in list(self.live.values()):
            state.end(reason, error=error)
            self._close(state)

    def evict(self, request_id: str) -> None:
        """Forget what is kept of a request that ended."""
        self.room.forget(self._ended.pop(request_id, []))

    def metrics(self) -> Metrics:
        """The numbers now; from any thread, then a step may be under way."""
        tally, room, live = self.tally, self.room, list(self.live.values())
        return Metrics(
            waiting=len(self.scheduler.waiting_requests),
            running=len(self.scheduler.active_requests),
            finished=dict(tally.finished),
            steps=tally.steps,
            tokens_fed=tally.tokens_fed,
            tokens_made=tally.tokens_made,
            tokens_per_second=tally.rate(),
            time_to_first_token=tally.time_to_first_token(live),
            time_per_token=tally.time_per_token,
            cache_use=1 - room.share_available,
            cache_peak=tally.cache_peak,
            cache_kept=room.share_kept,
            past_bytes=room.past_bytes,
            cached_tokens=room.hits,
            prefix_hits=room.hits / room.asked if room.asked else None,
            drafted_tokens=tally.drafted + sum(state.drafted for state in live),
            accepted_tokens=tally.accepted + sum(state.accepted for state in live),
            preemptions=self.scheduler.preemptions,
            swaps=room.swaps,
            last_token=None if tally.last_token is None else perf_counter() - tally.last_token,
        )

    def _take_out(self) -> None:
        """End requests that were cancelled or whose time is over."""
        for state in self.scheduler.clear_cancelled_requests():
            state.end("cancelled")
            self._close(state)
        now = monotonic() if self._deadlines else 0.0
        while self._deadlines and self._deadlines[0][0] <= now:
            deadline, request_id = heappop(self._deadlines)
            late = self.live.get(request_id)
            if late is not None and late.wishes.deadline == deadline:
                late.end("deadline")
                self._close(late)

    def _look_after(self, states: Items[RequestState]) -> None:
        """After a step: index what is stored, tell those who follow, and close requests that ended."""
        plain, made = self.plain.group, self.plain.made
        use = 1 - self.room.share_available
        failed, self.scheduler.failed = self.scheduler.failed, []
        for state in failed:
            self._close(state)
        for state in [state for state in states if state.work is not state.next_token]:
            if state.home.group is not plain:
                made += state.newly_made()
            if state.error is None and (state.status is RequestStatus.PREFILLING or len(state.rows) == 1):
                for item in state.work:
                    self.room.advance(item.seq)
        if self._sent:
            for state in [state for state in states if state in self._sent and state.error is None]:
                self._tell(state)
        for state in [state for state in states if state.finish_reason is not None]:
            self._close(state)
        self.plain.made = 0
        self.tally.step(self._fed, made, use)

    def _tell(self, state: RequestState) -> None:
        """Give new tokens to those who follow a request."""
        tokens = state.generated_tokens
        begin = self._sent[state]
        if len(tokens) == begin:
            return
        self._sent[state] = len(tokens)
        wishes = state.wishes
        if wishes.streamer is not None and not self._stream(state, tokens[begin:]):
            return
        if wishes.streaming and state.finish_reason is None:
            self._deliver(state)

    def _stream(self, state: RequestState, items: Items[Any]) -> bool:
        """Put each of `items` (tokens, or a prompt) into a request's streamer; `False` when it raised."""
        try:
            for item in items:
                state.wishes.streamer.put(torch.tensor([item]))
        except Exception as error:
            state.end("error", error=_blame(state, "its streamer", error))
            return False
        return True

    def _deliver(self, state: RequestState) -> None:
        try:
            self.outbox.put(state.to_generation_output())
        except Exception as error:
            if state.finish_reason is None:
                state.end("error", error=_blame(state, "its result handler", error))
            else:
                logger.exception("the result handler of request %r raised", state.request_id)

    def _close(self, state: RequestState) -> None:
        """Answer a request that ended, and let go of it; once."""
        if self.live.pop(state.request_id, None) is None:
            return
        if state.error is None and len(state.rows) == 1:
            self.room.advance(state.rows[0])
        self.scheduler.finish_request(state.request_id, evict_from_cache=state.error is not None)
        state.lifespan = (state.lifespan[0], perf_counter())
        state.status = _STATUS.get(state.finish_reason or "error", RequestStatus.FAILED)
        if self.remembers:
            self._ended[state.request_id] = state.nodes
        self._sent.pop(state, None)
        if state.wishes.streamer is not None:
            _end_stream(state)
        self.tally.end(state)
        self._deliver(state)
        self.parents.pop(state.request_id, None)
        for child in state.children:
            child.end(state.finish_reason or "error", stop=state.stop, error=state.error)
            child.lifespan, child.first_token = state.lifespan, state.first_token
            self._close(child)

    def _rows_failed(self, rows: list[Sequence], error: Exception) -> None:
        """What was decided together failed; see `decode.loop.Failed`."""
        lost = set(rows)
        for state in (*self._flying, *self._scheduled):
            if not lost.isdisjoint(state.rows):
                state.end("error", error=_blame(state, "choosing its tokens", error))

    def _fail_step(self, error: Exception) -> None:
        """What was computed in a step is lost, and nobody knows whose fault it is."""
        logger.error("a step of %d requests failed: %r", len(self._scheduled), error)
        for state in self._scheduled:
            state.end("error", error=_blame(state, "the step it was in", error))

    def _answer_stuck(self) -> None:
        """Nothing runs and nothing can start, which a scheduler's `fill` does not let happen; refuse what is next."""
        states = [*self.scheduler.active_requests.values(), *self.scheduler.waiting_requests.values()]
        state = states[0]
        state.end("error", error=CacheFull(f"no room can be made for request {state.request_id!r}"))
        self._close(state)


def _place(item: Work) -> int:
    return item.seq.row


def _blame(state: RequestState, what: str, error: BaseException) -> RequestFailed:
    if isinstance(error, RequestFailed):
        return error
    return RequestFailed(f"{what} failed: {error!r}", request_id=state.request_id, cause=error)


def _end_stream(state: RequestState) -> None:
    """Close a request's streamer; what it raises now concerns nobody else."""
    streamer = state.wishes.streamer
    try:
        fail = getattr(streamer, "fail", None)
        if state.error is not None and fail is not None:
            fail(state.error)
        else:
            streamer.end()
    except Exception as error:
        state.end("error", error=_blame(state, "its streamer", error))
        if state.finish_reason != "error":
            logger.exception("the streamer of request %r raised at its end", state.request_id)
