"""What a manager has done, in numbers."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from time import perf_counter

from unspool.continuous.requests import RequestState

__all__ = ["Metrics", "Tally"]

_RECENT = 10.0  # seconds that rates look back


@dataclass(frozen=True, slots=True)
class Metrics:
    """A manager at a moment.

    Attributes:
        waiting, running: requests.
        finished: requests that ended, by finish reason.
        steps: steps so far.
        tokens_fed: tokens computed, those computed again included.
        tokens_made: output tokens; of beams, those that all live ones agree on, and at the end those of the outputs.
        tokens_per_second: output tokens a second over the last ten seconds.
        time_to_first_token: mean seconds from a request's arrival to its first token; `None` before any.
        time_per_token: mean seconds between a request's tokens after the first, of requests that ended; likewise.
        cache_use: share of the blocks that live requests hold.
        cache_peak: the largest such share after any step.
        cache_kept: share of the blocks kept of ended requests, which are given up when room is needed.
        past_bytes: bytes that a module's own pasts take besides, with cross-attention's keys and what an encoder made;
            0 for native and ragged models, all of whose keys and values are in the cache.
        cached_tokens: tokens that were found stored and not computed.
        prefix_hits: the same as a share of the tokens that requests had when they began (again); `None` before any.
        drafted_tokens, accepted_tokens: tokens that were drafted, and that were taken of them.
        preemptions: how often a request was put back to make room.
        swaps: how often what was stored of it was copied to the host meanwhile.
        last_token: seconds since a token was made; `None` before any.
    """

    waiting: int
    running: int
    finished: dict[str, int]
    steps: int
    tokens_fed: int
    tokens_made: int
    tokens_per_second: float
    time_to_first_token: float | None
    time_per_token: float | None
    cache_use: float
    cache_peak: float
    cache_kept: float
    past_bytes: int
    cached_tokens: int
    prefix_hits: float | None
    drafted_tokens: int
    accepted_tokens: int
    preemptions: int
    swaps: int
    last_token: float | None

    @property
    def acceptance(self) -> float | None:
        """Share of the drafted tokens that were taken; `None` before any."""
        return self.accepted_tokens / self.drafted_tokens if self.drafted_tokens else None


@dataclass(slots=True)
class Tally:
    """Counts steps and requests. Owner: the loop."""

    steps: int = 0
    tokens_fed: int = 0
    tokens_made: int = 0
    cache_peak: float = 0.0
    drafted: int = 0
    accepted: int = 0
    finished: Counter[str] = field(default_factory=Counter)
    last_token: float | None = None
    _recent: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=100_000))
    _first: tuple[int, float] = (0, 0.0)
    _between: tuple[int, float] = (0, 0.0)

    def step(self, fed: int, made: int, cache_use: float) -> None:
        """One step was computed, with so much of the cache in use."""
        now = perf_counter()
        self.steps += 1
        self.cache_peak = max(self.cache_peak, cache_use)
        self.tokens_fed += fed
        if made:
            self.tokens_made += made
            self.last_token = now
            self._recent.append((now, made))
            while self._recent and self._recent[0][0] < now - _RECENT:
                self._recent.popleft()

    def end(self, state: RequestState) -> None:
        """A request ended."""
        self.finished[state.finish_reason or "error"] += 1
        self.drafted += state.drafted
        self.accepted += state.accepted
        if state.first_token is None:
            return
        count, total = self._first
        self._first = (count + 1, total + state.first_token - state.created_time)
        more = len(state.generated_tokens) - 1
        if more > 0:
            count, total = self._between
            self._between = (count + more, total + state.lifespan[1] - state.first_token)

    def rate(self) -> float:
        """Output tokens a second, lately."""
        now = perf_counter()
        recent = [(at, made) for at, made in list(self._recent) if at >= now - _RECENT]
        if len(recent) < 2:
            return 0.0
        return sum(made for _, made in recent[1:]) / max(now - recent[0][0], 1e-9)

    def time_to_first_token(self, live: Iterable[RequestState]) -> float | None:
        """Mean of the requests that ended, and of those that live and have a first token."""
        count, total = self._first
        for state in live:
            if state.first_token is not None:
                count, total = count + 1, total + state.first_token - state.created_time
        return total / count if count else None

    @property
    def time_per_token(self) -> float | None:
        """Mean of the requests that ended."""
        return self._between[1] / self._between[0] if self._between[0] else None
