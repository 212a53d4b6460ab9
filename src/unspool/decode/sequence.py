"""The nouns of the core: a row of true tokens, and rows that are decided together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence as Items
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from unspool.models.adapters import Adapter


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
        draft: tokens guessed to follow the known ones, to be fed with them and checked in one step. Owner: the drafter.
        embeds: `[n, hidden]` what is fed in place of the embeddings of the first `n` tokens, or `None`.
        adapter: what its tokens go through beside the model's weights, or `None`.
        inputs: what a module in rows is told beside the tokens, by name: what its encoder reads, pictures; or `None`.
    """

    row: int
    tokens: list[int]
    computed: int = 0
    pending: int = 0
    blocks: list[list[int]] = field(default_factory=list)
    finish: str | None = None
    draft: list[int] = field(default_factory=list)
    embeds: Tensor | None = None
    adapter: Adapter | None = None
    inputs: Mapping[str, Any] | None = None

    @property
    def known(self) -> int:
        """Tokens the row has, in flight ones included; what is not computed of them is to be fed."""
        return len(self.tokens) + self.pending


class Work(NamedTuple):
    """Feed `feed` tokens of `seq`, a row of `group`, and give the logits of the last `keep` of them.

    A prompt is `(n, 1)`, a middle chunk of one `(n, 0)`, a decode step `(1, 1)`, a draft to verify `(1 + k, 1 + k)`.
    """

    seq: Sequence
    feed: int
    keep: int
    group: Group


@dataclass(slots=True)
class Choice:
    """What was decided in one step for the rows of a group that had logits.

    Attributes:
        tokens: `[rows]` int64; -1 for a row whose scores held no number to choose. With `counts`, `[sum of counts]`.
        scores: `[rows, vocab]` fp32, processed; `None` unless the chooser was asked to keep them.
        logits: `[rows, vocab]` fp32, as the model gave them; likewise.
        parents: `[rows]` int64, the place among these rows of the one that each continues; `None` where each continues
            itself. Needs every step committed before the next is planned.
        ended: `[rows]` bool, rows that the chooser itself ends; `None` where that is the sink's decision alone.
        counts: tokens decided for each row, side by side in `tokens`: a draft's accepted ones and the one after them.
            `None` where it is one each. Needs every step committed before the next is planned.
        candidates: `[candidates]` int64, `place * vocab + token` of all continuations that may be in a result, where
            those are more than the `tokens`; `None` where they are not, or no scores are kept.
    """

    tokens: Tensor
    scores: Tensor | None = None
    logits: Tensor | None = None
    parents: Tensor | None = None
    ended: Tensor | None = None
    counts: list[int] | None = None
    candidates: Tensor | None = None


class Chooser(Protocol):
    """Decides tokens from logits, on the device and without asking the host."""

    def choose(self, logits: Tensor, rows: Items[Sequence]) -> Choice:
        """Decide what follows `rows`, from `logits` `[rows, vocab]`.

        A row with a draft has `1 + len(row.draft)` rows of logits, one after each token that was fed.
        """
        ...


class Sink(Protocol):
    """Where committed tokens of a group go."""

    def commit(self, rows: list[Sequence], tokens: list[int], choice: Choice) -> None:
        """Take one step: `tokens[i]` (or `choice.counts[i]` tokens) were chosen for `rows[i]`.

        Appends them to the rows and sets `finish` of those that end.
        """
        ...


class Drafter(Protocol):
    """Guesses what follows, for a step that checks several tokens of a row at once."""

    def draft(self, rows: Items[Sequence]) -> None:
        """Set `draft` of each of `rows`, which are about to be fed; it may stay empty."""
        ...


@dataclass(frozen=True, slots=True)
class Want:
    """What a step is to give besides logits.

    Attributes:
        weights: attention weights of every layer.
        layers: whose hidden states: 0 is what enters the first layer, and the number of layers what leaves the final
            norm; `None` for all of them.
    """

    weights: bool = False
    layers: frozenset[int] | None = frozenset()

    def __or__(self, other: Want) -> Want:
        """What either wants."""
        every = self.layers is None or other.layers is None
        return Want(self.weights or other.weights, None if every else (self.layers or _NONE) | (other.layers or _NONE))


_NONE: frozenset[int] = frozenset()


class Watch(Protocol):
    """Sees what a step gives besides logits, before its tokens are chosen."""

    @property
    def want(self) -> Want:
        """What it looks at."""
        ...

    def __call__(self, work: list[Work], weights: list[list[Tensor]], hidden: list[Tensor]) -> None:
        """Take attention weights by layer and item of work, and hidden states `[tokens, hidden]` by layer.

        A layer that is not wanted is an empty tensor, unless somebody else wants it.
        """
        ...


@dataclass(slots=True, eq=False)
class Group:
    """Rows decided together.

    Attributes:
        rows: all of them, in order; finished ones stay listed.
        chooser: decides their tokens.
        sink: takes them; appends to the rows and ends them.
        twins: for each row, the row whose prompt it shares (itself where it shares none), when only the latter are fed
            in the prompt's steps; the others then get its keys, values and logits. Owner: the loop, which clears it.
        drafter: guesses tokens before each decode step, or `None`.
        watch: sees attention weights or hidden states of every step, or `None`.
        last: `[rows]` the newest chosen token of each row on the device, what a decode step feeds. Owner: the loop.
    """

    rows: list[Sequence]
    chooser: Chooser
    sink: Sink
    twins: list[Sequence] | None = None
    drafter: Drafter | None = None
    watch: Watch | None = None
    last: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
