"""Drafts from a smaller model, run in the core's own loop over a store of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence as Items

import torch
from torch import Tensor

from unspool.decode.draft.rules import DraftRules, Pace
from unspool.decode.draft.words import SameWords, Words
from unspool.decode.loop import Loop
from unspool.decode.plan import StaticScheduler
from unspool.decode.runner import PagedRunner, Runner
from unspool.decode.sequence import Choice, Chooser, Group, Sequence
from unspool.kernels.program import Stops
from unspool.logits.ops import sureness

# Tokens of a row that a model which goes on by itself is still to be fed, one in a step.
_FEW = 3


class ModelDrafter:
    """Drafts with another model.

    Args:
        runner: the draft model's, with room for `mirrors`.
        mirrors: one row for each row of the call, with its number; it gets the tokens that say what the row says.
        chooser: decides the mirrors' tokens, as the rows' own are decided; keeps its scores
            where the rules weigh them, or distributions are kept.
        rules: how much to draft.
        room: `row -> most tokens it may still get`.
        device: the draft model's.
        recompute_past: the draft model's; see `ModelSpec`.
        distributions: keep the distributions that tokens were drawn from, for the check.
        greedy: the chooser takes the draft model's likeliest token and changes nothing.
        words: how the rows' tokens and the draft model's are translated.
        positions: most tokens of one of the draft model's rows.
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
        greedy: bool = False,
        words: Words | None = None,
        positions: int | float = math.inf,
    ) -> None:
        self._runner = runner
        self._mirrors = mirrors
        self._chooser = chooser
        self._rules = rules
        self._room = room
        self._device = device
        self._recompute_past = recompute_past
        self._paces = [Pace(rules) for _ in mirrors]
        self._greedy = greedy and words is None and recompute_past is None
        self._words = SameWords() if words is None else words
        self._positions = positions
        self._drafted: list[list[int]] = [[] for _ in mirrors]
        self._distributions: dict[int, list[Tensor]] | None = {} if distributions else None
        self._drafting = 0
        self._limits = [0] * len(mirrors)
        self._whole = False
        self._likely = [1.0] * len(mirrors)

    def draft(self, rows: Items[Sequence]) -> None:
        """See `Drafter`."""
        live: list[tuple[Sequence, Sequence, list[int]]] = []
        most: int | float = math.inf
        if self._device.type == "cpu":
            going = sum(row.finish is None for row in rows)
            most = self._rules.share(going)
            # a step for several rows takes as long as it has tokens, and one that is likely wrong costs what others do
            self._whole = going > 1
        for row in rows:
            row.draft = []
            tokens = int(min(self._paces[row.row].next(row), self._room(row) - 1, most))
            if tokens <= 0 or row.finish is not None:
                continue
            known = self._words.known(row)
            tokens = int(min(tokens, self._positions - len(known)))
            if known and tokens > 0:
                mirror = self._mirrors[row.row]
                self._follow(mirror, known)
                self._limits[row.row] = tokens
                self._drafted[row.row] = []
                self._likely[row.row] = 1.0
                live.append((row, mirror, known))
        if not live:
            return
        if self._distributions is not None:
            self._distributions = {row.row: [] for row, _, _ in live}
        self._run([mirror for _, mirror, _ in live])
        for row, _, known in live:
            drafted = self._drafted[row.row]
            row.draft = self._words.draft(row, known, drafted)[: self._room(row) - 1]
            self._paces[row.row].made(len(row.draft))

    def _run(self, mirrors: list[Sequence]) -> None:
        """Decode with the draft model until every mirror has its draft, or most of them."""
        self._drafting = len(mirrors)
        if self._greedy and not self._go_on(mirrors):
            self._steps(mirrors, 1)  # whole texts are fed faster so
            self._go_on([mirror for mirror in mirrors if mirror.finish is None])
        if left := [mirror for mirror in mirrors if mirror.finish is None]:
            self._steps(left, max(self._limits))

    def _steps(self, mirrors: list[Sequence], steps: int) -> None:
        scheduler = StaticScheduler(
            Group(mirrors, self._chooser, self),
            self._runner,
            steps=steps,
            recompute_past=self._recompute_past,
            keep_stored=True,
        )
        Loop(self._runner, scheduler, device=self._device, in_step=True).run()

    def _go_on(self, mirrors: list[Sequence]) -> bool:
        """Let the draft model go on by itself, where nothing but its likeliest tokens is wanted; whether it could."""
        if any(len(mirror.tokens) - mirror.computed > _FEW for mirror in mirrors):
            return False
        if not mirrors or not isinstance(self._runner, PagedRunner):
            return False
        limits = [self._limits[mirror.row] - len(self._drafted[mirror.row]) for mirror in mirrors]
        chosen = self._runner.go_on(mirrors, Stops(limits, self._rules.eos, self._rules.confidence))
        for mirror, (tokens, shares) in zip(mirrors, chosen, strict=bool(chosen)):
            for token, share in zip(tokens, shares, strict=True):
                self._take(mirror, token, share)
            mirror.finish = "stop"
            mirror.computed = min(mirror.computed, len(mirror.tokens))
        return bool(chosen)

    def proposals(self, row: Sequence) -> Tensor | None:
        """The distributions `[draft, vocab]` that a row's draft was drawn from."""
        if self._distributions is None or row.row not in self._distributions:
            return None
        return torch.stack(self._distributions[row.row][: len(row.draft)])

    def commit(self, rows: list[Sequence], tokens: list[int], choice: Choice) -> None:
        """Take one step's tokens of the draft model; see `Sink`."""
        shares = [1.0] * len(rows)
        distributions = None if choice.scores is None or self._greedy else choice.scores.softmax(dim=-1)
        if self._rules.confidence > 0:
            if self._greedy:
                assert choice.scores is not None
                shares = sureness(choice.scores, choice.tokens)
            else:
                assert distributions is not None
                shares = distributions.gather(1, choice.tokens.clamp_min(0)[:, None])[:, 0].tolist()
        if self._distributions is not None:
            assert distributions is not None
            for row, token, distribution in zip(rows, tokens, distributions, strict=True):
                if token >= 0:
                    self._distributions[row.row].append(distribution)
        for row, token, share in zip(rows, tokens, shares, strict=True):
            self._take(row, token, share)
        going = sum(row.finish is None for row in rows)
        if 2 * going < self._drafting:  # a step for few rows costs as much as one for many
            for row in rows:
                row.finish = "stop"

    def _take(self, row: Sequence, token: int, share: float) -> None:
        """Append a token of so much probability to a row that goes on; end it when it has its draft, or is not sure."""
        if row.finish is not None:
            return
        drafted, likely = self._drafted[row.row], self._likely[row.row] * share
        self._likely[row.row] = likely
        unlikely = self._whole and likely < self._rules.confidence
        # A token that was drawn is checked whatever it is: leaving out the unlikely would change the distribution.
        if token < 0 or (unlikely and self._distributions is None):
            row.finish = (
                "stop"  # without a number to choose from, whatever the draft model's trouble is, the row goes on
            )
            return
        drafted.append(token)
        row.tokens.append(self._words.take(row.row, token))
        full = len(drafted) >= self._limits[row.row]
        if full or unlikely or token in self._rules.eos or share < self._rules.confidence:
            row.finish = "stop"

    def _follow(self, mirror: Sequence, known: list[int]) -> None:
        """Make a mirror's tokens `known`, keeping what is stored as far as they agree; the last is fed again."""
        limit = min(mirror.computed, len(mirror.tokens), len(known) - 1)
        same = limit
        if mirror.tokens[:limit] != known[:limit]:
            same = next(i for i in range(limit) if mirror.tokens[i] != known[i])
        limit = self._recompute_past or len(known)
        if same <= limit < len(known):
            same = 0
        if mirror.computed > same:
            self._runner.rewind(mirror, same)
        mirror.tokens = known
        mirror.finish = None
