"""What to feed next: the scheduler's seam, and the static plan behind `generate()`."""

from __future__ import annotations

from typing import Protocol

from unspool.decode.runner import Runner
from unspool.decode.sequence import Group, Sequence, Work


class Scheduler(Protocol):
    """Decides each step's work."""

    def plan(self) -> list[Work]:
        """The rows to feed in the next step; empty when nothing is left to do."""
        ...


class StaticScheduler:
    """All rows of one group in step with each other: prompts in chunks, ending together, then one token each.

    Chunks are cut from the right end of the longest prompt, as if the rows were padded on the left, so that every row's
    last chunk falls into the same step and the first tokens of all rows are chosen at once.

    Args:
        group: the rows. Where it has `twins`, only those they name are fed in the prompt's steps.
        runner: told of rows that ended.
        steps: new tokens after which every row has ended; nothing is planned beyond, also when the host has not seen
            the last of them yet. With a drafter, rows end when the sink says so.
        chunk: most columns of prompt in one step; `None` takes the prompts whole.
        recompute_past: see `ModelSpec`; needs every step committed before the next is planned.
        keep_finished: go on feeding rows that ended until all have, for callers that need every row in every step.
        keep_stored: leave the keys and values of rows that ended alone.
    """

    def __init__(
        self,
        group: Group,
        runner: Runner,
        *,
        steps: int,
        chunk: int | None = None,
        recompute_past: int | None = None,
        keep_finished: bool = False,
        keep_stored: bool = False,
    ) -> None:
        self._group = group
        self._runner = runner
        self._steps = steps
        self._recompute_past = recompute_past
        self._keep_finished = keep_finished
        self._keep_stored = keep_stored
        self._rows = list(group.rows)
        self._leaders = self._rows if group.twins is None else list(dict.fromkeys(group.twins))
        self._left = max(row.known - row.computed for row in self._leaders)
        self._chunk = self._left if chunk is None else chunk

    def plan(self) -> list[Work]:
        """Chunks of every prompt that has columns in this stretch, or the next token of every live row."""
        if self._left:
            return self._prompt_chunk()
        live = [row for row in self._rows if row.finish is None]
        if not live or not self._steps:
            return []
        if self._group.drafter is None:
            self._steps -= 1
        if len(live) == len(self._rows) or self._keep_finished:
            return self._next_tokens(self._rows)
        if not self._keep_stored:
            self._runner.retire([row for row in self._rows if row.finish is not None], live)
        self._rows = live
        return self._next_tokens(live)

    def _next_tokens(self, rows: list[Sequence]) -> list[Work]:
        limit = self._recompute_past
        if limit is not None:
            for row in rows:
                if row.computed <= limit < row.known:
                    row.computed = 0
        self._draft(rows)
        return [Work(row, row.known + len(row.draft) - row.computed, 1 + len(row.draft), self._group) for row in rows]

    def _prompt_chunk(self) -> list[Work]:
        self._left = max(0, self._left - self._chunk)
        keep = int(self._left == 0)
        self._steps -= keep
        if keep and self._group.twins is None:
            self._draft(self._leaders)
        feeds = ((row, row.known - row.computed - self._left + len(row.draft)) for row in self._leaders)
        return [Work(row, feed, keep and 1 + len(row.draft), self._group) for row, feed in feeds if feed > 0]

    def _draft(self, rows: list[Sequence]) -> None:
        """Have drafts made, where there is a drafter; none reaches across the length at which rows are recomputed."""
        if self._group.drafter is None:
            return
        self._group.drafter.draft(rows)
        limit = self._recompute_past
        for row in rows:
            if limit is not None and row.known <= limit:
                row.draft = row.draft[: limit - row.known]
