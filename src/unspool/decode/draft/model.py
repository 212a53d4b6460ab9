"""Drafts from a smaller model, run in the core's own loop over a store of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence as Items

import torch
from torch import Tensor

from unspool.decode.draft.rules import DraftRules, Pace
from unspool.decode.loop import Loop
from unspool.decode.plan import StaticScheduler
from unspool.decode.runner import Runner
from unspool.decode.sequence import Choice, Chooser, Group, Sequence


class ModelDrafter:
    """Drafts with a model that shares the rows' vocabulary.

    Args:
        runner: the draft model's, with room for `mirrors`.
        mirrors: one row for each row of the call, with its number and its prompt's tokens.
        chooser: decides the mirrors' tokens, as the rows' own are decided; keeps its scores.
        rules: how much to draft.
        room: `row -> most tokens it may still get`.
        device: the draft model's.
        recompute_past: the draft model's; see `ModelSpec`.
        distributions: keep the distributions that tokens were drawn from, for the check.
    """

    def __init__(
        self,
        runner: Runner,
        mirrors: list[Sequence],
        chooser: Chooser,
        rules: DraftRules,
        room: Callable[[Sequence], int],
        device: torch.device,
        *,
        recompute_past: int | None,
        distributions: bool,
    ) -> None:
        self._runner = runner
        self._mirrors = mirrors
        self._chooser = chooser
        self._rules = rules
        self._room = room
        self._device = device
        self._recompute_past = recompute_past
        self._paces = [Pace(rules) for _ in mirrors]
        self._distributions: dict[int, list[Tensor]] | None = {} if distributions else None
        self._limits: dict[int, int] = {}

    def draft(self, rows: Items[Sequence]) -> None:
        """See `Drafter`."""
        live: list[Sequence] = []
        for row in rows:
            row.draft = []
            tokens = min(self._paces[row.row].next(row), self._room(row) - 1)
            if tokens > 0 and row.finish is None:
                mirror = self._mirrors[row.row]
                self._follow(mirror, row)
                self._limits[row.row] = len(row.tokens) + tokens
                live.append(mirror)
        if not live:
            return
        if self._distributions is not None:
            self._distributions = {mirror.row: [] for mirror in live}
        group = Group(live, self._chooser, self)
        scheduler = StaticScheduler(
            group,
            self._runner,
            steps=max(self._limits.values()),
            recompute_past=self._recompute_past,
            keep_stored=True,
        )
        Loop(self._runner, scheduler, device=self._device, in_step=True).run()
        for row in rows:
            mirror = self._mirrors[row.row]
            if mirror in live:
                row.draft = mirror.tokens[len(row.tokens) :]
                self._paces[row.row].made(len(row.draft))

    def proposals(self, row: Sequence) -> Tensor | None:
        """The distributions `[draft, vocab]` that a row's draft was drawn from."""
        if self._distributions is None or row.row not in self._distributions:
            return None
        return torch.stack(self._distributions[row.row])

    def commit(self, rows: list[Sequence], tokens: list[int], choice: Choice) -> None:
        """Take one step's tokens of the draft model; see `Sink`."""
        assert choice.scores is not None
        needed = self._rules.confidence > 0 or self._distributions is not None
        distributions = choice.scores.softmax(dim=-1) if needed else choice.scores
        sure = None
        if self._rules.confidence > 0:
            picked = torch.tensor(tokens, device=self._device).clamp_min(0)
            sure = (distributions.gather(1, picked[:, None])[:, 0] >= self._rules.confidence).tolist()
        for i, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            if token < 0:  # no number to choose from: whatever the draft model's trouble is, the row goes on without
                row.finish = "stop"
                continue
            row.tokens.append(token)
            if self._distributions is not None:
                self._distributions[row.row].append(distributions[i])
            full = len(row.tokens) >= self._limits[row.row]
            if full or token in self._rules.eos or (sure is not None and not sure[i]):
                row.finish = "stop"

    def _follow(self, mirror: Sequence, row: Sequence) -> None:
        """Make a mirror's tokens the row's, keeping what is stored as far as they agree; the last is fed again."""
        limit = min(mirror.computed, len(mirror.tokens), len(row.tokens) - 1)
        same = limit
        if mirror.tokens[:limit] != row.tokens[:limit]:
            same = next(i for i in range(limit) if mirror.tokens[i] != row.tokens[i])
        limit = self._recompute_past or len(row.tokens)
        if same <= limit < len(row.tokens):
            same = 0
        if mirror.computed > same:
            self._runner.rewind(mirror, same)
        mirror.tokens = list(row.tokens)
        mirror.finish = None
