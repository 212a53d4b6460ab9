"""Which requests the next step feeds: the scheduler to subclass, the two that come with it, and their names.

A scheduler says in which order requests are considered (`schedule_batch`); `fill` does the rest in that order: it
starts requests while there is room for them, cuts prompts to the token budget, and puts requests back from the end of
the order when those before them need room. A request that was put back waits in front of the others. What was stored
of it is copied into the swap area where there is one with room for it, and back later; else it stays findable until its
room is needed, and the rest is computed again.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence as Items
from time import perf_counter

from unspool.continuous.requests import RequestState, RequestStatus
from unspool.continuous.room import Room
from unspool.decode.sequence import Drafter, Sequence, Work
from unspool.errors import RequestFailed

__all__ = ["FIFOScheduler", "PrefillFirstScheduler", "Scheduler", "register_scheduler", "scheduler_class"]


class Scheduler(ABC):
    """Keeps the requests that wait and those that run, and chooses what the next step feeds.

    Subclass it, define `schedule_batch`, and give it a name with `register_scheduler`. Everything but
    `set_request_cancellation` is called by the generation loop alone.

    Args:
        cache: room for keys and values.
        safety_margin: share of the cache (0 to 1) that must be free for another request to start while others run;
            `None` takes the class's own.
        max_requests_per_batch: most requests that run at a time.
        recompute_past: see `ModelSpec`.

    Attributes:
        active_requests: those that run, in the order in which they started.
        waiting_requests: those that wait; the first is next.
        preemptions: how often a request was put back to make room.

    Raises:
        ValueError: a number is out of range.
    """

    default_safety_margin = 0.0

    def __init__(
        self,
        cache: Room,
        safety_margin: float | None = None,
        max_requests_per_batch: int = 256,
        *,
        recompute_past: int | None = None,
    ) -> None:
        margin = self.default_safety_margin if safety_margin is None else safety_margin
        if not 0 <= margin <= 1:
            raise ValueError(f"safety_margin must be in [0, 1], not {margin}")
        if max_requests_per_batch < 1:
            raise ValueError(f"max_requests_per_batch must be at least 1, not {max_requests_per_batch}")
        self.cache = cache
        self.safety_margin = margin
        self.max_requests_per_batch = max_requests_per_batch
        self.active_requests: dict[str, RequestState] = {}
        self.waiting_requests: dict[str, RequestState] = {}
        self.preemptions = 0
        self.failed: list[RequestState] = []  # those that could not be planned; the engine answers and clears them
        self._recompute_past = recompute_past
        self._cancelled: set[str] = set()
        self._lock = threading.Lock()

    def reset(self) -> None:
        """Let go of all requests and their blocks, without answering them; what is stored of them is forgotten."""
        for request_id in [*self.active_requests, *self.waiting_requests]:
            self.finish_request(request_id)
        with self._lock:
            self._cancelled.clear()

    def add_waiting_request(self, state: RequestState) -> None:
        """Let a request wait, behind the others."""
        self.waiting_requests[state.request_id] = state

    @abstractmethod
    def schedule_batch(self, token_budget: int, cache_budget: int) -> list[RequestState]:
        """The requests of the next step, each with its `work`; usually `self.fill(order, token_budget, cache_budget)`.

        Args:
            token_budget: most tokens to feed.
            cache_budget: most stored tokens to read.
        """

    def has_pending_requests(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self.active_requests or self.waiting_requests)

    def finish_request(self, request_id: str, evict_from_cache: bool = True) -> None:
        """Let go of a request, which ended, and of its blocks.

        Args:
            evict_from_cache: also forget what is stored of it, instead of keeping it findable until its room is needed.
                Blocks that others use stay in any case.
        """
        state = self.active_requests.pop(request_id, None)
        if state is None:
            waited = self.waiting_requests.pop(request_id, None)
            if waited is not None:
                self.cache.discard(waited.rows[0])
            return
        self._stop(state, forget=evict_from_cache)

    def get_active_request_static_outputs(self, request_id: str) -> list[int]:
        """The tokens that a running request has made so far; none for any other."""
        state = self.active_requests.get(request_id)
        return [] if state is None else list(state.generated_tokens)

    def set_request_cancellation(self, request_id: str) -> None:
        """Mark a request as cancelled; from any thread. It is taken out before the next step."""
        with self._lock:
            self._cancelled.add(request_id)

    def clear_cancelled_requests(self) -> list[RequestState]:
        """Take out the requests that were marked as cancelled, and give them."""
        if not self._cancelled:
            return []
        with self._lock:
            marked, self._cancelled = self._cancelled, set()
        found = []
        for request_id in marked:
            state = self.active_requests.get(request_id) or self.waiting_requests.get(request_id)
            if state is not None:
                self.finish_request(request_id, evict_from_cache=False)
                found.append(state)
        return found

    def request_is_cancelled(self, request_id: str) -> bool:
        """Whether a request is marked as cancelled, or neither waits nor runs (any more)."""
        if request_id in self._cancelled:
            return True
        return request_id not in self.active_requests and request_id not in self.waiting_requests

    def fill(self, order: Items[RequestState], token_budget: int, cache_budget: int) -> list[RequestState]:
        """Plan the next step for requests in `order`, which are active or waiting; see the module."""
        self.cache.clock += 1
        chosen: list[RequestState] = []
        full = False  # no further request starts in this step
        last = len(order)  # requests from here on were put back
        while self.cache.overfull and (behind := self._last_opened(order, last)) > 0:
            self._preempt(order[behind])
            last, full = behind, True
        place = -1
        while (place := place + 1) < last and token_budget > 0:
            state = order[place]
            if state.rows[0].pending and state.rows[0].known >= state.most:
                continue  # its last token is on its way
            if state.status is RequestStatus.DECODING and (row := state.rows[0]).computed < state.reach:
                state.work = state.next_token
                chosen.append(state)
                token_budget -= 1
                cache_budget -= row.computed
                continue
            waits = state.status is RequestStatus.PENDING
            if waits and (full or not self._may_start()):
                full = True
                continue
            stored = state.current_len()
            if stored > cache_budget and chosen:
                continue
            if waits:
                row = state.rows[0]
                if not self.cache.is_aside(row) and not self.cache.admit(row, state.wishes.key, state.seen):
                    continue  # its beginning is just being computed
                if self._lacks_room(state) and not any(_runs(other) for other in order[place + 1 : last]):
                    self.cache.release(row)
                    full = True
                    continue
                self._start(state)
            fits = self._plan(state, token_budget)
            while not fits:
                last = self._put_back_from_end(order, place, last)
                if last == place + 1:
                    break
                fits = self._plan(state, token_budget)
            if not fits:
                self._preempt(state, counts=not waits)
                full = True
                continue
            if state.work:
                chosen.append(state)
                cache_budget -= stored
                token_budget -= sum(item.feed for item in state.work)
        return chosen

    def _may_start(self) -> bool:
        """Whether another request may start."""
        running = len(self.active_requests)
        if running >= self.max_requests_per_batch:
            return False
        if not running:
            return True
        states = self.active_requests.values()
        begun = (state.rows[0] for state in states if state.status is RequestStatus.PREFILLING)
        return self.cache.share_available >= self.safety_margin and self.cache.has_memory(self.safety_margin, begun)

    def _lacks_room(self, state: RequestState) -> bool:
        """Whether a waiting request, of which what is stored was found, could not get to its next token now."""
        row = state.rows[0]
        return self.cache.lacks(row, row.known)

    def _start(self, state: RequestState) -> None:
        """Begin a waiting request, of which what is stored was found."""
        first = state.rows[0]
        if not self.cache.is_aside(first):
            self.cache.count(first)
        del self.waiting_requests[state.request_id]
        self.active_requests[state.request_id] = state
        if state.lifespan[0] < 0:
            state.lifespan = (perf_counter(), -1)
            state.cached_tokens = first.computed
        state.status = RequestStatus.PREFILLING
        state.home.enter(state)

    def _stop(self, state: RequestState, *, forget: bool) -> None:
        """Take a running request's blocks and its place."""
        state.work, state.reach = [], 0
        if state.seen is not None:
            state.seen = max(state.seen, state.rows[0].computed)
        tables = [row.blocks for row in state.rows]
        state.nodes = [node for row in state.rows for node in self.cache.release(row)]
        if forget:
            self.cache.forget(state.nodes, tables)
        state.home.leave(state)

    def _preempt(self, state: RequestState, *, counts: bool = True) -> None:
        """Put a running request back; it is next of those that wait."""
        del self.active_requests[state.request_id]
        if counts:
            if len(state.rows) == 1:
                self.cache.advance(state.rows[0])
            self.cache.put_aside(state.rows)
        self._stop(state, forget=False)
        state.status = RequestStatus.PENDING
        state.preemptions += counts
        self.preemptions += counts
        self.waiting_requests = {state.request_id: state, **self.waiting_requests}

    def _put_back_from_end(self, order: Items[RequestState], place: int, last: int) -> int:
        """Put back the last running request of `order[place + 1 : last]`; gives its place, `place + 1` without any."""
        for behind in range(last - 1, place, -1):
            if _runs(order[behind]):
                self._preempt(order[behind])
                return behind
        return place + 1

    def _last_opened(self, order: Items[RequestState], last: int) -> int:
        """The place of the last running request of `order[:last]` with a past beside the store; -1 for none."""
        places = (i for i in range(last - 1, -1, -1) if _runs(order[i]) and self.cache.opens(order[i].rows[0]))
        return next(places, -1)

    def _plan(self, state: RequestState, budget: int) -> bool:
        """Set `work` of a running request; `False` when there is no room for it."""
        if self.cache.is_aside(state.rows[0]) and not self.cache.bring_back(state.rows, state.wishes.key):
            return False
        if len(state.rows) == 1:
            return self._plan_row(state, state.rows[0], budget)
        return self._plan_rows(state, budget)

    def _plan_row(self, state: RequestState, row: Sequence, budget: int) -> bool:
        """The next token or a chunk of the prompt."""
        self._start_over(state, row)
        feed = row.known - row.computed
        keep = 1
        group = state.home.group
        if group.drafter is not None and feed == 1:
            if not self._draft(state, group.drafter, [row], budget):
                return True
            feed = keep = 1 + len(row.draft)
        if feed > budget:
            feed, keep = budget, 0
        if feed > keep and (fits := self.cache.chunk(row, feed)) < feed:
            feed, keep = fits, 0
        end = row.computed + feed
        if state.status is RequestStatus.DECODING:
            self.cache.advance(row)
        # What a row writes into is its own, so that only a new block needs asking for.
        if (not row.blocks or end > len(row.blocks[0]) * self.cache.store.block_size) and not self.cache.extend(
            row, feed
        ):
            return False
        if keep:
            state.status = RequestStatus.DECODING
            if state.next_token and self._recompute_past is None:
                state.reach = len(row.blocks[0]) * self.cache.store.block_size
        state.work = state.next_token if feed == keep == 1 and state.next_token else [Work(row, feed, keep, group)]
        return True

    def _start_over(self, state: RequestState, row: Sequence) -> None:
        """Let a row be computed anew, once, where its stored keys no longer fit; see `ModelSpec.recompute_past`."""
        limit = self._recompute_past
        if limit is not None and row.known > limit and row not in state.started_over:
            state.started_over.add(row)
            if row.computed:
                self.cache.store.truncate(row, 0)

    def _draft(self, state: RequestState, drafter: Drafter, rows: list[Sequence], budget: int) -> bool:
        """Guess tokens of rows; `False` when that failed, and with it the request."""
        state.work = []
        for row in rows:
            row.draft = []
        try:
            drafter.draft(rows)
        except Exception as error:
            text = f"drafting for it failed: {error!r}"
            state.end("error", error=RequestFailed(text, request_id=state.request_id, cause=error))
            self.failed.append(state)
            return False
        limit = self._recompute_past
        for row in rows:
            most = min(budget // len(rows), self.cache.spare(row)) - 1
            row.draft = row.draft[: max(0, most)]
            if limit is not None and row.known <= limit:  # none reaches across the length at which rows start over
                row.draft = row.draft[: limit - row.known]
        shortest = min(len(row.draft) for row in rows)  # halves of guidance stay alike
        for row in rows:
            row.draft = row.draft[:shortest]
        return True

    def _plan_rows(self, state: RequestState, budget: int) -> bool:
        """Rows that are decided together: each is brought up to its last token alone, then all are fed that at once.

        While they have only their prompts, the first row of each prompt computes it and the others then share its
        blocks.
        """
        live = [row for row in state.rows if row.finish is None]
        group = state.home.group
        work: list[Work] = []
        first = live[0]
        alike = len(first.tokens) == len(state.wishes.prompt)
        every = True
        for row in [state.rows[place] for place in dict.fromkeys(state.leaders)] if alike else live:
            if row is not first and not row.blocks:
                if not self.cache.admit(row, state.wishes.key):
                    every = False
                    break  # a row before it is computing what they share
                self.cache.count(row)
            self._start_over(state, row)
            behind = min(row.known - row.computed - 1, budget)
            if behind > 0:
                behind = self.cache.chunk(row, behind)
                if not self.cache.extend(row, behind):
                    return False
                work.append(Work(row, behind, 0, group))
                budget -= behind
        if work or not every or budget < len(live):
            state.work = work
            return True
        if alike:
            self._share_prompts(state)
        for row in live:
            self.cache.freeze(row)
        if group.drafter is not None and not self._draft(state, group.drafter, live, budget):
            return True
        if not all(self.cache.extend(row, 1 + len(row.draft)) for row in live):
            for row in live:  # several rows need more blocks for their drafts than one
                row.draft = []
            if not all(self.cache.extend(row, 1) for row in live):
                return False
        state.work = [Work(row, 1 + len(row.draft), 1 + len(row.draft), group) for row in live]
        state.status = RequestStatus.DECODING
        return True

    def _share_prompts(self, state: RequestState) -> None:
        """Give rows without blocks what the first row with their prompt has stored of it."""
        parents = [lead if state.rows[lead].computed else place for place, lead in enumerate(state.leaders)]
        if any(parent != place and not state.rows[place].blocks for place, parent in enumerate(parents)):
            self.cache.store.reparent(state.rows, parents)
            pairs = zip(state.rows, state.leaders, strict=True)
            state.started_over |= {row for row, lead in pairs if state.rows[lead] in state.started_over}


class FIFOScheduler(Scheduler):
    """Requests in the order of their arrival, the next token of running ones before prompts.

    It keeps a fifth of the cache free for running requests before another one starts.
    """

    default_safety_margin = 0.2

    def schedule_batch(self, token_budget: int, cache_budget: int) -> list[RequestState]:
        """See `Scheduler`."""
        return self.fill(
            [*_by_phase(self.active_requests, RequestStatus.DECODING), *self.waiting_requests.values()],
            token_budget,
            cache_budget,
        )


class PrefillFirstScheduler(Scheduler):
    """Prompts that have begun before the next tokens of requests that are past theirs, so that prompts end soon."""

    def schedule_batch(self, token_budget: int, cache_budget: int) -> list[RequestState]:
        """See `Scheduler`."""
        return self.fill(
            [*_by_phase(self.active_requests, RequestStatus.PREFILLING), *self.waiting_requests.values()],
            token_budget,
            cache_budget,
        )


def _runs(state: RequestState) -> bool:
    return state.status is not RequestStatus.PENDING


def _by_phase(active: dict[str, RequestState], first: RequestStatus) -> list[RequestState]:
    """Running requests, those of status `first` before the others."""
    states = active.values()
    return [s for s in states if s.status is first] + [s for s in states if s.status is not first]


_SCHEDULERS: dict[str, type[Scheduler]] = {"fifo": FIFOScheduler, "prefill_first": PrefillFirstScheduler}


def register_scheduler(name: str, scheduler: type[Scheduler]) -> None:
    """Make a scheduler known as `name`, for `ContinuousBatchingConfig(scheduler_type=name)`.

    Raises:
        TypeError: it is no subclass of `Scheduler`, or the name is no text.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a text, not {name!r}")
    if not (isinstance(scheduler, type) and issubclass(scheduler, Scheduler)):
        raise TypeError(f"scheduler must be a subclass of Scheduler, not {scheduler!r}")
    _SCHEDULERS[name] = scheduler


def scheduler_class(name: str) -> type[Scheduler]:
    """The scheduler known as `name`.

    Raises:
        ValueError: there is none.
    """
    if name not in _SCHEDULERS:
        raise ValueError(f"scheduler_type={name!r} is unknown; there are {', '.join(sorted(_SCHEDULERS))}")
    return _SCHEDULERS[name]
