"""Rows that are decided one by one, of any number of requests: one group whose rows come and go.

Rows whose settings are of the same kind are processed together, with each row's own numbers in columns.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence as Items
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import cast

import torch
from torch import Tensor

from unspool.continuous.history import History
from unspool.continuous.requests import RequestState, Wishes
from unspool.decode.choose.noise import key
from unspool.decode.sequence import Choice, Group, Sequence
from unspool.decode.tops import told_logprobs
from unspool.errors import NonFiniteLogits, RequestFailed
from unspool.kernels.draw import draw_seeded
from unspool.logits import run_column
from unspool.logits.ops import greatest

__all__ = ["PlainRows", "log_probabilities"]


@dataclass(slots=True)
class PlainChoice(Choice):
    """Attributes:
    told: per row, the chosen token's log-probability and those of the likeliest; `None` where not asked for.
    failed: per row whose own processor raised, its error.
    states: whose rows they are.
    """

    told: Items[tuple[float, dict[int, float]] | None] | None = None
    failed: dict[int, Exception] | None = None
    states: list[RequestState] = field(default_factory=list)


@dataclass(slots=True)
class Kin:
    """Rows of a step that are processed together.

    Attributes:
        places: among the step's rows.
        index: the same as a tensor; `None` when it is all of them.
        states: whose rows they are.
    """

    places: list[int]
    index: Tensor | None
    states: list[RequestState]


class PlainRows:
    """Chooser, sink and home of greedy and sampled rows; see `decode.sequence` and `requests.Home`.

    Args:
        places: most rows at a time.
        device: where tokens are chosen.
        find_fault: names the first layer whose output is not finite for a row, for the error message; also an
            attribute.
    """

    def __init__(self, places: int, device: torch.device, find_fault: Callable[[Sequence], str]) -> None:
        self.group = Group([], self, self, last=torch.zeros(places, dtype=torch.int64, device=device))
        self.states: list[RequestState | None] = [None] * places
        self.made = 0  # tokens; the engine reads them after a step, and sets this back
        self._free = list(range(places))
        heapify(self._free)
        self._device = device
        self.find_fault = find_fault
        self._history = History(places, device)
        self._generator = torch.Generator(device=device)
        self._arranged: list[RequestState] = []
        self._calm: list[RequestState] | None = None  # rows to which nothing happens but one more token each,
        self._left = 0  # for so many steps less one,
        self._ends: frozenset[int] = frozenset()  # unless it is one of these
        self._kin: list[Kin] = []

    def enter(self, state: RequestState) -> None:
        """See `Home`."""
        row = state.rows[0]
        row.row = heappop(self._free)
        self.states[row.row] = state
        if state.wishes.reads_ids:
            self._history.write(row.row, row.tokens)

    def leave(self, state: RequestState) -> None:
        """See `Home`."""
        place = state.rows[0].row
        assert self.states[place] is state
        self.states[place] = None
        self._arranged, self._calm = [], None
        heappush(self._free, place)

    def choose(self, logits: Tensor, rows: Items[Sequence]) -> PlainChoice:
        """See `Chooser`."""
        scores = logits.float()
        states = cast("list[RequestState]", [self.states[row.row] for row in rows])
        if states != self._arranged:
            self._arrange(states)
        if len(self._kin) == 1 and self._kin[0].index is None:
            tokens, told, failed = self._decide(self._kin[0], scores)
            return PlainChoice(tokens, told=told, failed=failed, states=self._arranged)
        tokens = torch.empty(len(rows), dtype=torch.int64, device=scores.device)
        every: list[tuple[float, dict[int, float]] | None] = [None] * len(rows)
        failures: dict[int, Exception] = {}
        for kin in self._kin:
            assert kin.index is not None
            tokens[kin.index], told, failed = self._decide(kin, scores[kin.index])
            for place, one in zip(kin.places, told or (), strict=False):
                every[place] = one
            failures |= failed
        return PlainChoice(tokens, told=every, failed=failures, states=self._arranged)

    def _arrange(self, states: list[RequestState]) -> None:
        """Put rows together that run the same steps."""
        together: defaultdict[Hashable, list[int]] = defaultdict(list)
        for place, state in enumerate(states):
            wishes = state.wishes
            kinds: Hashable = (
                id(state) if wishes.columns is None else tuple((step.kind, step.static) for step in wishes.columns)
            )
            together[kinds, bool(wishes.config.do_sample), wishes.top_logprobs is None].append(place)
        self._kin = [
            Kin(
                places,
                torch.tensor(places, device=self._device) if len(together) > 1 else None,
                [states[place] for place in places],
            )
            for places in together.values()
        ]
        self._arranged = states

    def _decide(
        self, kin: Kin, scores: Tensor
    ) -> tuple[Tensor, list[tuple[float, dict[int, float]]] | None, dict[int, Exception]]:
        """Tokens of rows that are processed alike, -1 where there is none to choose."""
        first = kin.states[0].wishes
        try:
            scores = self._process(kin.states, scores)
        except Exception as error:
            if first.columns is not None:
                raise  # not the request's own code
            return torch.full((1,), -1, device=scores.device), None, {kin.places[0]: error}
        if first.config.do_sample:
            keys = [key(one.wishes.seed, one.wishes.sample, one.rows[0].known) for one in kin.states]
            tokens = draw_seeded(scores.softmax(dim=-1), keys, self._generator)
        else:
            tokens = greatest(scores)
        told = None
        if first.top_logprobs is not None:
            told = log_probabilities([state.wishes for state in kin.states], scores, tokens.clamp_min(0))
        return tokens, told, {}

    def _process(self, states: list[RequestState], scores: Tensor) -> Tensor:
        first = states[0].wishes
        if first.columns is None:
            row = states[0].rows[0]
            return first.processors(self._history.line(row.row, len(row.tokens)), scores)
        if not first.columns:
            return scores
        widths = [state.rows[0].known for state in states]
        ids = None
        if any(step.reads_ids for step in first.columns):
            ids = self._history.rectangle([state.rows[0].row for state in states], widths, scores.shape[1])
        columns = zip(*(state.wishes.columns or () for state in states), strict=True)
        for column in columns:
            step = column[0]
            scores = run_column(step.kind, step.static, [one.value for one in column], scores, widths, ids)
        return scores

    def commit(self, rows: list[Sequence], tokens: list[int], choice: Choice) -> None:
        """See `Sink`. A row that has no token to choose, or whose criterion raises, fails alone."""
        assert isinstance(choice, PlainChoice)
        states = choice.states
        self.made += len(rows)
        if states is self._calm and self._left > 1 and min(tokens) >= 0 and self._ends.isdisjoint(tokens):
            self._left -= 1
            for row, token in zip(rows, tokens, strict=True):
                row.tokens.append(token)
            return
        self._calm = None
        now = time.perf_counter()
        read: list[RequestState] = []
        for i, (row, token, state) in enumerate(zip(rows, tokens, states, strict=True)):
            if row.finish is not None or state.finish_reason is not None:  # it ended after this step was launched
                self.made -= 1
                continue
            if token < 0:
                self.made -= 1
                self._fail(state, row, (choice.failed or {}).get(i))
                continue
            row.tokens.append(token)
            if token in state.eos:
                row.finish = "stop"
                state.end("stop", stop=token)
            elif len(row.tokens) >= state.most:
                row.finish = "length"
            if state.first_token is None:
                state.first_token = now
            if state.attentive:
                wishes = state.wishes
                if wishes.record_timestamps:
                    state.timestamps.append(now)
                if wishes.reads_ids:
                    read.append(state)
        if choice.told is not None:
            for told, state in zip(choice.told, states, strict=False):
                if told is not None and state.error is None:
                    state.logprobs.append(told[0])
                    state.top_logprobs.append(told[1])
        self._ask(read)
        for row, state in zip(rows, states, strict=True):
            if row.finish is not None:
                state.end(row.finish)
        self._look_ahead(states)

    def _look_ahead(self, states: list[RequestState]) -> None:
        """Find out for how long nothing can happen to these rows but tokens."""
        for state in states:
            if state.finish_reason is not None or state.attentive or state.wishes.top_logprobs is not None:
                return
        self._calm = states
        self._left = min(state.most - len(state.rows[0].tokens) for state in states)
        self._ends = frozenset().union(*{state.eos for state in states})

    def _ask(self, states: list[RequestState]) -> None:
        """Let rows see their newest tokens, and their criteria what they say to them."""
        if not states:
            return
        rows = [state.rows[0] for state in states]
        self._history.append(
            [row.row for row in rows], [len(row.tokens) - 1 for row in rows], [row.tokens[-1] for row in rows]
        )
        for state, row in zip(states, rows, strict=True):
            criteria = state.wishes.limits.criteria
            if criteria and state.finish_reason is None:
                state.ask(criteria, self._history.line(row.row, len(row.tokens)))

    def _fail(self, state: RequestState, row: Sequence, error: Exception | None) -> None:
        if error is not None:
            text = f"a logits processor of its own raised {error!r}"
            state.end("error", error=RequestFailed(text, request_id=state.request_id, cause=error))
            return
        text = f"no token can be chosen at position {len(row.tokens)}; {self.find_fault(row)}"
        state.end("error", error=NonFiniteLogits(text, request_id=state.request_id))


def log_probabilities(wishes: Items[Wishes], scores: Tensor, tokens: Tensor) -> list[tuple[float, dict[int, float]]]:
    """Of each row's chosen token and of its likeliest ones, as many as are asked for.

    Args:
        wishes: of each row.
        scores: `[rows, vocab]`, processed.
        tokens: `[rows]`, chosen.
    """
    return told_logprobs(scores, tokens, [one.top_logprobs or 0 for one in wishes])
