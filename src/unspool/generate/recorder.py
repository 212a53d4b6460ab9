"""Where a static call's tokens go: rows, limits, criteria, streamer, and whatever else was asked to be kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NoReturn

import torch
from torch import Tensor

from unspool.decode.choose.sample import Rectangle
from unspool.decode.sequence import Choice, Sequence
from unspool.decode.tops import Tops
from unspool.errors import NonFiniteLogits
from unspool.generate.stream import Stream
from unspool.stopping import Limits


@dataclass(slots=True)
class Kept:
    """Per step, what `return_dict_in_generate` asked for; `None` where it was not.

    `beams` has the numbers of the rows, the places that they continue (see `Choice.parents`), and their tokens.
    """

    scores: list[Tensor] | None = None
    logits: list[Tensor] | None = None
    tops: Tops | None = None
    beams: list[tuple[list[int], Tensor, Tensor]] | None = None

    @property
    def needs_scores(self) -> bool:
        """Whether choices must come with their scores."""
        return self.scores is not None or self.tops is not None

    def add(self, choice: Choice, rows: list[Sequence], live: list[int]) -> None:
        """Keep what is asked for of one step's choice for `rows`; those at the places `live` had not ended before."""
        if self.tops is not None and choice.scores is not None:
            if choice.candidates is not None:
                self.tops.add_candidates([row.row for row in rows], choice.scores, choice.candidates)
            else:
                some = slice(None) if len(live) == len(rows) else torch.tensor(live, device=choice.scores.device)
                self.tops.add([rows[place].row for place in live], choice.scores[some], choice.tokens[some])
        if self.scores is not None and choice.scores is not None:
            self.scores.append(choice.scores)
        if self.logits is not None and choice.logits is not None:
            self.logits.append(choice.logits)
        if self.beams is not None and choice.parents is not None:
            self.beams.append(([row.row for row in rows], choice.parents, choice.tokens))


def refuse_nothing(row: Sequence, find_fault: Callable[[Sequence], str]) -> NoReturn:
    """Raise `NonFiniteLogits` for a row whose scores held no number to choose."""
    raise NonFiniteLogits(f"no token can be chosen at position {len(row.tokens)}; {find_fault(row)}", row=row.row)


@dataclass(slots=True, eq=False)
class Recorder:
    """The sink of a static group (see `decode.sequence.Sink`).

    Attributes:
        rows: all rows of the call.
        history: the columns so far.
        limits: when rows end.
        stream: the streamer's entrance, or `None`.
        kept: scores and logits.
        keep_finished: rows that ended still get fillers as tokens, because they are fed until all have ended.
        find_fault: names the first layer whose output is not finite for a row, for the error message.
    """

    rows: list[Sequence]
    history: Rectangle
    limits: Limits
    stream: Stream | None
    kept: Kept
    keep_finished: bool
    find_fault: Callable[[Sequence], str]
    _columns: int = field(init=False)

    def __post_init__(self) -> None:
        self._columns = self.history.width

    def commit(self, rows: list[Sequence], tokens: list[int], choice: Choice) -> None:
        """Append the step's tokens, end rows, stream; raises `NonFiniteLogits` for a row without a choice."""
        places = [place for place, row in enumerate(rows) if row.finish is None]
        live = [rows[place] for place in places]
        self._columns += 1
        full = self._columns >= self.limits.max_columns
        for row, token in zip(rows, tokens, strict=True):
            if row.finish is not None:
                if self.keep_finished:
                    row.tokens.append(self.history.filler)
                continue
            if token < 0:
                refuse_nothing(row, self.find_fault)
            row.tokens.append(token)
            if token in self.limits.eos:
                row.finish = "stop"
            elif full:
                row.finish = "length"
        self.kept.add(choice, rows, places)
        if self.limits.criteria:
            self._ask_criteria(live)
        if self.stream is not None:
            self._put(live)

    def _ask_criteria(self, live: list[Sequence]) -> None:
        scores = None if self.kept.scores is None else tuple(self.kept.scores)
        done = self.limits.criteria(self.history.ids(), scores).tolist()
        for row in live:
            if done[row.row] and row.finish is None:
                row.finish = "stop"

    def _put(self, live: list[Sequence]) -> None:
        assert self.stream is not None
        news = torch.full((len(self.rows),), self.history.filler)
        flags = [False] * len(self.rows)
        for row in live:
            news[row.row] = row.tokens[-1]
            flags[row.row] = True
        if any(flags):
            self.stream.step(news, flags)
