"""The nouns of the core: a row of true tokens, and rows that are decided together."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


@dataclass(slots=True, eq=False)
class Sequence:
    """One row: its true tokens, never padding.

    Attributes:
        row: the row's number in its group.
        tokens: prompt and committed output. Owner: the sink, which appends; the loop when a row is forked.
        computed: how many tokens' keys and values are stored, those of a launched step included. Owner: the loop.
        pending: tokens chosen on the device and not yet committed. Owner: the loop.
        blocks: block table per layer group. Owner: the store.
        finish: why the row ended: `"stop"` (end token or criterion), `"length"`, or `None` while it lives.
    """

    row: int
    tokens: list[int]
    computed: int = 0
    pending: int = 0
    blocks: list[list[int]] = field(default_factory=list)
    finish: str | None = None

    @property
    def known(self) -> int:
        """Tokens the row has, in flight ones included; what is not computed of them is to be fed."""
        return len(self.tokens) + self.pending


class Work(NamedTuple):
    """Feed `feed` tokens of `seq` and give the logits of the last `keep` of them.

    A prompt is `(n, 1)`, a middle chunk of one `(n, 0)`, a decode step `(1, 1)`, a draft to verify `(1 + k, 1 + k)`.
    """

    seq: Sequence
    feed: int
    keep: int


@dataclass(slots=True)
class Choice:
    """What was decided in one step for the rows of a group that had logits.

    Attributes:
        tokens: `[rows]` int64; -1 for a row whose scores held no number to choose.
        scores: `[rows, vocab]` fp32, processed; `None` unless the chooser was asked to keep them.
        logits: `[rows, vocab]` fp32, as the model gave them; likewise.
        parents: `[rows]` int64, the place among these rows of the one that each continues; `None` where each continues
            itself. Needs every step committed before the next is planned.
        ended: `[rows]` bool, rows that the chooser itself ends; `None` where that is the sink's decision alone.
    """

    tokens: Tensor
    scores: Tensor | None = None
    logits: Tensor | None = None
    parents: Tensor | None = None
    ended: Tensor | None = None


class Chooser(Protocol):
    """Decides tokens from logits, on the device and without asking the host."""

    def choose(self, logits: Tensor, rows: Items[Sequence]) -> Choice:
        """Decide the next token of `rows` from `logits` `[rows, vocab]`."""
        ...


class Sink(Protocol):
    """Where committed tokens of a group go."""

    def commit(self, rows: list[Sequence], tokens: list[int], choice: Choice) -> None:
        """Take one step: `tokens[i]` was chosen for `rows[i]`; sets `finish` of the rows that end with it."""
        ...


@dataclass(slots=True, eq=False)
class Group:
    """Rows decided together.

    Attributes:
        rows: all of them, in order; finished ones stay listed.
        chooser: decides their tokens.
        sink: takes them; appends to the rows and ends them.
        last: `[rows]` the newest chosen token of each row on the device, what a decode step feeds. Owner: the loop.
    """

    rows: list[Sequence]
    chooser: Chooser
    sink: Sink
    last: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
